"""Generation against plain loops, transformers' `generate`, exact distributions, other batches,
other rank counts; stop strings and text against texts decoded whole; the engine as a server drives
it."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from builders import run_ranks, tiny_model
from scipy.stats import chi2
from test_sampling import exact_distribution

from backends import Sampling
from backends.engine import Capacity, Engine, generate, plan_units, shared_tokens
from checkpoint import load_model
from tokenizer import HuggingFaceTokenizer, build_tokenizer
from transformers_model import TransformersModel

SHAPES = {
    "gpt2": {"kind": "gpt"},
    "llama-gqa": {"kind": "llama"},
    "window": {"kind": "llama", "sliding_window": 5},
    "window-some-layers": {
        "kind": "llama",
        "sliding_window": 5,
        "full_attention_layers": (0,),
    },
    "qk-norm-head-dim": {"kind": "llama", "qk_norm": True, "head_dim": 12},
}


def small_model(kind="llama", std=0.1, **changes):
    changes = {"max_position_embeddings": 48} | changes
    return tiny_model(kind, std=std, **changes).for_inference(torch.float32)


@torch.no_grad()
def plain_greedy(model, prompt, n):
    """The no-cache loop: the whole sequence anew for every token."""
    ids = list(prompt)
    for _ in range(n):
        ids.append(int(model.logits(model.hidden(torch.tensor([ids]))[0, -1]).argmax()))
    return ids[len(prompt) :]


def ragged_prompts(n=7, seed=1, longest=12):
    g = np.random.default_rng(seed)
    return [g.integers(0, 257, size).tolist() for size in [1, longest, *g.integers(1, longest, n)]]


def by_index(samples):
    return {(s.prompt_index, s.sample_index): s for s in samples}


FIELDS = Sampling.__dataclass_fields__


def draw(model, prompts, **options):
    """`generate`'s samples by index. What Sampling has a field for is one value, or one a prompt;
    the seed is 0 unless given."""
    given = {"seed": 0} | {n: options.pop(n) for n in FIELDS if n in options}
    lists = {name: value for name, value in given.items() if isinstance(value, list)}
    one = Sampling(**{name: value for name, value in given.items() if name not in lists})
    each = [dict(zip(lists, values)) for values in zip(*lists.values())]
    sampling = [replace(one, **own) for own in each] if lists else one
    return by_index(generate(model, prompts, sampling, **options))


# ---------------------------------------------------------------------------------------------
# Greedy tokens


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("batch_size", [1, 3])
def test_greedy_equals_the_loop_without_a_cache(shape, batch_size):
    model, prompts = small_model(**SHAPES[shape]), ragged_prompts()
    lengths = [3, 14, 9, 1, 12, 5, 8, 14, 2]
    samples = draw(model, prompts, max_new_tokens=lengths, batch_size=batch_size)
    assert len(samples) == len(prompts)
    for i, (prompt, n) in enumerate(zip(prompts, lengths)):
        assert samples[i, 0].token_ids == plain_greedy(model, prompt, n), i
        assert samples[i, 0].finish_reason == "length"


@pytest.mark.parametrize("n_samples,batch_size", [(5, 3), (4, 16)])
def test_samples_of_a_prompt_share_it_and_are_right(n_samples, batch_size):
    model, prompts = small_model(), ragged_prompts(n=3)
    options = {"n_samples": n_samples, "batch_size": batch_size}
    samples = draw(model, prompts, max_new_tokens=9, **options)
    for (i, _), sample in samples.items():
        assert sample.token_ids == plain_greedy(model, prompts[i], 9)
    assert len(samples) == len(prompts) * n_samples


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("n_samples,batch_size", [(1, 5), (2, 64)])
def test_what_prompts_begin_with_is_kept_once(shape, n_samples, batch_size):
    """Two sets of examples before many questions each, and prompts that begin with neither: the
    same tokens as alone, and rows that keep no more than what is theirs."""
    g = np.random.default_rng(3)
    model = small_model(max_position_embeddings=128, **SHAPES[shape])
    begins = [g.integers(0, 257, 62).tolist(), g.integers(0, 257, 45).tolist()]
    prompts = [begins[i % 2] + g.integers(0, 257, 1 + i % 7).tolist() for i in range(40)]
    prompts += [g.integers(0, 257, n).tolist() for n in (1, 30, 69)]
    shared = shared_tokens(model, prompts, n_samples)
    assert shared[:40:2] == [62] * 20 and shared[1:40:2] == [45] * 20
    assert shared[40:] == [0, 29, 68]
    assert shared_tokens(model, prompts, 50) == [len(p) - 1 for p in prompts]
    options = {"n_samples": n_samples, "batch_size": batch_size, "temperature": 0.7}
    limits = g.integers(1, 12, len(prompts)).tolist()
    samples = draw(model, prompts, max_new_tokens=limits, **options)
    assert len(samples) == len(prompts) * n_samples
    for i in range(0, len(prompts), 3):  # one at a time, nothing is shared
        alone = draw(
            model, [prompts[i]], max_new_tokens=limits[i], keys=[i], **options | {"batch_size": 1}
        )
        for s in range(n_samples):
            assert samples[i, s].token_ids == alone[0, s].token_ids, i


def test_a_beginning_is_computed_once(monkeypatch):
    """... and the room for it is that of one prompt, however many go on from it."""
    model, seen = small_model(max_position_embeddings=128), []
    prompts = [[7] * 80 + [i, i + 1] for i in range(30)]
    hidden = model.hidden
    monkeypatch.setattr(
        model, "hidden", lambda ids, **kw: seen.append(tuple(ids.shape)) or hidden(ids, **kw)
    )
    samples = draw(model, prompts, max_new_tokens=4, batch_size=8)
    assert seen.count((1, 80)) == 8 and not [shape for shape in seen if shape[1] > 80]  # units
    assert {shape[1] for shape in seen} == {80, 1}
    for i in (0, 29):
        assert samples[i, 0].token_ids == plain_greedy(
            small_model(max_position_embeddings=128), prompts[i], 4
        )


def hf_model(kind):
    import transformers

    common = {"vocab_size": 97, "initializer_range": 0.3, "bos_token_id": 0, "eos_token_id": 0}
    if kind == "gpt2":
        config = transformers.GPT2Config(n_positions=64, n_embd=32, n_layer=2, n_head=4, **common)
    else:
        size = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
        size |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
        window = {"sliding_window": 6} if kind == "mistral" else {}
        name = {"llama": "LlamaConfig", "mistral": "MistralConfig"}[kind]
        config = getattr(transformers, name)(**common, **size, **window)
    torch.manual_seed(3)
    return transformers.AutoModelForCausalLM.from_config(config).float().eval()


def hf_greedy(model, prompt, n):
    ids = torch.tensor([prompt])
    options = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=n, **options)
    return out[0, len(prompt) :].tolist()


@pytest.mark.parametrize("kind", ["gpt2", "llama", "mistral"])
def test_greedy_equals_transformers_generate(kind, tmp_path):
    peer = hf_model(kind)
    peer.save_pretrained(tmp_path)
    model = load_model(tmp_path, dtype="float32")
    g = np.random.default_rng(5)
    prompts = [g.integers(1, 97, n).tolist() for n in (11, 4, 7, 2)]
    samples = draw(model, prompts, max_new_tokens=16, batch_size=3)
    fallback = TransformersModel(peer, None)  # the same model, without a cache
    plain = draw(fallback, prompts, max_new_tokens=16, batch_size=3)
    for i, prompt in enumerate(prompts):
        wanted = hf_greedy(peer, prompt, 16)
        assert len(set(wanted)) > 4, "a degenerate continuation would show little"
        assert samples[i, 0].token_ids == wanted
        assert plain[i, 0].token_ids == wanted


def test_the_fallback_samples_the_same_tokens(tmp_path):
    peer = hf_model("llama")
    peer.save_pretrained(tmp_path)
    model = load_model(tmp_path, dtype="float32")
    options = {"max_new_tokens": 10, "temperature": [0.9, 0.0, 1.2], "top_k": [0, 0, 9], "seed": 4}
    options |= {"n_samples": 2, "top_p": [0.8, 1.0, 0.95], "eos_ids": [5, 6, 7, 8]}
    prompts = [[1, 2], [3], [4, 9, 9]]
    ours = draw(model, prompts, batch_size=4, **options)
    plain = TransformersModel(peer, None)
    assert ours == draw(plain, prompts, batch_size=4, **options)


# ---------------------------------------------------------------------------------------------
# Samples


SETTINGS = [
    (1.0, 1.0, 0),
    (0.7, 1.0, 0),
    (1.3, 0.8, 0),
    (1.0, 1.0, 5),
    (0.9, 0.7, 6),
    (2.0, 0.3, 3),
]


@pytest.mark.parametrize("temperature,top_p,top_k", SETTINGS)
def test_sampled_tokens_follow_the_exact_distribution(temperature, top_p, top_k):
    """Through the whole engine: a model without layers' influence would show less than this."""
    model, n, prompt = small_model(vocab_size=13, std=0.2), 4000, [3, 1, 4, 1, 5]
    sampling = Sampling(2, temperature, top_p, top_k, seed=11)
    samples = generate(model, [prompt], sampling, n_samples=n, batch_size=500)
    pairs = np.zeros((13, 13))
    for sample in samples:
        pairs[tuple(sample.token_ids)] += 1
    with torch.no_grad():

        def law(ids):
            logits = model.logits(model.hidden(torch.tensor([ids]))[0, -1]).double().numpy()
            return exact_distribution(logits, temperature, top_p, top_k)

        first = law(prompt)
        expected = n * first[:, None] * np.array([law([*prompt, t]) for t in range(13)])
    assert (pairs[expected == 0] == 0).all(), "a token outside the nucleus was sampled"
    common = expected >= 5
    observed = np.append(pairs[common], pairs[~common].sum())
    wanted = np.append(expected[common], expected[~common].sum())
    kept = wanted > 0
    statistic = ((observed - wanted)[kept] ** 2 / wanted[kept]).sum()
    assert statistic < chi2.ppf(1 - 1e-4, max(1, kept.sum() - 1))


