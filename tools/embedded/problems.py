"""Problems of the `mini` task: functions that apply one to five steps, drawn from a seed.

A combination is the names of a function's steps in their order. Whole combinations belong to one of three splits by a hash
of their names, so no held-out or validation function was ever trained on, whatever its wording and numbers; single steps
are only trained on. A problem's docstring tells the steps in their order, or, the harder half, lettered and shuffled with
the order given at the end.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from tools.embedded.steps import BY_KIND, BY_NAME, KINDS, Step

SPLITS = ("train", "validation", "test")
_ARGUMENTS = {
    "list": ["nums", "values", "items", "numbers", "data", "xs", "seq", "elems"],
    "text": ["text", "s", "string", "phrase", "line", "msg"],
    "words": ["words", "tokens", "names", "strings", "terms"],
    "number": ["n", "num", "value", "number", "x0", "m"],
}
_LOCALS = {"list": "out", "text": "res", "words": "parts", "number": "total", "counts": "counts", "truth": "flag"}
_SECOND = ["k", "t", "limit", "q", "bound"]
_VERBS = [
    "get",
    "make",
    "build",
    "find",
    "apply",
    "run",
    "calc",
    "solve",
    "form",
    "pick",
    "scan",
    "fold",
    "map",
    "filter",
    "shape",
    "mix",
    "merge",
    "turn",
]
_NOUNS = [
    "value",
    "result",
    "list",
    "data",
    "items",
    "output",
    "score",
    "code",
    "series",
    "pack",
    "group",
    "record",
    "entry",
    "total",
    "chain",
    "table",
]
_WORDS = [
    "apple",
    "banana",
    "Cat",
    "dog",
    "River",
    "stone",
    "Blue",
    "green",
    "light",
    "Moon",
    "tree",
    "House",
    "paper",
    "cloud",
    "seven",
    "Kite",
    "level",
    "Ocean",
    "queen",
    "noon",
    "radar",
    "tiger",
    "Under",
    "violet",
    "Water",
    "zoo",
    "Edge",
    "fish",
    "game",
    "Hat",
    "ice",
]
_LETTERS = "aeioutrnslbgd"
_ORDINALS = "abcde"
_MAX_EXAMPLE, _MAX_VALUE = 40, 300  # characters of a value's repr in a docstring, in an assert


@dataclass(frozen=True)
class Function:
    """steps   the combination; plan  what each step is called, numbers filled in, one for each step.
    second   name of the argument that takes the place of one number, "" if there is none.
    body     the reference solution's lines, indented; prompt  signature and docstring, as HumanEval writes them.
    """

    name: str
    kind: str
    argument: str
    second: str
    steps: tuple[str, ...]
    plan: tuple[str, ...]
    signature: str
    body: str
    docstring: str
    prompt: str = ""

    @property
    def is_lettered(self) -> bool:
        """Whether the docstring letters and shuffles the steps."""
        return self.docstring.startswith("For ")

    def __call__(self, *arguments: Any) -> Any:
        namespace: dict[str, Any] = {}
        exec(f"{self.signature}\n{self.body}", namespace)
        return namespace[self.name](*arguments)


def split_of(steps: tuple[str, ...]) -> str:
    """12 of 100 combinations are test's, 6 validation's; one step alone is training's."""
    if len(steps) == 1:
        return "train"
    share = int.from_bytes(hashlib.sha256("|".join(steps).encode()).digest()[:8], "big") % 100
    return "test" if share < 12 else "validation" if share < 18 else "train"


def draw(rng: random.Random, split: str, count: int | None = None) -> Function:
    """A function of `split` with an example or two in its docstring; count  its number of steps, drawn if None."""
    if split not in SPLITS:
        raise ValueError(f"split: got {split!r}, wanted one of {', '.join(SPLITS)}")
    while True:
        length = count or rng.choices((1, 2, 3, 4, 5), (6, 24, 32, 24, 14))[0]
        kind, steps = _walk(rng, length)
        if len(set(steps)) == len(steps) == length and split_of(steps) == split:
            function = _with_examples(rng, _write(rng, kind, steps))
            if function is not None:
                return function


