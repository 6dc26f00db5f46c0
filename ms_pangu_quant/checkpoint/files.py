"""A directory of safetensors files, read and written a piece at a time.

Reading: the safetensors library validates every header (a truncated file, overlapping or out-of-range offsets fail there);
the data is then read with plain file reads, because a memory map would count the whole checkpoint as resident memory.
Writing: tensors are streamed into a temporary file that is renamed when it is complete, so a name in the directory is
always a whole file.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from ms_pangu_quant.checkpoint.choice import INDEX_FILE as INDEX_FILE  # for those who write one
from ms_pangu_quant.checkpoint.choice import Choice, choose
from ms_pangu_quant.checkpoint.layout import HEAD, NO_HEAD, O_PROJ, is_buffer
from ms_pangu_quant.errors import CheckpointError, OutputError
from ms_pangu_quant.quantizers.threads import by_element
from ms_pangu_quant.suggestion import dangling, fetching

_CHUNK = 16 << 20
_HASHED_AT_A_TIME = 2  # tensors; more are seldom read any faster
_PIECE = 1 << 18  # numbers widened at a time
_DTYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}
# dtype -> its infinity's bits: those of a NaN are larger still, of a finite value smaller, but for the sign
_INFINITY: dict[np.dtype[Any], np.unsignedinteger[Any]] = {
    _DTYPES["F64"]: np.uint64(0x7FF << 52),
    _DTYPES["F32"]: np.uint32(0xFF << 23),
    _DTYPES["F16"]: np.uint16(0x1F << 10),
    _DTYPES["BF16"]: np.uint16(0xFF << 7),
}


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor lies: file, byte offset of its first element, shape, dtype."""

    file: Path
    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @property
    def nbytes(self) -> int:
        return self.dtype.itemsize * int(np.prod(self.shape, dtype=np.int64))

    def read(self, start: int = 0, stop: int | None = None) -> NDArray[Any]:
        """Rows start:stop of the first axis, in the stored dtype."""
        if not self.shape:
            return np.fromfile(self.file, self.dtype, 1, offset=self.offset).reshape(())
        stop = self.shape[0] if stop is None else min(stop, self.shape[0])
        row = int(np.prod(self.shape[1:], dtype=np.int64))
        count = max(stop - start, 0) * row
        data = np.fromfile(self.file, self.dtype, count, offset=self.offset + start * row * self.dtype.itemsize)
        if data.size != count:
            raise CheckpointError(f"{self.file}: ends early; wanted {count} elements at byte {self.offset}")
        return data.reshape((max(stop - start, 0), *self.shape[1:]))


@dataclass(frozen=True)
class ComputedEntry(TensorEntry):
    """A tensor made from another while it is read, in that one's shape and dtype, a slice of rows at a time.

    compute  float32 rows [count, ...] -> float32 rows, each from the same row alone.
    """

    source: TensorEntry
    compute: Callable[[NDArray[np.float32]], NDArray[np.float32]]

    @classmethod
    def of(cls, source: TensorEntry, compute: Callable[[NDArray[np.float32]], NDArray[np.float32]]) -> ComputedEntry:
        return cls(source.file, source.offset, source.shape, source.dtype, source, compute)

    def read(self, start: int = 0, stop: int | None = None) -> NDArray[Any]:
        return self.compute(widen(self.source.read(start, stop))).astype(self.dtype)


def chunks(entry: TensorEntry) -> Iterator[memoryview]:
    """The bytes of entry.read(), a few MiB of rows at a time."""
    for start, stop in _row_pieces(entry):
        yield _bytes(entry.read(start, stop)).data


