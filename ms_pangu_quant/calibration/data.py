"""Calibration data: the rows of a file, a folder or a saved Hugging Face dataset -> token id sequences.

A row has one of three forms, told by its columns; of several the first in this order is used:
  token_ids  [length] integers, used as they are
  messages   [{"role", "content"}, ...], thoughts as in checkpoint.messages, rendered with the checkpoint's own chat
             template; no generation prompt and no thinking-mode suffix is added: the messages say what they say
  text       one string, encoded as it is, BOS as the tokenizer's configuration says
Ids are what the network sees. Messages come before text because a `text` column beside them is a rendering with some
template, perhaps not this checkpoint's.

Rows used are checked, of JSON files all rows; only rows used are tokenized. JSON is parsed here because `datasets`
cannot say which line is wrong, and guesses types from a file's beginning. Nothing is looked up on the network (a name
that is no path is an error), and nothing stays on disk.
"""

from __future__ import annotations

import codecs
import glob
import hashlib
import json
import re
import warnings
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from reprlib import repr as short
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ms_pangu_quant.calibration.overlap import find_benchmark
from ms_pangu_quant.calibration.sources import JSON, WANTED, check_kind, data_files, what_to_do
from ms_pangu_quant.checkpoint.config import ModelConfig
from ms_pangu_quant.checkpoint.messages import BESIDE, THOUGHT, read_message, refuse_beside
from ms_pangu_quant.checkpoint.tokenizer import Tokenizer, find_tokenizer
from ms_pangu_quant.errors import CheckpointError, DataError, RequestError, located

if TYPE_CHECKING:
    from datasets import Dataset

FORMS = ("token_ids", "messages", "text")
SHORTEST = 2  # tokens: one to read and one to predict

_SURROGATE = re.compile("[\ud800-\udfff]")  # JSON can spell half a character, UTF-8 and Arrow cannot
_NAMED = 5  # offending rows that a message names


@dataclass(frozen=True, eq=False)
class TokenData:
    """sequences  each int32 [length], 2 <= length <= max_length, read-only; fewer than `samples` if the file has fewer rows
    sha256     of all lengths and ids in order: the same for the same tokens from any file format
    truncated  sequences that were cut to max_length
    left       rows of the file that are not used
    where      the file, for messages
    held_out   so many of the last ones are not for statistics: what is fitted to the others is measured on them
    origin     of a file of a model's own answers, what made it; for the report
    """

    sequences: tuple[NDArray[np.int32], ...]
    sha256: str
    truncated: int
    held_out: int = 0
    left: int = 0
    where: str = "calibration data"
    origin: Mapping[str, Any] | None = None

    @property
    def tokens(self) -> int:
        return sum(len(sequence) for sequence in self.sequences)


@dataclass(frozen=True)
class _Table:
    """One file or saved dataset; numbers[i] is the line or position, from 1, of rows[i]."""

    path: Path
    unit: str
    rows: Dataset
    numbers: Sequence[int]

    def place(self, index: int) -> str:
        return f"{self.path}: {self.unit} {self.numbers[index]}"


