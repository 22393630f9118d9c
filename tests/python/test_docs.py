"""The documents' code does what they say: it is run, compiled and run, or at least names only what exists."""

import functools
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest

import documents
import zoo
from paths import DATA, ROOT, exporter, host, models, plugin, runner

BLOCKS = [block for file in documents.DOCUMENTS for block in documents.blocks(file)]
# Tested below, each kind by a test of its own that takes every such block. The rest are not code.
TESTED = {"python", "cpp", "rust", "shell", "csharp", "json", "sh"}
NOT_CODE = {"text"}

LIBRARY = Path(ort.__file__).parent / "capi" / f"libonnxruntime.so.{ort.__version__}"
VERSION = tuple(map(int, ort.__version__.split(".")[:2]))
needs_newer = pytest.mark.skipif(VERSION < (1, 24), reason="retro-run, the crate ort or the original need onnxruntime 1.24 or newer")
ENVIRONMENT = os.environ | {"ORT_DYLIB_PATH": str(LIBRARY), "RETRO_ATTENTION_PLUGIN": plugin()}
# The package as the wheel has it, with the plugin built here.
sys.path.insert(0, str(ROOT / "python"))
os.environ["RETRO_ATTENTION_PLUGIN"] = plugin()


def of(language):
    return [pytest.param(block, id=str(block)) for block in BLOCKS if block.language == language]


def command(*arguments, **options):
    result = subprocess.run([str(a) for a in arguments], capture_output=True, text=True, env=ENVIRONMENT, **options)
    assert result.returncode == 0, f"{arguments}: {result.stdout}{result.stderr}"
    return result.stdout


FORMS = {"retro": [], "in-graph": ["--window-in-graph"]}


@pytest.fixture(scope="module")
def ledger(tmp_path_factory):
    """The trained model: as an exporter writes it, and converted with a window of 4, which the host feeds or the graph keeps."""
    folder = tmp_path_factory.mktemp("docs")
    command(models(), "build", "--weights", ROOT / "models" / "ledger", "-o", folder / "ledger")
    for name, options in FORMS.items():
        command(exporter(), folder / "ledger", "-o", folder / name, "--window", "4", "--budget", "0.15", "--no-verify", *options)
    return folder


def prompt():
    """Of the first document; its tokens are its words."""
    with open(ROOT / "models" / "ledger" / "documents.jsonl") as lines:
        text = json.loads(next(lines))["prompt"]
    tokenizer = json.loads((ROOT / "models" / "ledger" / "tokenizer.json").read_text())
    words = {token["content"]: token["id"] for token in tokenizer["added_tokens"]} | tokenizer["model"]["vocab"]
    return [words[word] for word in text.split()], {number: word for word, number in words.items()}


def filled(block, values):
    """A block with the paths of this machine for those it stands for."""
    text = block.text
    for name, value in values.items():
        text = text.replace(name, value)
    assert "/path/to" not in text and "OUT" not in text, f"{block} has a path that no test fills in"
    return text


PATHS = {"/path/to/libretro_attention.so": plugin()}


WIDTH = 120


def test_the_documents_are_found():
    named = {"README.md", "CHANGELOG.md", "CONTRIBUTING.md", "models/README.md", "runner/README.md", "docs/notes/cuda.md"}
    named |= {f"docs/{name}.md" for name in ["accuracy", "cuda", "export", "glossary", "hosts", "method", "operator", "performance", "serving"]}
    missing = named - {str(file.relative_to(ROOT)) for file in documents.DOCUMENTS}
    assert not missing, missing


def test_readme_is_one_page():
    assert len((ROOT / "README.md").read_text().splitlines()) < 150


@pytest.mark.parametrize("file", documents.DOCUMENTS, ids=lambda file: str(file.relative_to(ROOT)))
def test_lines_wrap(file):
    long = [f"{file.relative_to(ROOT)}:{number}: {len(line)} columns" for number, line in documents.prose(file) if len(line) > WIDTH]
    assert not long, "\n".join(long)


def test_the_blocks_are_found():
    found = {language: len(of(language)) for language in TESTED}
    assert found["python"] >= 2 and found["cpp"] >= 1 and found["rust"] >= 1 and found["shell"] >= 20, found
    assert all(block.file == SERVING for block in BLOCKS if block.language == "sh"), "test_serve.py runs these"


