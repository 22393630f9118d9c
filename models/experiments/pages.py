"""Which pages to read: selections compared before any of them is built into the operator.

  python3 pages.py code --texts a.py b.py ...      KL to dense attention, as a share of Quest's
  python3 pages.py ledger --docs 4                 the same, and problems answered right from first to last token

w = 1 and teacher-forced, so a layer can be run for all positions at once: the keys of every token come from the layer below,
whichever pages that one read. Needs PyTorch, tokenizers and safetensors; reads the weights beside it. Budgets count as in the
operator (at least 4 pages of 16); every variant reads the same number of bytes, summaries included, unless its name says otherwise.
"""
import argparse, json, math, os, sys, time
HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.join(HERE, "..", "ledger", "recipe"))
import torch
import torch.nn.functional as F
from model import load, budget_pages

torch.set_grad_enabled(False)
NEG = float("-inf")


class Pages:
    """Keys [Hkv, N, D] by page, and what is known of each page: whole pages, and the newest one at every decoding step."""

    def __init__(self, k, P, n0):
        H, N, D = k.shape
        self.P, self.NP = P, -(-N // P)
        self.k = k = torch.cat([k, k[:, -1:].expand(-1, self.NP * P - N, -1)], 1).view(H, self.NP, P, D)
        n = torch.arange(1, P + 1).view(1, 1, P, 1).float()
        mean, square = k.cumsum(2) / n, (k * k).cumsum(2) / n
        at = lambda x: x.reshape(H, self.NP * P, D)[:, n0:N]
        self.mean, self.sd = k.mean(2), k.var(2, unbiased=False).sqrt()
        self.mean_t, self.sd_t = at(mean), at((square - mean * mean).clamp_min(0).sqrt())
        self.low, self.high = k.amin(2), k.amax(2)
        self.low_t, self.high_t = at(k.cummin(2).values), at(k.cummax(2).values)
        self.t = torch.arange(n0, N)
        self.newest, self.count_t = self.t // P, (self.t % P + 1).float()

    def apart(self):
        return self.k - self.mean[:, :, None]

    def directions(self, n):
        """The n principal directions, each scaled to its spread, [Hkv, NP, n, D]: what they say of the covariance, the mean and the deviations do not."""
        d = self.apart()
        values, vectors = torch.linalg.eigh(torch.einsum("hpid,hpjd->hpij", d, d))
        e = torch.einsum("hpin,hpid->hpnd", vectors[..., -n:], d)
        e = e / e.norm(dim=-1, keepdim=True).clamp_min(1e-9)
        return e * (values[..., -n:].clamp_min(0) / self.P).sqrt()[..., None]

    def direction(self, rounds):
        """Power iteration from the key farthest from the mean; rounds None: the exact principal direction, scaled to its spread."""
        d = self.apart()
        gram = torch.einsum("hpid,hpjd->hpij", d, d)
        if rounds is None:
            return self.directions(1)[:, :, 0]
        far = gram.diagonal(dim1=-2, dim2=-1).argmax(-1)
        e = d.gather(2, far[..., None, None].expand(-1, -1, 1, d.shape[-1]))[:, :, 0]
        for _ in range(rounds):
            e = torch.einsum("hpi,hpid->hpd", torch.einsum("hpd,hpid->hpi", e, d), d)
            e = e / e.norm(dim=-1, keepdim=True).clamp_min(1e-9)
        return e


def estimate(pages, q, how, scale, logits):
    """Log masses that a summary tells, [Hkv, g, T, NP], for queries [Hkv, g, T, D]."""
    # lambda and rho: numbers, or [Hkv, 1] or [Hkv, g], by head
    wide = lambda x: torch.as_tensor(x)[..., None, None]
    kind, lam, rho, P = how["kind"], wide(how.get("lam", 2.0)), wide(how.get("rho", 0.2)), pages.P
    along = lambda a, b: torch.einsum("hgtd,hpd->hgtp", a, b)
    now = lambda a, b: (a * b[:, None]).sum(-1)
    q2 = q * q
    mean = scale * along(q, pages.mean) + math.log(P)
    if kind == "bounds":
        s = scale * (along(q.clamp_min(0), pages.high) + along(q.clamp_max(0), pages.low))
        newest = scale * (now(q.clamp_min(0), pages.high_t) + now(q.clamp_max(0), pages.low_t))
    else:
        newest = scale * (now(q, pages.mean_t) + lam[..., 0] * now(q2, pages.sd_t ** 2).sqrt()) + pages.count_t.log()
    if kind == "moments":
        s = mean + lam * scale * along(q2, pages.sd ** 2).sqrt()
    elif kind == "signed":
        v = torch.where(pages.direction(how.get("rounds", 2)) < 0, -1.0, 1.0) * pages.sd
        s = mean + lam * scale * (rho * along(q, v) ** 2 + (1 - rho) * along(q2, v * v)).sqrt()
    elif kind == "principal":         # the direction in place of the deviations
        s = mean + lam * scale * along(q, pages.direction(None)).abs()
    elif kind == "directions":        # some principal directions, and deviations of what they leave
        e = pages.directions(how["extra"])
        rest = (pages.sd ** 2 - (e * e).sum(2)).clamp_min(0)
        s = mean + lam * scale * (along(q2, rest) + sum(along(q, x) ** 2 for x in e.unbind(2))).sqrt()
    elif kind == "covariance":        # the whole covariance: no two vectors hold it
        var = sum(along(q, d) ** 2 for d in pages.apart().unbind(2)) / P
        s = mean + lam * scale * var.sqrt()
    elif kind == "halves":            # means of the page's halves
        a, b = pages.k[:, :, :P // 2].mean(2), pages.k[:, :, P // 2:].mean(2)
        s = torch.logaddexp(scale * along(q, a), scale * along(q, b)) + math.log(P / 2)
        s = s + lam * scale * along(q2, (a - b) ** 2 / 4).sqrt()
    elif kind == "centroids":         # means of the keys on either side along the principal direction
        d = pages.apart()
        side = (torch.einsum("hpd,hpid->hpi", pages.direction(None), d) > 0).float()
        n = side.sum(-1)
        a = torch.einsum("hpi,hpid->hpd", side, pages.k) / n.clamp_min(1)[..., None]
        b = torch.einsum("hpi,hpid->hpd", 1 - side, pages.k) / (P - n).clamp_min(1)[..., None]
        size = lambda x: torch.where(x > 0, x.log(), torch.tensor(-1e9))[:, None, None]
        s = torch.logaddexp(scale * along(q, a) + size(n), scale * along(q, b) + size(P - n))
        s = s + lam * scale * along(q2, (a - b) ** 2 / 4).sqrt()
    elif kind == "oracle":            # the true mass: reads every key
        pad = pages.NP * P - logits.shape[-1]
        return torch.logsumexp(F.pad(logits, (0, pad), value=NEG).view(*logits.shape[:3], pages.NP, P), -1)
    s.scatter_(3, pages.newest[None, None, :, None].expand(s.shape[0], s.shape[1], -1, 1), newest[..., None])
    return s


def mass_left(s, order):
    """Share of the estimated mass that the pages behind each place of an order hold: summed from the end, as it may be 1e-20."""
    p = s.double().softmax(-1).mean(1).gather(-1, order)
    return p.flip(-1).cumsum(-1).flip(-1) - p


def pages_for(left, after, k, least, most):
    """Pages behind which at most a share `left` of the estimated mass is, between `least` and `most` times the fixed budget k."""
    return ((after > left).sum(-1) + 1).clamp(min=2).minimum((most * k).long()).maximum((least * k).long())


def select(s, pages, how, ratio, layer):
    """Pages read, [Hkv, T, NP] (or [Hkv, g, T, NP] with one selection a query head)."""
    H, g, T, NP = s.shape
    index = torch.arange(NP)
    valid = index <= pages.newest[:, None]
    forced = ((index < 1) | (index > pages.newest[:, None] - how.get("recent", 1))) & valid
    s = s.masked_fill(~valid, NEG)
    k = torch.tensor(budget_pages(pages.t.numpy() + 1, pages.P, ratio, None, how.get("floor", 64 // pages.P), 1))
    k = (k * how["shares"][layer]).round().long().clamp_min(2) if "shares" in how else k
    p = s.softmax(-1)
    for i in range(1, how.get("earlier", 0) + 1):      # the queries of the last steps take part
        p[:, :, i:] += how["decay"] ** i * s.softmax(-1)[:, :, :-i]
    group = how.get("group", "softmax")
    score = {"max": lambda: s.amax(1), "softmax": lambda: p.sum(1), "heads": lambda: p}[group]()
    score = torch.where(forced, float("inf"), score.masked_fill(~valid, NEG))
    if how.get("joint"):                               # the pages of all KV heads of a layer compete
        flat = score.permute(1, 0, 2).reshape(T, H * NP)
        order = torch.sort(flat, dim=-1, descending=True, stable=True).indices
        S = torch.zeros_like(flat, dtype=torch.bool).scatter_(-1, order, torch.arange(H * NP) < (H * k)[:, None])
        return S.view(T, H, NP).permute(1, 0, 2) & valid
    order = torch.sort(score, dim=-1, descending=True, stable=True).indices
    need = k
    if "mass" in how or "left" in how:                  # as few pages as hold this share of the estimated mass
        need = pages_for(how.get("left", 1 - how.get("mass", 0)), mass_left(s, order), k, *how.get("clamp", (0.5, 2)))
    S = torch.zeros_like(score, dtype=torch.bool).scatter_(-1, order, (index < need[..., None]).expand_as(score))
    return S & valid


def run(model, ids, n0, how, ratio, probe=None):
    """Log-probabilities of the tokens after positions n0.., and mean pages read a KV head. `probe` sees every layer's pages, queries and logits."""
    c, N = model.c, len(ids)
    T, g, scale, P = N - n0, c.n_heads // c.n_kv, 1 / math.sqrt(c.head_dim), how.get("page", 16)
    cos, sin = (x[:N] for x in model.tables(N, "cpu"))
    x, read = model.embed_tokens(torch.tensor([ids])), 0.0
    causal = torch.arange(N) <= torch.arange(n0, N)[:, None]
    for layer, b in enumerate(model.layers):
        q, k, v = (y[0] for y in b.self_attn.qkv(b.input_layernorm(x), cos, sin))
        wide = lambda y: y[None, :, :n0].repeat_interleave(g, 1)
        prompt = F.scaled_dot_product_attention(q[None, :, :n0], wide(k), wide(v), is_causal=True)[0]
        pages, qd = Pages(k, P, n0), q[:, n0:].reshape(c.n_kv, g, T, -1)
        logits = (torch.einsum("hgtd,hnd->hgtn", qd, k) * scale).masked_fill(~causal, NEG)
        if probe:
            probe(layer, pages, qd, scale, logits)
        here = dict(how, **{name: how[name + "s"][layer] for name in ("lam", "rho") if name + "s" in how})
        S = select(estimate(pages, qd, here, scale, logits), pages, how, ratio, layer)
        read += S.float().sum(-1).mean().item() / c.n_layers
        seen = S.repeat_interleave(P, -1)[..., :N]
        weights = logits.masked_fill(~(seen if seen.dim() == 4 else seen[:, None]), NEG).softmax(-1)
        out = torch.einsum("hgtn,hnd->hgtd", weights, v).reshape(c.n_heads, T, -1)
        o = torch.cat([prompt, out], 1).transpose(0, 1).reshape(1, N, -1)
        x = x + b.self_attn.o_proj(o)
        x = x + b.mlp(b.post_attention_layernorm(x))
    return F.linear(model.norm(x[0, n0:]), model.embed_tokens.weight).log_softmax(-1), read


SIGNED = dict(kind="signed")
# Keys and values of a page of 16 are 32 vectors, its summary 2: 0.10 of the context costs 0.10 * 2 + 2/16 vectors a token.
same_bytes = lambda ratio, page: ratio + 1 / 16 - 1 / page
VARIANTS = {
    "quest: bounds, max": dict(kind="bounds", group="max"),
    "bounds, softmax": dict(kind="bounds"),
    "moments, lambda 2": dict(kind="moments"),
    "signed": SIGNED,
    "signed, lambda 1.5": dict(SIGNED, lam=1.5),
    "signed, lambda 2.5": dict(SIGNED, lam=2.5),
    "signed, rho 0.1": dict(SIGNED, rho=0.1),
    "signed, rho 0.4": dict(SIGNED, rho=0.4),
    "signed by the farthest key": dict(SIGNED, rounds=0),
    "signed, exact direction": dict(SIGNED, rounds=None),
    "signed, lambda 1.5 to 2.5 by layer": dict(SIGNED, lams=[1.5, 1.7, 1.9, 2.1, 2.3, 2.5]),
    "signed, lambda 2.5 to 1.5 by layer": dict(SIGNED, lams=[2.5, 2.3, 2.1, 1.9, 1.7, 1.5]),
    "signed, newest two pages forced": dict(SIGNED, recent=2),
    "signed, last query takes part": dict(SIGNED, earlier=1, decay=0.7),
    "signed, last 3 queries take part": dict(SIGNED, earlier=3, decay=0.5),
    "signed, KV heads share a budget": dict(SIGNED, joint=True),
    "signed, one selection a query head": dict(SIGNED, group="heads", floor=2, scale=lambda m: m.c.n_kv / m.c.n_heads),
    "signed, budget by mass 0.7": dict(SIGNED, mass=0.7),
    "signed, budget by mass 0.8": dict(SIGNED, mass=0.8),
    "signed, budget by mass 0.9": dict(SIGNED, mass=0.9),
    "signed, more pages in early layers": dict(SIGNED, shares=[1.5, 1.3, 1.1, 0.9, 0.7, 0.5]),
    "signed, more pages in late layers": dict(SIGNED, shares=[0.5, 0.7, 0.9, 1.1, 1.3, 1.5]),
    "signed, pages of 8": dict(SIGNED, page=8),
    "signed, pages of 32": dict(SIGNED, page=32),
    "principal direction alone": dict(kind="principal", lam=1.0),
    "means of halves": dict(kind="halves", lam=0.5),
    "two centroids": dict(kind="centroids", lam=0.5),
    "and 1 direction (more bytes)": dict(kind="directions", extra=1),
    "and 2 directions (more bytes)": dict(kind="directions", extra=2),
    "and 4 directions (more bytes)": dict(kind="directions", extra=4),
    "and 8 directions (more bytes)": dict(kind="directions", extra=8),
    "and 1 direction": dict(kind="directions", extra=1, pay=True),
    "and 2 directions": dict(kind="directions", extra=2, pay=True),
    "whole covariance (more bytes)": dict(kind="covariance", lam=1.5),
    "whole covariance, lambda 2 (more bytes)": dict(kind="covariance"),
    "oracle: true mass": dict(kind="oracle"),
}


def main():
    ap = argparse.ArgumentParser()
    ap.add_argument("model", choices=["code", "ledger"])
    ap.add_argument("--texts", nargs="*", default=[])
    ap.add_argument("--docs", type=int, default=4)
    ap.add_argument("--prompt", type=int, default=1024)
    ap.add_argument("--tokens", type=int, default=256)
    ap.add_argument("--budget", type=float, default=0.10)
    ap.add_argument("--only", nargs="*", help="parts of names of variants")
    ap.add_argument("--threads", type=int, default=2)
    a = ap.parse_args()
    torch.set_num_threads(a.threads)
    from tokenizers import Tokenizer
    folder = os.path.join(HERE, "..", a.model)
    model, tok = load(folder), Tokenizer.from_file(os.path.join(folder, "tokenizer.json"))
    if a.model == "code":
        docs = [([1] + tok.encode(open(f, encoding="utf-8").read()).ids)[:a.prompt + a.tokens] for f in a.texts]
        docs = [(d, a.prompt) for d in docs if len(d) == a.prompt + a.tokens]
    else:
        lines = [json.loads(line) for line in open(os.path.join(folder, "documents.jsonl"))][:a.docs]
        docs = [(tok.encode(d["prompt"]).ids, tok.encode(d["reference"]).ids) for d in lines]
        docs = [(p + o, len(p)) for p, o in docs]
    dense = [F.linear(model.hidden(torch.tensor([d]))[0, n0:], model.embed_tokens.weight).log_softmax(-1) for d, n0 in docs]
    base, n = None, len(docs) ** 0.5
    print("%d documents, budget %.2f" % (len(docs), a.budget))
    for name, how in VARIANTS.items():
        if base is not None and a.only and not any(part in name for part in a.only):
            continue
        start, kl, right, read = time.time(), [], [], 0.0
        ratio = same_bytes(a.budget, how.get("page", 16)) * how.get("scale", lambda m: 1)(model)
        ratio -= how["extra"] / 32 if how.get("pay") else 0
        for (ids, n0), D in zip(docs, dense):
            L, pages = run(model, ids, n0, how, ratio)
            read += pages / len(docs)
            kl.append((D.exp() * (D - L)).sum(-1).mean().item())
            if a.model == "ledger":
                hit = L[:-1].argmax(-1) == torch.tensor(ids[n0 + 1:])
                starts = [i for i, t in enumerate(ids[n0:]) if t == ids[n0]] + [len(ids) - n0]
                right.append(sum(bool(hit[max(i - 1, 0):j - 1].all()) for i, j in zip(starts, starts[1:])) / (len(starts) - 1))
        kl = torch.tensor(kl)
        base = kl if base is None else base
        rel = kl / base
        line = "%-38s KL %.4f, of Quest's %.3f +- %.3f, pages %.1f" % (name, kl.mean(), rel.mean(), rel.std() / n, read)
        if right:
            right = 100 * torch.tensor(right)
            line += ", problems right %.1f +- %.1f %%" % (right.mean(), right.std() / n)
        print(line + " (%.0f s)" % (time.time() - start), flush=True)


if __name__ == "__main__":
    main()
