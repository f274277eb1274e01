"""How a program is asked for, and which part of what a model writes is the program.

    prompt = choose("auto", problems, chat)         # a CodePrompt
    text = prompt.render(problem, shots, chat)
    prompt.program_in(problem, drawn)               # {"completion": …} or {"solution": …}

completion: HumanEval's, a function's beginning that is gone on with (Chen et al. 2021).
evalplus: EvalPlus's for base models, which ends in a newline; the program is then cut down to what
the function needs. evalplus_chat: its question to instruct models, the answer begun for them, and
the program taken out of the reply. mbpp: Austin et al. 2021 as lm-evaluation-harness has it, after
three examples, the program between [BEGIN] and [DONE]. humaneval_instruct, mbpp_instruct (after the
same examples) and mbpp_plus_instruct: lm-evaluation-harness's to instruct models, which begin the
program as a code block; what is drawn before the block's end is the program. Of MBPP's replies its
own filter loses the first word besides, taking it for the name of the block's language.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from tasks.chat import Chat
from tasks.evalplus import is_mbpp
from tasks.extraction import extract

EVALPLUS_STOP = (
    *("<|endoftext|>", "<|endofmask|>", "</s>"),
    *("\nif __name__", "\ndef main(", "\nprint("),
)
HUMANEVAL_STOP = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")
FIELDS = re.compile(r"\{(prompt|published|text|tests|test|solution)\}")


@dataclass(frozen=True)
class CodePrompt:
    """question: with {prompt} (no white space around it), {published} (as it is), or {text} and
    {tests} (three) or {test} (the first). begun: of the answer; rest: how such an answer would go
    on, then begun in a chat alone. answer: of an example, with {solution}. takes: which part is the
    program: "completion" (it goes on the prompt), "whole" (prompt and completion, cut down),
    "reply" (found in it), "program" (all of it), "block" (up to ```, after what was begun of it).
    """

    name: str
    question: str
    stop: tuple[str, ...]
    takes: str
    begun: str = ""
    rest: str | None = None
    n_shots: int = 0
    separator: str = "\n\n"
    answer: str = ""

    def render(self, problem: dict, shots: Sequence[dict] = (), chat: Chat | None = None) -> str:
        """The text of a prompt."""
        asked, begun = _filled(self.question, problem), _filled(self.begun, problem)
        before = [(_filled(self.question, shot), _filled(self.answer, shot)) for shot in shots]
        if chat:
            return chat.ask(asked, before, "", begun, self.separator, self.rest)
        text = self.separator.join([*(q + a for q, a in before), asked])
        return text + begun if self.rest is None else text

    def program_in(self, problem: dict, text: str) -> dict:
        """What judges take: the program's part of what was drawn, where that is not all."""
        if self.takes == "completion":
            return {}
        if self.takes == "program":
            return {"solution": text}
        if self.takes == "block":
            before = problem["prompt"] if "{published}" in self.begun else ""
            return {"solution": before + text.partition("```")[0]}
        text = text.replace("\t", "    ")  # as EvalPlus has it
        whole = problem["prompt"].strip() + "\n" + text if self.takes == "whole" else text
        return {"solution": extract(whole, problem["entry_point"])}


def _filled(text: str, problem: dict) -> str:
    tests = problem.get("tests") or [""]
    values = {
        "prompt": problem["prompt"].strip(),
        "published": problem["prompt"],
        "text": problem.get("text", ""),
        "tests": "\n".join(tests[:3]),
        "test": tests[0],
        "solution": problem.get("canonical_solution", ""),
    }
    return FIELDS.sub(lambda field: values[field[1]], text)


PROMPTS = {
    prompt.name: prompt
    for prompt in (
        CodePrompt("completion", "{published}", HUMANEVAL_STOP, "completion"),
        CodePrompt("evalplus", "{prompt}\n", EVALPLUS_STOP, "whole"),
        CodePrompt(
            "evalplus_chat",
            "Please provide a self-contained Python script that solves the following problem in a "
            "markdown code block:\n```\n{prompt}\n```\n",
            (*EVALPLUS_STOP, "\n```\n"),
            "reply",
            begun="Below is a Python script with a self-contained function that solves the problem "
            "and passes corresponding tests:\n```python\n",
            rest="\n```\n",
        ),
        CodePrompt(
            "mbpp",
            "You are an expert Python programmer, and here is your task: {text} Your code should "
            "pass these tests:\n\n{tests}\n[BEGIN]\n",
            ("[DONE]",),
            "program",
            n_shots=3,
            answer="{solution}\n[DONE]",
        ),
        CodePrompt(
            "humaneval_instruct",
            "Write a solution to the following problem and make sure that it passes the tests:\n"
            "```python\n{published}\n```\n",
            HUMANEVAL_STOP,
            "block",
            begun="Here is the completed function:\n```python\n{published}\n",
        ),
        CodePrompt(
            "mbpp_instruct",
            "You are an expert Python programmer, and here is your task:\n{text}\nYour code should "
            "pass these tests:\n{tests}",
            (),
            "block",
            begun="\n```python\n",
            n_shots=3,
            answer="\n```python\n{solution}\n```",
        ),
        CodePrompt(
            "mbpp_plus_instruct",
            "{text} Your code should satisfy the following assertion:\n{test}",
            (),
            "block",
            begun="Here is a solution to this programming problem:\n```python\n",
        ),
    )
}
ENDS_OF_COMPLETIONS = {  # of EvalPlus's base prompts, beside the others
    "humaneval": ("\ndef ", "\nclass ", "\nimport ", "\nfrom ", "\nassert "),
    "mbpp": ('\n"""', "\nassert"),
}


def choose(name: str, problems: dict[str, dict], chat: Chat | None) -> CodePrompt:
    """The prompt of that name; auto: the one that the problems and the chat are meant for."""
    first = next(iter(problems.values()))
    if name == "auto":
        own = "evalplus" if "inputs" in first else "mbpp" if "tests" in first else "completion"
        name = "evalplus_chat" if chat else own
    prompt = PROMPTS[name]
    if "{text}" in prompt.question and "tests" not in first:
        raise ValueError(f"--prompt {name}: these problems have no MBPP's text and tests")
    if "{published}" in prompt.question and is_mbpp(first["task_id"]):
        raise ValueError(f"--prompt {name}: MBPP's problems are no beginnings of programs")
    if name == "evalplus":
        kind = "mbpp" if is_mbpp(first["task_id"]) else "humaneval"
        prompt = replace(prompt, stop=prompt.stop + ENDS_OF_COMPLETIONS[kind])
    return prompt
