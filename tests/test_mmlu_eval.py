"""mmlu_eval.py: data layouts, prompts, tokens, scores and tables, against literals, brute force and
models whose answers are known. The scores' oracle is tests/test_mmlu_oracle.py."""

import csv
import json
import math
import statistics
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import mmlu_eval
import results
from backends import scoring
from config import GPTConfig
from distributed import Dist
from mmlu_eval import evaluate_mmlu
from model import GPTModel
from tasks.prompts import PromptMaker
from tasks.questions import LETTERS, Question, load_template, read_data, subject_table
from tokenizer import build_tokenizer

ROOT = Path(mmlu_eval.__file__).parent
CPU = torch.device("cpu")
SHAPES = {
    "gpt2": {},
    "llama": {
        "n_kv_heads": 2,
        "norm": "rmsnorm",
        "bias": False,
        "position": "rope",
        "gated_mlp": True,
        "activation": "silu",
        "tie_embeddings": False,
    },
    "mistral": {"position": "rope", "sliding_window": 150},
}


def make_model(shape="gpt2", context=4096, vocab_size=50257, scale=0.15):
    torch.manual_seed(0)
    config = GPTConfig(
        vocab_size=vocab_size,
        max_position_embeddings=context,
        n_layers=2,
        n_heads=4,
        d_model=32,
        d_ff=64,
        dropout=0.0,
        **SHAPES[shape],
    )
    model = GPTModel(config)
    for p in model.parameters():
        if p.dim() > 1:
            torch.nn.init.normal_(p, std=scale)
    return model.for_inference(torch.float32)


@pytest.fixture(scope="session")
def gpt2(data_dir):
    return build_tokenizer(data_dir / "tokenizers" / "gpt2")


# ---------------------------------------------------------------------------------------------
# Questions

ASKED = [
    Question("physics", 'What is\nnull, "quoted"?', ("None", "NA", "nan", "null"), 2, ""),
    Question("physics", "1 + 1 =", ("0", "1", "2", "3"), 2, ""),
    Question("zoology", "雪豹?", ("a, b", " c ", "D", "é"), 0, ""),
]
SHOWN = [
    Question(s, f"Example of {s}?", ("w", "x", "y", "z"), 3, "") for s in ("physics", "zoology")
]


def write_csv(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)


def by_subject(questions):
    return {s: [q for q in questions if q.subject == s] for s in ("physics", "zoology")}


def layout_mmlu(root):
    for split, questions in (("dev", SHOWN), ("test", ASKED)):
        for subject, own in by_subject(questions).items():
            rows = [[q.question, *q.choices, LETTERS[q.answer]] for q in own]
            write_csv(root / split / f"{subject}_{split}.csv", rows)


def layout_header(root):
    for split, questions in (("dev", SHOWN), ("test", ASKED)):
        for subject, own in by_subject(questions).items():
            rows = [[q.question, *q.choices, q.answer] for q in own]
            names = ["question", "A", "B", "C", "D", "answer"]
            write_csv(root / split / f"{subject}.csv", [names, *rows])


def layout_one_csv(root):
    for split, questions in (("dev", SHOWN), ("test", ASKED)):
        rows = [[q.subject, q.question, json.dumps(q.choices), q.answer] for q in questions]
        write_csv(root / f"{split}.csv", [["subject", "question", "choices", "answer"], *rows])


def layout_cmmlu(root):
    for split, questions in (("dev", SHOWN), ("test", ASKED)):
        for subject, own in by_subject(questions).items():
            rows = [[i, q.question, *q.choices, LETTERS[q.answer]] for i, q in enumerate(own)]
            names = ["", "Question", "A", "B", "C", "D", "Answer"]
            write_csv(root / split / f"{subject}.csv", [names, *rows])


def layout_jsonl(root):
    for split, questions in (("dev", SHOWN), ("test", ASKED)):
        rows = [q._asdict() | {"choices": list(q.choices)} for q in questions]
        (root / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def layout_parquet(root):
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    for split, questions in (("dev", SHOWN), ("test", ASKED)):
        for folder in ("all", "physics"):  # a data set's snapshot has each subject and all of them
            (root / folder).mkdir(exist_ok=True)
            rows = [q._asdict() | {"choices": list(q.choices)} for q in questions]
            rows = [{k: v for k, v in row.items() if k != "where"} for row in rows]
            table = pyarrow.Table.from_pylist(rows)
            parquet.write_table(table, root / folder / f"{split}-00000-of-00001.parquet")


LAYOUTS = [layout_mmlu, layout_header, layout_one_csv, layout_cmmlu, layout_jsonl, layout_parquet]


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda f: f.__name__)
def test_every_layout_gives_the_same_questions(layout, tmp_path):
    layout(tmp_path)
    data = read_data(tmp_path, 1)
    assert [q[:4] for q in data.questions] == [q[:4] for q in ASKED]
    assert [q[:4] for s in data.subjects for q in data.examples[s]] == [q[:4] for q in SHOWN]
    assert all(str(tmp_path) in q.where for q in data.questions)
    again = tmp_path / "again"
    again.mkdir()
    layout_mmlu(again)
    assert read_data(again, 1).hash == data.hash  # told by the content, not by the layout
    assert [q.subject for q in read_data(tmp_path, subjects=["zoology"]).questions] == ["zoology"]
    assert len(read_data(tmp_path, limit=1).questions) == 2


