"""What was probably meant by a name or a path that does not exist: the end of an error message, or nothing."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable
from itertools import islice
from pathlib import Path

_MOST = 10_000  # names of a folder that are looked at


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """ " (did you mean 'w8a8'?)", or "" where nothing known is close. Upper and lower case count as the same."""
    close = likely(word, known)
    return f" (did you mean {close!r}?)" if close is not None else ""


def did_you_mean_path(path: str | os.PathLike[str]) -> str:
    """The same for a path that does not exist: each part of it that is missing may be a misspelt neighbour."""
    close = likely_path(Path(path))
    return f" (did you mean {str(close)!r}?)" if close is not None else ""


def likely(word: str, known: Iterable[str]) -> str | None:
    spelt = {name.casefold(): name for name in known}
    found = difflib.get_close_matches(word.casefold(), spelt, n=1)
    return spelt[found[0]] if found else None


def likely_path(path: Path) -> Path | None:
    """An existing path that differs from `path` in the spelling of its parts; None where there is none, or it exists."""
    found = Path(path.anchor)
    for part in path.parts[len(found.parts) :]:
        if not os.path.lexists(found / part):
            try:
                with os.scandir(found) as entries:
                    close = likely(part, [entry.name for entry in islice(entries, _MOST)])
            except OSError:  # not a folder, or not to be listed
                return None
            if close is None:
                return None
            part = close
        found /= part
    return found if found != path else None
