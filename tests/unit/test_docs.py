"""What the pages say exists: links and anchors, files, commands with their options, recipes, make targets.

Commands are parsed by the programs' own parsers, and not run.
"""

from __future__ import annotations

import argparse
import re
import shlex
import sys
from collections import Counter
from collections.abc import Iterator
from itertools import groupby, pairwise, takewhile, zip_longest
from pathlib import Path

import pytest
import typer
from markdown_it import MarkdownIt

from ms_pangu_quant.job.arguments import Parser

ROOT = Path(__file__).parents[2]
READMES = ("README.md", "README.zh-CN.md")
PAGES = sorted([*READMES, "SECURITY.md", *(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))])
FOLDERS = ("docs", "tools", "configs", "tests", "ms_pangu_quant")
PACKAGE_FOLDERS = tuple(
    path.name for path in (ROOT / "ms_pangu_quant").iterdir() if path.is_dir() and path.name != "configs"
)
_OURS = r"(pangu-quant|python tools/\S+|tools/\S+\.(py|sh)|make|pytest)( |$)"
PLACEHOLDER = re.compile(r"\.\.\.|…")


def text_of(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def tokens(text: str) -> list:
    """Block tokens, those inside of inline ones after them."""
    found = []
    for token in MarkdownIt("commonmark").enable("table").parse(text):
        found += [token, *(token.children or ())]
    return found


def slugs(text: str) -> set[str]:
    """Anchors of the headings, as GitHub makes them."""
    parsed = MarkdownIt("commonmark").parse(text)
    found: set[str] = set()
    for opening, inline in pairwise(parsed):
        if opening.type == "heading_open":
            said = "".join(child.content for child in inline.children or () if child.type in ("text", "code_inline"))
            slug = re.sub(r"[^\w\- ]", "", said.lower()).replace(" ", "-")
            number = next(n for n in range(99) if (slug if n == 0 else f"{slug}-{n}") not in found)
            found.add(slug if number == 0 else f"{slug}-{number}")
    return found


def links(text: str) -> list[str]:
    """Targets of links and pictures that are not on the network."""
    found = [token.attrs.get("href") or token.attrs.get("src") for token in tokens(text)]
    return [target for target in found if isinstance(target, str) and not re.match(r"https?:|mailto:", target)]


def dangling(page: str, text: str) -> list[str]:
    """Links of a page that lead nowhere."""
    bad = []
    for target in links(text):
        file, _, anchor = target.partition("#")
        path = ((ROOT / page).parent / file).resolve() if file else ROOT / page
        there = path.exists() and path.is_relative_to(ROOT)
        if not there or (anchor and anchor not in slugs(path.read_text(encoding="utf-8") if file else text)):
            bad.append(target)
    return bad


def shell_lines(text: str) -> Iterator[str]:
    """Lines of shell blocks, continued ones joined; without comments."""
    for token in MarkdownIt("commonmark").parse(text):
        if token.type == "fence" and token.info.split(" ")[0] in ("", "bash", "sh"):
            yield from re.sub(r"\\\n\s*", " ", token.content).splitlines()


def commands(text: str) -> Iterator[list[str]]:
    """The words of every command of ours: in shell blocks, and in running text between backquotes."""
    inline = [token.content for token in tokens(text) if token.type == "code_inline"]
    for line in [*shell_lines(text), *inline]:
        words = shlex.split(line, comments=True) if re.match(_OURS, line) else []
        for separator, given in groupby(words, lambda word: word in ("&&", "|", ";")):
            command = list(given)
            if not separator and re.match(_OURS, shlex.join(command)):
                yield list(takewhile(lambda word: not re.fullmatch(r"\d?>>?.*", word), command))


def made_by(page: str) -> set[str]:
    """Files that a page's blocks give to be written."""
    return set(re.findall(r"(?m)^```\w+ title=(\S+)$", text_of(page)))


# --- parsing, without running ---------------------------------------------------------------------------------------


class _Parsed(Exception):
    pass


@pytest.fixture(scope="module")
def command_line() -> typer.core.TyperGroup:
    from ms_pangu_quant.cli import app

    return typer.main.get_command(app)


def parse_ours(command_line, words: list[str]) -> None:
    """Fails with what the command line would say. Without arguments a command is only named; with an ellipsis it only
    has to have the options that are named."""
    name, *arguments = words or ["quantize"]
    assert name in command_line.commands, f"no command {name}"
    command = command_line.commands[name]
    if any(PLACEHOLDER.search(word) for word in arguments):
        known = {option for parameter in command.params for option in parameter.opts}
        assert {word for word in arguments if word.startswith("-")} <= known
    elif arguments and "--help" not in arguments:
        try:
            with command_line.make_context("pangu-quant", [name]) as parent:
                command.make_context(name, arguments, parent=parent)
        except Exception as error:
            if not hasattr(error, "format_message"):  # the command line's own, which typer has in a copy of click's
                raise
            raise AssertionError(error.format_message()) from None


def parse_tool(path: Path, arguments: list[str], monkeypatch) -> None:
    """Run a tool's own parser on the arguments and stop there."""
    import importlib.util

    for parser in (Parser, argparse.ArgumentParser):
        original = parser.parse_args

        def parse_and_stop(self, args=None, namespace=None, original=original):
            original(self, args, namespace)
            raise _Parsed

        monkeypatch.setattr(parser, "parse_args", parse_and_stop)
    monkeypatch.setattr(sys, "argv", [str(path), *arguments])
    spec = importlib.util.spec_from_file_location(f"docs_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
        with pytest.raises(_Parsed):
            module.main(arguments) if module.main.__code__.co_argcount else module.main()
    finally:
        del sys.modules[spec.name]


def check(words: list[str], page: str, command_line, monkeypatch) -> None:
    """Fails or raises if the command could not be given."""
    program, *arguments = words
    if program == "python":
        program, *arguments = arguments
    if program == "make":
        targets = set(re.findall(r"(?m)^([a-z-]+):", text_of("Makefile")))
        assert {word for word in arguments if "=" not in word} <= targets
    elif program == "pytest":
        files = [word.partition("::")[0] for word in arguments if word.startswith("tests/")]
        assert all((ROOT / file).exists() or file in made_by(page) for file in files)
    elif program == "pangu-quant":
        parse_ours(command_line, arguments)
    else:
        path = ROOT / program
        assert path.is_file(), program
        thin = re.search(r'run\(\["(\w+)", \*sys', path.read_text(encoding="utf-8"))
        if thin:
            parse_ours(command_line, [thin[1], *arguments])
        elif path.suffix == ".py" and arguments and not any(PLACEHOLDER.search(word) for word in arguments):
            parse_tool(path, arguments, monkeypatch)


@pytest.mark.parametrize("page", PAGES)
def test_every_link_and_anchor_resolves(page):
    assert dangling(page, text_of(page)) == []


@pytest.mark.parametrize("page", PAGES)
def test_every_command_is_one_that_the_programs_take(page, command_line, monkeypatch):
    for words in commands(text_of(page)):
        if words[:1] == ["make"] and len(words) > 1 and not re.fullmatch(r"[a-z-]+", words[1]):
            continue
        try:
            check(words, page, command_line, monkeypatch)
        except (AssertionError, SystemExit) as error:
            if error.args != (0,):  # a tool's --help
                pytest.fail(f"{page}: {shlex.join(words)}: {error}")


@pytest.mark.parametrize("page", PAGES)
def test_every_recipe_that_a_command_names_exists(page):
    from ms_pangu_quant.recipe.parse import find_recipe

    for words in commands(text_of(page)):
        for option, name in pairwise(words):
            if option == "--recipe" and f"configs/{name}.yaml" not in made_by(page) and not PLACEHOLDER.search(name):
                find_recipe(name)  # raises


@pytest.mark.parametrize("page", PAGES)
def test_every_file_of_the_project_that_a_page_names_exists(page):
    missing = []
    for token in tokens(text_of(page)):
        if token.type != "code_inline" or not re.fullmatch(r"[\w./{},-]+", token.content):
            continue
        for name in braces(token.content):
            top, _, rest = name.partition("/")
            bases = [ROOT] * (top in FOLDERS) + [ROOT / "ms_pangu_quant"] * (top in PACKAGE_FOLDERS)
            if rest and bases and not any((base / name).exists() for base in bases) and name not in made_by(page):
                missing.append(name)
    assert missing == []


def braces(name: str) -> list[str]:
    """a_{1,2} -> a_1, a_2"""
    found = re.search(r"\{([^}]*)\}", name)
    if not found:
        return [name]
    return [each for part in found[1].split(",") for each in braces(name[: found.start()] + part + name[found.end() :])]


def test_the_index_of_the_pages_names_every_page():
    named = {target.partition("#")[0] for target in links(text_of("docs/README.md"))}
    pages = {path.name for path in (ROOT / "docs").iterdir() if path.suffix in (".md", ".ipynb")} - {"README.md"}
    assert pages <= named


# --- the two READMEs ------------------------------------------------------------------------------------------------


def outline(page: str) -> list[str]:
    return [token.tag for token in MarkdownIt("commonmark").parse(text_of(page)) if token.type == "heading_open"]


def code_blocks(page: str) -> list[tuple[str, list[str]]]:
    """(language, lines without comments) of every block but drawings, whose labels are translated."""
    found = []
    for token in MarkdownIt("commonmark").parse(text_of(page)):
        if token.type == "fence" and token.info != "mermaid":
            found.append((token.info, [line.split("  #")[0].rstrip() for line in token.content.splitlines()]))
    return found


NUMBERS = {  # in words -> in English, in Chinese
    "1/4": ("a quarter", "四分之一"),
    "1/3": ("a third", "三分之一"),
    "1/2": ("half", "减半|一半"),
    "2": ("two", "两个|双核"),
    "3": ("three", "三种|三个"),
}


def sections(text: str) -> list[dict[str, list[str]]]:
    """Of the text in front of the first heading and below each: its figures, in digits or words, what is code, and links.

    Sorted, since languages differ in their order; blocks of code are left out.
    """
    found: list[dict[str, list[str]]] = [{"figures": [], "code": [], "links": []}]
    for token in tokens(text):
        if token.type == "heading_open":
            found.append({"figures": [], "code": [], "links": []})
        if token.type == "code_inline":
            found[-1]["code"].append(token.content)
        if token.type == "text":
            found[-1]["figures"] += re.findall(r"\d+(?:[.,]\d+)*(?:e-\d+)?", token.content)
            for figure, (english, chinese) in NUMBERS.items():
                found[-1]["figures"] += [figure] * len(re.findall(rf"\b{english}\b|{chinese}", token.content))
        target = token.attrs.get("href") or token.attrs.get("src")
        found[-1]["links"] += [str(target)] if target else []
    return [{kind: sorted(each) for kind, each in section.items()} for section in found]


def differences(english: str, chinese: str) -> list[str]:
    """What one language says and the other does not; each links to the other."""
    found = []
    ours, theirs = sections(english.replace(READMES[1], READMES[0])), sections(chinese)
    for number, (one, other) in enumerate(zip_longest(ours, theirs, fillvalue={})):
        for kind in ("figures", "code", "links"):
            a, b = Counter(one.get(kind, ())), Counter(other.get(kind, ()))
            found += [f"section {number}, {kind}: {each} is in one only" for each in [*(a - b), *(b - a)]]
    return found


def table_rows(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]


def results(page: str, table: str) -> str:
    return re.search(rf"<!-- table: {table} -->\n(.*?)<!-- end -->", text_of(page), re.DOTALL)[1]


def test_both_readmes_have_the_same_sections_commands_figures_links_and_results():
    english, chinese = READMES
    assert outline(english) == outline(chinese)
    assert code_blocks(english) == code_blocks(chinese)
    assert differences(text_of(english), text_of(chinese)) == []
    for table in ("results", "results_real"):
        assert results(english, table) == results(chinese, table)
    arrows = [len(re.findall("-->|-- ", text_of(page))) for page in READMES]
    assert arrows[0] == arrows[1], "the drawings differ"


@pytest.mark.parametrize("page", READMES)
def test_a_readme_is_short(page):
    assert len(text_of(page).splitlines()) <= 150


@pytest.mark.parametrize("table", ["results", "results_real"])
def test_the_readmes_figures_are_those_of_the_accuracy_page(table):
    """Of every recipe in the results, each figure stands in a row of that recipe, or of its ratio to the other tools."""
    rows = table_rows(text_of("docs/accuracy.md"))
    header, _, *shown = table_rows(results("README.md", table))
    assert len(shown) >= 4
    for row in shown:
        recipe = row[header.index("recipe")]
        told = " | ".join(" | ".join(each) for each in rows if any(recipe in cell for cell in each))
        for figure in filter(None, row[header.index("recipe") + 1 :]):
            assert re.search(rf"(?<![\d.]){re.escape(figure)}(?![\d.])", told), f"{recipe}: {figure}"


# --- the checks are not blind ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    ["[a](nowhere.md)", "[a](README.md#no-such-heading)", "![a](docs/images/nothing.png)", "[a](#nothing)", "[a](../../x)"],
)
def test_a_link_to_nowhere_is_found(text):
    assert len(dangling("README.md", text)) == 1


@pytest.mark.parametrize(
    "line",
    [
        "pangu-quant quantise x --recipe w8a8 --output y",
        "pangu-quant quantize x --recipe w8a8 --outputs y",
        "pangu-quant quantize x --recipe w8a8",
        "pangu-quant compare x y --data z --limit many",
        "pangu-quant compare ... --limits 3",
        "python tools/dev/make_checkpoint.py --shape 700b --output y",
        "python tools/nothing.py",
        "python tools/generate.py x --mood no_think",
        "make everything",
        "pytest tests/unit/test_nothing.py",
    ],
)
def test_a_command_that_cannot_be_given_is_found(line, command_line, monkeypatch):
    (words,) = commands(f"```bash\n{line}  # a comment\n```")
    with pytest.raises((AssertionError, SystemExit)):
        check(words, "README.md", command_line, monkeypatch)


@pytest.mark.parametrize(
    ("english", "chinese"),
    [
        ("128 are enough", "126 条即可"),
        ("5.2 times as fast", "5.3 倍"),
        ("a third of the time", "时间的四分之一"),
        ("on two cores", "在三个核上"),
        ("with `--resume`", "加 `--dry-run`"),
        ("with `--resume`", "加 --resume"),
        ("[a](x.md)", "[a](y.md)"),
        ("[a](https://x.org)", "a"),
        ("# A\n\n1\n\n# B\n\n2", "# 甲\n\n2\n\n# 乙\n\n1"),
        ("# A\n\n1\n\n# B\n\n2", "# 甲\n\n1"),
        ("once: 7", "一次：7，又一次：7"),
    ],
)
def test_a_difference_between_two_languages_is_found(english, chinese):
    assert differences(english, english) == differences(chinese, chinese) == []
    assert differences(english, chinese)


def test_headings_get_githubs_anchors():
    assert slugs("# A `b_c` (d): e-f\n\n## Twice\n\n## Twice\n\n## 部署 x\n") == {
        "a-b_c-d-e-f",
        "twice",
        "twice-1",
        "部署-x",
    }
