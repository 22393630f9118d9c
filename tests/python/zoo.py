"""Real exports: folders of tests/data/zoo, and graphs of tests/data/zoo-graphs, whose weights are noise (tests/src/zoo.rs)."""

import lzma
import zlib
from pathlib import Path

import numpy as np
import onnx

from paths import DATA

FOLDERS = sorted(path for path in (DATA / "zoo").iterdir() if path.is_dir())
GRAPHS = sorted((DATA / "zoo-graphs").glob("*.onnx.xz"))


def graph(source: Path, folder: Path) -> Path:
    """The ONNX file of an export; a packed one is unpacked into `folder`."""
    if source.is_dir():
        return source / "model.onnx"
    model = onnx.load_from_string(lzma.decompress(source.read_bytes()))
    _fill(model.graph)
    path = folder / "model.onnx"
    path.write_bytes(model.SerializeToString())
    return path


def _fill(graph: onnx.GraphProto):
    tensors = list(graph.initializer)
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.TENSOR:
                tensors.append(attribute.t)
            for inner in [attribute.g] if attribute.type == onnx.AttributeProto.GRAPH else attribute.graphs:
                _fill(inner)
    for tensor in tensors:
        noise = next((entry for entry in tensor.metadata_props if entry.key == "noise"), None)
        if noise is None:
            continue
        mean, spread = map(float, noise.value.split())
        dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
        numbers = np.random.default_rng(zlib.crc32(tensor.name.encode())).normal(mean, spread, list(tensor.dims))
        if np.issubdtype(dtype, np.integer):
            numbers = numbers.clip(np.iinfo(dtype).min, np.iinfo(dtype).max)
        tensor.raw_data = numbers.astype(dtype).tobytes()
        tensor.metadata_props.remove(noise)