def test_ceval_is_read_from_val(tmp_path):
    names = ["id", "question", "A", "B", "C", "D", "answer", "explanation"]
    for split, answer in (("val", "B"), ("test", "")):
        write_csv(
            tmp_path / split / f"law_{split}.csv", [names, [0, "问", *"wxyz", answer, "because"]]
        )
    assert read_data(tmp_path, split="val").questions[0][:4] == ("law", "问", tuple("wxyz"), 1)
    with pytest.raises(ValueError, match=r"law_test.csv:2: no answer .*--split val"):
        read_data(tmp_path)


BAD_ROWS = [
    ("q,a,b,c,d,A\n\nq,a,b,c,A\n", r"x_test.csv:3: 5 fields where 6 are expected"),
    ('q,a,b,c,d,A\n"two\nlines",a,b,c,d,E\n', r"x_test.csv:2: answer 'E' is none of A to D"),
    ("q,a,b,c,d,4\n", r"x_test.csv:1: answer '4' is none of A to D, nor 0 to 3"),
    ("  ,a,b,c,d,A\n", r"x_test.csv:1: question is empty"),
    ('q,a,b,c,d,A\nq,"a"b,c,d,A\n', r"x_test.csv:2: not CSV"),
    ("question,A,B,C,D,answer\nq,a,b,c,d,\n", r"x_test.csv:2: no answer"),
    ("id,question,A,B,C,D\n0,q,a,b,c,d\n", r"x_test.csv:2: no answer .*--split val"),
    ("", r"x_test.csv:1: no question in this file"),
    ("question,choices,answer\nq,[1],A\n", r"x_test.csv:2: four choices expected, not \[1\]"),
]


@pytest.mark.parametrize("content,message", BAD_ROWS)
def test_bad_csv_rows_are_named_by_file_and_line(content, message, tmp_path):
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "x_test.csv").write_text(content)
    with pytest.raises(ValueError, match=message):
        read_data(tmp_path)


@pytest.mark.parametrize(
    "row,message",
    [
        ({"question": "q", "choices": list("abcd"), "answer": 1}, "subject is missing"),
        ({"question": None, "choices": list("abcd"), "answer": 1, "subject": "s"}, "question is"),
        (
            {"question": "q", "choices": [1, 2, 3, 4], "answer": 1, "subject": "s"},
            "A is missing or",
        ),
        ({"question": "q", "choices": list("abc"), "answer": 1, "subject": "s"}, "four choices"),
        ({"question": "q", "choices": list("abcd"), "answer": -1, "subject": "s"}, "answer '-1'"),
        ([1], "an object"),
    ],
)
def test_bad_jsonl_rows_are_named_by_file_and_line(row, message, tmp_path):
    good = {"question": "q", "choices": list("abcd"), "answer": 1, "subject": "s"}
    (tmp_path / "test.jsonl").write_text(json.dumps(good) + "\n" + json.dumps(row) + "\n")
    with pytest.raises(ValueError, match=rf"test.jsonl:2: {message}"):
        read_data(tmp_path)


def test_missing_data_says_where_to_get_it(tmp_path):
    with pytest.raises(ValueError, match=r"no test questions.*scripts/fetch_mmlu.sh.*dev/SUBJECT"):
        read_data(tmp_path)
    layout_mmlu(tmp_path)
    with pytest.raises(ValueError, match="no 'chemistry'; it has physics, zoology"):
        read_data(tmp_path, subjects=["chemistry"])
    with pytest.raises(ValueError, match=r"2 few-shot examples asked for.* 1 of subject 'physics'"):
        read_data(tmp_path, 2)
    with pytest.raises(ValueError, match=r"0 of subject 'zoology' \(one file has no dev"):
        read_data(tmp_path / "test" / "zoology_test.csv", 1)
    (tmp_path / "test" / "zoology_test.csv").unlink()
    with pytest.raises(ValueError, match="test split has no question of zoology, which the dev"):
        read_data(tmp_path)
    assert read_data(tmp_path, subjects=["physics"]).subjects == ["physics"]


def test_all_of_mmlu_and_cmmlu_is_read(data_dir):
    data = read_data(data_dir / "mmlu", 5)
    assert (len(data.questions), len(data.subjects)) == (14042, 57)
    table = subject_table(data.subjects)["categories"]
    sizes = Counter(table[q.subject] for q in data.questions)
    # the original's group sizes; lm-evaluation-harness moves the 135 of anatomy from other to stem
    assert sizes == {"stem": 3018, "humanities": 4705, "social_sciences": 3077, "other": 3242}
    chinese = read_data(data_dir / "cmmlu", 5)
    assert len(chinese.subjects) == 10
    assert subject_table(chinese.subjects)["names"]["agronomy"] == "农学"


# ---------------------------------------------------------------------------------------------
# Prompts

