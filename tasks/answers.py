r"""What the answer of a written solution is, and whether it is right. No model, no torch.

    strict(text, r"#### (\-?[0-9\.\,]+)"), flexible(text)     # "72" or "[invalid]": lm-eval's
    same_text("$1,000.", "1000")                      # lm-eval's exact_match for them
    number("so he pays $29.00 in all")                # Fraction(29): what a person reads there

The first two are lm-evaluation-harness's rules for GSM8K to the letter, faults included, so that
figures compare with published ones: `$29.00` is not 29 for them, and `So 72...` is no answer.
`number` is ours: where is the answer (after a marker, else the last number), and which number do
the characters there mean, thousands separators, decimals, fractions, per cent, currency, digits of
any script. It knows no words for numbers but hundred to billion, and no units.
"""

import re
import string
import unicodedata
from fractions import Fraction

INVALID = "[invalid]"
FLEXIBLE = re.compile(r"(-?[$0-9.,]{2,})|(-?[0-9]+)")
NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
IGNORED = tuple(map(re.compile, (",", r"\$", r"(?s).*#### ", r"\.$")))

# ---------------------------------------------------------------------------------------------
# lm-eval's


def strict(text: str, form: str) -> str:
    """What the first match of a regular expression has in its group, "[invalid]" without one."""
    found = re.findall(form, text)
    return found[0].strip() if found else INVALID


def flexible(text: str) -> str:
    """The last thing that looks like a number, dots and commas by themselves included."""
    found = FLEXIBLE.findall(text)
    return next(part for part in found[-1] if part).strip() if found else INVALID


def same_text(answer: str, gold: str, punctuation: bool = True) -> bool:
    """lm-eval's exact_match in any case. GSM8K's: the same text without commas, dollars, what comes
    before `####` and a last dot, so that 29.00 and 29 differ. MGSM's (punctuation False): without
    any punctuation, so that 29.00 and 2900 are the same, and 5 and -5."""
    if punctuation:
        for pattern in IGNORED:
            answer, gold = pattern.sub("", answer), pattern.sub("", gold)
    else:
        answer, gold = answer.translate(NO_PUNCTUATION), gold.translate(NO_PUNCTUATION)
    return answer.lower() == gold.lower()


# ---------------------------------------------------------------------------------------------
# Ours

MAX_DIGITS = 60  # of a number: what is longer is no answer to a question of a school book
SCALES = {"hundred": 100, "thousand": 1000, "million": 10**6, "billion": 10**9}
# written by people with a comma before the decimals and dots between thousands
DECIMAL_COMMA = frozenset({"de", "es", "fr", "ru"})

# "answer is" and "answer:" in the languages of MGSM
_SAID = (
    r"answer(?:\s+is)?\s*[:=]?|antwort\s*(?:ist|lautet|:)|respuesta\s*(?:es|:)|"
    r"réponse\s*(?:est|:)|ответ\s*[:=—-]?|答案\s*(?:是|为|：|:)|答えは|jibu\s*(?:ni|:)|"
    r"คำตอบคือ|উত্তর(?:টি)?\s*(?:হল|হলো|:)|సమాధానం"
)
_MARKER = re.compile(rf"####|\\boxed|(?:{_SAID})", re.IGNORECASE)
_SENTENCE_END = re.compile(r"[.。!?]\s|[。]|\n")
_SPACES = "\u00a0\u2009\u202f"  # which set thousands apart
_DOTTED = re.compile(r"(?<![\d.,])(\d{1,3}(?:\.\d{3})+)(?:,(\d+))?(?![\d.,]*\d)", re.ASCII)
_NUMBER = re.compile(
    rf"""
    (?<![A-Za-z0-9.,]) (?P<sign>[-+]\s?)?
    [$€£¥₹]?\s?(?P<sign_after>-)?
    (?P<whole> \d{{1,3}}(?:[,'’{_SPACES}]\d{{3}})+(?!\d) | \d{{1,3}}(?:\ \d{{3}})+(?!\d) | \d+ )?
    (?P<rest> [.,]\d+ )?
    (?: \s?(?P<slash>[/⁄])\s?(?P<below>\d+(?:\.\d+)?) )?
    (?: \s(?P<scale>hundred|thousand|million|billion)\b )?
    """,
    re.VERBOSE | re.IGNORECASE | re.ASCII,
)


