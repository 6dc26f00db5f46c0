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
or no code, with what there is instead:
  method        a class has the entry point as a method, and nothing gives its name to a function
An import under the entry point's name defines it where nothing else does: it may be an example's.

Code that does not parse is repaired in the smallest way there is: what is taken off is the indentation of all of it, or of
its first line alone, or a fence behind a statement, or characters that cannot be seen. A body gets the indentation that the
signature asks for, and is none if it defines the entry point.

Every rule parses the text a few times and no more, so a long answer takes milliseconds.
"""

from __future__ import annotations

import ast
import re
import textwrap
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

METHOD = "method"
_ATTEMPTS = 8  # to drop lines that do not parse from the end of a text
_GLUED_FENCES = 20  # looked at in an answer
_MAX_CHARACTERS = 1 << 20  # an answer's last million, if it is longer
_FENCE = re.compile(r"^([ \t]*)(`{3,}|~{3,})(.*)$")
_GLUED = re.compile(r"`{3,}|~{3,}(?=[ \t]*$)")  # no Python outside of strings and comments
_BEGIN_DONE = re.compile(r"^\[BEGIN\]\s*$(.*?)(?:^\[DONE\]|\Z)|\A(.*?)^\[DONE\]", re.MULTILINE | re.DOTALL)
_STATEMENT = r"(?:import |from \S+ import |def |async def |class |@)"
_CODE_LINE = re.compile(rf"^{_STATEMENT}", re.MULTILINE)
_INDENTED_LINE = re.compile(rf"^[ \t]+(?={_STATEMENT})", re.MULTILINE)
_CODE_BEHIND_FENCE = re.compile(rf"\s*(?:python3?|py)?\s*(?={_STATEMENT})", re.IGNORECASE)
_ASSIGNMENT = re.compile(r"[A-Za-z_]\w*(?: *:[^=\n]+)? *=(?!=)")
_NO_PROSE = re.compile(r"[\s#)\]}]|$")  # blank, comment, inside or end of brackets
_SCOPE = re.compile(r"\s*(?:class|def|async def) ")
_QUOTED = re.compile(
    r"""#[^\n]*|(\"{3}|'{3})(?:\\.|(?!\1).)*(?:\1|(\Z))|"(?:\\.|[^"\\\n])*(?:["\n]|(\Z))|'(?:\\.|[^'\\\n])*(?:['\n]|(\Z))""",
    re.DOTALL,
)
_SPACES = "\u00a0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a\u202f\u205f\u3000"
_UNSEEN = "\u00ad\u200b\u200c\u200d\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2060\ufeff"
_SEEN = str.maketrans({**dict.fromkeys(_SPACES, " "), **dict.fromkeys(_UNSEEN, "")})  # of what Python refuses
_END_OF_TURN = ("[unused10]", "<|im_end|>", "<|endoftext|>", "</s>")


@dataclass(frozen=True)
class Extraction:
    """code is None where rule is "no_code", "method" or "unclosed_thought"."""

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
    text = text.lstrip(_UNSEEN).partition(_END_OF_TURN[0])[0]
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
    answer = answer.replace("\r\n", "\n").replace("\r", "\n")[-_MAX_CHARACTERS:].lstrip(_UNSEEN)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in what a model wrote
        for imports in (False, True) if "import" in answer else (False,):
            for rule, text in _candidates(answer, entry_point, stub):
                if rule == METHOD:
                    return Extraction(None, METHOD)
                code = text if rule == "unparsable" else _repaired(text)
                if rule == "unparsable" or _defines(code, entry_point, imports):
                    return Extraction(code, rule)
    return Extraction(None, "no_code")


def _candidates(answer: str, entry_point: str, stub: str) -> Iterator[tuple[str, str]]:
    """(rule, text that may be it), in the order of the rules."""
    if "[DONE]" in answer or "[BEGIN]" in answer:
        for inside in _BEGIN_DONE.finditer(answer):
            yield "begin_done", inside[1] if inside[1] is not None else inside[2]
    yield "plain", answer
    blocks, cut_block = fenced_blocks(answer)
    yield from (("fenced", block) for block in reversed(blocks[-20:]))
    if stub:
        yield from (("fenced_body", _continued(stub, block, entry_point)) for block in reversed(blocks[-3:]))
    if cut_block is not None:
        yield "cut_fence", _parsable_part(cut_block)
        if stub:
            yield "cut_fence", _continued(stub, cut_block, entry_point)
    for start in _starts(answer, entry_point):
        yield "embedded", _parsable_part(answer[start:])
    if stub:
        yield "body", _continued(stub, re.split(r"\n\s*(?:```|~~~)", answer, maxsplit=1)[0], entry_point)
    texts = [*blocks, cut_block or ""][::-1] if blocks or cut_block else [answer]
    if any(
        _has_method(text, entry_point) for text in (*texts, *(answer[start:] for start in _starts(answer, entry_point)))
    ):
        yield METHOD, ""
    for text in texts:
        if re.search(rf"^\s*(?:async )?def {entry_point}\b", text, re.MULTILINE) and not _tree(text):
            yield "unparsable", text


