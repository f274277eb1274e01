"""Servers' own routes, where they tell more than OpenAI's form of them.

    LlamaCpp    /completion     token ids in and out, and the likeliest tokens by id
    SGLang      /generate       any token by id; scores that reuse the prefix before `start`
    Lightllm    /generate       the only true scores of lightllm's (--return_all_prompt_logprobs)
    TGI         /generate       scores and greedy samples, which its other route does not tell apart

What their sources call a parameter is said here once, in `_parameters` of each.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from backends import Sampling
from endpoints import Drawn, Lacks, Scores, Tops
from endpoints import answers as read
from endpoints.client import Client
from endpoints.timing import timed
from tokenizer import Tokenizer

GREEDY = Sampling(max_new_tokens=1)


class Native:
    """What these routes share. kind: as in backends.SERVERS."""

    kind, path, stream_path = "", "", ""

    def __init__(self, client: Client, model: str, tokenizer: Tokenizer):
        self.client, self.model, self.tokenizer = client, model, tokenizer
        self.streams = False

    def plain(self, prompt: str) -> dict:
        return self.body(prompt, GREEDY, None)

    def body(self, prompt: list[int] | str, sampling: Sampling, seed: int | None) -> dict:
        raise NotImplementedError

    def drawn(self, answer: dict) -> Drawn:
        """The sample that a whole answer, or the last piece of a stream, tells of."""
        raise NotImplementedError

    def piece(self, event: dict) -> tuple[str, bool]:
        """(what a piece of a stream adds, whether it is the last)"""
        raise NotImplementedError

    def draw(self, prompt: list[int] | str, sampling: Sampling, seed: int | None = None) -> Drawn:
        body = self.body(prompt, sampling, seed)
        if not self.streams:
            return self.drawn(self._ask(body))
        texts, arrivals, last = [], [], None

        def ends(event):
            return isinstance(event, dict) and self.piece(event)[1]

        streamed = self._streamed(body)
        for seconds, event in self.client.stream(self.stream_path or self.path, streamed, ends):
            text, is_last = self.piece(read.an_object(event, "a piece"))
            texts.append(text)
            last = event if is_last else last
            if text or not is_last:
                arrivals.append(seconds)
        assert last is not None, "a stream ends"
        text = "".join(texts)
        found = self.drawn(self._whole(last, text))
        whole = arrivals[-1] if arrivals else 0.0
        self.client.note(timed(whole, arrivals, found.tokens or len(arrivals)))
        return found

    def _streamed(self, body: dict) -> dict:
        return body | {"stream": True}

    def _whole(self, last: dict, text: str) -> dict:
        """The answer that a stream amounts to."""
        raise NotImplementedError

    def _ask(self, body: dict) -> dict:
        return read.an_object(self.client.ask("POST", self.path, body))


class LlamaCpp(Native):
    """llama.cpp's server."""

    kind, path = "llama.cpp", "/completion"
    most = 100  # of the likeliest tokens, before all are asked for

    def body(self, prompt: list[int] | str, sampling: Sampling, seed: int | None) -> dict:
        greedy = not sampling.temperature
        asked: dict[str, Any] = {
            "prompt": prompt,
            "n_predict": sampling.max_new_tokens,
            "temperature": sampling.temperature,
            "top_k": 0 if greedy else sampling.top_k,
            "top_p": 1.0 if greedy else sampling.top_p,
            "min_p": 0.0,
            "typical_p": 1.0,
            "repeat_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "cache_prompt": False,
            "return_tokens": True,
            "stop": list(sampling.stop),
        }
        return asked if seed is None else asked | {"seed": seed}

    def drawn(self, answer: dict) -> Drawn:
        if answer.get("truncated"):
            raise ValueError("the server cut the prompt")
        return Drawn(
            read.a_text(answer.get("content")),
            read.finish_of(answer.get("stop_type")),
            read.count_of(answer, "tokens_evaluated"),
            read.count_of(answer, "tokens_predicted"),
        )

    def piece(self, event: dict) -> tuple[str, bool]:
        return read.a_text(event.get("content")), bool(event.get("stop"))

    def _whole(self, last: dict, text: str) -> dict:
        return last | {"content": text}

    def score(self, prompt: list[int] | str, ids: Sequence[int], start: int = 1) -> Scores:
        raise Lacks("llama.cpp gives none of the tokens of a prompt")

    def tops(self, prompt: list[int] | str, wanted: Sequence[int]) -> Tops:
        """Of all tokens where some that are wanted are not among the likeliest."""
        for n in (self.most, self.tokenizer.vocab_size):
            answer = self._ask(self.body(prompt, GREEDY, None) | {"n_probs": n})
            places = answer.get("completion_probabilities")
            named = places[0].get("top_logprobs") if isinstance(places, list) and places else None
            if not isinstance(named, list) or not named:
                raise Lacks("it names no likeliest tokens")
            found = {one["id"]: one["logprob"] for one in named}
            if {*wanted} <= found.keys():
                break
        read.logprobs(found.values())
        return Tops(found, min(found.values()))


