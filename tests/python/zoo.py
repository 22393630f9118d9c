"""Real exports: cases of tests/data/zoo.tar.xz, and graphs of tests/data/zoo-graphs, whose weights are noise (tests/src/zoo.rs)."""

import lzma
import tarfile
import tempfile
import zlib
from pathlib import Path

import numpy as np
import onnx

from paths import DATA, ROOT


def _unpacked() -> Path:
    """The folder of the cases, where tests/zoo/src/lib.rs would unpack it too."""
    archive = DATA / "zoo.tar.xz"
    target = ROOT / "target"
    folder = target / f"zoo-{zlib.crc32(archive.read_bytes()):08x}"
    if not folder.is_dir():
        target.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="zoo-", dir=target) as whole, tarfile.open(archive) as packed:
            packed.extractall(whole, filter="data")
            try:
                (Path(whole) / "zoo").rename(folder)
            except OSError:  # another test was faster
                if not folder.is_dir():
                    raise
    return folder


FOLDER = _unpacked()
FOLDERS = sorted(FOLDER.iterdir())
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
