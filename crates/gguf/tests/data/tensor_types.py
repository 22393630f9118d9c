"""Writes tensor_types.gguf with the `gguf` package (pip install gguf==0.19.0): for each type a tensor of random blocks of that
type's name, and beside it, as NAME.f32, what the package's own dequantisation makes of it."""
import pathlib

import gguf
import numpy as np

TYPES = ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K"]
# Where the blocks have scales and minima, which are random f16 too, but finite.
HALVES = {"Q8_0": [0], "Q4_0": [0], "Q4_1": [0, 2], "Q5_0": [0], "Q5_1": [0, 2], "Q4_K": [0, 2], "Q5_K": [0, 2], "Q6_K": [208]}

random = np.random.default_rng(7)


def finite_halves(shape):
    """Of all finite magnitudes and both signs, subnormal ones too."""
    return (random.integers(0, 0x7C00, shape) | random.integers(0, 2, shape) << 15).astype(np.uint16)


writer = gguf.GGUFWriter(pathlib.Path(__file__).with_name("tensor_types.gguf"), "llama")
for name in TYPES:
    kind = gguf.GGMLQuantizationType[name]
    elements, size = gguf.GGML_QUANT_SIZES[kind]
    rows, blocks = 2, 1 if elements == 256 else 2 if elements == 32 else 24
    if name in ("F16", "BF16"):
        data = finite_halves((rows, blocks)).view(np.uint8).reshape(rows, -1)
    else:
        data = random.integers(0, 256, (rows, blocks, size)).astype(np.uint8)
        for at in HALVES[name]:
            data[..., at : at + 2] = finite_halves((rows, blocks, 1)).view(np.uint8)
        data = data.reshape(rows, -1)
    stored = data.view(np.float16) if name == "F16" else data
    values = gguf.quants.dequantize(stored, kind)
    writer.add_tensor(name, stored, raw_dtype=kind)
    writer.add_tensor(name + ".f32", values.astype(np.float32))
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()
