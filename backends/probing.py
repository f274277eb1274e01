"""What a server can do truthfully, found out before a run by asking it.

    probed = probe(client, "the-model", tokenizer)
    probed.scores                    # "", or why its prompt log-probabilities are not to be had

Servers answer 200 and leave out what they do not know: some ignore `echo`, some give a token the
same value wherever it stands, or the value of its neighbour. So each capability is tried on prompts
whose answers must agree with each other. What was found is in the record, and the answers, with
what the server states of the model, are its fingerprint.
"""

import hashlib
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from backends import SERVERS, Sampling
from backends.client import Client, NotThere, Refused
from backends.completions import OWNERS, PATH, Completions
from durable import dumps
from tokenizer import Tokenizer

# in all of which tokens recur; a model's answers to them are its fingerprint
TEXTS = (
    "The cat saw the dog, and the dog saw the cat, and the cat saw it.",
    "def f(x):\n    return x + 1\n\n\nprint(f(41), f(-1))\n",
    "Größe 東京, 1234567 km², naïve café; Größe 東京",
)
MOST_IDS = 48  # of a probe: small contexts hold it, and what is generated after it
TOLERANCE = 0.25  # nats between one token's values in two requests: batches round differently
STATED = ("id", "root", "parent", "owned_by", "max_model_len", "meta")  # not: times, random ids
TOKENIZE = (  # bodies that servers take at /tokenize
    lambda text: {"prompt": text, "add_special_tokens": False},
    lambda text: {"content": text, "add_special": False, "parse_special": False},
)


@dataclass(frozen=True)
class Probed:
    """server: its kind. stated: what it says of the model. token_ids: whether prompts can be token
    ids. adds_bos: whether it puts a token before a text. tokenizer: what its agreement with ours
    was seen by. scores, greedy: why prompt log-probabilities, and whether a token is the likeliest,
    cannot be had; "" where they can. against_generation: a token's value was also seen to be the
    one that it was generated with. samples: whether a temperature has an effect. seed: whether one
    repeats a sample. stop: "cut", "kept" or "ignored". context: tokens of a prompt and what follows
    it."""

    server: str
    stated: dict
    context: int | None
    token_ids: bool
    adds_bos: bool | None
    tokenizer: str
    scores: str
    greedy: str
    against_generation: bool
    samples: bool
    seed: bool
    stop: str
    fingerprint: str

    @property
    def shown(self) -> dict:
        """For a record."""
        return asdict(self)


def probe(client: Client, model: str, tokenizer: Tokenizer, kind: str | None = None) -> Probed:
    """Asks two dozen short questions. ValueError for a server that does not answer as OpenAI's
    /v1/completions does, serves no such model, or reads texts as other tokens than ours."""
    stated = _stated(client, model)
    owner = str(stated.get("owned_by"))
    kind = kind or OWNERS.get(owner, owner if owner in SERVERS else "openai")
    completions = Completions(client, model, kind)
    short = Sampling(max_new_tokens=1)
    try:
        completions.draw(TEXTS[0], short)
    except Refused as error:
        raise ValueError(f"{client.root}{PATH} refuses a plain question: {error}") from None
    client.control = PATH, completions.body(TEXTS[0], short, None)
    adds_bos, agreed = _agreement(client, completions, tokenizer)
    ids = [(tokenizer.encode(text) * 2)[:MOST_IDS] for text in TEXTS]
    try:
        by_ids = completions.draw(ids[0], short)
        token_ids = by_ids.prompt_tokens in (None, len(ids[0]))
    except (Refused, NotThere):
        token_ids = False
    scores, greedy, against_generation, means = "it takes no token ids", "", False, []
    if token_ids:
        scores, greedy, against_generation = _try_scores(completions, tokenizer, ids[0])
    if not scores:
        means = [round(float(np.nanmean(completions.score(own).values)), 2) for own in ids]
    texts = [
        completions.draw(own if token_ids else text, Sampling(max_new_tokens=16)).text
        for own, text in zip(ids, TEXTS)
    ]
    prompt = ids[0] if token_ids else TEXTS[0]
    samples, seed = _try_sampling(completions, prompt)
    fixed = dumps([model, stated, texts, means], sort_keys=True)
    return Probed(
        server=kind,
        stated=stated,
        context=_context(client, stated, kind),
        token_ids=token_ids,
        adds_bos=adds_bos,
        tokenizer=agreed,
        scores=scores,
        greedy=greedy,
        against_generation=against_generation,
        samples=samples,
        seed=seed,
        stop=_try_stop(completions, prompt, texts[0]),
        fingerprint=hashlib.sha256(fixed.encode()).hexdigest(),
    )


def only_model(client: Client) -> str:
    """The name of the one model that is served. ValueError where there are several, or none is
    named."""
    names = [each.get("id") for each in _listed(client)]
    if len(names) != 1 or not isinstance(names[0], str):
        there = f"serves {', '.join(map(str, names[:20]))}" if names else "names no models"
        raise ValueError(f"{client.root} {there}: say which with --model")
    return names[0]


# ---------------------------------------------------------------------------------------------
# What it states


