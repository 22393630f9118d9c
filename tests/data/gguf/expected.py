"""Computes what llama.cpp makes of the tiny GGUF models: expected_logits.npy and expected_tokens.json.

    cargo run --release -p retro-tests --example tiny_gguf FOLDER
    pip install gguf==0.19.0 xllamacpp==2026.10.11549    # gguf dequantises; xllamacpp has llama.cpp's C interface
    python expected.py FOLDER

The weights are widened by the `gguf` package first, because llama.cpp rounds the activations that it multiplies with quantised weights. Its keys and values stay
f16, so that its logits are good to about 1e-3. The array is f32 `[model, position, token]`, models in the order of
MODELS, of the token ids IDS. The tokens are of TEXTS, special tokens added and found.
"""
import ctypes
import glob
import json
import pathlib
import site
import sys

import gguf
import numpy as np

MODELS = ["llama", "llama3", "linear", "qwen2", "qwen3", "phi3"]
IDS = [1, 22, 47, 3, 9, 61, 30, 2, 55, 14, 33, 33, 8, 60, 5, 40]

TEXTS = {
    "llama": ["the thing is in the inn.", "  two  spaces, 2026\n\nthe end!", "<|im_start|>user<|im_end|>\n", "Don't-the"],
    "sentencepiece": [
        "the thing is in the ring", " leading", "two  spaces", "été 😀", "singing<turn>sing<s> the", "a\nb", "", "thin",
        "ringer singer, thither.",
    ],
}

POINTER = ctypes.c_void_p


class Params(ctypes.Structure):
    """Larger than any of llama.cpp's structures of parameters: what is behind them is not looked at."""

    _fields_ = [("bytes", ctypes.c_ubyte * 1024)]


class Batch(ctypes.Structure):
    _fields_ = [("n_tokens", ctypes.c_int32)] + [
        (name, POINTER) for name in ("token", "embd", "pos", "n_seq_id", "seq_id", "logits")
    ]


LIBRARY = ctypes.CDLL(glob.glob(site.getsitepackages()[0] + "/xllamacpp/*.so")[0])


def call(name, result, arguments, *values):
    function = getattr(LIBRARY, name)
    function.restype, function.argtypes = result, arguments
    return function(*values)


def open_model(path):
    """A model and its vocabulary."""
    parameters = call("llama_model_default_params", Params, [])
    model = call("llama_model_load_from_file", POINTER, [ctypes.c_char_p, Params], str(path).encode(), parameters)
    assert model, path
    return model, call("llama_model_get_vocab", POINTER, [POINTER], model)


def tokens_of(path, text):
    _, vocabulary = open_model(path)
    encoded = text.encode()
    ids = (ctypes.c_int32 * (len(encoded) + 8))()
    arguments = [POINTER, ctypes.c_char_p, ctypes.c_int32, POINTER, ctypes.c_int32, ctypes.c_bool, ctypes.c_bool]
    values = vocabulary, encoded, len(encoded), ctypes.addressof(ids), len(ids), True, True
    return ids[: call("llama_tokenize", ctypes.c_int32, arguments, *values)]


def logits_of(path):
    """Logits after each of IDS, one token a call."""
    model, vocabulary = open_model(path)
    parameters = call("llama_context_default_params", Params, [])
    context = call("llama_init_from_model", POINTER, [POINTER, Params], model, parameters)
    size = call("llama_vocab_n_tokens", ctypes.c_int32, [POINTER], vocabulary)
    rows = []
    for token in IDS:
        ids = (ctypes.c_int32 * 1)(token)
        batch = call("llama_batch_get_one", Batch, [POINTER, ctypes.c_int32], ctypes.addressof(ids), 1)
        assert call("llama_decode", ctypes.c_int32, [POINTER, Batch], context, batch) == 0
        logits = call("llama_get_logits", ctypes.POINTER(ctypes.c_float), [POINTER], context)
        rows.append(np.ctypeslib.as_array(logits, (size,)).copy())
    return np.stack(rows)


def widen(source, target):
    """The same model with all weights in f32."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, reader.fields["general.architecture"].contents())
    for key, field in reader.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture":
            kind, element = field.types[0], field.types[-1]
            writer.add_key_value(key, field.contents(), kind, element if kind == gguf.GGUFValueType.ARRAY else None)
    for tensor in reader.tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        writer.add_tensor(tensor.name, values.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main():
    folder = pathlib.Path(sys.argv[1])
    logits = []
    for name in MODELS:
        widen(folder / f"{name}.gguf", folder / f"{name}.f32.gguf")
        logits.append(logits_of(folder / f"{name}.f32.gguf"))
    here = pathlib.Path(__file__)
    np.save(here.with_name("expected_logits.npy"), np.stack(logits).astype(np.float32))
    tokens = {name: [[text, tokens_of(folder / f"{name}.gguf", text)] for text in texts] for name, texts in TEXTS.items()}
    here.with_name("expected_tokens.json").write_text(json.dumps(tokens) + "\n")


if __name__ == "__main__":
    main()