def test_a_sample_does_not_depend_on_batch_neighbours_or_order():
    model, prompts = small_model(), ragged_prompts(n=4)
    names = [f"task/{i}" for i in range(len(prompts))]
    options = {"max_new_tokens": 11, "temperature": 0.9, "top_p": 0.9, "seed": 3, "eos_ids": [7, 8]}
    whole = draw(model, prompts, n_samples=4, keys=names, batch_size=24, **options)
    assert len({tuple(s.token_ids) for s in whole.values()}) > 20
    for batch_size in (1, 5):
        assert whole == draw(
            model, prompts, n_samples=4, keys=names, batch_size=batch_size, **options
        )
    order = [4, 2, 0, 5]  # other neighbours, other units, fewer samples
    names, options = [names[i] for i in order], options | {"n_samples": 2, "batch_size": 3}
    for sample in draw(model, [prompts[i] for i in order], keys=names, **options).values():
        same = whole[order[sample.prompt_index], sample.sample_index]
        assert (sample.token_ids, sample.finish_reason) == (same.token_ids, same.finish_reason)
    names, options = [f"task/{i}" for i in range(len(prompts))], options | {"seed": 4}
    other = draw(model, prompts, keys=names, **(options | {"n_samples": 4}))
    assert sum(other[i].token_ids == whole[i].token_ids for i in whole) < 3


