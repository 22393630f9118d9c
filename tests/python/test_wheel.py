"""The wheel, installed into a fresh virtual environment, as a user without Rust and without this repository has it."""

import hashlib
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import onnxruntime as ort
import pytest

from paths import ROOT, runner

WHEEL = os.environ.get("RETRO_WHEEL")
pytestmark = pytest.mark.skipif(not WHEEL, reason="RETRO_WHEEL names no wheel: `make test` has it tested with onnxruntime 1.32.0")
PROMPT = "def read_lines(path):\n    "


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """Runs programs of an environment that has the wheel and what pip gets with it, pinned as this environment is."""
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run([sys.executable, "-m", "venv", folder / "venv"], check=True)
    digest = hashlib.sha256(Path(WHEEL).read_bytes()).hexdigest()
    (folder / "wheel.txt").write_text(f"{WHEEL} --hash=sha256:{digest}\n")
    needed = [folder / "wheel.txt", ROOT / "tests/python/requirements.txt", ROOT / f"tests/python/onnxruntime-{ort.__version__}.txt"]
    pip = [folder / "venv/bin/python", "-m", "pip", "install", "-q", "--disable-pip-version-check", "--only-binary=:all:", "--require-hashes"]
    subprocess.run(pip + [word for file in needed for word in ("-r", file)], check=True)
    # No cargo, no library of this repository's, no variable that names one.
    environment = {"PATH": f"{folder / 'venv/bin'}:/usr/bin:/bin", "HOME": str(folder), "LANG": "C.UTF-8"}

    def run(name, *arguments, succeeds=True):
        command = [folder / "venv/bin" / name, *map(str, arguments)]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
        assert (done.returncode == 0) == succeeds, f"{command}: {done.stdout}{done.stderr}"
        return done

    run.folder = folder
    return run


@pytest.fixture(scope="module")
def converted(installed):
    """Built, converted and compared with its original, each by the wheel's own commands."""
    installed("retro-models", "build", "--weights", ROOT / "models" / "code", "-o", "code")
    report = installed("retro-export", "code", "-o", "code-retro", "--window", "2", "--verify").stdout
    assert re.search(r"^verify +equal", report, re.MULTILINE), report
    return installed.folder / "code-retro"


def test_the_commands_generate_what_those_built_here_do(installed, converted):
    words = ["run", converted, "-p", PROMPT, "-n", "40", "--temp", "0"]
    made = installed("retro-run", *words).stdout
    library = Path(ort.__file__).parent / "capi" / f"libonnxruntime.so.{ort.__version__}"
    here = subprocess.run([runner(), *map(str, words)], env=os.environ | {"ORT_DYLIB_PATH": str(library)}, capture_output=True, text=True)
    assert made == here.stdout and len(made) > 20, here.stderr


def test_the_commands_end_as_the_programs_do(installed, tmp_path):
    failed = installed("retro-export", tmp_path, "-o", tmp_path / "out", succeeds=False)
    assert failed.returncode == 1 and failed.stderr.count("\n") == 1, failed.stderr
    assert installed("retro-run", "--version").stdout.startswith("retro-run ")


def test_the_plugin_loads_into_onnxruntime(installed, converted):
    script = f"""
import onnxruntime as ort
import retro_attention

options = ort.SessionOptions()
options.log_severity_level = 3
options.register_custom_ops_library(retro_attention.get_library_path())
session = ort.InferenceSession({str(converted / "model.onnx")!r}, options, providers=["CPUExecutionProvider"])
print(session.get_modelmeta().custom_metadata_map["retro.window"], retro_attention.get_library_path())
"""
    window, library = installed("python", "-c", script).stdout.split()
    assert window == "2" and Path(library).is_relative_to(installed.folder / "venv")


def test_transformers_is_asked_for_only_where_it_is_needed(installed):
    said = installed("python", "-c", "import retro_attention; retro_attention.RetroForCausalLM", succeeds=False).stderr
    assert "pip install 'transformers>=4.57' 'torch>=2.2'" in said.splitlines()[-1], said
    extra = (ROOT / "python" / "pyproject.toml").read_text()
    assert '"transformers>=4.57", "torch>=2.2"' in extra


def test_it_says_what_it_is():
    """Its version is the workspace's, its tag names the glibc that its binaries ask for, and its licences are inside."""
    version = re.search(r'^version = "([^"]+)"', (ROOT / "Cargo.toml").read_text(), re.MULTILINE)[1]
    name = re.fullmatch(r"retro_attention-(.+)-py3-none-manylinux_2_(\d+)_\w+\.whl", Path(WHEEL).name)
    assert name and name[1] == version
    with zipfile.ZipFile(WHEEL) as wheel:
        binaries = [wheel.read(entry) for entry in wheel.namelist() if "/bin/" in entry or entry.endswith(".so")]
        licences = {Path(entry).name for entry in wheel.namelist() if "/licenses/" in entry}
    asked = max(int(minor) for binary in binaries for minor in re.findall(rb"GLIBC_2\.(\d+)", binary))
    assert len(binaries) == 4 and asked <= int(name[2]) and licences == {"LICENSE", "NOTICE"}
