"""tasks/harness.py: its ways to be quick against lm-eval's own code. That its answers are lm-eval's
is tests/test_harness_eval.py's to say."""

import random
from types import SimpleNamespace

import pytest

pytest.importorskip("lm_eval.evaluator", reason="lm-eval is not installed: no oracle")
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.utils import apply_template, env

from tasks import harness
from tokenizer import build_tokenizer

PIECES = ["\n", "\n\n", "\r\n", " ", "  ", "\t", "\u2003", "A", "Answer:", "B.", "'s", "x1", "日本"]
PIECES += ["é", "\u0301", "(C)", "!!", "<|endoftext|>", "\nQ: which?\nA:", "3.5", "\n- ", "\nÜber"]


def verbs_of(tokenizer, bos=False):
    """A model of which only the tokenizer is asked."""
    facts = SimpleNamespace(tokenizer=tokenizer, context=64)
    backend = SimpleNamespace(facts=facts)
    return harness.Verbs(
        backend, None, lambda highest: None, bos=bos, chat=None, batch_tokens=1, seed=0
    )


def requests_of(pairs):
    return [Instance("loglikelihood", {}, pair, 0, ("task", i, 1)) for i, pair in enumerate(pairs)]


def scored(model, ask, monkeypatch):
    """What a model is given to score: [(context's tokens, continuation's)]."""
    given = []
    monkeypatch.setattr(model, "_score", lambda pairs: given.extend(pairs) or [])
    ask()
    return [(list(map(int, before)), list(after)) for before, after in given]


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("name", ["gpt2", "tiktoken", "byte"])
def test_tokens_are_those_of_whole_texts(name, bos, gpt2, data_dir, monkeypatch):
    """Whatever texts consist of, and wherever they could be cut."""
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(data_dir / "tiktoken"))
    tokenizer = gpt2 if name == "gpt2" else build_tokenizer("gpt2" if name == "tiktoken" else name)
    if bos and tokenizer.bos_token_id is None:
        tokenizer.bos_token_id = tokenizer.eos_token_id
    rng, pairs = random.Random(0), []
    while len(pairs) < 1000:
        before, after = (
            "".join(rng.choices(PIECES, k=rng.randint(least, most)))
            for least, most in ((0, 12), (1, 3))
        )
        if before == "" or before.strip():
            pairs += [(before, after), (before, " B")]
    model = verbs_of(tokenizer, bos)
    requests = requests_of(pairs)
    theirs = scored(model, lambda: TemplateLM.loglikelihood(model, requests, True), monkeypatch)
    kept = [i for i, (_, after) in enumerate(theirs) if after]  # the others have their own error
    assert len(kept) > 900
    some = [requests[i] for i in kept]
    ours = scored(model, lambda: model.loglikelihood(some), monkeypatch)
    assert ours == [theirs[i] for i in kept]


def test_a_context_is_encoded_once_whatever_follows(gpt2, monkeypatch):
    seen, encode = [], gpt2.encode_batch
    monkeypatch.setattr(
        gpt2, "encode_batch", lambda texts, **how: seen.extend(texts) or encode(texts, **how)
    )
    context = "Q: Which of them?\n" * 30 + "Answer:"
    pairs = [(context, f" {letter}") for letter in "ABCD"]
    model = verbs_of(gpt2)
    scored(model, lambda: model.loglikelihood(requests_of(pairs)), monkeypatch)
    assert sum(map(len, seen)) < 1.2 * len(context)


def test_templates_are_compiled_once(monkeypatch):
    template = "{% set n = a | length %}{% for c in a %}{{ loop.index }}{{ c }}{% endfor %}{{ n }}"
    docs = [{"a": "xy"}, {"a": ["long", "list", "of"]}, {"a": ""}]
    wanted = ["1x2y2", "1long2list3of3", "0"]
    compiled, compile = [], env.compile
    monkeypatch.setattr(env, "compile", lambda text: compiled.append(text) or compile(text))
    with pytest.raises(KeyError), harness.compiled_once():
        assert [apply_template(template, doc) for doc in docs] == wanted
        assert compiled == [template]
        for n in (1, 2):  # as a task's own code may
            assert env.from_string("{{ n }}", globals={"n": n}).render() == str(n)
        raise KeyError
    assert apply_template(template, docs[0]) == wanted[0]
    assert compiled.count(template) == 2, "lm-eval is as it was"
