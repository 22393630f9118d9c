"""onnxruntime-genai as it comes from PyPI drives what `retro-export --host genai` writes, and knows nothing of it."""

import json
import subprocess

import numpy as np
import onnxruntime as ort
import onnxruntime_genai as og
import pytest

import node
import zoo
from paths import ROOT, exporter, models, runner

WINDOWS = [1, 2, 4]
CPU_EXPORTS = [path for path in zoo.FOLDERS if path.name.endswith("-cpu")]
VERSION = tuple(int(part) for part in og.__version__.split(".")[:2])
# So little is read that the window shows in the text.
SPARSE = ["--budget", "64"]
CONTEXT = 700
# Of the model `code`: a prompt, what comes after an answer, and how long that is.
PROMPT = [1] + [3 + (i * 37) % 2000 for i in range(300)]
MORE = [5 + (i * 53) % 2000 for i in range(40)]
ANSWER = 40


def run(*command):
    result = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def convert(source, target, *options):
    run(exporter(), source, "-o", target, "--no-verify", *options)
    return target


class Session:
    """A generator of genai, fed greedily."""

    def __init__(self, folder, batch=1, max_length=CONTEXT):
        self.model = og.Model(str(folder))
        parameters = og.GeneratorParams(self.model)
        parameters.set_search_options(max_length=max_length, do_sample=False, batch_size=batch)
        self.generator = og.Generator(self.model, parameters)

    def feed(self, tokens):
        self.generator.append_tokens(np.array(tokens, np.int32))
        return self

    def answer(self, count):
        tokens = []
        for _ in range(count):
            self.generator.generate_next_token()
            tokens.append([int(token) for token in self.generator.get_next_tokens()])
        rows = np.array(tokens).T.tolist()
        return rows[0] if len(rows) == 1 else rows


