"""Two sequences of different lengths as one batch: converted models against logits that their originals gave when they were exported.

    python export/experiments/left_padding.py CASES    # needs onnxruntime (tests/python/requirements.txt), and make build

CASES holds a folder for each case with a model.onnx and an io_leftpad.npz: prompt_ids, prompt_mask and prompt_position_ids [2, S] (the second row begins with padding), decode_ids and
decode_position_ids [2, steps], logits_prefill [2, S, V], logits_decode [2, steps, V]. Prints the largest difference of a logit of the newest tokens, fed one a step and four a step.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

# Before onnxruntime loads: its wheels record telemetry under the user's cache folder otherwise.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
import onnxruntime as ort  # noqa: E402

BUILT = Path(__file__).resolve().parents[2] / "target" / "release"
CAPACITY, PAGE = 32, 16
TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int32)": np.int32, "tensor(int64)": np.int64}


def largest_difference(session, io, window):
    inputs = {i.name: i for i in session.get_inputs()}
    state = {}
    for name, i in inputs.items():
        if i.shape and len(i.shape) > 2 and name not in ("position_ids",):
            free = {2: (CAPACITY + PAGE - 1) // PAGE if ".page_" in name else CAPACITY}
            # transformers' exporter writes numbers as names.
            shape = [2] + [int(d) if str(d).isdigit() else free.get(axis) for axis, d in enumerate(i.shape)][1:]
            state[name] = np.zeros(shape, TYPES[i.type])
    outputs = [o.name for o in session.get_outputs()]
    pasts, presents = [n for n in inputs if n in state], [n for n in outputs if n != "logits"]
    paired = {p: n for p in presents for n in pasts if p.replace("present", "past_key_values") == n or p.replace("present_retro", "past_retro") == n}
    if len(paired) < len(pasts):  # transformers: input.past_key_values.layers.0.keys -> output....
        paired |= {p: n for p in presents for n in pasts if p not in paired and p.split(".")[1:] == n.split(".")[1:]}
    assert len(paired) == len(pasts), (pasts, presents)

    def feed(ids, positions, mask, retro):
        call = {**state, "input_ids": ids, "attention_mask": mask, "position_ids": positions, "retro_length": np.array([retro], np.int32)}
        known = {**{n: None for n in inputs}, "retro_length": None}
        call = {n: x.astype(TYPES[inputs[n].type]) if n in inputs else x for n, x in call.items() if n in known}
        result = dict(zip(outputs, session.run(outputs, call)))
        state.update({paired[p]: result[p] for p in presents})
        return result["logits"][:, -1].astype(np.float32)

    ids, positions, mask = io["prompt_ids"], io["prompt_position_ids"], io["prompt_mask"]
    worst = np.abs(feed(ids, positions, mask, -1) - io["logits_prefill"][:, -1]).max()
    for t in range(io["decode_ids"].shape[1]):
        ids = np.concatenate([ids, io["decode_ids"][:, t : t + 1]], 1)
        positions = np.concatenate([positions, io["decode_position_ids"][:, t : t + 1]], 1)
        mask = np.concatenate([mask, np.ones((2, 1), mask.dtype)], 1)
        got = feed(ids[:, -window:], positions[:, -window:], mask, window - 1)
        worst = max(worst, np.abs(got - io["logits_decode"][:, t]).max())
    return worst


def main(cases):
    print("| export | w = 1 | w = 4 |\n|---|---:|---:|")
    with tempfile.TemporaryDirectory() as folder:
        for case in sorted(path.parent for path in cases.glob("*/io_leftpad.npz")):
            target = Path(folder) / "converted.onnx"
            options = ["-o", target, "--force", "--no-verify", "--window", "4", "--budget", "1.0"]
            run = subprocess.run([BUILT / "retro-export", case / "model.onnx", *options], capture_output=True, text=True)
            if run.returncode != 0:
                print(f"| {case.name} | refused: {run.stderr.strip()} | |")
                continue
            plugin = ort.SessionOptions()
            plugin.log_severity_level = 3
            plugin.register_custom_ops_library(str(BUILT / "libretro_attention.so"))
            session = ort.InferenceSession(str(target), plugin, providers=["CPUExecutionProvider"])
            found = [largest_difference(session, np.load(case / "io_leftpad.npz"), w) for w in (1, 4)]
            print(f"| {case.name} | {found[0]:.1e} | {found[1]:.1e} |")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
