"""What a host meets: loading, errors as exceptions, many threads, optional inputs."""

import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import onnxruntime as ort
import pytest

import golden
import node
from paths import plugin

CASE = golden.case("a_w4_p16")
ATTRIBUTES = node.attributes_of(CASE)


def prompt_feed(length=100, dtype=np.float32):
    return node.feed(CASE.rows("prompt", 0, length, dtype), length, -1) | node.poison(CASE, dtype)


def test_one_session_options_for_many_sessions():
    options = node.options()
    for dtype in (np.float32, np.float16):
        for _ in range(3):
            session = ort.InferenceSession(node.model(ATTRIBUTES, dtype), options, providers=["CPUExecutionProvider"])
            session.run(None, prompt_feed(dtype=dtype))


def test_many_session_options():
    for _ in range(5):
        node.session(ATTRIBUTES).run(None, prompt_feed())


def test_without_the_plugin_the_model_does_not_load():
    with pytest.raises(Exception, match="RetroAttention|ai.retro"):
        ort.InferenceSession(node.model(ATTRIBUTES), providers=["CPUExecutionProvider"])


def test_loading_and_leaving_in_a_process_of_its_own():
    """The plugin is still needed while the host tears down: no crash at exit, sessions alive or not."""
    script = f"""
        import onnxruntime as ort
        options = ort.SessionOptions()
        options.register_custom_ops_library({plugin()!r})
        kept = options
    """
    result = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.parametrize(
    "name, array, says",
    [
        ("query", np.zeros((1, 100, 255), np.float32), ["255", "256"]),
        ("key", np.zeros((1, 99, 64), np.float32), ["99", "100"]),
        ("past_key", np.zeros((1, 2, CASE.capacity, 64), np.float32), ["2", "1"]),
        ("past_page_steps", np.zeros((1, 1, 3), np.int32), ["3", "17"]),
        ("seqlens_k", np.array([CASE.capacity], np.int32), [str(CASE.capacity)]),
        ("retro_length", np.array([-7], np.int32), ["-7"]),
        ("page_budget", np.array([-2], np.int32), ["-2"]),
    ],
)
def test_errors_are_exceptions_that_name_the_input(name, array, says):
    session = node.session(ATTRIBUTES)
    with pytest.raises(Exception) as error:
        session.run(None, prompt_feed() | {name: array})
    for word in [name, *says]:
        assert word in str(error.value)
    session.run(None, prompt_feed())  # and the session still works


@pytest.mark.parametrize(
    "attributes, says",
    [
        ({"window": 0}, ["window", "0"]),
        ({"page_size": 12}, ["page_size", "12"]),
        ({"selector": "best"}, ["selector", "best", "bounds"]),
        ({"mode": "fast"}, ["mode", "fast", "retro"]),
        ({"kv_num_heads": 3}, ["kv_num_heads", "3"]),
    ],
)
def test_wrong_attributes_are_exceptions(attributes, says):
    with pytest.raises(Exception) as error:
        node.session(ATTRIBUTES | attributes)
    for word in says:
        assert word in str(error.value)


def test_absent_optional_inputs():
    """Trailing inputs left out, and key and value passed as "": the packed query."""
    absent = ("cos_cache", "sin_cache", "page_budget", "head_sink")
    feed = prompt_feed()
    feed.pop("page_budget")
    expected = node.session(ATTRIBUTES, absent=absent).run(None, feed)
    session = node.session(ATTRIBUTES, absent=("key", "value", *absent))
    feed["query"] = np.concatenate([feed["query"], feed.pop("key"), feed.pop("value")], axis=2)
    for got, wanted in zip(session.run(None, feed), expected):
        np.testing.assert_array_equal(got, wanted)


def test_scalars_may_be_scalars():
    """total_sequence_length and retro_length of rank 0 or 1."""
    session = node.session(ATTRIBUTES)
    feed = prompt_feed()
    expected = session.run(None, feed)
    for name in ("total_sequence_length", "retro_length"):
        feed[name] = feed[name].reshape(())
    for got, wanted in zip(session.run(None, feed), expected):
        np.testing.assert_array_equal(got, wanted)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_threads_share_a_session(dtype):
    session = node.session(ATTRIBUTES, dtype)

    def decode(prompt):
        rows = CASE.rows("prompt", 0, prompt, dtype)
        outputs = session.run(None, node.feed(rows, prompt, -1) | node.poison(CASE, dtype))
        results = [outputs[0]]
        for step in range(12):
            first, last = CASE.tensors["step.offset"][step : step + 2]
            state = {f"past_{name}": array for name, array in zip(node.STATE, outputs[1:])}
            feed = node.feed(CASE.rows("step", first, last, dtype), prompt + step + 1, last - first - 1)
            outputs = session.run(None, feed | state)
            results.append(outputs[0])
        return b"".join(result.tobytes() for result in results)

    prompts = [60 + 11 * number for number in range(8)]
    alone = [decode(prompt) for prompt in prompts]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(3):
            assert list(pool.map(decode, prompts)) == alone
