"""Which files hold the rows of calibration data, and what is said of those that do not."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Iterator
from pathlib import Path

from ms_pangu_quant.errors import DataError
from ms_pangu_quant.suggestion import did_you_mean_path, fetching

WANTED = (
    "wanted a .jsonl, .json or .parquet file, a folder of .jsonl or .parquet files, or a dataset saved with "
    "save_to_disk (nothing is downloaded)"
)
JSON = (".jsonl", ".json")
_ROWS = (".jsonl", ".parquet")
_DEPTH, _NAMED = 4, 3  # folders below the one given that are looked into, and named
_AS_CHAT = (
    "write {'messages': [{'role': 'user', 'content': ...}, {'role': 'assistant', 'content': ...}]} of it and its answer"
)
_INSTEAD = {  # columns of other programs -> what to do
    "conversations": "rename it to 'messages', 'from' to 'role' (human: user, gpt: assistant) and 'value' to 'content'",
    "conversation": "rename it to 'messages', a list of {'role', 'content'}",
    "chosen": "rename it to 'messages'",
    "instruction": _AS_CHAT,
    "prompt": _AS_CHAT,
    "question": _AS_CHAT,
    "input_ids": "rename it to 'token_ids'",
    "content": "rename it to 'text'",
}
_PACKED = {
    b"\x1f\x8b": "gzip -d",
    b"\x28\xb5\x2f\xfd": "zstd -d",
    b"BZh": "bzip2 -d",
    b"\xfd7zXZ": "xz -d",
    b"PK\3\4": "unzip",
}
_PACKED_SUFFIXES = {".gz": "gzip -d", ".zst": "zstd -d", ".bz2": "bzip2 -d", ".xz": "xz -d", ".zip": "unzip"}
_OTHERS = {
    ".csv": "is a table of text; datasets.Dataset.from_csv(FILE).to_parquet(OTHER) makes a .parquet file of it",
    ".tsv": "is a table of text; datasets.Dataset.from_csv(FILE, sep='\\t').to_parquet(OTHER) makes a .parquet file of it",
    ".txt": 'is text without rows; write each text as a line {"text": ...} of a .jsonl file',
    ".arrow": "is a part of a saved dataset; give the folder that has its state.json",
}


def data_files(path: Path) -> list[Path]:
    """The files of rows, or the one folder that save_to_disk wrote. Raises DataError where there are none."""
    if not path.exists():
        raise DataError(f"{path}: not found{did_you_mean_path(path)}; {WANTED}")
    if not path.is_dir() or _is_saved(path):
        return [path]
    if (path / "dataset_dict.json").is_file():
        splits = ", ".join(sorted(state.parent.name for state in path.glob("*/state.json")))
        raise DataError(f"{path}: got a dataset of splits ({splits}), wanted the folder of one of them")
    found = _rows_in(path)
    if not found:
        raise DataError(f"{path}: no .jsonl or .parquet file in it{_elsewhere(path)}; {WANTED}")
    return found


def _is_saved(folder: Path) -> bool:
    return (folder / "state.json").is_file()


def _rows_in(folder: Path) -> list[Path]:
    """Not the hidden ones: macOS writes ._rows.jsonl beside rows.jsonl on foreign disks."""
    return sorted(
        file for file in folder.iterdir() if file.suffix in _ROWS and file.is_file() and not file.name.startswith(".")
    )


def _elsewhere(path: Path) -> str:
    """What there is in its stead."""
    folders = [folder for folder in _folders(path, _DEPTH) if _is_saved(folder) or _rows_in(folder)]
    if folders:
        named = ", ".join(str(folder) for folder in folders[:_NAMED])
        more = f" and {len(folders) - _NAMED} more" if len(folders) > _NAMED else ""
        one = "it" if len(folders) == 1 else "one of them"
        return f", but in {named}{more}: give {one}"
    others = sorted(file.name for file in path.iterdir() if file.suffix in {*JSON, *_PACKED_SUFFIXES, *_OTHERS})
    return f", but {', '.join(others[:_NAMED])}: give a file by its own path" if others else ""


def _folders(path: Path, depth: int) -> Iterator[Path]:
    for folder in sorted(path.iterdir()) if depth else ():
        if folder.is_dir() and not folder.name.startswith("."):
            yield folder
            if not _is_saved(folder):
                yield from _folders(folder, depth - 1)


def check_kind(path: Path) -> None:
    """Raises DataError for a file that cannot hold rows, by its name and its first bytes; OSError where it is not read."""
    with path.open("rb") as file:
        head = file.read(4096).removeprefix(codecs.BOM_UTF8).lstrip()
    unpack = next((command for magic, command in _PACKED.items() if head.startswith(magic)), None)
    unpack = unpack or _PACKED_SUFFIXES.get(path.suffix)
    if unpack:
        raise DataError(f"{path}: is compressed; run {unpack} on it first")
    if head.startswith(b"version https://git-lfs"):
        raise DataError(f"{path}: is a git-lfs pointer, not the data; {fetching(head)}")
    if head.startswith(b"<"):
        raise DataError(f"{path}: not the data; {fetching(head)}")
    if path.suffix not in (*JSON, ".parquet"):
        which = f", which {_OTHERS[path.suffix]}" if path.suffix in _OTHERS else ""
        raise DataError(f"{path}: got a file of unknown kind{which}; {WANTED}")
    if path.suffix in JSON and head.startswith(b"PAR1"):
        raise DataError(f"{path}: is a parquet file; name it .parquet")
    if path.suffix in JSON and head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise DataError(f"{path}: is UTF-16; save it as UTF-8")


def what_to_do(columns: Iterable[str]) -> str:
    """For rows that have none of the columns that are read, "" or what to do."""
    there = set(columns)
    return next((f"; {column!r}: {todo}" for column, todo in _INSTEAD.items() if column in there), "")
