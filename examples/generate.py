"""Greedy generation with a converted model from Python: caches and state stay on the device and are updated in place.

    python examples/generate.py MODEL --plugin libretro_attention.so --device cuda --prompt 'Once upon a time'

MODEL is the folder that retro-export wrote, or the ONNX file in it. Needs onnxruntime 1.22 or newer (onnxruntime-gpu for --device
cuda) and, for --prompt, the package tokenizers; --ids takes token numbers instead.
"""

import argparse
import json
import os
import re
from pathlib import Path

import numpy as np

# Before onnxruntime loads: its wheels record telemetry under the user's cache folder otherwise.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
import onnxruntime as ort  # noqa: E402

TYPES = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(int32)": np.int32,
    "tensor(int64)": np.int64,
    "tensor(uint8)": np.uint8,
    "tensor(bool)": np.bool_,
}
# Inputs that say for how many of the tokens logits are wanted.
LOGITS_TO_KEEP = ("num_logits_to_keep", "logits_to_keep")


def graph_in(folder: Path) -> Path:
    """The ONNX file of a folder, or the file itself."""
    if folder.is_file():
        return folder
    names = ["model.onnx", "onnx/model.onnx"]
    config = folder / "genai_config.json"
    if config.is_file():
        names.insert(0, json.loads(config.read_text())["model"]["decoder"]["filename"])
    for name in names:
        if (folder / name).is_file():
            return folder / name
    only = sorted(folder.glob("*.onnx")) or sorted(folder.glob("onnx/*.onnx"))
    if len(only) == 1:
        return only[0]
    raise FileNotFoundError(f"{folder} has none of {', '.join(names)}, and {len(only)} other graphs: name the ONNX file")


def tokenizer_of(graph: Path) -> Path:
    """The tokenizer beside a graph, or in a folder above that keeps it in a subfolder."""
    folders = list(graph.absolute().parents)[:3]
    found = next((f / "tokenizer.json" for f in folders if (f / "tokenizer.json").is_file()), None)
    if found is None:
        raise FileNotFoundError(f"{graph.parent} has no tokenizer.json: copy the model's there, or give --ids")
    return found


def present_of(past: str, outputs: set[str]) -> str | None:
    """The output that goes with a cache or state: exporters have different names for them."""
    names = [past.replace(old, new) for old, new in [("past_key_values", "present"), ("past", "present"), ("input.", "output.")]]
    return next((name for name in names if name != past and name in outputs), None)


