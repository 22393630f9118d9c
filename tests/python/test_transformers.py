"""RetroForCausalLM: transformers' generate() with converted models, beside retro-run and the original."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest

torch = pytest.importorskip("torch", reason="torch and transformers have an environment of their own: `make test-transformers`")
transformers = pytest.importorskip("transformers")

import documents  # noqa: E402
import zoo  # noqa: E402
from paths import ROOT, exporter, models, plugin, runner  # noqa: E402

sys.path.insert(0, str(ROOT / "python"))
os.environ["RETRO_ATTENTION_PLUGIN"] = plugin()
from retro_attention import RetroForCausalLM  # noqa: E402

LIBRARY = Path(ort.__file__).parent / "capi" / f"libonnxruntime.so.{ort.__version__}"
ENVIRONMENT = os.environ | {"ORT_DYLIB_PATH": str(LIBRARY)}
DOCUMENTS = ROOT / "models" / "ledger" / "documents.jsonl"
# Of a model made for genai; and of one that reads contexts of up to so many tokens whole: shorter than one of the prompts.
CONTEXT, WHOLE = 2048, 900


def command(*arguments):
    done = subprocess.run([str(a) for a in arguments], capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 0, f"{arguments}: {done.stdout}{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The trained model `ledger`: as it is, converted so that a step reads little, and so that it reads everything."""
    folder = tmp_path_factory.mktemp("transformers")
    command(models(), "build", "--weights", ROOT / "models" / "ledger", "-o", folder / "ledger")
    little = ["--budget", "0.05", "--min-pages", "4"]
    for name, options in [
        ("sparse", little),
        ("full", ["--budget", "100000"]),
        ("whole", [*little, "--dense-below", str(WHOLE)]),
        ("in-graph", [*little, "--window-in-graph"]),
        ("genai", [*little, "--host", "genai", "--context", str(CONTEXT)]),
    ]:
        command(exporter(), folder / "ledger", "-o", folder / name, "--window", "4", *options, "--no-verify")
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder):
    special = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / "sparse" / "tokenizer.json"), padding_side="left", **special)


@pytest.fixture(scope="module")
def prompts(tokenizer):
    """Tokens of documents, whose lengths differ."""
    with open(DOCUMENTS) as lines:
        texts = [json.loads(line)["prompt"] for line in lines][:4]
    ids = [tokenizer.convert_tokens_to_ids(text.split()) for text in texts]
    return [ids[0], ids[1][:-1], ids[2], ids[3][:700]]


@pytest.fixture(scope="module")
def model(folder):
    return RetroForCausalLM.from_pretrained(folder / "sparse")


def padded(prompts):
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    return {"input_ids": ids, "attention_mask": mask}


def generated(model, prompts, count=60, **options):
    options = {"do_sample": False, "max_new_tokens": count} | options
    given = padded(prompts)
    return model.generate(**given, **options)[:, given["input_ids"].shape[1] :].tolist()


def until_end(ids):
    """The tokens up to the end of the text, after which there is padding alone."""
    if 2 not in ids:
        return ids
    end = ids.index(2) + 1
    assert set(ids[end:]) <= {0}
    return ids[:end]


@pytest.mark.parametrize(
    "name, reference",
    [("sparse", "sparse"), ("full", "ledger"), ("in-graph", "in-graph"), ("in-graph", "sparse"), ("genai", "sparse")],
)
def test_greedy_text_is_retro_runs(folder, tokenizer, prompts, name, reference):
    """Where a step reads little, that of the same model, and of the same with the window in its graph or not; where it reads
    everything, that of the original."""
    model = RetroForCausalLM.from_pretrained(folder / name)
    for document in (0, 2):
        text = command(runner(), "run", folder / reference, "--document", f"{DOCUMENTS}:{document}", "-n", "60")
        made = tokenizer.convert_ids_to_tokens(until_end(generated(model, [prompts[document]])[0]))
        assert made == text.split()


def test_a_step_reads_little(folder, prompts):
    """Else the test above could not tell the two models apart."""
    sparse, full = (RetroForCausalLM.from_pretrained(folder / name) for name in ("sparse", "full"))
    options = {"return_dict_in_generate": True, "output_logits": True, "do_sample": False, "max_new_tokens": 8}
    first, second = (model.generate(**padded(prompts[:1]), **options) for model in (sparse, full))
    torch.testing.assert_close(first.logits[0], second.logits[0])
    assert (first.logits[7] - second.logits[7]).abs().max() > 1e-3


