"""Two selections that are calibrated on texts of their own, then compared on others: lambda (and rho) by head, and budgets by mass.

  python3 calibrated.py code --calibrate c.py d.py ... --texts a.py b.py ...
  python3 calibrated.py ledger --docs 8

By head: for every KV head (or query head) the lambda and rho of a grid whose pages keep most of the true attention mass. By mass:
as few pages as hold a share of the estimated mass, and the share at which the mean number of pages is that of the fixed budget.
The fixed budget is measured at what the budget by mass read as well, so that both read the same bytes. As pages.py: PyTorch,
w = 1, teacher-forced. ledger calibrates on the last documents of the file and compares on the first.
"""
import argparse, json, os, time
import torch
import torch.nn.functional as F
from pages import HERE, NEG, SIGNED, budget_pages, estimate, load, mass_left, pages_for, run, select

torch.set_grad_enabled(False)
LAMBDAS, RHOS = (1.0, 1.25, 1.5, 1.75, 2.0, 2.25, 2.5, 3.0, 3.5), (0.05, 0.1, 0.2, 0.3)
NINES = [0.1 * 1.06 ** i for i in range(110)]      # shares of the mass that are left out, from 10^-0.1 to 10^-57


def kept(S, true):
    """Share of every query head's attention that is in the pages S, [Hkv, g]."""
    return (true * S[:, None]).sum(-1).mean(-1)


