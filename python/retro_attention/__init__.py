"""RetroAttention for ONNX Runtime: where the plugin lies, and transformers' generate() with converted models.

The commands retro-export, retro-run and retro-models come with this package.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .causal_lm import RetroForCausalLM

__all__ = ["RetroForCausalLM", "__version__", "get_library_path"]
__version__ = "0.1.0"

_LIBRARIES = {"win32": "retro_attention.dll", "darwin": "libretro_attention.dylib"}
_LIBRARY = _LIBRARIES.get(sys.platform, "libretro_attention.so")


def get_library_path() -> str:
    """The plugin, for `onnxruntime.SessionOptions.register_custom_ops_library`: the file that the environment variable
    RETRO_ATTENTION_PLUGIN names, as for the commands, else the one in this package.
    """
    named = os.environ.get("RETRO_ATTENTION_PLUGIN")
    library = Path(named) if named else Path(__file__).parent / _LIBRARY
    if not library.is_file():
        advice = "RETRO_ATTENTION_PLUGIN names no file" if named else "install the wheel, or set RETRO_ATTENTION_PLUGIN"
        raise FileNotFoundError(f"there is no plugin {library}: {advice}")
    return str(library)


def __getattr__(name: str):
    # On demand: transformers and torch take seconds to load, and most users of this package need neither.
    if name != "RetroForCausalLM":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        from .causal_lm import RetroForCausalLM
    except ModuleNotFoundError as missing:
        if missing.name not in ("numpy", "torch", "transformers"):
            raise
        message = f"RetroForCausalLM needs {missing.name}: pip install 'transformers>=4.57' 'torch>=2.2'"
        raise ModuleNotFoundError(message, name=missing.name) from None
    return RetroForCausalLM
