"""From questions to the rows of tokens that a model is scored on.

    prompts = PromptMaker(tokenizer, data, template, "letter", ...).make()
    prompts.rows                             # backends/continuations.py's

Text becomes tokens as in lm-evaluation-harness: prompt and answer encoded as one text, white space
at the prompt's end being the answer's. A subject's prompts share their first tokens, which
become a prefix that is run once. What does not fit the context loses whole few-shot examples. In a
chat the description is the system turn, and an answer begins its turn, without white space before.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from tasks.chat import Chat, encode
from tasks.questions import QuestionSet
from tasks.templates import Template
from tokenizer import SAFE_BREAK, utf8_bytes

if TYPE_CHECKING:  # which loads torch
    from backends.continuations import Continuations, RowScores

MAX_NEW_TOKENS = 16  # of --scoring generate


def cut_safely(tokenizer: Any, text: str) -> tuple[str, str]:
    """Both sides of the last place where the tokenizer says that a text can be cut: the tokens of
    each, whatever follows, are those of the whole. ("", text) where there is no such place."""
    data = utf8_bytes(text)
    at = data.rfind(b"\n") if tokenizer.splits_at_newline else -1
    while at >= 0 and not SAFE_BREAK.match(data, at):
        at = data.rfind(b"\n", 0, at)
    return data[: at + 1].decode(), data[at + 1 :].decode()


def encode_after(
    tokenizer: Any, head: str, tails: list[str], before: Sequence[int] = ()
) -> list[np.ndarray]:
    """int64 token ids of head + tail for each tail, as if every text were encoded whole: what lies
    before the head's last safe cut is encoded once; checked on the first text. `before` come
    first."""
    start, rest = cut_safely(tokenizer, head)
    first = np.array(before, dtype=np.int64)

    def joined(parts, *shared):
        return [np.concatenate((first, *shared, ids), dtype=np.int64) for ids in parts]

    if not start or len(tails) < 3:
        return joined(tokenizer.encode_batch([head + tail for tail in tails]))
    shared, whole, *ends = tokenizer.encode_batch(
        [start, head + tails[0], *(rest + tail for tail in tails)]
    )
    encoded = joined(ends, shared)
    if not np.array_equal(whole, encoded[0][len(first) :]):
        return joined(tokenizer.encode_batch([head + tail for tail in tails]))
    return encoded


@dataclass(frozen=True)
class Prompts:
    """Rows to score. question, rotation, choice [R]: whose they are (choice 0 where the row's
    letters stand for all); shots [questions, rotations]: examples kept; truncated: prompts cut;
    first: the text of the first prompt that was made."""

    rows: Continuations
    question: np.ndarray
    rotation: np.ndarray
    choice: np.ndarray
    shots: np.ndarray
    truncated: int
    first: str = ""

    def letter_start(self, found: RowScores) -> np.ndarray:
        """Log-probabilities [R] of the tokens that come before the one that tells letters apart: of
        a space, or of the line before an answer's turn."""
        own = found.choices[:, 0] if len(self.rows.targets[0]) else 0.0
        return found.targets - own


