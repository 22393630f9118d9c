"""`retro-export triton`: a repository whose configuration fits Triton's own schema and ONNX Runtime's view of the model. Triton
itself is not run: there is none in the Python package index."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest

tritonclient = pytest.importorskip("tritonclient", reason="Triton's schema has an environment of its own: `make test-engines`")

import zoo  # noqa: E402
from paths import DATA, exporter, models, plugin  # noqa: E402

# The messages alone: the client around them wants more packages.
sys.path.insert(0, str(Path(tritonclient.__path__[0]) / "grpc"))
import model_config_pb2  # noqa: E402
from google.protobuf import text_format  # noqa: E402

TYPES = {"TYPE_FP32": np.float32, "TYPE_FP16": np.float16, "TYPE_INT64": np.int64, "TYPE_INT32": np.int32, "TYPE_UINT8": np.uint8}
NAMES = {"tensor(float)": "TYPE_FP32", "tensor(float16)": "TYPE_FP16", "tensor(int64)": "TYPE_INT64", "tensor(int32)": "TYPE_INT32"}
NAMES |= {"tensor(uint8)": "TYPE_UINT8"}


def run(*arguments, succeeds=True):
    done = subprocess.run([str(a) for a in arguments], capture_output=True, text=True)
    assert (done.returncode == 0) == succeeds, f"{arguments}: {done.stdout}{done.stderr}"
    return done


WINDOW = 3
# So little is read that the window shows.
SPARSE = ["--page-size", "4", "--budget", "16", "--selector", "signed_moments", "--sink-pages", "1"]
FORMS = {"plain": [], "in-graph": ["--window-in-graph"], "genai": ["--host", "genai", "--context", "96"]}


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("triton")
    run(models(), "build", "--weights", DATA / "golden" / "model", "-o", folder / "tiny")
    for form, options in FORMS.items():
        options = ["--no-verify", "--window", WINDOW, *options]
        run(exporter(), folder / "tiny", "-o", folder / form, "--budget", "4096", *options)
        run(exporter(), folder / "tiny", "-o", folder / f"{form}-sparse", *SPARSE, *options)
    return folder


def configuration(folder):
    """Fields and values that Triton does not know are errors."""
    return text_format.Parse((folder / "config.pbtxt").read_text(), model_config_pb2.ModelConfig())


def kind(field):
    return model_config_pb2.DataType.Name(field.data_type)


def check(config, session):
    """What Triton checks when it loads a model: the session's inputs are those of requests and of the state, no more but for
    optional ones, which have defaults; their types; sizes that fit the declared ones; one number where there is no dimension."""
    state = {state.input_name: state for state in config.sequence_batching.state}
    inputs = {value.name: value for value in config.input}
    optional = {name for name, value in inputs.items() if value.optional}
    assert not set(state) & set(inputs)
    assert {value.name for value in session.get_inputs()} == (set(state) | set(inputs)) - optional
    defaults = {value.name: value for value in session.get_overridable_initializers()}
    assert optional == set(defaults) and "retro_page_budget" in optional
    outputs = {value.name for value in config.output} | {state.output_name for state in state.values()}
    assert {value.name for value in session.get_outputs()} == outputs
    for value in [*session.get_inputs(), *defaults.values()]:
        field = state.get(value.name) or inputs[value.name]
        assert kind(field) == NAMES[value.type], value.name
        declared = value.shape or [1]
        assert len(field.dims) == len(declared)
        for ours, size in zip(field.dims, declared):
            assert ours == size or not isinstance(size, int), (value.name, field.dims, value.shape)
    for value in config.input:
        assert not value.HasField("reshape"), "refused where max_batch_size is 0 and it has no dimensions"
    for one in state.values():
        assert min(one.dims) > 0 and one.use_same_buffer_for_input_output
        [start] = one.initial_state
        assert start.zero_data and list(start.dims) == list(one.dims) and start.data_type == one.data_type


def open_session(folder):
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.register_custom_ops_library(plugin())
    return ort.InferenceSession(str(folder / "1" / "model.onnx"), options, providers=["CPUExecutionProvider"])


class Sequence:
    """State of the configured sizes, zeros at first, and from then on what came out; a client that sends tokens. `feeds_window`:
    it feeds those of the window again."""

    def __init__(self, folder, feeds_window):
        self.config, self.session = configuration(folder), open_session(folder)
        self.names = [value.name for value in self.session.get_outputs()]
        self.state = {one.input_name: np.zeros(list(one.dims), TYPES[kind(one)]) for one in self.config.sequence_batching.state}
        self.feeds_window, self.ids, self.logits = feeds_window, [], []

    def request(self, tokens, retro):
        feeds = {"input_ids": np.array([tokens]), "attention_mask": np.ones((1, len(self.ids)), np.int64)}
        if self.feeds_window:
            feeds["retro_length"] = np.array([retro], np.int32)
        results = dict(zip(self.names, self.session.run(None, feeds | self.state)))
        for one in self.config.sequence_batching.state:
            self.state[one.input_name] = results[one.output_name]
        self.logits.append(results["logits"][0, -1])
        return int(self.logits[-1].argmax())

    def generate(self, prompt, count):
        self.ids, retro = list(prompt), 0
        token = self.request(self.ids, -1)
        for _ in range(count):
            self.ids.append(token)
            token = self.request(self.ids[-1 - retro :], retro)
            retro = min(retro + 1, WINDOW - 1) if self.feeds_window else 0
        return self.ids


@pytest.mark.parametrize("form", FORMS)
def test_a_sequence_as_triton_keeps_it(converted, tmp_path, form):
    """Where all is read, the tokens of the original; where little is, those of the form whose client feeds the window."""

    def generate(form, feeds_window):
        target = tmp_path / f"{form}-{feeds_window}"
        said = run(exporter(), "triton", converted / form, target, "--capacity", "96", "--name", "tiny").stdout
        assert said == f"wrote    {target / 'tiny'}\n"
        config = configuration(target / "tiny")
        assert (config.name, config.backend, config.max_batch_size) == ("tiny", "onnxruntime", 0)
        [library] = config.model_operations.op_library_filename
        assert library == str(target / "tiny" / "libretro_attention.so") and Path(library).is_file()
        sequence = Sequence(target / "tiny", feeds_window)
        check(config, sequence.session)
        return sequence.generate(prompt, 40), np.array(sequence.logits)

    prompt = [int(token) for token in np.random.default_rng(2).integers(1, 60, 50)]
    ids, _ = generate(form, form == "plain")
    original = ort.InferenceSession(str(converted / "tiny" / "model.onnx"), providers=["CPUExecutionProvider"])
    feeds = {"input_ids": np.array([ids]), "attention_mask": np.ones((1, len(ids)), np.int64)}
    for value in original.get_inputs():
        if value.name.startswith("past_"):
            feeds[value.name] = np.zeros([1, value.shape[1], len(ids), value.shape[3]], np.float32)
    scores = original.run(["logits"], feeds)[0][0]
    assert scores[49:-1].argmax(-1).tolist() == ids[50:]

    ids, logits = generate("plain-sparse", True)
    same, given = generate(f"{form}-sparse", False)
    if form == "plain":
        # A client that knows nothing of the window gets w = 1.
        assert np.abs(given - logits).max() > 1e-3
    else:
        assert same == ids
        np.testing.assert_allclose(given, logits, rtol=0, atol=1e-4)


EXPORTS = ["genai-qwen3-fp32-cpu", "optimum-llama-fp32", "genai-llama-fp16-dml", "optimum-llama-num_logits_to_keep"]


@pytest.mark.parametrize("form", ["plain", "in-graph"])
@pytest.mark.parametrize("name", EXPORTS)
def test_exports(name, form, tmp_path):
    source = zoo.graph({path.name.removesuffix(".onnx.xz"): path for path in zoo.FOLDERS + zoo.GRAPHS}[name], tmp_path)
    run(exporter(), source, "-o", tmp_path / "retro.onnx", "--no-verify", *FORMS[form])
    run(exporter(), "triton", tmp_path / "retro.onnx", tmp_path / "models", "-c", "200", "--mount", "/mnt/models")
    folder = tmp_path / "models" / "retro"
    config = configuration(folder)
    assert config.model_operations.op_library_filename == ["/mnt/models/retro/libretro_attention.so"]
    check(config, open_session(folder))


def test_state_without_dimensions(tmp_path):
    """Triton keeps none."""
    source = zoo.graph(next(path for path in zoo.GRAPHS if path.name.startswith("tfexp-mistral-fp32")), tmp_path)
    run(exporter(), source, "-o", tmp_path / "retro.onnx", "--no-verify")
    failed = run(exporter(), "triton", tmp_path / "retro.onnx", tmp_path / "models", "-c", "200", succeeds=False)
    assert "is kept between calls and has no dimensions" in failed.stderr and not (tmp_path / "models").exists()


def test_errors_are_one_line_and_leave_nothing(converted, tmp_path):
    for arguments, says in [
        ([converted / "tiny", tmp_path / "models"], "was not converted"),
        ([converted / "plain", tmp_path / "models", "--name", "a/b"], "is no name for a model"),
        ([converted / "plain", tmp_path / "models", "--mount", "models"], "give a path from the root"),
        ([converted / "genai", tmp_path / "models", "-c", "97"], "has state for 96 tokens, and --capacity asks for 97"),
        ([converted / "plain", tmp_path / "models", "-c", "513"], "--capacity 513 exceeds the model's context of 512 tokens"),
        ([converted / "none", tmp_path / "models"], "none"),
    ]:
        capacity = [] if "-c" in arguments else ["-c", "64"]
        failed = run(exporter(), "triton", *arguments, *capacity, succeeds=False)
        assert says in failed.stderr and failed.stderr.count("\n") == 1, failed.stderr
        assert not (tmp_path / "models").exists()
    run(exporter(), "triton", converted / "plain", tmp_path / "models", "-c", "64")
    again = run(exporter(), "triton", converted / "plain", tmp_path / "models", "-c", "64", succeeds=False)
    assert "is there already" in again.stderr
    assert sorted(path.name for path in (tmp_path / "models").iterdir()) == ["plain"]
