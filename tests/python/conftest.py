import importlib.util
import os
import sys
from pathlib import Path

# Before it loads: its wheels record telemetry in the user's cache folder otherwise.
os.environ["ORT_DISABLE_TELEMETRY"] = "1"
import onnxruntime  # noqa: E402
import pytest  # noqa: E402

sys.path.insert(0, str(Path(__file__).parent))

import paths  # noqa: E402


# A host of its own, with environments of its own.
collect_ignore = [] if importlib.util.find_spec("onnxruntime_genai") else ["test_genai.py"]


def pytest_sessionstart():
    """One line instead of a hundred failures."""
    try:
        paths.plugin(), paths.exporter(), paths.models()
    except FileNotFoundError as missing:
        pytest.exit(str(missing), returncode=1)


def pytest_report_header():
    return f"onnxruntime {onnxruntime.__version__}"
