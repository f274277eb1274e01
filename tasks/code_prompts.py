"""How a program is asked for, and which part of what a model writes is the program.

    prompt = choose("auto", problems, chat)         # a CodePrompt
    text = prompt.render(problem, shots, chat)
    prompt.program_in(problem, drawn)               # {"completion": …} or {"solution": …}

completion: HumanEval's, a function's beginning that is gone on with (Chen et al. 2021).
evalplus: EvalPlus's for base models, which ends in a newline; the program is then cut down to what
the function needs. evalplus_chat: its question to instruct models, the answer begun for them, and
the program taken out of the reply. mbpp: Austin et al. 2021 as lm-evaluation-harness has it, after
three examples, the program between [BEGIN] and [DONE].
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from tasks.chat import Chat
from tasks.evalplus import is_mbpp
from tasks.extraction import extract

EVALPLUS_STOP = (
    *("<|endoftext|>", "<|endofmask|>", "</s>"),
    *("\nif __name__", "\ndef main(", "\nprint("),
)


@dataclass(frozen=True)
class CodePrompt:
    """question: with {prompt} or {text} and {tests}. begun, rest: of the answer, in a chat. takes:
    which part is the program: "completion" (it goes on the prompt), "whole" (prompt and completion,
    cut down), "reply" (found in it), "program" (all of it)."""

    name: str
    question: str
    stop: tuple[str, ...]
    takes: str
    begun: str = ""
    rest: str | None = None
    n_shots: int = 0
    separator: str = "\n\n"

    def render(self, problem: dict, shots: Sequence[dict] = (), chat: Chat | None = None) -> str:
        """The text of a prompt."""
        asked = self._ask(problem)
        before = [(self._ask(shot), f"{shot['canonical_solution']}\n[DONE]") for shot in shots]
        if chat:
            return chat.ask(asked, before, "", self.begun, self.separator, self.rest)
        return self.separator.join([*(q + a for q, a in before), asked])

    def _ask(self, problem: dict) -> str:
        fields = {"prompt": problem["prompt"].strip(), "text": problem.get("text", "")}
        fields["tests"] = "\n".join(problem.get("tests", [])[:3])
        text = self.question
        if "{prompt}" == text:  # as it is published
            return problem["prompt"]
        for name in ("text", "tests", "prompt"):
            text = text.replace(f"{{{name}}}", fields[name], 1)
        return text

    def program_in(self, problem: dict, text: str) -> dict:
        """What judges take: the program's part of what was drawn, where that is not all."""
        if self.takes == "completion":
            return {}
        if self.takes == "program":
            return {"solution": text}
        text = text.replace("\t", "    ")  # as EvalPlus has it
        whole = problem["prompt"].strip() + "\n" + text if self.takes == "whole" else text
        return {"solution": extract(whole, problem["entry_point"])}


PROMPTS = {
    prompt.name: prompt
    for prompt in (
        CodePrompt(
            "completion", "{prompt}", ("\nclass", "\ndef", "\n#", "\nif", "\nprint"), "completion"
        ),
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
    if name == "mbpp" and "tests" not in first:
        raise ValueError("--prompt mbpp: these problems have no MBPP's text and tests")
    if name == "completion" and is_mbpp(first["task_id"]):
        raise ValueError("--prompt completion: MBPP's problems are no beginnings of programs")
    prompt = PROMPTS[name]
    if name == "evalplus":
        kind = "mbpp" if is_mbpp(first["task_id"]) else "humaneval"
        prompt = replace(prompt, stop=prompt.stop + ENDS_OF_COMPLETIONS[kind])
    return prompt