CAPITAL = Question("world_facts", " Capital of France? ", ("Rome", "Paris", "Oslo", "Bern"), 1, "")
LISTED = "Capital of France? \nA. Rome\nB. Paris\nC. Oslo\nD. Bern\n"
PROMPTS = {
    "lm_eval": "The following are multiple choice questions (with answers) about world facts.\n\n"
    "Capital of France?\nA. Rome\nB. Paris\nC. Oslo\nD. Bern\nAnswer: B\n\n",
    "hendrycks": "The following are multiple choice questions (with answers) about  world facts."
    f"\n\n {LISTED}Answer: B\n\n",
    "continuation": "The following are questions (with answers) about world facts.\n\n"
    "Question: Capital of France?\nAnswer: Paris\n\n",
    "zh": f"以下是一道选择题，请选出正确答案。\n问题:  {LISTED}答案: B\n\n",
    "cmmlu": "以下是关于世界的单项选择题，请直接给出正确答案的选项。\n\n"
    f"题目： {LISTED}答案是：B\n\n",
}


@pytest.mark.parametrize("name", PROMPTS)
def test_templates_byte_for_byte(name):
    template = load_template(name)
    scored = template.scorings[0]
    assert template.render_head("world_facts", "世界", [CAPITAL], scored) == PROMPTS[name]


def test_the_chinese_template_is_the_one_asked_for():
    q = Question("s", "{题}", ("甲", "{b}", "丙", "丁"), 0, "")  # braces in a text are text
    wanted = "以下是一道选择题，请选出正确答案。\n问题: {题}\nA. 甲\nB. {b}\nC. 丙\nD. 丁\n答案: "
    assert load_template("zh").render_question(q).encode() == wanted.encode()


def test_template_hashes_differ_and_do_not_depend_on_the_name(tmp_path):
    hashes = {load_template(name).hash for name in PROMPTS}
    assert len(hashes) == len(PROMPTS)
    copy = tmp_path / "mine.yaml"
    copy.write_bytes((ROOT / "configs" / "prompts" / "zh.yaml").read_bytes())
    assert load_template(copy).hash == load_template("zh").hash
    copy.write_text(copy.read_text().replace("选出", "给出"))
    assert load_template(copy).hash not in hashes


@pytest.mark.parametrize(
    "change,message",
    [
        (("{question}", "{questoin}"), "a field in braces is unknown: 'questoin'"),
        (("answer:", "anwser:"), "field 'answer' is unknown or missing|field 'anwser'"),
        (("{letter}", "the answer"), "answer must have {letter} or {choice}"),
    ],
)
def test_bad_templates_are_one_line(change, message, tmp_path):
    path = tmp_path / "mine.yaml"
    text = (ROOT / "configs" / "prompts" / "lm_eval.yaml").read_text().split("\n", 1)[1]
    path.write_text(text.replace(*change))
    with pytest.raises(ValueError, match=message):
        load_template(path)
    with pytest.raises(ValueError, match="'nope' is none of cmmlu, continuation, hendrycks"):
        load_template("nope")


# ---------------------------------------------------------------------------------------------
# Rows of tokens


def make_prompts(tokenizer, data, template, shots_context=4096, **options):
    template = load_template(template)
    options = {"rotations": 1, "truncate": False, "bos": False} | options
    scored = options.pop("scoring", template.scorings[0])
    share = options.pop("share", True)
    maker = PromptMaker(tokenizer, data, template, scored, shots_context, **options)
    return maker, maker.make(share)


def whole_rows(prompts):
    rows = prompts.rows
    return [[*rows.prefixes[g], *ids] for g, ids in zip(rows.prefix, rows.ids)]


@pytest.mark.parametrize(
    "template,letters",
    [
        ("lm_eval", [" A", " B", " C", " D"]),
        ("zh", [" A", " B", " C", " D"]),
        ("cmmlu", list(LETTERS)),
    ],
)
def test_letters_are_what_follows_the_prompt(template, letters, gpt2, data_dir):
    data = read_data(data_dir / "mmlu", 1, subjects=["sociology"], limit=2)
    _, prompts = make_prompts(gpt2, data, template)
    assert prompts.rows.choice_ids == [gpt2.encode(letter)[0] for letter in letters]
    byte_maker, _ = make_prompts(build_tokenizer("byte"), data, template)
    assert [bytes(ids.tolist()).decode() for ids in byte_maker.letters] == letters


@pytest.mark.parametrize("name", ["gpt2", "tiktoken", "byte"])
def test_rows_are_the_prompts_encoded_whole(name, gpt2, data_dir, monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(data_dir / "tiktoken"))
    tokenizer = gpt2 if name == "gpt2" else build_tokenizer("gpt2" if name == "tiktoken" else name)
    data = read_data(data_dir / "mmlu", 5, limit=4)
    for template in ("lm_eval", "zh"):
        rendered = load_template(template)
        _, prompts = make_prompts(tokenizer, data, template, 10**6)
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
    _, prompts = make_prompts(gpt2, data, "lm_eval")
    rows, whole = prompts.rows, whole_rows(prompts)
    assert len(rows.prefixes) == 2
    for g, prefix in enumerate(rows.prefixes):
        members = [whole[r] for r in np.flatnonzero(rows.prefix == g)]
        shared = next(i for i, column in enumerate(zip(*members)) if len(set(column)) > 1)
        assert len(prefix) == shared > 200