class SGLang(Native):
    """SGLang's."""

    kind, path = "sglang", "/generate"

    def body(self, prompt: list[int] | str, sampling: Sampling, seed: int | None) -> dict:
        greedy = not sampling.temperature
        asked: dict[str, Any] = {
            "max_new_tokens": sampling.max_new_tokens,
            "temperature": sampling.temperature,
            "top_p": 1.0 if greedy else sampling.top_p,
            "top_k": -1 if greedy or not sampling.top_k else sampling.top_k,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "no_stop_trim": True,
            "stop": list(sampling.stop),
        }
        if seed is not None:
            asked["sampling_seed"] = seed
        named = "text" if isinstance(prompt, str) else "input_ids"
        return {named: prompt, "sampling_params": asked}

    def drawn(self, answer: dict) -> Drawn:
        about = self._about(answer)
        reason = about.get("finish_reason")
        word = reason.get("type") if isinstance(reason, dict) else reason
        counts = (read.count_of(about, n) for n in ("prompt_tokens", "completion_tokens"))
        return Drawn(read.a_text(answer.get("text")), read.finish_of(word), *counts)

    def piece(self, event: dict) -> tuple[str, bool]:
        """A piece holds the whole text so far: the last one has it all."""
        last = bool(self._about(event).get("finish_reason"))
        return read.a_text(event.get("text")), last

    def _whole(self, last: dict, text: str) -> dict:
        return last

    def score(self, prompt: list[int] | str, ids: Sequence[int], start: int = 1) -> Scores:
        """Of tokens before `start` nothing is computed that is still in the prefix cache."""
        first = max(start - 1, 0)
        asked = {"return_logprob": True, "logprob_start_len": first, "top_logprobs_num": 1}
        answer = self._ask(self.body(prompt, GREEDY, None) | asked)
        about = self._about(answer)
        read.check_read(read.count_of(about, "prompt_tokens"), ids)
        entries = about.get("input_token_logprobs")
        if not isinstance(entries, list):
            raise ValueError("no log-probabilities of the prompt come back")
        if [entry[1] for entry in entries] != list(map(int, ids[first:])):
            raise ValueError("other tokens come back than were sent")
        told = read.logprobs(entry[0] for entry in entries[1:])
        values = np.array([math.nan] * (first + 1) + told)
        tops = about.get("input_top_logprobs")
        seen = None
        if isinstance(tops, list) and len(tops) == len(entries):
            tops = [[one[0] for one in top] if isinstance(top, list) else top for top in tops]
            seen = read.likeliest(tops, values[first:])
            seen = None if seen is None else np.concatenate([np.zeros(first, bool), seen])
        following = about.get("output_token_logprobs")
        value, token = following[0][:2] if following else (None, None)
        return Scores(values, seen, token, value)

    def tops(self, prompt: list[int] | str, wanted: Sequence[int]) -> Tops:
        ids = list(dict.fromkeys(map(int, wanted)))
        asked = {"return_logprob": True, "logprob_start_len": -1, "token_ids_logprob": ids}
        answer = self._ask(self.body(prompt, GREEDY, None) | asked)
        places = self._about(answer).get("output_token_ids_logprobs")
        if not (isinstance(places, list) and places and isinstance(places[0], list)):
            raise Lacks("it tells of no tokens by their ids")
        found = {entry[1]: entry[0] for entry in places[0]}
        read.logprobs(found.values())
        return Tops(found, -math.inf)

    def _about(self, answer: dict) -> dict:
        about = answer.get("meta_info")
        if not isinstance(about, dict):
            raise ValueError("no meta_info comes back")
        return about