@pytest.mark.parametrize("block", [pytest.param(block, id=str(block)) for block in BLOCKS])
def test_every_block_is_of_a_kind_that_is_tested(block):
    assert block.language in TESTED | NOT_CODE, f"{block}: nothing tests blocks of {block.language!r}"


# ---- Python ----------------------------------------------------------------------------------------------------------------


def run_python(file, model):
    """All blocks of a document, one after another as its reader would run them; gives what they define."""
    defined = {}
    for block in BLOCKS:
        if block.language == "python" and block.file == file and "RetroForCausalLM" not in block.text:
            text = filled(block, PATHS | {"OUT/model.onnx": str(model)})
            exec(compile("\n" * block.line + text, str(block.file), "exec"), defined)
    return defined


# test_transformers.py runs those with RetroForCausalLM.
# Clients of a server: test_serve.py runs them.
SERVING = ROOT / "docs" / "serving.md"
PYTHON = sorted({block.file for block in BLOCKS if block.language == "python"} - {SERVING})


@pytest.mark.parametrize("file", PYTHON, ids=lambda f: f.name)
def test_python_blocks_run(file, ledger):
    run_python(file, ledger / "retro" / "model.onnx")


@needs_newer
def test_the_loop_for_hosts_writes_what_retro_run_writes(ledger):
    ids, words = prompt()
    host_page = run_python(ROOT / "docs" / "hosts.md", ledger / "retro" / "model.onnx")
    host_page["EOS"] = next(number for number, word in words.items() if word == "<eos>")
    made = host_page["generate"](list(ids), 80)[len(ids) :]
    document = ROOT / "models" / "ledger" / "documents.jsonl"
    text = command(runner(), "run", ledger / "retro", "--document", f"{document}:0", "-n", "80")
    assert [words[token] for token in made] == text.split()


@needs_newer
@pytest.mark.parametrize("dtype", ["f32", "f16"])
def test_the_loop_for_hosts_gives_what_the_original_gives(dtype, tmp_path):
    """Pages for everything."""
    command(models(), "build", "--weights", DATA / "golden" / "model", "--dtype", dtype, "-o", tmp_path / "model")
    compare_with_original(tmp_path / "model" / "model.onnx", tmp_path, 1e-3 if dtype == "f32" else 2e-2)


# GroupQueryAttention with head sizes that are not declared, positions, sliding windows; attention in several nodes.
EXPORTS = ["genai-llama-fp32-cpu", "genai-llama-fp16-dml", "genai-qwen3-fp32-cpu", "genai-gemma2-fp32-cpu", "genai040-old_phi-fp32-cpu"]


@pytest.mark.skipif(VERSION < (1, 31), reason="older ones load only some of these exports, the originals too")
@pytest.mark.parametrize("name", EXPORTS)
def test_the_loop_for_hosts_runs_exports(name, tmp_path):
    compare_with_original(zoo.FOLDER / name / "model.onnx", tmp_path, 2e-2 if "fp16" in name else 1e-3)


def compare_with_original(source, folder, allowed):
    command(exporter(), source, "-o", folder / "retro.onnx", "--window", "4", "--budget", "4096", "--no-verify")
    host_page = run_python(ROOT / "docs" / "hosts.md", folder / "retro.onnx")
    host_page["EOS"] = -1
    given = [int(token) for token in np.random.default_rng(3).integers(1, 60, 50)]
    ids = host_page["generate"](list(given), 20)
    assert len(ids) == 70
    session = ort.InferenceSession(str(source), providers=["CPUExecutionProvider"])
    feeds = {"input_ids": np.array([ids]), "attention_mask": np.ones((1, len(ids)), np.int64), "position_ids": np.arange(len(ids))[None]}
    feeds = {value.name: feeds[value.name] for value in session.get_inputs() if value.name in feeds}
    feeds |= {name: array[:, :, : len(ids)] for name, array in host_page["past"].items() if name.startswith("past_key_values.")}
    scores = session.run(["logits"], feeds)[0][0].astype(np.float32)
    for position in range(len(given), len(ids)):
        row = scores[position - 1]
        # The likeliest token, but for rounding.
        assert row[ids[position]] >= row.max() - allowed * np.abs(scores).max(), position


