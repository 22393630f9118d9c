"""transformers' generate() with models that retro-export wrote."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from transformers import AutoConfig, GenerationConfig, GenerationMixin, PretrainedConfig
from transformers.generation import GenerateDecoderOnlyOutput
from transformers.generation.configuration_utils import GenerationMode
from transformers.modeling_outputs import CausalLMOutput

from . import get_library_path
from ._decoder import Decoder, Sequences, graph_in

# Tokens of a prompt that are read at once, unless the generation config has a `prefill_chunk_size`.
CHUNK = 512
PROVIDERS = ("CPUExecutionProvider", "CUDAExecutionProvider")
# What generate() hands to its loop and needs no answer: the cache is this class's own, and logits are the newest token's.
IGNORED = {"use_cache", "logits_to_keep", "cache_position", "synced_gpus"}


class RetroForCausalLM(GenerationMixin):
    """A model that retro-export wrote, for transformers' `generate()`: greedy or sampled, streamed, and in batches whose
    shorter prompts are padded on the left.

        model = RetroForCausalLM.from_pretrained("OUT")
        model.generate(**tokenizer("Once upon a time", return_tensors="pt"), max_new_tokens=100)

    The cache is as long as `generate()` may need: prompt and new tokens. Every call begins with an empty one.
    """

    main_input_name = "input_ids"
    _is_stateful = False

    def __init__(self, decoder: Decoder, config: PretrainedConfig, generation_config: GenerationConfig):
        self._decoder, self.config, self.generation_config = decoder, config, generation_config
        # Where inputs are expected and logits come out; the session may run elsewhere.
        self.device, self.dtype = torch.device("cpu"), torch.float32

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        *,
        provider: str = "CPUExecutionProvider",
        device_id: int = 0,
        session_options=None,
        plugin: str | None = None,
    ) -> RetroForCausalLM:
        """Loads the folder that retro-export wrote, or the ONNX file in it.

        `provider` is CPUExecutionProvider or CUDAExecutionProvider, on GPU `device_id`. The plugin is registered in
        `session_options`. `plugin` is the library to use instead of get_library_path()'s.
        """
        place = Path(folder)
        if not place.exists():
            raise FileNotFoundError(f"there is no {place}: RetroForCausalLM loads the folder that retro-export wrote")
        if provider not in PROVIDERS:
            raise ValueError(f"provider {provider!r}: expected one of {', '.join(PROVIDERS)}")
        decoder = Decoder(graph_in(place), plugin or get_library_path(), provider, device_id, session_options)
        home = _folder_with("config.json", decoder.graph) or _folder_with("genai_config.json", decoder.graph)
        if home is None:
            raise FileNotFoundError(f"{decoder.graph.parent} has neither config.json nor genai_config.json: copy the model's there")
        config = _config(home)
        if (home / "generation_config.json").is_file():
            generation_config = GenerationConfig.from_pretrained(home)
        else:
            generation_config = GenerationConfig.from_model_config(config)
        return cls(decoder, config, generation_config)

    def can_generate(self) -> bool:
        return True

    def eval(self) -> RetroForCausalLM:
        return self

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        # The caches are the session's inputs: transformers makes none.
        return False

    def __call__(self, *args, **kwargs) -> CausalLMOutput:
        return self.forward(*args, **kwargs)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> CausalLMOutput:
        """Reads whole sequences; the logits [B, 1, V] are those of what follows each."""
        sequences = Sequences(self._decoder, *input_ids.shape)
        logits = sequences.read(*_prompt(input_ids, attention_mask), CHUNK)
        return CausalLMOutput(logits=torch.from_numpy(logits)[:, None])

    def prepare_inputs_for_generation(self, input_ids, attention_mask=None):
        """Names what generate() takes; `_decode` feeds the session."""
        return {"input_ids": input_ids, "attention_mask": attention_mask}

    @torch.no_grad()
    def generate(self, inputs=None, generation_config=None, *, streamer=None, assistant_model=None, custom_generate=None, **kwargs):
        """As transformers' `generate()`. Searches that go back in a sequence, beam search among them, are errors."""
        if assistant_model is not None or custom_generate is not None:
            raise ValueError("RetroForCausalLM generates greedily or by sampling: it takes no assistant_model and no custom_generate")

        # transformers prepares the generation config, the processors and the criteria; its own loop would want its own cache.
        def loop(model, input_ids, logits_processor, stopping_criteria, generation_config, **given):
            return self._decode(input_ids, logits_processor, stopping_criteria, generation_config, streamer, **given)

        return super().generate(inputs, generation_config, custom_generate=loop, **kwargs)

    def _decode(self, input_ids, logits_processor, stopping_criteria, generation_config, streamer, attention_mask=None, **given):
        settings = generation_config
        mode = settings.get_generation_mode()
        if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
            search = mode.value.replace("_", " ")
            raise ValueError(f"RetroForCausalLM generates greedily or by sampling: {search} would go back in a sequence")
        unknown = [name for name, value in given.items() if value is not None and name not in IGNORED]
        if unknown:
            raise ValueError(f"RetroForCausalLM does not take {', '.join(unknown)}")
        if streamer is not None:
            streamer.put(input_ids.cpu())
        # The last token is never fed.
        sequences = Sequences(self._decoder, len(input_ids), max(settings.max_length - 1, input_ids.shape[1]))
        logits = sequences.read(*_prompt(input_ids, attention_mask), getattr(settings, "prefill_chunk_size", None) or CHUNK)
        scores, raw = [], []
        going = torch.ones(len(input_ids), dtype=torch.bool, device=input_ids.device)
        while True:
            raw_logits = torch.from_numpy(logits).to(input_ids.device)
            processed = logits_processor(input_ids, raw_logits.clone())
            if settings.return_dict_in_generate:
                scores += [processed] if settings.output_scores else []
                raw += [raw_logits] if settings.output_logits else []
            if settings.do_sample:
                tokens = torch.multinomial(torch.softmax(processed, dim=-1), num_samples=1).squeeze(1)
            else:
                tokens = processed.argmax(dim=-1)
            # Sequences that have ended go on with padding, where there is a token for it.
            padding = settings._pad_token_tensor
            if padding is not None and not going.all():
                tokens = torch.where(going, tokens, padding.to(tokens))
            input_ids = torch.cat([input_ids, tokens[:, None]], dim=-1)
            if streamer is not None:
                streamer.put(tokens.cpu())
            going &= ~stopping_criteria(input_ids, tuple(scores))
            if not going.any():
                break
            logits = sequences.step(tokens.cpu().numpy())
        if streamer is not None:
            streamer.end()
        if not settings.return_dict_in_generate:
            return input_ids
        return GenerateDecoderOnlyOutput(sequences=input_ids, scores=tuple(scores) or None, logits=tuple(raw) or None)


def _prompt(input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> tuple[np.ndarray, np.ndarray]:
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    if mask.shape != input_ids.shape or input_ids.shape[1] == 0:
        raise ValueError(f"tokens {list(input_ids.shape)} and mask {list(mask.shape)}: expected [B, S] for both, with one token or more")
    return input_ids.cpu().numpy().astype(np.int64), mask.cpu().numpy().astype(np.int64)


def _folder_with(name: str, graph: Path) -> Path | None:
    """The folder of the graph, or one above that keeps it in a subfolder."""
    return next((folder for folder in list(graph.absolute().parents)[:3] if (folder / name).is_file()), None)


def _config(folder: Path) -> PretrainedConfig:
    """The model's configuration; onnxruntime-genai's folders may have none of transformers'."""
    if (folder / "config.json").is_file():
        return AutoConfig.from_pretrained(folder)
    model = json.loads((folder / "genai_config.json").read_text())["model"]
    tokens = {name: model.get(name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return PretrainedConfig(**tokens)