@pytest.mark.parametrize("form", ["in-graph", "genai"])
def test_forms_that_take_each_token_once_give_the_same_logits(folder, model, prompts, form):
    """In batches as alone, whatever the pieces of a prompt, also where one token would be left for the last."""
    other = RetroForCausalLM.from_pretrained(folder / form)
    options = {"return_dict_in_generate": True, "output_logits": True, "do_sample": False, "max_new_tokens": 12}

    def difference(given, chunk=None):
        made, expected = (m.generate(**padded(given), **options, prefill_chunk_size=chunk) for m in (other, model))
        assert made.sequences.tolist() == expected.sequences.tolist()
        return max((one - two).abs().max() for one, two in zip(made.logits, expected.logits, strict=True))

    first, short = prompts[0], prompts[0][:61]
    for given, chunk in [(prompts, None), ([first], None), ([first], len(first) - 1), ([short], 2), ([short], 1), ([first[:1]], None)]:
        assert difference(given, chunk) < 2e-4
    # What the window is for: without it the logits are others.
    other._decoder.window = model._decoder.window = 1
    try:
        assert difference([first]) > 1e-3
    finally:
        model._decoder.window = 4


def test_short_contexts_are_read_whole(folder, prompts, tokenizer):
    """As retro-run does, up to the length that the model was converted with; sequence by sequence."""
    options = {"return_dict_in_generate": True, "output_logits": True, "do_sample": False, "max_new_tokens": 8}
    short = [prompts[3][:700], prompts[0]]
    assert len(short[0]) + 8 < WHOLE < len(short[1])
    sparse, full, whole = (
        RetroForCausalLM.from_pretrained(folder / name).generate(**padded(short), **options).logits[7] for name in ("sparse", "full", "whole")
    )
    torch.testing.assert_close(whole[0], full[0])
    torch.testing.assert_close(whole[1], sparse[1])
    assert (sparse - full).abs().amax(-1).min() > 1e-3, "else nothing is told apart"


def test_batches_of_unequal_lengths(model, prompts):
    alone = [generated(model, [prompt])[0] for prompt in prompts]
    assert len({len(prompt) for prompt in prompts}) == len(prompts)
    assert [until_end(row) for row in generated(model, prompts)] == [until_end(row) for row in alone]


def test_sampling(model, prompts):
    greedy = generated(model, prompts[:1], 30)
    assert generated(model, prompts[:1], 30, do_sample=True, top_k=1) == greedy

    def drawn(seed):
        torch.manual_seed(seed)
        return generated(model, prompts[:1], 30, do_sample=True, temperature=5.0, top_k=0, num_return_sequences=2)

    one, other = drawn(1), drawn(2)
    assert one == drawn(1) and one != other and one[0] != one[1] and len(one) == 2


def test_streams_and_stops(model, prompts, tokenizer):
    class Streamer(transformers.generation.streamers.BaseStreamer):
        def __init__(self):
            self.parts, self.ended = [], False

        def put(self, value):
            self.parts.append(value.reshape(-1).tolist())

        def end(self):
            self.ended = True

    streamer = Streamer()
    made = generated(model, prompts[:1], 20, streamer=streamer)[0]
    assert streamer.parts == [prompts[0]] + [[token] for token in made] and streamer.ended
    # The end of the text is in the model's configuration.
    stop = made[5]
    stopped = generated(model, prompts[:1], 20, eos_token_id=stop)[0]
    assert stopped == made[: made.index(stop) + 1]


def test_scores_and_processors(model, prompts):
    banned = generated(model, prompts[:1], 1)[0][0]
    options = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True, "do_sample": False, "max_new_tokens": 3}
    out = model.generate(**padded(prompts[:1]), **options, suppress_tokens=[banned])
    assert banned not in out.sequences[0, len(prompts[0]) :] and len(out.scores) == len(out.logits) == 3
    assert out.scores[0][0, banned] == -torch.inf and torch.isfinite(out.logits[0]).all()
    logits = model(**padded(prompts[:1])).logits
    torch.testing.assert_close(logits[:, -1], out.logits[0])


def test_what_cannot_be_is_one_line(model, prompts, folder, tmp_path):
    given = padded(prompts[:2])
    right = {name: tensor.flip(1) for name, tensor in given.items()}
    config = transformers.GenerationConfig(num_beams=3, max_new_tokens=2)
    holes = given | {"attention_mask": given["attention_mask"].clone()}
    holes["attention_mask"][:, 500] = 0
    for options, says in [
        (given | {"num_beams": 4}, "beam search would go back"),
        (given | {"generation_config": config}, "beam search would go back"),
        (given | {"prompt_lookup_num_tokens": 4}, "assisted generation would go back"),
        (given | {"assistant_model": model}, "assistant_model"),
        (right, "padding_side = 'left'"),
        (holes, "padding_side = 'left'"),
        (given | {"output_attentions": True, "return_dict_in_generate": True}, "does not take output_attentions"),
    ]:
        with pytest.raises(ValueError, match=says) as error:
            model.generate(**{"max_new_tokens": 2, "do_sample": False} | options)
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=f"is made for {CONTEXT} tokens"):
        RetroForCausalLM.from_pretrained(folder / "genai").generate(**given, max_new_tokens=CONTEXT)
    with pytest.raises(FileNotFoundError, match="the folder that retro-export wrote"):
        RetroForCausalLM.from_pretrained("HuggingFaceTB/SmolLM2-135M")
    with pytest.raises(RuntimeError, match="was not converted by retro-export"):
        RetroForCausalLM.from_pretrained(folder / "ledger")
    with pytest.raises(ValueError, match="expected one of"):
        RetroForCausalLM.from_pretrained(folder / "sparse", provider="CoreMLExecutionProvider")


