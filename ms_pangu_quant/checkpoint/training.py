"""What MindFormers' training saves, read as if it were the Hugging Face form of the same weights.

Training fuses q/k/v into one tensor and gate/up into another and names everything after its own network. Each fused tensor
is taken apart by rows as it is read; nothing is converted beforehand. How the rows lie in it is an option of the training
(model.model_config of its YAML) that the tensors do not tell; config.json may carry it under MindFormers' own keys:

    use_contiguous_weight_layout_attention   false (default): for each key/value head its query heads' rows, then its key's,
                                             then its value's. true: all queries, all keys, all values.
    use_interleaved_weight_layout_mlp        true (default): rows of gate and up alternate. false: all of gate, all of up.

Biases lie as the rows of their weights do. Source: mindformers 1.9, parallel_core/training_graph/transformer/attention.py
(SelfAttention, SelfAttentionContiguous) and mlp.py (MLP, MLPInterleaved).

What it does not do: read the names of MindFormers' older ("legacy") models, or adapters (LoRA).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from ms_pangu_quant.checkpoint import layout
from ms_pangu_quant.checkpoint.choice import weight_files
from ms_pangu_quant.checkpoint.config import ModelConfig
from ms_pangu_quant.checkpoint.files import TensorEntry, TensorFiles
from ms_pangu_quant.errors import CheckpointError

PREFIX = "decoder.layers."
OUTER = {
    layout.EMBEDDING: "embedding.word_embeddings.weight",
    layout.FINAL_NORM: "decoder.final_layernorm.weight",
    layout.HEAD: "output_layer.weight",
}
_NORMS = {layout.ATTENTION_NORM: "input_layernorm", layout.MLP_NORM: "pre_mlp_layernorm"}
_CONTIGUOUS_QKV, _INTERLEAVED_FC1 = "use_contiguous_weight_layout_attention", "use_interleaved_weight_layout_mlp"


@dataclass(frozen=True)
class RowLayout:
    """How the rows of the fused tensors lie; defaults are MindFormers'."""

    contiguous_qkv: bool = False
    interleaved_fc1: bool = True

    @classmethod
    def from_config(cls, raw: Mapping[str, Any], where: Path) -> RowLayout:
        """Raises CheckpointError for a value that is not true or false."""
        values = (raw.get(_CONTIGUOUS_QKV, False), raw.get(_INTERLEAVED_FC1, True))
        for key, value in zip((_CONTIGUOUS_QKV, _INTERLEAVED_FC1), values, strict=True):
            if not isinstance(value, bool):
                raise CheckpointError(f"{where}: {key} is {value!r}, wanted true or false, as in the training's YAML")
        return cls(*values)

    def __str__(self) -> str:
        qkv = "q, k and v one after another" if self.contiguous_qkv else "q, k and v interleaved by key/value head"
        return f"{qkv}; gate and up {'row by row' if self.interleaved_fc1 else 'one after another'}"


