"""examples/ray: a request whose replica dies may be made again, and none that is made again is lost."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import pytest

httpx = pytest.importorskip("httpx")
ray = pytest.importorskip("ray", reason="Ray has an environment of its own: `make test-engines`")
import onnxruntime as ort  # noqa: E402

from paths import ROOT, exporter, models, plugin, runner  # noqa: E402

EXAMPLE = ROOT / "examples" / "ray" / "serve_retro.py"
LIBRARY = Path(ort.__file__).parent / "capi" / f"libonnxruntime.so.{ort.__version__}"
ENVIRONMENT = os.environ | {"ORT_DYLIB_PATH": str(LIBRARY), "RETRO_ATTENTION_PLUGIN": plugin(), "RAY_USAGE_STATS_ENABLED": "0"}
PROMPTS = ["def read", "class Node", "import os", "for line in", "while True", "return [", "with open(", "raise Value"]


def body(prompt, stream=False):
    return {"prompt": prompt, "max_tokens": 96, "temperature": 0, "stream": stream}


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """An address, and the model behind it."""
    folder = tmp_path_factory.mktemp("ray")
    for command in [
        [models(), "build", "--weights", ROOT / "models" / "code", "-o", folder / "code"],
        [exporter(), folder / "code", "-o", folder / "retro", "--no-verify"],
    ]:
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=ENVIRONMENT)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tempfile.NamedTemporaryFile("w+", suffix=".log")
    options = ["--replicas", "2", "--cpus", "0.5", "--port", str(port), "--retro-run", runner(), "--", "--threads", "1", "--parallel", "4"]
    # A process group: what the driver starts ends with it.
    process = subprocess.Popen(
        [sys.executable, EXAMPLE, folder / "retro", *options], stdout=log, stderr=log, env=ENVIRONMENT, start_new_session=True
    )
    try:
        limit = time.monotonic() + 240
        while not (found := re.search(r"^ready: (\S+)", Path(log.name).read_text(), re.MULTILINE)):
            assert process.poll() is None and time.monotonic() < limit, Path(log.name).read_text()
            time.sleep(0.5)
        yield found[1], folder / "retro"
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(90)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)


@pytest.fixture
def address(served):
    return served[0]


def servers(model):
    """The processes of the servers of a model, and the replicas that started them."""
    found = {}
    for entry in Path("/proc").iterdir():
        try:
            words = (entry / "cmdline").read_bytes().split(b"\0") if entry.name.isdigit() else []
            if words[:3] == [runner().encode(), b"serve", os.fsencode(model)]:
                parent = re.search(r"^PPid:\s+(\d+)", (entry / "status").read_text(), re.MULTILINE)[1]
                found[int(entry.name)] = int(parent)
        except OSError:  # it has ended meanwhile
            pass
    return found


def ask(address, prompt, tries=60):
    """As a client that may ask again does. The text, and how often it asked."""
    for number in range(tries):
        try:
            answer = httpx.post(address + "/v1/completions", json=body(prompt), timeout=60)
            if answer.status_code == 200:
                return answer.json()["choices"][0]["text"], number
            assert answer.status_code >= 500, answer.text
        except httpx.TransportError:
            pass
        time.sleep(0.5)
    raise AssertionError(f"{prompt!r}: no answer in {tries} tries")


def test_requests_and_streams_go_through(address):
    assert httpx.get(address + "/v1/models").json()["data"]
    whole = ask(address, PROMPTS[0])[0]
    with httpx.stream("POST", address + "/v1/completions", json=body(PROMPTS[0], stream=True), timeout=60) as answer:
        events = [line.removeprefix("data: ") for line in answer.iter_lines() if line.startswith("data: ")]
    assert len(events) > 5 and events[-1] == "[DONE]"
    assert "".join(json.loads(event)["choices"][0]["text"] for event in events[:-1]) == whole
    # An error of the server's is the server's.
    assert httpx.post(address + "/v1/completions", json={"prompt": 7.5}).status_code == 400


@pytest.mark.parametrize("victim", ["replica", "server"])
def test_one_of_two_is_killed(served, victim):
    address, model = served
    limit = time.monotonic() + 120
    while len(before := servers(model)) != 2:
        assert time.monotonic() < limit, before
        time.sleep(0.5)
    expected = {prompt: ask(address, prompt)[0] for prompt in PROMPTS}
    server, replica = next(iter(before.items()))
    with ThreadPoolExecutor(6) as pool:
        asked = {pool.submit(ask, address, prompt): prompt for prompt in PROMPTS * 6}
        # In the middle of it, when both replicas have work.
        for number, _ in enumerate(as_completed(asked)):
            if number == 6:
                os.kill(replica if victim == "replica" else server, signal.SIGKILL)
    answers = [(prompt, *future.result()) for future, prompt in asked.items()]
    assert all(text == expected[prompt] for prompt, text, _ in answers)
    # Where a replica dies, Ray itself may have asked again.
    assert victim == "replica" or any(again for _, _, again in answers), "nothing was being answered there: the test tested nothing"
    assert server not in servers(model)
    # Ray starts another.
    while len(after := servers(model)) != 2:
        assert time.monotonic() < limit + 120, after
        time.sleep(0.5)
