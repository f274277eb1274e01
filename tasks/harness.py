"""lm-evaluation-harness's side of harness_eval.py: its tasks, and a model that answers them.

    asked = find_tasks("gsm8k", include_path="tasks/", num_few_shot=None, gen_kwargs={})
    found = evaluate(asked, Verbs(backend, folder, ...), limit=None)       # lm-eval's own results

lm-eval builds the requests, filters the answers and counts; the three verbs of backends.Backend
answer. Every rank runs the same lm-eval, which sees one rank of one, and the work is dealt below:
its own way for several ranks repeats requests where they do not divide, keeps the answers of both,
and puts documents into another order.
"""

import functools
import hashlib
import importlib.metadata
import itertools
import json
import logging
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import cli
from backends import Backend, Sampling
from backends.pairs import Ids, score_pairs
from durable import Folder
from tasks import drawing
from tasks.chat import Chat
from tasks.prompts import cut_safely

try:
    from lm_eval import evaluator
    from lm_eval.api import task as tasks_of_lm_eval
    from lm_eval.api.model import TemplateLM
    from lm_eval.models.utils import normalize_gen_kwargs
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import env as templates
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError as error:
    raise ValueError(
        f"lm-evaluation-harness is not installed ({cli.first_line(error)}): pip install lm_eval"
    ) from None

VERSION = importlib.metadata.version("lm_eval")
SEED = 1234  # lm-eval's own, of the examples that it draws
UNDERSTOOD = {"do_sample", "temperature", "until", "max_gen_toks", "top_p", "top_k", "num_beams"}


# ---------------------------------------------------------------------------------------------
# Tasks


@dataclass(frozen=True)
class Asked:
    """A task, or a group of them, as it was named. tasks: lm-eval's objects by their names."""

    name: str
    tasks: dict[str, Any]
    loaded: dict

    def shots(self) -> list[int]:
        return sorted({task.config.num_fewshot or 0 for task in self.tasks.values()})

    def draws(self) -> bool:
        """Whether any of its answers is a text that the model writes."""
        kinds = (task.get_config("output_type") for task in self.tasks.values())
        return "generate_until" in kinds


def find_tasks(
    name: str, include_path: str | None, num_few_shot: int | None, gen_kwargs: dict
) -> Asked:
    """A task or a group by its name, with lm-eval's defaults and what is asked for instead.
    ValueError where lm-eval has none of that name, or its data cannot be had."""
    manager = _manager_of(name, include_path)
    try:
        loaded = manager.load([name])
    except KeyError as error:
        raise ValueError(
            f"--tasks {name}: lm-eval has no task, group or tag of that name; `lm-eval ls tasks` "
            f"lists them, and --include-path adds a directory of yours ({cli.first_line(error)})"
        ) from None
    except Exception as error:  # datasets, hub and YAML errors share no base class
        raise ValueError(
            f"--tasks {name}: {type(error).__name__}: {cli.first_line(error)}; without internet a "
            "task needs local files: a YAML in --include-path with `dataset_path: json` and "
            "`dataset_kwargs: {data_files: {test: /path/to/file.jsonl}}`"
        ) from None
    if not loaded["tasks"]:
        raise ValueError(f"--tasks {name}: no task of that name")
    for task in loaded["tasks"].values():
        if gen_kwargs and task.get_config("output_type") == "generate_until":
            task.set_config(key="generation_kwargs", value=gen_kwargs, update=True)
        own = task.get_config("num_fewshot")
        if num_few_shot is not None and own != 0:  # 0 in its file says that it has no examples
            task.set_config(key="num_fewshot", value=num_few_shot)
        elif own is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=SEED)
        if getattr(task, "UNSAFE_CODE", False):
            raise ValueError(
                f"--tasks {name}: {task.config.task} runs what a model writes, unconfined; "
                "humaneval_eval.py runs HumanEval, MBPP and sets of their form in a sandbox"
            )
    return Asked(name, dict(loaded["tasks"]), loaded)