# ---- C++ -------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """Compiles a C++ program against the headers that scripts/onnxruntime-headers found and this onnxruntime."""
    headers, compiler = os.environ.get("ORT_INCLUDE_DIR"), shutil.which(os.environ.get("CXX", "c++"))
    if not headers or not compiler:
        pytest.skip("NOT TESTED: the C++ of the documents and examples: " + ("needs a C++ compiler" if headers else "needs ORT_INCLUDE_DIR"))
    folder = tmp_path_factory.mktemp("cpp")
    # As in ONNX Runtime's archives: the wheel has the library without these names.
    for name in ["libonnxruntime.so", "libonnxruntime.so.1"]:
        (folder / name).symlink_to(LIBRARY)

    def compile(source, name):
        flags = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-isystem", headers, "-L", folder, "-lonnxruntime"]
        command(compiler, source, *flags, f"-Wl,-rpath,{folder}", "-o", folder / name)
        return folder / name

    return compile


@pytest.mark.parametrize("block", of("cpp"))
def test_cpp_blocks_load_a_model(block, compiled, ledger, tmp_path):
    text = filled(block, PATHS | {"OUT/model.onnx": str(ledger / "retro" / "model.onnx")})
    lines = text.splitlines()
    includes = [line for line in lines if line.startswith("#include")]
    body = [line for line in lines if line not in includes]
    shows = '#include <cstdio>\nint main() {\n%s\nstd::printf("%%zu\\n", session.GetInputCount());\n}\n'
    (tmp_path / "block.cc").write_text("\n".join(includes) + "\n" + shows % "\n".join(body))
    inputs = int(command(compiled(tmp_path / "block.cc", "block")))
    # Six layers with keys, values and four kinds of state, the tokens and the mask; what has a default does not count.
    assert inputs == 6 * 6 + 2


@pytest.mark.parametrize("block", of("cpp"))
def test_cpp_blocks_are_lines_of_the_example(block):
    """In their order; the example has lines of its own between."""
    names = {'"/path/to/libretro_attention.so"': "plugin", '"OUT/model.onnx"': "model"}
    example = iter(line.strip() for line in (ROOT / "examples" / "generate.cc").read_text().splitlines())
    for line in filled(block, names).splitlines():
        assert not line.strip() or line.strip() in example, f"{block}: {line} is not in examples/generate.cc"


@pytest.mark.parametrize("form", FORMS)
def test_the_hosts_in_cpp_and_python_agree(form, compiled, ledger):
    ids = ",".join(map(str, prompt()[0][:300]))
    model = ledger / form / "model.onnx"
    made = command(compiled(ROOT / "examples" / "generate.cc", "generate"), model, plugin(), "40", ids)
    assert numbers(made) == python_host(model, ids)


def python_host(model, ids):
    spec = importlib.util.spec_from_file_location("generate", ROOT / "examples" / "generate.py")
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    ids = numbers(ids)
    return example.Generator(model, plugin(), len(ids) + 40).generate(ids, 40)


def test_the_host_in_python_gives_one_text_whoever_feeds_the_window(ledger):
    """Also where the last piece of the prompt would be a single token."""
    ids = ",".join(map(str, prompt()[0][:513]))
    texts = [python_host(ledger / form / "model.onnx", ids) for form in FORMS]
    assert texts[0] == texts[1]


def numbers(text):
    return [int(number) for number in text.split(",")]


# ---- Rust ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", of("rust"))
def test_rust_blocks_are_lines_of_the_example(block):
    """Which cargo compiles, with the workspace's version of `ort`, and the test below runs."""
    names = {'"/path/to/libonnxruntime.so"': "library", '"/path/to/libretro_attention.so"': "plugin", '"OUT/model.onnx"': "model"}
    squeezed = [" ".join(line.split()) for line in filled(block, names).splitlines()]
    example = [" ".join(line.split()) for line in (ROOT / "examples" / "generate.rs").read_text().splitlines()]
    assert "\n".join(squeezed) in "\n".join(example), f"{block} is not in examples/generate.rs"
    pinned = re.search(r'^ort = \{ version = "=([^"]+)"', (ROOT / "Cargo.toml").read_text(), re.MULTILINE)[1]
    assert f"`ort` {pinned}" in block.file.read_text()


