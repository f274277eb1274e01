"""tasks/answers.py: lm-eval's own filters and metric as the oracle, and forms labelled by hand."""

import random
from fractions import Fraction
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from tasks import answers
from tasks.word_problems import load_prompt, read_problems

FORMS = Path(__file__).with_name("answer_forms.txt")


def labelled():
    for line in FORMS.read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            wanted, language, text = (part.strip(" ") for part in line.split("|", 2))
            yield wanted, language, text.replace("\\n", "\n").replace("\\t", "\t")


def test_numbers_are_read_as_people_read_them():
    forms = list(labelled())
    assert len(forms) >= 150
    read = [answers.number(text, language) for _, language, text in forms]
    wanted = [None if label == "none" else Fraction(label) for label, _, _ in forms]
    wrong = [(form, got) for form, got, want in zip(forms, read, wanted) if got != want]
    assert not wrong


@given(st.text(alphabet=st.characters(), max_size=60), st.sampled_from(["en", "de", "zh"]))
def test_any_text_has_one_number_or_none(text, language):
    assert isinstance(answers.number(text, language), Fraction | None)


@given(st.fractions(-(10**9), 10**9, max_denominator=100), st.sampled_from("$€ "))
def test_a_number_written_plainly_comes_back(value, unit):
    cents = Fraction(round(value * 100), 100)
    whole, part = divmod(abs(int(cents * 100)), 100)
    sign = "-" if cents < 0 else ""
    assert answers.number(f"So it is {sign}{unit}{whole:,}.{part:02d} at last.") == cents


# ---------------------------------------------------------------------------------------------
# lm-eval


def solutions(rng, n):
    """Ends of solutions as models write them, and traps for regular expressions."""
    numbers = ["7", "72", "70,000", "1,234.50", "-5", "$29.00", "0.5", ".5", "3/4", "50%", "72..."]
    frames = ["#### {}", "####{}", "#### {}\n", "The answer is {}.", "The answer is {}", "so {}"]
    frames += ["= {}", "{} eggs.", "$ {} .", "{}, {}", "#### {} #### {}", "...", "", "no number"]
    frames += ["The answer is {} eggs. The answer is {}.", "[{}]", "#### -{}", "{}\n\n{}", "-{}-"]
    frames += ["Die Antwort lautet {}.", "Die Antwort lautet {}", "The final answer is {}"]
    for _ in range(n):
        frame = "".join(rng.choices(frames, k=rng.randint(1, 3)))
        yield frame.format(*(rng.choice(numbers) for _ in range(9)))


def lm_eval_task(path) -> dict:
    """A task's YAML with what it includes."""
    task = yaml.safe_load(path.read_text())
    base = task.pop("include", None)
    return (lm_eval_task(path.with_name(base)) if base else {}) | task


@pytest.mark.parametrize(
    "ours, theirs",
    [
        ("gsm8k", "gsm8k/gsm8k.yaml"),
        ("gsm8k_cot", "gsm8k/gsm8k-cot.yaml"),
        ("gsm8k_cot_llama", "gsm8k/gsm8k-cot-llama.yaml"),
        ("mgsm_native_cot", "mgsm/native_cot/mgsm_native_cot_de.yaml"),
    ],
)
def test_strict_and_flexible_are_lm_evals_to_the_letter(ours, theirs):
    """1,200 endings each, golds of every kind; filters and metric with the task's own settings."""
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.api.metrics import exact_match_hf_evaluate
    from lm_eval.filters.extraction import RegexFilter

    task = lm_eval_task(Path(lm_eval.__file__).parent / "tasks" / theirs)
    metric = task["metric_list"][0]
    settings = {k: v for k, v in metric.items() if k.startswith(("ignore", "regexes"))}
    filters = {}
    for entry in task["filter_list"]:
        keys = {k: v for k, v in entry["filter"][0].items() if k != "function"}
        filters[entry["name"]] = RegexFilter(**keys)
    prompt = load_prompt(ours).of_language("de")
    rng = random.Random(0)
    texts = list(solutions(rng, 1200))
    golds = rng.choices(["7", "72", "70000", "70,000", "1234.50", "-5", "29", "29.00"], k=1200)
    if prompt.punctuation and ours == "gsm8k":
        golds = [f"It is 12.\n#### {gold}" for gold in golds]
    verdicts = set()
    for text, gold in zip(texts, golds):
        for name, read in (
            ("strict-match", answers.strict(text, prompt.strict)),
            ("flexible-extract", answers.flexible(text)),
        ):
            found = filters[name].apply([[text]], [{}])
            (theirs_read,) = next(iter(found))
            assert read == theirs_read, (name, text)
            score = exact_match_hf_evaluate([theirs_read], [gold], **settings)["exact_match"]
            assert answers.same_text(read, gold, prompt.punctuation) == bool(score), (text, gold)
            verdicts.add((name, bool(score)))
    assert len(verdicts) == 4


def test_every_gold_of_the_sets_is_read(data_dir):
    """GSM8K's 1,319 and MGSM's 2,750, against the plain rule of the papers."""
    gsm8k, mgsm = read_problems(data_dir / "gsm8k"), read_problems(data_dir / "mgsm")
    assert (len(gsm8k), len(mgsm)) == (1319, 2750)
    for problem in gsm8k:
        plain = problem.solution.rpartition("####")[2].replace(",", "").strip()
        assert problem.gold == int(plain), problem.where
    for problem in mgsm:
        assert problem.gold == int(problem.solution.replace(",", "")), problem.where