def _row_pieces(entry: TensorEntry) -> Iterator[tuple[int, int]]:
    """(start, stop) of a few MiB of rows each."""
    rows = entry.shape[0] if entry.shape else 1
    step = max(1, _CHUNK * rows // max(entry.nbytes, 1))
    return ((start, start + step) for start in range(0, rows, step))


def _bytes(values: NDArray[Any]) -> NDArray[np.uint8]:
    return np.ascontiguousarray(values).reshape(-1).view(np.uint8)


def _finite(piece: bytes | memoryview, dtype: np.dtype[Any]) -> bool:
    infinity = _INFINITY.get(dtype)
    if infinity is None:
        return True
    bits = np.frombuffer(piece, infinity.dtype)
    without_sign = infinity.dtype.type(np.iinfo(infinity.dtype).max >> 1)
    return not bits.size or bool((bits & without_sign).max() < infinity)


class CheckpointNote(UserWarning):
    """What was decided in reading a directory that could have been meant otherwise."""


class TensorFiles:
    """All tensors of a directory: `entries` maps name -> where it lies, or how it is made."""

    def __init__(self, directory: Path, only: Path | None = None) -> None:
        """Raises CheckpointError if a file is missing, truncated or not safetensors, or if index and files disagree.

        only    read this one file, whatever the index says.
        """
        self.directory = directory
        choice = choose(directory) if only is None else Choice((only,))
        self.files = list(choice.files)
        self.notes = (choice.note,) if choice.note else ()
        self.entries: dict[str, TensorEntry] = {}
        with self.explained():
            for file in self.files:
                self._add(_read_header(file), choice.weight_map or {})
            if choice.weight_map is not None:
                _check_index(directory / INDEX_FILE, choice.weight_map, self.entries)
        self._stored = self.entries

    def _add(self, found: Mapping[str, TensorEntry], weight_map: Mapping[str, str]) -> None:
        """A tensor that is in two files is one where it is the same in both."""
        for name, entry in found.items():
            earlier = self.entries.get(name)
            if earlier is not None and not same(earlier, entry):
                raise CheckpointError(
                    f"{self.directory}: {name} is in both {earlier.file.name} and {entry.file.name}, with other values; "
                    "delete or download again the file that is not of this model"
                )
            if earlier is None or weight_map.get(name) == entry.file.name:
                self.entries[name] = entry

    @contextmanager
    def explained(self) -> Iterator[None]:
        """An error over these tensors says too what was left out, which may be what was meant."""
        try:
            yield
        except CheckpointError as error:
            raise CheckpointError("; ".join([str(error), *self.notes])) from None

    @property
    def nbytes(self) -> int:
        """Size of all tensors."""
        return sum(entry.nbytes for entry in self.entries.values())

    def read_float32(self, name: str, start: int = 0, stop: int | None = None) -> NDArray[np.float32]:
        """Rows of a floating-point tensor, widened exactly to float32."""
        return widen(self.entries[name].read(start, stop))

    def overlaid(self, entries: Mapping[str, TensorEntry]) -> TensorFiles:
        """The same files with some tensors replaced or added."""
        files = copy.copy(self)
        files.entries = {**self.entries, **entries}
        return files

    def renamed(self, entries: Mapping[str, TensorEntry]) -> TensorFiles:
        """The same files, their tensors under other names or taken apart: these, and no others."""
        files = copy.copy(self)
        files.entries = files._stored = dict(entries)
        return files

    def noting(self, note: str) -> TensorFiles:
        """The same files, with something more that the user should know of how they are read."""
        files = copy.copy(self)
        files.notes = (*self.notes, note)
        return files

    def sha256(self, progress: Callable[[int], None] | None = None) -> str:
        """Hash of every stored tensor's name, type, shape and bytes, in name order, whichever files they are in.

        progress is called with the bytes just read, from any thread. Raises CheckpointError for a NaN or an infinity:
        rounding would turn it into some code or other, and nothing later could tell.
        """

        def digest_of(name: str) -> str:
            digest, entry = hashlib.sha256(), self._stored[name]
            for piece in chunks(entry):
                digest.update(piece)
                if not _finite(piece, entry.dtype):
                    raise CheckpointError(
                        f"{entry.file}: {name} has a NaN or an infinity; wanted finite numbers: the checkpoint is damaged, "
                        "or its training diverged"
                    )
                if progress:
                    progress(len(piece))
            return digest.hexdigest()

        total, names = hashlib.sha256(), sorted(self._stored)
        with ThreadPoolExecutor(_HASHED_AT_A_TIME) as pool:
            try:
                for name, digest in zip(names, pool.map(digest_of, names), strict=True):
                    entry = self._stored[name]
                    total.update(f"{name}:{entry.dtype}:{list(entry.shape)}:{digest}\n".encode())
            finally:
                pool.shutdown(cancel_futures=True)
        return total.hexdigest()

    def check(self, expected: Mapping[str, tuple[int, ...]], *, optional: Iterable[str] = ()) -> None:
        """The tensors are exactly `expected` (plus, possibly, `optional` ones), with those shapes, in floating point."""
        config = self.directory / "config.json"
        for name, shape in expected.items():
            entry = self.entries.get(name)
            if entry is None:
                raise CheckpointError(
                    f"{self.directory}: {name} is missing; {config.name} implies a tensor of shape {list(shape)}"
                    f"{self._likely_cause(name)}"
                )
            if entry.shape != shape:
                raise CheckpointError(
                    f"{entry.file}: {name}: got {list(entry.shape)}, {config.name} implies "
                    f"{list(shape)}; is config.json from another checkpoint?"
                )
            if entry.dtype.kind in "iub":
                raise CheckpointError(
                    f"{entry.file}: {name}: got {entry.dtype}, wanted a floating-point tensor; "
                    "is this checkpoint quantized already?"
                )
        extra = sorted(set(self.entries) - set(expected) - set(optional))
        if extra:
            more = f" and {len(extra) - 1} more" if len(extra) > 1 else ""
            raise CheckpointError(
                f"{self.entries[extra[0]].file}: {extra[0]}{more}: not a tensor of the model that "
                f"{config.name} describes; is config.json from another checkpoint?"
            )

    def _likely_cause(self, name: str) -> str:
        """Of a missing tensor: the end of the message, or nothing."""
        if name.endswith(f".{O_PROJ.name}.bias"):
            return "; this layer's bias is part of the model, a checkpoint without it is another one"
        if name == HEAD:
            return NO_HEAD
        other = next((found for found in self.entries if f".{found}".endswith(f".{name.removeprefix('model.')}")), None)
        return f"; {other} is there: its prefix is not before all names" if other else ""


def same(one: TensorEntry, other: TensorEntry) -> bool:
    """Whether two tensors hold the same numbers; in the same dtype, the same bits."""
    if one.shape != other.shape or ({one.dtype.kind, other.dtype.kind} & set("iub") and one.dtype != other.dtype):
        return False
    for start, stop in _row_pieces(one):
        mine, theirs = (each.read(start, stop) for each in (one, other))
        if one.dtype != other.dtype:
            mine, theirs = widen(mine), widen(theirs)
        if not np.array_equal(_bytes(mine), _bytes(theirs)):
            return False
    return True


def widen(raw: NDArray[Any]) -> NDArray[np.float32]:
    """A floating-point array exactly as float32."""
    if raw.dtype == np.float32:
        return raw
    if raw.dtype == ml_dtypes.bfloat16:  # a bfloat16 is the upper half of a float32
        bits = np.ascontiguousarray(raw).reshape(-1).view(np.uint16)
        wide = np.empty(bits.shape, np.uint32)

        def shift(piece: slice) -> None:
            np.left_shift(bits[piece], np.uint32(16), out=wide[piece], dtype=np.uint32)

        by_element(shift, [slice(start, start + _PIECE) for start in range(0, len(bits), _PIECE)])
        return wide.view(np.float32).reshape(raw.shape)
    return raw.astype(np.float32)


def size(count: float) -> str:
    """Bytes as a person reads them."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**28 else f"{count / 2**20:.2f} MiB"


def _check_index(path: Path, weight_map: Mapping[str, str], entries: Mapping[str, TensorEntry]) -> None:
    for name, file in weight_map.items():
        entry = entries.get(name)
        if entry is None and is_buffer(name, ()):
            continue
        if entry is None or entry.file.name != file:
            found = f"it is in {entry.file.name}" if entry else "it is in no file"
            raise CheckpointError(f"{path}: {name} should be in {file}, but {found}")
    for name, entry in entries.items():
        if name not in weight_map and not is_buffer(name, entry.shape):
            raise CheckpointError(f"{entry.file}: {name} is not in {path.name}; do the two belong together?")


def _read_header(file: Path) -> dict[str, TensorEntry]:
    try:
        with safe_open(file, framework="np"):  # validates; the data is not touched
            pass
        with open(file, "rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(length))
    except (SafetensorError, OSError, ValueError) as error:
        todo = fetching(_beginning(file))
        raise CheckpointError(f"{file}: damaged or not a safetensors file ({error}); {todo}{dangling(file)}") from None
    entries = {}
    for name, record in header.items():
        if name == "__metadata__":
            continue
        dtype = _DTYPES.get(record["dtype"])
        if dtype is None:
            raise CheckpointError(f"{file}: {name}: dtype {record['dtype']} is not supported")
        entries[name] = TensorEntry(file, 8 + length + record["data_offsets"][0], tuple(record["shape"]), dtype)
    return entries


def _beginning(file: Path) -> bytes:
    with suppress(OSError), open(file, "rb") as stream:
        return stream.read(1024)
    return b""


@dataclass(frozen=True)
class WrittenFile:
    sha256: str
    nbytes: int


def write_safetensors(path: Path, tensors: Mapping[str, NDArray[Any] | TensorEntry]) -> WrittenFile:
    """Write one file atomically; an entry is copied from its own file, or computed, without being loaded whole.

    Raises OutputError when the disk is full or not writable; nothing is left behind then.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers loads no other
    offset = 0
    for name, tensor in tensors.items():
        header[name] = {
            "dtype": _CODES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.nbytes],
        }
        offset += tensor.nbytes
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)

    def pieces() -> Iterator[bytes | memoryview]:
        yield len(encoded).to_bytes(8, "little")
        yield encoded
        for tensor in tensors.values():
            if isinstance(tensor, TensorEntry):
                yield from chunks(tensor)
            else:
                yield _bytes(tensor).data

    return write_atomically(path, pieces())


