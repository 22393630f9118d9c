"""A converted model in ONNX Runtime: sequences that are decoded together, with caches and state in place on the device."""

from __future__ import annotations

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
# Words in the names of caches of keys and values.
CACHE_WORDS = {"key", "value", "keys", "values", "k", "v"}
# State of the operator, by its own names and by those that onnxruntime-genai knows.
OPERATORS_STATE = re.compile(r"past_retro\..*")
GENAI_STATE = re.compile(r"past_key_values\.\d+\.(conv_state|recurrent_state)")
# Rows of the state of selector sketch.
SKETCH_BLOCK = 128
# With one token a step, a share of the cache is faster than all of it beyond so many tokens.
ONE_TOKEN_DENSE_BELOW = 1024


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


def present_of(past: str, outputs: set[str]) -> str | None:
    """The output that goes with a cache or state: exporters have different names for them."""
    changes = [("past_key_values", "present"), ("past", "present"), ("input.", "output.")]
    names = [past.replace(old, new) for old, new in changes]
    return next((name for name in names if name != past and name in outputs), None)


def pieces(count: int, chunk: int, keeps_window: bool) -> list[tuple[int, int]]:
    """Where a prompt of `count` tokens is cut into chunks. A graph that keeps its window takes a token behind others for a step:
    no piece is a single one then, and the last may be longer by one."""
    chunk = max(chunk, 2 if keeps_window else 1)
    starts = list(range(0, count, chunk))
    if keeps_window and count > 1 and count - starts[-1] == 1:
        starts.pop()
    return list(zip(starts, [*starts[1:], count]))


