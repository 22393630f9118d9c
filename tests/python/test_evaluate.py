"""scripts/evaluate_smollm2_tables.py reads the files of results that retro-run eval writes: its tables have eval's figures."""

import json
import os
import subprocess
import sys
from pathlib import Path

import onnxruntime as ort
import pytest

from paths import ROOT, models, plugin, runner

LIBRARY = Path(ort.__file__).parent / "capi" / f"libonnxruntime.so.{ort.__version__}"
ENVIRONMENT = os.environ | {"ORT_DYLIB_PATH": str(LIBRARY), "RETRO_ATTENTION_PLUGIN": plugin()}
POLICIES = {
    "dense": ("Dense", "1", ""),
    "streaming": ("Streaming", "1", ""),
    "quest": ("Quest", "1", ""),
    "retro,window=2,rectify=4": ("Retro", "2", "4"),
    "recommended,window=1": ("sketch", "1", ""),
    "recommended,window=2": ("sketch", "2", ""),
    "recommended,window=1,page-size=16": ("sketch, pages of 16", "1", ""),
    "recommended,window=1,selector=signed_moments,page-size=16": ("signed_moments", "1", ""),
}

pytestmark = pytest.mark.skipif(
    tuple(map(int, ort.__version__.split(".")[:2])) < (1, 24), reason="retro-run needs onnxruntime 1.24 or newer"
)


def command(*arguments):
    result = subprocess.run([str(a) for a in arguments], capture_output=True, text=True, env=ENVIRONMENT)
    assert result.returncode == 0, f"{arguments}: {result.stdout}{result.stderr}"
    return result.stdout


def evaluate(tmp_path, weights, *arguments):
    """Rows of eval by policy, and lines of the table by policy, window and passes."""
    command(models(), "build", "--weights", ROOT / "models" / weights, "-o", tmp_path / "model")
    policies = [argument for name in POLICIES for argument in ("--policy", name)]
    results = tmp_path / "results"
    results.mkdir()
    resume = ["--resume", results / "some.jsonl", "--json"]
    rows = json.loads(command(runner(), "eval", tmp_path / "model", *arguments, "--budgets", "0.05", *policies, *resume))["rows"]
    text = command(sys.executable, ROOT / "scripts" / "evaluate_smollm2_tables.py", results, "All=*.jsonl")
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| ")]
    table = [dict(zip(lines[0], line)) for line in lines[1:]]
    found = {(line["policy"], line["w"], line["rectify"]): line for line in table}
    assert len(rows) == len(table) == len(POLICIES)
    return [(row, found[name]) for row, name in zip(rows, POLICIES.values(), strict=True)]


def text(estimate, digits, sign=""):
    return f"{estimate['mean']:{sign}.{digits}f} ± {estimate['error']:.{digits}f}" if estimate else ""


def same_cost(row, line):
    assert line["read a step"] == f"{row['kib_per_step']:.0f} KiB"
    exposure = row["effective_exposure"]
    assert line["exposure"] == ("" if exposure is None else f"{exposure:.2f}")


def test_tables_of_documents_have_the_figures_of_eval(tmp_path):
    documents = ROOT / "models" / "ledger" / "documents.jsonl"
    pairs = evaluate(tmp_path, "ledger", "--data", documents, "--docs", "3", "-n", "150", "--batch", "3")
    assert any(0 < row["right"]["mean"] < 100 for row, _ in pairs)
    for row, line in pairs:
        assert line["right %"] == text(row["right"], 1)
        if row["kind"] != "dense":
            assert line["- Quest"] == text(row["difference_to_quest"], 1, "+")
        assert line["by quarter %"] == " / ".join(f"{quarter['mean']:.0f}" for quarter in row["quarters"])
        same_cost(row, line)


def test_tables_of_texts_have_the_figures_of_eval(tmp_path):
    files = [ROOT / "scripts" / name for name in ("evaluate_smollm2.py", "speed_by_length.py")]
    pairs = evaluate(tmp_path, "code", "--perplexity", *files, "--prompt-tokens", "256", "-n", "64", "--batch", "2")
    for row, line in pairs:
        assert line["KL to dense"] == text(row["divergence"], 4)
        assert line["/ Quest's"] == text(row["share_of_quest"], 3)
        assert line["perplexity"] == f"{row['perplexity']:.3f}"
        assert line["same best guess %"] == f"{100 * row['agreement']:.1f}"
        same_cost(row, line)


def test_long_outputs_are_measured_in_jobs_that_go_on_where_they_stopped(tmp_path):
    model, documents = tmp_path / "model", tmp_path / "documents.jsonl"
    command(models(), "build", ROOT / "models" / "ledger", "-o", model)
    command(models(), "ledger", "--docs", "2", "-o", documents)
    script = [sys.executable, ROOT / "scripts" / "evaluate_ledger_long.py", "--model", model, "--documents", documents]
    script += ["--out", tmp_path / "out", "--retro-run", runner(), "--small", "--batch", "2"]
    said = command(*script, "--only", "dense,passes-quest-10")
    assert "dense: " in said and "passes-quest-10: " in said and "complete" not in said
    lines = [json.loads(line) for line in (tmp_path / "out" / "passes-quest-10.jsonl").read_text().splitlines()[1:]]
    assert len(lines) == 4 and all(len(line["result"]["right"]) >= 38 for line in lines)
    assert "complete: dense, passes-quest-10" in command(*script, "--only", "dense,passes-quest-10")