@dataclass(frozen=True)
class RowsEntry(TensorEntry):
    """Rows of another tensor: of each of `groups` equal runs of its rows, as many from row `first` of the run on.

    file, offset and dtype are the whole tensor's, shape is the rows'.
    """

    whole: TensorEntry
    groups: int
    first: int

    def read(self, start: int = 0, stop: int | None = None) -> NDArray[Any]:
        stop = self.shape[0] if stop is None else min(stop, self.shape[0])
        if self.groups == 1:
            return self.whole.read(self.first + start, self.first + stop)
        count, run = self.shape[0] // self.groups, self.whole.shape[0] // self.groups
        group = start // count
        runs = self.whole.read(group * run, -(-stop // count) * run)
        rows = runs.reshape(-1, run, *self.shape[1:])[:, self.first : self.first + count].reshape(-1, *self.shape[1:])
        return rows[start - group * count : stop - group * count]


def is_trained(files: TensorFiles) -> bool:
    """Whether the tensors have the names of MindFormers' training network."""
    return any(name.startswith(PREFIX) for name in files.entries)


def as_hugging_face(files: TensorFiles, config: ModelConfig) -> tuple[TensorFiles, ModelConfig, RowLayout]:
    """The same tensors under the Hugging Face names, and the config without the keys that only training knows.

    What an optimizer keeps for a tensor ("adam_m.decoder...") and single numbers (global_step) are left out.
    Raises   CheckpointError naming a tensor that is missing, of a wrong shape, or that this network does not have.
    """
    rows = RowLayout.from_config(config.raw, files.directory / "config.json")
    found: dict[str, TensorEntry] = {}
    used: set[str] = set()
    for name, shape, part in _parts(config, rows):
        source = files.entries.get(part.fused)
        if source is None:
            if name == layout.HEAD and config.tie_word_embeddings:
                continue
            raise CheckpointError(
                f"{files.directory}: {part.fused} is missing; config.json implies a tensor of shape {list(part.shape)}"
                f"{layout.NO_HEAD if name == layout.HEAD else ''}"
            )
        if source.shape != part.shape:
            raise CheckpointError(
                f"{source.file}: {part.fused}: got {list(source.shape)}, config.json implies {list(part.shape)}; is "
                "config.json from another checkpoint?"
            )
        used.add(part.fused)
        if part.shape != shape:
            source = RowsEntry(source.file, source.offset, shape, source.dtype, source, part.groups, part.first)
        found[name] = source
    _refuse_others(files, used)
    raw = {key: value for key, value in config.raw.items() if key not in (_CONTIGUOUS_QKV, _INTERLEAVED_FC1)}
    return files.renamed(found), dataclasses.replace(config, raw=raw), rows


@dataclass(frozen=True)
class _Part:
    """Of each of `groups` equal runs of rows of the tensor `fused`, which has this shape: some rows, from `first` on."""

    fused: str
    shape: tuple[int, ...]
    groups: int = 1
    first: int = 0


def _parts(config: ModelConfig, rows: RowLayout) -> list[tuple[str, tuple[int, ...], _Part]]:
    """(Hugging Face name, its shape, where it lies) of every tensor; the head also where it is tied."""
    outer = {**layout.outer_shapes(config), layout.HEAD: layout.outer_shapes(config)[layout.EMBEDDING]}
    found = [(name, shape, _Part(OUTER[name], shape)) for name, shape in outer.items()]
    for index in range(config.num_hidden_layers):
        prefix = layout.block_prefix(index)
        for name, shape in layout.block_shapes(config).items():
            found.append((prefix + name, shape, _block_part(config, rows, f"{PREFIX}{index}.", name, shape)))
    return found


def _block_part(config: ModelConfig, rows: RowLayout, prefix: str, name: str, shape: tuple[int, ...]) -> _Part:
    stem, _, kind = name.rpartition(".")
    if stem in layout.NORMS:
        return _Part(f"{prefix}{_NORMS[stem]}.{kind}", shape)
    site = layout.BY_NAME[stem]
    cell = "self_attention" if stem.startswith("self_attn.") else "mlp"
    fused = layout.fused(site.fused)
    heights = [layout.site_shape(config, each)[0] for each in fused]
    groups = 1
    if site.fused == layout.QKV and not rows.contiguous_qkv:
        groups = config.num_key_value_heads
    elif site.fused == layout.FC1 and rows.interleaved_fc1:
        groups = config.intermediate_size
    first = sum(heights[: fused.index(site)]) // groups
    return _Part(f"{prefix}{cell}.{site.fused}.{kind}", (sum(heights), *shape[1:]), groups, first)


def _refuse_others(files: TensorFiles, used: set[str]) -> None:
    for name, entry in files.entries.items():
        if name in used or entry.nbytes <= 8 or any(name.endswith(f".{known}") for known in _tails(name, used)):
            continue
        raise CheckpointError(
            f"{entry.file}: {name}: not a tensor of the network that config.json describes, nor an optimizer's; is "
            "config.json from another checkpoint?"
        )


def _tails(name: str, used: set[str]) -> set[str]:
    """The model's tensors whose names this one ends with: "adam_m.decoder.final_layernorm.weight"."""
    parts = name.split(".")
    return {".".join(parts[start:]) for start in range(1, len(parts))} & used


def check_directory(directory: Path) -> None:
    """Raises CheckpointError that says what to do with what training leaves behind and is not read as it is."""
    weights = weight_files(directory)
    if weights and (directory / "config.json").exists():
        return
    merge = f"pangu-quant merge {directory} --strategy FOLDER --config START --output MERGED"
    if any(directory.glob("rank_[0-9]*/*.safetensors")):
        raise CheckpointError(
            f"{directory}: is sliced, a folder for each rank; put it together with its strategy files first: {merge}"
        )
    iterations = sorted(path.name for path in directory.glob("iteration_[0-9]*") if path.is_dir())
    if iterations:
        raise CheckpointError(f"{directory}: holds the checkpoints of a training; name one: {directory / iterations[-1]}")
    if any(directory.glob("*.ckpt")) or any(directory.glob("rank_[0-9]*/*.ckpt")):
        raise CheckpointError(
            f'{directory}: holds .ckpt files, which are not read; convert them first: python -c "import mindspore; '
            f"mindspore.ckpt_to_safetensors('{directory}', 'CONVERTED')\""
        )
    pickles = [path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in directory.glob(pattern)]
    if pickles and not weights:
        raise CheckpointError(
            f"{directory}: holds {sorted(pickles)[0]}, a pickle, which can run code and is not read; save the checkpoint "
            "as safetensors"
        )
    if weights:
        raise CheckpointError(
            f"{directory}: has weights but no config.json, which MindFormers' training does not write; copy config.json "
            "and the tokenizer's files of the checkpoint it started from into it, or write a directory that has all: "
            f"pangu-quant merge {directory} --config START --output MERGED"
        )
