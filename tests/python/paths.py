"""Where the tests find what was built. `make test` builds it first."""

import os
import re
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


def build_server_variables() -> list[str]:
    """Variables by which onnxruntime recognises a build server, where it records nothing: the list of
    tests/tests/telemetry.rs."""
    text = (ROOT / "tests" / "tests" / "telemetry.rs").read_text()
    array = text[text.index("const BUILD_SERVERS") :].split("= [")[1].split("]")[0]
    names = re.findall(r'"(\w+)"', array)
    assert "CI" in names
    return names
