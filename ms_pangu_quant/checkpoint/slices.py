"""Checkpoints that MindFormers saved sliced over ranks with a metadata.json, read as whole tensors.

metadata.json names every tensor's slices: where each begins in the whole tensor and which file holds it (a slice that
several ranks hold is named several times). Nothing is merged on disk; a tensor is put together while it is read.
Source: mindformers 1.9, checkpoint/metadata.py (save_metadata), checkpoint/checkpoint.py (save_checkpoint).

Slices that come with strategy files instead are merged by MindSpore, see network/merge.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ms_pangu_quant.checkpoint.config import read_json
from ms_pangu_quant.checkpoint.files import TensorEntry, TensorFiles
from ms_pangu_quant.errors import CheckpointError

METADATA_FILE = "metadata.json"
_OPTIMIZER = re.compile(r"(^|-)opt-\d+-\d+\.safetensors$")


@dataclass(frozen=True)
class PiecesEntry(TensorEntry):
    """A tensor put together from pieces as it is read.

    file and offset are the first piece's; pieces are (where the piece begins in the tensor, the piece), and cover it.
    """

    pieces: tuple[tuple[tuple[int, ...], TensorEntry], ...]

    def read(self, start: int = 0, stop: int | None = None) -> NDArray[Any]:
        stop = self.shape[0] if stop is None else min(stop, self.shape[0])
        rows = np.empty((max(stop - start, 0), *self.shape[1:]), self.dtype)
        for origin, piece in self.pieces:
            begin, end = max(start, origin[0]), min(stop, origin[0] + piece.shape[0])
            if begin < end:
                box = [slice(at, at + size) for at, size in zip(origin, piece.shape, strict=True)]
                box[0] = slice(begin - start, end - start)
                rows[tuple(box)] = piece.read(begin - origin[0], end - origin[0])
        return rows


def put_together(directory: Path) -> TensorFiles | None:
    """The whole tensors of a directory that has such a metadata.json; None of one that has not.

    Raises CheckpointError naming the tensor whose slices are missing, of a wrong shape, or do not cover it.
    """
    path = directory / METADATA_FILE
    if not path.exists():
        return None
    metadata = read_json(path)
    tensors, storage = metadata.get("state_dict_metadata"), metadata.get("storage_data")
    if not isinstance(tensors, Mapping) or not isinstance(storage, Mapping):
        return None
    files: dict[str, TensorFiles] = {}
    try:
        entries = {}
        for name, described in tensors.items():
            chunks = {
                tuple(int(at) for at in each["global_offset"]): tuple(each["local_shape"]) for each in described["chunk"]
            }
            held = {origin: str(storage[str((name, origin))][0]["file_name"]) for origin in chunks}
            if not all(_OPTIMIZER.search(file) for file in held.values()):
                pieces = {origin: _piece(path, name, held[origin], shape, files) for origin, shape in chunks.items()}
                entries[name] = _whole(path, name, tuple(described["global_shape"] or ()), pieces)
    except (KeyError, TypeError, AttributeError, IndexError, ValueError, OverflowError, OSError) as error:
        raise CheckpointError(f"{path}: not as MindFormers writes it ({type(error).__name__}: {error})") from None
    if not files:
        raise CheckpointError(f"{path}: names no tensor")
    return next(iter(files.values())).renamed(entries)


def _piece(path: Path, name: str, held: str, shape: tuple[int, ...], files: dict[str, TensorFiles]) -> TensorEntry:
    if held not in files:
        if held != Path(held).name or not (path.parent / held).is_file():
            raise CheckpointError(f"{path}: names {held!r} for {name}, which is not a file beside it; copy it here")
        files[held] = TensorFiles(path.parent, only=path.parent / held)
    piece = files[held].entries.get(name)
    if piece is None:
        raise CheckpointError(f"{path}: says that {held} holds {name}, which it does not")
    if piece.shape != shape:
        raise CheckpointError(f"{piece.file}: {name}: got {list(piece.shape)}, {path.name} says {list(shape)}")
    return piece


def _whole(path: Path, name: str, shape: tuple[int, ...], pieces: Mapping[tuple[int, ...], TensorEntry]) -> TensorEntry:
    first = next(iter(pieces.values()))
    if len(pieces) == 1 and first.shape == shape:
        return first
    _check_cover(path, name, shape, pieces)
    return PiecesEntry(first.file, first.offset, shape, first.dtype, tuple(pieces.items()))


def _check_cover(path: Path, name: str, shape: tuple[int, ...], pieces: Mapping[tuple[int, ...], TensorEntry]) -> None:
    """Pieces that lie within the tensor and do not overlap cover it if their sizes add up to its."""
    dtypes = {piece.dtype for piece in pieces.values()}
    boxes = [(np.array(origin), np.array(origin) + piece.shape) for origin, piece in pieces.items()]
    inside = all((low >= 0).all() and (high <= shape).all() for low, high in boxes)
    apart = all(
        bool((one[1] <= other[0]).any() or (other[1] <= one[0]).any())
        for number, one in enumerate(boxes)
        for other in boxes[:number]
    )
    elements = sum(int(np.prod(piece.shape)) for piece in pieces.values())
    if not (inside and apart and elements == int(np.prod(shape)) and len(dtypes) == 1):
        raise CheckpointError(f"{path}: the slices of {name} do not make up a tensor of shape {list(shape)}")
