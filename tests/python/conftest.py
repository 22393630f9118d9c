import sys
from pathlib import Path

import onnxruntime
import pytest

sys.path.insert(0, str(Path(__file__).parent))

import paths  # noqa: E402


def pytest_sessionstart():
    """One line instead of a hundred failures."""
    try:
        paths.plugin(), paths.exporter(), paths.models()
    except FileNotFoundError as missing:
        pytest.exit(str(missing), returncode=1)


def pytest_report_header():
    return f"onnxruntime {onnxruntime.__version__}"
