"""verify(): whether a quantized directory is whole and consistent; every fault is a line, not only the first."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np

from ms_pangu_quant.checkpoint import layout
from ms_pangu_quant.checkpoint.block import Block, QuantizedLinear
from ms_pangu_quant.checkpoint.chat import TEMPLATES_FOLDER
from ms_pangu_quant.checkpoint.config import ASCEND_FILE, QUANTIZATION_FILE, ModelConfig, differences, read_json
from ms_pangu_quant.checkpoint.files import TensorFiles
from ms_pangu_quant.checkpoint.reader import CheckpointReader
from ms_pangu_quant.checkpoint.writer import HASHES_FILE, hash_file
from ms_pangu_quant.errors import CheckpointError
from ms_pangu_quant.formats import kv_cache
from ms_pangu_quant.formats.against import Law, check_block, law_of
from ms_pangu_quant.formats.linear import FLOATS, TensorSpec
from ms_pangu_quant.formats.reader import QuantizedReader, check_fused_inputs, quantized_specs, read_linear
from ms_pangu_quant.formats.words import FLOAT, INT8_CACHE_WORD, word_of
from ms_pangu_quant.suggestion import did_you_mean_path

_LONGEST_NAME = 255  # of a file, in most file systems


@dataclass(frozen=True)
class Verification:
    """faults: what is wrong; notes: what could not be checked, and why."""

    faults: tuple[str, ...]
    notes: tuple[str, ...]
    layers: int


def verify(
    directory: Path, against: CheckpointReader | None = None, on_block: Callable[[int], None] = lambda index: None
) -> Verification:
    """Check hashes, description, tensors, values and fused groups; with the float checkpoint, the weights too.

    Raises nothing for a damaged directory: what is wrong with it is the answer.
    """
    faults, notes = list(hash_faults(directory)), []
    if not (directory / HASHES_FILE).exists():
        notes.append(f"{HASHES_FILE}: not there, so the files' hashes are not checked; pangu-quant writes it")
    try:
        if not directory.is_dir():
            raise CheckpointError(f"{directory}: no such directory{did_you_mean_path(directory)}")
        opened = QuantizedReader(directory, checked=False)
        floats = {name: TensorSpec(shape, FLOATS) for name, shape in opened.plan.float_shapes(opened.config).items()}
        specs = {**floats, **quantized_specs(opened.format, opened.config, opened.plan)}
    except CheckpointError as error:
        return Verification((*faults, str(error)), tuple(notes), 0)
    structural = [*_tensor_faults(opened, specs)]
    faults += structural
    faults += _description_faults(opened)
    faults += _fused_faults(opened)
    law = Law()
    if against is not None:
        others = list(_same_model(against.config, opened.config))
        structural += others
        faults += others
        try:
            law = law_of(directory)
        except CheckpointError as error:
            faults.append(str(error))
        notes += law.notes
        if not structural:
            against = reduce(lambda reader, rewrite: rewrite(reader), law.rewrites, against)
    layers = 0
    for index in range(opened.config.num_hidden_layers):
        block, linears, found = _read_block(opened, specs, index)
        faults += found
        layers += len(linears)
        if against is not None and not structural and not found:
            faults += check_block(index, against.block(index), block, linears, law)
        on_block(index)
    faults += _outer_faults(opened, specs)
    return Verification(tuple(faults), tuple(notes), layers)


def hash_faults(directory: Path) -> Iterator[str]:
    """What SHA256SUMS, where there is one, says of the files."""
    path = directory / HASHES_FILE
    if not path.exists():
        return
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        digest, _, name = line.partition("  ")
        file = directory / name
        if (
            not name
            or Path(name).name != name.removeprefix(f"{TEMPLATES_FOLDER}/")
            or len(name) > _LONGEST_NAME
            or not name.isprintable()
        ):
            yield f"{path}: {line[:200]!r} is not a line of hash and file name"
        elif not file.is_file():
            yield f"{file}: is missing; {HASHES_FILE} has its hash"
        elif hash_file(file) != digest:
            yield f"{file}: is not the file that was written (its sha256 differs from {HASHES_FILE})"


def _tensor_faults(opened: QuantizedReader, specs: Mapping[str, TensorSpec]) -> Iterator[str]:
    entries = opened.files.entries
    for name, spec in specs.items():
        entry = entries.get(name)
        if not spec.fits(entry):
            yield f"{name}: {f'got {entry.dtype} {list(entry.shape)}' if entry else 'is missing'}, wanted {spec}"
    allowed = {layout.HEAD} if opened.config.tie_word_embeddings else set()
    for name in sorted(set(entries) - set(specs) - allowed):
        yield f"{name}: is no tensor of this model in the {opened.format.NAME} format"


def _description_faults(opened: QuantizedReader) -> Iterator[str]:
    """Every tensor is described as what its layer is, and nothing is described that is not there."""
    found = [opened.directory / name for name in (QUANTIZATION_FILE, ASCEND_FILE) if (opened.directory / name).exists()]
    if not {QUANTIZATION_FILE, ASCEND_FILE} & opened.format.metadata(opened.config, opened.plan).keys():
        return
    if len(found) > 1:
        yield f"{opened.directory}: has {found[0].name} and {found[1].name}; a loader may take either, remove one"
    description = {name: word for name, word in read_json(found[0]).items() if name.endswith(_SUFFIXES)}
    words = {name: word_of(scheme) for name, _, scheme in opened.plan}
    for name in opened.files.entries:
        word = FLOAT if name.endswith(".bias") else words.get(name.rpartition(".")[0], FLOAT)
        if kv_cache.is_cache_tensor(name):
            word = INT8_CACHE_WORD
        if description.get(name) != word:
            yield f"{found[0].name}: {name} is {description.get(name)!r}, but it is stored as {word}"
    for name in description:
        if name not in opened.files.entries and name != layout.HEAD:
            yield f"{found[0].name}: {name} is described as {description[name]!r}, but not stored"


_SUFFIXES = (".weight", ".bias", "_scale", "_offset", "_bias", "_second")


def _fused_faults(opened: QuantizedReader) -> Iterator[str]:
    for index, plan in enumerate(opened.plan.blocks):
        for sites in plan.split_layers:
            prefix = layout.block_prefix(index)
            listed = ", ".join(f"{prefix}{site.name}: {word_of(plan.scheme(site))}" for site in sites)
            yield f"{listed}; these layers are computed as one and need the same scheme"


def _same_model(reference: ModelConfig, config: ModelConfig) -> Iterator[str]:
    for difference in differences(reference, config):
        yield f"config.json: {difference} as in the float checkpoint"
    if config.tie_word_embeddings and not reference.tie_word_embeddings:  # a rewrite unties, nothing ties
        yield "config.json: tie_word_embeddings is true, but the float checkpoint's head is a tensor of its own"


def _read_block(
    opened: QuantizedReader, specs: Mapping[str, TensorSpec], index: int
) -> tuple[Block, dict[str, QuantizedLinear], list[str]]:
    """What of a block can be read, and the faults of its values."""
    prefix, faults = layout.block_prefix(index), []

    def sound(name: str) -> bool:
        return specs[name].fits(opened.files.entries.get(name))

    names = [name for name in layout.block_shapes(opened.config) if prefix + name in specs and sound(prefix + name)]
    block = Block(opened.config, {name: opened.files.read_float32(prefix + name) for name in names})
    for name, value in block.tensors.items():
        if not np.isfinite(value).all():
            faults.append(f"{prefix}{name}: has values that are not finite")
    linears = {}
    plan = opened.plan.blocks[index]
    for site, scheme in plan.quantized:
        name = f"{prefix}{site.name}"
        mine = [key for key in specs if key.startswith(f"{name}.") and not kv_cache.is_cache_tensor(key)]
        if not all(map(sound, mine)):
            continue
        faults += _scale_faults(opened.files, mine)
        try:
            linears[site.name] = read_linear(opened.format, opened.files, block, name, site, scheme)
        except CheckpointError as error:
            faults.append(str(error))
    if plan.cache is not None and all(sound(name) for name in kv_cache.names(index)):
        try:
            kv_cache.read_cache(opened.files, opened.config, index)
        except CheckpointError as error:
            faults.append(str(error))
    try:
        check_fused_inputs(prefix, linears)
    except CheckpointError as error:
        faults.append(str(error))
    return block, linears, faults


def _scale_faults(files: TensorFiles, names: Sequence[str]) -> Iterator[str]:
    for key in names:
        if key.endswith(("_scale", "scale_second")) and key in files.entries:
            value: Any = files.entries[key].read()
            if value.dtype == np.int64:  # float32 bits
                value = value.astype(np.int32).view(np.float32)
            value = value.astype(np.float32)
            bad = int((~(np.isfinite(value) & (value > 0))).sum())
            if bad:
                yield f"{key}: {bad} of {value.size} scales are not positive finite numbers"


def _outer_faults(opened: QuantizedReader, specs: Mapping[str, TensorSpec]) -> Iterator[str]:
    for name in layout.outer_shapes(opened.config):
        entry = opened.files.entries.get(name)
        if entry is None or not specs[name].fits(entry):
            continue
        step = max(1, (16 << 20) // max(1, entry.nbytes // max(1, entry.shape[0])))
        rows = range(0, entry.shape[0], step)
        if not all(np.isfinite(opened.files.read_float32(name, start, start + step)).all() for start in rows):
            yield f"{name}: has values that are not finite"