def load_token_data(
    path: Path,
    *,
    tokenizer: Tokenizer | CheckpointError | None,
    vocab_size: int,
    max_length: int,
    samples: int | None = None,
    tokens: int | None = None,
    seed: int | None = None,
    allow_benchmark_overlap: bool = False,
) -> TokenData:
    """Reads a .jsonl, .json or .parquet file, a folder of .jsonl or .parquet files, or a save_to_disk directory.

    tokenizer   the checkpoint's; for token_ids None will do, or why it has none, which is raised for other rows
    vocab_size  the model's; every id must be below
    max_length  tokens; a longer sequence keeps its beginning
    samples     rows to use, None for all; that there are fewer is no error, see TokenData
    tokens      that the rows may have together; of those that do not fit none is used, but at least one is
    seed        None takes rows in file order (of a folder, by file name); a number shuffles before taking
    Raises      DataError naming file and row, also where a row holds a benchmark's problem (see overlap.py)
                unless allowed, of token_ids where there is a tokenizer to decode them; RequestError for a senseless
                max_length, samples or seed.
    """
    counts = {"max_length": (max_length, SHORTEST), "samples": (samples, 1), "tokens": (tokens, 1), "seed": (seed, 0)}
    for name, (number, least) in counts.items():
        if number is not None and number < least:
            raise RequestError(f"calibration {name}: got {number}, wanted {least} or more")
    tables = _read(path, vocab_size)
    form = _common_form(path, tables)
    if isinstance(tokenizer, CheckpointError):
        if form != "token_ids":
            raise tokenizer
        tokenizer = None
    if form != "token_ids" and tokenizer is None:
        raise DataError(
            f"{path}: the rows hold {form!r}, and the checkpoint has no tokenizer.json or tokenizer.model to "
            "encode it; add it to the checkpoint, or give rows of 'token_ids'"
        )
    ends = list(accumulate(len(table.rows) for table in tables))
    rows = []
    order = range(ends[-1]) if seed is None else np.random.Generator(np.random.PCG64(seed)).permutation(ends[-1])
    for position in order[:samples]:
        part = bisect_right(ends, position)
        table = tables[part]
        index = int(position) - (ends[part] - len(table.rows))
        place, row = table.place(index), table.rows[index]
        _check_beside(row, place)
        rows.append((place, _checked(form, row[form], vocab_size, place)))
    if tokenizer is not None and not allow_benchmark_overlap:
        _refuse_benchmarks(path, form, rows, tokenizer)
    whole = [_encode(form, value, tokenizer, vocab_size, place) for place, value in rows]
    if tokens is not None:
        whole = whole[: fitting((min(len(ids), max_length) for ids in whole), tokens)]
    sequences = tuple(ids[:max_length] for ids in whole)
    truncated = sum(len(ids) > max_length for ids in whole)
    return TokenData(sequences, _sha256(sequences), truncated, left=ends[-1] - len(sequences), where=str(path))


def read_data(
    path: str | Path,
    checkpoint: Path,
    config: ModelConfig,
    samples: int | None,
    max_length: int,
    seed: int | None,
    *,
    tokens: int | None = None,
    allow_benchmark_overlap: bool = False,
) -> TokenData:
    """load_token_data for a checkpoint: with its tokenizer, if it has one; token_ids need none that works."""
    return load_token_data(
        Path(path),
        tokenizer=_tokenizer(checkpoint),
        vocab_size=config.vocab_size,
        max_length=max_length,
        samples=samples,
        tokens=tokens,
        seed=seed,
        allow_benchmark_overlap=allow_benchmark_overlap,
    )


def _tokenizer(checkpoint: Path) -> Tokenizer | CheckpointError | None:
    try:
        return find_tokenizer(checkpoint)
    except CheckpointError as error:
        return error


def fitting(lengths: Iterable[int], tokens: int) -> int:
    """How many of the first texts, of these lengths, have no more than so many tokens together; at least one."""
    return max(bisect_right(list(accumulate(lengths)), tokens), 1)


def _read(path: Path, vocab_size: int) -> list[_Table]:
    with _silent_datasets():
        tables = [
            _read_json(file, vocab_size) if file.suffix in JSON and not file.is_dir() else _read_arrow(file)
            for file in data_files(path)
        ]
    if not any(len(table.rows) for table in tables):
        raise DataError(f"{path}: no rows; {WANTED}")
    return tables