def test_done_samples_are_left_out_and_the_others_unchanged():
    model, prompts = small_model(), ragged_prompts(n=2)
    options = {"n_samples": 3, "max_new_tokens": 6, "temperature": 1.0, "batch_size": 2}
    whole = draw(model, prompts, **options)
    done = {(0, 1), (1, 0), (1, 1), (1, 2)}
    rest = draw(model, prompts, done=done, **options)
    assert rest.keys() == whole.keys() - done
    assert all(rest[i] == whole[i] for i in rest)


RANKS = f"""
    import json
    from backends import Sampling
    from backends.engine import generate
    prompts = {ragged_prompts(n=9)}
    model = builders.tiny_model("llama", std=0.1, max_position_embeddings=48)
    model = model.for_inference(torch.float32)
    sampling = Sampling(12, temperature=1.0, top_p=0.95, seed=0)
    samples = [s for kind in (None, "int8") for s in generate(
        model, prompts, sampling, n_samples=3, eos_ids=[9, 10], batch_size=4, dist=dist,
        kv_dtype=kind)]
    rows = [[s.prompt_index, s.sample_index, s.token_ids, s.finish_reason] for s in samples]
    everything = dist.gather(rows)
    if dist.is_main:
        print(json.dumps([sorted(sum(everything, [])), [len(r) for r in everything]]))
"""


