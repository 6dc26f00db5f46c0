"""What a model is asked, by name and version: a prompt's wording never changes under its id.

A prompt gives chat messages. The checkpoint's chat template adds openPangu's format (an empty system turn first) and the
suffix of the thinking mode, as the official recipe does; nothing else is added. Other harnesses also begin the model's
answer for it; that is left out, because a thinking model's answer begins with its thought.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ms_pangu_quant.errors import RequestError
from ms_pangu_quant.evaluation.tasks import TASKS
from ms_pangu_quant.evaluation.tasks.task import Problem, Statement, load_problems

Messages = list[dict[str, str]]


@dataclass(frozen=True)
class Prompt:
    """needs_stub None: for every problem; True, False: only for those with (without) the beginning of a program."""

    name: str
    version: int
    messages: Callable[[Statement], Messages]
    needs_stub: bool | None = None

    @property
    def id(self) -> str:
        return f"{self.name}/v{self.version}"

    def render(self, problem: Problem) -> Messages:
        """Raises RequestError where the prompt is for another kind of problem."""
        statement = problem.statement
        if self.needs_stub not in (None, bool(statement.stub)):
            fitting = ", ".join(
                prompt.name for prompt in PROMPTS.values() if prompt.needs_stub in (None, bool(statement.stub))
            )
            raise RequestError(f"prompt {self.name}: does not fit {problem.task.name}; take one of {fitting}")
        return self.messages(statement)


def _user(text: str) -> Messages:
    return [{"role": "user", "content": text}]


def _zero_shot_instruct(statement: Statement) -> Messages:
    if statement.stub:
        return _user(f"Complete the following Python function.\n```python\n{statement.stub}```")
    return _user(
        f"{statement.text}\nYour code should pass these tests:\n```python\n{_lines(statement.tests)}\n```\n"
        "Write the full Python function in a code block."
    )


def _mbpp_task(statement: Statement) -> str:
    return (
        f"You are an expert Python programmer, and here is your task: {statement.text} "
        f"Your code should pass these tests:\n\n{_lines(statement.tests)}\n"
    )


def _mbpp_3shot(statement: Statement) -> Messages:
    """lm-evaluation-harness and OpenCompass: problems 2, 3 and 4 of the full set as turns before the question."""
    problems = load_problems(TASKS["mbpp_full"]).by_id
    messages = []
    for shot in (problems[f"MBPP/{number}"] for number in (2, 3, 4)):
        code = str(shot.reference).replace("\r\n", "\n").strip()
        messages += _user(_mbpp_task(shot.statement))
        messages.append({"role": "assistant", "content": f"[BEGIN]\n{code}\n[DONE]"})
    return messages + _user(_mbpp_task(statement))


def _opencompass_mbpp(statement: Statement) -> Messages:
    form = " You should submit your final solution in the following format: ```python\n\n```"
    return _user(_mbpp_task(statement) + form)


def _opencompass_humaneval(statement: Statement) -> Messages:
    return _user(
        "Read the following function signature and docstring, and fully implement the function described. "
        f"Your response should only contain the code for this function.\n{statement.stub}"
    )


def _lm_eval_humaneval(statement: Statement) -> Messages:
    return _user(
        "Write a solution to the following problem and make sure that it passes the tests:\n"
        f"```python\n{statement.stub}\n```\n"
    )


def _evalplus(statement: Statement) -> Messages:
    text = statement.stub or f'"""\n{statement.text}\n{_lines(statement.tests[:1])}\n"""\n'
    return _user(
        "Please provide a self-contained Python script that solves the following problem in a markdown code block:\n"
        f"```\n{text.strip()}\n```\n"
    )


def _lines(tests: tuple[str, ...]) -> str:
    return "\n".join(tests)


PROMPTS: dict[str, Prompt] = {
    prompt.name: prompt
    for prompt in (
        Prompt("zero_shot_instruct", 1, _zero_shot_instruct),
        Prompt("mbpp_3shot", 1, _mbpp_3shot, needs_stub=False),
        Prompt("opencompass_humaneval", 1, _opencompass_humaneval, needs_stub=True),
        Prompt("opencompass_mbpp", 1, _opencompass_mbpp, needs_stub=False),
        Prompt("lm_eval_humaneval_instruct", 1, _lm_eval_humaneval, needs_stub=True),
        Prompt("evalplus", 1, _evalplus),
    )
}