@needs_newer
@pytest.mark.parametrize("form", FORMS)
def test_the_hosts_in_rust_and_python_agree(form, ledger):
    ids = ",".join(map(str, prompt()[0][:300]))
    model = ledger / form / "model.onnx"
    assert numbers(command(host(), LIBRARY, plugin(), model, "40", ids)) == python_host(model, ids)


# ---- C# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", of("csharp"))
def test_csharp_blocks_are_said_not_to_be_run(block):
    assert "C# lines follow ONNX Runtime's API and are not run by the tests" in " ".join(block.file.read_text().split())


# ---- JSON ----------------------------------------------------------------------------------------------------------------


@needs_newer
@pytest.mark.parametrize("block", of("json"))
def test_json_blocks_are_documents_that_eval_takes(block, ledger, tmp_path):
    (tmp_path / "data.jsonl").write_text(block.text)
    said = command(runner(), "eval", ledger / "ledger", "--data", tmp_path / "data.jsonl", "-n", "1", "--policy", "dense", "--json")
    assert json.loads(said)["rows"][0]["documents"] == len(block.text.splitlines())


# ---- Shell -----------------------------------------------------------------------------------------------------------------

EXAMPLES = ["cuda_op", "decode_depth", "matmul_nbits"]
PROGRAMS = {"retro-run": runner, "retro-export": exporter, "retro-models": models} | {
    name: functools.partial(lambda name: str(ROOT / "target" / "release" / "examples" / name), name) for name in EXAMPLES
}


@functools.cache
def flags(program, subcommand=""):
    """What a program takes, from its own help."""
    shown = command(PROGRAMS[program](), *subcommand.split(), "--help")
    return set(re.findall(r"(?<![\w-])(--?[a-zA-Z][\w-]*)", shown))


@functools.cache
def subcommands(program):
    shown = command(PROGRAMS[program](), "--help")
    listed = re.search(r"^Commands:\n((?:  .*\n|\n)*)", shown, re.MULTILINE)
    return set(re.findall(r"^  ([a-z][\w-]*)", listed[1], re.MULTILINE)) - {"help"} if listed else set()


@functools.cache
def all_flags(program):
    return flags(program).union(*(flags(program, sub) for sub in subcommands(program)))


def given_flags(words):
    return [re.match(r"--?[a-zA-Z][\w-]*", word)[0] for word in words if re.match(r"--?[a-zA-Z]", word)]


def check_own(program, words, exact):
    """`exact`: a whole command; else it stands for any of its sub-commands, as in the prose."""
    subs, sub = subcommands(program), ""
    if words and words[0] in subs:
        sub, words = words[0], words[1:]
    elif words and exact and program != "retro-export":
        assert not subs, f"{program} has no command {words[0]!r}"
    known = flags(program, sub) if sub or exact else all_flags(program)
    unknown = set(given_flags(words)) - known
    assert not unknown, f"{program} {sub} has no {', '.join(sorted(unknown))}"


def check_cargo(words):
    metadata = workspace()
    words = words[: words.index("--")] if "--" in words else words
    for option, value in zip(words, words[1:] + [""]):
        if option == "-p":
            assert value in metadata, f"no crate {value}"
        if option in ("--example", "--test", "--bin"):
            kind = option.removeprefix("--")
            names = {name for targets in metadata.values() for name, kinds in targets if kind in kinds}
            assert value in names, f"no {kind} {value}"


@functools.cache
def workspace():
    """Its crates, and each one's targets."""
    metadata = json.loads(command("cargo", "metadata", "--locked", "--offline", "--no-deps", "--format-version", "1", cwd=ROOT))
    return {crate["name"]: [(t["name"], t["kind"]) for t in crate["targets"]] for crate in metadata["packages"]}