class Loop:
    """The decoding loop of docs/hosts.md on a model whose host feeds the window: what genai must give."""

    def __init__(self, folder):
        self.session = ort.InferenceSession(str(folder / "model.onnx"), node.options(), providers=["CPUExecutionProvider"])
        metadata = self.session.get_modelmeta().custom_metadata_map
        self.window, page_size = int(metadata["retro.window"]), int(metadata["retro.page_size"])
        kinds = {"tensor(float)": np.float32, "tensor(int32)": np.int32, "tensor(uint8)": np.uint8}
        self.state, self.tokens, self.retro = {}, [], 0
        for value in self.session.get_inputs():
            if value.name.startswith("past_"):
                rows = 128 if value.type == "tensor(uint8)" else page_size if ".page_" in value.name else 1
                free = {0: 1, 2: -(-CONTEXT // rows)}
                shape = [d if isinstance(d, int) else free[axis] for axis, d in enumerate(value.shape)]
                self.state[value.name] = np.zeros(shape, kinds[value.type])
        self.outputs = [output.name for output in self.session.get_outputs()]

    def call(self, tokens, retro):
        length = len(self.tokens)
        feed = {
            "input_ids": np.array([tokens], np.int64),
            "attention_mask": np.ones((1, length), np.int64),
            "retro_length": np.array([retro], np.int32),
        }
        results = dict(zip(self.outputs, self.session.run(None, feed | self.state)))
        present = {name: name.replace("past_key_values", "present").replace("past_retro", "present_retro") for name in self.state}
        self.state = {name: results[present[name]] for name in self.state}
        self.logits = results["logits"][0, -1]

    def feed(self, tokens):
        # An answer's last token is not fed before a prompt that follows it: genai leaves its place in the caches empty, in
        # original models as well.
        self.tokens = self.tokens + tokens
        self.call(tokens, -1)
        self.fed, self.retro = len(self.tokens), 0
        return self

    def step(self):
        self.call(self.tokens[-1 - self.retro :], self.retro)
        self.fed, self.retro = len(self.tokens), min(self.retro + 1, self.window - 1)

    def answer(self, count):
        answer = []
        for _ in range(count):
            if self.fed < len(self.tokens):
                self.step()
            self.tokens.append(int(self.logits.argmax()))
            answer.append(self.tokens[-1])
        return answer

    def rewind(self, length):
        self.tokens, self.fed, self.retro = self.tokens[:length], length, 0


@pytest.fixture(scope="module")
def code(tmp_path_factory):
    """The trained model `code`, and what both hosts are given of it, by window."""
    folder = tmp_path_factory.mktemp("code")
    run(models(), "build", "--weights", ROOT / "models" / "code", "-o", folder / "source")
    # genai has no tokenizer without it.
    (folder / "source" / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    for window in WINDOWS:
        options = ["--window", window, *SPARSE]
        convert(folder / "source", folder / f"plain-{window}", *options)
        convert(folder / "source", folder / f"genai-{window}", *options, "--host", "genai", "--context", CONTEXT)
    return folder


@pytest.mark.parametrize("source", CPU_EXPORTS, ids=lambda path: path.name)
def test_an_export_gives_the_originals_text_where_all_is_read(source, tmp_path):
    prompt, more = [3 + (i * 37) % 400 for i in range(60)], [7 + (i * 41) % 400 for i in range(20)]

    def two_turns(folder):
        session = Session(folder, max_length=200)
        return [session.feed(prompt).answer(ANSWER), session.feed(more).answer(ANSWER)]

    try:
        expected = two_turns(source)
    except RuntimeError as error:
        # Exports are newer than that version: it knows not all that they configure.
        assert VERSION < (0, 18) and "JSON Error" in str(error), error
        pytest.skip(f"genai {og.__version__} does not load the original: {error}")
    for window in WINDOWS:
        options = ["--window", window, "--budget", "1.0", "--host", "genai"]
        target = convert(source, tmp_path / f"w{window}", *options)
        assert two_turns(target) == expected, window
        chunks = Session(target, max_length=200)
        for start in (0, 17, 34, 51):
            chunks.feed(prompt[start : start + 17])
        assert chunks.answer(ANSWER) == expected[0], f"{window}, in chunks"


def test_two_turns_are_those_of_a_host_that_feeds_the_window(code):
    answers = []
    for window in WINDOWS:
        genai, loop = Session(code / f"genai-{window}"), Loop(code / f"plain-{window}")
        turns = [[host.feed(PROMPT).answer(ANSWER), host.feed(MORE).answer(ANSWER)] for host in (genai, loop)]
        assert turns[0] == turns[1], window
        answers.append(turns[0])
    # The window is at work.
    assert answers[0] != answers[2]


def test_other_selectors_have_state_of_other_shapes(code, tmp_path):
    """Two vectors a page, which genai's state has in one dimension less; and more pages than the caches need."""
    for selector in ("signed_moments", "adamas"):
        options = ["--window", 2, *SPARSE, "--selector", selector, "--page-size", 16]
        plain = convert(code / "source", tmp_path / f"plain-{selector}", *options)
        genai = convert(code / "source", tmp_path / f"genai-{selector}", *options, "--host", "genai", "--context", 2000)
        expected = Loop(plain).feed(PROMPT).answer(ANSWER)
        assert Session(genai).feed(PROMPT).answer(ANSWER) == expected, selector


def test_texts_are_those_of_retro_run(code, tmp_path):
    text = (ROOT / "tests" / "python" / "zoo.py").read_text()[:900]
    (tmp_path / "prompt.txt").write_text(text)
    for window in WINDOWS:
        model = og.Model(str(code / f"genai-{window}"))
        # retro-run begins with the bos token, genai does not.
        prompt = [1] + og.Tokenizer(model).encode(text).tolist()
        outputs = []
        for form in ("plain", "genai"):
            command = [runner(), "run", code / f"{form}-{window}", "-f", tmp_path / "prompt.txt", "-n", ANSWER]
            report = json.loads(run(*command, "-c", CONTEXT, "--dense-below", 0, "--json"))
            outputs.append(report["tokens"])
            assert report["stats"]["prompt_tokens"] == len(prompt)
        assert Session(code / f"genai-{window}").feed(prompt).answer(ANSWER) == outputs[0] == outputs[1], window


def test_sequences_of_one_length_run_together(code):
    other = [1] + [5 + (i * 31) % 2000 for i in range(len(PROMPT) - 1)]
    for window in WINDOWS:
        folder = code / f"genai-{window}"
        alone = [Session(folder).feed(row).answer(ANSWER) for row in (PROMPT, other)]
        assert Session(folder, batch=2).feed([PROMPT, other]).answer(ANSWER) == alone, window


def test_padding_on_the_right_is_one_clear_error(code):
    short = PROMPT[:200] + [0] * (len(PROMPT) - 200)
    with pytest.raises(Exception, match="attention mask of sequence 1 is not understood.*Pad on the left"):
        Session(code / "genai-2", batch=2).feed([PROMPT, short])


def test_going_back_is_right_or_refused(code):
    for window in WINDOWS:
        session, loop = Session(code / f"genai-{window}"), Loop(code / f"plain-{window}")
        first = session.feed(PROMPT).answer(ANSWER)
        assert loop.feed(PROMPT).answer(ANSWER) == first
        length = len(PROMPT) + 10
        if VERSION < (0, 18):
            session.generator.rewind_to(length)
            loop.rewind(length)
            assert session.feed(MORE).answer(ANSWER) == loop.feed(MORE).answer(ANSWER), window
        else:
            with pytest.raises(Exception, match="cannot be partially rewound"):
                session.generator.rewind_to(length)
        # To the beginning always works.
        session.generator.rewind_to(0)
        assert session.feed(PROMPT).answer(ANSWER) == first, window


def test_a_longer_text_than_the_state_is_made_for_is_refused(code):
    with pytest.raises(Exception, match="max_length .* context_length"):
        Session(code / "genai-2", max_length=CONTEXT + 1)