@dataclass(eq=False)
class PromptMaker:
    """Turns questions into rows of tokens for one template, scoring and tokenizer. rotations: how
    many orders of the choices; chat: whose turns they are, or None for plain text."""

    tokenizer: Any
    data: QuestionSet
    template: Template
    scoring: str
    context: int
    rotations: int
    truncate: bool
    bos: bool
    chat: Chat | None = None

    def __post_init__(self):
        self.names = self.data.table["names"]
        self.first = None  # text of the first prompt
        self.letters = None  # token ids of each letter after a prompt
        # what is scored: in a chat the answer begins a turn
        bare = replace(self.template, answer=self.template.answer.lstrip())
        self.answered = bare if self.chat else self.template
        for q in self.data.questions:
            self.template.check(q, self.scoring)

    def make(self, share_prefix: bool = True) -> Prompts:
        from backends.continuations import MIN_PREFIX, Continuations

        prefixes, prefix_of, ids, targets, owner = [], [], [], [], []
        shots = np.zeros((len(self.data.questions), self.rotations), dtype=np.int64)
        truncated = 0
        share_prefix = share_prefix and not self.data.drawn
        for subject, examples, members in self.data.groups:
            asked = [(i, r) for i in members for r in range(self.rotations)]
            for k, group in self._fitted(subject, examples, asked):
                contexts = {id(context): context for rows in group.values() for context, _ in rows}
                n = _shared_length(contexts.values())
                cut = k is None  # left-truncated prompts share nothing
                n = n if share_prefix and not cut and n >= MIN_PREFIX and len(contexts) > 1 else 0
                if not (self.data.drawn and prefixes):  # else all share an empty one
                    prefixes.append(next(iter(contexts.values()))[:n])
                truncated += len(group) if cut else 0
                for (i, r), rows in group.items():
                    shots[i, r] = k or 0
                    for c, (context, continuation) in enumerate(rows):
                        ids.append(np.concatenate((context[n:], continuation[:-1])))
                        targets.append(continuation)
                        owner.append((i, r, c))
                        prefix_of.append(len(prefixes) - 1)
        choice_ids = None
        if self.scoring == "letter":
            choice_ids = [int(letter[-1]) for letter in self.letters]
            # what several tokens share is scored with the first letter's last one: see letter_start
            targets = [t if len(t) > 1 else t[:0] for t in targets]
        elif self.scoring == "generate":
            targets = [t[:0] for t in targets]
        rows = Continuations(prefixes, np.array(prefix_of), ids, targets, choice_ids)
        question, rotation, choice = np.array(owner, dtype=np.int64).T
        return Prompts(rows, question, rotation, choice, shots, truncated, self.first or "")

    def _fitted(self, subject, examples, asked):
        """Yield (shots, {(question, rotation): its rows, pairs of context and continuation ids}):
        what fits with all the examples, then the rest with ever fewer; shots None for prompts cut
        on the left."""
        for k in range(len(examples), -1, -1):
            encoded = self._encode(subject, examples[:k], asked)
            fits = {key: v for key, v in encoded.items() if self._length(v) <= self.context}
            if fits:
                yield k, fits
            asked = [key for key in asked if key not in fits]
            if not asked:
                return
        worst = self.data.questions[asked[0][0]]
        if not self.truncate:
            raise ValueError(
                f"{worst.where}: the question alone takes {self._length(encoded[asked[0]])} "
                f"tokens of a context of {self.context} ({len(asked)} such in {subject!r}): "
                "--truncate cuts such prompts on the left"
            )
        cut = {}
        for key in asked:
            surplus = self._length(encoded[key]) - self.context
            if surplus >= min(len(context) for context, _ in encoded[key]):
                raise ValueError(f"{worst.where}: a choice alone exceeds the context")
            cut[key] = [(context[surplus:], continuation) for context, continuation in encoded[key]]
        yield None, cut

    def _length(self, rows) -> int:
        """Tokens that the model reads: the last scored (or generated) one is not among them."""
        if self.scoring == "generate":
            return len(rows[0][0]) + MAX_NEW_TOKENS - 1
        return max(len(context) + len(continuation) for context, continuation in rows) - 1

    def _encode(self, subject, examples, asked) -> dict:
        """{(question, rotation): [(context ids, continuation ids)]}, a row for each choice or one
        for all letters, as lm-evaluation-harness: trailing white space moves to the continuation;
        the two are encoded as one text, and the continuation is what comes after as many tokens as
        the context has alone."""
        around = self._around(subject, examples)
        questions = [self.data.questions[i] for i, _ in asked]
        if self.scoring == "continuation":
            return self._encode_choices(around, questions, asked)
        head, wrap = around
        shown = [self.template.render_question(q, r) for q, (_, r) in zip(questions, asked)]
        texts = [wrap(text) for text in shown]
        if self.scoring == "generate":
            # one token stands for those to come: the row ends before it, where generation begins
            coming = np.zeros(1, int)
            texts = texts if self.chat else [text.rstrip() for text in texts]
            contexts = self._encode_texts(head, texts)
        else:
            contexts = self._encode_texts(head, [text.rstrip() for text in texts])
            self._read_letters(head, questions, texts[0], len(contexts[0]))
            coming = self.letters[0]
        return {key: [(context, coming)] for key, context in zip(asked, contexts)}

    def _around(self, subject, examples) -> tuple[str, Callable[[str], str]]:
        """What comes before a question as it stands, and what is made of it: in a chat, the turns
        that end with it."""
        name, template = self.names.get(subject), self.template
        if self.chat is None:
            return template.render_head(subject, name, examples, self.scoring), str
        shots = [template.render_example(q, self.scoring) for q in examples]
        description = template.render_description(subject, name)
        separator = template.separator
        ask = functools.partial(
            self.chat.ask, shots=shots, description=description, separator=separator
        )
        return "", ask

    def _encode_choices(self, around, questions, asked) -> dict:
        """The rows of whole choices: after one context, or where each choice is put into the text
        after one of its own."""
        template, (head, wrap) = self.template, around
        places = [(q, r, c) for q, (_, r) in zip(questions, asked) for c in range(len(q.choices))]
        n_choices = [len(q.choices) for q in questions]
        if template.fills_in:
            texts = [wrap(template.render_question(q, r, c)) for q, r, c in places]
            contexts = self._encode_texts(head, [text.rstrip() for text in texts])
        else:
            shown = [template.render_question(q, r) for q, (_, r) in zip(questions, asked)]
            shown = [wrap(text) for text in shown]
            encoded = self._encode_texts(head, [text.rstrip() for text in shown])
            texts, contexts = _repeated(shown, n_choices), _repeated(encoded, n_choices)
        ends = [self.answered.render_answer(q, c, self.scoring, r) for q, r, c in places]
        joint = self._encode_texts(head, [text + end for text, end in zip(texts, ends)])
        rows = {key: [] for key in asked}
        for key, context, whole, (q, _, _) in zip(
            _repeated(asked, n_choices), contexts, joint, places
        ):
            if len(whole) <= len(context):
                raise ValueError(f"{q.where}: a choice has no tokens to score")
            rows[key].append((context, whole[len(context) :]))
        return rows

    def _encode_texts(self, head, tails):
        self.first = head + tails[0] if self.first is None else self.first
        if self.chat:
            encoded = encode(self.tokenizer, [head + tail for tail in tails], self.bos)
            return [np.array(ids, dtype=np.int64) for ids in encoded]
        return encode_after(self.tokenizer, head, tails, [self.tokenizer.bos_token_id] * self.bos)

    def _read_letters(self, head, questions, text, context_length):
        """The letters' ids, from a prompt with each letter as its answer. They may share leading
        tokens (a space, in the byte tokenizer) and must differ in one last token."""
        q, n = questions[0], int(self.data.n_choices.max())
        answers = [self.answered.render_answer(q, c, "letter") for c in range(n)]
        joint = self._encode_texts(head, [text + answer for answer in answers])
        letters = [ids[context_length:].tolist() for ids in joint]
        same_start = len({(len(ids), *ids[:-1]) for ids in letters}) == 1
        if not same_start or len({ids[-1] for ids in letters if ids}) < n:
            raise ValueError(
                f"tokenizer {self.tokenizer.name}: the answers {answers} become {letters}, which "
                "one token does not tell apart; use --scoring continuation"
            )
        if self.letters is not None and letters != [ids.tolist() for ids in self.letters]:
            raise ValueError(f"{q.where}: the letters' tokens {letters} are not those before")
        self.letters = [np.array(ids) for ids in letters]


def _repeated(values, counts) -> list:
    """Each value as often as its count says."""
    return [value for value, n in zip(values, counts) for _ in range(n)]


def _shared_length(contexts) -> int:
    """How many first tokens all contexts share, leaving at least one to each."""
    least, first = min(map(len, contexts)) - 1, next(iter(contexts))
    for context in contexts:
        differs = context[:least] != first[:least]
        if differs.any():
            least = int(differs.argmax())
    return least
