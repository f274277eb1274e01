"""/v1/completions of OpenAI's form, and what each kind of server is sent there.

    route = Completions(client, "the-model", "vllm", tokenizer)
    route.score(ids, ids)                   # through echo: a prompt's own log-probabilities
    route.tops(ids, [317, 347])             # of one generated token

vLLM gives any token's log-probability by its id (`logprob_token_ids`); the others name the
likeliest, by their texts where they know no ids: a text is then the token that it is encoded as.
"""

import functools
import json
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from backends import SERVERS, Sampling
from endpoints import Drawn, Lacks, Scores, Tops
from endpoints import answers as read
from endpoints.client import Client, Refused
from endpoints.timing import timed
from tokenizer import Tokenizer

PATH = "/v1/completions"
# what turns off, on each kind of server, what OpenAI's parameters do not reach; who keeps the stop
# string tells thereby why a sample ended
NEUTRAL: dict[str, dict[str, Any]] = {
    "roseval": {"top_k": 0},
    "vllm": {
        "top_k": 0,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "include_stop_str_in_output": True,
    },
    "sglang": {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0, "no_stop_trim": True},
    "llama.cpp": {"top_k": 0, "min_p": 0.0, "repeat_penalty": 1.0, "cache_prompt": False},
    "llama-cpp-python": {"top_k": 0, "min_p": 0.0, "repeat_penalty": 1.0},
    "lightllm": {"top_k": -1, "repetition_penalty": 1.0},
}
assert NEUTRAL.keys() <= {*SERVERS}, (*NEUTRAL, SERVERS)
BY_ID = {"vllm", "roseval"}  # who may know `logprob_token_ids`
NAMES_IDS = {"vllm", "roseval"}  # who names tokens as "token_id:7" when asked to
MOST_TOPS = 20  # of the likeliest tokens; more than OpenAI and vLLM give
GREEDY = Sampling(max_new_tokens=1)


def parameters(kind: str, sampling: Sampling, seed: int | None) -> dict[str, Any]:
    """Of a sample, in OpenAI's words and those of a kind of server. ValueError for one that this
    kind does not know."""
    greedy = not sampling.temperature
    asked: dict[str, Any] = {
        "max_tokens": sampling.max_new_tokens,
        "temperature": sampling.temperature,
        "top_p": 1.0 if greedy else sampling.top_p,
        "n": 1,
        "presence_penalty": 0,
        "frequency_penalty": 0,
    } | NEUTRAL.get(kind, {})
    top_k = 0 if greedy else sampling.top_k
    if kind == "transformers" and not greedy:  # else it is greedy whatever the temperature
        asked["generation_config"] = json.dumps({"do_sample": True, "top_k": top_k})
    elif top_k:
        if "top_k" not in asked:
            raise ValueError(f"--top-k: a server of the kind {kind} knows none (--server)")
        asked["top_k"] = top_k
    if kind == "lightllm":  # likewise
        asked["do_sample"] = not greedy
    if sampling.stop:
        asked["stop"] = list(sampling.stop)
    if seed is not None:
        asked["seed"] = seed
    return asked


