"""The commands: each starts the program of its name, with the ONNX Runtime that pip installed."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

_FOLDER = Path(__file__).parent
# As in every program that uses the crate `ort`.
_VARIABLE = "ORT_DYLIB_PATH"


def _onnxruntime() -> Path | None:
    """The library inside the package onnxruntime or onnxruntime-gpu, found without loading it."""
    spec = importlib.util.find_spec("onnxruntime")
    for folder in (spec and spec.submodule_search_locations) or []:
        for pattern in ("libonnxruntime.so*", "libonnxruntime.*dylib", "onnxruntime.dll"):
            if found := sorted((Path(folder) / "capi").glob(pattern)):
                return found[-1]
    return None


def _start(name: str) -> None:
    program = _FOLDER / "bin" / (f"{name}.exe" if os.name == "nt" else name)
    if not os.environ.get(_VARIABLE) and (library := _onnxruntime()):
        os.environ[_VARIABLE] = str(library)
    command = [str(program), *sys.argv[1:]]
    try:
        if os.name == "posix":
            # In this process, so that signals and exit codes are the program's.
            os.execv(program, command)
        raise SystemExit(subprocess.call(command))
    except OSError as error:
        raise SystemExit(f"error: cannot start {program}: {error.strerror}; install the wheel again") from None


def retro_export() -> None:
    _start("retro-export")


def retro_models() -> None:
    _start("retro-models")


def retro_run() -> None:
    _start("retro-run")
