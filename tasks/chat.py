"""Questions as turns of a chat, in the words of a model's own chat template.

    chat = open_chat(options.chat, tokenizer)           # None: questions stay plain text
    text = chat.ask("What is 2 + 2?", shots=[("And 1 + 1?", " 2")])
    prompts = encode(tokenizer, [text], add_bos)        # special tokens are tokens; BOS once

The strings are lm-evaluation-harness's to the character: the description of a task, after
`--system-prompt`, is the system turn; each example is a question and its answer in turn, or all of
them stand in the one message of the user; what an answer begins with is a last turn left open.
A template is code that came with a checkpoint: it is rendered in Jinja's sandbox alone, through
transformers. A template that asks for the date gets always the same one, lest a prompt changed
overnight.
"""

import argparse
import datetime
import functools
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cli
from inputs import decode_utf8

Message = dict[str, str]  # role, content

DATE = datetime.date(2024, 7, 26)  # Llama 3's, where its template is told none
MARK = "~-begun-answer-ends-here-~"  # in no text of ours
SYSTEM, USER, ASSISTANT = "system", "user", "assistant"

# ---------------------------------------------------------------------------------------------
# Options


@dataclass(frozen=True)
class ChatOptions:
    """Whether and how a question is put as a chat: flags of every script that asks questions."""

    chat_template: str = cli.option(
        "off",
        "questions as turns of a chat, for instruct models; on: by the tokenizer's own template; "
        "NAME: one of several that it has; FILE: a Jinja file. BOS stands once, whoever writes it "
        "(off)",
        nargs="?",
        const="on",
        metavar="on|NAME|FILE",
    )
    system_prompt: str | None = cli.option(
        None, "what the system turn of the chat says first", metavar="TEXT"
    )
    fewshot_as_turns: bool = cli.option(
        True,
        "in a chat each example is a question and its answer in turn (the default), not all of "
        "them in one message",
        action=argparse.BooleanOptionalAction,
    )
    chat_template_args: tuple[str, ...] = cli.option(
        (), "variables of the template: enable_thinking=false, say", nargs="+", metavar="NAME=JSON"
    )

    def __post_init__(self):
        given = {cli.flag_of(n): getattr(self, n) for n in ("system_prompt", "chat_template_args")}
        given["--no-fewshot-as-turns"] = not self.fewshot_as_turns
        for flag, value in given.items():
            if value and self.chat_template == "off":
                raise ValueError(f"{flag} goes with --chat-template")
        _ = self.arguments

    @property
    def arguments(self) -> dict[str, Any]:
        """Of the template, by name; what is no JSON is text."""
        return dict(_argument(text) for text in self.chat_template_args)


