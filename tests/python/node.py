"""A model of one RetroAttention node, made with onnx.helper, and a session on it."""

import numpy as np
import onnxruntime as ort
from onnx import TensorProto, helper

from paths import plugin

STATE = ["key", "value", "page_summary", "page_steps", "outputs", "lse"]
INPUTS = [
    "query",
    "key",
    "value",
    "past_key",
    "past_value",
    "seqlens_k",
    "total_sequence_length",
    "cos_cache",
    "sin_cache",
    "retro_length",
    "past_page_summary",
    "past_page_steps",
    "past_outputs",
    "past_lse",
    "page_budget",
    "head_sink",
]
OUTPUTS = ["output"] + [f"present_{name}" for name in STATE]
INT32 = {"seqlens_k", "total_sequence_length", "retro_length", "past_page_steps", "present_page_steps", "page_budget"}
FLOAT32 = {"past_outputs", "past_lse", "present_outputs", "present_lse"}


def model(attributes: dict, dtype=np.float32, absent=("cos_cache", "sin_cache", "head_sink")) -> bytes:
    element = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))

    def value(name):
        kind = TensorProto.INT32 if name in INT32 else TensorProto.FLOAT if name in FLOAT32 else element
        return helper.make_tensor_value_info(name, kind, None)

    inputs = ["" if name in absent else name for name in INPUTS]
    while not inputs[-1]:
        inputs.pop()
    node = helper.make_node("RetroAttention", inputs, OUTPUTS, domain="ai.retro", **attributes)
    graph = helper.make_graph([node], "one_node", [value(name) for name in inputs if name], [value(name) for name in OUTPUTS])
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("ai.retro", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()


def options() -> ort.SessionOptions:
    """Session options with the plugin loaded. Errors are asserted on, so the log need not repeat them."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.register_custom_ops_library(plugin())
    return options


def session(attributes: dict, dtype=np.float32, **kwargs) -> ort.InferenceSession:
    return ort.InferenceSession(model(attributes, dtype, **kwargs), options(), providers=["CPUExecutionProvider"])


def attributes_of(case) -> dict:
    return dict(
        num_heads=case.heads,
        kv_num_heads=case.kv_heads,
        scale=case.scale,
        page_size=case.page,
        window=case.window,
        sink_pages=case.sink,
    )


def poison(case, dtype) -> dict[str, np.ndarray]:
    """The state of a sequence, every element something that nobody may read."""
    ring, pages = max(case.window - 1, 1), -(-case.capacity // case.page)
    nan = lambda *shape, dtype=dtype: np.full(shape, np.nan, dtype)  # noqa: E731
    return {
        "past_key": nan(1, case.kv_heads, case.capacity, case.size),
        "past_value": nan(1, case.kv_heads, case.capacity, case.size),
        "past_page_summary": nan(1, case.kv_heads, pages, 2, case.size),
        "past_page_steps": np.full((1, case.kv_heads, pages), -123456, np.int32),
        "past_outputs": nan(1, ring, case.heads, case.size, dtype=np.float32),
        "past_lse": nan(1, ring, case.heads, dtype=np.float32),
    }


def feed(rows, length: int, retro: int, budget: int = 0) -> dict[str, np.ndarray]:
    query, key, value = rows
    number = lambda n: np.array([n], np.int32)  # noqa: E731
    return {
        "query": query,
        "key": key,
        "value": value,
        "seqlens_k": number(length - 1),
        "total_sequence_length": number(length),
        "retro_length": number(retro),
        "page_budget": number(budget),
    }
