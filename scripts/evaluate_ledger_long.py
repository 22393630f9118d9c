"""The measuring of scripts/evaluate-ledger-long, which makes what it needs and calls it.

evaluation_jobs.py runs the jobs, evaluate_smollm2_tables.py turns their results into tables.
"""

import argparse
import sys
from pathlib import Path

from evaluation_jobs import START, Job, add_options, policies, run, say

# retro-export's selector, with its pages and with pages so large that it misses facts.
SKETCH, SKETCH_16 = "recommended", "recommended,page-size=16"
SIGNED = "recommended,selector=signed_moments,page-size=16"
# The most that a job may take on a GPU: it ends sooner, or something is wrong.
SECONDS = 600


def windows(policy, *each):
    return [f"{policy},window={w}" for w in each]


def passes(policy):
    return [f"{policy},window=1,rectify={n}" for n in (32, 128)]


def all_jobs(setup):
    """Every job, what tells most first."""
    base = [str(setup.model), "--data", str(setup.documents), "--batch", str(setup.batch)]
    if setup.small:
        base += ["--docs", "2", "-n", "60"]

    def job(name, budgets, names):
        return Job(name, [*base, "--budgets", budgets, *policies(names)], SECONDS)

    return [
        job("dense", "0.10", ["dense"]),
        job("quest", "0.10,0.25", ["quest"]),
        job("retro", "0.10,0.25", windows("retro", 8, 2)),
        # Sketch with its own pages is right to the last answer: what can be mended is in the other rows.
        job("sketch", "0.02,0.05", windows(SKETCH, 1)),
        job("sketch-16", "0.02", windows(SKETCH_16, 1, 8, 2, 4)),
        job("signed", "0.10,0.05", windows(SIGNED, 1, 8)),
        job("passes-quest", "0.25", passes("retro")),
        job("passes-16", "0.02", passes(SKETCH_16)),
        job("passes-signed", "0.10", passes(SIGNED)),
        job("quest-05", "0.05,512", ["quest"]),
        job("streaming", "0.05,0.10", ["streaming"]),
        job("sketch-windows", "0.02", windows(SKETCH, 8, 2, 4)),
        job("retro-05", "0.05,512", windows("retro", 8, 2)),
        job("signed-windows", "0.10,0.05", windows(SIGNED, 2, 4)),
        job("retro-windows", "0.10,0.25", windows("retro", 4)),
        job("quest-50", "0.50", ["quest", *windows("retro", 8)]),
        job("sketch-16-wide", "0.05,0.10", windows(SKETCH_16, 1, 8)),
        job("sketch-wide", "0.10,512", windows(SKETCH, 1)),
        job("signed-wide", "0.02,512", windows(SIGNED, 1)),
        job("sketch-05", "0.05,0.10", windows(SKETCH, 8, 2)),
        job("passes-quest-10", "0.10", passes("retro")),
        job("passes", "0.02,0.05", passes(SKETCH)),
        job("quest-02", "0.02", ["quest", *windows("retro", 8)]),
    ]


def options():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, required=True, help="the model, unconverted")
    parser.add_argument("--documents", type=Path, required=True, help="its documents")
    parser.add_argument("--batch", type=int, default=48, help="documents decoded together")
    add_options(parser)
    return parser.parse_args()


def main():
    setup = options()
    setup.out.mkdir(parents=True, exist_ok=True)
    jobs = [job for job in all_jobs(setup) if job.name.startswith(tuple(setup.only.split(",")))]
    failed = run(setup, jobs, [], START + 60 * setup.minutes)
    say("results: " + str(setup.out))
    if failed:
        sys.exit("evaluate-ledger-long: failed: " + ", ".join(failed))


main()