class Generator:
    """A sequence of up to `capacity` tokens."""

    def __init__(self, model: Path, plugin: str, capacity: int, device: str = "cpu", device_id: int = 0):
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.register_custom_ops_library(plugin)
        providers = ["CPUExecutionProvider"]
        if device == "cuda":
            if hasattr(ort, "preload_dlls"):
                ort.preload_dlls()  # NVIDIA's libraries, where pip installed them
            providers.insert(0, ("CUDAExecutionProvider", {"device_id": str(device_id), "arena_extend_strategy": "kSameAsRequested"}))
        self.session = ort.InferenceSession(str(model), options, providers=providers)
        # Python's onnxruntime falls back to the CPU without a word.
        if device == "cuda" and self.session.get_providers()[0] != "CUDAExecutionProvider":
            raise RuntimeError("onnxruntime has no CUDA here: install onnxruntime-gpu, and see its log for what is missing")
        metadata = self.session.get_modelmeta().custom_metadata_map
        if "retro.window" not in metadata:
            raise RuntimeError(f"{model} was not converted by retro-export")
        # Some graphs keep their window and feed its tokens again by themselves: to them each step is one token.
        self.feeds_window = "retro.window_in_graph" not in metadata
        self.window = int(metadata["retro.window"]) if self.feeds_window else 1
        self.page_size = int(metadata["retro.page_size"])
        self.capacity, self.ids, self.retro = capacity, [], 0

        self.inputs = {value.name: value for value in self.session.get_inputs()}
        outputs = {value.name for value in self.session.get_outputs()}
        presents = {name: present_of(name, outputs) for name in self.inputs}
        known = ("input_ids", "attention_mask", "position_ids", *LOGITS_TO_KEEP)
        for name, value in self.inputs.items():
            if presents[name] is None and name not in known:
                raise RuntimeError(f"{model} wants the input {name}, which this example does not know")
            if value.type not in TYPES:
                raise RuntimeError(f"{model}: the input {name} is a {value.type}, which this example does not feed")

        # On the CPU an OrtValue borrows its array, and a binding does not keep either alive: hold on to all of them.
        self.state, self.fed = [], {}
        self.binding = self.session.io_binding()
        # The first output: only scores cross to the host.
        self.binding.bind_output("logits", "cpu")
        for name, present in presents.items():
            if present is None:
                continue
            array = np.zeros(self.shape(name), TYPES[self.inputs[name].type])
            tensor = ort.OrtValue.ortvalue_from_numpy(array, device, device_id)
            # One buffer as past and present: the operator then copies nothing.
            self.binding.bind_ortvalue_input(name, tensor)
            self.binding.bind_ortvalue_output(present, tensor)
            self.state.append(tensor)

    def shape(self, name: str) -> list[int]:
        """The shape of a cache [B, Hkv, C, D], or of state: what is not declared follows from the batch and the capacity, or, for
        heads and head sizes that an exporter has only named, from the state of the layer."""

        def declared(name):
            # Some exporters write numbers as names.
            sizes = self.inputs[name].shape
            return [int(size) if isinstance(size, str) and size.isdigit() else size for size in sizes]

        # Codes of keys lie in blocks of 128 tokens, all else of pages page by page.
        rows = 128 if self.inputs[name].type == "tensor(uint8)" else self.page_size if ".page_" in name else 1
        free = {0: 1, 2: -(-self.capacity // rows)}
        layer = re.search(r"\d+", name)
        steps, outputs = (f"past_retro.{layer[0]}.{what}" if layer else "" for what in ("page_steps", "outputs"))
        if steps in self.inputs:  # [B, Hkv, P] and [B, R, Hq, D]
            free[1], free[3] = declared(steps)[1], declared(outputs)[3]
        sizes = [size if isinstance(size, int) else free.get(axis) for axis, size in enumerate(declared(name))]
        if not all(isinstance(size, int) for size in sizes):
            raise RuntimeError(f"the sizes of {name} are not all declared: {self.inputs[name].shape}")
        return sizes

    def feed(self, tokens: list[int], length: int, retro_length: int) -> np.ndarray:
        """Feeds tokens of which the last is number `length`; returns the scores of the next."""
        if length > self.capacity:
            raise ValueError(f"{length} tokens do not fit a cache of {self.capacity}")
        first = length - len(tokens)
        # Tokens that are fed again keep the positions they had.
        fed = {"input_ids": [tokens], "attention_mask": np.ones((1, length)), "position_ids": [range(first, length)]}
        # A single number has no shape.
        fed |= {name: np.ones([1] * len(self.inputs[name].shape)) for name in LOGITS_TO_KEEP if name in self.inputs}
        fed = {name: np.array(array, TYPES[self.inputs[name].type]) for name, array in fed.items() if name in self.inputs}
        if self.feeds_window:  # not among the session's inputs, since it has a default
            fed["retro_length"] = np.array([retro_length], np.int32)
        self.fed = {name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in fed.items()}
        for name, value in self.fed.items():
            # Not bind_cpu_input, which knows no input that has a default.
            self.binding.bind_ortvalue_input(name, value)
        # Anew each time: a binding keeps the last run's output, whose shape is another where the model gives all tokens' logits.
        self.binding.bind_output("logits", "cpu")
        self.session.run_with_iobinding(self.binding)
        return self.binding.get_outputs()[0].numpy()[0, -1].astype(np.float32)

    def read(self, ids: list[int], chunk: int = 512) -> np.ndarray:
        """Reads a prompt, or the next turn of a chat."""
        starts = list(range(0, len(ids), chunk))
        if not self.feeds_window and len(starts) > 1 and len(ids) - starts[-1] == 1:
            starts.pop()  # to such a graph a single token is a step
        for start, end in zip(starts, [*starts[1:], len(ids)]):
            part = ids[start:end]
            self.ids += part
            scores = self.feed(part, len(self.ids), -1)
        self.retro = 0
        return scores

    def step(self, token: int) -> np.ndarray:
        """Appends a token. The last few before it are fed again, for the pages that it loads to correct them."""
        self.ids.append(token)
        scores = self.feed(self.ids[len(self.ids) - 1 - self.retro :], len(self.ids), self.retro)
        self.retro = min(self.retro + 1, self.window - 1)
        return scores

    def generate(self, ids: list[int], count: int, stop: int | None = None) -> list[int]:
        scores, made = self.read(ids), []
        while len(made) < count:
            token = int(scores.argmax())
            made.append(token)
            if token == stop or len(made) == count:
                break
            scores = self.step(token)
        return made


def run(args):
    graph = graph_in(args.model)
    tokenizer = None
    if args.prompt is not None:
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(tokenizer_of(graph)))
        ids = tokenizer.encode(args.prompt).ids
    else:
        ids = [int(token) for token in args.ids.split(",")]
    generator = Generator(graph, args.plugin, len(ids) + args.n_predict, args.device, args.device_id)
    made = generator.generate(ids, args.n_predict)
    print(tokenizer.decode(made) if tokenizer else ",".join(map(str, made)))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="the folder that retro-export wrote, or the ONNX file in it")
    parser.add_argument("--plugin", required=True, help="libretro_attention.so")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--device-id", type=int, default=0)
    parser.add_argument("-n", "--n-predict", type=int, default=100)
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument("-p", "--prompt")
    prompt.add_argument("--ids", help="token numbers, with commas between")
    args = parser.parse_args()
    try:
        run(args)
    except Exception as error:  # onnxruntime's own have no class in common
        raise SystemExit("error: " + " ".join(str(error).split())) from None


if __name__ == "__main__":
    main()
