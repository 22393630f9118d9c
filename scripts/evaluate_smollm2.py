"""The measuring of scripts/evaluate-smollm2, which makes what it needs and calls it.

evaluation_jobs.py runs the jobs, evaluate_smollm2_tables.py turns their results into tables.
"""

import argparse
import json
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

from evaluation_jobs import START, Job, add_options, command, last_line, policies, run, say

ENGLISH = ["othello.md", "GPL-3.txt", "richard-iii.md", "nikola-manual.rst"]
PYTHON = ["pyparsing-core.py", "rich-console.py", "typing_extensions.py", "pkg_resources.py"]

SKETCH = "recommended,window={}"
RETRO = "retro,window={}"
SIGNED = "recommended,selector=signed_moments,page-size=16,window=1"
# What tasks compare; texts have more windows.
POLICIES = ["streaming", "quest", RETRO.format(2), RETRO.format(8), SIGNED, SKETCH.format(1), SKETCH.format(2)]
# RULER's hide in repeated sentences where its own do, else in prose.
TASKS = {"niah-single": [], "niah-multi-key": ENGLISH, "niah-multi-value": ENGLISH, "variable-tracking": [], "common-words": []}


@dataclass
class Sizes:
    """How much is measured."""

    texts: int = 8
    read: int = 2048
    predict: int = 4096
    cases: int = 100
    lengths: list = field(default_factory=lambda: ["4k", "7k"])
    look_ups: int = 60
    look_up_length: str = "4k-7k"
    documents: int = 96
    answer: int = 940
    batch: int = 50


# Figures that mean nothing, to see that everything runs.
SMALL = Sizes(2, 64, 48, 2, ["2200"], 2, "600-900", 2, 60, 2)


def text_jobs(setup, sizes):
    """Divergence from dense attention on texts."""
    files = [str(setup.texts / name) for pair in zip(ENGLISH, PYTHON) for name in pair][: sizes.texts]
    base = [str(setup.model), "--perplexity", *files, "--prompt-tokens", str(sizes.read), "-n", str(sizes.predict)]
    base += ["--batch", str(sizes.texts)]

    def job(name, budgets, names):
        return Job(name, [*base, "--budgets", budgets, *policies(names)], 420)

    sketches, retros = [SKETCH.format(w) for w in (1, 2, 4, 8)], ["quest", RETRO.format(2), RETRO.format(8)]
    rectified = [f"{policy},rectify={n}" for policy in (SKETCH.format(1), SKETCH.format(2), RETRO.format(2)) for n in (32, 128)]
    first = [
        job("texts-sketch", "0.05,0.10", sketches),
        job("texts-others", "0.05,0.10", [*retros, SIGNED, "streaming", "dense"]),
    ]
    second = [
        job("texts-rectified", "0.05,0.10", rectified),
        job("texts-sketch-wide", "0.02,0.25,512", sketches),
        job("texts-others-wide", "0.02,0.25,512", [*retros, SIGNED, "streaming"]),
    ]
    last = [
        job("texts-tokens", "256,1024", [SKETCH.format(1), SKETCH.format(2), "quest", RETRO.format(2), SIGNED]),
        job("texts-periodic", "0.02,0.05,0.10,0.25,512", ["periodic"]),
    ]
    return first, second, last


def task_jobs(setup, sizes):
    """RULER's tasks: dense attention, then the policies."""
    dense, first, second = [], [], []
    for task, files in TASKS.items():
        for length in sizes.lengths:
            name = f"{task}-{length}"
            base = [str(setup.model), "--task", task, "--length", length, "--cases", str(sizes.cases), "--seed", "1"]
            base += ["--batch", str(sizes.batch)]
            if files:
                base += ["--text", *(str(setup.texts / file) for file in files)]
            dense.append(Job(name, [*base, *policies(["dense"])], 120))
            first.append(Job(f"{name}-policies", [*base, "--budgets", "0.05,0.10,512", *policies(POLICIES)], 300, name))
            second.append(Job(f"{name}-policies-wide", [*base, "--budgets", "0.02,0.25", *policies(POLICIES)], 300, name))
    return dense, first, second


def look_up_job(setup, sizes):
    """One fact in real text, whose question is decoded under the policy."""
    base = [str(setup.model), "--task", "look-up", "--length", sizes.look_up_length, "--cases", str(sizes.look_ups)]
    base += ["--seed", "1", "--batch", str(sizes.batch), "--budgets", "0.05,0.10"]
    base += ["--text", *(str(setup.texts / name) for name in [*ENGLISH, *PYTHON])]
    names = ["dense", *POLICIES, SKETCH.format(4), SKETCH.format(8), "periodic"]
    return Job("look-ups", [*base, *policies(names)], 240)


