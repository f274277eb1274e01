"""What is asked of a served model, in the engine's words, read from the bodies of OpenAI's API.

    asked = read_completion(served, Fields(body))       # or read_chat: Refused, naming the field
    asked.prompts, asked.sampling, asked.n, asked.logprobs, asked.scores, asked.stream, …

A field that would change the answer and is not known here is refused, never ignored. What a model's
generation_config.json would set is not read: what is not sent has OpenAI's default.
"""

import functools
import secrets
import time
from dataclasses import dataclass, field, replace
from typing import Any

from backends import Sampling
from serving.fields import Fields, Refused
from serving.texts import Texts
from tasks.chat import Chat

MAX_STOPS = 64
COMPLETION_TOKENS = 16  # OpenAI's default, and everybody's
# Fields of others that change nothing at these values; none: they never do
NEUTRAL: dict[str, tuple] = {
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "repetition_penalty": (1,),
    "length_penalty": (1,),
    "min_p": (0,),
    "num_beams": (1,),
    "logit_bias": ({},),
    "suffix": ("",),
    "use_beam_search": (False,),
    "min_tokens": (0,),
    "user": (),
    "store": (False,),
    "metadata": ({},),
}
CHAT_NEUTRAL = NEUTRAL | {
    "tools": ([],),
    "tool_choice": ("none",),
    "functions": ([],),
    "parallel_tool_calls": (True, False),
    "response_format": ({"type": "text"},),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "modalities": (["text"],),
}


@dataclass(frozen=True)
class Served:
    """The model that is served, as its clients may know it. context: tokens of a prompt and its
    answer; new_tokens: of an answer at most; logprobs: of the likeliest at most; requests:
    sequences at once at most; template: of chats, or None."""

    name: str
    texts: Texts
    context: int
    new_tokens: int
    logprobs: int
    sequences: int
    dtype: str
    template: str | None = None
    created: int = field(default_factory=lambda: int(time.time()))  # seconds, as the API has it

    def check_model(self, fields: Fields) -> None:
        """That a request means this model."""
        asked = fields.any("model", self.name)
        if asked != self.name:
            raise Refused(
                f"model {asked!r:.80} is not served here: {self.name!r} is",
                "model",
                "model_not_found",
                404,
            )

    def check_length(self, prompt: list[int]) -> None:
        """That there is room for a prompt; it is never cut."""
        if not prompt:
            raise Refused("the prompt has no tokens: start it with a BOS or end-of-text", "prompt")
        if len(prompt) > self.context:
            raise Refused(
                f"the maximum context length is {self.context} tokens, the prompt has "
                f"{len(prompt)}",
                "prompt",
                "context_length_exceeded",
            )

    @functools.cached_property
    def turn_end(self) -> str:
        return self.chat({}).turn_end

    def chat(self, arguments: dict[str, Any]) -> Chat:
        """The template with a request's own variables."""
        if self.template is None:
            raise Refused(
                f"{self.name} has no chat template: ask /v1/completions", "messages", "unsupported"
            )
        specials = self.texts.tokenizer.special_tokens
        return Chat(f"{self.name}'s own", self.template, specials, arguments=arguments)


@dataclass(frozen=True)
class Asked:
    """Samples of prompts. n: of each. draws: whether any token is drawn. echoed: the prompts' texts
    where they come back in the answer. logprobs: how many of the likeliest are told, None: nothing;
    scores: whether of the prompts' tokens too. ids_as_tokens: tokens are shown by their ids. ends:
    whether a token that ends a text ends a sample (not where clients measure: `ignore_eos`)."""

    prompts: list[list[int]]
    sampling: Sampling
    n: int = 1
    draws: bool = True
    echoed: list[str] | None = None
    logprobs: int | None = None
    scores: bool = False
    ids_as_tokens: bool = False
    ends: bool = True
    stream: bool = False
    tells_usage: bool = False

    @property
    def one_pass(self) -> bool:
        """Whether scoring a prompt tells all that is asked: its tokens and the likeliest next."""
        greedy = self.sampling.temperature == 0 and self.sampling.max_new_tokens == 1
        return self.scores and (greedy or not self.draws)


# ---------------------------------------------------------------------------------------------
# /v1/completions


def read_completion(served: Served, fields: Fields) -> Asked:
    served.check_model(fields)
    prompts, texts = read_prompts(served, fields)
    n = fields.integer("n", 1, 1, served.sequences)
    if fields.integer("best_of", n, 1, served.sequences) != n:
        raise Refused("best_of is not supported: ask for n samples and choose", "best_of")
    echo, logprobs = fields.flag("echo"), fields.integer("logprobs", None, 0, served.logprobs)
    new = fields.integer("max_tokens", COMPLETION_TOKENS, 0, 1 << 31)
    if new == 0 and not echo:
        raise Refused("max_tokens 0 goes with echo: there would be no answer", "max_tokens")
    asked = Asked(
        prompts,
        read_sampling(served, fields, new),
        n,
        draws=new > 0,
        echoed=texts if echo else None,
        logprobs=logprobs,
        scores=echo and (logprobs is not None or new == 0),
        ids_as_tokens=fields.flag("return_tokens_as_token_ids"),
        ends=not fields.flag("ignore_eos"),
        **_stream(fields),
    )
    if echo and asked.stream:
        raise Refused("echo is not streamed here", "echo", "unsupported")
    fields.refuse_rest(NEUTRAL)
    return asked


