"""quantize(): a float checkpoint goes in, a quantized one comes out, one decoder block in memory at a time.

The loop in quantize() is the whole method. Each block is looked at with the hidden states that the blocks before it,
already quantized, produce; so every block's statistics are those it will meet when it is served, and its error is measured
against what the float block would have made of the same input.

Started by msrun, every rank runs this loop, on its share of the calibration sequences. What the ranks know of a block's
inputs is merged, so that all transform it alike; each rounds some layers and hands them to the others; rank 0 writes.
Different blocks cannot be rounded at the same time: the statistics of one come from those before it, rounded. In a process
that is alone, each of these steps is nothing.
"""

from __future__ import annotations

from pathlib import Path

from ms_pangu_quant.calibration.data import TokenData
from ms_pangu_quant.calibration.stream import NoStream, Stream
from ms_pangu_quant.checkpoint.reader import CheckpointReader
from ms_pangu_quant.formats import mindformers
from ms_pangu_quant.formats.reader import Format
from ms_pangu_quant.pipeline.block import replay_block, round_block, transform_block
from ms_pangu_quant.pipeline.output import Output, finished
from ms_pangu_quant.pipeline.prepare import prepare
from ms_pangu_quant.pipeline.report import SILENT, Progress, QuantizeResult
from ms_pangu_quant.pipeline.trial import with_transforms
from ms_pangu_quant.recipe.recipe import Recipe


def quantize(
    reader: CheckpointReader,
    recipe: Recipe,
    output: Path,
    *,
    data: TokenData | None = None,
    stored_as: Format = mindformers,
    resume: bool = False,
    progress: Progress = SILENT,
) -> QuantizeResult:
    """Quantize the checkpoint of `reader` as `recipe` says into the directory `output`.

    data      calibration tokens; required if transforms, rounding or static activations need it, else only measured on.
    stored_as the on-disk layout, one of formats.reader.FORMATS.
    resume    go on with an unfinished run in `output`, or leave a finished one; byte-identical to an undisturbed run's.
    Raises    PanguQuantError for anything wrong with checkpoint, recipe, data or output directory.
    """
    recipe = with_transforms(reader, recipe, data, progress, output if resume else None)
    run = prepare(reader, recipe, data, stored_as, progress)
    complete = finished(run, output) if resume else None
    if complete is not None:
        return complete
    with (
        Output(run, output, resume) as written,
        Stream(run.reader, data, recipe.observed, recipe.seen, run.ranks) if data else NoStream(run.ranks) as stream,
    ):
        kept = written.kept()
        if kept is not None:
            stream.restore(kept)
        for report in written.reports:
            if kept is None and data:
                plan = run.plan.blocks[report.index]
                replay_block(run.reader, report.index, written.read(report.index), recipe, plan, stream)
            progress.on_block(report)
        for index in range(len(written.reports), len(run.plan.blocks)):
            block, plan = run.reader.block(index), run.plan.blocks[index]
            block, stats = transform_block(block, stream.observe(block, index, plan), recipe, plan)
            rounded = round_block(block, stats, recipe, plan, stream)
            del block, stats  # as large as all that is still to come
            progress.on_block(written.add(rounded, stream.advance(rounded), stream.states))
        return written.finish()