def test_what_does_not_fit_loses_its_last_examples(gpt2, data_dir):
    data = read_data(data_dir / "mmlu", 5, subjects=["professional_law"], limit=60)
    rendered = load_template("lm_eval")
    _, prompts = make_prompts(gpt2, data, "lm_eval", 1024)
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
        make_prompts(gpt2, data, "lm_eval", 200)
    _, cut = make_prompts(gpt2, data, "lm_eval", 200, truncate=True)
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
    layout_mmlu(tmp_path)
    _, prompts = make_prompts(tokenizer, read_data(tmp_path, 1), "lm_eval", bos=True)
    bos = tokenizer.bos_token_id
    assert all(row.index(bos) == 0 and row.count(bos) == 1 for row in whole_rows(prompts))
    model = make_model()
    with_bos = evaluate_mmlu(model, tokenizer, tmp_path, 1)
    without = evaluate_mmlu(model, tokenizer, tmp_path, 1, add_bos=False)
    assert with_bos["protocol"]["bos"] and not without["protocol"]["bos"]
    assert np.abs(with_bos["_arrays"]["logprobs"] - without["_arrays"]["logprobs"]).max() > 1e-3
    with pytest.raises(ValueError, match="no BOS"):
        evaluate_mmlu(model, build_tokenizer("byte"), tmp_path, add_bos=True)


# ---------------------------------------------------------------------------------------------
# Batches and ranks


@st.composite
def random_rows(draw):
    n_prefixes = draw(st.integers(1, 4))
    prefixes = [[7] * draw(st.integers(0, 300)) for _ in range(n_prefixes)]
    size = draw(st.integers(1, 60))
    group = sorted(draw(st.lists(st.integers(0, n_prefixes - 1), min_size=size, max_size=size)))
    lengths = draw(st.lists(st.integers(1, 400), min_size=size, max_size=size))
    ids = [np.full(n, 1) for n in lengths]
    return scoring.Continuations(prefixes, np.array(group), ids, [[]] * size, [1, 2])


@settings(max_examples=60, deadline=None)
@given(random_rows(), st.integers(64, 3000), st.sampled_from([None, 1, 5]), st.integers(1, 9))
def test_batches_hold_every_row_once_and_are_dealt_once(rows, max_tokens, max_rows, world_size):
    batches = scoring.plan_batches(rows, max_tokens, max_rows)
    assert sorted(r for b in batches for r in b.rows) == list(range(len(rows.ids)))
    for b in batches:
        assert all(rows.prefix[r] == b.prefix and len(rows.ids[r]) <= b.length for r in b.rows)
        assert b.tokens <= max_tokens or len(b.rows) == 1
        assert max_rows is None or len(b.rows) <= max_rows
        longest = rows.lengths[rows.prefix == b.prefix].max()
        assert b.length <= longest
    dealt = scoring.deal_batches(rows, batches, world_size)
    assert [i for share in dealt for i in share] == list(range(len(batches)))
    assert len(dealt) == world_size


def load_of(rows, batches, run):
    cost, previous = 0, None
    for i in run:
        cost += batches[i].tokens + batches[i].overhead
        if batches[i].prefix != previous:
            cost += len(rows.prefixes[batches[i].prefix]) + batches[i].overhead
        previous = batches[i].prefix
    return cost


@settings(max_examples=30, deadline=None)
@given(random_rows())
def test_no_contiguous_deal_has_a_smaller_largest_share(rows):
    batches = scoring.plan_batches(rows, 1000)[:9]
    n = len(batches)
    worst = [load_of(rows, batches, run) for run in scoring.deal_batches(rows, batches, 3)]
    brute = min(
        max(load_of(rows, batches, run) for run in (range(a), range(a, b), range(b, n)))
        for a in range(n + 1)
        for b in range(a, n + 1)
    )
    assert max(worst) == brute


class Rank(Dist):
    """One of several ranks in one process: `sum` leaves what this rank has."""

    def sum(self, values):
        return values.cpu().numpy()

    def gather(self, obj):
        return [obj]


@pytest.mark.parametrize("template", ["lm_eval", "continuation"])
def test_any_number_of_ranks_gives_the_same_bits(template, gpt2, data_dir):
    model = make_model("llama")
    data = read_data(data_dir / "mmlu", 2, subjects=["anatomy", "sociology", "virology"], limit=9)
    _, prompts = make_prompts(gpt2, data, template)
    batches = scoring.plan_batches(prompts.rows, 300)
    assert len(batches) > 6
    sums = []
    for world_size in (1, 2, 3):
        parts = [
            scoring.score_continuations(
                model, prompts.rows, batches, Rank(rank, world_size, 0, CPU)
            )
            for rank in range(world_size)
        ]
        choices, targets = zip(*parts)
        assert world_size == 1 or all(not p.any(axis=-1).all() for p in choices if p.size)
        sums.append((sum(choices), sum(targets)))
    for choices, targets in sums[1:]:
        assert np.array_equal(choices, sums[0][0]) and np.array_equal(targets, sums[0][1])