def on_ranks(tmp_path, n):
    return json.loads(run_ranks(n, tmp_path, RANKS).stdout)


def test_identical_samples_on_1_2_and_3_ranks(tmp_path):
    alone, counts = on_ranks(tmp_path, 1)
    assert counts == [66] and len({tuple(row[2]) for row in alone}) > 25
    for n in (2, 3):
        together, counts = on_ranks(tmp_path, n)
        assert together == alone
        assert min(counts) > 0, "every rank had work"


def test_units_cover_every_prompt_once_and_do_not_know_the_world_size():
    for n_prompts, n_samples, batch in [(164, 200, 200), (164, 1, 64), (3, 1, 64), (1, 1, 1)]:
        units = plan_units(n_prompts, n_samples, batch)
        assert [i for unit in units for i in unit] == list(range(n_prompts))
        assert len(units) >= min(n_prompts, 8)
    assert max(len(unit) for unit in plan_units(164, 200, 200)) == 8


# ---------------------------------------------------------------------------------------------
# Endings and text


class Scripted(torch.nn.Module):
    """A model that says fixed tokens after each prompt: what follows prompt [p] is says[p]."""

    supports_cache, max_positions, device = False, None, torch.device("cpu")

    def __init__(self, says, vocab_size):
        super().__init__()
        self.says, self.V = says, vocab_size
        self.calls = 0

    def hidden(self, ids):
        self.calls += 1
        hidden = torch.zeros(*ids.shape, self.V)
        for row, out in zip(ids.tolist(), hidden):
            said = self.says[row[0]]
            for t in range(len(row)):
                out[t, said[t] if t < len(said) else 0] = 1.0
        return hidden

    def logits(self, hidden):
        return hidden


def says(tokenizer, *texts):
    """Prompt i is token i, chosen not to matter; the model answers with texts[i]."""
    answers = [list(t) if isinstance(t, list) else tokenizer.encode(t) for t in texts]
    return Scripted(dict(enumerate(answers)), tokenizer.vocab_size), [
        [i] for i in range(len(texts))
    ]


def test_stop_strings_across_tokens_cut_the_text():
    tok = build_tokenizer("byte")
    texts = [
        "return 1\ndef g():\n",
        "\n\n\nclass A",
        "no stop here at all",
        "#\ndef",
        "x\nde\ndef y",
    ]
    model, prompts = says(tok, *texts)
    stop = ("\ndef", "\nclass", "\n#")
    options = {"tokenizer": tok, "stop": stop, "max_new_tokens": 19, "batch_size": 2}
    samples = draw(model, prompts, **options)
    wanted = ["return 1", "\n\n", "no stop here at all", "#", "x\nde"]
    for i, text in enumerate(wanted):
        assert samples[i, 0].text == text
        stopped = any(s in texts[i] for s in stop)
        assert samples[i, 0].finish_reason == ("stop" if stopped else "length")
    # and the sequence ended with the token that completed the stop string
    assert len(samples[0, 0].token_ids) == len("return 1\ndef")
    assert len(samples[4, 0].token_ids) == len("x\nde\ndef")


def test_stop_strings_with_merged_tokens(data_dir):
    """GPT-2's tokens straddle the stop string on both sides: the text is cut inside a token."""
    tok = build_tokenizer(str(data_dir / "tokenizers" / "gpt2"))
    text = "    return a + b\n\n\nif __name__ == '__main__':\n    pass"
    model, prompts = says(tok, text)
    options = {"tokenizer": tok, "max_new_tokens": 40}
    for stop, wanted in [(("\nif",), "    return a + b\n\n"), (("urn a",), "    ret")]:
        (sample,) = draw(model, prompts, stop=stop, **options).values()
        assert (sample.text, sample.finish_reason) == (wanted, "stop")
    (sample,) = draw(model, prompts, stop=("never",), **options).values()
    assert sample.finish_reason == "length" and sample.text.startswith(text)


def test_the_earliest_stop_string_wins():
    tok = build_tokenizer("byte")
    model, prompts = says(tok, "ab\n\ncd")
    (sample,) = generate(model, prompts, Sampling(6, stop=("\n\n", "b\n")), tokenizer=tok)
    assert sample.text == "a"


