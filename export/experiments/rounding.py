"""Why quantised models differ from themselves by more than rounding: the original and the converted model, and the original changed in one thing.

    python export/experiments/rounding.py CASES       # needs onnx and onnxruntime (tests/python/requirements.txt), and make build

CASES holds a folder with a model.onnx for `quant-llama-q4` (MatMulNBits, accuracy_level 4) and `quant-llama-dynint8` (DynamicQuantizeLinear). Prints the largest difference of
a logit over a prompt of 21 tokens and 11 steps, for ten drawings of tokens: median and largest.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import onnx
from onnx import helper, numpy_helper

# Before onnxruntime loads: its wheels record telemetry under the user's cache folder otherwise.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
import onnxruntime as ort  # noqa: E402

BUILT = Path(__file__).resolve().parents[2] / "target" / "release"
PROMPT, STEPS, CAPACITY, DRAWINGS = 21, 11, 48, 10


class Model:
    def __init__(self, path, optimise=True):
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 3
        if not optimise:
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.register_custom_ops_library(str(BUILT / "libretro_attention.so"))
        self.session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self.inputs = {i.name: i for i in self.session.get_inputs()}
        self.converted = any(name.startswith("past_retro") for name in self.inputs)

    def start(self):
        self.state = {}
        for name, i in self.inputs.items():
            if name.startswith("past_"):
                free = (CAPACITY if self.converted else 0) if name.startswith("past_key_values") else (CAPACITY + 15) // 16
                shape = [1] + [d if isinstance(d, int) else free for d in i.shape[1:]]
                self.state[name] = np.zeros(shape, {"tensor(float)": np.float32, "tensor(int32)": np.int32}[i.type])

    def feed(self, ids, total, retro, extra):
        count = len(ids)
        feed = {**self.state, **extra, "input_ids": np.array([ids], np.int64), "attention_mask": np.ones((1, total), np.int64)}
        if "position_ids" in self.inputs:
            feed["position_ids"] = np.arange(total - count, total)[None]
        if self.converted:
            feed["retro_length"] = np.array([retro], np.int32)
        names = [o.name for o in self.session.get_outputs()]
        self.out = dict(zip(names, self.session.run(names, feed)))
        for name, value in self.out.items():
            if name.startswith("present_retro."):
                self.state[name.replace("present_", "past_", 1)] = value
            elif name.startswith("present."):
                self.state[name.replace("present", "past_key_values", 1)] = value
        return self.out["logits"][0, -1].astype(np.float64)

    def logits(self, ids, window=1, **extra):
        extra = {name: np.array([x], np.float32) for name, x in extra.items()}
        self.start()
        rows = [self.feed(ids[:PROMPT], PROMPT, -1, extra)]
        for t in range(PROMPT, PROMPT + STEPS):
            first = t - window + 1
            if not self.converted:
                self.state = {name: value[:, :, :first] for name, value in self.state.items()}
            rows.append(self.feed(ids[first : t + 1], t + 1, window - 1, extra))
        return np.array(rows)


def convert(source, target):
    command = [BUILT / "retro-export", source, "-o", target, "--force", "--no-verify", "--window", "4", "--budget", "1.0"]
    subprocess.run(command, check=True, capture_output=True)
    return Model(target)


def with_noise(model):
    """Its embeddings times a new input `noise`."""
    model = onnx.ModelProto.FromString(model.SerializeToString())
    graph = model.graph
    at = next(i for i, n in enumerate(graph.node) if n.op_type == "Gather" and n.input[1] == "input_ids")
    name = graph.node[at].output[0]
    for i, node in enumerate(graph.node):
        if node.op_type == "DequantizeLinear" and node.input[0] == name:
            at, name = i, node.output[0]
    for node in graph.node:
        node.input[:] = [name + "_noisy" if i == name else i for i in node.input]
    graph.node.insert(at + 1, helper.make_node("Mul", [name, "noise"], [name + "_noisy"]))
    graph.input.append(helper.make_tensor_value_info("noise", onnx.TensorProto.FLOAT, [1]))
    return model


def with_accuracy_level(model, level):
    model = onnx.ModelProto.FromString(model.SerializeToString())
    for attribute in (a for n in model.graph.node if n.op_type == "MatMulNBits" for a in n.attribute):
        if attribute.name == "accuracy_level":
            attribute.i = level
    return model


def with_fixed_ranges(model, folder, drawings):
    """DynamicQuantizeLinear by QuantizeLinear with a range that all drawings fit in."""
    shown = onnx.ModelProto.FromString(model.SerializeToString())
    names = {n.input[0] for n in model.graph.node if n.op_type == "DynamicQuantizeLinear"}
    shown.graph.output.extend(helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, None) for n in names)
    onnx.save(shown, folder / "shown.onnx")
    session = Model(folder / "shown.onnx")
    low, high = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0.0)
    for ids in drawings:
        session.start()
        for t in range(len(ids)):
            session.feed(ids[t : t + 1], t + 1, 0, {})
            for n in names:
                low[n], high[n] = min(low[n], session.out[n].min()), max(high[n], session.out[n].max())
    fixed = onnx.ModelProto.FromString(model.SerializeToString())
    for node in fixed.graph.node:
        if node.op_type == "DynamicQuantizeLinear":
            x, (y, scale, zero) = node.input[0], node.output
            step = np.float32(1.2 * (high[x] - low[x]) / 255)
            point = np.uint8(np.clip(np.round(-1.2 * low[x] / step), 0, 255))
            fixed.graph.initializer.extend([numpy_helper.from_array(np.array(step), scale), numpy_helper.from_array(np.array(point), zero)])
            node.CopyFrom(helper.make_node("QuantizeLinear", [x, scale, zero], [y]))
    return fixed


def main(cases):
    drawings = [[int(x) for x in np.random.default_rng(100 + s).integers(3, 500, PROMPT + STEPS)] for s in range(DRAWINGS)]

    def table(title, model, folder):
        onnx.save(model, folder / "original.onnx")
        onnx.save(with_noise(model), folder / "noisy.onnx")
        original, plain = Model(folder / "original.onnx"), Model(folder / "original.onnx", optimise=False)
        noisy, converted = Model(folder / "noisy.onnx"), convert(folder / "original.onnx", folder / "converted.onnx")
        rows = {
            "the original without graph optimisations": lambda ids: plain.logits(ids) - original.logits(ids),
            "the original, embeddings times 1 + 2.4e-7": lambda ids: noisy.logits(ids, noise=1 + 2.4e-7) - noisy.logits(ids, noise=1),
            "the original, fed 2 tokens together": lambda ids: original.logits(ids, 2) - original.logits(ids),
            "the original, fed 4 tokens together": lambda ids: original.logits(ids, 4) - original.logits(ids),
            "converted, w = 1": lambda ids: converted.logits(ids) - original.logits(ids),
            "converted, w = 2": lambda ids: converted.logits(ids, 2) - original.logits(ids),
            "converted, w = 4": lambda ids: converted.logits(ids, 4) - original.logits(ids),
        }
        print(f"\n{title}: largest logit difference from the original fed one token a step\n\n| | median | largest |\n|---|---:|---:|")
        for name, row in rows.items():
            found = sorted(np.abs(row(ids)).max() for ids in drawings)
            print(f"| {name} | {np.median(found):.1e} | {found[-1]:.1e} |")

    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        q4, int8 = (onnx.load(cases / name / "model.onnx") for name in ("quant-llama-q4", "quant-llama-dynint8"))
        table("quant-llama-q4", q4, folder)
        table("quant-llama-q4 with accuracy_level 0 instead of 4", with_accuracy_level(q4, 0), folder)
        table("quant-llama-dynint8", int8, folder)
        table("quant-llama-dynint8 with fixed ranges", with_fixed_ranges(int8, folder, drawings), folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
