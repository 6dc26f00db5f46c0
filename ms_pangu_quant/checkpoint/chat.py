"""Chats -> text: a checkpoint's jinja2 template in a sandbox, openPangu's where there is none, and the thinking modes.

The environment is transformers' (blocks trimmed, loop controls, generation blocks, tojson as it is) but for the day, which
a prompt must not depend on: strftime_now is undefined to a template that asks, for such have a date of their own, and gives
one that calls it always the date of Llama 3's templates. A hostile template cannot reach Python or print without end, but
it can still waste time in nested loops.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from jinja2 import Template, TemplateError, Undefined
from jinja2.ext import Extension
from jinja2.nodes import Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from ms_pangu_quant.checkpoint.messages import read_message, with_thought
from ms_pangu_quant.checkpoint.tokenizer_files import read_json, read_text
from ms_pangu_quant.errors import CheckpointError, RequestError
from ms_pangu_quant.suggestion import did_you_mean

THINKING_MODES = ("slow_think", "auto_think", "no_think")

_SUFFIXES = ("", " /auto_think", " /no_think")
_ROLES = ("system", "user", "assistant", "tool", "function")
_MAX_TEMPLATE, _MAX_RENDERED = 64 << 10, 4 << 20  # characters
_TODAY = datetime.date(2024, 7, 26)
TEMPLATE_FILE, TEMPLATES_FOLDER, OLDER_TEMPLATE_FILE = (
    "chat_template.jinja",
    "additional_chat_templates",
    "chat_template.json",
)
OPENPANGU_TEMPLATE = (
    "{% set label = {'system': '系统', 'user': '用户', 'assistant': '助手', 'tool': '工具', 'function': '方法'} %}"
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}[unused9]系统：[unused10]{% endif %}"
    "[unused9]{{ label[message['role']] }}：{{ message['content'] }}[unused10]"
    "{% endfor %}"
    "{% if add_generation_prompt %}[unused9]助手：{% endif %}"
)


class _Generation(Extension):
    """{% generation %} marks what the assistant says, for training; here it is only text."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Clock(Undefined):
    """`strftime_now is defined` is false, and it can be called all the same."""

    __slots__ = ()

    def __call__(self, form: str) -> str:  # type: ignore[override]
        return _TODAY.strftime(form)

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(name)  # jinja looks for marks of its own before it calls


class _Sandbox(ImmutableSandboxedEnvironment):
    """Refuses the operators where they turn a short template into a huge value."""

    intercepted_binops = frozenset({"*", "**"})

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        sizes = [len(side) if isinstance(side, str) else side for side in (left, right)]
        small = all(isinstance(size, (int, float)) and abs(size) <= _MAX_TEMPLATE for size in sizes)
        if operator == "*" and small and abs(sizes[0] * sizes[1]) <= _MAX_TEMPLATE:
            return left * right
        raise TemplateError(f"operator {operator} is not allowed with such values")


def _raise_exception(message: object) -> NoReturn:
    raise RequestError(f"the checkpoint's chat_template refuses these messages: {message}")


def find_template(directory: Path, config: Mapping[str, Any]) -> tuple[Any, Path]:
    """The default template, None where there is none, and the file it is from: transformers' order for a tokenizer, then
    the file of older processors. Raises CheckpointError where there are only templates of other names.

    config  tokenizer_config.json, whose chat_template is text, or named ones in an object or a list.
    """
    folder = directory / TEMPLATES_FOLDER
    for path in (folder / "default.jinja", directory / TEMPLATE_FILE):
        if path.exists():
            return read_text(path), path
    where, older = directory / "tokenizer_config.json", directory / OLDER_TEMPLATE_FILE
    names = {path.stem: folder for path in sorted(folder.glob("*.jinja"))}
    for path, found in ((where, config.get("chat_template")), (older, read_json(older).get("chat_template"))):
        if isinstance(found, list):
            found = {str(entry.get("name")): entry.get("template") for entry in found if isinstance(entry, dict)}
        if not isinstance(found, dict):
            if found is not None:
                return found, path
        elif found.get("default") is not None:
            return found["default"], path
        else:
            names |= dict.fromkeys(map(str, found), path)
    if names:
        places = ", ".join(map(str, dict.fromkeys(names.values())))
        raise CheckpointError(
            f"{places}: of the chat templates {', '.join(map(repr, names))} none is the default; save the one to use as "
            f"{TEMPLATE_FILE}"
        )
    return None, where


