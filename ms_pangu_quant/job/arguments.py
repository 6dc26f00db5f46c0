"""argparse as msrun and the tools use it: an error is one line that names the likely option or choice, exit code 2."""

from __future__ import annotations

import argparse
import sys
import textwrap
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

from ms_pangu_quant.suggestion import did_you_mean


class Parser(argparse.ArgumentParser):
    """description and example, one line or several, stand in the help as they are written; the example ends it."""

    def __init__(self, *, example: str = "", **settings: Any) -> None:
        settings.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        if example:
            settings["epilog"] = f"Example:\n{textwrap.indent(example, '  ')}"
        super().__init__(**settings)

    def parse_args(  # type: ignore[override]  # one signature for the three overloads
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> Any:
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            name = unknown[0].partition("=")[0]
            close = did_you_mean(name, _options(self)) if name.startswith("-") else ""
            self.error(f"{name}: {'no such option' if name.startswith('-') else 'is one argument too many'}{close}")
        return parsed

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            known = [str(each) for each in action.choices]
            close = did_you_mean(str(value), known)
            raise argparse.ArgumentError(action, f"got {str(value)!r}{close}, wanted one of {', '.join(known)}")

    def error(self, message: str) -> NoReturn:
        print(f"{self.prog}: error: {message}; {self.prog} --help shows how it is used", file=sys.stderr)
        sys.exit(2)


def _options(parser: argparse.ArgumentParser) -> Iterator[str]:
    """Of the parser and of its subcommands."""
    for action in parser._actions:
        yield from action.option_strings
        if isinstance(action, argparse._SubParsersAction):
            for each in action.choices.values():
                yield from _options(each)