def ledger_jobs(setup, sizes):
    """Long outputs whose answers build on each other: what windows and rectifying passes add."""
    base = [str(setup.ledger), "--data", str(setup.documents), "--docs", str(sizes.documents), "-n", str(sizes.answer)]
    base += ["--batch", str(sizes.documents), "--windows", "1,2,4,8"]
    # With pages of 8 every answer is right without any correction.
    sketch = "recommended,page-size=16"
    jobs = []
    for name, policy, budgets in (("sketch", sketch, "0.02,0.05,0.10"), ("retro", "retro", "0.10,0.25")):
        every = [policy, f"{policy},rectify=32", f"{policy},rectify=128"]
        jobs.append(Job(f"ledger-{name}", [*base, "--budgets", budgets, *policies(["dense", *every])], 300))
    return jobs


def all_jobs(setup, sizes):
    """Every job, what tells most first."""
    texts, more_texts, last_texts = text_jobs(setup, sizes)
    dense, tasks, more_tasks = task_jobs(setup, sizes)
    ledger = ledger_jobs(setup, sizes)
    order = [*texts, *dense, look_up_job(setup, sizes), *tasks]
    return [*order, ledger[0], *more_texts, *more_tasks, *last_texts, ledger[1]]


def capture_flags(setup, sizes):
    """--cuda-graph where steps that are captured have the figures of plain ones, else nothing."""
    if setup.device == "cpu":
        return []
    known = setup.out / "check.json"
    if known.is_file():
        return json.loads(known.read_text())
    job = text_jobs(setup, Sizes(predict=min(sizes.predict, 256), read=min(sizes.read, 1024), texts=sizes.texts))[0][0]
    at = job.arguments.index("--budgets")
    arguments = [*job.arguments[:at], "--budgets", "0.10,1.0", *policies(["quest", SKETCH.format(1), SKETCH.format(4)])]
    found = {}
    for flags in ([], ["--cuda-graph"]):
        name = "captured" if flags else "plain"
        log = setup.out / f"check-{name}.log"
        try:
            with open(log, "w") as errors:
                whole_call = command(setup, arguments, flags)
                result = subprocess.run(whole_call, stdout=subprocess.PIPE, stderr=errors, text=True, timeout=120, check=True)
        except (subprocess.TimeoutExpired, subprocess.CalledProcessError) as error:
            say(f"check: {name} steps fail: {type(error).__name__}, {last_line(log)}")
            continue
        rows = json.loads(result.stdout)["rows"]
        (setup.out / f"check-{name}.json").write_text(result.stdout)
        found[name] = {(row["policy"], row["budget"]): row["divergence"]["mean"] for row in rows}
        speed = ", ".join(f"{row['tokens_per_second']:.0f}" for row in rows)
        values = ", ".join(f"{value:.5f}" for value in found[name].values())
        say(f"check: {name} steps: divergence {values}; {speed} tokens/s")
    if "plain" not in found:
        sys.exit("evaluate-smollm2: the model does not run, see the files of this folder: " + str(setup.out))
    # A row whose divergence is no number is missing.
    whole = [value for (_, budget), value in found["plain"].items() if float(budget) == 1]
    if len(whole) != 3 or max(whole) > 5e-3:
        sys.exit(f"evaluate-smollm2: budgets of the whole context diverge by {whole}: something is wrong")
    captured = found.get("captured", {})
    alike = captured.keys() == found["plain"].keys() and all(
        abs(captured[row] - value) <= 0.05 * value + 1e-3 for row, value in found["plain"].items()
    )
    say("check: " + ("steps are captured" if alike else "steps are not captured"))
    flags = ["--cuda-graph"] if alike else []
    known.write_text(json.dumps(flags))
    return flags


def options():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, required=True, help="SmolLM2-135M-Instruct, unconverted")
    parser.add_argument("--ledger", type=Path, required=True, help="the model ledger, unconverted")
    parser.add_argument("--documents", type=Path, default=Path("models/ledger/documents.jsonl"), help="ledger's documents")
    parser.add_argument("--texts", type=Path, required=True, help="folder of the texts")
    add_options(parser)
    return parser.parse_args()


def main():
    setup = options()
    setup.out.mkdir(parents=True, exist_ok=True)
    sizes = SMALL if setup.small else Sizes()
    jobs = [job for job in all_jobs(setup, sizes) if job.name.startswith(tuple(setup.only.split(",")))]
    end = START + 60 * setup.minutes
    failed = run(setup, jobs, capture_flags(setup, sizes), end)
    say("results: " + str(setup.out))
    if failed:
        sys.exit("evaluate-smollm2: failed: " + ", ".join(failed))


main()
