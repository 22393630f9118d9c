"""The golden set `exact`: tests/data/golden/README.md."""

import json
import lzma
from dataclasses import dataclass

import numpy as np
from safetensors.numpy import load

from paths import DATA

FOLDER = DATA / "golden" / "exact"
INDEX = {case["name"]: case for case in json.loads((FOLDER / "index.json").read_text())["cases"]}


@dataclass
class Case:
    name: str
    heads: int
    kv_heads: int
    size: int
    window: int
    page: int
    sink: int
    scale: float
    prompt: int
    chunks: list[int]
    steps: int
    tensors: dict[str, np.ndarray]

    @property
    def capacity(self) -> int:
        return self.prompt + self.steps + 5

    def rows(self, kind: str, first: int, last: int, dtype: np.dtype) -> list[np.ndarray]:
        """Query, key and value as the operator takes them: [1, rows, heads * size]."""
        parts = [self.tensors[f"{kind}.{name}"][first:last] for name in "qkv"]
        return [(part.astype(np.float32) / 64).astype(dtype).reshape(1, last - first, -1) for part in parts]


def case(name: str) -> Case:
    meta = INDEX[name]
    tensors = load(lzma.decompress((FOLDER / f"{name}.safetensors.xz").read_bytes()))
    return Case(
        name=name,
        heads=meta["Hq"],
        kv_heads=meta["Hkv"],
        size=meta["D"],
        window=meta["w"],
        page=meta["page"],
        sink=meta["sink"],
        scale=meta["scale"],
        prompt=meta["prompt"],
        chunks=meta["chunks"],
        steps=meta["steps"],
        tensors=tensors,
    )
