"""Converted models are valid ONNX and run in a Python host that knows nothing of the method but its inputs."""

import subprocess

import numpy as np
import onnx
import onnxruntime as ort
import pytest

import node
import zoo
from paths import DATA, exporter, models

# Refused, with the reason: tests/tests/converted/zoo.rs.
REFUSED = {"genai-llama-fp32-cuda", "genai-llama-paged-fp16-cuda", "genai040-old_llama-fp32-cuda"}


def convert(source, target, *options):
    command = [exporter(), str(source), "-o", str(target), *options]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def check(folder) -> onnx.ModelProto:
    """onnx.checker on what a conversion answers for. genai writes operators into ONNX's own domain that its opset does not
    have (ORT knows them): the checker refuses the original already. For the check they move to ORT's domain."""
    model = onnx.load(str(folder / "model.onnx"), load_external_data=False)
    opset = next(entry.version for entry in model.opset_import if not entry.domain)
    foreign = [n for n in model.graph.node if not n.domain and not onnx.defs.has(n.op_type, opset)]
    assert {n.op_type for n in foreign} <= {"SimplifiedLayerNormalization", "LayerNormalization"}
    for n in foreign:
        n.domain = "com.microsoft"
    checked = folder / "checked.onnx"  # a file, so that external data is looked at too
    checked.write_bytes(model.SerializeToString())
    onnx.checker.check_model(str(checked))
    onnx.shape_inference.infer_shapes_path(str(checked), str(folder / "inferred.onnx"))
    return model


@pytest.mark.parametrize("source", [path for path in zoo.FOLDERS if path.name not in REFUSED], ids=lambda path: path.name)
def test_converted_models_pass_the_checker(source, tmp_path):
    target = tmp_path / "out"
    convert(source, target, "--window", "4")
    model = check(target)
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    assert metadata["retro.version"] == "1"
    assert metadata["retro.window"] == "4"
    assert metadata["retro.page_size"] == "8"
    nodes = [n for n in model.graph.node if n.domain == "ai.retro"]
    assert len(nodes) == len(metadata["retro.layers"].split(","))
    assert {"ai.retro": 1}.items() <= {entry.domain: entry.version for entry in model.opset_import}.items()


def test_a_converted_model_decodes(tmp_path):
    """With w = 1 nothing but the state is new to a caller: retro_length has a default."""
    convert(zoo.FOLDER / "genai-llama-fp32-cpu", tmp_path / "out", "--window", "1", "--budget", "1.0")
    session = ort.InferenceSession(str(tmp_path / "out" / "model.onnx"), node.options(), providers=["CPUExecutionProvider"])
    assert "retro_length" not in {i.name for i in session.get_inputs()}
    recorded = np.load(zoo.FOLDER / "genai-llama-fp32-cpu" / "io.npz")
    ids, prompt = recorded["full_ids"], recorded["prompt_ids"].shape[1]
    capacity, kinds = 24, {"tensor(float)": np.float32, "tensor(int32)": np.int32, "tensor(uint8)": np.uint8}
    state, page_size = {}, int(session.get_modelmeta().custom_metadata_map["retro.page_size"])
    for value in session.get_inputs():
        if value.name.startswith("past_"):
            rows = 128 if value.type == "tensor(uint8)" else page_size if "page" in value.name else 1
            free = {0: 1, 2: -(-capacity // rows)}
            # genai names the head size instead of writing it.
            shape = [d if isinstance(d, int) else free.get(axis, 32) for axis, d in enumerate(value.shape)]
            state[value.name] = np.zeros(shape, kinds[value.type])
    outputs = [output.name for output in session.get_outputs()]
    for first, last in [(0, prompt)] + [(t, t + 1) for t in range(prompt, ids.shape[1])]:
        feed = {"input_ids": ids[:, first:last], "attention_mask": np.ones((1, last), np.int64)}
        results = dict(zip(outputs, session.run(None, feed | state)))
        state = {
            name: results[name.replace("past_key_values", "present").replace("past_retro", "present_retro")] for name in state
        }
        expected = recorded["logits_full"][:, last - 1]
        np.testing.assert_allclose(results["logits"][:, -1], expected, atol=1e-4)


def test_a_built_model_converts(tmp_path):
    subprocess.run([models(), "build", "--weights", DATA / "golden" / "model", "-o", tmp_path / "built"], check=True)
    check(tmp_path / "built")
    convert(tmp_path / "built", tmp_path / "out", "--window", "2")
    check(tmp_path / "out")