# ---------------------------------------------------------------------------------------------
# Scores


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("template", ["lm_eval", "continuation"])
def test_the_prefix_cache_changes_nothing(shape, template, gpt2, data_dir):
    model = make_model(shape)
    largest = 0.0
    logits = model.logits

    def watch(hidden):
        nonlocal largest
        out = logits(hidden)
        largest = max(largest, out.abs().max().item())
        return out

    model.logits = watch
    options = {"template": template, "subjects": ["anatomy", "sociology"], "limit": 8}
    cached, plain = (
        evaluate_mmlu(model, gpt2, data_dir / "mmlu", 3, prefix_cache=use, **options)
        for use in (True, False)
    )
    assert cached["protocol"]["prefix_cache"] and not plain["protocol"]["prefix_cache"]
    assert cached["data"]["tokens"] < 0.6 * plain["data"]["tokens"]
    assert cached["cost"]["tokens_unshared"] == plain["data"]["tokens"]
    a, b = cached["_arrays"]["logprobs"], plain["_arrays"]["logprobs"]
    bound = 1e-5 * max(1.0, largest)
    assert np.abs(a - b).max() < bound
    ties = [i for i, row in enumerate(np.sort(b)) if row[-1] - row[-2] < 2 * bound]
    differing = np.flatnonzero(a.argmax(-1) != b.argmax(-1))
    assert set(differing.tolist()) <= set(ties), f"differ on {differing}, ties are {ties}"


def test_running_out_of_memory_halves_the_batches(gpt2, data_dir, monkeypatch, capsys):
    model = make_model()
    options = {"subjects": ["anatomy"], "limit": 20}
    wanted = evaluate_mmlu(model, gpt2, data_dir / "mmlu", 2, **options)
    hidden = model.hidden

    def small_memory(ids, cache=None):
        if ids.numel() > 400:
            raise torch.OutOfMemoryError
        return hidden(ids, cache=cache)

    monkeypatch.setattr(model, "hidden", small_memory)
    found = evaluate_mmlu(model, gpt2, data_dir / "mmlu", 2, batch_tokens=4096, **options)
    assert 128 <= found["protocol"]["batch_tokens"] <= 512 < wanted["protocol"]["batch_tokens"]
    assert "out of memory" in capsys.readouterr().out
    assert found["config_hash"] == wanted["config_hash"]  # what was asked for is the same
    assert np.abs(found["_arrays"]["logprobs"] - wanted["_arrays"]["logprobs"]).max() < 1e-4


class Oracle(torch.nn.Module):
    """Any model's interface, with an answer chosen by looking at the prompt's tokens: `answer`
    maps the tokens before a position to the token that is almost certain there, or None."""

    supports_cache, is_native, config = False, False, None
    max_positions, vocab_size = 10**6, 257

    def __init__(self, answer):
        super().__init__()
        self.answer, self.weight = answer, torch.nn.Parameter(torch.zeros(1))

    def hidden(self, ids, positions=None, cache=None):
        assert cache is None
        out = torch.zeros(*ids.shape, 1)
        for b, row in enumerate(ids.tolist()):
            for t in range(len(row)):
                token = self.answer(bytes(min(i, 255) for i in row[: t + 1]))
                out[b, t] = -1 if token is None else token
        return out

    def logits(self, hidden):
        return 9.0 * torch.nn.functional.one_hot(hidden[..., 0].long() + 1, 258)[..., 1:].float()

    def nll(self, hidden, targets):
        return torch.nn.functional.cross_entropy(self.logits(hidden), targets, reduction="none")


def test_a_model_that_knows_the_answers_scores_everything(data_dir):
    """Under several templates and every scoring, the model being told what follows each prompt."""
    tokenizer = build_tokenizer("byte")
    options = {"subjects": ["anatomy", "econometrics"], "limit": 3}
    data = read_data(data_dir / "mmlu", subjects=options["subjects"], limit=3)

    def knows(template, scored):
        texts = {}
        rendered = load_template(template)
        for q in data.questions:
            for r in range(4):
                answer = rendered.render_answer(q, (q.answer - r) % 4, scored, r)
                text = rendered.render_question(q, r) + answer + "\x00"
                texts[text.encode()] = None
        known = [t for t in texts]

        def answer(before):
            for text in known:
                start = text[:40]
                at = before.rfind(start)
                own = before[at:]
                if at >= 0 and text.startswith(own) and len(own) < len(text):
                    return text[len(own)]
            return None

        return answer

    for template, scored in (("lm_eval", "letter"), ("zh", "letter"), ("continuation", None)):
        scored = scored or "continuation"
        model = Oracle(knows(template, scored))
        record = evaluate_mmlu(
            model,
            tokenizer,
            data_path=data_dir / "mmlu",
            template=template,
            scoring=scored,
            **options,
        )
        assert record["metrics"]["accuracy"] == {"value": 1.0, "stderr": 0.0, "n": 6}
        assert record["metrics"]["accuracy_macro"]["value"] == 1.0
    model = Oracle(knows("lm_eval", "letter"))
    record = evaluate_mmlu(
        model, tokenizer, data_dir / "mmlu", scoring="generate", permute_choices=2, **options
    )
    assert record["metrics"]["accuracy"]["value"] == 1.0
    assert record["metrics"]["accuracy_permuted"]["value"] == 1.0
    assert record["metrics"]["same_answer"]["value"] == 1.0
    assert record["metrics"]["answered"]["value"] == 1.0