def _starts(answer: str, entry_point: str) -> list[int]:
    """Where code may begin, without a fence that says so."""
    first, indented = _CODE_LINE.search(answer), _INDENTED_LINE.search(answer)
    starts: list[int] = []
    if indented and not (first and first.start() < indented.start()):
        outer, _ = _outer_line(answer, indented.start())
        starts = [_from_assignments(answer, outer, entry_point)]
    if first:
        starts += [_from_assignments(answer, first.start(), entry_point), first.start()]
    if indented and not _outer_line(answer, indented.start())[1]:
        starts.append(indented.start())
    last = answer.rfind(f"def {entry_point}(")
    if last >= 0:
        line = answer.rfind("\n", 0, last) + 1
        outer, scoped = _outer_line(answer, line)
        starts += [outer] if scoped else [outer, line]
    return [*dict.fromkeys(starts)]


def _outer_line(answer: str, start: int) -> tuple[int, bool]:
    """Where the line without indentation that this one stands below begins, and whether it is in a class or a function."""
    least, scoped = len(_indentation(answer[start:])), False
    while start > 0 and least > 0:
        start = answer.rfind("\n", 0, start - 1) + 1
        line = answer[start : answer.find("\n", start)]
        if line.strip() and len(_indentation(line)) < least:
            least = len(_indentation(line))
            scoped = scoped or bool(_SCOPE.match(line))
    return start, scoped


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


def fenced_blocks(answer: str) -> tuple[list[str], str | None]:
    """The fenced blocks, and the one that is still open at the end.

    What closes a fence is no shorter, and bare or behind a statement.
    """
    blocks: list[str] = []
    fence, indent, lines, glued = "", "", [""], 0
    for line in answer.split("\n"):
        found = _FENCE.match(line)
        if not fence:
            if found and not (found[2][0] == "`" and "`" in found[3]):
                code = _CODE_BEHIND_FENCE.match(found[3])
                fence, indent, lines = found[2], found[1], [found[3][code.end() :]] if code else []
        elif found and found[2].startswith(fence) and not found[3].strip():
            blocks.append("\n".join(lines))
            fence = ""
        else:
            lines.append(line.removeprefix(indent))
            if fence in line and not found and glued < _GLUED_FENCES:
                glued += 1
                statement = line.removeprefix(indent).partition(fence)[0]
                if _GLUED.search(line) and not _in_quotes("\n".join([*lines[:-1], statement])):
                    blocks.append("\n".join([*lines[:-1], statement]))
                    fence = ""
    return blocks, "\n".join(lines) if fence else None


def _in_quotes(text: str) -> bool:
    """Whether a text ends inside of a string or a comment."""
    last = None
    for last in _QUOTED.finditer(text):  # noqa: B007
        pass
    return (
        last is not None
        and last.end() == len(text)
        and (last[0].startswith("#") or any(part == "" for part in last.groups()))
    )


def _indentation(text: str) -> str:
    return text[: len(text) - len(text.lstrip(" \t"))]


def _outdented(text: str) -> str:
    """Without the indentation of its first line that is not blank, in every line that has it."""
    indent = _indentation(next((line for line in text.split("\n") if line.strip()), ""))
    return "\n".join(line.removeprefix(indent) for line in text.split("\n")) if indent else text


def _repaired(text: str) -> str:
    """The first of its forms that parses, "" where none does."""
    return next((form for form in _forms(text) if _tree(form)), "")


def _forms(text: str) -> Iterator[str]:
    """The text as it is, then repaired: no indentation of all lines, of the first, of the rest; what cannot be seen."""
    for seen in dict.fromkeys((text, text.translate(_SEEN))):
        first, newline, rest = seen.lstrip("\n").partition("\n")
        yield from dict.fromkeys((seen, _outdented(seen), first.strip() + newline + _outdented(rest)))