def test_characters_split_between_tokens():
    tok = build_tokenizer("byte")
    model, prompts = says(tok, "é→🙂终止。x", "日本", "終", "a🙂")
    limits = [30, 5, 2, 4]  # 日本 cut after 5 of 6 bytes, 終 after 2 of 3, 🙂 after 3 of 4
    options = {"tokenizer": tok, "stop": ("终止",), "max_new_tokens": limits}
    samples = draw(model, prompts, **options)
    assert samples[0, 0].text == "é→🙂" and samples[0, 0].finish_reason == "stop"
    assert len(samples[0, 0].token_ids) == len("é→🙂终止".encode())
    assert samples[1, 0].text == "日"
    assert samples[2, 0].text == ""
    assert samples[3, 0].text == "a"


def test_a_prompt_that_ends_inside_a_character():
    tok = build_tokenizer("byte")
    smile = list("🙂".encode())
    model = Scripted({smile[0]: [0, *smile[2:], *tok.encode("!")]}, 257)
    (sample,) = generate(model, [smile[:2]], Sampling(3), tokenizer=tok)
    assert sample.text == "🙂!"


def sentencepiece_like():
    """A vocabulary with ▁ for spaces and byte fallback, decoded as Llama 2's is."""
    import tokenizers
    import transformers
    from tokenizers import decoders, models, pre_tokenizers

    words = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256))]
    words += ["▁", "▁▁▁▁", "▁return", "▁x", "def", "▁def", "a", "▁a", "f", "(", ")", ":"]
    vocab = {w: i for i, w in enumerate(words)}
    core = tokenizers.Tokenizer(
        models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True, ignore_merges=True)
    )
    core.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first")
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
         decoders.Strip(" ", 1, 0)]
    )  # fmt: skip
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    return HuggingFaceTokenizer(fast, "sentencepiece-like"), vocab


def test_sentencepiece_keeps_its_indentation_and_finds_stops():
    tok, vocab = sentencepiece_like()
    assert tok.decode([vocab["▁return"]]) == "return", "the trap: alone it loses its space"
    newline = vocab["<0x0A>"]
    answer = [vocab["▁▁▁▁"], vocab["▁return"], vocab["▁x"], newline, vocab["def"], vocab["▁a"]]
    model = Scripted({vocab["▁a"]: answer}, tok.vocab_size)
    prompts = [[vocab["▁a"]]]
    (sample,) = generate(model, prompts, Sampling(6, stop=("\ndef",)), tokenizer=tok)
    assert (sample.text, len(sample.token_ids)) == ("     return x", 5)
    (sample,) = generate(model, prompts, Sampling(6, stop=(" return",)), tokenizer=tok)
    assert (sample.text, len(sample.token_ids)) == ("    ", 2)


def test_eos_ends_a_sequence_and_is_not_part_of_it():
    tok = build_tokenizer("byte")
    model, prompts = says(tok, [*b"ab", 256, *b"cd"], [256], "abc")
    options = {"tokenizer": tok, "eos_ids": [256], "max_new_tokens": 3, "batch_size": 2}
    samples = draw(model, prompts, **options)
    got = [(s.text, s.token_ids, s.finish_reason) for _, s in sorted(samples.items())]
    assert got == [("ab", [97, 98], "eos"), ("", [], "eos"), ("abc", [97, 98, 99], "length")]


# ---------------------------------------------------------------------------------------------
# The context, and what is refused


@pytest.mark.parametrize("shape", ["gpt2", "llama-gqa"])
def test_generation_stops_at_the_end_of_the_context(shape):
    model = small_model(**SHAPES[shape])  # 48 positions
    g = np.random.default_rng(0)
    prompts = [g.integers(0, 257, n).tolist() for n in (48, 40, 3)]
    samples = draw(model, prompts, max_new_tokens=20, batch_size=2)
    for i, n in enumerate([1, 9, 20]):
        assert samples[i, 0].finish_reason == "length"
        assert samples[i, 0].token_ids == plain_greedy(model, prompts[i], n)


