"""tasks/prompts.py: rows of tokens against the texts encoded whole. That they are lm-eval's is
tests/test_mmlu_oracle.py's to say."""

from collections import Counter

import numpy as np
import pytest
from builders import mmlu_prompts, small_mmlu, tiny_model

from mmlu_eval import evaluate_mmlu
from tasks.questions import read_data
from tasks.templates import load_template
from tokenizer import build_tokenizer


def whole_rows(prompts):
    rows = prompts.rows
    return [[*rows.prefixes[g], *ids] for g, ids in zip(rows.prefix, rows.ids)]


@pytest.mark.parametrize(
    "template,letters",
    [
        ("lm_eval", [" A", " B", " C", " D"]),
        ("zh", [" A", " B", " C", " D"]),
        ("cmmlu", list("ABCD")),
    ],
)
def test_letters_are_what_follows_the_prompt(template, letters, gpt2, data_dir):
    data = read_data(data_dir / "mmlu", 1, subjects=["sociology"], limit=2)
    _, prompts = mmlu_prompts(gpt2, data, template)
    assert prompts.rows.choice_ids == [gpt2.encode(letter)[0] for letter in letters]
    byte_maker, _ = mmlu_prompts(build_tokenizer("byte"), data, template)
    assert [bytes(ids.tolist()).decode() for ids in byte_maker.letters] == letters


@pytest.mark.parametrize("name", ["gpt2", "tiktoken", "byte"])
def test_rows_are_the_prompts_encoded_whole(name, gpt2, data_dir, monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(data_dir / "tiktoken"))
    tokenizer = gpt2 if name == "gpt2" else build_tokenizer("gpt2" if name == "tiktoken" else name)
    data = read_data(data_dir / "mmlu", 5, limit=4)
    for template in ("lm_eval", "zh"):
        rendered = load_template(template)
        _, prompts = mmlu_prompts(tokenizer, data, template, 10**6)
        rows = whole_rows(prompts)
        for i, q in enumerate(data.questions):
            head = rendered.render_head(q.subject, None, data.examples[q.subject], "letter")
            text = (head + rendered.render_question(q)).rstrip()
            common = [32] if name == "byte" else []  # " A" is two bytes: the space is shared
            assert rows[i] == [*tokenizer.encode(text), *common]
        cached = prompts.rows.unique_tokens()
        assert cached < 0.5 * sum(map(len, rows))


def test_prefixes_are_the_longest_shared_tokens(gpt2, data_dir):
    data = read_data(data_dir / "mmlu", 5, subjects=["anatomy", "astronomy"], limit=20)
    _, prompts = mmlu_prompts(gpt2, data, "lm_eval")
    rows, whole = prompts.rows, whole_rows(prompts)
    assert len(rows.prefixes) == 2
    for g, prefix in enumerate(rows.prefixes):
        members = [whole[r] for r in np.flatnonzero(rows.prefix == g)]
        shared = next(i for i, column in enumerate(zip(*members)) if len(set(column)) > 1)
        assert len(prefix) == shared > 200


def test_what_does_not_fit_loses_its_last_examples(gpt2, data_dir):
    data = read_data(data_dir / "mmlu", 5, subjects=["professional_law"], limit=60)
    rendered = load_template("lm_eval")
    _, prompts = mmlu_prompts(gpt2, data, "lm_eval", 1024)
    order = np.argsort(prompts.question)
    kept = Counter()
    for r in order:
        q = data.questions[prompts.question[r]]
        k = int(prompts.shots[prompts.question[r], 0])
        kept[k] += 1
        lengths = []
        for shots in (k, k + 1):
            head = rendered.render_head(q.subject, None, data.examples[q.subject][:shots], "letter")
            lengths.append(gpt2.encode(head + rendered.render_question(q)))
        assert whole_rows(prompts)[r] == lengths[0]
        assert len(lengths[0]) <= 1024 and (k == 5 or len(lengths[1]) > 1024)
    assert len(kept) > 1 and min(kept) < 5, kept
    with pytest.raises(
        ValueError, match=r"professional_law_test.csv:\d+: the question alone takes"
    ):
        mmlu_prompts(gpt2, data, "lm_eval", 200)
    _, cut = mmlu_prompts(gpt2, data, "lm_eval", 200, truncate=True)
    assert cut.truncated > 10 and max(map(len, whole_rows(cut))) == 200
    for r in np.flatnonzero([len(row) == 200 for row in whole_rows(cut)]):
        q = data.questions[cut.question[r]]
        head = rendered.render_head(q.subject, None, [], "letter")
        assert whole_rows(cut)[r] == gpt2.encode(head + rendered.render_question(q))[-200:]


def test_bos_comes_first_where_the_tokenizer_adds_it(gpt2, data_dir, tmp_path):
    processors = pytest.importorskip("tokenizers").processors
    from transformers import AutoTokenizer

    fast = AutoTokenizer.from_pretrained(data_dir / "tokenizers" / "gpt2")
    fast.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 50256)]
    )
    fast.save_pretrained(tmp_path / "bos")
    tokenizer = build_tokenizer(tmp_path / "bos")
    assert tokenizer.adds_bos and not gpt2.adds_bos
    small_mmlu(tmp_path)
    _, prompts = mmlu_prompts(tokenizer, read_data(tmp_path, 1), "lm_eval", bos=True)
    bos = tokenizer.bos_token_id
    assert all(row.index(bos) == 0 and row.count(bos) == 1 for row in whole_rows(prompts))
    model = tiny_model(vocab_size=50257, max_position_embeddings=4096, std=0.15)
    with_bos = evaluate_mmlu(model, tokenizer, tmp_path, 1)
    without = evaluate_mmlu(model, tokenizer, tmp_path, 1, bos="off")
    asked_for = evaluate_mmlu(model, tokenizer, tmp_path, 1, bos="on")
    assert with_bos["protocol"]["bos"] and not without["protocol"]["bos"]
    assert np.abs(with_bos.arrays["logprobs"] - without.arrays["logprobs"]).max() > 1e-3
    assert asked_for["config_hash"] == with_bos["config_hash"] != without["config_hash"]
    with pytest.raises(ValueError, match="no BOS"):
        evaluate_mmlu(model, build_tokenizer("byte"), tmp_path, bos="on")