def write_atomically(path: Path, pieces: Iterable[bytes | memoryview]) -> WrittenFile:
    """Write, flush to disk, rename. Raises OutputError; never leaves a partial file under `path`."""
    temporary = path.with_name(f".{path.name}.partial")
    digest, written = hashlib.sha256(), 0
    try:
        with open(temporary, "wb") as stream:
            for piece in pieces:
                stream.write(piece)
                digest.update(piece)
                written += len(piece)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with suppress(OSError):  # the disk may have become read-only
            temporary.unlink(missing_ok=True)
        raise OutputError(
            f"{path}: cannot write ({error.strerror or error}); free space or choose another --output, "
            "then run again with --resume"
        ) from None
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return WrittenFile(digest.hexdigest(), written)


def write_json(path: Path, value: Any) -> WrittenFile:
    return write_atomically(path, [json_bytes(value)])


def json_bytes(value: Any) -> bytes:
    return json_text(value, indent=2, ascii=False).encode() + b"\n"


def json_text(value: Any, *, indent: int | None = None, ascii: bool = True) -> str:
    """What all JSON that is written or printed is made with: an infinity or NaN, which JSON does not have, is null."""
    try:
        return json.dumps(value, indent=indent, ensure_ascii=ascii, allow_nan=False)
    except ValueError:
        return json.dumps(_with_nulls(value), indent=indent, ensure_ascii=ascii, allow_nan=False)


def _with_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _with_nulls(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_with_nulls(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
