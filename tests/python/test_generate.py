"""examples/generate.py, on the CPU and, where there is one, on a GPU: the same tokens, by the same steps."""

import ctypes
import importlib.util
import subprocess
import sys

import numpy as np
import onnx
import onnxruntime as ort
import pytest

import zoo
from paths import DATA, ROOT, build_server_variables, exporter, models, plugin

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
    """The steps of the host in docs/hosts.md, which hands every array in and out."""
    made, count = generate(converted["f32"], "cpu"), 40
    generator = example.Generator(converted["f32"], plugin(), len(PROMPT) + count)
    session, past = generator.session, {}
    for value in session.get_inputs():
        if value.name.startswith("past_"):
            rows = 128 if value.type == "tensor(uint8)" else generator.page_size if ".page_" in value.name else 1
            free = {0: 1, 2: -(-generator.capacity // rows)}
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


# Every budget reads everything, so that the original decides what is right.
EXACT = ["--window", "4", "--budget", "4096", "--no-verify"]
# Refused at such a window, or without --partial, with the reason: tests/tests/converted.
REFUSED = {
    "genai-llama-fp32-cuda",
    "genai-llama-paged-fp16-cuda",
    "genai-lfm2",
    "mobius-qwen35",
    "optimum-whisper-merged",
    "optimum-whisper-with_past",
    "plain-sink_window",
    "optimum-bloom",
    "optimum-mpt",
    "plain-one_layer_is_other",
}
# Scores in 16 bits, or from quantised activations, are rounded by as much, of the largest.
ROUNDED = {"fp16": 0.02, "fp32io": 0.02, "int4": 0.04, "q4": 0.04}
EXPORTS = {path.name.removesuffix(".onnx.xz"): path for path in zoo.FOLDERS + zoo.GRAPHS}
# Its scores depend on how many tokens are fed at once, the original's too.
del EXPORTS["quant-llama-dynint8"]
NEWEST = tuple(map(int, ort.__version__.split(".")[:2])) >= (1, 31)


def original(path, generator, ids):
    """The original's scores after each of the tokens, from one call with empty caches."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    feeds = {}
    # onnxruntime-genai's caches may have room; where a layer's is as long as its window, they must.
    room = any("past_sliding_length" in value.shape for value in session.get_inputs())
    for value in session.get_inputs():
        dtype = example.TYPES[value.type]
        if value.name in ("input_ids", "attention_mask", "position_ids"):
            numbers = {"input_ids": ids, "attention_mask": [1] * len(ids), "position_ids": range(len(ids))}[value.name]
            feeds[value.name] = np.array([numbers], dtype)
        elif value.name in example.LOGITS_TO_KEEP:
            feeds[value.name] = np.full([1] * len(value.shape), len(ids), dtype)
        elif value.name == "use_cache_branch":
            feeds[value.name] = np.array([False])
        else:
            shape = generator.shape(value.name)
            feeds[value.name] = np.zeros(shape if room else shape[:2] + [0] + shape[3:], dtype)
    return session.run(["logits"], feeds)[0][0].astype(np.float32)


@pytest.mark.skipif(not NEWEST, reason="older ones load only some of these exports, the originals too")
@pytest.mark.parametrize("name", EXPORTS)
def test_every_export_runs(name, tmp_path):
    """Head sizes that are named instead of declared, positions, int32, float16, other names: whatever exporters write."""
    path = zoo.graph(EXPORTS[name], tmp_path)
    command = [exporter(), path, "-o", tmp_path / "retro.onnx", *EXACT]
    converted = subprocess.run(command, capture_output=True, text=True)
    if converted.returncode and (name in REFUSED or name.startswith("refused-")):
        pytest.skip(converted.stderr.strip())
    assert converted.returncode == 0, converted.stderr
    ids = [int(token) for token in np.random.default_rng(7).integers(1, 60, 80)]
    generator = example.Generator(tmp_path / "retro.onnx", plugin(), len(ids))
    expected = original(path, generator, ids)
    scores = [generator.read(ids[:50], 32)] + [generator.step(token) for token in ids[50:]]
    allowed = np.abs(expected).max() * max([1e-3] + [share for kind, share in ROUNDED.items() if kind in name])
    np.testing.assert_allclose(np.array(scores), expected[49:], rtol=0, atol=allowed)


def with_types(source, target, types):
    """A copy of a model whose inputs have other types."""
    model = onnx.load(str(source))
    for value in model.graph.input:
        if value.name not in types:
            continue
        for node in model.graph.node:
            node.input[:] = [f"{value.name}/cast" if name == value.name else name for name in node.input]
        declared = value.type.tensor_type.elem_type
        model.graph.node.insert(0, onnx.helper.make_node("Cast", [value.name], [f"{value.name}/cast"], to=declared))
        value.type.tensor_type.elem_type = types[value.name]
    onnx.save(model, str(target))
    return target


@pytest.mark.parametrize("mask", ["INT32", "BOOL", "FLOAT", "FLOAT16"])
def test_inputs_have_the_types_that_the_model_declares(converted, tmp_path, mask):
    types = {"input_ids": onnx.TensorProto.INT32, "attention_mask": onnx.TensorProto.DataType.Value(mask)}
    other = with_types(converted["f32"], tmp_path / "typed.onnx", types)
    assert generate(other, "cpu", 20) == generate(converted["f32"], "cpu", 20)


def test_a_model_that_gives_all_logits(converted, tmp_path):
    source = converted["f32"].parent.parent / "f32"
    command = [exporter(), source, "-o", tmp_path / "all", "--window", "4", "--budget", "0.3", "--all-logits", "--no-verify"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    assert generate(tmp_path / "all" / "model.onnx", "cpu", 20) == generate(converted["f32"], "cpu", 20)


def command_line(*arguments):
    command = [sys.executable, ROOT / "examples" / "generate.py", "--plugin", plugin(), "-n", "8", "--ids", "3,4,5", *arguments]
    return subprocess.run(command, capture_output=True, text=True)


def test_the_command_finds_the_graph(converted, tmp_path):
    """In a folder, where its configuration says, and by its own name."""
    folder = converted["f32"].parent
    expected = command_line(folder)
    assert expected.returncode == 0 and expected.stdout.count(",") == 7, expected.stderr
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "decoder").symlink_to(folder)
    (tmp_path / "config" / "genai_config.json").write_text('{"model": {"decoder": {"filename": "decoder/model.onnx"}}}')
    (tmp_path / "subfolder").mkdir()
    (tmp_path / "subfolder" / "onnx").symlink_to(folder)
    # The only graph, as retro-export leaves it where a variant was chosen.
    (tmp_path / "variant" / "onnx").mkdir(parents=True)
    for source in folder.iterdir():
        name = "model_q4f16.onnx" if source.name == "model.onnx" else source.name
        (tmp_path / "variant" / "onnx" / name).write_bytes(source.read_bytes())
    for place in [folder / "model.onnx", tmp_path / "config", tmp_path / "subfolder", tmp_path / "variant"]:
        found = command_line(place)
        assert (found.returncode, found.stdout) == (0, expected.stdout), found.stderr


def test_the_tokenizer_may_lie_above_the_graph(tmp_path):
    graph = tmp_path / "model" / "onnx" / "model.onnx"
    graph.parent.mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match="has no tokenizer.json"):
        example.tokenizer_of(graph)
    for folder in [graph.parent.parent, graph.parent]:
        (folder / "tokenizer.json").touch()
        assert example.tokenizer_of(graph) == folder / "tokenizer.json"


def test_errors_are_one_line(converted, tmp_path):
    (tmp_path / "broken.onnx").write_bytes(b"no model")
    foreign = onnx.load(str(converted["f32"]))
    foreign.graph.input.append(onnx.helper.make_tensor_value_info("beam", onnx.TensorProto.INT64, [1]))
    foreign.graph.output.append(onnx.helper.make_tensor_value_info("beam_out", onnx.TensorProto.INT64, [1]))
    foreign.graph.node.append(onnx.helper.make_node("Identity", ["beam"], ["beam_out"]))
    onnx.save(foreign, str(tmp_path / "foreign.onnx"))
    for place, said in [
        (zoo.FOLDER / "genai040-old_llama-fp32-cpu", "was not converted by retro-export"),
        (tmp_path / "broken.onnx", "broken.onnx"),
        (tmp_path, "name the ONNX file"),
        (tmp_path / "foreign.onnx", "wants the input beam, which"),
    ]:
        failed = command_line(place)
        assert failed.returncode == 1 and failed.stderr.count("\n") == 1 and said in failed.stderr, failed.stderr


def test_nothing_is_recorded_about_the_user(converted, tmp_path, monkeypatch):
    """onnxruntime's wheels record telemetry in the user's cache folder."""
    monkeypatch.setenv("HOME", str(tmp_path))
    # On a build server it records nothing of itself.
    for variable in ["ORT_DISABLE_TELEMETRY", "XDG_CACHE_HOME", *build_server_variables()]:
        monkeypatch.delenv(variable, raising=False)
    assert command_line(converted["f32"]).returncode == 0
    assert list(tmp_path.iterdir()) == []


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
