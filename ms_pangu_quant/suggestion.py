"""What was probably meant, or happened: the end of an error message, or nothing."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable
from itertools import islice
from pathlib import Path

_MOST = 10_000  # names of a folder that are looked at
_PAGE = (b"<!doctype", b"<html", b"<head", b"<body", b"<?xml", b"<error", b"<!--")  # in small letters


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


def dangling(path: Path) -> str:
    """What to do about a link that points nowhere, as a download cache's do when they are copied; or nothing."""
    if path.is_symlink() and not path.exists():
        return (
            f"; it is a link to {os.readlink(path)}, which is not there: copy the folder with what its links name (cp -rL)"
        )
    return ""


def fetching(content: bytes, otherwise: str = "download it again") -> str:
    """What to do about a file that begins with this and should not: it is what stands for a large file, or a web page."""
    if content.startswith(b"version https://git-lfs"):
        return "run git lfs pull"
    if content[:1000].removeprefix(b"\xef\xbb\xbf").lstrip().lower().startswith(_PAGE):
        return "it is a web page (a login or proxy page?); download it again"
    return otherwise
