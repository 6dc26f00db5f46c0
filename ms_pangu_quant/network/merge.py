"""merge(): what MindFormers' training left behind becomes one Hugging Face checkpoint directory.

Slices that came with strategy files (a folder rank_N for each rank) are merged by MindSpore's own unified_safetensors into
a temporary folder; what the reader takes as it is (checkpoint/training.py, checkpoint/slices.py) is read where it lies.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

from ms_pangu_quant.checkpoint import layout
from ms_pangu_quant.checkpoint.config import read_json
from ms_pangu_quant.checkpoint.files import INDEX_FILE, write_json, write_safetensors
from ms_pangu_quant.checkpoint.reader import CheckpointReader
from ms_pangu_quant.checkpoint.writer import absent_folders, carry_over, remove_empty
from ms_pangu_quant.errors import CheckpointError, OutputError
from ms_pangu_quant.network import runtime
from ms_pangu_quant.suggestion import did_you_mean_path


def merge(
    source: Path,
    output: Path,
    *,
    start: Path | None = None,
    strategy: Path | None = None,
    suffix: str | None = None,
    on_file: Callable[[int, int], None] = lambda done, total: None,
) -> int:
    """Write `output`; returns the size of its tensors in bytes.

    start     checkpoint directory the training started from, for config.json and the tokenizer; source's own if None.
    strategy  strategy file, or folder of those of all pipeline stages, of a source that is sliced into rank_N folders.
    suffix    of the file to take from each rank folder ("10_2"), where there are several.
    on_file   (files written, files in all), after each.
    Raises    CheckpointError, OutputError.
    """
    for given in (source, start, strategy):
        if given is not None and not given.exists():
            raise CheckpointError(f"{given}: no such file or directory{did_you_mean_path(given)}")
    with _emptied_if_it_fails(output):
        with tempfile.TemporaryDirectory(prefix=".merging-", dir=output) as folder:
            weights = _unified(source, strategy, Path(folder), suffix) if strategy else source
            reader = CheckpointReader(_with_config(weights, start or source, Path(folder) / "read"))
            total = _write(reader, output, on_file)
        carry_over(start or source, output)
        write_json(output / "config.json", dict(reader.config.raw))
    return total


@contextmanager
def _emptied_if_it_fails(output: Path) -> Iterator[None]:
    """An empty directory, made where there is none; on an error its files go, and what of it and its parents was made."""
    absent = absent_folders(output)
    try:
        try:
            output.mkdir(parents=True, exist_ok=True)
            is_empty = not any(output.iterdir())
        except OSError as error:
            raise OutputError(f"{output}: cannot write here ({error.strerror}); choose another --output") from None
        if not is_empty:
            raise OutputError(f"{output}: is not empty; choose another --output")
        try:
            yield
        except BaseException:
            for path in output.iterdir():
                path.unlink()
            raise
    except BaseException:
        remove_empty(absent)
        raise


def _unified(source: Path, strategy: Path, folder: Path, suffix: str | None) -> Path:
    """MindSpore's merge of the ranks' slices, without what the optimizer keeps."""
    slices = sorted(source.glob("rank_[0-9]*"))
    if not slices:
        raise CheckpointError(f"{source}: has no folder rank_0; --strategy is for slices of ranks, leave it out otherwise")
    for each in slices:
        files = sorted(path.name for path in each.glob(f"*{suffix or ''}.safetensors"))
        if len(files) != 1:
            wanted = f"one file *{suffix or ''}.safetensors; choose with --suffix"
            raise CheckpointError(f"{each}: holds {', '.join(files) or 'no such file'}, wanted {wanted}")
    runtime.ensure_started()
    import mindspore as ms

    merged = folder / "unified"
    try:
        with runtime.quiet(), _not_waiting_for_memory():
            if strategy.is_dir():
                ms.merge_pipeline_strategys(str(strategy), str(folder / "strategy.ckpt"))
                strategy = folder / "strategy.ckpt"
            ms.unified_safetensors(
                str(source),
                str(strategy),
                str(merged),
                file_suffix=suffix,
                max_process_num=1,
                choice_func=lambda name: name.startswith(("decoder.", "embedding.", "output_layer.")),
            )
    except (ValueError, RuntimeError, TypeError, KeyError, OSError) as error:
        raise CheckpointError(f"{source}: MindSpore cannot merge it with {strategy} ({error})") from None
    (merged / "hyper_param.safetensors").unlink(missing_ok=True)  # step counts and what is no parameter of the network
    return merged


@contextmanager
def _not_waiting_for_memory() -> Iterator[None]:
    """MindSpore sleeps after each file for as long as half of the machine's memory is in use: perhaps for ever.

    That is meant for its many processes; here one works on one file at a time.
    """
    from mindspore.parallel import transform_safetensors

    asked = transform_safetensors.psutil
    transform_safetensors.psutil = SimpleNamespace(virtual_memory=lambda: SimpleNamespace(percent=0.0))
    try:
        yield
    finally:
        transform_safetensors.psutil = asked


def _with_config(weights: Path, start: Path, folder: Path) -> Path:
    """A directory with the files of `weights`, linked, and config.json of `start`; `weights` itself if it has one."""
    if (weights / "config.json").exists():
        return weights
    if not (start / "config.json").exists():
        raise CheckpointError(
            f"{start}: has no config.json; name the checkpoint directory that the training started from with --config"
        )
    folder.mkdir()
    for path in weights.iterdir():
        if path.suffix in (".safetensors", ".json"):
            (folder / path.name).symlink_to(path.resolve())
    write_json(folder / "config.json", read_json(start / "config.json"))
    return folder


def _write(reader: CheckpointReader, output: Path, on_file: Callable[[int, int], None]) -> int:
    """A file for each block and one for the rest, and their index."""
    blocks = reader.config.num_hidden_layers
    weight_map: dict[str, str] = {}
    total = 0
    for number in range(blocks + 1):
        prefix = layout.block_prefix(number)
        inside = [prefix + name for name in layout.block_shapes(reader.config)]
        names = inside if number < blocks else list(layout.outer_shapes(reader.config))
        file = f"model-{number + 1:05d}-of-{blocks + 1:05d}.safetensors"
        total += sum(reader.files.entries[name].nbytes for name in names)
        write_safetensors(output / file, {name: reader.files.entries[name] for name in names})
        weight_map.update(dict.fromkeys(names, file))
        on_file(number + 1, blocks + 1)
    write_json(output / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": weight_map})
    return total
