"""Makes small tokenizers that are built as those of well-known models, and the ids that transformers gives for some texts.

    python make.py build                    # NAME/tokenizer.json and its configuration, from text.txt
    python make.py expect > expected.json   # with the transformers that is installed

The vocabularies are trained on a few lines; normalizer, pre-tokenizer, decoder, post-processor, added tokens and tokenizer_config.json
are the model's. tests/tokenizers.rs compares.

expected.json is of transformers 4.57.3. 5.24.0 gives the same for all but llama-2, llama-2-eos, tinyllama, yi and the two of deepseek: it
builds Llama's tokenizers anew instead of taking tokenizer.json's, and leaves the flags aside.
"""

import json
import pathlib
import sys

HERE = pathlib.Path(__file__).parent
LINES = (HERE / "text.txt").read_text(encoding="utf-8").splitlines()
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")


def sentencepiece(specials, prepend, template, metaspace=None, gemma=False):
    """BPE with byte fallback, as converted from SentencePiece."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    trained = Tokenizer(models.BPE())
    trained.normalizer = normalizers.Replace(" ", "▁")
    trained.pre_tokenizer = pre_tokenizers.Split(Regex("(?=▁)"), "isolated")
    trained.train_from_iterator(LINES, trainers.BpeTrainer(vocab_size=160, show_progress=False))
    model = json.loads(trained.to_str())["model"]
    vocab = {}
    for token in [*specials, *(f"<0x{i:02X}>" for i in range(256)), *model["vocab"]]:
        vocab.setdefault(token, len(vocab))
    unk = "<unk>"
    t = Tokenizer(models.BPE(vocab, [tuple(m) for m in model["merges"]], unk_token=unk, fuse_unk=True, byte_fallback=True))
    if gemma:
        t.normalizer = normalizers.Replace(" ", "▁")
        t.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
        t.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    else:
        if metaspace:
            t.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme=metaspace, split=False)
        elif prepend:
            t.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        else:
            t.normalizer = normalizers.Replace(" ", "▁")
        t.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
    return finish(t, specials, template)


def bytes_(specials, pre, template, normalizer=None, pattern=None, ignore_merges=False):
    """Byte-level BPE. `pre`: what stands before ByteLevel."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    t = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    if normalizer:
        t.normalizer = normalizers.NFC()
    before = []
    if pattern:
        before.append(pre_tokenizers.Split(Regex(pattern), "isolated"))
    if pre == "digits":
        before.append(pre_tokenizers.Digits(individual_digits=True))
    if pre == "falcon":
        before.append(pre_tokenizers.Punctuation("contiguous"))
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not pattern)
    t.pre_tokenizer = pre_tokenizers.Sequence([*before, level]) if before else level
    if pre == "falcon":
        three = pre_tokenizers.Split(Regex("[0-9][0-9][0-9]"), "isolated")
        t.pre_tokenizer = pre_tokenizers.Sequence([*before, level, pre_tokenizers.Digits(individual_digits=False), three])
    t.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    t.train_from_iterator(LINES, trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet, show_progress=False))
    return finish(t, specials, template)


def finish(t, specials, template):
    from tokenizers import AddedToken, processors

    for token, flags in specials.items():
        t.add_special_tokens([AddedToken(token, normalized=False, special=True, **flags)])
    id_of = lambda token: (token, t.token_to_id(token))
    if template == "bytes":
        t.post_processor = processors.ByteLevel(trim_offsets=False)
    elif template == "bytes+bos":
        bos = next(iter(specials))
        both = processors.TemplateProcessing(f"{bos} $A", f"{bos} $A {bos}:1 $B:1", [id_of(bos)])
        t.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), both])
    elif template is not None:
        tokens = [id_of(part) for part in template.split() if part != "$A"]
        t.post_processor = processors.TemplateProcessing(template, None, tokens)
    return json.loads(t.to_str())


PLAIN = {}
RIGHT = {"rstrip": True}
S = {"<unk>": PLAIN, "<s>": PLAIN, "</s>": PLAIN}
GEMMA = {"<pad>": PLAIN, "<eos>": PLAIN, "<bos>": PLAIN, "<unk>": PLAIN, "<start_of_turn>": PLAIN, "<end_of_turn>": PLAIN}
DEEPSEEK = {"<｜begin▁of▁sentence｜>": PLAIN, "<｜end▁of▁sentence｜>": PLAIN, "<｜User｜>": PLAIN}
NAMES = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
OF_DEEPSEEK = {"bos_token": "<｜begin▁of▁sentence｜>", "eos_token": "<｜end▁of▁sentence｜>", "legacy": True}
END = "<|endoftext|>"
IM = {END: PLAIN, "<|im_start|>": PLAIN, "<|im_end|>": PLAIN}
LLAMA = {"tokenizer_class": "LlamaTokenizer", **NAMES}