class Told(Oracle):
    """Looks each whole prompt up and answers after its last byte, which 0 pads on the right."""

    def hidden(self, ids, positions=None, cache=None):
        out = torch.full((*ids.shape, 1), -1.0)
        for b, row in enumerate(ids.tolist()):
            prompt = bytes(row).rstrip(b"\x00")
            out[b, len(prompt) - 1] = ord(self.answer(prompt))
        return out


def test_planted_models_on_all_of_mmlu(data_dir):
    """One that knows the answers has all right; one that says C has exactly the share of C."""
    data, template = read_data(data_dir / "mmlu"), load_template("lm_eval")
    known = {}
    for q in data.questions:
        head = template.render_head(q.subject, None, [], "letter")
        known[(head + template.render_question(q) + " ").encode()] = LETTERS[q.answer]
    tokenizer, options = build_tokenizer("byte"), {"batch_tokens": 32768}
    share = statistics.mean(q.answer == 2 for q in data.questions)
    for answer, wanted in ((known.__getitem__, 1.0), (lambda prompt: "C", share)):
        record = evaluate_mmlu(Told(answer), tokenizer, data_dir / "mmlu", **options)
        assert record["metrics"]["accuracy"]["n"] == 14042
        assert record["metrics"]["accuracy"]["value"] == pytest.approx(wanted, abs=1e-12)
    assert record["breakdown"]["letter"]["C"]["predicted"] == 1.0


def always_c(tokenizer, data_dir):
    """A GPTModel that gives " C" a logit of 1 and every other token 0, whatever it reads."""
    model = make_model("llama")
    token = tokenizer.encode(" C")[0]
    with torch.no_grad():
        model.ln_f.weight.zero_()
    model.ln_f = torch.nn.LayerNorm(32).requires_grad_(False)
    model.ln_f.weight.zero_()
    model.ln_f.bias.copy_(torch.eye(32)[0])
    model.lm_head.weight.zero_()
    model.lm_head.weight[token, 0] = 1.0
    return model


def test_a_model_that_always_says_c_scores_the_share_of_c(gpt2, data_dir):
    model = always_c(gpt2, data_dir)
    subjects = ["anatomy", "us_foreign_policy", "virology"]
    record = evaluate_mmlu(
        model, gpt2, data_dir / "mmlu", 1, subjects=subjects, limit=25, permute_choices=4
    )
    data = read_data(data_dir / "mmlu", subjects=subjects, limit=25)
    share = statistics.mean(q.answer == 2 for q in data.questions)
    metrics, breakdown = record["metrics"], record["breakdown"]
    assert metrics["accuracy"]["value"] == share
    assert 0.1 < share < 0.5
    assert breakdown["letter"]["C"]["predicted"] == 1.0
    assert metrics["accuracy_permuted"]["value"] == 0.25  # each choice is at C once
    assert metrics["same_answer"]["value"] == 0.0
    p = math.e / (math.e + 3)  # of C among the letters
    assert metrics["ece"] == pytest.approx(abs(p - share), abs=1e-6)
    assert metrics["brier"] == pytest.approx(share * (1 - p) ** 2 + (1 - share) * p**2, abs=1e-6)
    full = 1 - math.log(math.e + 50256)
    assert record["_arrays"]["logprobs"][:, 2] == pytest.approx(full, abs=1e-5)


def test_figures_follow_from_the_questions_file(gpt2, data_dir, tmp_path):
    """Accuracy by subject, category, micro and macro, recomputed by hand from samples.jsonl."""
    subjects = ["anatomy", "virology", "sociology", "high_school_us_history", "marketing"]
    record = evaluate_mmlu(
        make_model(),
        gpt2,
        data_dir / "mmlu",
        2,
        subjects=subjects,
        limit=7,
        template="continuation",
    )
    path = results.save_record(tmp_path, record, record["_arrays"], record["_samples"]())
    loaded = results.load_record(path)
    samples = results.load_samples(loaded)
    arrays = results.load_arrays(loaded)
    assert len(samples) == 35 and [s["correct"] for s in samples] == arrays["correct"].tolist()
    by_subject, metrics = {}, loaded["metrics"]
    for s in samples:
        assert s["predicted"] == LETTERS[max(range(4), key=lambda i, s=s: s["logprobs"][i])]
        by_subject.setdefault(s["subject"], []).append(s["predicted"] == s["gold"])
    micro = statistics.mean(r for right in by_subject.values() for r in right)
    macro = statistics.mean(statistics.mean(right) for right in by_subject.values())
    assert metrics["accuracy"]["value"] == pytest.approx(micro, abs=1e-12)
    assert metrics["accuracy_macro"]["value"] == pytest.approx(macro, abs=1e-12)
    variances = [statistics.variance(right) / 7 for right in by_subject.values()]
    stderr = math.sqrt(sum(variances)) / len(variances)
    assert metrics["accuracy_macro"]["stderr"] == pytest.approx(stderr, abs=1e-12)
    for name, right in by_subject.items():
        cell = loaded["breakdown"]["subject"][name]["accuracy"]
        assert cell["value"] == pytest.approx(statistics.mean(right))
        assert cell["stderr"] == pytest.approx(math.sqrt(statistics.variance(right) / 7))
    other = by_subject["anatomy"] + by_subject["virology"] + by_subject["marketing"]
    cell = loaded["breakdown"]["category"]["other"]["accuracy"]
    assert (cell["value"], cell["n"]) == (pytest.approx(statistics.mean(other)), 21)
    normalised = [
        max(range(4), key=lambda i, s=s: s["logprobs"][i] / len(s["choices"][i])) for s in samples
    ]
    value = statistics.mean(LETTERS[i] == s["gold"] for i, s in zip(normalised, samples))
    assert metrics["accuracy_normalised"]["value"] == pytest.approx(value)
    assert loaded["protocol"]["limit"] == 7


