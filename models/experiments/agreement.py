"""The operator beside the recipes' own evaluator in PyTorch, document by document (or text by text).

  retro-run eval out/ledger --data models/ledger/documents.jsonl --resume ledger.jsonl --policy quest ...
  python3 agreement.py ledger ledger.jsonl --docs 32
  retro-run eval out/code --perplexity $FILES -n 1280 --resume code.jsonl --policy quest ...
  python3 agreement.py code code.jsonl --texts $FILES --tokens 1280

Reads the file of results (--resume) of retro-run eval, decodes the same documents under the same policies with the recipe's
model.py, and prints both means and the paired difference with its standard error. StreamingLLM, Quest and Retro with the paper's
selection: the recipe has no other. Needs PyTorch, numpy, tokenizers and safetensors; reads the weights beside it.
"""
import argparse, json, os, re, sys, time
HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.join(HERE, "..", "ledger", "recipe"))
import numpy as np
import torch
import task
from model import generate, load

torch.set_grad_enabled(False)


def results(path):
    """Results by (mode, window, budget) and document; of the paper's settings alone."""
    found = {}
    for line in open(path).read().splitlines()[1:]:
        d = json.loads(line)
        m = re.match(r"(Streaming|Quest|Retro) w=Some\((\d+)\) b=([0-9.]+) (.*)", d["policy"])
        if m and all(x in m[4] for x in ("page_size: 16", "sink_pages: 1", "selector: Bounds", "group_score: Max", "dense_layers: {}")):
            key = ({"Streaming": "stream", "Quest": "quest", "Retro": "retro"}[m[1]], int(m[2]), float(m[3]))
            found.setdefault(key, {})[d["item"]] = d["result"]
    return found


def judge(output, tok, answers):
    said = task.parse_answers(output, len(answers))
    return [s is not None and tok.id_to_token(s) == a for s, a in zip(said, answers)]


def estimate(x, digits):
    x = np.asarray(x, float)
    return "%.*f ± %.*f" % (digits, x.mean(), digits, x.std(ddof=1) / len(x) ** 0.5)


def main():
    ap = argparse.ArgumentParser()
    ap.add_argument("model", choices=["ledger", "code"])
    ap.add_argument("results")
    ap.add_argument("--docs", type=int, default=32)
    ap.add_argument("--n-predict", type=int, help="ledger: tokens an output may have [default: as eval with all documents]")
    ap.add_argument("--texts", nargs="*", default=[])
    ap.add_argument("--prompt", type=int, default=1024)
    ap.add_argument("--tokens", type=int, default=1280)
    ap.add_argument("--budgets", type=float, nargs="*", default=[0.10])
    ap.add_argument("--policies", nargs="*", default=["quest", "retro2", "retro8"], help="stream, quest, retroW")
    ap.add_argument("--threads", type=int, default=1)
    a = ap.parse_args()
    torch.set_num_threads(a.threads)
    from tokenizers import Tokenizer
    folder = os.path.join(HERE, "..", a.model)
    model, tok, known = load(folder), Tokenizer.from_file(os.path.join(folder, "tokenizer.json")), results(a.results)
    if a.model == "ledger":
        docs = [json.loads(line) for line in open(os.path.join(folder, "documents.jsonl"))]
        # As retro-run gives outputs room: all of the file's documents, or -n.
        longest = a.n_predict or max(len(tok.encode(d["reference"]).ids) for d in docs) + 4
        docs = docs[:a.docs]
        prompts = [tok.encode(d["prompt"]).ids for d in docs]
    else:
        docs = [([1] + tok.encode(open(f, encoding="utf-8").read()).ids)[:a.prompt + a.tokens] for f in a.texts]
        assert all(len(d) == a.prompt + a.tokens for d in docs), "a text is too short"
        prompts, rest = [d[:a.prompt] for d in docs], [d[a.prompt:] for d in docs]
        dense = forced(model, prompts, rest, mode="dense")
    for budget in a.budgets:
        base = None
        for policy in a.policies:
            mode, w = re.match(r"([a-z]+)(\d*)", policy).groups()
            w = int(w or 1)
            own = known.get((mode, w, budget), {})
            assert all(i in own for i in range(len(docs))), "%s has not all of %s at %g" % (a.results, policy, budget)
            start = time.time()
            how = dict(mode=mode, w=w, ratio=budget)
            name = "%-7s %.2f" % (policy, budget)
            if a.model == "ledger":
                outputs, stats = generate(model, prompts, longest, **how)
                right = [judge(o, tok, d["answers"]) for o, d in zip(outputs, docs)]
                theirs = np.array([100 * np.mean(r) for r in right])
                ours = np.array([100 * np.mean(own[i]["right"]) for i in range(len(docs))])
                same = sum(r == own[i]["right"] for i, r in enumerate(right))
                line = "PyTorch %s, operator %s, difference %s; %d of %d documents answer for answer alike" % (
                    estimate(theirs, 1), estimate(ours, 1), estimate(ours - theirs, 2), same, len(docs))
            else:
                other, stats = forced(model, prompts, rest, **how)
                p, _ = dense
                theirs = (p.exp() * (p - other)).sum(-1).mean(1).double().numpy()
                # The operator's sums begin with the token behind the prompt, which dense attention predicts: no divergence there.
                ours = np.array([sum(own[i]["divergence"]) / (sum(own[i]["tokens"]) - 1) for i in range(len(docs))])
                base = (theirs, ours) if policy == "quest" else base
                line = "PyTorch %s, operator %s, ratio %s" % (estimate(theirs, 4), estimate(ours, 4), estimate(ours / theirs, 4))
                if base is not None and policy != "quest":
                    line += "; share of Quest's: PyTorch %s, operator %s" % (estimate(theirs / base[0], 3), estimate(ours / base[1], 3))
            exposure = "; exposure %.2f" % stats["exposure"] if "exposure" in stats else ""
            print("%s: %s%s (%.0f s)" % (name, line, exposure, time.time() - start), flush=True)


def forced(model, prompts, rest, **how):
    """Log-probabilities behind every given token but the last, [texts, tokens - 1, vocabulary], and what was read."""
    logits = []
    _, stats = generate(model, prompts, len(rest[0]), forced=rest, logits_out=logits, eos=-1, **how)
    return torch.from_numpy(np.stack(logits, 1)).log_softmax(-1), stats


if __name__ == "__main__":
    main()
