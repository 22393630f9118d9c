"""Products of packed weights by ai.retro::MatMulNBits on the CPU, against numpy, in every ONNX Runtime."""

import numpy as np
import onnxruntime as ort
import pytest
from onnx import helper, numpy_helper

import node

ROWS, N = 3, 24


def pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """Codes [rows, count] in whole bytes a row, the first in the low bits."""
    if bits == 8:
        return codes.astype(np.uint8)
    codes = np.pad(codes, ((0, 0), (0, codes.shape[1] % 2))).astype(np.uint8)
    return codes[:, 0::2] | codes[:, 1::2] << 4


@pytest.mark.parametrize("k", [128, 96, 67])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("zero_points", ["middle", "packed", "float"])
@pytest.mark.parametrize("block_size", [16, 32, 128])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_the_product(dtype, bits, block_size, zero_points, bias, k):
    random = np.random.default_rng(k + bits + block_size)
    blocks = -(-k // block_size)
    codes = random.integers(0, 2**bits, (N, blocks * block_size))
    scales = random.uniform(-0.02, 0.06, (N, blocks)).astype(dtype)
    zeros = {
        "middle": np.full((N, blocks), 2 ** (bits - 1)),
        "packed": random.integers(0, 2**bits, (N, blocks)),
        "float": random.uniform(0, 2**bits, (N, blocks)).astype(dtype),
    }[zero_points]
    tensors = {
        "B": pack(codes, bits).reshape(N, blocks, -1),
        "scales": scales,
        "zero_points": zeros if zero_points == "float" else pack(zeros, bits),
        "bias": random.uniform(-4, 4, N).astype(dtype),
    }
    if zero_points == "middle":
        del tensors["zero_points"]
    if not bias:
        del tensors["bias"]
    session = one_node(dtype, tensors, K=k, N=N, bits=bits, block_size=block_size)
    a = random.uniform(-2, 2, (1, ROWS, k)).astype(dtype)
    (y,) = session.run(None, {"A": a})

    expand = lambda t: np.repeat(t.astype(np.float64), block_size, 1)[:, :k]  # noqa: E731
    weights = (codes[:, :k] - expand(zeros)) * expand(scales)
    expected = a.astype(np.float64) @ weights.T + (tensors["bias"].astype(np.float64) if bias else 0)
    sizes = np.abs(a.astype(np.float64)) @ (np.abs(expand(scales)) * (codes[:, :k] + np.abs(expand(zeros)))).T
    unit = np.finfo(dtype).eps / 2
    tolerance = (k + 6) * 2.0**-24 * sizes + 2 * unit * (np.abs(expected) + 4)
    assert (np.abs(y - expected) <= tolerance).all(), f"off by {np.abs(y - expected).max()}"


def one_node(dtype, tensors: dict, **attributes) -> ort.InferenceSession:
    element = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    value = lambda name: helper.make_tensor_value_info(name, element, None)  # noqa: E731
    inputs = [name if name in ["A", *tensors] else "" for name in ["A", "B", "scales", "zero_points", "", "bias"]]
    while not inputs[-1]:
        inputs.pop()
    initializers = [numpy_helper.from_array(tensor, name) for name, tensor in tensors.items()]
    made = helper.make_node("MatMulNBits", inputs, ["Y"], domain="ai.retro", **attributes)
    graph = helper.make_graph([made], "one_node", [value("A")], [value("Y")], initializers)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("ai.retro", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()
    return ort.InferenceSession(model, node.options(), providers=["CPUExecutionProvider"])