@pytest.mark.parametrize(
    "text,letter",
    [(" B", 1), ("\n\nThe answer is (C).", 2), ("Because A", 0), ("BAD ABBA", -1), ("x\n\nA", -1)],
)
def test_first_letter_that_stands_alone(text, letter):
    assert mmlu_eval.first_letter(text) == letter


def test_a_small_vocabulary_is_refused(gpt2, data_dir):
    with pytest.raises(ValueError, match="the model has 300: name the tokenizer"):
        evaluate_mmlu(
            make_model(vocab_size=300), gpt2, data_dir / "mmlu", subjects=["anatomy"], limit=2
        )


# ---------------------------------------------------------------------------------------------
# The command


@pytest.fixture(scope="module")
def saved(data_dir, tmp_path_factory):
    import checkpoint

    directory = tmp_path_factory.mktemp("run") / "checkpoint-7"
    directory.mkdir()
    model = make_model("llama", context=1024)
    tokenizer = build_tokenizer(data_dir / "tokenizers" / "gpt2")
    checkpoint.write_weights(model, model.config, directory, tokenizer)
    return directory


def command(saved, data_dir, out, *flags, ranks=0):
    launch = [sys.executable]
    if ranks:
        launch += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    launch += [ROOT / "mmlu_eval.py", "--checkpoint-path", saved, "--device", "cpu"]
    return subprocess.run(
        [*launch, "--data-path", data_dir / "mmlu", "--results-dir", out, *flags],
        capture_output=True,
        text=True,
        timeout=600,
    )


def test_the_command_side_by_side(saved, data_dir, tmp_path):
    flags = ["--num-few-shot", "5", "--limit", "3", "--subjects", "anatomy", "virology"]
    flags += ["--log-samples", "--template", "lm_eval", "continuation", "zh"]
    flags += ["--scoring", "letter", "continuation"]
    done = command(saved, data_dir, tmp_path, *flags)
    assert done.returncode == 0, done.stderr
    columns = ["lm_eval/letter", "lm_eval/continuation", "continuation/continuation", "zh/letter"]
    assert all(name in done.stdout for name in [*columns, "zh/continuation"])
    assert "A PART OF THE QUESTIONS" in done.stdout and "micro" in done.stdout
    records = results.load_records(tmp_path)
    assert len(records) == 5 and all(r["checkpoint"]["name"] == "checkpoint-7" for r in records)
    assert {r["protocol"]["scoring"] for r in records} == {"letter", "continuation"}
    lines = next(tmp_path.rglob("mmlu-differences-*")).read_text().splitlines()
    differing = [json.loads(line) for line in lines]
    arrays = {mmlu_eval.column_of(r): results.load_arrays(r) for r in records}
    a, b = (arrays[name]["predicted"] for name in ("lm_eval/letter", "zh/letter"))
    listed = [d["id"] for d in differing if {"lm_eval/letter", "zh/letter"} <= d.keys()]
    assert listed == np.flatnonzero(a != b).tolist()


@pytest.mark.parametrize(
    "flags,message",
    [
        ("--template continuation --scoring letter", "shows no letters: --scoring continuation"),
        ("--template zh continuation --scoring letter", "with --template continuation, which"),
        ("--subjects alchemy", "no 'alchemy'"),
        ("--permute-choices 5", "--permute-choices must be 1 to 4, not 5"),
    ],
)
def test_bad_values_are_refused(flags, message, saved, data_dir, tmp_path):
    common = ["--checkpoint-path", str(saved), "--data-path", str(data_dir / "mmlu")]
    with pytest.raises(ValueError, match=message):
        mmlu_eval.main([*common, "--device", "cpu", *flags.split()])


def test_bad_flags_are_one_line_and_exit_2(saved, data_dir, tmp_path):
    done = command(saved, data_dir, tmp_path, "--data-path", str(tmp_path))
    assert done.returncode == 2 and "scripts/fetch_mmlu.sh" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1 and not done.stdout


