"""Messages as other programs write them -> role, content and thought; what a chat template would drop is refused.

Read are content as a string or as a list of text parts, which stand on lines of their own as vLLM has them, and a thought
beside it under any of THOUGHTS. Values that say nothing (null, empty, numbers, true and false) and the keys of BOOKKEEPING
are left out. All else is refused by name: calls of tools, pictures, the name of who speaks.
"""

from __future__ import annotations

from collections.abc import Mapping
from reprlib import repr as short
from typing import Any

from ms_pangu_quant.errors import RequestError

THOUGHT = "reasoning_content"
THOUGHTS = (THOUGHT, "reasoning", "thinking", "thought")
BESIDE = ("tools", "functions", "documents", "system")  # of a row that has messages: what a template would render
BOOKKEEPING = frozenset(
    {"id", "message_id", "parent_id", "uuid", "turn_identifier", "hashed_ip", "header", "timestamp", "created_at", "date"}
    | {"language", "lang", "country", "state", "model", "source", "finish_reason", "cache_control", "signature"}
)
_TEXTS, _THINKING = ("text", "input_text", "output_text"), ("thinking", "reasoning")


def read_message(message: Any, where: str) -> dict[str, str]:
    """{"role", "content"} of strings, and THOUGHT where there is one. Raises RequestError with `where` and the key."""
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise RequestError(f"{where}: got {short(message)}, wanted {{'role': ..., 'content': ...}}, both strings")
    role = message["role"]
    for key, value in message.items():
        if key not in ("role", "content", *THOUGHTS) and _says(key, value):
            raise RequestError(
                f"{where}.{_named(key)}: got {short(value)}, which chats are not rendered with; write it into "
                "content as text, or remove it"
            )
    found = [(key, message[key]) for key in THOUGHTS if message.get(key)]
    content = message.get("content")
    texts = [content]
    if isinstance(content, list):
        parts = [_read_part(part, f"{where}.content[{place}]") for place, part in enumerate(content)]
        texts = ["\n".join(text for kind, text in parts if kind == "content")]
        thoughts = [text for kind, text in parts if kind == THOUGHT]
        found += [("content", "\n".join(thoughts))] if thoughts else []
    elif content is None and found:
        texts = [""]
    if not isinstance(texts[0], str):
        raise RequestError(f"{where}: got {short(message)}, wanted 'content', a string or a list of text parts")
    thought = _one_thought(found, role, where)
    return {"role": role, "content": texts[0], **({THOUGHT: thought} if thought else {})}


def _named(key: Any) -> str:
    return key if isinstance(key, str) and key.isidentifier() and len(key) < 40 else short(key)


def _says(key: Any, value: Any) -> bool:
    """Whether a value may be something that the model is to read."""
    return key not in BOOKKEEPING and not isinstance(value, int | float) and not is_empty(value)


def is_empty(value: Any) -> bool:
    """None, "", [], {}, and what of a table's struct has nothing but such."""
    if isinstance(value, Mapping):
        return all(map(is_empty, value.values()))
    return value is None or (isinstance(value, str | list | tuple) and not len(value))


def _read_part(part: Any, where: str) -> tuple[str, str]:
    """("content" or THOUGHT, text)."""
    if isinstance(part, str):
        return "content", part
    kind = part.get("type", "text") if isinstance(part, Mapping) else None
    if kind not in (*_TEXTS, *_THINKING):
        raise RequestError(
            f"{where}: got {short(part if kind is None else kind)}, wanted a text part, {{'type': 'text', 'text': ...}}: "
            "nothing else is rendered"
        )
    keys = ("text",) if kind in _TEXTS else ("thinking", "reasoning", "text")
    texts = [part[key] for key in keys if part.get(key) is not None]
    stray = [key for key, value in part.items() if key not in ("type", *keys) and _says(key, value)]
    if stray:
        raise RequestError(
            f"{where}.{_named(stray[0])}: got {short(part[stray[0]])}, which chats are not rendered with; remove it"
        )
    if len(texts) != 1 or not isinstance(texts[0], str):
        raise RequestError(f"{where}: got {short(part)}, wanted {keys[0]!r}, a string")
    return ("content" if kind in _TEXTS else THOUGHT), texts[0]


def _one_thought(found: list[tuple[str, Any]], role: str, where: str) -> str:
    """Of (key, thought) pairs, which have to agree; "" for none."""
    for key, thought in found:
        if not isinstance(thought, str):
            raise RequestError(f"{where}.{key}: got {short(thought)}, wanted a string")
        if role != "assistant":
            raise RequestError(f"{where}.{key}: a thought of role {role!r}; only an assistant message has one")
        if thought != found[0][1]:
            raise RequestError(f"{where}: {found[0][0]} and {key} are both there and differ; keep one of them")
    return found[0][1] if found else ""


def with_thought(message: Mapping[str, str], thinks: bool, where: str) -> dict[str, str]:
    """role and content, the thought in it as openPangu writes its own.

    thinks   whether the model has the tokens that stand around a thought.
    Raises   RequestError where it has not, or where the content has a thought already.
    """
    thought = message.get(THOUGHT)
    written = {"role": message["role"], "content": message["content"]}
    if not thought:
        return written
    if not thinks:
        raise RequestError(
            f"{where}.{THOUGHT}: this model has no thinking tokens ([unused16], [unused17]) to write a thought with; write "
            "it into content, or remove it"
        )
    marked = [text for text in (thought, message["content"]) if "[unused16]" in text or "[unused17]" in text]
    if marked:
        raise RequestError(f"{where}: a thought in {THOUGHT}, and [unused16] or [unused17] in the text; keep one of them")
    return written | {"content": f"[unused16]{thought}[unused17]{message['content']}"}


def refuse_beside(row: Mapping[str, Any]) -> None:
    """Raises RequestError for columns beside `messages` that belong into the prompt."""
    for key in BESIDE:
        value = row.get(key)
        if _says(key, value) and value not in ("[]", "null") and value != _first_content(row.get("messages")):
            raise RequestError(
                f"{key}: got {short(value)} beside messages, which chats are not rendered with; {_TODO[key]}"
            )


_TODO = dict.fromkeys(BESIDE, "write it into a message, or remove it") | {
    "system": "make it the first message, or remove it"
}


def _first_content(messages: Any) -> Any:
    first = messages[0] if isinstance(messages, list) and messages else None
    return first.get("content") if isinstance(first, Mapping) else None