def number(text: str, language: str = "en") -> Fraction | None:
    """The number that a person would take for the answer; None where there is none.

    After the last of `####` (the first, since what follows it may be another question), `\\boxed`
    and "the answer is" in the languages of MGSM: the first number there, or in an equation the one
    after its last `=`. Without a marker, or without a number behind it: the last number.
    """
    text = _plain(text)
    if language in DECIMAL_COMMA:
        text = _DOTTED.sub(_without_dots, text)
    found = [m for m in _MARKER.finditer(text)]
    hashes = [m for m in found if m[0] == "####"]
    if hashes:
        found = hashes[:1]
    if found:
        said = _SENTENCE_END.split(text[found[-1].end() :].lstrip(), maxsplit=1)[0]
        values = _numbers(said.rpartition("=")[2]) or _numbers(said)
        if values:
            return values[0]
    values = _numbers(text)
    return values[-1] if values else None


def _plain(text: str) -> str:
    """Digits of every script as ASCII, one kind of minus, of comma and of dollar, fractions and
    separators as LaTeX or Unicode writes them spelt out."""
    text = re.sub(r"\\[dt]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}", r"\1/\2", text)
    text = text.replace("{,}", ",").replace("\\,", "").replace("\\$", "$").replace("\\%", "%")
    out = []
    for c in text:
        if c in "−－﹣‐‑–":
            c = "-"
        elif unicodedata.category(c) == "Nd":
            c = str(unicodedata.decimal(c))
        elif "\uff01" <= c <= "\uff5e":  # full-width forms of ASCII
            c = chr(ord(c) - 0xFEE0)
        elif "VULGAR FRACTION" in unicodedata.name(c, "") and unicodedata.decomposition(c):
            c = " " + unicodedata.normalize("NFKC", c).replace("⁄", "/")
        elif c == "٫":
            c = "."
        elif c == "٬":
            c = ","
        out.append(c)
    return "".join(out).replace("**", "").replace("__", "")


def _without_dots(m: re.Match) -> str:
    """80.000 and 1.234,50 as English writes them."""
    return m[1].replace(".", "") + (f".{m[2]}" if m[2] else "")


def _numbers(text: str) -> list[Fraction]:
    """Every number of a text, in order; `1 1/2` is one."""
    values: list[Fraction] = []
    end_of_whole = None  # of a whole number, which a fraction after one space belongs to
    for m in _NUMBER.finditer(text):
        value = _value(m)
        if value is None:
            continue
        at = m.start() - 1
        joins = m["slash"] and at == end_of_whole and text[at] == " "
        if joins and 0 <= value < 1:
            values[-1] += value if values[-1] >= 0 else -value
            continue
        values.append(value)
        bare = not (m["rest"] or m["slash"] or m["scale"])
        end_of_whole = m.end() if bare else None
    return values


def _value(m: re.Match) -> Fraction | None:
    whole, rest = m["whole"] or "", m["rest"] or ""
    if not (whole or rest) or len(m[0]) > MAX_DIGITS:
        return None
    if "," in whole and rest.startswith(","):
        return None  # 1,000,5: nobody's
    digits = re.sub(r"\D", "", whole) or "0"
    value = Fraction(f"{digits}.{rest[1:]}" if rest else digits)
    if m["slash"]:
        below = Fraction(m["below"])
        if not below:
            return None
        value /= below
    if m["scale"]:
        value *= SCALES[m["scale"].lower()]
    is_range = m.string[: m.start()].rstrip()[-1:].isdigit()  # 10 - 15, where - is no sign
    negative = ((m["sign"] or "").startswith("-") and not is_range) or m["sign_after"] == "-"
    return -value if negative else value