@pytest.mark.parametrize(
    "changes,message",
    [
        (
            {"prompts": [[1], [1] * 49]},
            "prompt 1 has 49 tokens, more than the model's context of 48",
        ),
        ({"prompts": [[1] * 50], "keys": ["HumanEval/3"]}, "prompt HumanEval/3 has 50 tokens"),
        ({"prompts": [[]]}, "prompt 0 has no tokens"),
        ({"n_samples": 0}, "n_samples must be at least 1"),
        ({"batch_size": 0}, "batch size must be at least 1"),
        ({"sampling": Sampling(stop=("\n",))}, "pass a tokenizer"),
        ({"sampling": [Sampling()]}, "sampling must be one, 2, or 2 of 1 each"),
        ({"sampling": [[Sampling()] * 2] * 2}, "sampling must be one, 2, or 2 of 1 each"),
        ({"keys": ["a", "a"]}, "keys must name each of 2 prompts once"),
    ],
)
def test_refused_before_anything_runs(changes, message):
    with pytest.raises(ValueError, match=message) as error:
        generate(small_model(), **({"prompts": [[1], [2]], "sampling": Sampling()} | changes))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"temperature": -0.1}, "--temperature must be 0 .greedy. or more, not -0.1"),
        ({"temperature": float("nan")}, "--temperature must be"),
        ({"top_p": 0.0}, "--top-p must be above 0"),
        ({"top_p": 1.5}, "--top-p must be above 0 and at most 1, not 1.5"),
        ({"top_k": -1}, "--top-k must be"),
        ({"max_new_tokens": 0}, "--max-new-tokens must be at least 1"),
        ({"stop": ("",)}, "--stop must be texts of a character or more"),
    ],
)
def test_parameters_out_of_range(changes, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**changes)


def test_no_prompts_no_samples():
    assert list(generate(small_model(), [], Sampling())) == []


def test_parameters_by_prompt_and_by_sample():
    model, prompts = small_model(), [[5, 6], [7]]
    temperatures, limits = [[0.0, 1.0], [1.0, 0.0]], [4, 9]
    each = [[Sampling(n, t, seed=0) for t in own] for n, own in zip(limits, temperatures)]
    samples = by_index(generate(model, prompts, each, n_samples=2, batch_size=3))
    assert samples[0, 0].token_ids == plain_greedy(model, prompts[0], 4)
    assert samples[1, 1].token_ids == plain_greedy(model, prompts[1], 9)
    options = {"n_samples": 2, "max_new_tokens": limits, "batch_size": 3}
    sampled = draw(model, prompts, temperature=1.0, **options)
    assert samples[0, 1] == sampled[0, 1] and samples[1, 0] == sampled[1, 0]
    assert sampled[0, 0] != samples[0, 0]


# ---------------------------------------------------------------------------------------------
# The engine, as a server drives it


class WithoutCache(torch.nn.Module):
    """A native model whose cache nobody uses."""

    supports_cache = False

    def __init__(self, model):
        super().__init__()
        self.model, self.hidden, self.logits = model, model.hidden, model.logits
        self.max_positions, self.device = model.max_positions, model.device


BOTH = pytest.mark.parametrize("wrap", [lambda m: m, WithoutCache], ids=["cached", "plain"])


def run(engine, until=lambda progress: False):
    """Steps until nothing is left, or `until`: (tokens by sample, samples by index)."""
    streamed, finished = {}, []
    while engine.busy:
        progress = engine.step()
        for token in progress.tokens:
            streamed.setdefault((token.request, token.sample_index), []).append(token)
        finished += progress.finished
        if until(progress):
            break
    return streamed, by_index(finished)


@BOTH
def test_requests_join_a_running_batch(wrap):
    """Tokens come one by one, and whoever else is there, a request gets what generate gives it."""
    plain, prompts = small_model(), ragged_prompts(n=5)
    eos, sampling = set(range(30)), Sampling(11, temperature=0.9, top_p=0.9, seed=3)
    wanted = by_index(generate(plain, prompts, sampling, n_samples=2, eos_ids=eos))
    server = Engine(wrap(plain), Capacity(3, 12, 20), eos_ids=eos)
    assert not server.busy and server.step() == ([], [])
    greedy = prompts[3]
    server.submit("greedy", greedy, Sampling(6))
    streamed, finished = {}, {}
    for i, prompt in enumerate(prompts):
        server.submit(f"r{i}", prompt, sampling, samples=range(2), key=i)
        for _ in range(i):
            progress = server.step()
            finished |= by_index(progress.finished)
            for token in progress.tokens:
                streamed.setdefault((token.request, token.sample_index), []).append(token)
    more, rest = run(server)
    finished |= rest
    for at, tokens in more.items():
        streamed[at] = streamed.get(at, []) + tokens
    assert len(finished) == 1 + 2 * len(prompts) and not server.busy
    for (i, s), sample in wanted.items():
        got = finished[f"r{i}", s]
        assert (got.token_ids, got.finish_reason) == (sample.token_ids, sample.finish_reason)
        assert [t.token_id for t in streamed.get((f"r{i}", s), [])] == sample.token_ids
    wanted = plain_greedy(plain, greedy, 6)
    wanted = wanted[: next((i for i, t in enumerate(wanted) if t in eos), 6)]
    assert finished["greedy", 0].token_ids == wanted
    assert {s.finish_reason for s in finished.values()} == {"eos", "length"}


