"""Files of one JSON object a line that only ever grow, so that whatever was written before a crash is kept.

A sample is {"task_id", "sample_id", "completion"}; a completion is the model's raw text or plain code. Those that
`pangu-quant evaluate` generates also say task, mode, model, prompt and how long thought and answer are.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from ms_pangu_quant.errors import DataError, OutputError
from ms_pangu_quant.suggestion import did_you_mean_path

Record = dict[str, Any]


def read_records(path: Path) -> Iterator[tuple[int, Record]]:
    """(line number, record). Raises DataError for a line that is no JSON object."""
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise DataError(f"{path}: cannot read ({error.strerror}){did_you_mean_path(path)}") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise DataError(f"{path}: line {number} is not JSON ({error})") from None
        if not isinstance(record, dict):
            raise DataError(f"{path}: line {number}: got a JSON {type(record).__name__}, wanted an object")
        yield number, record


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
        end = self._file.seek(0, os.SEEK_END)
        self._file.seek(0)
        kept = self._file.read().rfind(b"\n") + 1
        if kept < end:
            self._file.truncate(kept)


def line(record: Mapping[str, Any]) -> bytes:
    """ASCII, so that a lone surrogate in a model's answer is kept and can be printed."""
    return json.dumps(record).encode("ascii") + b"\n"


def write_records(path: Path, records: list[Record]) -> None:
    """Replace the file at once."""
    write_bytes(path, b"".join(map(line, records)))


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    write_bytes(path, json.dumps(value, indent=1).encode("ascii") + b"\n")


def write_bytes(path: Path, content: bytes) -> None:
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch.write_bytes(content)
        os.replace(scratch, path)
    except OSError as error:
        raise OutputError(f"{path}: cannot write ({error.strerror})") from None
