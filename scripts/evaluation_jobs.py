"""Calls of `retro-run eval`, several at a time: a step of a small model leaves a GPU idle while the host prepares the next.

Jobs begin in the order of the list, what tells most first. Each keeps its results in a file of its own, OUT/NAME.jsonl, as
they come: what time forbids is missing, and the same command goes on from there. evaluate_smollm2_tables.py turns these
files into tables.
"""

import json
import os
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

# Where dense attention has less than this share right there is nothing to keep.
LEAST = 0.15


@dataclass
class Job:
    name: str
    arguments: list
    # The most that it may take, but on a CPU, where one may take hours.
    seconds: float
    # The job that says whether dense attention can do the task.
    dense: str = ""


def add_options(parser):
    """What `command` and `run` take from the command line."""
    parser.add_argument("--out", type=Path, required=True, help="folder for results")
    parser.add_argument("--retro-run", type=Path, default=Path("target/release/retro-run"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="threads of each job's session")
    parser.add_argument("--jobs", type=int, default=1, help="jobs at a time")
    parser.add_argument("--minutes", type=float, default=24 * 60, help="what is not begun by then is left out")
    parser.add_argument("--only", default="", help="only jobs whose names begin with one of these, separated by commas")
    parser.add_argument("--small", action="store_true", help="sizes that take little and say nothing: does everything run?")


def policies(names):
    return [argument for name in names for argument in ("--policy", name)]


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
        self.too_long = False
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
        too_long = self.setup.device != "cpu" and now - self.started > self.job.seconds
        if self.asked_to_stop is None and (now > end or too_long):
            # It ends after the step, and prints the rows that are complete.
            self.process.send_signal(signal.SIGINT)
            self.asked_to_stop = now
            self.too_long = too_long
        elif self.asked_to_stop is not None and now - self.asked_to_stop > 10:
            self.process.kill()
        return False

    def report(self):
        code, seconds = self.process.returncode, time.monotonic() - self.started
        why = "TOOK TOO LONG" if self.too_long else "out of time" if self.asked_to_stop else "FAILED"
        say(f"{self.job.name}: {seconds:.0f} s" + ("" if code == 0 else f", {why}: {last_line(self.log)}"))
        if code == 0:
            done(self.setup, self.job).write_text(str(self.command))
        return code == 0 or (self.asked_to_stop is not None and not self.too_long)


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