class Decoder:
    """A converted model, loaded."""

    def __init__(self, graph: Path, plugin: str, provider: str, device_id: int, options: ort.SessionOptions | None):
        self.graph = graph
        if options is None:
            options = ort.SessionOptions()
            # Converted models have inputs with defaults, of which ONNX Runtime warns.
            options.log_severity_level = 3
        options.register_custom_ops_library(plugin)
        self.device, self.device_id = ("cpu", 0) if provider == "CPUExecutionProvider" else ("cuda", device_id)
        providers: list = ["CPUExecutionProvider"]
        if self.device == "cuda":
            if hasattr(ort, "preload_dlls"):
                ort.preload_dlls()  # NVIDIA's libraries, where pip installed them
            settings = {"device_id": str(device_id), "arena_extend_strategy": "kSameAsRequested"}
            providers.insert(0, (provider, settings))
        self.session = ort.InferenceSession(str(graph), options, providers=providers)
        # Python's onnxruntime falls back to the CPU without a word.
        if self.session.get_providers()[0] != provider:
            raise RuntimeError(f"onnxruntime has no {provider} here: see its log for what is missing")
        metadata = self.session.get_modelmeta().custom_metadata_map
        if "retro.window" not in metadata:
            raise RuntimeError(f"{graph} was not converted by retro-export")
        self.window, self.page_size = int(metadata["retro.window"]), int(metadata["retro.page_size"])
        # Models made for a host's buffers have state for so many tokens.
        self.context = int(metadata.get("retro.context", 0)) or None
        # Not among the session's inputs, since they have defaults.
        defaults = {value.name for value in self.session.get_overridable_initializers()}
        self.feeds_window = "retro_length" in defaults
        if not self.feeds_window and "retro.window_in_graph" not in metadata:
            raise RuntimeError(f"{graph} neither takes retro_length nor keeps its window: convert the original again")
        # On a CPU, short contexts are read whole: the other tokens of the window would cost more than that.
        reads_whole = self.device == "cpu" and "retro_page_budget" in defaults
        self.dense_below = int(metadata.get("retro.dense_below", 0)) if reads_whole else 0
        if self.window == 1:
            self.dense_below = min(self.dense_below, ONE_TOKEN_DENSE_BELOW)

        self.inputs = {value.name: value for value in self.session.get_inputs()}
        outputs = {value.name for value in self.session.get_outputs()}
        presents = {name: present_of(name, outputs) for name in self.inputs}
        self.state = {name: present for name, present in presents.items() if present is not None}
        ours = GENAI_STATE if metadata.get("retro.host") == "genai" else OPERATORS_STATE
        others = (name for name in self.state if not ours.fullmatch(name) and not self.is_cache(name))
        # State of convolutions and recurrent layers takes padding for tokens. It would take one fed again for two, so that no model
        # with a window of more has any.
        self.recurrent = next(others, None) if self.window == 1 else None
        known = ("input_ids", "attention_mask", "position_ids", *LOGITS_TO_KEEP)
        for name, value in self.inputs.items():
            if name not in self.state and name not in known:
                raise RuntimeError(f"{graph} wants the input {name}, which RetroForCausalLM does not feed")
            if value.type not in TYPES:
                raise RuntimeError(f"{graph}: the input {name} is a {value.type}, which RetroForCausalLM does not feed")

    def is_cache(self, name: str) -> bool:
        """Whether an input holds keys or values: by its name, or by its open third dimension."""
        words = re.split("[^a-z]+", name.lower().replace("past_key_values", ""))
        sizes = self.declared(name)
        return not CACHE_WORDS.isdisjoint(words) or (len(sizes) == 4 and not isinstance(sizes[2], int))

    def declared(self, name: str) -> list[int | str | None]:
        """The sizes of an input. Some exporters write numbers as names."""
        sizes = self.inputs[name].shape
        return [int(size) if isinstance(size, str) and size.isdigit() else size for size in sizes]

    def shape(self, name: str, batch: int, capacity: int) -> list[int]:
        """The shape of a cache [B, Hkv, C, D], or of state: what is not declared follows from the batch and the capacity, or, for
        heads and head sizes that an exporter has only named, from the state of the layer."""
        # Codes of keys lie in blocks of tokens, all else of pages page by page.
        is_sketch = self.inputs[name].type == "tensor(uint8)"
        rows = SKETCH_BLOCK if is_sketch else self.page_size if ".page_" in name else 1
        free = {0: batch, 2: -(-capacity // rows)}
        layer = re.search(r"\d+", name)
        steps, outputs = (f"past_retro.{layer[0]}.{what}" if layer else "" for what in ("page_steps", "outputs"))
        if steps in self.inputs:  # [B, Hkv, P] and [B, R, Hq, D]
            free[1], free[3] = self.declared(steps)[1], self.declared(outputs)[3]
        sizes = [size if isinstance(size, int) else free.get(axis) for axis, size in enumerate(self.declared(name))]
        if not all(isinstance(size, int) for size in sizes):
            raise RuntimeError(f"the sizes of {name} are not all declared: {self.inputs[name].shape}")
        if len(sizes) > 1 and sizes[0] != batch:
            raise ValueError(f"{self.graph} takes {sizes[0]} sequences at a time, not {batch}")
        return sizes


class Sequences:
    """Sequences that are decoded together, of up to `capacity` tokens each. Shorter ones begin with padding, so that all
    end at the same column."""

    def __init__(self, decoder: Decoder, batch: int, capacity: int):
        if decoder.context is not None and capacity > decoder.context:
            raise ValueError(
                f"{decoder.graph} is made for {decoder.context} tokens, and {capacity} may be fed: ask for fewer, or convert with --context"
            )
        self.decoder, self.capacity = decoder, capacity
        self.ids = np.zeros((batch, capacity), np.int64)
        self.mask = np.zeros((batch, capacity), np.int64)
        self.length, self.retro = 0, 0
        # On the CPU an OrtValue borrows its array, and a binding does not keep either alive: hold on to all of them.
        self.buffers, self.fed = [], {}
        self.binding = decoder.session.io_binding()
        # The first output: only logits cross to the host.
        self.binding.bind_output("logits", "cpu")
        for name, present in decoder.state.items():
            array = np.zeros(decoder.shape(name, batch, capacity), TYPES[decoder.inputs[name].type])
            tensor = ort.OrtValue.ortvalue_from_numpy(array, decoder.device, decoder.device_id)
            # One buffer as past and present: the operator then copies nothing.
            self.binding.bind_ortvalue_input(name, tensor)
            self.binding.bind_ortvalue_output(present, tensor)
            self.buffers.append((array, tensor))

    def read(self, ids: np.ndarray, mask: np.ndarray, chunk: int) -> np.ndarray:
        """Reads prompts [B, S] with their mask, which is 0 where a prompt has not begun; gives the logits [B, V] of what
        follows. Prompts without padding are read in chunks."""
        self._check(mask)
        if not mask.all():
            chunk = mask.shape[1]
        for start, end in pieces(ids.shape[1], chunk, not self.decoder.feeds_window):
            self._append(ids[:, start:end], mask[:, start:end])
            logits = self._feed(end - start, -1)
        self.retro = 0
        return logits

    def step(self, tokens: np.ndarray) -> np.ndarray:
        """Appends a token to each sequence. The last few before it are fed again, for the pages that it loads to correct them:
        here, unless the graph does so by itself."""
        self._append(tokens[:, None], np.ones((len(tokens), 1), np.int64))
        pages = self._pages()
        logits = self._feed(1 + self.retro, self.retro, pages)
        # Steps that read everything leave nothing to correct.
        if self.decoder.feeds_window and (self.retro or not pages.all()):
            self.retro = min(self.retro + 1, self.decoder.window - 1)
        return logits

    def _pages(self) -> np.ndarray:
        """Pages that a step reads of each sequence: all where it is short; 0: as converted."""
        lengths = self.mask[:, : self.length].sum(axis=1)
        return np.where(lengths <= self.decoder.dense_below, -(-lengths // self.decoder.page_size), 0).astype(np.int32)

    def _check(self, mask: np.ndarray) -> None:
        if not mask[:, -1].all() or (np.diff(mask, axis=1) < 0).any():
            raise ValueError(
                "the attention mask may be 0 only before a sequence begins: pad on the left (tokenizer.padding_side = 'left')"
            )
        if mask.all():
            return
        why = "has no attention_mask" if "attention_mask" not in self.decoder.inputs else None
        if self.decoder.recurrent is not None:
            why = f"carries {self.decoder.recurrent} from token to token, padding too"
        if why is not None:
            raise ValueError(f"{self.decoder.graph} {why}: give it sequences of equal length, or one at a time")

    def _append(self, ids: np.ndarray, mask: np.ndarray) -> None:
        end = self.length + ids.shape[1]
        if end > self.capacity:
            raise ValueError(f"{end} tokens do not fit a cache of {self.capacity}")
        self.ids[:, self.length : end], self.mask[:, self.length : end] = ids, mask
        self.length = end

    def _feed(self, count: int, retro_length: int, pages: np.ndarray | None = None) -> np.ndarray:
        """Feeds the last `count` tokens of each sequence. `pages`: how many to read, where that is not as converted."""
        first, inputs = self.length - count, self.decoder.inputs
        mask = self.mask[:, : self.length]
        # Tokens that are fed again keep the positions they had. Padding has none; its rows are ignored.
        positions = np.maximum(np.cumsum(mask, axis=1)[:, first:] - 1, 0)
        fed = {"input_ids": self.ids[:, first : self.length], "attention_mask": mask, "position_ids": positions}
        # A single number has no shape.
        fed |= {name: np.ones([1] * len(inputs[name].shape)) for name in LOGITS_TO_KEEP if name in inputs}
        fed = {name: np.array(array, TYPES[inputs[name].type], order="C") for name, array in fed.items() if name in inputs}
        if self.decoder.feeds_window:
            fed["retro_length"] = np.array([retro_length], np.int32)
        if self.decoder.dense_below:
            fed["retro_page_budget"] = np.zeros(1, np.int32) if pages is None else pages
        self.fed = {name: (array, ort.OrtValue.ortvalue_from_numpy(array)) for name, array in fed.items()}
        for name, (_, value) in self.fed.items():
            # Not bind_cpu_input, which knows no input that has a default.
            self.binding.bind_ortvalue_input(name, value)
        # Anew each time: a binding keeps the last run's output, whose shape is another where the model gives all tokens' logits.
        self.binding.bind_output("logits", "cpu")
        self.decoder.session.run_with_iobinding(self.binding)
        return self.binding.get_outputs()[0].numpy()[:, -1].astype(np.float32)
