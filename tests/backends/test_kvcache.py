"""kvcache.py: hidden states through a cache equal those of each row alone, whole and uncached."""

import pytest
import torch
from builders import tiny_model

from backends.kvcache import DecodeCache, PrefixCache, merge_attention, pad_rows
from gpu_kernels.decode_attention import plan_tiles
from modeling.attention import attend

MODELS = {
    "gpt": {},
    "llama": {},
    "window": {"sliding_window": 8},
    "window on later layers": {"sliding_window": 8, "full_attention_layers": (0,)},
    "qk-norm": {"qk_norm": True, "head_dim": 12},
}
IDS = torch.randint(0, 257, (3, 48), generator=torch.Generator().manual_seed(0))


def model_of(name):
    kind = "gpt" if name == "gpt" else "llama"
    return tiny_model(kind, std=0.15, **MODELS[name])


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_decoding_equals_no_cache(name):
    """Prompts of different length, kept once and shared by rows; rows decode, and one starts anew
    with another prompt. Hidden states equal those of each row alone, whole and uncached."""
    ours = model_of(name)
    prompts = [IDS[0, :5], IDS[1, :20], IDS[2, :9]]
    cache = DecodeCache(ours, n_prompts=3, prompt_len=20, n_rows=4, max_len=8)
    for slots in ([2, 0], [1]):
        padded = torch.from_numpy(pad_rows([prompts[s].tolist() for s in slots]))
        hidden = ours.hidden(padded, cache=cache.filling(slots, [len(prompts[s]) for s in slots]))
        for row, s in enumerate(slots):
            wanted = ours.hidden(prompts[s][None])[0]
            assert (hidden[row, : len(wanted)] - wanted).abs().max() < 1e-5, (s, "prefill")
    of_row = [2, 0, 1, 2]
    cache.assign(of_row)
    rows = [prompts[s].tolist() for s in of_row]
    for step in range(8):
        if step == 4:  # row 3 is done: it starts anew on prompt 0
            of_row[3], rows[3] = 0, prompts[0].tolist()
            cache.start(torch.arange(4) == 3, torch.tensor(of_row, dtype=torch.float64))
            cache.group_rows(of_row)
        ids = IDS[torch.tensor([0, 1, 2, 0]), 30 + step]
        rows = [[*row, int(i)] for row, i in zip(rows, ids, strict=True)]
        hidden = ours.hidden(ids[:, None], cache=cache)
        cache.advance(torch.ones(4, dtype=torch.int32))
        for b, row in enumerate(rows):
            wanted = ours.hidden(torch.tensor([row]))[0, -1]
            assert (hidden[b, 0] - wanted).abs().max() < 1e-5, (b, step)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("prefix", [3, 20])
@torch.no_grad()
def test_one_prefix_serves_many_batches(name, prefix):
    """Nothing is kept of a continuation, so the next one starts from the prefix again. Right
    padding changes nothing before it."""
    ours = model_of(name)
    cache = PrefixCache(ours, prefix)
    hidden = ours.hidden(IDS[:1, :prefix], cache=cache.filling())
    assert (hidden - ours.hidden(IDS[:1, :prefix])).abs().max() < 1e-5
    for first, T in ((20, 6), (26, 12)):
        batch = IDS[:, first : first + T].clone()
        batch[1, 4:] = 0
        whole = torch.cat((IDS[:1, :prefix].expand(3, -1), batch), dim=1)
        wanted = ours.hidden(whole)[:, prefix:]
        assert (ours.hidden(batch, cache=cache) - wanted).abs().max() < 1e-5


@torch.no_grad()
def test_a_row_that_is_full_stays_in_its_last_slot():
    """Its position must not leave the table, nor its key the room, until the host gives it away."""
    model = tiny_model("gpt", max_position_embeddings=8)
    cache = DecodeCache(model, n_prompts=1, prompt_len=4, n_rows=2, max_len=4)
    model.hidden(IDS[:1, :4], cache=cache.filling([0], [4]))
    for _ in range(7):
        assert model.hidden(IDS[:2, :1], cache=cache).isfinite().all()
        cache.advance(torch.tensor([1, 0]))
    assert cache.lengths.tolist() == [3, 0]
    cache.start(torch.tensor([True, False]), torch.zeros(2))
    assert cache.lengths.tolist() == [0, 0]


def test_changes_stay_in_the_same_tensors():
    """What a CUDA graph has captured reads these addresses for ever."""
    cache = DecodeCache(tiny_model("llama"), n_prompts=3, prompt_len=5, n_rows=4, max_len=6)
    names = ("prompt_lengths", "lengths", "row_prompt", "tiles")
    before = {name: getattr(cache, name).data_ptr() for name in names}
    cache.filling([1, 2], [5, 3])
    cache.start(torch.tensor([True] * 4), torch.tensor([0.0, 1.0, 2.0, 1.0]))
    cache.group_rows([0, 1, 2, 1], cache.new_staging(pin_memory=False))
    cache.advance(torch.tensor([1, 0, 1, 1]))
    assert {name: getattr(cache, name).data_ptr() for name in names} == before
    assert cache.prompt_lengths.tolist() == [0, 5, 3]
    assert cache.row_prompt.tolist() == [0, 1, 2, 1] and cache.lengths.tolist() == [1, 0, 1, 1]
    assert torch.equal(cache.tiles, plan_tiles([0, 1, 2, 1], 3, 2, torch.float32))
    cache.assign([2, 2, 0, 1])
    assert torch.equal(cache.tiles, plan_tiles([2, 2, 0, 1], 3, 2, torch.float32))


def test_merging_is_attention_over_all_keys():
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, n, 8, generator=g) for n in (5, 12, 12))
    parts = [
        attend(q, k[:, :, a], v[:, :, a], causal=False, lse=True) for a in (slice(7), slice(7, 12))
    ]
    wanted = attend(q, k, v, causal=False)
    torch.testing.assert_close(merge_attention(*parts[0], *parts[1]), wanted, atol=1e-5, rtol=1e-5)


def test_rows_are_padded_on_the_right():
    assert pad_rows([[1, 2, 3], [4]]).tolist() == [[1, 2, 3], [4, 0, 0]]
    assert pad_rows([[5]], 2).tolist() == [[5, 0]]