class Lightllm(Native):
    """lightllm's."""

    kind, path, stream_path = "lightllm", "/generate", "/generate_stream"

    def body(self, prompt: list[int] | str, sampling: Sampling, seed: int | None) -> dict:
        """It knows no seed, and takes what is not sent from the model's generation_config.json."""
        greedy = not sampling.temperature
        asked = {
            "do_sample": not greedy,
            "temperature": sampling.temperature or 1.0,
            "top_p": 1.0 if greedy else sampling.top_p,
            "top_k": -1 if greedy or not sampling.top_k else sampling.top_k,
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "ignore_eos": False,
            "max_new_tokens": sampling.max_new_tokens,
            "add_special_tokens": False,
            "stop_sequences": list(sampling.stop),
        }
        return {"inputs": prompt, "parameters": asked}

    def drawn(self, answer: dict) -> Drawn:
        texts = answer.get("generated_text")
        texts = [texts] if isinstance(texts, str) else texts
        if not isinstance(texts, list) or len(texts) != 1:
            raise ValueError("no text comes back, or several")
        counts = (read.count_of(answer, n) for n in ("prompt_tokens", "count_output_tokens"))
        return Drawn(read.a_text(texts[0]), read.finish_of(answer.get("finish_reason")), *counts)

    def piece(self, event: dict) -> tuple[str, bool]:
        token = event.get("token")
        return read.a_text(token.get("text") if isinstance(token, dict) else None), bool(
            event.get("finished")
        )

    def _streamed(self, body: dict) -> dict:
        return body

    def _whole(self, last: dict, text: str) -> dict:
        counts = {n: last["token"].get(n) for n in ("prompt_tokens", "count_output_tokens")}
        return last | counts | {"generated_text": text}

    def score(self, prompt: list[int] | str, ids: Sequence[int], start: int = 1) -> Scores:
        body = self.body(prompt, GREEDY, None)
        body["parameters"]["return_details"] = True
        answer = self._ask(body)
        read.check_read(read.count_of(answer, "prompt_tokens"), ids)
        given, told = answer.get("prompt_token_ids"), answer.get("prompt_logprobs")
        if not isinstance(told, list):
            raise Lacks("start it with --return_all_prompt_logprobs")
        if given != list(map(int, ids)) or len(told) != len(ids) - 1:
            raise ValueError("other tokens come back than were sent")
        values = [one[1].get(str(int(i))) for one, i in zip(told, ids[1:])]
        tokens = answer.get("tokens")
        last = tokens[0] if isinstance(tokens, list) and tokens else {}
        following = last.get("id"), last.get("logprob")
        return Scores(np.array([math.nan, *read.logprobs(values)]), None, *following)

    def tops(self, prompt: list[int] | str, wanted: Sequence[int]) -> Tops:
        raise Lacks("lightllm names no likeliest tokens")


class TGI(Native):
    """Hugging Face's text-generation-inference; texts alone."""

    kind, path, stream_path = "tgi", "/generate", "/generate_stream"
    most = 5

    def body(self, prompt: list[int] | str, sampling: Sampling, seed: int | None) -> dict:
        """Its ranges leave out what turns a parameter off."""
        asked: dict[str, Any] = {
            "do_sample": bool(sampling.temperature),
            "max_new_tokens": sampling.max_new_tokens,
            "repetition_penalty": 1.0,
            "return_full_text": False,
            "details": True,
            "stop": list(sampling.stop),
        }
        if sampling.temperature:
            asked["temperature"] = sampling.temperature
            asked |= {"top_p": sampling.top_p} if sampling.top_p < 1 else {}
            asked |= {"top_k": sampling.top_k} if sampling.top_k else {}
        if seed is not None:
            asked["seed"] = seed
        return {"inputs": prompt, "parameters": asked}

    def drawn(self, answer: dict) -> Drawn:
        about = self._about(answer)
        finish = read.finish_of(about.get("finish_reason"))
        text = read.a_text(answer.get("generated_text"))
        return Drawn(text, finish, None, read.count_of(about, "generated_tokens"))

    def piece(self, event: dict) -> tuple[str, bool]:
        token = event.get("token")
        text = read.a_text(token.get("text") if isinstance(token, dict) else None)
        last = event.get("generated_text") is not None
        return "" if last and token.get("special") else text, last

    def _whole(self, last: dict, text: str) -> dict:
        return last

    def score(self, prompt: list[int] | str, ids: Sequence[int], start: int = 1) -> Scores:
        body = self.body(prompt, GREEDY, None)
        body["parameters"]["decoder_input_details"] = True
        about = self._about(self._ask(body))
        entries = about.get("prefill")
        if not isinstance(entries, list) or not entries:
            raise ValueError("no log-probabilities of the prompt come back")
        if [entry.get("id") for entry in entries] != list(map(int, ids)):
            raise ValueError("other tokens come back than were sent")
        values = read.logprobs(entry.get("logprob") for entry in entries[1:])
        tokens = about.get("tokens")
        last = tokens[0] if isinstance(tokens, list) and tokens else {}
        following = last.get("id"), last.get("logprob")
        return Scores(np.array([math.nan, *values]), None, *following)

    def tops(self, prompt: list[int] | str, wanted: Sequence[int]) -> Tops:
        body = self.body(prompt, GREEDY, None)
        body["parameters"]["top_n_tokens"] = self.most
        places = self._about(self._ask(body)).get("top_tokens")
        if not (isinstance(places, list) and places and isinstance(places[0], list) and places[0]):
            raise Lacks("it names no likeliest tokens")
        found = {one.get("id"): one.get("logprob") for one in places[0]}
        read.logprobs(found.values())
        return Tops(found, min(found.values()))

    def _about(self, answer: dict) -> dict:
        about = answer.get("details")
        if not isinstance(about, dict):
            raise ValueError("no details come back")
        return about


ROUTES = {one.kind: one for one in (LlamaCpp, SGLang, Lightllm, TGI)}
