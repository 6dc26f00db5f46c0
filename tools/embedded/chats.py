"""Chats about generated functions, in openPangu-Embedded's format and its three thinking modes."""

from __future__ import annotations

import random
from typing import Any

from tools.embedded.problems import Function, draw

MODE_SHARES = {"slow_think": 40, "auto_think": 30, "no_think": 30}
THINKS_FROM = 3  # steps: auto_think thinks about functions with at least so many
_SUFFIX = {"slow_think": "", "auto_think": " /auto_think", "no_think": " /no_think"}
_COMPLETE = "Complete the following Python function.\n```python\n{}```"
_REQUESTS = (
    *[_COMPLETE] * 5,
    "{}",
    "Write the full Python function in a code block.\n{}",
    "请补全下面的Python函数。\n```python\n{}```",
    "Complete this function:\n{}",
)


def question(prompt: str, mode: str, request: str = _COMPLETE) -> str:
    """What the user says, the mode's suffix included."""
    return request.replace("{}", prompt) + _SUFFIX[mode]


def answer(function: Function, mode: str) -> str:
    """A thought lists the steps in the order in which they are done; then the whole function in a code block."""
    thinks = mode == "slow_think" or (mode == "auto_think" and len(function.steps) >= THINKS_FROM)
    thought = "\n".join(f"{number}. {step}" for number, step in enumerate(function.plan, 1))
    code = f"```python\n{function.signature}\n{function.body}```"
    return f"[unused16]{thought}[unused17]{code}" if thinks else code


def asked(rng: random.Random, split: str) -> dict[str, Any]:
    """A row of prompts: what a chat's user says, in no mode yet."""
    function = draw(rng, split)
    request = rng.choice(_REQUESTS)
    language = "en" if request.isascii() else "zh"
    return {"kind": "write", "language": language, "prompt": question(function.prompt, "slow_think", request)}


def chat(rng: random.Random, split: str) -> dict[str, Any]:
    """A row of the embedded data files: messages, mode, and the text with its control symbols, bos not included."""
    function = draw(rng, split)
    mode = rng.choices(tuple(MODE_SHARES), tuple(MODE_SHARES.values()))[0]
    asked = question(function.prompt, mode, rng.choice(_REQUESTS))
    said = answer(function, mode)
    messages = [
        {"role": "system", "content": ""},
        {"role": "user", "content": asked},
        {"role": "assistant", "content": said},
    ]
    opening = f"[unused9]系统：[unused10][unused9]用户：{asked}[unused10][unused9]助手："
    return {"messages": messages, "mode": mode, "prompt": opening, "text": f"{opening}{said}[unused10]"}
