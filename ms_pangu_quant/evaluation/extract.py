"""From a model's raw answer to the code to judge, with the rule that found it.

First the thought is cut off. A generated sample is cut at the think-end token's id; a file of raw text is cut at the first
[unused17], or </think>. A thought that is not closed is not an answer.

Then the first of these rules that gives code which parses and defines the entry point:
  begin_done    what stands between [BEGIN] and [DONE]
  plain         the whole answer is code
  fenced        the last such block between ``` or ~~~ fences; a draft or a usage example is not the last that defines it
  fenced_body   the last block that continues the prompt's signature
  cut_fence     a last block without an end, up to the last line that parses
  embedded      from a line that begins code, assignments right above it included, up to the last line that parses
  body          the answer, up to a fence, continues the prompt's signature
and last, so that it counts as a syntax error and not as silence:
  unparsable    a block, or an answer without blocks, that holds the entry point's `def` and does not parse
A body is continued from as it is, or with its first line or all of it indented, where a fence or a strip() took that away.

Every rule parses the text a few times and no more, so a long answer takes milliseconds.
"""

from __future__ import annotations

import ast
import re
import textwrap
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

_ATTEMPTS = 8  # to drop lines that do not parse from the end of a text
_MAX_CHARACTERS = 1 << 20  # an answer's last million, if it is longer
_FENCE = re.compile(r"^([ \t]*)(`{3,}|~{3,})(.*)$")
_BEGIN_DONE = re.compile(r"^\[BEGIN\]\s*$(.*?)(?:^\[DONE\]|\Z)|\A(.*?)^\[DONE\]", re.MULTILINE | re.DOTALL)
_CODE_LINE = re.compile(r"^(?:import |from \S+ import |def |async def |class |@)", re.MULTILINE)
_ASSIGNMENT = re.compile(r"[A-Za-z_]\w*(?: *:[^=\n]+)? *=(?!=)")
_NO_PROSE = re.compile(r"[\s#)\]}]|$")  # blank, comment, inside or end of brackets
_END_OF_TURN = ("[unused10]", "<|im_end|>", "<|endoftext|>", "</s>")


@dataclass(frozen=True)
class Extraction:
    """code is None where rule is "no_code" or "unclosed_thought"."""

    code: str | None
    rule: str


@dataclass(frozen=True)
class Split:
    """A raw text in two. thought is None where there is none; closed is False where only a thought began."""

    thought: str | None
    answer: str
    closed: bool = True


def split_text(text: str) -> Split:
    """By the markers' text; for samples that come without token ids."""
    text = text.partition(_END_OF_TURN[0])[0]
    for begin, end in (("[unused16]", "[unused17]"), ("<think>", "</think>")):
        before, found, after = text.partition(end)
        opened = begin in text if begin == "[unused16]" else text.lstrip().startswith(begin)
        if found:
            return Split(before.partition(begin)[2] if begin in before else before, after)
        if opened:
            return Split(text.partition(begin)[2], "", closed=False)
    return Split(None, text)


def extract(answer: str, entry_point: str, stub: str = "", *, closed: bool = True) -> Extraction:
    """The code in an answer without its thought. stub is the beginning of the program that the prompt showed."""
    if not closed:
        return Extraction(None, "unclosed_thought")
    for end in _END_OF_TURN:
        answer = answer.removesuffix(end)
    answer = answer.replace("\r\n", "\n")[-_MAX_CHARACTERS:]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in what a model wrote
        for rule, code in _candidates(answer, entry_point, stub):
            if code is not None and (rule == "unparsable" or _defines(code, entry_point)):
                return Extraction(code, rule)
    return Extraction(None, "no_code")