def problems(seed: int, split: str, counts: dict[int, int], prefix: str, lettered: float = 0.5) -> Iterator[dict[str, Any]]:
    """Rows in HumanEval's form, each of another combination.

    counts    steps -> how many problems with so many; easy and hard ones are mixed.
    lettered  share of each count whose docstring letters and shuffles the steps; half of training's do.
    """
    rng = random.Random(seed)
    seen: set[tuple[str, ...]] = set()
    rows = []
    for length, count in counts.items():
        hard = round(count * lettered)
        for is_lettered, wanted in ((True, hard), (False, count - hard)):
            while wanted:
                function = draw(rng, split, length)
                if function.is_lettered != is_lettered or function.steps in seen:
                    continue
                asserts = _asserts(rng, function)
                if asserts is not None:
                    seen.add(function.steps)
                    rows.append((function, asserts))
                    wanted -= 1
    rng.shuffle(rows)
    for number, (function, asserts) in enumerate(rows):
        yield {
            "task_id": f"{prefix}/{number}",
            "prompt": function.prompt,
            "entry_point": function.name,
            "canonical_solution": function.body,
            "test": asserts,
            "steps": list(function.steps),
        }


def arguments(rng: random.Random, function: Function, small: bool = False) -> list[Any]:
    """What to call a function with; small  for an example in a docstring."""
    value = _value(rng, function.kind, small)
    return [value, rng.randint(2, 12)] if function.second else [value]


def _value(rng: random.Random, kind: str, small: bool) -> Any:
    if kind == "list":
        return [rng.randint(-9, 20) for _ in range(rng.randint(3, 4) if small else rng.randint(2, 9))]
    if kind == "words":
        return [rng.choice(_WORDS) for _ in range(rng.randint(2, 3) if small else rng.randint(2, 7))]
    if kind == "number":
        return rng.randint(0, 60 if small else rng.choice((15, 99, 150)))
    words = [rng.choice(_WORDS) for _ in range(rng.randint(1, 2) if small else rng.randint(1, 5))]
    if rng.random() < 0.4:
        words.insert(rng.randrange(len(words) + 1), str(rng.randint(0, 99)))
    return " ".join(words)


def _walk(rng: random.Random, length: int) -> tuple[str, tuple[str, ...]]:
    """A kind of argument, and steps each of which takes what the one before gives; shorter where a kind leads nowhere."""
    kind = start = rng.choices(tuple(KINDS), (40, 25, 15, 20))[0]
    names: list[str] = []
    for index in range(length):
        last = index == length - 1
        choices = [s for s in BY_KIND[kind] if not (s.first and index) and (last or s.gives != "truth")]
        if not choices:
            break
        step = rng.choices(choices, [1.0 if s.gives == kind else 1.2 if last else 0.35 for s in choices])[0]
        names.append(step.name)
        kind = step.gives
    return start, tuple(names)


def _write(rng: random.Random, kind: str, steps: tuple[str, ...]) -> Function:
    argument = rng.choice(_ARGUMENTS[kind])
    name = f"{rng.choice(_VERBS)}_{rng.choice(_NOUNS)}"
    second = ""
    variable, current = argument, kind
    lines: list[str] = []
    plan: list[str] = []
    told: list[str] = []
    for index, step in enumerate(BY_NAME[each] for each in steps):
        fields = _fields(rng, step)
        if not second and "{n}" in step.code and "{m}" not in step.code and rng.random() < 0.2:
            second = fields["n"] = rng.choice([each for each in _SECOND if each != argument])
        plan.append(step.phrases[0].format(**fields))
        told.append(rng.choice(step.phrases).format(**fields))
        result = variable if step.gives == current else _LOCALS[step.gives]
        if result == argument and step.gives != kind:
            result += "2"
        code = step.code.format(v=variable, out=result, **fields).split("\n")
        last = index == len(steps) - 1
        if step.is_block:
            lines += [line for line in code if line != f"{result} = {result}"] + [f"return {result}"] * last
        else:
            lines.append(f"return {code[0]}" if last else f"{result} = {code[0]}")
        variable, current = result, step.gives
    signature = f"def {name}({argument}{', ' + second if second else ''}):"
    body = "".join(f"    {line}\n" for line in lines)
    docstring = _docstring(rng, f"{KINDS[kind]} {argument}", told)
    return Function(name, kind, argument, second, steps, tuple(plan), signature, body, docstring)


