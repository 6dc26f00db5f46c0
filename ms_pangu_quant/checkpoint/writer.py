"""Writes a quantized checkpoint block by block, so that a killed run can go on where it stopped.

While a run is under way the directory holds one file for each finished block and a journal that names them with their
hashes; config.json and the index, without which no loader accepts the directory, are written last. The journal carries a
fingerprint of everything the result depends on, and a run with another fingerprint is refused. A finished directory has
the hash of every file in SHA256SUMS, as `sha256sum -c` reads it.

A block is one file: the largest of the supported models' is below 1 GiB. What is outside the blocks goes into files of at
most SHARD_BYTES (a larger tensor gets one of its own).
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from ms_pangu_quant.checkpoint.chat import OLDER_TEMPLATE_FILE, TEMPLATE_FILE, TEMPLATES_FOLDER
from ms_pangu_quant.checkpoint.fast_tokenizer import served_files
from ms_pangu_quant.checkpoint.files import (
    INDEX_FILE,
    TensorEntry,
    json_bytes,
    write_atomically,
    write_json,
    write_safetensors,
)
from ms_pangu_quant.checkpoint.tokenizer import completed_generation
from ms_pangu_quant.checkpoint.tokenizer_files import read_json
from ms_pangu_quant.errors import CheckpointError, OutputError

JOURNAL = ".quantize_journal.json"
STATES = ".states-*.safetensors"  # hidden states of a run that is under way, each rank's
HASHES_FILE = "SHA256SUMS"
REPORT_FILE = "quantization_report.json"
SHARD_BYTES = 4 << 30
GENERATION_FILE = "generation_config.json"
CARRIED_OVER = (
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.json",
    TEMPLATE_FILE,
    OLDER_TEMPLATE_FILE,
    GENERATION_FILE,
)
CODE = ("configuration_*.py", "modeling_*.py", "tokenization_*.py")


def begun_with(output: Path) -> Mapping[str, str]:
    """The fingerprint of the run, under way or finished, that made this directory; empty where there is none to be read."""
    for name in (JOURNAL, REPORT_FILE):
        with suppress(OSError, ValueError, KeyError, TypeError):
            return dict(json.loads((output / name).read_text(encoding="utf-8"))["fingerprint"])
    return {}


def check_room(output: Path, *, resume: bool) -> None:
    """Raises OutputError where a QuantizedWriter would, as far as it can be told before there is anything to write."""
    journal = output / JOURNAL
    if not journal.exists() and output.is_dir() and not (resume and (output / "config.json").exists()):
        _check_empty(output)


def _check_empty(output: Path) -> None:
    if (output / "config.json").exists():
        raise OutputError(f"{output}: holds a finished checkpoint; choose another --output")
    others = sorted(path.name for path in output.iterdir() if not path.match(".*.partial"))
    if others:
        raise OutputError(f"{output}: is not empty (it holds {others[0]}); choose another --output")


def absent_folders(output: Path) -> list[Path]:
    """What of it and its parents is to be made for it, innermost first."""
    return [folder for folder in (output, *output.parents) if not os.path.exists(folder)]


def remove_empty(folders: Sequence[Path]) -> None:
    """Up to the first that holds something."""
    with suppress(OSError):
        for folder in folders:
            folder.rmdir()


def lock(output: Path) -> int:
    """A descriptor of this folder, made if need be; until it is closed, nobody else gets one. Raises OutputError."""
    try:
        output.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(output, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise OutputError(f"{output}: cannot write here ({error.strerror}); choose another --output") from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise OutputError(f"{output}: another process is writing here; wait for it, or choose another --output") from None
    except OSError:
        pass  # a file system without locks
    return descriptor


class QuantizedWriter:
    """Use as a context manager: it holds a lock on the directory, which ends with the process at the latest."""

    def __init__(self, output: Path, fingerprint: Mapping[str, str], *, blocks: int, resume: bool) -> None:
        """Raises OutputError if the directory is not empty, in use, not writable, or belongs to another run."""
        self.output = output
        self._fingerprint = dict(fingerprint)
        self._blocks = blocks
        self._records: list[dict[str, Any]] = []
        self._created = not os.path.exists(output)
        self._lock = lock(output)
        try:
            self._begin(resume)
        except BaseException:
            self.close()
            raise

    def _begin(self, resume: bool) -> None:
        self._remove(".*.partial")  # of a run that was killed while writing
        journal = self.output / JOURNAL
        if not journal.exists():
            _check_empty(self.output)
            self._save()
            return
        try:
            state = json.loads(journal.read_text(encoding="utf-8"))
            fingerprint = dict(state["fingerprint"])
            records = [
                {key: record[key] for key in ("file", "sha256", "nbytes", "tensors", "report")}
                for record in state["blocks"]
            ]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise OutputError(f"{journal}: damaged ({error}); delete {self.output} and start again") from None
        if not resume and records:
            raise OutputError(
                f"{self.output}: holds an unfinished run; continue it with --resume, or choose another --output"
            )
        if not records:  # stopped before its first block was entered: there is nothing to lose
            for pattern in ("model-*-of-*.safetensors", STATES):
                self._remove(pattern)
            self._save()
            return
        changed = sorted(
            key for key in {*fingerprint, *self._fingerprint} if fingerprint.get(key) != self._fingerprint.get(key)
        )
        if changed:
            raise OutputError(
                f"{self.output}: was begun with another {', '.join(changed)}; a run can be resumed only with "
                "what it was begun with: choose another --output"
            )
        self._records = self._intact(records)
        self._save()

    def _remove(self, pattern: str) -> None:
        for leftover in self.output.glob(pattern):
            leftover.unlink()

    def _intact(self, records: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The leading records whose files are there and unchanged."""
        for count, record in enumerate(records):
            path = self.output / self._file_name(count)
            if not path.is_file() or hash_file(path) != record["sha256"]:
                return records[:count]
        return records

    @property
    def finished(self) -> int:
        """Number of blocks written; the next to write has this index."""
        return len(self._records)

    @property
    def reports(self) -> list[dict[str, Any]]:
        return [record["report"] for record in self._records]

    def block_file(self, index: int) -> Path:
        return self.output / self._file_name(index)

    def write_block(self, tensors: Mapping[str, NDArray[Any] | TensorEntry], report: Mapping[str, Any]) -> None:
        """Write the next block's tensors; when this returns, a resumed run will not do it again."""
        name = self._file_name(self.finished)
        written = write_safetensors(self.output / name, tensors)
        self._records.append(
            {
                "file": name,
                "sha256": written.sha256,
                "nbytes": written.nbytes,
                "tensors": list(tensors),
                "report": dict(report),
            }
        )
        self._save()

    def finish(self, outer: Mapping[str, TensorEntry], source: Path, json_files: Mapping[str, Any]) -> int:
        """Copy the tensors outside the blocks and the tokenizer, then write json_files in order, config.json last.

        Returns the total size of the weight files in bytes.
        """
        weight_map = {tensor: record["file"] for record in self._records for tensor in record["tensors"]}
        total = sum(int(record["nbytes"]) for record in self._records)
        hashes = self.hashes()
        for number, shard in enumerate(_shards(outer)):
            name = self._file_name(self._blocks, part=number)
            written = write_safetensors(self.output / name, shard)
            weight_map.update(dict.fromkeys(shard, name))
            total += written.nbytes
            hashes[name] = written.sha256
        for carried in carry_over(source, self.output):
            hashes[carried] = hash_file(self.output / carried)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        for file, value in {**json_files, INDEX_FILE: index}.items():
            if file == "config.json":
                hashes[file] = hashlib.sha256(json_bytes(value)).hexdigest()
            else:
                hashes[file] = write_json(self.output / file, value).sha256
        lines = "".join(f"{digest}  {file}\n" for file, digest in sorted(hashes.items()))
        write_atomically(self.output / HASHES_FILE, [lines.encode()])
        write_json(self.output / "config.json", json_files["config.json"])
        self._remove(STATES)
        (self.output / JOURNAL).unlink()
        return total

    def hashes(self) -> dict[str, str]:
        return {record["file"]: record["sha256"] for record in self._records}

    def _file_name(self, index: int, part: int = 0) -> str:
        suffix = f".part{part + 1}" if part else ""
        return f"model-{index + 1:05d}-of-{self._blocks + 1:05d}{suffix}.safetensors"

    def _save(self) -> None:
        write_json(self.output / JOURNAL, {"fingerprint": self._fingerprint, "blocks": self._records})

    def close(self) -> None:
        """Release the lock; a directory that this run created and wrote no block to is removed."""
        os.close(self._lock)
        with suppress(OSError):
            left = {path.name for path in self.output.iterdir() if not path.match(STATES)}
            if self._created and left <= {JOURNAL} and not self._records:
                self._remove(STATES)
                (self.output / JOURNAL).unlink(missing_ok=True)
                self.output.rmdir()

    def __enter__(self) -> QuantizedWriter:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def carry_over(source: Path, output: Path) -> list[str]:
    """Copy those of CARRIED_OVER that `source` has, the templates in its folder and its code, as bytes; returns the names.

    What a server needs besides is made of them: generation_config.json names all that ends an answer, and beside
    openPangu's tokenizer stands one that needs no code (fast_tokenizer). Raises OutputError.
    """
    templates = sorted(f"{TEMPLATES_FOLDER}/{path.name}" for path in (source / TEMPLATES_FOLDER).glob("*.jinja"))
    names = [name for name in (*CARRIED_OVER, *templates, *_code(source)) if (source / name).is_file()]
    for name in names:
        try:
            (output / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(source / name, output / name)
        except OSError as error:
            raise OutputError(f"{output / name}: cannot write ({error.strerror})") from None
    made: dict[str, Any] = {}
    with suppress(CheckpointError):  # files that cannot be read are copied as they are
        if (generation := completed_generation(source)) is not None:
            made[GENERATION_FILE] = generation
    with suppress(CheckpointError):
        made |= served_files(source)
    for name, value in made.items():
        if isinstance(value, str):
            write_atomically(output / name, [value.encode()])
        else:
            write_json(output / name, value)
    return [*dict.fromkeys([*names, *made])]


def _code(source: Path) -> list[str]:
    """The files that auto_map of config.json and of tokenizer_config.json names, and those that go by transformers' names,
    since these import each other. Never imported here."""
    names = {path.name for pattern in CODE for path in source.glob(pattern)}
    for file in ("config.json", "tokenizer_config.json"):
        with suppress(CheckpointError):
            named = read_json(source / file).get("auto_map")
            for reference in named.values() if isinstance(named, dict) else ():  # a tokenizer has two
                both = reference if isinstance(reference, list) else [reference]
                names.update(f"{found[1]}.py" for each in both if (found := re.fullmatch(r"(\w+)\.\w+", str(each))))
    return sorted(names)


def _shards(tensors: Mapping[str, TensorEntry]) -> list[dict[str, TensorEntry]]:
    """The tensors in their order, in pieces of at most SHARD_BYTES; at least one piece."""
    shards: list[dict[str, TensorEntry]] = [{}]
    for name, entry in tensors.items():
        held = sum(each.nbytes for each in shards[-1].values())
        if shards[-1] and held + entry.nbytes > SHARD_BYTES:
            shards.append({})
        shards[-1][name] = entry
    return shards


def hash_file(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while piece := stream.read(16 << 20):
            digest.update(piece)
    return digest.hexdigest()