def _continued(stub: str, body: str, entry_point: str) -> str:
    """stub + body where that adds statements to the entry point, "" where not.

    The indentation of the body is mended if need be: of the forms that it may have had, the one of which most parses.
    """
    body = body.strip("\n").rstrip()
    if not body or re.search(rf"^[ \t]*(?:(?:async )?def|class) {entry_point}\b", body, re.MULTILINE):
        return ""
    last = stub.rstrip().rpartition("\n")[2]
    indent = _indentation(last) or "    "
    forms = [body, indent + body, *(textwrap.indent(form, indent) for form in _forms(body))]
    for width in (8, 4) if "\t" in body else ():
        spaces = re.sub(r"^[ \t]+", lambda found: found[0].expandtabs(width), body, flags=re.MULTILINE)  # noqa: B023
        forms += [textwrap.indent(form, indent) for form in _forms(spaces)]
    best = ""
    for form in dict.fromkeys(forms):
        whole = stub.rstrip() + "\n" + form
        code = _parsable_part(whole)
        if len(code.split("\n")) > len(best.split("\n")) or not best:
            best = code if _goes_on(code, entry_point, stub.rstrip().count("\n") + 1) else best
        if best.count("\n") == whole.count("\n"):
            break
    return best


def _goes_on(code: str, name: str, line: int) -> bool:
    """Whether the function that begins in the first `line` lines ends after them, and nothing returns outside of it."""
    tree = _tree(code)
    if tree is None or _returns(tree.body) or any(_imports(node, name) for node in ast.walk(tree)):
        return False
    return any(
        isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        and node.name == name
        and node.lineno <= line < (node.end_lineno or 0)
        for node in tree.body
    )


def _parsable_part(text: str) -> str:
    """The text without the lines at its end that do not parse; "" if a few attempts do not find such a part.

    Without the first line's indentation. Of a line with a fence in it, what stands before the fence is kept.
    """
    lines = _outdented(text).split("\n")
    for _ in range(_ATTEMPTS):
        try:
            ast.parse("\n".join(lines))
        except SyntaxError as error:
            if "non-printable" in error.msg:
                lines = [line.translate(_SEEN) for line in lines]
                continue
            number = min((error.lineno or 1) - 1, len(lines) - 1)
            statement, fence, _ = _at_fence(lines[number])
            lines = [*lines[:number], *([statement] if fence and statement.strip() else [])]
        except (ValueError, RecursionError, MemoryError):
            return ""
        else:
            return "\n".join(lines)
        if not lines:
            return ""
    return ""


def _at_fence(line: str) -> tuple[str, str, str]:
    found = _GLUED.search(line)
    return line.partition(found[0]) if found else (line, "", "")


def _tree(code: str) -> ast.Module | None:
    try:
        return ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def _defines(code: str, name: str, imports: bool = False) -> bool:
    """Whether a program gives the name to a function, a class or a value; imports: or to what it imports."""
    tree = _tree(code)
    if tree is None:
        return False
    assigned = False
    for node in _statements(tree.body):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            if node.name == name:
                return True
        elif isinstance(node, (ast.Assign, ast.AnnAssign, ast.Expr)):
            assigned = assigned or _assigns(node, name)
        elif imports and _imports(node, name):
            return True
    return assigned and not _returns(tree.body)  # else a body, with a variable of that name


def _statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Those of a module's own level, in branches and blocks too."""
    for node in body:
        yield node
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            for part in ("body", "orelse", "finalbody"):
                yield from _statements(getattr(node, part, []))
            for part in ("handlers", "cases"):
                for inner in getattr(node, part, []):
                    yield from _statements(inner.body)


def _returns(body: list[ast.stmt]) -> bool:
    return any(isinstance(node, ast.Return) for node in _statements(body))


def _assigns(node: ast.Assign | ast.AnnAssign | ast.Expr, name: str) -> bool:
    if isinstance(node, ast.AnnAssign):
        return node.value is not None and _is_target(node.target, name)
    if isinstance(node, ast.Assign):
        return any(_is_target(target, name) for target in node.targets)
    return isinstance(node.value, ast.NamedExpr) and _is_target(node.value.target, name)


def _is_target(target: ast.expr, name: str) -> bool:
    if isinstance(target, (ast.Tuple, ast.List)):
        return any(_is_target(each, name) for each in target.elts)
    return isinstance(target, ast.Name) and target.id == name


def _imports(node: ast.AST, name: str) -> bool:
    return isinstance(node, (ast.Import, ast.ImportFrom)) and any((each.asname or each.name) == name for each in node.names)


def _has_method(text: str, name: str) -> bool:
    tree = _tree(_parsable_part(text))
    classes = [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)] if tree else []
    return any(isinstance(node, ast.FunctionDef) and node.name == name for each in classes for node in each.body)