def read_prompts(served: Served, fields: Fields) -> tuple[list[list[int]], list[str]]:
    """(token ids, texts) of a prompt: a text, several, token ids, or several of those, to which
    nothing is added."""
    value, texts = fields.any("prompt"), served.texts
    special = fields.flag("add_special_tokens", True)
    if isinstance(value, str) or (isinstance(value, list) and value and type(value[0]) is int):
        value = [value]
    if not isinstance(value, list) or not value or isinstance(value[0], (bool, float)):
        raise Refused("prompt must be a text, token ids, or a list of either", "prompt")
    if len(value) > served.sequences:
        raise Refused(f"prompt: {served.sequences} at once at most, not {len(value)}", "prompt")
    prompts, shown = [], []
    for one in value:
        if isinstance(one, str):
            prompts.append(texts.encode(one, special))
            shown.append(one)
        elif isinstance(one, list):
            prompts.append(texts.checked(one))
            shown.append(texts.decode(one))
        else:
            raise Refused("prompt must be a text, token ids, or a list of either", "prompt")
        served.check_length(prompts[-1])
    return prompts, shown


def read_sampling(served: Served, fields: Fields, new_tokens: int) -> Sampling:
    """How tokens are drawn; without a seed, anew each time."""
    seed = fields.integer("seed", None, -(1 << 63), (1 << 64) - 1)
    top_k = fields.integer("top_k", 0, -1, (1 << 31) - 1)
    top_p = fields.number("top_p", 1.0, 0.0, 1.0)
    if top_p == 0:
        raise fields.wrong("top_p", "above 0")
    return Sampling(
        max_new_tokens=max(1, checked_length(served, new_tokens)),
        temperature=fields.number("temperature", 1.0, 0.0, 100.0),
        top_p=top_p,
        top_k=max(0, top_k),
        stop=fields.texts("stop", MAX_STOPS),
        seed=secrets.randbits(63) if seed is None else seed,
    )


def checked_length(served: Served, new_tokens: int) -> int:
    """Tokens of an answer; the end of the context ends it sooner."""
    wanted = min(new_tokens, served.context)
    if wanted > served.new_tokens:
        raise Refused(
            f"an answer has {served.new_tokens} tokens at most here (--max-new-tokens), not "
            f"{new_tokens}",
            "max_tokens",
        )
    return wanted


def _stream(fields: Fields) -> dict[str, Any]:
    options = fields.inner("stream_options")
    tells = options.flag("include_usage")
    options.refuse_rest({"include_obfuscation": (False,)})
    return {"stream": fields.flag("stream"), "tells_usage": tells}


# ---------------------------------------------------------------------------------------------
# /v1/chat/completions


def read_chat(served: Served, fields: Fields) -> Asked:
    served.check_model(fields)
    chat = served.chat(fields.inner("chat_template_kwargs").values)
    try:
        text = chat.render(read_messages(fields), add_generation_prompt=True)
    except ValueError as error:  # the template's own words
        raise Refused(str(error), "messages") from None
    prompt = served.texts.encode(text, add_special_tokens=False)
    served.check_length(prompt)
    room = min(served.new_tokens, served.context + 1 - len(prompt))
    new = fields.integer("max_tokens", room, 1, 1 << 31)
    new = fields.integer("max_completion_tokens", new, 1, 1 << 31)
    wanted = fields.integer("top_logprobs", 0, 0, served.logprobs)
    sampling = read_sampling(served, fields, new)
    ends = not fields.flag("ignore_eos")
    if served.turn_end and ends:
        sampling = replace(sampling, stop=(*sampling.stop, served.turn_end))
    asked = Asked(
        [prompt],
        sampling,
        fields.integer("n", 1, 1, served.sequences),
        logprobs=wanted if fields.flag("logprobs") else None,
        ends=ends,
        **_stream(fields),
    )
    if wanted and asked.logprobs is None:
        raise Refused("top_logprobs goes with logprobs: true", "top_logprobs")
    fields.refuse_rest(CHAT_NEUTRAL)
    return asked


def read_messages(fields: Fields) -> list[dict[str, str]]:
    """Role and text of each; parts of a text are joined."""
    messages = fields.any("messages")
    if not isinstance(messages, list) or not messages:
        raise Refused("messages must be a list of one at least", "messages")
    return [_message(value, f"messages[{i}].") for i, value in enumerate(messages)]


def _message(value: Any, where: str) -> dict[str, str]:
    if not isinstance(value, dict):
        raise Refused(f"{where[:-1]} must be an object", where[:-1])
    own = Fields(value, where)
    role, content = own.any("role"), own.any("content", "")
    if isinstance(content, list):
        parts = [part if isinstance(part, dict) else {} for part in content]
        kinds = {(part.get("type"), type(part.get("text"))) for part in parts}
        if kinds - {("text", str)}:
            raise Refused(f"{where}content: parts of a message are text here", where + "content")
        content = "".join(part["text"] for part in parts)
    if not isinstance(role, str) or not isinstance(content, str):
        raise Refused(f"{where[:-1]} must have a role and a content of text", where[:-1])
    own.refuse_rest({"type": ("text",), "name": (), "refusal": (), "tool_calls": ([],)})
    return {"role": role, "content": content}