def _read_arrow(path: Path) -> _Table:
    from datasets import Dataset, load_from_disk
    from pyarrow.parquet import ParquetFile  # type: ignore[import-untyped]

    try:
        if path.is_dir():
            rows = load_from_disk(str(path.resolve()), keep_in_memory=True).with_format(None)
        else:
            check_kind(path)
            with ParquetFile(path) as file:
                if not file.metadata.num_rows:  # which datasets does not read
                    return _Table(path, "row", Dataset.from_dict({}), ())
            with TemporaryDirectory(prefix="pangu-quant-") as scratch:
                rows = Dataset.from_parquet(glob.escape(str(path.resolve())), cache_dir=scratch, keep_in_memory=True)
    except DataError:
        raise
    except Exception as error:  # of many types: from datasets, pyarrow and the file system
        raise DataError(f"{path}: not readable ({error.__cause__ or error}); {WANTED}") from error
    columns = [column for column in rows.column_names if column in (*FORMS, *BESIDE)]
    if len(rows) and not any(column in FORMS for column in columns):
        got = ", ".join(map(repr, rows.column_names)) or "none"
        todo = what_to_do(rows.column_names)
        raise DataError(f"{path}: got columns {got}, wanted one of {', '.join(FORMS)}{todo}")
    return _Table(path, "row", rows.select_columns(columns), range(1, len(rows) + 1))


def _read_json(path: Path, vocab_size: int) -> _Table:
    from datasets import Dataset, Features, Value

    types = {
        "token_ids": [Value("int64")],
        "messages": [{key: Value("string") for key in ("role", "content", THOUGHT)}],
        "text": Value("string"),
    }
    columns: dict[str, list[Any]] = {form: [] for form in FORMS}
    numbers: list[int] = []
    try:
        check_kind(path)
        unit = "row" if _is_array(path) else "line"
        for number, row in _json_array(path) if unit == "row" else _json_lines(path):
            place = f"{path}: {unit} {number}"
            if not isinstance(row, dict) or all(row.get(form) is None for form in FORMS):
                got = f"keys {', '.join(map(repr, row))}" if isinstance(row, dict) else f"a JSON {type(row).__name__}"
                todo = what_to_do(row) if isinstance(row, dict) else ""
                raise DataError(f"{place}: got {got or 'no keys'}, wanted an object with one of {', '.join(FORMS)}{todo}")
            _check_beside(row, place)
            for form, values in columns.items():
                value = row.get(form)
                values.append(None if value is None else _checked(form, value, vocab_size, place))
            numbers.append(number)
    except OSError as error:
        raise DataError(f"{path}: not readable ({error.strerror}); {WANTED}") from None
    filled = {form: values for form, values in columns.items() if any(value is not None for value in values)}
    return _Table(path, unit, Dataset.from_dict(filled, Features({form: types[form] for form in filled})), numbers)


def _is_array(path: Path) -> bool:
    """A .json file may hold JSON Lines or one array of rows."""
    if path.suffix != ".json":
        return False
    with path.open("rb") as file:
        return file.read(4096).removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"[")


def _json_array(path: Path) -> Iterator[tuple[int, Any]]:
    try:
        rows = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not valid JSON ({error})") from None
    yield from enumerate(rows, 1)


