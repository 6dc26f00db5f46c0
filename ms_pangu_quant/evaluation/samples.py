"""Files of one JSON object a line that only ever grow, so that whatever was written before a crash is kept.

A sample is {"task_id", "sample_id", "completion"}; a completion is the model's raw text or plain code. Those that
`pangu-quant evaluate` generates also say task, mode, model, prompt and how long thought and answer are.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from ms_pangu_quant.checkpoint.files import json_text
from ms_pangu_quant.errors import DataError, OutputError
from ms_pangu_quant.suggestion import did_you_mean_path

Record = dict[str, Any]
_STEP = 1 << 16  # bytes


def read_records(path: Path) -> Iterator[tuple[int, Record]]:
    """(line number, record). Raises DataError for a line that is no JSON object."""
    return ((number, record) for number, _, record in _lines(path))


def places_of_records(path: Path) -> Iterator[tuple[int, Record]]:
    """(where its line begins in bytes, record). Raises DataError for a line that is no JSON object."""
    return ((start, record) for _, start, record in _lines(path))


def _lines(path: Path) -> Iterator[tuple[int, int, Record]]:
    """(line number, where it begins, record), one in memory at a time: a file of samples may be larger than the memory."""
    start = 0
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip(b"\xef\xbb\xbf \t\r\n"):
                    yield number, start, parse_record(line, f"{path}: line {number}")
                start += len(line)
    except OSError as error:
        raise DataError(f"{path}: cannot read ({error.strerror}){did_you_mean_path(path)}") from None


def parse_record(line: bytes, where: str) -> Record:
    """Raises DataError."""
    if line.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise DataError(f"{where} is UTF-16, wanted UTF-8; save the file so")
    array = "; jq -c '.[]' writes an array as lines" if line.lstrip(b"\xef\xbb\xbf \t").startswith(b"[") else ""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where} is not JSON ({error}){array}") from None
    if not isinstance(record, dict):
        raise DataError(f"{where}: got a JSON {type(record).__name__}, wanted an object{array}")
    return record


class Journal:
    """Appends records to a file, each with one write; a last line that a crash cut short is dropped when it is opened."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> Journal:
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(self._path, "a+b")
            self._drop_torn_line()
        except OSError as error:
            raise OutputError(f"{self._path}: cannot write ({error.strerror})") from None
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._file.close()

    def append(self, record: Mapping[str, Any]) -> None:
        try:
            self._file.write(line(record))
            self._file.flush()
        except OSError as error:
            raise OutputError(f"{self._path}: cannot write ({error.strerror})") from None

    def _drop_torn_line(self) -> None:
        end = kept = self._file.seek(0, os.SEEK_END)
        while kept > 0:
            start = max(0, kept - _STEP)
            self._file.seek(start)
            newline = self._file.read(kept - start).rfind(b"\n")
            kept = start + newline + 1
            if newline >= 0:
                break
        if kept < end:
            self._file.truncate(kept)


def line(record: Mapping[str, Any]) -> bytes:
    """ASCII, so that a lone surrogate in a model's answer is kept and can be printed."""
    return json_text(record).encode("ascii") + b"\n"


def write_records(path: Path, records: Iterable[Record]) -> None:
    """Replace the file at once."""
    write_pieces(path, map(line, records))


def rearrange(path: Path, places: Iterable[int]) -> None:
    """Replace the file at once by those of its lines that begin at these places."""
    with open(path, "rb") as file:

        def lines() -> Iterator[bytes]:
            for place in places:
                file.seek(place)
                yield file.readline().rstrip(b"\n") + b"\n"

        write_pieces(path, lines())


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    write_pieces(path, [json_text(value, indent=1).encode("ascii") + b"\n"])


def write_pieces(path: Path, pieces: Iterable[bytes]) -> None:
    """Replace the file at once."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(scratch, "wb") as file:
            file.writelines(pieces)
        os.replace(scratch, path)
    except OSError as error:
        raise OutputError(f"{path}: cannot write ({error.strerror})") from None
