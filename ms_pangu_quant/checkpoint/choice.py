"""Which files of a directory are the model's weights: decided here and nowhere else, as transformers decides it.

model.safetensors, where it is there, is the model; else what the index names. Where there is neither, which transformers
does not load, all files are, but for those known to be something else: one set of shards and whatever lies beside it.
Other sets are left out and named; of two sets that nothing tells apart, none is taken.
"""

from __future__ import annotations

import json
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ms_pangu_quant.errors import CheckpointError
from ms_pangu_quant.suggestion import dangling, fetching

WHOLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_LONGEST_NAME = 255  # bytes, on every common file system
_SHARD = re.compile(r"(?P<stem>.*)-(?P<number>\d{1,9})-of-(?P<count>\d{1,9})(?P<rest>.*?)(\.part\d+)?\.safetensors")
_SECOND_FORM = re.compile(r"consolidated([._-].*)?\.safetensors", re.IGNORECASE)  # the same weights, by their maker's names
_ADAPTER = re.compile(r"(adapter|pytorch_lora_weights)([._-].*)?\.safetensors", re.IGNORECASE)
_TRAINING = re.compile(
    r"(optimizers?|optim|scheduler|lr_scheduler|scaler|rng_states?|random_states?|train(er|ing)_(state|args))"
    r"([._-].*)?\.safetensors",
    re.IGNORECASE,
)
_UNREAD = (".gguf", ".h5", ".msgpack", ".onnx", ".safetensors")  # other programs' weights, or in capitals


@dataclass(frozen=True)
class Choice:
    """files   the model's, in order of their names.

    weight_map  tensor -> name of its file, where an index decided.
    note        which other weights lie there and are not read; None where there are none.
    """

    files: tuple[Path, ...]
    weight_map: Mapping[str, str] | None = None
    note: str | None = None


def weight_files(directory: Path) -> list[str]:
    """Names of *.safetensors files that may be a model's: no hidden ones, adapters or states of a training."""
    return [name for name in _visible(directory) if not _ADAPTER.fullmatch(name) and not _TRAINING.fullmatch(name)]


def choose(directory: Path) -> Choice:
    """Raises CheckpointError for no weights, for two sets that nothing tells apart, and for a set that has gaps."""
    index, there = directory / INDEX_FILE, _visible(directory)
    weight_map = _read_index(index) if index.exists() else None
    named = sorted(set(weight_map.values())) if weight_map else []
    if WHOLE_FILE in there and WHOLE_FILE not in named:
        left = ([INDEX_FILE] if weight_map else []) + [name for name in there if name != WHOLE_FILE]
        return Choice((directory / WHOLE_FILE,), None, _note(directory, [WHOLE_FILE], left))
    if weight_map:
        _check_there(directory, named, there)
        left = [name for name in there if name not in named]
        return Choice(tuple(directory / name for name in named), weight_map, _note(directory, named, left))
    usual = [name for name in weight_files(directory) if not _SECOND_FORM.fullmatch(name)]
    chosen = usual or weight_files(directory)
    if not chosen:
        raise CheckpointError(f"{directory}: {_instead(directory, there)}; wanted a Hugging Face checkpoint directory")
    _check_one_set(directory, chosen)
    left = [name for name in there if name not in chosen]
    return Choice(tuple(directory / name for name in chosen), None, _note(directory, chosen, left))


def _visible(directory: Path) -> list[str]:
    """Hidden files are what other systems and downloads leave."""
    return sorted(path.name for path in directory.glob("*.safetensors") if not path.name.startswith("."))


def listed(names: Sequence[str], most: int = 3) -> str:
    """A few names and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _note(directory: Path, chosen: Sequence[str], left: Sequence[str]) -> str | None:
    if not left:
        return None
    adapter = "; an adapter counts once it is merged into the weights" if any(map(_ADAPTER.fullmatch, left)) else ""
    return f"{directory}: {listed(chosen)} is read, beside it lies what is not: {listed(left)}{adapter}"


def _instead(directory: Path, there: Sequence[str]) -> str:
    """What a directory without weights holds."""
    if any(map(_ADAPTER.fullmatch, there)):
        return f"holds an adapter ({there[0]}) and no model; merge it into the weights that it was trained on"
    unread = (
        sorted(path.name for path in directory.iterdir() if path.suffix.lower() in _UNREAD) if directory.is_dir() else []
    )
    others = [*there, *(name for name in unread if name not in there and not name.startswith("."))]
    return "no *.safetensors file here" + (f" with a model, only {listed(others)}" if others else "")


def _check_there(directory: Path, named: Sequence[str], there: Sequence[str]) -> None:
    absent = [name for name in named if not (directory / name).is_file()]
    if not absent:
        return
    others = [name for name in there if name not in named and name in weight_files(directory)]
    more = f" and {len(absent) - 1} more" if len(absent) > 1 else ""
    link = dangling(directory / absent[0])
    todo = "download it, or use the index that belongs to these files"
    if others:
        todo = f"download it, or delete the index if {listed(others)} is the model"
    raise CheckpointError(f"{directory / INDEX_FILE}: names {absent[0]}{more}, which is not in the directory; {todo}{link}")


def _check_one_set(directory: Path, names: Iterable[str]) -> None:
    """Shards say of how many they are; files of two such numbers are two models, or two saves of one."""
    sets: dict[tuple[str, int, str], set[int]] = defaultdict(set)
    for found in filter(None, map(_SHARD.fullmatch, names)):
        sets[found["stem"], int(found["count"]), found["rest"]].add(int(found["number"]))
    if len(sets) > 1:
        told = " and ".join(_told(key, len(numbers)) for key, numbers in sorted(sets.items()))
        raise CheckpointError(
            f"{directory}: holds {len(sets)} sets of weights, {told}, and no index that names one; delete all but one"
        )
    for key, numbers in sets.items():
        for absent in _gaps(key[1], numbers):
            told = _told(key, len(numbers))
            raise CheckpointError(f"{directory}: {_shard(key, absent)} is missing, of {told}; download it")


def _gaps(count: int, numbers: set[int]) -> Iterator[int]:
    """Counted from 1, or by some from 0."""
    first = 0 if 0 in numbers else 1
    return (number for number in range(first, first + count) if number not in numbers)


def _shard(key: tuple[str, int, str], number: int | str) -> str:
    stem, count, rest = key
    shown = number if isinstance(number, str) else f"{number:05d}"
    return f"{stem}-{shown}-of-{count:05d}{rest}.safetensors"


def _told(key: tuple[str, int, str], there: int) -> str:
    return f"{_shard(key, '*')} ({there} of {key[1]} there)"


def _read_index(path: Path) -> dict[str, str]:
    try:
        content = path.read_bytes()
        weight_map = json.loads(content)["weight_map"]
    except OSError as error:
        raise CheckpointError(f"{path}: cannot read ({error.strerror})") from None
    except (ValueError, RecursionError, KeyError, TypeError) as error:
        todo = fetching(content, "download it again, or delete it if the weights are whole without it")
        raise CheckpointError(f"{path}: not a safetensors index ({type(error).__name__}: {error}); {todo}") from None
    if not weight_map or not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise CheckpointError(f"{path}: weight_map is not an object of tensor name -> file name")
    for file in set(weight_map.values()):
        too_long = len(file.encode("utf-8", "replace")) > _LONGEST_NAME
        if file != os.path.basename(file) or not file.endswith(".safetensors") or too_long:
            raise CheckpointError(f"{path}: names {file!r}; wanted the plain name of a .safetensors file beside it")
    return weight_map
