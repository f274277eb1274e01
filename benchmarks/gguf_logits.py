"""A GGUF's logits by llama.cpp's own kernels beside ours, which multiply the dequantised weights.

    python benchmarks/gguf_logits.py ours MODEL.gguf TEXT FOLDER            # in our environment
    LLAMA/bin/python benchmarks/gguf_logits.py theirs MODEL.gguf FOLDER     # with llama-cpp-python

llama.cpp rounds activations to 8 bits as they come into a quantised matrix; ours stay float32, and
so do the weights that codes stand for. FOLDER keeps our log-probabilities of some windows, each
with a fresh context; the second command says how far theirs lie from them, in the statistics of
llama.cpp's --kl-divergence, ours being the base. Results: benchmarks/results/quantised.md.
"""

import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
WINDOW, WINDOWS = 512, 8


def ours(model: str, text: str, folder: str) -> None:
    """Tokens [WINDOWS, WINDOW] and log-probabilities of what follows each but the last."""
    sys.path.insert(0, str(ROOT))
    import torch

    import checkpoint
    from tokenizer import build_tokenizer

    ckpt = checkpoint.open(model)
    assert ckpt.tokenizer is not None, "a GGUF holds one"
    ids = build_tokenizer(ckpt.tokenizer).encode(Path(text).read_text(encoding="utf-8")[:60_000])
    windows = np.array(ids[: WINDOWS * WINDOW]).reshape(WINDOWS, WINDOW)
    loaded = ckpt.load("float32")
    Path(folder).mkdir(parents=True, exist_ok=True)
    np.save(Path(folder) / "tokens.npy", windows)
    for i, window in enumerate(windows):
        with torch.no_grad():
            hidden = loaded.hidden(torch.tensor(window)[None])
            logits = loaded.logits(hidden)[0, :-1].double().log_softmax(-1)
        np.save(Path(folder) / f"{i}.npy", logits.float().numpy())


def theirs(model: str, folder: str) -> None:
    """The same windows through llama-cpp-python."""
    from llama_cpp import Llama

    windows = np.load(Path(folder) / "tokens.npy")
    llama = Llama(model, n_ctx=WINDOW, logits_all=True, n_threads=1, n_batch=WINDOW, verbose=False)
    nll, divergence, same, change = [], [], [], []
    for i, window in enumerate(windows):
        llama.reset()
        llama.eval(window.tolist())
        scores = np.array(llama.scores[: WINDOW - 1], dtype=np.float64)
        most = scores.max(1, keepdims=True)
        q = scores - most - np.log(np.exp(scores - most).sum(1, keepdims=True))
        p = np.load(Path(folder) / f"{i}.npy").astype(np.float64)
        at = np.arange(WINDOW - 1), window[1:]
        nll.append((-p[at], -q[at]))
        divergence.append((np.exp(p) * (p - q)).sum(1))
        same.append(p.argmax(1) == q.argmax(1))
        change.append(np.exp(q[at]) - np.exp(p[at]))
    base, found = np.concatenate(nll, axis=1)
    kl, dp = np.concatenate(divergence), np.concatenate(change)
    print(f"{len(kl):,} tokens: loss {base.mean():.6f} ours, {found.mean():.6f} llama.cpp's")
    print(f"difference {(found - base).mean():+.6f}, rms a token {np.std(found - base):.6f}")
    print(f"mean KLD {kl.mean():.6f}, median {np.median(kl):.6f}, 99% {np.quantile(kl, 0.99):.6f}")
    print(f"RMS dp {np.sqrt((dp**2).mean()):.4%}, same top p {np.mean(np.concatenate(same)):.3%}")


if __name__ == "__main__":
    {"ours": ours, "theirs": theirs}[sys.argv[1]](*sys.argv[2:])