def _argument(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not (equals and name.isidentifier()):
        raise ValueError(f"--chat-template-args {text!r:.60}: NAME=VALUE is needed")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def open_chat(options: ChatOptions, tokenizer: Any) -> "Chat | None":
    """The chat that the options ask for, None where they ask for none. ValueError, in one line, for
    a tokenizer without a template, a template that fails, and one without room for
    --system-prompt."""
    if options.chat_template == "off":
        return None
    source, text = _find_template(options.chat_template, tokenizer)
    chat = Chat(
        source,
        text,
        tokenizer.special_tokens,
        options.system_prompt or "",
        options.fewshot_as_turns,
        options.arguments,
    )
    if chat.system and not chat.takes_system:
        raise ValueError(f"{chat.named} has no system turn: leave --system-prompt out")
    if MARK not in chat.ask(MARK):
        raise ValueError(f"{chat.named} leaves out what is asked: is it a chat template?")
    return chat


def ends_of(chat: "Chat | None") -> tuple[str, ...]:
    """The stop strings that a chat adds to those of a prompt."""
    return (chat.turn_end,) if chat and chat.turn_end else ()


def _find_template(asked: str, tokenizer: Any) -> tuple[str, str]:
    """(whose it is, its text)"""
    own = tokenizer.chat_templates
    name = "default" if asked == "on" else asked
    if name in own:
        return "the tokenizer's own" if asked == "on" else f"the tokenizer's {name}", own[name]
    path = Path(asked)
    if asked != "on" and path.is_file():
        return path.name, decode_utf8(path.read_bytes(), path)
    there = f"has {', '.join(sorted(own))}" if own else "has none"
    raise ValueError(
        f"--chat-template {asked}: no such template; tokenizer {tokenizer.name} {there}. Name a "
        "Jinja file, or leave --chat-template out for a model that was not taught one"
    )


# ---------------------------------------------------------------------------------------------
# A chat


@dataclass(frozen=True)
class Chat:
    """source: whose template it is. special_tokens: texts by name, as templates write them. system:
    the user's own system prompt. as_turns: how examples stand. arguments: of the template."""

    source: str
    template: str
    special_tokens: dict[str, str]
    system: str = ""
    as_turns: bool = True
    arguments: dict[str, Any] | None = None

    def ask(
        self,
        question: str,
        shots: Sequence[tuple[str, str]] = (),
        description: str = "",
        begun: str = "",
        separator: str = "\n\n",
        rest: str | None = None,
    ) -> str:
        """The prompt's text, up to where the answer goes on.

        shots: (question, answer) of examples, the answer with the spaces before it that plain text
        has; separator: between examples in one message. begun: how the answer begins; its
        turn stays open, as lm-eval opens it: a template that trims what is said cuts the end of
        `begun`. rest: how such an answer would go on, so that nothing of `begun` is trimmed.
        """
        system = self.system
        if system and description and not (system[-1].isspace() or description[0].isspace()):
            system += separator
        system = system + description if self.takes_system else ""
        messages = [{"role": SYSTEM, "content": system}] if system else []
        if self.as_turns:
            for asked, answer in shots:
                messages += [_says(USER, asked), _says(ASSISTANT, answer.lstrip(" "))]
        else:
            question = "".join(q + a + separator for q, a in shots) + question
        messages.append(_says(USER, question))
        if begun and rest is not None:
            messages.append(_says(ASSISTANT, begun + MARK + rest))
            text = self.render(messages, add_generation_prompt=False).rpartition(MARK)[0]
        elif begun:
            messages.append(_says(ASSISTANT, begun))
            text = self.render(messages, continue_final_message=True)
        else:
            text = self.render(messages, add_generation_prompt=True)
        return text

    def render(self, messages: list[Message], **how: bool) -> str:
        """The template's text of messages. ValueError, in one line, for whatever goes wrong."""
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            rendered: Any = render_jinja_template(
                [messages],
                chat_template=self.template,
                strftime_now=DATE.strftime,
                **self.special_tokens | (self.arguments or {}) | how,
            )
        except Exception as error:  # the template's own words, or anything that its code raises
            raise ValueError(f"{self.named}: {cli.first_line(error)}") from error
        texts, _ = rendered
        return texts[0]

    @functools.cached_property
    def takes_system(self) -> bool:
        """Whether the template has a place for a system turn: some refuse it, some drop it."""
        try:
            said = self.render([_says(SYSTEM, MARK), _says(USER, "?")], add_generation_prompt=True)
        except ValueError:
            return False
        return MARK in said

    @functools.cached_property
    def turn_end(self) -> str:
        """What the template writes after an answer, "" if nothing that can be seen: where a model
        ends its turn in text that is no special token of its tokenizer, a sample ends there."""
        try:
            said = self.render([_says(USER, "?"), _says(ASSISTANT, MARK)])
        except ValueError:
            return ""
        lines = said.rpartition(MARK)[2].strip().splitlines()
        return lines[0].strip() if lines else ""

    @property
    def named(self) -> str:
        return f"chat template ({self.source})"

    @property
    def protocol(self) -> dict:
        """What of a chat decides the numbers."""
        return {
            "chat_template": self.source,
            "chat_template_hash": hashlib.sha256(self.template.encode()).hexdigest(),
            "chat_template_args": self.arguments or {},
            "chat_date": str(DATE) if "strftime_now" in self.template else None,
            "system_prompt": self.system,
            "system_turn": self.takes_system,
            "fewshot_as_turns": self.as_turns,
        }

    @property
    def words(self) -> tuple[str, ...]:
        """The same for people."""
        given = ", ".join(f"{name}={json.dumps(v)}" for name, v in (self.arguments or {}).items())
        return (
            f"{self.named}{' with ' + given if given else ''}",
            *(["system prompt"] if self.system else []),
            *([] if self.as_turns else ["examples in one message"]),
        )


def _says(role: str, content: str) -> Message:
    return {"role": role, "content": content}


# ---------------------------------------------------------------------------------------------
# Tokens


def encode(tokenizer: Any, texts: Sequence[str], add_bos: bool) -> list[list[int]]:
    """Token ids of texts that a template wrote: its special tokens are one token each. Where BOS is
    to come first, the template's own is it: it never stands twice."""
    prompts = [ids.tolist() for ids in tokenizer.encode_batch(list(texts), specials=True)]
    bos = tokenizer.bos_token_id
    return [[bos, *ids] if add_bos and ids[:1] != [bos] else ids for ids in prompts]


def starts_with_bos(tokenizer: Any, prompts: Sequence[Sequence[int]]) -> bool:
    """Whether prompts begin with BOS, whoever wrote it."""
    bos = tokenizer.bos_token_id
    return bos is not None and all(list(ids[:1]) == [bos] for ids in prompts)