# ---- exports of others ------------------------------------------------------------------------------------------------

EXPORTS = [
    "genai-llama-fp32-cpu",
    "genai-qwen3-fp32-cpu",
    "genai-gemma2-fp32-cpu",
    "genai040-old_phi-fp32-cpu",
    "optimum-llama-fp32",
    "optimum-llama-num_logits_to_keep",
    "tfexp-mistral-fp32",
]


@pytest.mark.parametrize("form", [[], ["--window-in-graph"]], ids=["", "in-graph"])
@pytest.mark.parametrize("name", EXPORTS)
def test_padding_changes_no_logits(name, form, tmp_path):
    """Positions as inputs or not, masks of several forms: in a batch as alone, read and decoded."""
    from retro_attention._decoder import Decoder, Sequences

    found = {path.name.removesuffix(".onnx.xz"): path for path in zoo.FOLDERS + zoo.GRAPHS}
    source = zoo.graph(found[name], tmp_path)
    command(exporter(), source, "-o", tmp_path / "retro.onnx", "--window", "3", "--budget", "4096", "--no-verify", *form)
    decoder = Decoder(tmp_path / "retro.onnx", plugin(), "CPUExecutionProvider", 0, None)
    ids = np.random.default_rng(11).integers(1, 60, (2, 40))

    def logits(rows, begins):
        mask = np.array([[column >= begin for column in range(30)] for begin in begins], np.int64)
        sequences = Sequences(decoder, len(rows), 40)
        made = [sequences.read(rows[:, :30], mask, 512)]
        return made + [sequences.step(rows[:, column]) for column in range(30, 40)]

    together = logits(ids, [0, 13])
    first, second = logits(ids[:1], [0]), None
    sequences = Sequences(decoder, 1, 27)
    second = [sequences.read(ids[1:, 13:30], np.ones((1, 17), np.int64), 512)]
    second += [sequences.step(ids[1:, column]) for column in range(30, 40)]
    for both, one, other in zip(together, first, second, strict=True):
        np.testing.assert_allclose(both, np.concatenate([one, other]), rtol=0, atol=1e-3 * np.abs(both).max())


@pytest.mark.parametrize("name, state", [("genai-lfm2", "past.0.conv"), ("mobius-qwen35", "past_key_values.0.conv_state")])
def test_padding_is_refused_where_other_state_would_take_it_for_tokens(name, state, tmp_path):
    """Convolutions and recurrent layers. Sequences of equal length are right."""
    from retro_attention._decoder import Decoder, Sequences

    source = zoo.graph(next(path for path in zoo.GRAPHS if path.name == f"{name}.onnx.xz"), tmp_path)
    command(exporter(), source, "-o", tmp_path / "retro.onnx", "--window", "1", "--budget", "4096", "--no-verify")
    decoder = Decoder(tmp_path / "retro.onnx", plugin(), "CPUExecutionProvider", 0, None)
    ids, mask = np.random.default_rng(11).integers(1, 60, (2, 40)), np.ones((2, 30), np.int64)
    with pytest.raises(ValueError, match=f"carries {state} from token to token, padding too: give it sequences of equal length"):
        Sequences(decoder, 2, 40).read(ids[:, :30], np.where([[True], [False]], mask, np.arange(30) > 12), 512)

    def logits(rows):
        sequences = Sequences(decoder, len(rows), 40)
        made = [sequences.read(rows[:, :30], mask[: len(rows)], 512)]
        return np.array(made + [sequences.step(rows[:, column]) for column in range(30, 40)])

    together, alone = logits(ids), [logits(ids[:1]), logits(ids[1:])]
    np.testing.assert_allclose(together, np.concatenate(alone, axis=1), rtol=0, atol=1e-3 * np.abs(together).max())


# ---- documents ----------------------------------------------------------------------------------------------------------

BLOCKS = [
    block
    for file in documents.DOCUMENTS
    for block in documents.blocks(file)
    if block.language == "python" and "RetroForCausalLM" in block.text
]


def test_the_documents_show_it():
    assert {block.file for block in BLOCKS} >= {ROOT / "docs" / "hosts.md"}


@pytest.mark.parametrize("block", [pytest.param(block, id=str(block)) for block in BLOCKS])
def test_blocks_run(block, folder, tokenizer, tmp_path):
    command("cp", "-r", folder / "sparse", tmp_path / "OUT")
    tokenizer.save_pretrained(tmp_path / "OUT")
    exec(compile(block.text.replace('"OUT"', repr(str(tmp_path / "OUT"))), str(block), "exec"), {})