def _manager_of(name: str, include_path: str | None) -> TaskManager:
    """Of the user's tasks alone where they hold the name: reading lm-eval's own takes seconds."""
    if include_path is not None and not Path(include_path).is_dir():
        raise ValueError(f"--include-path {include_path}: no such directory")
    own = include_path and _manager(include_path, False)
    return own if own and name in own.task_index else _manager(include_path, True)


@functools.cache
def _manager(include_path: str | None, include_defaults: bool) -> TaskManager:
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    return TaskManager(include_path=include_path, include_defaults=include_defaults)


def content_hash(asked: Asked, limit: int | None) -> str:
    """sha256 of what decides the requests: configs, documents asked, and documents of examples."""
    digest = hashlib.sha256()
    for name, task in sorted(asked.tasks.items()):
        config = {k: v for k, v in task.dump_config().items() if k != "metadata"}
        digest.update(_json([name, config]))
        for docs in (list(task.eval_docs)[:limit], _example_docs(task)):
            for doc in docs:
                digest.update(_json(doc))
    return digest.hexdigest()


def _example_docs(task: Any) -> Iterable[Any]:
    if not task.config.num_fewshot:
        return ()
    found = task.fewshot_docs()
    return () if found is None else found


def _json(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, default=str).encode()


def evaluate(asked: Asked, model: "Verbs", limit: int | None) -> dict:
    """lm-eval's results, the samples among them; no standard errors, some of which it would draw
    again and again for, in processes forked from this one."""
    chat = model.chat
    for task in asked.tasks.values():  # each model is shown the examples that the first one was
        task.set_fewshot_seed(seed=SEED)
    start = time.perf_counter()
    with compiled_once(), quiet_bar():
        found = evaluator.evaluate(
            model,
            asked.loaded,
            limit=limit,
            bootstrap_iters=0,
            system_instruction=(chat and chat.system) or None,
            apply_chat_template=chat is not None,
            fewshot_as_multiturn=bool(chat and chat.as_turns),
        )
    model.other_seconds = time.perf_counter() - start - model.verb_seconds
    return found


@contextmanager
def compiled_once() -> Iterator[None]:
    """lm-eval compiles a task's templates anew for every document and every example of it, which
    is most of what the making of its requests costs. A compiled one has no state of its own."""
    compiled = templates.from_string
    known = functools.lru_cache(1024)(compiled)

    def from_string(source, *how, **named):  # a task's own code may give it more, which is its own
        return compiled(source, *how, **named) if how or named else known(source)

    templates.from_string = from_string
    try:
        yield
    finally:
        templates.from_string = compiled


@contextmanager
def quiet_bar() -> Iterator[None]:
    """lm-eval shows how many requests are made, on every rank: rank 0 alone, on a terminal."""
    bar = tasks_of_lm_eval.tqdm
    # None: shown where there is a terminal
    disable = None if cli.rank() == 0 else True
    tasks_of_lm_eval.tqdm = functools.partial(bar, disable=disable, leave=False)
    try:
        yield
    finally:
        tasks_of_lm_eval.tqdm = bar


# ---------------------------------------------------------------------------------------------
# The model


def _timed(verb: Callable) -> Callable:
    """Adds up what the verbs take, so that the rest of an evaluation is lm-eval's."""

    @functools.wraps(verb)
    def timed(self: "Verbs", requests: list, disable_tqdm: bool = False) -> list:
        start = time.perf_counter()
        answers = verb(self, requests)
        self.verb_seconds += time.perf_counter() - start
        return answers

    return timed