@pytest.mark.slow
def test_torchrun_with_1_2_and_3_ranks_gives_the_same_bits(saved, data_dir, tmp_path):
    flags = ["--num-few-shot", "5", "--limit", "5", "--batch-tokens", "1024"]
    arrays = []
    for ranks in (1, 2, 3):
        done = command(saved, data_dir, tmp_path / str(ranks), *flags, ranks=ranks)
        assert done.returncode == 0, done.stderr
        arrays.append(next((tmp_path / str(ranks)).rglob("*.npz")).read_bytes())
    assert arrays[0] == arrays[1] == arrays[2]


@pytest.fixture(scope="module")
def trained(data_dir, tmp_path_factory):
    """A small model that train.py trained for a few steps on Shakespeare."""
    out = tmp_path_factory.mktemp("trained")
    flags = ["--train-data", data_dir / "text" / "tinyshakespeare.txt", "--seq-len", "128"]
    flags += ["--tokenizer-name", data_dir / "tokenizers" / "gpt2", "--num-steps", "12"]
    flags += ["--n-layers", "2", "--n-heads", "2", "--d-model", "64", "--d-ff", "128"]
    flags += ["--max-position-embeddings", "4096", "--batch-size", "4", "--max-tokens", "20000"]
    done = subprocess.run(
        [sys.executable, ROOT / "train.py", "--checkpoint-path", out, "--device", "cpu", *flags],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return next(out.glob("checkpoint-*"))


@pytest.mark.slow
@pytest.mark.parametrize("name,template,n", [("mmlu", "lm_eval", 14042), ("cmmlu", "cmmlu", None)])
def test_all_questions_through_the_command(name, template, n, trained, data_dir, tmp_path):
    """Five-shot on what train.py wrote; micro and macro recomputed from the questions' file."""
    flags = ["--num-few-shot", "5", "--template", template, "--log-samples"]
    flags += ["--data-path", str(data_dir / name)]
    done = command(trained, data_dir, tmp_path, *flags)
    assert done.returncode == 0, done.stderr
    (record,) = results.load_records(tmp_path)
    samples = [(s["subject"], s["predicted"] == s["gold"]) for s in results.load_samples(record)]
    files = (data_dir / name / "test").glob("*.csv")
    lines = sum(len(list(csv.reader(open(f, encoding="utf-8")))) for f in files)  # noqa: SIM115
    assert len(samples) == (n or lines - len(record["breakdown"]["subject"]))
    micro = statistics.mean(right for _, right in samples)
    subjects = {name for name, _ in samples}
    macro = statistics.mean(
        statistics.mean(right for s, right in samples if s == name) for name in subjects
    )
    metrics = record["metrics"]
    assert metrics["accuracy"]["value"] == pytest.approx(micro, abs=1e-12)
    assert metrics["accuracy_macro"]["value"] == pytest.approx(macro, abs=1e-12)
    assert f"{micro:.2%}" in done.stdout and f"{macro:.2%}" in done.stdout
    assert abs(micro - 0.25) < 0.05  # it knows nothing
    print(done.stdout[-700:])


def test_unique_flops_against_a_count_of_every_token():
    """Linear layers for each token once, attention for each pair, the head for each scored one."""
    config = SHAPES["gpt2"] | {"n_layers": 3, "n_heads": 2, "d_model": 8, "d_ff": 16}
    config = GPTConfig(vocab_size=11, max_position_embeddings=64, **config)
    rows = scoring.Continuations(
        [[1] * 5, [], [1] * 9],
        np.array([0, 0, 1]),
        [np.ones(2), np.ones(3), np.ones(4)],
        [[], [3], []],
        [1, 2],
    )
    tokens, pairs, scored = 5 + 2 + 3 + 4, 0, 3 + 1
    pairs += sum(range(1, 6)) + (6 + 7) + (6 + 7 + 8) + (1 + 2 + 3 + 4)
    linear = 3 * (8 * 24 + 8 * 8 + 2 * 8 * 16)  # products of a token
    wanted = 2 * tokens * linear + 4 * 8 * 3 * pairs + 2 * 8 * 11 * scored
    assert mmlu_eval.unique_flops(config, rows) == wanted


def test_the_transformers_fallback_scores_the_same(saved, gpt2, data_dir):
    """A model without a cache, transformers' own code, on the weights of a native one."""
    import checkpoint
    import transformers_model as hf_model

    options = {"subjects": ["anatomy", "sociology"], "limit": 4}
    fallback = hf_model.load_transformers(saved, torch.float32, CPU, None)
    assert not fallback.supports_cache
    found = evaluate_mmlu(fallback, gpt2, data_dir / "mmlu", 3, **options)
    native = checkpoint.load_model(saved, "float32")
    wanted = evaluate_mmlu(native, gpt2, data_dir / "mmlu", 3, **options)
    assert not found["protocol"]["prefix_cache"] and wanted["protocol"]["prefix_cache"]
    assert np.abs(found["_arrays"]["logprobs"] - wanted["_arrays"]["logprobs"]).max() < 1e-4