def check_command(words, exact=True):
    """Programs, sub-commands, flags, and files of the project that a command names."""
    for word in words:
        check_path(word)
    first, rest = words[0].removeprefix("target/release/examples/").removeprefix("target/release/"), words[1:]
    if first == "export":
        for inner in re.findall(r"\$\(([^)]*)\)", " ".join(rest)):
            check_command(shlex.split(inner))
    elif first in PROGRAMS:
        check_own(first, rest, exact)
    elif first == "pip":
        assert rest[0] == "install", f"no command pip {rest[0]}"
    elif first == "make":
        targets = re.findall(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
        unknown = set(rest) - {target for line in targets for target in line.split()}
        assert not unknown, f"make has no target {unknown}"
    elif first == "cargo":
        check_cargo(rest)
    elif first.startswith("python"):
        source = (ROOT / rest[0]).read_text()
        if "--" in rest:
            # Behind it stands what a server of ours takes.
            check_own("retro-run", ["serve", *rest[rest.index("--") + 1 :]], exact)
            rest = rest[: rest.index("--")]
        unknown = [flag for flag in given_flags(rest[1:]) if f'"{flag}"' not in source]
        assert not unknown, f"{rest[0]} has no {unknown}"
    else:
        examples = {name for targets in workspace().values() for name, kinds in targets if "example" in kinds}
        assert (ROOT / first).is_file() or first in examples, f"no program {first}"


FOLDERS = {path.name for path in ROOT.iterdir() if path.is_dir()} - {"out", ".cache", "target"}


def check_path(word):
    """That a file of the project exists, if it is one that a word names."""
    path = re.sub(r"(:\d+|/)$", "", word)
    is_path = re.fullmatch(r"[\w.-]+(/[\w.-]+)+", path) and path.split("/")[0] in FOLDERS
    if is_path and not re.search(r"\b[A-Z]{2,}\b", path):
        assert (ROOT / path).exists(), f"no file {path}"


def commands(block):
    text = block.text.replace("\\\n", " ")
    parsed = [shlex.split(line, comments=True) for line in text.splitlines()]
    return [words for words in parsed if words]


@pytest.mark.parametrize("block", of("shell"))
def test_shell_blocks_name_what_exists(block):
    for words in commands(block):
        check_command(words)


@pytest.mark.parametrize("file", documents.DOCUMENTS, ids=lambda file: str(file.relative_to(ROOT)))
def test_the_prose_names_what_exists(file):
    wrong = []
    everything = set().union(*(all_flags(program) for program in PROGRAMS))
    # Options of the scripts, of cargo test, and of NVIDIA's tools.
    everything |= {"--update", "--test", "--tool", "--kernel-regex", "-lineinfo"}
    for line, span in documents.spans(file):
        words = span.split()
        try:
            if not words:
                continue
            if words[0] in PROGRAMS or words[0] in ("make", "cargo"):
                check_command([re.sub(r"\[.*", "", word) for word in words], exact=False)
            elif re.match(r"--?[a-z]", words[0]):
                unknown = set(given_flags(words)) - everything
                assert not unknown, f"no program has {unknown}"
            else:
                check_path(span)
        except AssertionError as error:
            wrong.append(f"{file.relative_to(ROOT)}:{line}: `{span}`: {str(error).splitlines()[0]}")
    for line, target in documents.links(file):
        name, _, anchor = target.partition("#")
        linked = file.parent / name if name else file
        if not linked.exists():
            wrong.append(f"{file.relative_to(ROOT)}:{line}: no file {target}")
        elif anchor and anchor not in documents.anchors(linked):
            wrong.append(f"{file.relative_to(ROOT)}:{line}: no heading {target}")
    assert not wrong, "\n".join(wrong)


@needs_newer
def test_readmes_commands_convert_run_and_revert(tmp_path):
    """Those of "Convert a model of your own", with one of the trained models, in its order."""
    command(models(), "build", "--weights", ROOT / "models" / "code", "-o", tmp_path / "MODEL")
    ran = []
    for block in BLOCKS:
        if block.file != ROOT / "README.md" or block.language != "shell":
            continue
        for words in commands(block):
            program = words[0].removeprefix("target/release/")
            # A GPU is for others.
            if program in PROGRAMS and "cuda" not in words:
                command(PROGRAMS[program](), *words[1:], cwd=tmp_path)
                ran.append(words)
    assert len(ran) >= 4
    for name in ["model.onnx", "model.onnx.data"]:
        assert (tmp_path / "ORIGINAL" / name).read_bytes() == (tmp_path / "MODEL" / name).read_bytes()