class Completions:
    """See the file's docstring."""

    def __init__(self, client: Client, model: str, kind: str, tokenizer: Tokenizer):
        self.client, self.model, self.kind, self.tokenizer = client, model, kind, tokenizer
        self.path, self.streams = PATH, False
        self.by_id = kind in BY_ID  # until it is seen that it does not
        self.most = MOST_TOPS

    def body(self, prompt: list[int] | str, sampling: Sampling, seed: int | None) -> dict:
        return {"model": self.model, "prompt": prompt} | parameters(self.kind, sampling, seed)

    def plain(self, prompt: str) -> dict:
        return self.body(prompt, GREEDY, None) | {"stream": False}

    def draw(self, prompt: list[int] | str, sampling: Sampling, seed: int | None = None) -> Drawn:
        body = self.body(prompt, sampling, seed)
        if self.streams:
            return self._drawn_in_pieces(body)
        choice, usage = self._one(body)
        text, finish = self.text_of(choice), read.finish_of(choice.get("finish_reason"))
        return Drawn(text, finish, *self._counts(usage))

    def score(self, prompt: list[int] | str, ids: Sequence[int], start: int = 1) -> Scores:
        """Through echo. A token is generated too, since some servers give no log-probabilities of
        prompts without one."""
        body = self.body(prompt, GREEDY, None) | {"logprobs": 1, "echo": True}
        names = self.kind in NAMES_IDS
        choice, usage = self._one(body | ({"return_tokens_as_token_ids": True} if names else {}))
        read.check_read(read.count_of(usage, "prompt_tokens"), ids)
        about = choice.get("logprobs")
        about = about if isinstance(about, dict) else {}
        given = about.get("token_logprobs")
        if not isinstance(given, list):
            raise ValueError("no log-probabilities of the prompt come back")
        if len(given) != len(ids) + 1:
            raise ValueError(
                f"{len(given)} log-probabilities come back for {len(ids)} tokens and one more"
            )
        if given[0] is not None:
            raise ValueError("the first token of a prompt, after nothing, is given a probability")
        values = np.array([math.nan, *read.logprobs(given[1:])])
        told = about.get("tokens")
        told = told if isinstance(told, list) and len(told) == len(given) else None
        if names and told and told[0] != f"token_id:{ids[0]}":
            names = False  # it does not know how, and says texts
        if names and told and told[:-1] != [f"token_id:{i}" for i in ids]:
            raise ValueError("other tokens come back than were sent")
        tops = about.get("top_logprobs")
        if isinstance(tops, list):
            tops = [[*top.values()] if isinstance(top, dict) else top for top in tops]
        likeliest = read.likeliest(tops, values)
        next_id = self._id_of(told[-1]) if told else None
        seen = None if likeliest is None else likeliest[:-1]
        return Scores(values[:-1], seen, next_id, float(values[-1]))

    def tops(self, prompt: list[int] | str, wanted: Sequence[int]) -> Tops:
        body = self.body(prompt, GREEDY, None)
        if self.kind in NAMES_IDS:
            body |= {"return_tokens_as_token_ids": True}
        if self.by_id:
            ids = list(dict.fromkeys(map(int, wanted)))
            by_id = body | {"logprob_token_ids": ids, "logprobs": len(ids)}
            try:
                known = self._named(self._one(by_id)[0])
                if known.keys() >= {*ids}:
                    return Tops({i: known[i] for i in ids}, -math.inf)
            except Refused:  # it does not know the field
                pass
            self.by_id = False
        while True:
            try:
                named = self._named(self._one(body | {"logprobs": self.most})[0])
                break
            except Refused:
                if self.most <= 5:
                    raise Lacks("it names no likeliest tokens") from None
                self.most = 5  # OpenAI's own limit once
        bound = min(named.values())
        return Tops({i: value for i, value in named.items() if i >= 0}, bound)

    # -- Inside -------------------------------------------------------------------------------

    def text_of(self, choice: dict) -> str:
        return read.a_text(choice.get("text"))

    def _one(self, body: dict) -> tuple[dict, Any]:
        """(the only choice, usage)"""
        answer = self.client.ask("POST", self.path, body | {"stream": False})
        answer = read.an_object(answer)
        return read.only_choice(answer), answer.get("usage")

    def _counts(self, usage: Any) -> tuple[int | None, int | None]:
        return read.count_of(usage, "prompt_tokens"), read.count_of(usage, "completion_tokens")

    def piece_of(self, choice: dict) -> str:
        """What a piece of a stream adds."""
        return self.text_of(choice)

    def _drawn_in_pieces(self, body: dict) -> Drawn:
        """As it comes, so that it is known when each token did."""
        asked = body | {"stream": True, "stream_options": {"include_usage": True}}
        texts, arrivals, finish, usage = [], [], None, None

        def ends(event):
            choices = event.get("choices") if isinstance(event, dict) else None
            return bool(choices) and bool(choices[0].get("finish_reason"))

        for seconds, event in self.client.stream(self.path, asked, ends):
            event = read.an_object(event, "a piece")
            usage = event.get("usage") or usage
            if not event.get("choices"):
                continue
            choice = read.only_choice(event)
            texts.append(self.piece_of(choice))
            finish = choice.get("finish_reason") or finish
            if texts[-1] or not choice.get("finish_reason"):  # else it only says the end
                arrivals.append(seconds)
        finish = read.finish_of(finish)
        read_tokens, tokens = self._counts(usage)
        whole = arrivals[-1] if arrivals else 0.0
        self.client.note(timed(whole, arrivals, tokens or len(arrivals)))
        return Drawn("".join(texts), finish, read_tokens, tokens)

    def _named(self, choice: dict) -> dict[int, float]:
        """{token id: nats} of those named in the place of the token that was generated; below 0
        where a text stands for no token, or for several."""
        about = choice.get("logprobs")
        about = about if isinstance(about, dict) else {}
        tops = about.get("top_logprobs")
        if isinstance(about.get("content"), list):  # llama.cpp, in the form of chats
            tops = [about["content"][0].get("top_logprobs")] if about["content"] else None
        top = tops[0] if isinstance(tops, list) and tops else None
        if isinstance(top, list):
            top = {one.get("token"): one.get("logprob") for one in top if isinstance(one, dict)}
        if not isinstance(top, dict) or not top:
            raise Lacks("it names no likeliest tokens")
        read.logprobs(top.values())
        ids = [self._id_of(name) for name in top]
        return {-1 - n if i is None else i: top[name] for n, (name, i) in enumerate(zip(top, ids))}

    def _id_of(self, name: Any) -> int | None:
        """The one token of this name."""
        if not isinstance(name, str):
            return None
        if name.startswith("token_id:") and name[9:].isdecimal():
            return int(name[9:])
        ids = list(self.tokenizer.encode(name))
        return int(ids[0]) if len(ids) == 1 and self._piece(int(ids[0])) == name else None

    @functools.cached_property
    def _piece(self) -> Callable[[int], str]:
        """Tells a token's own text: after another one, for alone it may lose a leading space."""
        anchor = list(self.tokenizer.encode("a"))
        start = len(self.tokenizer.decode(anchor))
        return lambda token: self.tokenizer.decode([*anchor, token])[start:]