class Verbs(TemplateLM):
    """lm-eval's LM over a backend. bos: whether a text begins with the tokenizer's BOS, as its own
    add_special_tokens would have it; counted once where the text holds it already. check: is given
    the highest token of all, and refuses one that the model does not have. Of an evaluation's
    seconds, `seconds` went by in the model, `verb_seconds` with the tokenizer's in them, and
    `other_seconds` in lm-eval's code, which makes the requests and counts the answers."""

    def __init__(
        self,
        backend: Backend,
        folder: Folder,
        check: Callable[[int], None],
        *,
        bos: bool,
        chat: Chat | None,
        batch_tokens: int,
        seed: int,
    ):
        super().__init__()
        self.verbs, self.folder, self.check, self.seed = backend, folder, check, seed
        self.chat = chat
        self.batch_tokens, self.tok = batch_tokens, backend.facts.tokenizer
        self.start = [self.tok.bos_token_id] if bos else []
        self.bos_text = self.tok.decode(self.start) if bos else None
        self.tokens, self.resumed = 0, 0
        self.seconds, self.verb_seconds, self.other_seconds = 0.0, 0.0, 0.0

    @property
    def eot_token_id(self) -> int:
        return self.tok.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        bos = self.tok.bos_token_id
        return self.eot_token_id if bos is None else bos

    @property
    def max_length(self) -> int:
        return self.verbs.facts.context or 2048

    @property
    def tokenizer_name(self) -> str:
        return self.tok.name

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The text of a chat, its last turn left open where no new one begins. As in lm-eval's own
        class, a template without a system turn is not given any."""
        assert self.chat is not None, "lm-eval asks only where there is a template"
        if not self.chat.takes_system:
            chat_history = [turn for turn in chat_history if turn["role"] != "system"]
        how = {"add_generation_prompt": add_generation_prompt}
        if not add_generation_prompt:
            how["continue_final_message"] = True
        return self.chat.render(chat_history, **how)

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs
    ) -> list[int]:
        return self._encode([string], add_special_tokens)[string]

    def _encode(
        self, texts: Iterable[str], add_special_tokens: bool | None = None
    ) -> dict[str, list[int]]:
        found = self._ids(texts)
        if add_special_tokens is False:
            return {text: ids.tolist() for text, ids in found.items()}
        return {text: self._start_of(text) + ids.tolist() for text, ids in found.items()}

    def _start_of(self, text: str) -> list[int]:
        begun = self.bos_text is not None and text.startswith(self.bos_text)
        return [] if begun else self.start

    def _ids(self, texts: Iterable[str]) -> dict[str, np.ndarray]:
        """{text: token ids}, each text once."""
        texts = list(dict.fromkeys(texts))
        found = self.tok.encode_batch(texts, specials=self.chat is not None)
        self.check(int(max((ids.max() for ids in found if len(ids)), default=0)))
        return dict(zip(texts, found))

    @_timed
    def loglikelihood(self, requests: list) -> list[tuple[float, bool]]:
        moved = [_move_spaces(*request.args) for request in requests]
        pairs = self._pairs(moved)
        for request, (_, ids) in zip(requests, pairs):
            if len(ids) == 0:
                raise ValueError(
                    f"{request.task_name}, document {request.doc_id}: the continuation "
                    f"{request.args[1]!r} has no token of its own after its context"
                )
        return self._score(pairs)

    def _pairs(self, moved: list[tuple[str, str]]) -> list[tuple[Ids, Ids]]:
        """lm-eval's rule of where a continuation begins: its tokens are those of both texts after
        the context's. Of a context, only what follows its last safe cut is encoded again."""
        cut = {before: self._cut(before) for before in dict.fromkeys(before for before, _ in moved)}
        last = [cut[before][1] + after for before, after in moved]
        ids = self._ids(itertools.chain(*cut.values(), last))
        contexts = {}
        for before, (head, rest) in cut.items():
            parts = (np.array(self._start_of(before), dtype=np.int64), ids[head], ids[rest])
            contexts[before] = np.concatenate(parts)
        pairs: list[tuple[Ids, Ids]] = []
        for (before, after), text in zip(moved, last):
            if before:
                start, whole = self._start_of(before), self._start_of(before + after)
                begins = len(start) + len(ids[cut[before][1]])
                pairs.append((contexts[before], [*whole, *ids[text].tolist()][begins:]))
            elif (bare := ids[text].tolist())[:1] == [self.prefix_token_id]:
                pairs.append((bare[:1], bare[1:]))
            else:
                pairs.append(([self.prefix_token_id], bare))
        return pairs

    def _cut(self, text: str) -> tuple[str, str]:
        """Special tokens of a chat may reach over what is a safe cut of other texts."""
        return cut_safely(self.tok, text) if self.chat is None else ("", text)

    def _loglikelihood_tokens(self, requests: list, **kwargs) -> list[tuple[float, bool]]:
        return self._score([(before, after) for _, before, after in requests])

    def _score(self, pairs: list) -> list[tuple[float, bool]]:
        found = score_pairs(self.verbs, pairs, self.batch_tokens)
        self._count(found.tokens)
        return list(zip(found.logprobs.tolist(), found.greedy.tolist()))

    @_timed
    def loglikelihood_rolling(self, requests: list) -> list[float]:
        """Every token of each text once, in windows of the context's length, the last of which
        overlaps the one before it."""
        texts = [request.args[0] for request in requests]
        encoded, pairs, counts = self._encode(texts, False), [], []
        for text in texts:
            windows = get_rolling_token_windows(
                encoded[text], self.prefix_token_id, max_seq_len=self.max_length, context_len=1
            )
            own = [make_disjoint_window(window) for window in windows]
            pairs += own
            counts.append(len(own))
        values = iter([value for value, _ in self._score(pairs)])
        return [sum(next(values) for _ in range(n)) for n in counts]

    @_timed
    def generate_until(self, requests: list) -> list[str]:
        """A text for each request, cut before its first stop string. Drawn again after a kill are
        those that no journal holds."""
        encoded = self._encode(request.args[0] for request in requests)
        seen: dict[tuple, int] = {}
        names, prompts, samplings = [], [], []
        for request in requests:
            text, kwargs = request.args[:2]
            at = (request.task_name, request.doc_id, request.idx)
            seen[at] = copy = seen.get(at, -1) + 1  # asked for several times: samples of their own
            names.append("/".join(map(str, (*at, copy))))
            samplings.append(self._sampling(request, kwargs))
            room = self.max_length - samplings[-1].max_new_tokens
            if room < 1:
                raise ValueError(
                    f"{request.task_name}: {samplings[-1].max_new_tokens} new tokens leave no "
                    f"place for a prompt in a context of {self.max_length}: --gen-kwargs "
                    "max_gen_toks=N"
                )
            prompts.append(encoded[text][-room:] or [self.prefix_token_id])
        asked = drawing.Asked(names, prompts, samplings)
        entries, self.resumed = drawing.draw_all(self.verbs, asked, self.folder, "harness")
        self._count(sum(entry["tokens"] for entry in entries))
        return [entry["completion"] for entry in entries]

    def _sampling(self, request: Any, kwargs: dict) -> Sampling:
        own = normalize_gen_kwargs(kwargs)
        strange = {k: v for k, v in own.items() if k not in UNDERSTOOD and v is not None}
        if own.get("num_beams") not in (None, 1):
            strange["num_beams"] = own["num_beams"]
        if strange:
            raise ValueError(
                f"{request.task_name}: generation_kwargs {strange} would change what is drawn and "
                "are not known here"
            )
        return Sampling(
            max_new_tokens=own["max_gen_toks"],
            temperature=float(own["temperature"]),
            top_p=float(own.get("top_p") or 1.0),
            top_k=int(own.get("top_k") or 0),
            stop=tuple(text for text in own["until"] if text),
            seed=self.seed,
        )

    def _count(self, tokens: int) -> None:
        self.tokens += tokens
        self.seconds += self.verbs.cost().get("seconds", 0.0)


def _move_spaces(context: str, continuation: str) -> tuple[str, str]:
    bare = context.rstrip()
    return bare, context[len(bare) :] + continuation
