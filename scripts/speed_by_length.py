"""The measuring of scripts/speed-by-length, which makes what it needs and calls it.

Hosts take turns: in every round each measures all lengths, in a process of its own. The table has medians over the rounds.
onnxruntime-genai and llama.cpp read a prompt of the length first; retro-run's caches are filled with random numbers, on which
the speed of a step does not depend.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

FOLDER = Path("out/speed")
# What the weights are, and the folder's name.
WEIGHTS = {"f32": "f32", "q4": "q4", "q4, level 4": "q4-bytes"}
COLUMNS = ["original", "converted", "w = 1", "genai", "llama.cpp"]
CONTEXT = 8192


def prompt(length):
    """Tokens as good as any: words of the vocabulary's beginning."""
    return [300 + (i * 7919) % 4000 for i in range(length)]


def measure_genai(folder, depths, steps, threads):
    import numpy
    import onnxruntime_genai as og

    config = og.Config(str(folder))
    config.overlay(json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}}))
    model = og.Model(config)
    params = og.GeneratorParams(model)
    # No text ends before the length that is asked for.
    params.set_search_options(max_length=CONTEXT, min_length=CONTEXT, do_sample=False)
    generator = og.Generator(model, params)
    tokens = numpy.array(prompt(CONTEXT), dtype=numpy.int32)
    found = {}
    for depth in depths:
        for start in range(generator.token_count(), depth, 512):
            generator.append_tokens(tokens[start : min(start + 512, depth)])
        for _ in range(4):
            generator.generate_next_token()
        start = time.perf_counter()
        for _ in range(steps):
            generator.generate_next_token()
        found[depth] = 1e3 * (time.perf_counter() - start) / steps
    return found


def measure_llama(gguf, depths, steps, threads):
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(gguf)
    params.n_ctx, params.n_parallel = CONTEXT, 1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    server = xllamacpp.Server(params)
    found = {}
    for depth in depths:
        # The prompts begin alike: only what is longer is read. The server leaves the first token out of its time.
        request = {"prompt": prompt(depth), "n_predict": steps + 1, "cache_prompt": True, "ignore_eos": True, "temperature": 0}
        answer = server.handle_completions(request)
        if "timings" not in answer:
            raise SystemExit(f"llama.cpp: {answer}")
        found[depth] = answer["timings"]["predicted_per_token_ms"]
    return found


def measure_retro(weights, column, depths, steps, threads):
    # In a process of its own as well: the memory that weights get depends on what was loaded before.
    run = {"original": "", "converted": "-retro", "w = 1": "-retro,window=1"}[column]
    command = ["target/release/examples/decode_depth", "--json", "-r", "1", "-s", str(steps), "-t", str(threads)]
    command += ["--depth", ",".join(map(str, depths)), "--run", f"{column}={FOLDER / weights}{run}"]
    output = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=True)
    return {row["depth"]: row["milliseconds_per_token"] for row in json.loads(output.stdout)["rows"]}


def apart(host, path, args):
    """A measurement in a process of its own: threads of one host must not spin beside those of another."""
    command = [sys.executable, __file__, "--host", host, "--gguf", str(path), "--depths", ",".join(map(str, args.depths))]
    command += ["--steps", str(args.steps), "--threads", str(args.threads)]
    output = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    if output.returncode:
        raise SystemExit(f"{host} failed: {output.stderr.strip().splitlines()[-1:]}")
    return {int(depth): ms for depth, ms in json.loads(output.stdout.splitlines()[-1]).items()}


def main():
    parser = argparse.ArgumentParser(prog="scripts/speed-by-length")
    numbers = lambda text: [int(n) for n in text.split(",")]
    # The context of 8192 has room for the steps behind the last.
    parser.add_argument("--depths", type=numbers, default=[512, 2048, 4096, 8000], help="tokens of context")
    parser.add_argument("--weights", type=lambda text: text.split(","), default=list(WEIGHTS.values()), help="f32, q4, q4-bytes")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=32, help="tokens of a sample")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="write the milliseconds of every sample")
    parser.add_argument("--gguf", type=Path, required=True, help=argparse.SUPPRESS)
    parser.add_argument("--host", choices=["genai", "llama"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.host:
        measure = {"genai": measure_genai, "llama": measure_llama}[args.host]
        print(json.dumps(measure(args.gguf, args.depths, args.steps, args.threads)), flush=True)
        # Threads of the host may outlive their purpose.
        os._exit(0)

    chosen = {label: name for label, name in WEIGHTS.items() if name in args.weights}
    samples = {}

    def add(label, column, found):
        for depth, ms in found.items():
            samples.setdefault((label, depth, column), []).append(ms)

    for number in range(args.rounds):
        for label, name in chosen.items():
            print(f"round {number + 1} of {args.rounds}: {label}", file=sys.stderr)
            for column in COLUMNS[:3]:
                add(label, column, measure_retro(name, column, args.depths, args.steps, args.threads))
            add(label, "genai", apart("genai", FOLDER / name, args))
        # Its file is of 4 bits, and it rounds what it multiplies them with to 8.
        for label in [label for label, name in chosen.items() if name == "q4-bytes"]:
            add(label, "llama.cpp", apart("llama", args.gguf, args))

    print("| weights | context | " + " | ".join(COLUMNS) + " | converted / original | w = 1 / original |")
    print("|---|---:|" + "---:|" * (len(COLUMNS) + 2))
    for label in chosen:
        for depth in args.depths:
            medians = {c: statistics.median(samples[label, depth, c]) for c in COLUMNS if (label, depth, c) in samples}
            cells = [f"{1e3 / medians[c]:.0f}" if c in medians else "" for c in COLUMNS]
            for column in ["converted", "w = 1"]:
                pairs = zip(samples[label, depth, "original"], samples[label, depth, column])
                ratios = sorted(a / b for a, b in pairs)
                cells.append(f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})")
            print(f"| {label} | {depth} | " + " | ".join(cells) + " |")
    if args.json:
        rows = [{"weights": w, "depth": d, "host": h, "milliseconds": ms} for (w, d, h), ms in samples.items()]
        args.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
