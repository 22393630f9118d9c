"""The page of `retro-run serve`, in a browser."""

import os
from pathlib import Path

import pytest

import browser
from test_serve import model, pytestmark, server  # noqa: F401

needs_browser = pytest.mark.skipif(browser.find() is None, reason="no Chromium on this machine")


@pytest.fixture
def page(server, tmp_path):  # noqa: F811
    with browser.Browser(tmp_path / "profile") as page:
        page.call("Emulation.setDeviceMetricsOverride", width=1280, height=800, deviceScaleFactor=1, mobile=False)
        page.open(server.url + "/")
        page.wait("document.getElementById('state')?.textContent.includes('slots')")
        yield page


def picture(page, name):
    """For whoever wants to look: $RETRO_SCREENSHOTS names a folder."""
    if folder := os.environ.get("RETRO_SCREENSHOTS"):
        page.picture(Path(folder) / f"{name}.png")


def answered(page, count):
    page.wait(f"!running && document.querySelectorAll('#messages .assistant').length === {count}", 60)


@needs_browser
def test_a_conversation_by_keyboard(page):
    assert page.value("document.activeElement.id") == "text"
    assert page.value("document.title").startswith("code")
    page.value("at('most').value = 24; at('temperature').value = 0")
    attack = "<img src=x onerror='window.hit = 1'> def f(x):"
    page.type(attack)
    page.press("Enter")
    answered(page, 1)
    assert page.value("document.querySelector('#messages .user p').textContent") == attack
    assert page.value("document.querySelector('#messages img') === null && window.hit === undefined")
    answer = page.value("document.querySelector('#messages .assistant p').textContent")
    assert answer and page.value("at('spoken').textContent") == answer
    for figure in ["rate", "first", "pages", "share", "prompt"]:
        assert any(c.isdigit() for c in page.value(f"at('{figure}').textContent")), figure
    assert page.value("document.activeElement.id") == "text"
    picture(page, "light")
    # The second turn: its prompt begins with what a slot holds.
    page.type("def g(y):")
    page.press("Enter")
    answered(page, 2)
    assert int(page.value("at('prompt').textContent").split(", ")[1]) > 0
    page.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark"}])
    picture(page, "dark")
    page.call("Emulation.setDeviceMetricsOverride", width=390, height=800, deviceScaleFactor=2, mobile=True)
    assert page.value("document.documentElement.scrollWidth <= 390"), "nothing is cut off on a phone"
    picture(page, "phone")


@needs_browser
def test_settings_are_sent_and_escape_stops(page, server):  # noqa: F811
    page.value("window.asked = []; const send = fetch; fetch = (u, o) => { if (o?.body) asked.push(JSON.parse(o.body)); return send(u, o); }")
    # Sliders move by keys.
    page.value("at('window').focus()")
    before = page.value("at('window').value")
    page.call("Input.dispatchKeyEvent", type="rawKeyDown", key="ArrowLeft", code="ArrowLeft", windowsVirtualKeyCode=37)
    assert int(page.value("at('window').value")) == int(before) - 1
    page.value("at('budget').value = 20; at('system').value = 'Be brief.'; at('seed').value = 5; at('text').focus()")
    page.type("def long(")
    page.press("Enter")
    page.wait("document.querySelector('#messages .assistant p')?.textContent.length > 20")
    # Figures are of this moment: they go on as the answer does.
    figures = ["rate", "tokens", "first", "pages", "share", "prompt"]
    at_first = {figure: page.value(f"at('{figure}').textContent") for figure in figures}
    assert all(any(c.isdigit() for c in text) for text in at_first.values()), at_first
    page.wait(f"Number(at('tokens').textContent) > {at_first['tokens']} + 5")
    assert page.value("running !== null"), "the answer goes on meanwhile"
    page.press("Escape")
    page.wait("!running")
    (asked,) = page.value("asked")
    assert asked["window"] == int(before) - 1 and asked["budget"] == "0.20" and asked["seed"] == 5
    assert asked["messages"][0] == {"role": "system", "content": "Be brief."}
    page.value("at('new').click()")
    assert page.value("at('messages').children.length") == 0
    # An error is said, and the talk goes on.
    page.value("at('most').value = -3")
    page.type("x")
    page.press("Enter")
    page.wait("!running && document.querySelector('#messages .failed') !== null")
    assert "max_tokens" in page.value("document.querySelector('#messages .failed p').textContent")


@needs_browser
def test_everything_has_a_name_for_screen_readers(page):
    nodes = page.call("Accessibility.getFullAXTree")["nodes"]
    roles = {"textbox", "slider", "button", "spinbutton", "list", "region", "complementary"}
    found = [(n["role"]["value"], n.get("name", {}).get("value", "")) for n in nodes if not n.get("ignored")]
    nameless = [role for role, name in found if role in roles and not name.strip()]
    assert not nameless, found
    assert {role for role, _ in found} >= {"textbox", "slider", "button", "status"}