def _listed(client: Client) -> list[dict]:
    found = client.get("/v1/models")
    data = found.get("data") if isinstance(found, dict) else None
    return [each for each in data if isinstance(each, dict)] if isinstance(data, list) else []


def _stated(client: Client, model: str) -> dict:
    listed = _listed(client)
    ours = [each for each in listed if each.get("id") == model]
    if listed and not ours:
        names = ", ".join(str(each.get("id")) for each in listed[:20])
        raise ValueError(f"{client.root} serves no --model {model}, but {names}")
    return {name: ours[0][name] for name in STATED if name in ours[0]} if ours else {}


def _context(client: Client, stated: dict, kind: str) -> int | None:
    found: Any = stated.get("max_model_len")
    if found is None and kind == "llama.cpp":
        props = client.get("/props")
        settings = props.get("default_generation_settings") if isinstance(props, dict) else None
        found = settings.get("n_ctx") if isinstance(settings, dict) else None
    return found if isinstance(found, int) and found > 0 else None


# ---------------------------------------------------------------------------------------------
# Tokens


def _agreement(
    client: Client, completions: Completions, tokenizer: Tokenizer
) -> tuple[bool | None, str]:
    """(whether a BOS is put before texts, what agreement was seen by). ValueError where the server
    reads the probes as other tokens than `tokenizer` does."""
    seen = "nothing: the server counts no tokens"
    for make in TOKENIZE:
        answers = [_tokens_of(client, make(text)) for text in TEXTS]
        if all(ids is not None for ids in answers):
            for text, ids in zip(TEXTS, answers):
                if ids != tokenizer.encode(text):
                    raise ValueError(_disagree(client, tokenizer, text))
            seen = "token ids"
            break
    extra = set()
    for text in TEXTS:
        count = completions.draw(text, Sampling(max_new_tokens=1)).prompt_tokens
        extra.add(None if count is None else count - len(tokenizer.encode(text)))
    if extra == {None}:
        return None, seen
    if extra not in ({0}, {1}):
        raise ValueError(_disagree(client, tokenizer, TEXTS[0]))
    return extra == {1}, "counts of tokens" if seen.startswith("nothing") else seen


def _tokens_of(client: Client, body: dict) -> list[int] | None:
    try:
        found = client.ask("POST", "/tokenize", body)
    except (Refused, NotThere):
        return None
    ids = found.get("tokens") if isinstance(found, dict) else None
    return ids if isinstance(ids, list) and ids and all(isinstance(i, int) for i in ids) else None


def _disagree(client: Client, tokenizer: Tokenizer, text: str) -> str:
    return (
        f"{client.root} reads {text!r:.40} as other tokens than {tokenizer.name} does: name the "
        "tokenizer of the model that is served (--tokenizer-name)"
    )


# ---------------------------------------------------------------------------------------------
# Log-probabilities of prompts


def _try_scores(
    completions: Completions, tokenizer: Tokenizer, ids: list[int]
) -> tuple[str, str, bool]:
    """(why there are no true ones, why none is known to be the likeliest, whether a value was
    seen to be that of generation)"""
    try:
        whole = completions.score(ids)
        repeated = [[i for i in range(1, len(ids)) if ids[i] == token] for token in {*ids}]
        pairs = [places for places in repeated if len(places) > 1]
        assert pairs, "the probe repeats no token"
        if all(len({*whole.values[places]}) == 1 for places in pairs):
            return "a token is given the same value wherever it stands", "", False
        against_generation = False
        for cut in range(len(ids) // 2, len(ids), 3):
            part = completions.score(ids[:cut])
            if np.abs(part.values[1:] - whole.values[1:cut]).max() > TOLERANCE:
                return "the values of a prompt change with what follows it", "", False
            following = tokenizer.encode(part.next_text)
            if len(following) == 1:
                longer = completions.score([*ids[:cut], *following])
                if abs(longer.values[-1] - part.next_logprob) > TOLERANCE:
                    return "a token's value is not the one it is generated with", "", False
                against_generation = True
                break
    except (Refused, ValueError) as error:
        return str(error), "", False
    silent = whole.likeliest is None or whole.likeliest[1:].all()
    greedy = "no likelier tokens are named beside those of a prompt" if silent else ""
    return "", greedy, against_generation


# ---------------------------------------------------------------------------------------------
# Samples


def _try_sampling(completions: Completions, prompt: list[int] | str) -> tuple[bool, bool]:
    """(whether samples differ at all, whether a seed repeats one)"""
    hot = Sampling(max_new_tokens=16, temperature=1.5)
    first, again, other = (completions.draw(prompt, hot, seed).text for seed in (1, 1, 2))
    return not first == again == other, first == again


def _try_stop(completions: Completions, prompt: list[int] | str, greedy: str) -> str:
    """What becomes of a stop string: one from the middle of what is known to follow."""
    middle = len(greedy) // 2
    stop = greedy[middle : middle + 1]
    if not stop or stop == "\ufffd":
        return "not tried"
    sampling = replace(Sampling(max_new_tokens=16), stop=(stop,))
    text = completions.draw(prompt, sampling).text
    if text == greedy:
        return "ignored"
    return "kept" if stop in text else "cut"
