"""The measuring of scripts/evaluate-smollm2, which makes what it needs and calls it.

Every job is a call of `retro-run eval`, several at a time: a step of so small a model leaves a GPU idle while the host
prepares the next. Jobs begin in the order of the list, what tells most first. Each keeps its results in a file of its own,
OUT/NAME.jsonl, as they come: what time forbids is missing, and the same command goes on from there.
scripts/evaluate_smollm2_tables.py turns these files into tables.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

ENGLISH = ["othello.md", "GPL-3.txt", "richard-iii.md", "nikola-manual.rst"]
PYTHON = ["pyparsing-core.py", "rich-console.py", "typing_extensions.py", "pkg_resources.py"]

SKETCH = "recommended,window={}"
RETRO = "retro,window={}"
SIGNED = "recommended,selector=signed_moments,page-size=16,window=1"
# What tasks compare; texts have more windows.
POLICIES = ["streaming", "quest", RETRO.format(2), RETRO.format(8), SIGNED, SKETCH.format(1), SKETCH.format(2)]
# RULER's hide in repeated sentences where its own do, else in prose.
TASKS = {"niah-single": [], "niah-multi-key": ENGLISH, "niah-multi-value": ENGLISH, "variable-tracking": [], "common-words": []}
# Where dense attention has less than this share right there is nothing to keep.
LEAST = 0.15


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


@dataclass
class Job:
    name: str
    arguments: list
    seconds: float
    # The job that says whether dense attention can do the task.
    dense: str = ""


def policies(names):
    return [argument for name in names for argument in ("--policy", name)]


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


def command(setup, arguments, flags):
    """A call of retro-run eval."""
    out = [str(setup.retro_run), "eval", *arguments, "--device", setup.device, "--threads", str(setup.threads)]
    out += [*flags, "--json"]
    if setup.device != "cpu":
        # Chunks of a prompt are large enough to keep the GPU busy.
        out += ["--chunk", "2048"]
    return out


def dense_share(path):
    """Share of right answers that dense attention has in a file of results; None where there is none."""
    if not path.is_file():
        return None
    results = [json.loads(line)["result"]["right"] for line in path.read_text().splitlines()[1:]]
    return sum(sum(right) / max(len(right), 1) for right in results) / len(results) if results else None


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


START = time.monotonic()


def say(line):
    print(f"[{time.monotonic() - START:5.0f} s] {line}", flush=True)


def last_line(path):
    lines = path.read_text(errors="replace").split("\n")
    return next((line for line in reversed(lines) if line.strip()), "no word")


def done(setup, job):
    """The file that holds the command of a job that has come to its end."""
    return setup.out / f"{job.name}.done"


def whole_command(setup, job, flags):
    return command(setup, [*job.arguments, "--resume", str(setup.out / f"{job.name}.jsonl")], flags)


def is_done(setup, job, flags):
    path = done(setup, job)
    return path.is_file() and path.read_text() == str(whole_command(setup, job, flags))


class Running:
    """A job that is under way."""

    def __init__(self, setup, job, flags):
        self.job, self.setup = job, setup
        self.started = time.monotonic()
        self.asked_to_stop = None
        self.log = setup.out / f"{job.name}.log"
        self.output = setup.out / f"{job.name}.json"
        self.command = whole_command(setup, job, flags)
        with open(self.output, "w") as output, open(self.log, "w") as log:
            self.process = subprocess.Popen(self.command, stdout=output, stderr=log)

    def over(self, end):
        """Whether the job has ended; one that is out of time is asked to, and in the end made to."""
        if self.process.poll() is not None:
            return True
        now = time.monotonic()
        if self.asked_to_stop is None and (now > end or now - self.started > self.job.seconds):
            # It ends after the step, and prints the rows that are complete.
            self.process.send_signal(signal.SIGINT)
            self.asked_to_stop = now
        elif self.asked_to_stop is not None and now - self.asked_to_stop > 10:
            self.process.kill()
        return False

    def report(self):
        code, seconds = self.process.returncode, time.monotonic() - self.started
        why = "out of time" if self.asked_to_stop else "FAILED"
        say(f"{self.job.name}: {seconds:.0f} s" + ("" if code == 0 else f", {why}: {last_line(self.log)}"))
        if code == 0:
            done(self.setup, self.job).write_text(str(self.command))
        return code == 0 or self.asked_to_stop is not None


def run(setup, jobs, flags, end):
    """Runs the jobs; returns the names of those that failed."""
    complete = [job for job in jobs if is_done(setup, job, flags)]
    if complete:
        say("complete: " + ", ".join(job.name for job in complete))
    waiting, running, failed = [job for job in jobs if job not in complete], [], []
    ended = {job.name for job in complete}
    while waiting or running:
        for one in [one for one in running if one.over(end)]:
            running.remove(one)
            ended.add(one.job.name)
            if not one.report():
                failed.append(one.job.name)
        while len(running) < setup.jobs and time.monotonic() < end:
            job = next((job for job in waiting if not job.dense or job.dense in ended), None)
            if job is None:
                break
            waiting.remove(job)
            share = dense_share(setup.out / f"{job.dense}.jsonl") if job.dense else 1
            if share is None or (share < LEAST and not setup.small):
                say(f"{job.name}: left out, dense attention has {'nothing' if share is None else f'{share:.0%} right'}")
                continue
            running.append(Running(setup, job, flags))
        if time.monotonic() >= end and waiting:
            say("out of time before: " + ", ".join(job.name for job in waiting))
            waiting.clear()
        time.sleep(0.1)
    return failed


def options():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, required=True, help="SmolLM2-135M-Instruct, unconverted")
    parser.add_argument("--ledger", type=Path, required=True, help="the model ledger, unconverted")
    parser.add_argument("--documents", type=Path, default=Path("models/ledger/documents.jsonl"), help="ledger's documents")
    parser.add_argument("--texts", type=Path, required=True, help="folder of the texts")
    parser.add_argument("--out", type=Path, required=True, help="folder for results")
    parser.add_argument("--retro-run", type=Path, default=Path("target/release/retro-run"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="threads of each job's session")
    parser.add_argument("--jobs", type=int, default=1, help="jobs at a time")
    parser.add_argument("--minutes", type=float, default=24 * 60, help="what is not begun by then is left out")
    parser.add_argument("--only", default="", help="only jobs whose names begin with one of these, separated by commas")
    parser.add_argument("--small", action="store_true", help="sizes that take little and say nothing: does everything run?")
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
