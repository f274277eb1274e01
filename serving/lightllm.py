"""lightllm's /generate, by which OpenCompass scores base models: what it asks, what it is told.

    asked, details = read_generate(served, fields, with_prompt=True)
    generated(answer, details)
    pieces(answer, events)                               # of /generate_stream

{"inputs": text or token ids, "parameters": {…}}: greedy unless do_sample. With serve.py's
--return-all-prompt-logprobs every answer has the log-probabilities of the prompt's tokens, as with
lightllm's own flag of that name. A text ends before its stop string, where lightllm's ends after.
"""

import contextlib
from collections.abc import AsyncGenerator
from dataclasses import replace
from typing import Any

from backends import Sample
from backends.engine import Token
from serving.answers import LOWEST, Answer, Choice
from serving.asked import Asked, Served, read_sampling
from serving.fields import Fields, Refused
from serving.service import Job

NEW_TOKENS, MAX_SAMPLES = 16, 8  # lightllm's
NEUTRAL: dict[str, tuple] = {
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "repetition_penalty": (1,),
    "min_new_tokens": (1, 0),
    "skip_special_tokens": (True, False),
    "add_spaces_between_special_tokens": (True, False),
    "print_eos_token": (False,),
}


def read_generate(served: Served, fields: Fields, with_prompt: bool) -> tuple[Asked, bool]:
    """(what is asked, whether tokens are told one by one)"""
    inputs, given = fields.any("inputs"), fields.any("parameters")
    fields.refuse_rest({"multimodal_params": ({},)})
    if not isinstance(given, dict):
        raise Refused("parameters must be an object", "parameters")
    renamed = {"stop" if name == "stop_sequences" else name: v for name, v in given.items()}
    own = Fields(renamed, "parameters.")
    if isinstance(inputs, str):
        prompt = served.texts.encode(inputs, own.flag("add_special_tokens", True))
    elif isinstance(inputs, list):
        prompt = served.texts.checked(inputs)
        own.flag("add_special_tokens", True)
    else:
        raise Refused("inputs must be a text or token ids", "inputs")
    served.check_length(prompt)
    n = own.integer("best_of", 1, 1, MAX_SAMPLES)
    if own.integer("n", n, 1, MAX_SAMPLES) != n:
        raise Refused("parameters.n must be best_of", "parameters.n")
    new = own.integer("max_new_tokens", NEW_TOKENS, 1, 1 << 31)
    sampling = read_sampling(served, own, new)
    if not own.flag("do_sample"):
        sampling = replace(sampling, temperature=0.0)
    details = own.flag("return_details")
    ends = not own.flag("ignore_eos")
    own.refuse_rest(NEUTRAL)
    asked = Asked([prompt], sampling, n, logprobs=0, scores=with_prompt, ends=ends)
    return asked, details


def generated(answer: Answer, details: bool) -> dict[str, Any]:
    """The answer: lists of samples, or one where one was asked for, but for the texts."""
    asked, choices = answer.asked, list(answer.choices.values())
    counts = [len(choice.tokens) for choice in choices]
    reasons = [choice.finish_reason for choice in choices]
    one = asked.n == 1
    said: dict[str, Any] = {
        "generated_text": [choice.text for choice in choices],
        "count_output_tokens": counts[0] if one else counts,
        "finish_reason": reasons[0] if one else reasons,
        "prompt_tokens": len(asked.prompts[0]),
    }
    if details:
        told = [_tokens(answer, choice) for choice in choices]
        said["tokens"] = told[0] if one else told
    if 0 in answer.scores:
        prompt, values = asked.prompts[0], answer.scores[0].logprobs
        said["prompt_token_ids"] = prompt
        said["prompt_logprobs"] = [
            [prompt[i], {str(prompt[i + 1]): max(values[i][0], LOWEST)}]
            for i in range(len(prompt) - 1)
        ]
    return said


async def pieces(
    answer: Answer, events: AsyncGenerator[tuple[Job, Any], None]
) -> AsyncGenerator[dict[str, Any], None]:
    """A piece for each token, of which the last says the end. So it is told when the next is known;
    of a sample without tokens the one that ended it is told."""
    (choice,) = answer.choices.values()
    held: dict[str, Any] | None = None
    async with contextlib.aclosing(events):
        async for job, event in events:
            answer.take(job.index, event)
            if isinstance(event, Token):
                if held is not None:
                    yield held
                told = _tokens(answer, choice)[-1]
                held = _piece(told | {"text": choice.unfolding.add(event.token_id)})
            elif isinstance(event, Sample):
                none = {"id": answer.served.texts.tokenizer.eos_token_id, "text": ""}
                none |= {"logprob": None, "special": True, "count_output_tokens": 1}
                last = held or _piece(none | {"prompt_tokens": len(answer.asked.prompts[0])})
                last["token"]["text"] += choice.unfolding.rest(choice.text)
                yield last | {"finished": True, "finish_reason": choice.finish_reason}


def _piece(token: dict[str, Any]) -> dict[str, Any]:
    named = ("id", "text", "logprob", "special", "count_output_tokens", "prompt_tokens")
    about = {"generated_text": None, "finished": False, "finish_reason": None, "details": None}
    return {"token": {name: token[name] for name in named}} | about


def _tokens(answer: Answer, choice: Choice) -> list[dict[str, Any]]:
    """Each token of a sample; cumlogprob is the mean so far, as lightllm has it."""
    told, total = [], 0.0
    specials = set(answer.served.texts.tokenizer.special_ids)
    for i, (ids, values) in enumerate(choice.tokens, 1):
        total += max(values[0], LOWEST)
        told.append(
            {
                "id": ids[0],
                "text": answer.served.texts.piece(ids[0]),
                "logprob": max(values[0], LOWEST),
                "cumlogprob": total / i,
                "special": ids[0] in specials,
                "count_output_tokens": i,
                "prompt_tokens": len(answer.asked.prompts[0]),
            }
        )
    return told
