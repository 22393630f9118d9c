"""Where the tests find what was built. `make test` builds it first."""

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / "tests" / "data"


def _built(variable: str, name: str) -> Path:
    path = Path(os.environ.get(variable) or ROOT / "target" / "release" / name)
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing: run `cargo build --release`, or set {variable}")
    return path


def plugin() -> str:
    return str(_built("RETRO_ATTENTION_PLUGIN", "libretro_attention.so"))


def exporter() -> str:
    return str(_built("RETRO_COMMAND_RETRO_EXPORT", "retro-export"))


def models() -> str:
    return str(_built("RETRO_COMMAND_RETRO_MODELS", "retro-models"))


def runner() -> str:
    return str(_built("RETRO_COMMAND_RETRO_RUN", "retro-run"))


def host() -> str:
    """examples/generate.rs."""
    return str(_built("RETRO_EXAMPLE_GENERATE", "examples/generate"))
