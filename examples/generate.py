"""Greedy generation with a converted model from Python: caches and state stay on the device and are updated in place.

    python examples/generate.py MODEL_FOLDER --plugin libretro_attention.so --device cuda --prompt 'Once upon a time'

MODEL_FOLDER is what retro-export wrote. Needs onnxruntime 1.22 or newer (onnxruntime-gpu for --device cuda) and, for --prompt,
the package tokenizers; --ids takes token numbers instead.
"""

import argparse
from pathlib import Path

import numpy as np
import onnxruntime as ort

TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int32)": np.int32}


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
        self.window, page_size = int(metadata["retro.window"]), int(metadata["retro.page_size"])
        self.capacity, self.ids, self.retro = capacity, [], 0

        # On the CPU an OrtValue borrows its array, and a binding does not keep either alive: hold on to all of them.
        self.state, self.fed = [], {}
        self.binding = self.session.io_binding()
        # Only the newest token's logits come back to the host: a converted model gives no others.
        self.binding.bind_output("logits", "cpu")
        pages = -(-capacity // page_size)
        for value in self.session.get_inputs():
            if not value.name.startswith("past_"):
                continue
            # Free dimensions: the batch, and the third, which counts tokens or pages.
            free = {0: 1, 2: pages if ".page_" in value.name else capacity}
            shape = [size if isinstance(size, int) else free[axis] for axis, size in enumerate(value.shape)]
            tensor = ort.OrtValue.ortvalue_from_numpy(np.zeros(shape, TYPES[value.type]), device, device_id)
            present = value.name.replace("past_retro.", "present_retro.").replace("past_key_values.", "present.")
            # One buffer as past and present: the operator then copies nothing.
            self.binding.bind_ortvalue_input(value.name, tensor)
            self.binding.bind_ortvalue_output(present, tensor)
            self.state.append(tensor)

    def feed(self, tokens: list[int], length: int, retro_length: int) -> np.ndarray:
        """Feeds tokens of which the last is number `length`; returns the scores of the next."""
        if length > self.capacity:
            raise ValueError(f"{length} tokens do not fit a cache of {self.capacity}")
        fed = {
            "input_ids": np.array([tokens], np.int64),
            "attention_mask": np.ones((1, length), np.int64),
            "retro_length": np.array([retro_length], np.int32),
        }
        self.fed = {name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in fed.items()}
        for name, value in self.fed.items():
            # Not bind_cpu_input, which knows no input that has a default.
            self.binding.bind_ortvalue_input(name, value)
        self.session.run_with_iobinding(self.binding)
        return self.binding.get_outputs()[0].numpy()[0, -1].astype(np.float32)

    def read(self, ids: list[int], chunk: int = 512) -> np.ndarray:
        """Reads a prompt, or the next turn of a chat."""
        for start in range(0, len(ids), chunk):
            part = ids[start : start + chunk]
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


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--plugin", required=True, help="libretro_attention.so")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--device-id", type=int, default=0)
    parser.add_argument("-n", "--n-predict", type=int, default=100)
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument("-p", "--prompt")
    prompt.add_argument("--ids", help="token numbers, with commas between")
    args = parser.parse_args()
    tokenizer = None
    if args.prompt is not None:
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(args.folder / "tokenizer.json"))
        ids = tokenizer.encode(args.prompt).ids
    else:
        ids = [int(token) for token in args.ids.split(",")]
    generator = Generator(args.folder / "model.onnx", args.plugin, len(ids) + args.n_predict, args.device, args.device_id)
    made = generator.generate(ids, args.n_predict)
    print(tokenizer.decode(made) if tokenizer else ",".join(map(str, made)))


if __name__ == "__main__":
    main()