def _candidates(answer: str, entry_point: str, stub: str) -> Iterator[tuple[str, str | None]]:
    """(rule, code that may be it), in the order of the rules."""
    if "[DONE]" in answer or "[BEGIN]" in answer:
        for inside in _BEGIN_DONE.finditer(answer):
            yield "begin_done", inside[1] if inside[1] is not None else inside[2]
    yield "plain", answer
    blocks, cut_block = _blocks(answer)
    yield from (("fenced", block) for block in reversed(blocks[-20:]))
    if stub:
        yield from (("fenced_body", _continued(stub, block, entry_point)) for block in reversed(blocks[-3:]))
    if cut_block is not None:
        yield "cut_fence", _parsable_part(cut_block)
        if stub:
            yield "cut_fence", _continued(stub, cut_block, entry_point)
    first = _CODE_LINE.search(answer)
    last = answer.rfind(f"def {entry_point}(")
    starts = [_from_assignments(answer, first.start(), entry_point), first.start()] if first else []
    for start in dict.fromkeys([*starts, *([answer.rfind("\n", 0, last) + 1] if last >= 0 else [])]):
        yield "embedded", _parsable_part(answer[start:])
    if stub:
        yield "body", _continued(stub, re.split(r"\n\s*(?:```|~~~)", answer, maxsplit=1)[0], entry_point)
    for text in [*blocks, cut_block or ""][::-1] if blocks or cut_block else [answer]:
        if re.search(rf"^\s*(?:async )?def {entry_point}\b", text, re.MULTILINE):
            yield "unparsable", text


def _from_assignments(answer: str, start: int, entry_point: str) -> int:
    """Where the assignments right above a line of code begin; those that call the entry point are an example, not code."""
    begin = line = start
    while line > 0:
        above = answer.rfind("\n", 0, line - 1) + 1
        if _ASSIGNMENT.match(answer, above):
            begin = above
        elif not _NO_PROSE.match(answer, above):
            break
        line = above
    return start if entry_point in answer[begin:start] else begin


def _blocks(answer: str) -> tuple[list[str], str | None]:
    """The fenced blocks, and the one that is still open at the end. What closes a fence is bare and no shorter."""
    blocks: list[str] = []
    fence, indent, lines = "", "", [""]
    for line in answer.split("\n"):
        found = _FENCE.match(line)
        if not fence:
            if found and not (found[2][0] == "`" and "`" in found[3]):
                fence, indent, lines = found[2], found[1], []
        elif found and found[2].startswith(fence) and not found[3].strip():
            blocks.append("\n".join(lines))
            fence = ""
        else:
            lines.append(line.removeprefix(indent))
    return blocks, "\n".join(lines) if fence else None


def _continued(stub: str, body: str, entry_point: str) -> str | None:
    """stub + body where that adds statements to the entry point; the indentation of the body is mended if need be."""
    body = body.strip("\n").rstrip()
    if not body:
        return None
    last = stub.rstrip().rpartition("\n")[2]
    indent = last[: len(last) - len(last.lstrip())] or "    "
    for mended in (body, indent + body, textwrap.indent(body, indent)):
        code = _parsable_part(stub.rstrip() + "\n" + mended)
        if code is not None and _goes_on(code, entry_point, stub.rstrip().count("\n") + 1):
            return code
    return None


def _goes_on(code: str, name: str, line: int) -> bool:
    """Whether the function that begins in the first `line` lines ends after them."""
    return any(
        isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        and node.name == name
        and node.lineno <= line < (node.end_lineno or 0)
        for node in ast.parse(code).body
    )


def _parsable_part(text: str) -> str | None:
    """The text without the lines at its end that do not parse; None if a few attempts do not find such a part."""
    lines = text.split("\n")
    for _ in range(_ATTEMPTS):
        try:
            ast.parse("\n".join(lines))
        except SyntaxError as error:
            lines = lines[: min((error.lineno or 1) - 1, len(lines) - 1)]
        except (ValueError, RecursionError, MemoryError):
            return None
        else:
            return "\n".join(lines)
        if not lines:
            return None
    return None


def _defines(code: str, name: str) -> bool:
    try:
        body = ast.parse(code).body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    for node in body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) and node.name == name:
            return True
        if isinstance(node, ast.Assign) and any(isinstance(to, ast.Name) and to.id == name for to in node.targets):
            return True
    return False