def compile_template(template: Any, where: Path) -> Template:
    """Raises CheckpointError, naming the file that it is from."""
    if not isinstance(template, str) or len(template) > _MAX_TEMPLATE:
        raise CheckpointError(f"{where}: chat_template is not a string of at most {_MAX_TEMPLATE} characters")
    template = template.removeprefix("\ufeff")  # a mark of the file, no part of the prompt
    sandbox = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _Generation])
    sandbox.globals["raise_exception"] = _raise_exception
    sandbox.globals["strftime_now"] = _Clock(name="strftime_now")
    sandbox.filters["tojson"] = partial(json.dumps, ensure_ascii=False)  # jinja's own would escape < and >
    try:
        return sandbox.from_string(template)
    except (TemplateError, RecursionError) as error:
        raise CheckpointError(f"{where}: chat_template is not a jinja2 template ({error})") from None


def render(template: Template, chat: Sequence[Mapping[str, str]], where: Path, **variables: Any) -> str:
    """Raises RequestError where the template refuses the chat or leaves a message out, CheckpointError where it fails."""
    rendered, size = [], 0
    try:
        for part in template.generate(messages=chat, tools=None, documents=None, **variables):
            rendered.append(part)
            size += len(part)
            if size > _MAX_RENDERED:
                raise TemplateError(f"more than {_MAX_RENDERED} characters of output")
    except RequestError:
        raise
    except Exception as error:  # a template can fail in any way
        raise CheckpointError(
            f"{where}: chat_template fails, {type(error).__name__}: {error}; take "
            "the original checkpoint's, or none for the openPangu format"
        ) from None
    prompt = "".join(rendered)
    for index, message in enumerate(chat):
        if message["content"].strip() not in prompt:
            raise RequestError(f"messages[{index}]: the chat_template leaves out this {message['role']} message")
    return prompt


def checked_chat(
    messages: Sequence[Mapping[str, Any]], mode: str | None, modes: Sequence[str], *, thinks: bool
) -> list[dict[str, str]]:
    """Role and content of messages, thoughts in it, and the mode's suffix on the last user message.

    modes   those of the model.
    thinks  whether it has the tokens that stand around a thought.
    """
    if mode is not None and mode not in THINKING_MODES:
        close = did_you_mean(mode, THINKING_MODES)
        raise RequestError(f"thinking mode {mode!r} is unknown{close}, wanted one of {', '.join(THINKING_MODES)}")
    if mode is not None and mode not in modes:
        reason = f"thinks in no mode but {modes[-1]}" if thinks else "has no thinking tokens"
        raise RequestError(f"thinking mode {mode!r}: this model {reason}, wanted {', '.join(modes)}")
    if not messages:
        raise RequestError("messages is empty, wanted at least one user message")
    chat = []
    for index, message in enumerate(messages):
        where = f"messages[{index}]"
        read = read_message(message, where)
        if read["role"] not in _ROLES:
            raise RequestError(f"{where}: role is {read['role']!r}, wanted one of {', '.join(_ROLES)}")
        chat.append(with_thought(read, thinks, where))
    if mode is not None and len(modes) > 1:  # the only mode of a model needs no word
        _append_suffix(chat, mode)
    return chat


def _append_suffix(chat: Sequence[dict[str, str]], mode: str) -> None:
    suffix = _SUFFIXES[THINKING_MODES.index(mode)]
    if not suffix:
        return
    user = next((message for message in reversed(chat) if message["role"] == "user"), None)
    if user is None:
        raise RequestError(f"mode {mode!r} is asked for at the end of a user message, and there is none")
    if not user["content"].endswith(suffix):
        if user["content"].endswith(_SUFFIXES[1:]):
            raise RequestError(f"mode is {mode!r}, but the last user message asks for another one; remove either")
        user["content"] += suffix
