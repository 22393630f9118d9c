"""Golden cases end to end: plain `run` (the state goes round through outputs) and IO binding in place."""

import numpy as np
import onnxruntime as ort
import pytest

import golden
import node

CASES = ["a_w4_p16", "prompt3_w8", "ties_w4", "tiny_chunks_w8", "b_w1"]


class Run:
    """State through the outputs: the operator copies."""

    def __init__(self, session, state):
        self.session, self.state = session, state

    def __call__(self, feed):
        before = {name: array.copy() for name, array in self.state.items()}
        outputs = dict(zip(node.OUTPUTS, self.session.run(None, feed | self.state)))
        for name, array in before.items():
            assert array.tobytes() == self.state[name].tobytes(), f"{name} was written"
        self.state = {f"past_{name}": outputs[f"present_{name}"] for name in node.STATE}
        return outputs["output"]

    def page_steps(self):
        return self.state["past_page_steps"]


class InPlace:
    """One OrtValue as past and present."""

    def __init__(self, session, state):
        self.session = session
        self.state = {name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in state.items()}
        self.addresses = {name: value.data_ptr() for name, value in self.state.items()}

    def __call__(self, feed):
        binding = self.session.io_binding()
        for name, array in feed.items():
            binding.bind_cpu_input(name, array)
        for name, value in self.state.items():
            binding.bind_ortvalue_input(name, value)
            binding.bind_ortvalue_output(name.replace("past_", "present_"), value)
        binding.bind_output("output")
        self.session.run_with_iobinding(binding)
        assert self.addresses == {name: value.data_ptr() for name, value in self.state.items()}
        return binding.get_outputs()[-1].numpy()

    def page_steps(self):
        return self.state["past_page_steps"].numpy()


@pytest.mark.parametrize("driver", [Run, InPlace])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("name", CASES)
def test_golden_case(name, dtype, driver):
    case = golden.case(name)
    t = case.tensors
    run = driver(node.session(node.attributes_of(case), dtype), node.poison(case, dtype))
    shape = (-1, case.heads, case.size)

    def close(got, expected, at):
        tolerance = 2e-5 if dtype == np.float32 else 2e-3 * np.abs(expected).max()
        difference = np.abs(got.astype(np.float32).reshape(shape) - expected).max()
        assert difference <= tolerance, f"{at}: off by {difference}"

    length = 0
    outputs = []
    for chunk in case.chunks:
        rows = case.rows("prompt", length, length + chunk, dtype)
        length += chunk
        outputs.append(run(node.feed(rows, length, -1)).reshape(shape))
    tail = t["prompt.out_tail"]
    close(np.concatenate(outputs)[-len(tail) :], tail, "prompt")
    for step in range(case.steps):
        first, last = t["step.offset"][step : step + 2]
        position = case.prompt + step
        pages = position // case.page + 1
        feed = node.feed(case.rows("step", first, last, dtype), position + 1, last - first - 1, t["step.kpages"][step])
        close(run(feed), t["step.out"][first:last], f"t = {position}")
        np.testing.assert_array_equal(run.page_steps()[0, :, :pages], t["step.page_step"][step][:, :pages])
