"""What a server can do truthfully, found out before a run by asking it.

    probed, route = probe(client, "the-model", tokenizer)
    probed.scores                    # "", or why its prompt log-probabilities are not to be had

Servers answer 200 and leave out what they do not know: some ignore `echo`, some give a token the
same value wherever it stands, or the value of its neighbour. So each capability is tried on prompts
whose answers must agree with each other. What was found is in the record, and the answers, with
what the server states of the model, are its fingerprint.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np

from backends import Sampling
from durable import dumps
from endpoints import Drawn, Route
from endpoints.chats import Chats
from endpoints.client import Client, NotThere, Refused
from endpoints.completions import Completions
from endpoints.kinds import context_of, found, tokens_of
from endpoints.native import ROUTES
from endpoints.prompts import Prompts
from tokenizer import Tokenizer

# in all of which tokens recur; a model's answers to them are its fingerprint
TEXTS = (
    "The cat saw the dog, and the dog saw the cat, and the cat saw it.",
    "def f(x):\n    return x + 1\n\n\nprint(f(41), f(-1))\n",
    "Größe 東京, 1234567 km², naïve café; Größe 東京",
)
QUESTIONS = 50  # at most, those that find out its kind among them
MOST_IDS = 48  # of a probe: small contexts hold it, and what is generated after it
PROBED = Sampling(max_new_tokens=16)
TOLERANCE = 0.25  # nats between one token's values in two requests: batches round differently
CHAT = "chat"


@dataclass(frozen=True)
class Probed:
    """server: its kind. route: where it is asked. stated: what it says of the model. token_ids:
    whether prompts can be token ids. adds_bos: whether it puts a token before a text. tokenizer:
    what its agreement with ours was seen by. scores, greedy: why prompt log-probabilities, and
    whether a token is the likeliest, cannot be had; "" where they can. letters: "by id" where any
    token's value after a prompt is told, "likeliest" where those of the likeliest are, else "".
    against_generation: a token's value was also seen to be the one that it was generated with.
    samples: whether a temperature has an effect. seed: whether one repeats a sample. stop: "cut",
    "kept" or "ignored". streams: whether samples come piece by piece, the same. context: tokens of
    a prompt and what follows it. answers: (prompt, what greedily follows it), kept in no record."""

    server: str
    route: str
    stated: dict
    context: int | None
    token_ids: bool
    adds_bos: bool | None
    tokenizer: str
    scores: str
    greedy: str
    letters: str
    against_generation: bool
    samples: bool
    seed: bool
    stop: str
    streams: bool
    fingerprint: str
    answers: tuple[tuple[list[int] | str, str], ...] = ()

    @property
    def shown(self) -> dict:
        """For a record."""
        return {name: value for name, value in asdict(self).items() if name != "answers"}

    def still_holds(self, route: Route) -> bool:
        """Whether it is still the same model: batches round differently, so one of its answers is
        enough."""
        return any(route.draw(prompt, PROBED).text == text for prompt, text in self.answers)

    def prompts(self, where: str, tokenizer: Tokenizer) -> Prompts:
        chats = self.server == CHAT
        return Prompts(where, tokenizer, self.token_ids, self.adds_bos, in_template=chats)


def probe(
    client: Client, model: str, tokenizer: Tokenizer, kind: str | None = None
) -> tuple[Probed, Route]:
    """Asks QUESTIONS at most, all short. ValueError for a server that does not answer, serves no
    such model, or reads texts as other tokens than ours."""
    own_kind, stated = found(client, model)
    kind = kind or own_kind
    route = _open_route(client, model, tokenizer, kind, own_kind)
    client.control = route.path, route.plain(TEXTS[0])
    chats = kind == CHAT
    adds_bos, agreed = _agreement(client, route, tokenizer, chats)
    prompts = Prompts(client.root, tokenizer, False, adds_bos, in_template=chats)
    ids = [list(map(int, tokenizer.encode(text))) for text in TEXTS]
    doubled = [(own * 2)[:MOST_IDS] for own in ids]
    if not chats and _takes_ids(route, doubled[0]):
        ids, prompts = doubled, replace(prompts, token_ids=True)
    elif adds_bos and tokenizer.bos_token_id is not None:
        ids = [[tokenizer.bos_token_id, *own] for own in ids]
    scores, greedy, against_generation = _try_scores(route, prompts, ids[0])
    means = [] if scores else [_mean_score(route, prompts, own) for own in ids]
    asked: list = ids if prompts.token_ids else list(TEXTS)
    drawn = [route.draw(prompt, PROBED) for prompt in asked]
    texts = [one.text for one in drawn]
    samples, seed = _try_sampling(route, asked[0])
    stop = _try_stop(route, asked[0], texts[0])
    letters = _try_letters(route, prompts, ids[0], bool(scores))
    route.streams = _try_streams(route, asked, drawn)
    fixed = dumps([model, stated, texts, means], sort_keys=True)
    return Probed(
        server=kind,
        route=route.path,
        stated=stated,
        context=context_of(client, stated, own_kind),
        token_ids=prompts.token_ids,
        adds_bos=adds_bos,
        tokenizer=agreed,
        scores=scores,
        greedy=greedy,
        letters=letters,
        against_generation=against_generation,
        samples=samples,
        seed=seed,
        stop=stop,
        streams=route.streams,
        fingerprint=hashlib.sha256(fixed.encode()).hexdigest(),
        answers=tuple(zip(asked, texts)),
    ), route


def _open_route(
    client: Client, model: str, tokenizer: Tokenizer, kind: str, own_kind: str
) -> Route:
    """The way in which a kind of server tells most, of those that answer a plain question."""
    ways: list[Route] = []
    if kind == CHAT:
        ways.append(Chats(client, model, own_kind, tokenizer))
    else:
        ways += [ROUTES[kind](client, model, tokenizer)] if kind in ROUTES else []
        ways.append(Completions(client, model, kind, tokenizer))
    for route in ways:
        try:
            route.draw(TEXTS[0], Sampling(max_new_tokens=1))
            return route
        except (Refused, NotThere) as error:
            problem = error
    other = "" if kind == CHAT else " (--server chat asks in the server's own chat template)"
    refuses = isinstance(problem, Refused)
    said = f"{client.root}{route.path} refuses a plain question: {problem}" if refuses else problem
    raise ValueError(f"{said}{other}")


# ---------------------------------------------------------------------------------------------
# Tokens


def _agreement(
    client: Client, route: Route, tokenizer: Tokenizer, chats: bool
) -> tuple[bool | None, str]:
    """(whether a BOS is put before texts, what agreement was seen by). ValueError where the server
    reads the probes as other tokens than `tokenizer` does."""
    seen = "nothing: the server counts no tokens"
    answers = [tokens_of(client, text) for text in TEXTS]
    if all(ids is not None for ids in answers):
        for text, ids in zip(TEXTS, answers):
            ours = list(map(int, tokenizer.encode(text)))
            if ids not in (ours, [tokenizer.bos_token_id, *ours]):
                raise ValueError(_disagree(client, tokenizer, text))
        seen = "token ids"
    if chats:  # where the template's tokens are counted too
        return None, seen
    extra = set()
    for text in TEXTS:
        count = route.draw(text, Sampling(max_new_tokens=1)).prompt_tokens
        extra.add(None if count is None else count - len(tokenizer.encode(text)))
    if extra == {None}:
        return None, seen
    if extra not in ({0}, {1}):
        raise ValueError(_disagree(client, tokenizer, TEXTS[0]))
    return extra == {1}, "counts of tokens" if seen.startswith("nothing") else seen


def _disagree(client: Client, tokenizer: Tokenizer, text: str) -> str:
    return (
        f"{client.root} reads {text[:38]!r} as other tokens than {tokenizer.name} does: name the "
        "tokenizer of the model that is served (--tokenizer-name)"
    )


def _takes_ids(route: Route, ids: list[int]) -> bool:
    try:
        count = route.draw(ids, Sampling(max_new_tokens=1)).prompt_tokens
    except (Refused, NotThere):
        return False
    return count in (None, len(ids))


# ---------------------------------------------------------------------------------------------
# Log-probabilities


def _mean_score(route: Route, prompts: Prompts, ids: list[int]) -> float:
    return round(float(np.nanmean(route.score(prompts.of(ids), ids).values)), 2)


def _try_scores(route: Route, prompts: Prompts, ids: list[int]) -> tuple[str, str, bool]:
    """(why there are no true ones, why none is known to be the likeliest, whether a value was
    seen to be that of generation)"""
    if not prompts.holds(ids):
        return "it takes no token ids", "", False
    try:
        whole = route.score(prompts.of(ids), ids)
        repeated = [[i for i in range(1, len(ids)) if ids[i] == token] for token in {*ids}]
        pairs = [places for places in repeated if len(places) > 1]
        assert pairs, "the probe repeats no token"
        if all(len({*whole.values[places]}) == 1 for places in pairs):
            return "a token is given the same value wherever it stands", "", False
        against_generation = False
        for cut in range(len(ids) // 2, len(ids), 3):
            if not prompts.holds(ids[:cut]):
                continue
            part = route.score(prompts.of(ids[:cut]), ids[:cut])
            if np.abs(part.values[1:] - whole.values[1:cut]).max() > TOLERANCE:
                return "the values of a prompt change with what follows it", "", False
            if part.next_id is not None and part.next_logprob is not None:
                more = [*ids[:cut], part.next_id]
                if not prompts.holds(more):
                    continue
                longer = route.score(prompts.of(more), more)
                if abs(longer.values[-1] - part.next_logprob) > TOLERANCE:
                    return "a token's value is not the one it is generated with", "", False
                against_generation = True
                break
    except (Refused, NotThere, ValueError) as error:
        return str(error), "", False
    silent = whole.likeliest is None or whole.likeliest[1:].all()
    greedy = "no likelier tokens are named beside those of a prompt" if silent else ""
    return "", greedy, against_generation


def _try_letters(route: Route, prompts: Prompts, ids: list[int], alone: bool) -> str:
    """Probed.letters: where they agree with each other, and with scores unless they are alone."""
    places = [len(ids) // 2, len(ids) // 2 + 3]
    wanted, seen = sorted({*ids})[:4], []
    try:
        for cut in places:
            told = route.tops(prompts.of(ids[:cut]), wanted)
            if sum(map(math.exp, told.known.values())) > 1 + 1e-3:
                return ""
            seen.append(told)
            for token in wanted if not alone else ():
                more = [*ids[:cut], token]
                if not prompts.holds(more):
                    continue
                value = route.score(prompts.of(more), more).values[-1]
                if token in told.known and abs(told.known[token] - value) > TOLERANCE:
                    return ""
                if token not in told.known and value > told.bound + TOLERANCE:
                    return ""
    except (Refused, NotThere, ValueError):
        return ""
    if seen[0].known == seen[1].known or not all(one.known for one in seen):
        return ""
    by_id = all({*wanted} <= one.known.keys() for one in seen)
    return "by id" if by_id else "likeliest"


# ---------------------------------------------------------------------------------------------
# Samples


def _try_sampling(route: Route, prompt: list[int] | str) -> tuple[bool, bool]:
    """(whether samples differ at all, whether a seed repeats one)"""
    hot = Sampling(max_new_tokens=16, temperature=1.5)
    first, again, other = (route.draw(prompt, hot, seed).text for seed in (1, 1, 2))
    return not first == again == other, first == again


def _try_stop(route: Route, prompt: list[int] | str, greedy: str) -> str:
    """What becomes of a stop string: one from the middle of what is known to follow."""
    middle = len(greedy) // 2
    stop = greedy[middle : middle + 1]
    if not stop or stop == "\ufffd":
        return "not tried"
    sampling = replace(PROBED, stop=(stop,))
    text = route.draw(prompt, sampling).text
    if text == greedy:
        return "ignored"
    return "kept" if stop in text else "cut"


def _try_streams(route: Route, prompts: Sequence[list[int] | str], whole: Sequence[Drawn]) -> bool:
    """Whether the samples of these prompts come out the same piece by piece, tokens counted."""
    route.streams = True
    try:
        return [route.draw(prompt, PROBED) for prompt in prompts] == whole
    except (Refused, NotThere, ValueError):
        return False
