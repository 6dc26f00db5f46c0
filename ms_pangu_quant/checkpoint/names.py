"""A state dict as others save it: prefixes that wrappers put before names, and buffers, which follow from config.json.

_orig_mod, module, _fsdp_wrapped_module, ...   parts of names that compiling and distributing put in; left out.
base_model.model.model., none, ...             before all names: taken for "model.", which is before them here.
inv_freq, cos_cached, masks, position ids      no weights; left out, after those of rope are compared with rope_theta.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ms_pangu_quant.checkpoint import layout
from ms_pangu_quant.checkpoint.config import ModelConfig
from ms_pangu_quant.checkpoint.files import TensorEntry, TensorFiles, widen
from ms_pangu_quant.errors import CheckpointError

_WRAPPER = re.compile(r"(?:(?<=\.)|^)(_orig_mod|module|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_OWN = "model."  # before the names of all tensors but the head
_REST = re.compile(r"((?:.*?\.)??)(embed_tokens\.|layers\.\d+\.|norm\.weight$)")
_ADAPTER = re.compile(
    r"\.(lora_[AB]|lora_embedding_[AB]|lora_magnitude_vector|base_layer|modules_to_save|original_module)(\.|$)"
)
_TABLES: dict[str, Callable[[NDArray[np.float64]], NDArray[np.float64]]] = {layout.COSINES: np.cos, layout.SINES: np.sin}


def without_prefixes(files: TensorFiles) -> TensorFiles:
    """The tensors under the names they have without a wrapper. Raises CheckpointError where two have one name then."""
    for name, entry in files.entries.items():
        if _ADAPTER.search(name):
            raise CheckpointError(
                f"{entry.file}: {name}: belongs to an adapter that is not merged; save the model merged (merge_and_unload)"
            )
    plain = {name: _WRAPPER.sub("", name) for name in files.entries}
    wrappers = {found for name in files.entries for found in _WRAPPER.findall(name)}
    said = [f"{part}. is left out of the names of tensors" for part in sorted(wrappers)]
    prefix = _prefix_of(plain.values())
    if prefix is not None:
        usual = {name: _renamed(short, prefix) for name, short in plain.items()}
        if prefix != _OWN:
            taken = f"{prefix} before the names of tensors is taken for {_OWN}"
            said.append(taken if prefix else f"{_OWN} is put before the names of tensors")
        elif usual != plain:
            said.append(f"{_OWN}{layout.HEAD} is taken for {layout.HEAD}")
        plain = usual
    if not said:
        return files
    entries: dict[str, TensorEntry] = {}
    origins: dict[str, str] = {}
    for name, short in plain.items():
        if origins.setdefault(short, name) != name:
            raise CheckpointError(
                f"{files.directory}: {origins[short]} and {name} are both {short} without their prefixes; delete one"
            )
        entries[short] = files.entries[name]
    return files.renamed(entries).noting(f"{files.directory}: {', '.join(said)}")


def _prefix_of(names: Iterable[str]) -> str | None:
    """What is before the names of all tensors but the head; None where they do not agree or have no embedding."""
    found = [match for match in map(_REST.match, names) if match]
    prefixes = {match[1] for match in found}
    whole = len(prefixes) == 1 and any(match[2] == "embed_tokens." for match in found)
    return prefixes.pop() if whole else None


def _renamed(name: str, prefix: str) -> str:
    """The head has no prefix, or a part of the others'."""
    if name.endswith(layout.HEAD) and prefix.startswith(name.removesuffix(layout.HEAD)):
        return layout.HEAD
    return _OWN + name.removeprefix(prefix) if name.startswith(prefix) else name


def without_buffers(files: TensorFiles, config: ModelConfig) -> TensorFiles:
    """The tensors that are weights. Raises CheckpointError for a buffer of rope that config.json contradicts."""
    buffers = {name: entry for name, entry in files.entries.items() if layout.is_buffer(name, entry.shape)}
    if not buffers:
        return files
    _check_rope(buffers, config, files.directory / "config.json")
    return files.renamed({name: entry for name, entry in files.entries.items() if name not in buffers})


def _check_rope(buffers: Mapping[str, TensorEntry], config: ModelConfig, where: Path) -> None:
    exponents = np.arange(0, config.head_dim, 2) / config.head_dim
    wanted = config.rope_theta**-exponents
    for name, entry in buffers.items():
        kind = name.rpartition(".")[2]
        if kind in layout.FREQUENCIES:
            got = widen(entry.read()).astype(np.float64)
            if got.shape != wanted.shape or not _close(got, wanted):
                raise CheckpointError(f"{entry.file}: {name}: {_contradiction(got, exponents, config, where)}")
        elif kind in _TABLES and entry.shape and entry.shape[-1] == config.head_dim and entry.nbytes:
            row = widen(entry.read()).reshape(-1, config.head_dim)[1:2, : len(wanted)]  # of position 1
            if not np.allclose(row, _TABLES[kind](wanted), rtol=0, atol=2.0**-6):
                raise CheckpointError(
                    f"{entry.file}: {name}: is not the table of rope_theta {config.rope_theta:g}, as {where} has it; "
                    "correct rope_theta, or is config.json from another checkpoint?"
                )


def _close(got: NDArray[np.float64], wanted: NDArray[np.float64]) -> bool:
    """To the rounding of a bfloat16, which it is or was before it was widened; float16 has nothing below 2^-24."""
    return bool(np.allclose(got, wanted, rtol=2.0**-8, atol=2.0**-24))


def _contradiction(got: NDArray[np.float64], exponents: NDArray[np.float64], config: ModelConfig, where: Path) -> str:
    """Another base, another width, or frequencies that are no powers of one: a scaled rope."""
    if got.shape != exponents.shape:
        return f"got {list(got.shape)}, {where} implies {list(exponents.shape)}; is config.json from another checkpoint?"
    theta = float(got[-1] ** (-1 / exponents[-1])) if len(got) > 1 and got[-1] > 0 else 0.0
    if 0 < theta < np.inf and _close(got, theta**-exponents):
        todo = "correct rope_theta there, or is config.json from another checkpoint?"
        return f"is that of rope_theta {theta:.4g}, {where} has {config.rope_theta:g}; {todo}"
    return (
        f"is not that of rope_theta {config.rope_theta:g}, which {where} has, nor of another: the rope is scaled, which is "
        "not supported, or config.json is from another checkpoint"
    )
