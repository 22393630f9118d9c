"""Prompts against attention written out in numpy, on every ONNX Runtime: its own GroupQueryAttention computes them where it can,
and before 1.24 it sees one token too many through a sliding window."""

import numpy as np
import pytest

import node

HEADS, KV_HEADS, SIZE, PAGE, WINDOW = 4, 2, 32, 16, 4
CAPACITY = 128


def attention(query, key, value, first, window, softcap):
    """Outputs of rows that stand at first, first + 1, ... among keys and values from 0 on; [rows, heads, size]."""
    rows = np.arange(first, first + len(query))[:, None]
    columns = np.arange(len(key))[None]
    seen = (columns <= rows) & (rows - columns < (window or len(key) + 1))
    out = np.empty(query.shape)
    for head in range(HEADS):
        kv = head // (HEADS // KV_HEADS)
        logits = query[:, head] @ key[:, kv].T / np.sqrt(SIZE)
        if softcap:
            logits = softcap * np.tanh(logits / softcap)
        weights = np.where(seen, np.exp(logits - logits.max()), 0)
        out[:, head] = weights / weights.sum(1, keepdims=True) @ value[:, kv]
    return out


def run(session, dtype, chunks, window, softcap):
    """A prompt in chunks (a chunk of one token is prefill, too), then steps that read every page."""
    total = sum(chunks) + 6
    random = np.random.default_rng(3)
    rows = [random.integers(-96, 97, (total, heads, SIZE)) / 64 for heads in (HEADS, KV_HEADS, KV_HEADS)]
    query, key, value = rows
    zeros = lambda *shape, dtype=dtype: np.zeros(shape, dtype)  # noqa: E731
    pages = CAPACITY // PAGE
    state = {
        "past_key": zeros(1, KV_HEADS, CAPACITY, SIZE),
        "past_value": zeros(1, KV_HEADS, CAPACITY, SIZE),
        "past_page_summary": zeros(1, KV_HEADS, pages, 2, SIZE),
        "past_page_steps": zeros(1, KV_HEADS, pages, dtype=np.int32),
        "past_outputs": zeros(1, WINDOW - 1, HEADS, SIZE, dtype=np.float32),
        "past_lse": zeros(1, WINDOW - 1, HEADS, dtype=np.float32),
    }
    length = 0
    for count, retro in [(chunk, -1) for chunk in chunks] + [(1, 0)] * 6:
        first, length = length, length + count
        fed = [part[first:length].reshape(1, count, -1).astype(dtype) for part in rows]
        results = dict(zip(node.OUTPUTS, session.run(None, node.feed(fed, length, retro) | state)))
        state = {f"past_{name}": results[f"present_{name}"] for name in node.STATE}
        got = results["output"].reshape(count, HEADS, SIZE).astype(np.float64)
        expected = attention(query[first:length], key[:length], value[:length], first, window, softcap)
        tolerance = 3e-5 if dtype == np.float32 else 4e-3
        assert np.abs(got - expected).max() <= tolerance, f"rows {first}..{length}: off by {np.abs(got - expected).max()}"


@pytest.mark.parametrize("softcap", [0.0, 3.0])
@pytest.mark.parametrize("window", [0, 1, 2, 16, 31, 32, 69, 70, 71])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_a_prompt_and_steps(dtype, window, softcap):
    attributes = dict(
        num_heads=HEADS,
        kv_num_heads=KV_HEADS,
        page_size=PAGE,
        window=WINDOW,
        budget_ratio=1.0,
        softcap=softcap,
        local_window_size=window or -1,
    )
    session = node.session(attributes, dtype)
    for chunks in [[70], [33, 1, 36], [1, 69], [1, 1, 40]]:
        run(session, dtype, chunks, window, softcap)