# name: model_type, tokenizer.json, tokenizer_config.json (None: there is none), and files beside it.
MODELS = {
    "llama-2": ("llama", lambda: sentencepiece(S, True, "<s> $A"),
                LLAMA | {"add_bos_token": True, "add_eos_token": False, "legacy": False}),
    "tinyllama": ("llama", lambda: sentencepiece(S, True, "<s> $A"), LLAMA | {"legacy": False}),
    "mistral-0.3": ("mistral", lambda: sentencepiece(S | {"[INST]": PLAIN, "[/INST]": PLAIN}, False, "<s> $A", "first"),
                    LLAMA | {"add_bos_token": True, "add_eos_token": False, "legacy": False}),
    "phi-3": ("phi3", lambda: sentencepiece(S | {"<|user|>": RIGHT, "<|end|>": RIGHT}, True, "$A"),
              LLAMA | {"add_bos_token": False, "add_eos_token": False, "legacy": False}),
    "yi": ("llama", lambda: sentencepiece(S, False, "$A"), LLAMA | {"add_bos_token": False, "add_eos_token": False}),
    "llama-3": ("llama", lambda: bytes_({"<|begin_of_text|>": PLAIN, "<|eot_id|>": PLAIN}, None, "bytes+bos", None, LLAMA3, True),
                {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>",
                 "clean_up_tokenization_spaces": True}),
    "gemma": ("gemma", lambda: sentencepiece(GEMMA, False, "<bos> $A", gemma=True),
              {"tokenizer_class": "GemmaTokenizer", "add_bos_token": True, "add_eos_token": False, "bos_token": "<bos>",
               "eos_token": "<eos>", "unk_token": "<unk>", "pad_token": "<pad>"}),
    "qwen-2": ("qwen2", lambda: bytes_(IM, None, "bytes", "nfc", QWEN2),
               {"tokenizer_class": "Qwen2Tokenizer", "add_prefix_space": False, "bos_token": None, "eos_token": "<|im_end|>",
                "pad_token": END, "unk_token": None, "split_special_tokens": False}),
    "gpt-2": ("gpt2", lambda: bytes_({END: PLAIN}, None, "bytes"), {"model_max_length": 1024}),
    "opt": ("opt", lambda: bytes_({"</s>": PLAIN, "<pad>": PLAIN}, None, "</s> $A"),
            {"tokenizer_class": "GPT2Tokenizer", "add_bos_token": True, "bos_token": "</s>", "eos_token": "</s>",
             "unk_token": "</s>", "pad_token": "<pad>"}),
    "smollm-2": ("llama", lambda: bytes_(IM, "digits", None),
                 {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": False, "bos_token": "<|im_start|>",
                  "eos_token": "<|im_end|>", "unk_token": END, "pad_token": "<|im_end|>"}),
    "olmo": ("olmo", lambda: bytes_({END: PLAIN, "<|padding|>": PLAIN}, None, "$A", "nfc"),
             {"tokenizer_class": "GPTNeoXTokenizer", "add_bos_token": False, "add_eos_token": False, "bos_token": None,
              "eos_token": END, "pad_token": "<|padding|>", "unk_token": None}),
    "pythia": ("gpt_neox", lambda: bytes_({END: PLAIN, "<|padding|>": PLAIN}, None, "$A", "nfc"),
               {"tokenizer_class": "GPTNeoXTokenizer", "bos_token": END, "eos_token": END, "unk_token": END}),
    "falcon": ("falcon", lambda: bytes_({END: PLAIN}, "falcon", None),
               {"tokenizer_class": "PreTrainedTokenizerFast", "add_prefix_space": False, "eos_token": END}),
    "phi-2": ("phi", lambda: bytes_({END: PLAIN}, None, "bytes"),
              {"tokenizer_class": "CodeGenTokenizer", "add_prefix_space": False, "bos_token": END, "eos_token": END, "unk_token": END}),
    # As the file says of itself, and again with the flags turned round, as people do who render chat templates.
    "deepseek-3": ("deepseek_v3", lambda: bytes_(DEEPSEEK, None, "bytes", None, LLAMA3),
                   OF_DEEPSEEK | {"tokenizer_class": "LlamaTokenizerFast", "add_bos_token": True, "add_eos_token": False}),
    "deepseek-r1-no-bos": ("qwen2", lambda: bytes_(DEEPSEEK, None, "bytes+bos", None, QWEN2),
                           OF_DEEPSEEK | {"tokenizer_class": "LlamaTokenizerFast", "add_bos_token": False, "add_eos_token": False}),
    # A token that closes the prompt, as the flags ask.
    "llama-2-eos": ("llama", lambda: sentencepiece(S, True, "<s> $A"), LLAMA | {"add_bos_token": True, "add_eos_token": True}),
    # No post-processor and no flags.
    "bare": ("llama", lambda: bytes_(S, None, None), {"tokenizer_class": "PreTrainedTokenizerFast", **NAMES}),
    # Special tokens that tokenizer_config.json alone names as such, by their text or with flags of its own.
    "named": ("llama", lambda: only(sentencepiece(S | {"<mid>": PLAIN}, True, "<s> $A"), "<unk>"),
              LLAMA | {"tokenizer_class": "PreTrainedTokenizerFast", "additional_special_tokens": ["<mid>"]}),
    "flagged": ("llama", lambda: only(sentencepiece(S | {"<mid>": PLAIN}, True, "<s> $A"), "<unk>", "<s>", "</s>"),
                LLAMA | {"tokenizer_class": "PreTrainedTokenizerFast", "added_tokens_decoder": {
                    str(i): {"content": c, "lstrip": False, "normalized": False, "rstrip": c == "</s>", "single_word": False,
                             "special": c != "<mid>"} for i, c in enumerate([*S, "<mid>"])}}),
    "prefix-space": ("gpt2", lambda: bytes_({END: PLAIN}, None, "bytes"),
                     {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": True, "bos_token": END, "eos_token": END}),
    # Truncation and padding that were on when the file was saved.
    "padded": ("llama", lambda: bytes_(S, None, "<s> $A") | {
        "truncation": {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0},
        "padding": {"strategy": {"Fixed": 64}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0,
                    "pad_type_id": 0, "pad_token": "<unk>"}},
        {"tokenizer_class": "PreTrainedTokenizerFast", **NAMES}),
}


def only(file, *kept):
    """Without the other added tokens, which stay in the vocabulary."""
    return file | {"added_tokens": [token for token in file["added_tokens"] if token["content"] in kept]}


def texts(specials):
    first, last = specials[0], specials[-1]
    return [
        "The quick brown fox jumps over 1314 lazy dogs.",
        "<s> and </s> of <mid>, split or not </s>  on",
        "  two spaces\n\nlines\tand a tab ",
        "naïve café — 日本語 🙂, don't!",
        f"{first}Hello {last} there{last}friend{first} {last}\n end",
        f"x {last}  y",
    ]


def build():
    for name, (kind, make, config) in MODELS.items():
        folder = HERE / name
        folder.mkdir(exist_ok=True)
        dump = lambda file, value: (folder / file).write_text(
            json.dumps(value, ensure_ascii=False, separators=(",", ":")) + "\n", encoding="utf-8"
        )
        dump("tokenizer.json", make())
        dump("config.json", {"model_type": kind, "bos_token_id": 1})
        if config is not None:
            dump("tokenizer_config.json", config)


def expect():
    import transformers

    transformers.logging.set_verbosity_error()
    lines = []
    for name in MODELS:
        own = json.loads((HERE / name / "tokenizer.json").read_text(encoding="utf-8"))
        tokenizer = transformers.AutoTokenizer.from_pretrained(HERE / name)
        cases = []
        for text in texts([token["content"] for token in own["added_tokens"]]):
            ids = tokenizer(text)["input_ids"]
            cases.append({"text": text, "ids": ids, "back": tokenizer.decode(ids, skip_special_tokens=True)})
        model = json.dumps({"class": type(tokenizer).__name__, "cases": cases}, ensure_ascii=False)
        lines.append(f"{json.dumps(name)}: {model}")
    print(f'{{"transformers": "{transformers.__version__}", "models": {{\n' + ",\n".join(lines) + "\n}}")


build() if sys.argv[1:] == ["build"] else expect()
