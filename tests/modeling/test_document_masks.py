"""Document masks: what a packed row gives is what each document gives by itself, gradients too."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from builders import tiny_model

from modeling import attention
from modeling.attention import DocumentMask, attend

T = 40
LATENT = {"head_dim": None, "n_kv_heads": 4, "kv_lora_rank": 8, "q_lora_rank": 7}
LATENT |= {"qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 5}
MODELS = {
    "latent": ("llama", LATENT),
    "gpt": ("gpt", {}),
    "llama": ("llama", {"qk_norm": True}),
    "windowed": ("windowed", {"sliding_window": 6}),
    "mixed": (
        "windowed",
        {"sliding_window": 9, "full_attention_layers": (1,), "local_rope_theta": 100.0}
        | {"attention_softcap": 2.0},
    ),
}
# columns in which documents begin: of one token, at the end, one document, many
ROWS = [[0, 1, 2, 20, 39], [0], [0, 7, 17, 18, 30], list(range(T))]


def starts_of(rows, length=T):
    columns = np.arange(length)
    return torch.tensor(
        np.array([[max(b for b in begins if b <= c) for c in columns] for begins in rows])
    )


@pytest.mark.parametrize("name", MODELS)
def test_a_packed_row_is_its_documents_run_one_by_one(name):
    kind, changes = MODELS[name]
    model = tiny_model(kind, std=0.15, **changes)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(257, (len(ROWS), T), generator=generator)
    targets = torch.randint(257, (len(ROWS), T), generator=generator)

    def loss_of(logits, wanted):
        return F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), reduction="sum")

    packed = model.logits(model.hidden(ids, **model.within_documents(starts_of(ROWS))))
    loss_of(packed, targets).backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    for row, begins in enumerate(ROWS):
        for begin, end in zip(begins, [*begins[1:], T]):
            alone = model.logits(model.hidden(ids[row : row + 1, begin:end]))
            assert (alone[0] - packed[row, begin:end]).abs().max() < 1e-5
            loss_of(alone, targets[row : row + 1, begin:end]).backward()
    for gradient, p in zip(gradients, model.parameters(), strict=True):
        torch.testing.assert_close(gradient, p.grad, atol=1e-4, rtol=1e-4)
    assert (model.logits(model.hidden(ids)) - packed).abs().max() > 0.1  # a mask does something


def test_no_token_sees_another_document():
    """Every other document's tokens changed: a document's logits keep their bits."""
    model = tiny_model("llama", std=0.15)
    ids = torch.randint(257, (1, T), generator=torch.Generator().manual_seed(2))
    within = model.within_documents(starts_of([ROWS[2]]))
    before = model.hidden(ids, **within)
    for begin, end in zip(ROWS[2], [*ROWS[2][1:], T]):
        other = (ids + 1) % 257
        other[:, begin:end] = ids[:, begin:end]
        after = model.hidden(other, **within)
        assert torch.equal(after[:, begin:end], before[:, begin:end])


@pytest.mark.parametrize("window", [None, 1, 6, 40, 130, 1000])
@pytest.mark.parametrize("length", [1, 127, 128, 129, 300])
def test_blocks_are_those_of_the_mask(window, length):
    """What flex attention skips, and takes without looking, against torch's own reading of the
    dense mask."""
    from torch.nn.attention.flex_attention import create_block_mask

    dice = np.random.RandomState(length)
    rows = [[0, *np.flatnonzero(dice.rand(length) < rate)] for rate in (0, 0.005, 0.03, 0.5)]
    mask = DocumentMask(starts_of(rows, length), window)
    dense, got = mask.dense(), attention._document_blocks(mask.first_key)
    wanted = create_block_mask(
        lambda b, h, i, j: dense[b, 0, i, j], len(rows), None, length, length, device="cpu"
    )
    for count in ("kv", "full_kv", "q", "full_q"):
        counts = getattr(got, f"{count}_num_blocks"), getattr(wanted, f"{count}_num_blocks")
        assert torch.equal(*counts), count
        for mine, theirs, n in zip(
            getattr(got, f"{count}_indices").flatten(0, 2),
            getattr(wanted, f"{count}_indices").flatten(0, 2),
            counts[0].flatten().tolist(),
        ):
            assert mine[:n].tolist() == theirs[:n].tolist(), count


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize("softcap, scale", [(None, None), (2.0, 0.3)])
def test_attention_by_blocks_equals_the_dense_form(window, softcap, scale, monkeypatch):
    """The form that CUDA takes, as plain operations."""
    from torch.nn.attention.flex_attention import flex_attention

    monkeypatch.setitem(attention._COMPILED, "flex", flex_attention)
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(len(ROWS), h, T, 8, generator=g) for h in (4, 2, 2))
    mask = DocumentMask(starts_of(ROWS), window)
    blocks = attention._document_blocks(mask.first_key)
    got = attention._flex_attention(q, k, v, blocks, softcap, scale)
    terms = {"softcap": softcap, "scale": scale}
    wanted = attend(q, k, v, causal=True, window=window, mask=mask, **terms)
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)
    out, sums = attend(q, k, v, causal=True, mask=mask, lse=True, **terms)
    torch.testing.assert_close(out, wanted, atol=1e-5, rtol=1e-5)
    assert sums.shape == (len(ROWS), 4, T)


def test_activation_checkpointing_keeps_documents_apart():
    model = tiny_model("windowed", sliding_window=6, std=0.15)
    ids = torch.randint(257, (len(ROWS), T), generator=torch.Generator().manual_seed(2))
    gradients = []
    for model.activation_checkpointing in (False, True):
        model.zero_grad()
        model.hidden(ids, **model.within_documents(starts_of(ROWS))).sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    for a, b in zip(*gradients, strict=True):
        assert torch.equal(a, b)


def test_other_documents_are_not_compiled_anew(monkeypatch):
    """The form that CUDA takes, its graphs run by plain operations: one for all batches."""
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda self: True))
    blocks = [
        DocumentMask(starts_of(rows, 256), 50) for rows in (ROWS, [[0, 9], [0]] * 2, [[0]] * 4)
    ]
    monkeypatch.undo()
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    @torch.compile(backend=count, fullgraph=True, dynamic=False)
    def compiled(q, mask):
        return attention._flex_attention(q, q, q, mask.blocks, None, None)

    q = torch.randn(4, 2, 256, 8, generator=torch.Generator().manual_seed(0))
    for mask in blocks:
        with torch.no_grad():
            wanted = attend(q, q, q, causal=True, mask=mask.dense())
            torch.testing.assert_close(compiled(q, mask), wanted, atol=1e-5, rtol=1e-5)
    assert len(graphs) == 1
