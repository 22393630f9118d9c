"""Tables from the results of scripts/evaluate-smollm2: evaluate_smollm2_tables.py OUT [PATTERN...]

One table for each file of results whose name matches a pattern (*), or for several as one: texts=texts-*.jsonl. Differences
and ratios are item by item; ± is the standard error over texts or documents.
"""

import json
import math
import re
import statistics
import sys
from pathlib import Path

TOGETHER = {
    "SmolLM2: texts": "texts-*.jsonl",
    "SmolLM2: look-ups": "look-ups.jsonl",
    "ledger": "ledger-*.jsonl",
}
KEY = re.compile(r"(\w+) w=(?:None|Some\((\d+)\)) b=(\S*?)(?: rectify=(\d+))? (.*)", re.DOTALL)


class Row:
    """A policy at a budget, and its results by item."""

    def __init__(self, key):
        match = KEY.fullmatch(key)
        if not match:
            raise SystemExit(f"a policy of another form: {key!r}")
        kind, window, budget, rectify, settings = match.groups()
        self.window, self.budget, self.rectify = int(window or 1), budget, int(rectify or 0)
        setting = lambda name: (re.search(rf"\b{name}: (\w+)", settings) or [None, ""])[1]
        page = setting("page_size")
        names = {"Sketch": "sketch", "SignedMoments": "signed_moments", "Bounds": "Retro"}
        self.policy = names.get(setting("selector"), setting("selector")) if kind == "Retro" else kind
        # Quest is the paper's selection with a window of 1.
        self.selection = ("Retro" if kind == "Quest" else self.policy, page)
        if page and page != ("8" if self.policy == "sketch" else "16"):
            self.policy += f", pages of {page}"
        self.items = {}

    def order(self):
        rank = ["Dense", "Streaming", "Periodic", "Quest", "Retro", "signed_moments", "sketch"]
        place = next((i for i, name in enumerate(rank) if self.policy.startswith(name)), len(rank))
        share = float(self.budget or 0)
        return (share >= 1, share, place, self.policy, self.rectify, self.window)

    def read(self):
        """Tokens a step and head, bytes a step, and exposure."""
        total = lambda name: sum(item["reading"][name] for item in self.items.values())
        tokens = f"{total('tokens') / total('samples'):.0f}" if total("samples") else "all"
        exposure = f"{total('exposure') / total('exposed'):.2f}" if total("exposed") else ""
        return [tokens, f"{statistics.fmean(item['bytes'] for item in self.items.values()) / 1024:.0f} KiB", exposure]


def rows(paths):
    """The rows of several files, best known first."""
    found = {}
    for path in paths:
        for line in path.read_text().splitlines()[1:]:
            try:
                entry = json.loads(line)
            except ValueError:
                # A killed run may leave half a line.
                continue
            row = found.setdefault(entry["policy"], Row(entry["policy"]))
            row.items[entry["item"]] = entry["result"]
    return sorted(found.values(), key=Row.order)


def estimate(values, digits, sign=""):
    values = [value for value in values if math.isfinite(value)]
    if not values:
        return ""
    error = f" ± {statistics.stdev(values) / math.sqrt(len(values)):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):{sign}.{digits}f}{error}"


def paired(row, base, value, compare):
    if base is None or base is row:
        return []
    return [compare(value(row.items[item]), value(base.items[item])) for item in row.items if item in base.items]


def bases(row, every):
    """What a row is compared with: Quest, and its own selection without any correction, at the same budget."""
    same = [other for other in every if other.budget == row.budget]
    quest = next((other for other in same if other.policy == "Quest" and not other.rectify), None)
    plain = [other for other in same if other.selection == row.selection and other.window == 1 and not other.rectify]
    return quest, plain[0] if plain else None


def divergence(result):
    # JSON has null for what is no number.
    return sum(math.nan if part is None else part for part in result["divergence"]) / sum(result["tokens"])


def text_table(every):
    head = ["budget", "policy", "w", "rectify", "texts", "perplexity", "KL to dense", "/ Quest's", "/ w = 1"]
    yield [*head, "same best guess %", "tokens a step", "read a step", "exposure"]
    for row in every:
        results = row.items.values()
        count = sum(sum(r["tokens"]) for r in results)
        quest, plain = bases(row, every)
        ratio = lambda own, other: own / other if other else math.nan
        yield [
            *named(row),
            f"{math.exp(sum(sum(r['surprise']) for r in results) / count):.3f}",
            estimate(map(divergence, results), 4),
            estimate(paired(row, quest, divergence, ratio), 3),
            estimate(paired(row, plain, divergence, ratio), 3),
            f"{100 * sum(r['agreed'] for r in results) / count:.1f}",
            *row.read(),
        ]


def right(result):
    return 100 * sum(result["right"]) / max(len(result["right"]), 1)


def by_quarter(row):
    """Right answers in percent by quarter of the output, of outputs with that many answers."""
    parts = []
    for quarter in range(4):
        cut = lambda answers: answers[quarter * len(answers) // 4 : (quarter + 1) * len(answers) // 4]
        shares = [statistics.fmean(cut(r["right"])) for r in row.items.values() if len(r["right"]) >= 4]
        parts += [f"{100 * statistics.fmean(shares):.0f}"] if shares else []
    return " / ".join(parts)


def kept(row, dense):
    """Of dense attention's right answers those that are right here too."""
    if dense is None or dense is row:
        return ""
    pairs = [
        (ours, theirs)
        for item in row.items.keys() & dense.items.keys()
        for ours, theirs in zip(row.items[item]["right"], dense.items[item]["right"])
    ]
    return f"{sum(ours and theirs for ours, theirs in pairs)} of {sum(theirs for _, theirs in pairs)}"


def case_table(every):
    head = ["budget", "policy", "w", "rectify", "documents", "right %", "- dense", "- Quest", "- w = 1"]
    yield [*head, "of dense's answers", "by quarter %", "tokens a step", "read a step", "exposure"]
    dense = next((row for row in every if row.policy == "Dense"), None)
    minus = lambda own, other: own - other
    for row in every:
        quest, plain = bases(row, every)
        compared = [estimate(paired(row, base, right, minus), 1, "+") for base in (dense, quest, plain)]
        yield [*named(row), estimate(map(right, row.items.values()), 1), *compared, kept(row, dense), by_quarter(row), *row.read()]


def named(row):
    return [row.budget or "", row.policy, str(row.window), str(row.rectify or ""), str(len(row.items))]


def print_table(title, paths):
    every = rows(paths)
    if not every:
        return
    print(f"\n### {title}\n")
    texts = "divergence" in next(iter(every[0].items.values()))
    for number, line in enumerate((text_table if texts else case_table)(every)):
        print("| " + " | ".join(line) + " |")
        if number == 0:
            print("|---" * len(line) + "|")


def main():
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    folder = Path(sys.argv[1])
    groups = dict(argument.partition("=")[::2] for argument in sys.argv[2:])
    if not groups:
        groups = dict(TOGETHER)
        tasks = sorted({re.sub(r"-policies(-wide)?$", "", path.stem) for path in folder.glob("*.jsonl")})
        groups |= {task: f"{task}*.jsonl" for task in tasks if not task.startswith(("texts", "look-ups", "ledger"))}
    for title, pattern in groups.items():
        print_table(title, sorted(folder.glob(pattern)))


main()