def _fields(rng: random.Random, step: Step) -> dict[str, Any]:
    number = rng.randint(2, 9) if step.divisor else rng.randint(1, 15)
    first, other = rng.sample(_LETTERS, 2)
    count = rng.randint(3, 6) if step.takes == "words" else rng.randint(2, 4)
    return {
        "n": number,
        "m": number + rng.randint(2, 20),
        "k": count,
        "a": first,
        "b": other,
        "p": rng.choice("-_,+:/"),
    }


def _docstring(rng: random.Random, given: str, told: list[str]) -> str:
    if len(told) == 1:
        return f"Given {given}, {told[0]}."
    style = rng.random()
    if style < 0.3:
        return f"Given {given}, {', then '.join(told)}."
    if style < 0.5:
        return f"Take {given}. {' '.join(each[0].upper() + each[1:] + '.' for each in told)}"
    order = list(range(len(told)))
    rng.shuffle(order)
    letters = {step: _ORDINALS[place] for place, step in enumerate(order)}
    listed = "; ".join(f"({letters[step]}) {told[step]}" for step in order)
    return f"For {given}: {listed}. Order: {', '.join(letters[step] for step in range(len(told)))}."


def _with_examples(rng: random.Random, function: Function) -> Function | None:
    """None where the function fails on what it is given, or has nothing short to show."""
    shown = ""
    for _ in range(8):
        given = arguments(rng, function, small=True)
        try:
            result = repr(function(*given))
        except (ValueError, IndexError, ZeroDivisionError, OverflowError):
            return None
        if len(result) <= _MAX_EXAMPLE:
            shown = f"    >>> {function.name}({', '.join(map(repr, given))})\n    {result}\n"
            break
    if not shown:
        return None
    return replace(function, prompt=f'{function.signature}\n    """{function.docstring}\n{shown}    """\n')


def _asserts(rng: random.Random, function: Function, wanted: int = 8) -> str | None:
    """check(candidate) with `wanted` asserts, or None where they would let a function pass that leaves out a step."""
    cases: list[tuple[list[Any], Any]] = []
    for _ in range(8 * wanted):
        given = arguments(rng, function)
        try:
            result = function(*given)
        except (ValueError, IndexError, ZeroDivisionError, OverflowError):
            return None
        if len(repr(result)) <= _MAX_VALUE and all(given != case[0] for case in cases):
            cases.append((given, result))
        if len(cases) == wanted:
            break
    results = {repr(result) for _, result in cases}
    if len(cases) < wanted or len(results) < (2 if results <= {"True", "False"} else 4) or _needless(function, cases):
        return None
    lines = [f"    assert candidate({', '.join(map(repr, given))}) == {result!r}\n" for given, result in cases]
    return "def check(candidate):\n" + "".join(lines)


def _needless(function: Function, cases: list[tuple[list[Any], Any]]) -> bool:
    """Whether some line that only changes the argument can go without any case noticing."""
    lines = function.body.splitlines(keepends=True)
    for index, line in enumerate(lines):
        if line.startswith(f"    {function.argument} = "):
            shorter = replace(function, body="".join(lines[:index] + lines[index + 1 :]))
            try:
                if all(repr(shorter(*given)) == repr(result) for given, result in cases):
                    return True
            except (ValueError, IndexError, ZeroDivisionError, OverflowError, TypeError, AttributeError):
                continue
    return False