def _json_lines(path: Path) -> Iterator[tuple[int, Any]]:
    """Blank lines count but are no rows."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                reason = getattr(error, "msg", error)  # without json's own line number, which is within this line
                raise DataError(
                    f"{path}: line {number}: not valid JSON ({reason}): got "
                    f"{short(line.decode(errors='replace').strip())}, wanted one object per line"
                ) from None
            yield number, row


def _common_form(path: Path, tables: Sequence[_Table]) -> str:
    """The form all rows have. A row without it, though others have it, is an error."""
    wanted = next((form for form in FORMS if any(_missing(form, table.rows).count(False) for table in tables)), None)
    if wanted is None:
        raise DataError(f"{path}: every row is null")
    for table in tables:
        missing = _missing(wanted, table.rows)
        if any(missing):
            index = missing.index(True)
            row = table.rows[index]
            got = " and ".join(repr(form) for form in FORMS if row.get(form) is not None) or "nothing"
            raise DataError(
                f"{table.place(index)}: got {got}, where other rows have {wanted!r}; wanted the same form in every row"
            )
    return wanted


def _missing(form: str, rows: Dataset) -> list[bool]:
    """Per row, whether it has no value of this form."""
    if form not in rows.column_names:
        return [True] * len(rows)
    missing: list[bool] = rows.data.column(form).is_null().to_pylist()
    return missing


def _checked(form: str, value: Any, vocab_size: int, place: str) -> Any:
    """The value as Arrow and the tokenizer take it: str, [int, ...] or what read_message makes of messages."""
    if form == "text":
        if not _is_text(value) or not value.strip():
            raise DataError(f"{place}: text: got {short(value)}, wanted a string that is not empty")
        return value
    if not isinstance(value, list) or not value:
        raise DataError(f"{place}: {form}: got {short(value)}, wanted a list that is not empty")
    if form == "token_ids":
        strangers = [token for token in value if type(token) is not int or not 0 <= token < vocab_size]
        if strangers:
            raise DataError(
                f"{place}: token_ids: got {short(strangers[0])}, wanted integers from 0 to "
                f"{vocab_size - 1}, the model's vocabulary"
            )
        return value
    with located(f"{place}: ", DataError):
        chat = [read_message(message, f"messages[{index}]") for index, message in enumerate(value)]
    for index, message in enumerate(chat):
        if not all(map(_is_text, message.values())):
            raise DataError(f"{place}: messages[{index}]: got {short(message)}, which has half a character")
    return chat


def _check_beside(row: Mapping[str, Any], place: str) -> None:
    """Where its messages are what is used of a row, nothing beside them may be lost."""
    if row.get("messages") is not None and row.get("token_ids") is None:
        with located(f"{place}: ", DataError):
            refuse_beside(row)


def _is_text(value: object) -> bool:
    return isinstance(value, str) and not _SURROGATE.search(value)


def _refuse_benchmarks(path: Path, form: str, rows: Sequence[tuple[str, Any]], tokenizer: Tokenizer) -> None:
    found = []
    for place, value in rows:
        if form == "messages":
            text = "\n".join(text for message in value for key, text in message.items() if key != "role")
        elif form == "text":
            text = value
        else:
            with located(f"{place}: ", DataError):
                text = tokenizer.decode(value)
        name = find_benchmark(text)
        if name is not None:
            found.append(f"{place.removeprefix(f'{path}: ')}: {name}")
    if found:
        more = f" and {len(found) - _NAMED} more" if len(found) > _NAMED else ""
        raise DataError(
            f"{path}: {len(found)} of {len(rows)} rows hold a benchmark problem "
            f"({'; '.join(found[:_NAMED])}{more}); scores measured after calibrating on them would "
            "flatter. Remove these rows, or set allow_benchmark_overlap"
        )


def _encode(form: str, value: Any, tokenizer: Tokenizer | None, vocab_size: int, place: str) -> NDArray[np.int32]:
    if form == "token_ids":
        ids: Sequence[int] = value
    else:
        assert tokenizer is not None
        with located(f"{place}: ", DataError):  # the tokenizer refuses this row
            ids = tokenizer.encode(value) if form == "text" else tokenizer.encode_chat(value, add_generation_prompt=False)
    if len(ids) < SHORTEST:
        raise DataError(f"{place}: got {len(ids)} token{'s' * (len(ids) != 1)}, wanted {SHORTEST} or more")
    if max(ids) >= vocab_size:
        raise DataError(
            f"{place}: the tokenizer gives id {max(ids)}, the model's ids end at {vocab_size - 1}; "
            "is the tokenizer from another checkpoint?"
        )
    array = np.array(ids, np.int32)
    array.flags.writeable = False
    return array


def _sha256(sequences: Sequence[NDArray[np.int32]]) -> str:
    digest = hashlib.sha256()
    for ids in sequences:
        digest.update(len(ids).to_bytes(8, "little") + ids.astype("<i4").tobytes())
    return digest.hexdigest()


@contextmanager
def _silent_datasets() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # in a notebook its progress bars miss a package that they would be drawn with
        import datasets

    bars, level = not datasets.are_progress_bars_disabled(), datasets.logging.get_verbosity()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        yield
    finally:
        datasets.logging.set_verbosity(level)
        if bars:
            datasets.enable_progress_bars()