@BOTH
@pytest.mark.parametrize("lag", [0, 2])
def test_cancelled_requests_free_their_rows(wrap, lag, monkeypatch):
    model, prompts = small_model(), ragged_prompts(n=4)
    server = Engine(wrap(model), Capacity(2, 12, 30))
    if lag and wrap is not WithoutCache:
        server.rows.lag = lag
        server.rows.make_buffers(lag + 2)
        server.rows.compiled = True  # reading is then not narrowed step by step
    for i, prompt in enumerate(prompts):
        server.submit(i, prompt, Sampling(25))
    for _ in range(4):
        assert all(token.request < 2 for token in server.step().tokens)
    server.cancel(0)  # running, with steps in flight
    server.cancel(4)  # waiting
    server.cancel("nobody")
    streamed, finished = run(server)
    assert finished.keys() == {(i, 0) for i in (1, 2, 3, 5)}
    assert streamed.keys() == finished.keys()
    for (i, _), sample in finished.items():
        assert sample.token_ids == plain_greedy(model, prompts[i], 25)
    server.submit(0, prompts[5], Sampling(3))  # its name is free again, and means another prompt
    assert run(server)[1][0, 0].token_ids == plain_greedy(model, prompts[5], 3)


@BOTH
@pytest.mark.parametrize("k", [0, 5])
def test_logprobs_of_the_tokens_drawn(wrap, k):
    model, prompts = small_model(), ragged_prompts(n=2)
    server = Engine(wrap(model), Capacity(3, 12, 9), logprobs=k)
    for i, prompt in enumerate(prompts):
        server.submit(i, prompt, Sampling(9, temperature=i % 2 * 0.8, top_k=7, seed=1))
    streamed, finished = run(server)
    for (i, _), tokens in streamed.items():
        ids = torch.tensor([prompts[i] + finished[i, 0].token_ids])
        with torch.no_grad():
            logits = model.logits(model.hidden(ids)[0, len(prompts[i]) - 1 : -1])
        wanted = logits.double().log_softmax(-1)
        assert len(tokens) == 9
        for token, expected in zip(tokens, wanted):
            top, values = token.logprobs
            assert top[0] == token.token_id and len(top) == len(values) == 1 + k
            np.testing.assert_allclose(values, expected[top].numpy(), atol=1e-5)
            np.testing.assert_allclose(values[1:], expected.topk(k).values.numpy(), atol=1e-5)
            if i % 2 == 0 and k:
                assert top[1] == token.token_id


@pytest.mark.parametrize(
    "prompt,sampling,message",
    [
        ([1] * 13, Sampling(4), "prompt x has 13 tokens, more than the 12 that there is room for"),
        ([1] * 49, Sampling(4), "more than the model's context of 48"),
        ([], Sampling(4), "prompt x has no tokens"),
        ([1], Sampling(10), "10 new tokens, more than the 9 that there is room for"),
        ([1], Sampling(4, stop=("a",)), "pass a tokenizer"),
    ],
)
def test_requests_that_do_not_fit_are_refused_alone(prompt, sampling, message):
    server = Engine(small_model(), Capacity(2, 12, 9))
    with pytest.raises(ValueError, match=message):
        server.submit("x", prompt, sampling)
    server.submit("x", [1], Sampling(3))
    with pytest.raises(ValueError, match="request x is already on its way"):
        server.submit("x", [1], Sampling(3))
    assert len(run(server)[1]) == 1
