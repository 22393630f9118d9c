"""examples/generate.py, on the CPU and, where there is one, on a GPU: the same tokens, by the same steps."""

import ctypes
import importlib.util
import subprocess

import numpy as np
import onnxruntime as ort
import pytest

from paths import DATA, ROOT, exporter, models, plugin

spec = importlib.util.spec_from_file_location("generate", ROOT / "examples" / "generate.py")
example = importlib.util.module_from_spec(spec)
spec.loader.exec_module(example)

PROMPT = [int(token) for token in np.random.default_rng(5).integers(1, 60, 150)]


def no_cuda() -> str | None:
    """Why nothing can be tested on a GPU."""
    if "CUDAExecutionProvider" not in ort.get_available_providers():
        return "this onnxruntime has no CUDAExecutionProvider"
    try:
        driver, count = ctypes.CDLL("libcuda.so.1"), ctypes.c_int(0)
    except OSError:
        return "there is no NVIDIA driver (libcuda.so.1)"
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)) or not count.value:
        return "there is no GPU"
    return None


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """The tiny Llama of the golden set `model`, converted for a window of 4."""
    folder = tmp_path_factory.mktemp("models")

    def make(dtype):
        source, target = folder / dtype, folder / f"{dtype}-retro"
        subprocess.run([models(), "build", "--weights", DATA / "golden" / "model", "--dtype", dtype, "-o", source], check=True)
        subprocess.run(
            [exporter(), source, "-o", target, "--window", "4", "--budget", "0.3"], check=True, stdout=subprocess.DEVNULL
        )
        return target / "model.onnx"

    return {dtype: make(dtype) for dtype in ["f32", "f16"]}


def generate(model, device, count=40):
    generator = example.Generator(model, plugin(), len(PROMPT) + count, device)
    return generator.generate(PROMPT, count)


def test_in_place_gives_what_copying_gives(converted):
    """The steps of the README's host, which hands every array in and out."""
    made, count = generate(converted["f32"], "cpu"), 40
    generator = example.Generator(converted["f32"], plugin(), len(PROMPT) + count)
    session, past = generator.session, {}
    for value in session.get_inputs():
        if value.name.startswith("past_"):
            free = {0: 1, 2: -(-generator.capacity // 16) if ".page_" in value.name else generator.capacity}
            shape = [size if isinstance(size, int) else free[axis] for axis, size in enumerate(value.shape)]
            past[value.name] = np.zeros(shape, example.TYPES[value.type])
    names = [output.name for output in session.get_outputs()]

    def call(tokens, length, retro):
        feeds = {
            "input_ids": np.array([tokens], np.int64),
            "attention_mask": np.ones((1, length), np.int64),
            "retro_length": np.array([retro], np.int32),
        }
        results = dict(zip(names, session.run(None, feeds | past)))
        for name in past:
            past[name] = results[name.replace("past_key_values.", "present.").replace("past_retro.", "present_retro.")]
        return int(results["logits"][0, -1].argmax())

    ids, retro = list(PROMPT), 0
    token = call(ids, len(ids), -1)
    for expected in made:
        assert token == expected, f"token {len(ids)}"
        ids.append(token)
        if len(ids) == generator.capacity:
            break
        token = call(ids[len(ids) - 1 - retro :], len(ids), retro)
        retro = min(retro + 1, 3)


@pytest.mark.skipif(no_cuda() is None, reason="there is a GPU")
def test_cuda_is_not_replaced_by_the_cpu(converted):
    with pytest.raises((RuntimeError, ValueError)):
        generate(converted["f32"], "cuda", 1)


@pytest.mark.skipif(no_cuda() is not None, reason=str(no_cuda()))
@pytest.mark.parametrize("dtype", ["f32", "f16"])
def test_cuda_gives_what_the_cpu_gives(converted, dtype):
    on_cpu, on_gpu = (generate(converted[dtype], device) for device in ["cpu", "cuda"])
    if dtype == "f32":
        assert on_gpu == on_cpu
    else:
        # 16 bits round differently; the first tokens agree unless scores nearly tie.
        assert on_gpu[:5] == on_cpu[:5]