class Calibration:
    """What every layer's heads keep of the true mass with every lambda and rho, and how many pages shares of the mass take."""

    def __init__(self, model, ratio, clamps):
        c = model.c
        self.ratio, self.clamps, self.texts, self.fixed = ratio, clamps, 0, 0.0
        self.by_rule = torch.zeros(len(LAMBDAS), len(RHOS), c.n_layers, c.n_kv, c.n_heads // c.n_kv)
        self.need = torch.zeros(len(clamps), len(NINES))

    def probe(self, layer, pages, q, scale, logits):
        true = estimate(pages, q, dict(kind="oracle"), scale, logits).softmax(-1)
        for i, lam in enumerate(LAMBDAS):
            for j, rho in enumerate(RHOS):
                how = dict(SIGNED, lam=lam, rho=rho)
                S = select(estimate(pages, q, how, scale, logits), pages, how, self.ratio, layer)
                self.by_rule[i, j, layer] += kept(S, true)
        s = estimate(pages, q, SIGNED, scale, logits)
        H, g, T, NP = s.shape
        index = torch.arange(NP)
        valid = index <= pages.newest[:, None]
        s = s.masked_fill(~valid, NEG)
        score = s.softmax(-1).sum(1).masked_fill(~valid, NEG)
        forced = ((index < 1) | (index == pages.newest[:, None])) & valid
        order = torch.sort(torch.where(forced, float("inf"), score), dim=-1, descending=True, stable=True).indices
        after = mass_left(s, order)
        k = torch.tensor(budget_pages(pages.t.numpy() + 1, pages.P, self.ratio, None, 4, 1))
        count = (pages.newest + 1).expand(H, T)
        self.fixed += k.float().mean().item()
        for n, clamp in enumerate(self.clamps):
            for m, nines in enumerate(NINES):
                self.need[n, m] += pages_for(10 ** -nines, after, k, *clamp).minimum(count).float().mean()

    def by_head(self, each_query_head):
        """Lambdas and rhos by layer, [Hkv, g or 1]."""
        rule = self.by_rule if each_query_head else self.by_rule.mean(-1, keepdim=True)
        best = rule.flatten(0, 1).argmax(0)
        return torch.tensor(LAMBDAS)[best // len(RHOS)], torch.tensor(RHOS)[best % len(RHOS)]

    def one_for_all(self):
        """One lambda for the whole model, with the usual rho."""
        return LAMBDAS[int(self.by_rule[:, RHOS.index(0.2)].flatten(1).mean(1).argmax())]

    def lambda_by_head(self):
        """Lambdas by layer, [Hkv, 1], with the usual rho."""
        return torch.tensor(LAMBDAS)[self.by_rule[:, RHOS.index(0.2)].mean(-1, keepdim=True).argmax(0)]

    def left(self, n):
        """The share of the mass that is left out when the mean number of pages is that of the fixed budget."""
        need = self.need[n] / self.fixed
        i = int((need < 1).sum().clamp(1, len(NINES) - 1))
        low, high = need[i - 1].item(), need[i].item()
        between = min(max((1 - low) / max(high - low, 1e-9), 0.0), 1.0)
        return 10 ** -(NINES[i - 1] + (NINES[i] - NINES[i - 1]) * between)


def ratios(x, y):
    """Mean of the texts' ratios and ratio of the means, with their standard errors."""
    n, each, r = len(x) ** 0.5, x / y, x.mean() / y.mean()
    return "%.3f +- %.3f (of the means %.3f +- %.3f)" % (each.mean(), each.std() / n, r, (x - r * y).std() / n / y.mean())


def main():
    ap = argparse.ArgumentParser()
    ap.add_argument("model", choices=["code", "ledger"])
    ap.add_argument("--calibrate", nargs="*", default=[], help="texts to calibrate on")
    ap.add_argument("--texts", nargs="*", default=[], help="texts to compare on")
    ap.add_argument("--docs", type=int, default=8)
    ap.add_argument("--prompt", type=int, default=1024)
    ap.add_argument("--tokens", type=int, default=384)
    ap.add_argument("--budget", type=float, default=0.10)
    ap.add_argument("--only", choices=["heads", "mass"])
    ap.add_argument("--threads", type=int, default=1)
    a = ap.parse_args()
    torch.set_num_threads(a.threads)
    from tokenizers import Tokenizer
    folder = os.path.join(HERE, "..", a.model)
    model, tok = load(folder), Tokenizer.from_file(os.path.join(folder, "tokenizer.json"))
    if a.model == "code":
        read = lambda f: (([1] + tok.encode(open(f, encoding="utf-8").read()).ids)[:a.prompt + a.tokens], a.prompt)
        learn, docs = [read(f) for f in a.calibrate], [read(f) for f in a.texts]
        assert all(len(ids) == a.prompt + a.tokens for ids, _ in learn + docs), "a text is too short"
        assert not set(a.calibrate) & set(a.texts), "texts to calibrate on are not texts to compare on"
    else:
        lines = [json.loads(line) for line in open(os.path.join(folder, "documents.jsonl"))]
        both = [(tok.encode(d["prompt"]).ids, tok.encode(d["reference"]).ids) for d in lines[:a.docs] + lines[-4:]]
        both = [(p + o, len(p)) for p, o in both]
        docs, learn = both[:a.docs], both[a.docs:]
    clamps, start = [(0.5, 2.0), (0.25, 4.0)], time.time()
    calibration = Calibration(model, a.budget, clamps)
    for ids, n0 in learn:
        run(model, ids, n0, SIGNED, a.budget, calibration.probe)
    each, heads, lone = calibration.by_head(True), calibration.by_head(False), calibration.lambda_by_head()
    left = [calibration.left(n) for n in range(len(clamps))]
    print("calibrated on %d texts (%.0f s)" % (len(learn), time.time() - start))
    print("lambda by KV head, layer by layer:", lone.squeeze(-1).tolist())
    print("lambda and rho by KV head:", [x.squeeze(-1).tolist() for x in heads])
    gain = calibration.by_rule / (len(learn))
    usual = gain[LAMBDAS.index(2.0), RHOS.index(0.2)].mean().item()
    print("attention mass kept: usual %.4f, by KV head %.4f, by query head %.4f (as if each chose alone)" % (
        usual, gain.mean(-1).flatten(0, 1).amax(0).mean(), gain.flatten(0, 1).amax(0).mean()))
    print("share of the mass left out:", ["%.3g" % x for x in left])
    n = len(docs) ** 0.5
    dense = [F.linear(model.hidden(torch.tensor([d]))[0, n0:], model.embed_tokens.weight).log_softmax(-1) for d, n0 in docs]

    def measure(name, how, ratio, base=None):
        began, kl, right, read = time.time(), [], [], 0.0
        for (ids, n0), D in zip(docs, dense):
            L, pages = run(model, ids, n0, how, ratio)
            read += pages / len(docs)
            kl.append((D.exp() * (D - L)).sum(-1).mean().item())
            if a.model == "ledger":
                hit = L[:-1].argmax(-1) == torch.tensor(ids[n0 + 1:])
                starts = [i for i, t in enumerate(ids[n0:]) if t == ids[n0]] + [len(ids) - n0]
                right.append(100 * sum(bool(hit[max(i - 1, 0):j - 1].all()) for i, j in zip(starts, starts[1:])) / (len(starts) - 1))
        kl, right = torch.tensor(kl), torch.tensor(right)
        line = "%-38s KL %.4f, pages %.2f" % (name, kl.mean(), read)
        for other, x in (base or {}).items():
            line += ", of %s's %s" % (other, ratios(kl, x[0]))
            if len(right):
                d = right - x[1]
                line += ", %+.1f +- %.1f points" % (d.mean(), d.std() / n)
        if len(right):
            line += ", problems right %.1f +- %.1f %%" % (right.mean(), right.std() / n)
        print(line + " (%.0f s)" % (time.time() - began), flush=True)
        return kl, right, read

    print("%d documents, budget %.2f" % (len(docs), a.budget))
    fixed = measure("fixed budget", SIGNED, a.budget)
    base = {"fixed": fixed}
    if a.only != "mass":
        alike = calibration.one_for_all()
        for lam in sorted({alike, 1.5, 2.5}):
            measure("lambda %g everywhere%s" % (lam, " (calibrated)" if lam == alike else ""), dict(SIGNED, lam=lam), a.budget, base)
        measure("lambda by KV head", dict(SIGNED, lams=lone), a.budget, base)
        measure("lambda and rho by KV head", dict(SIGNED, lams=heads[0], rhos=heads[1]), a.budget, base)
        measure("lambda and rho by query head", dict(SIGNED, lams=each[0], rhos=each[1]), a.budget, base)
    for share, clamp in zip(left, clamps) if a.only != "heads" else ():
        name = "by mass, %.3g left out, %g to %g times the pages" % (share, *clamp)
        how = dict(SIGNED, left=share, clamp=clamp)
        _, _, read = by_mass = measure(name, how, a.budget, base)
        # The same number of pages at a fixed budget: the mean length makes the budget that reads them.
        same = measure("fixed budget of the same pages", dict(SIGNED, floor=2), a.budget + (read - fixed[2]) * a.budget / fixed[2], base)
        print("  by mass over the fixed budget of its pages (%.2f and %.2f): %s" % (read, same[2], ratios(by_mass[0], same[0])), flush=True)


if __name__ == "__main__":
    main()
