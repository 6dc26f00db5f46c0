#!/usr/bin/env python3
"""Measure and write every table of figures: docs/accuracy.md, recipes.md and kv_cache.md, the checkpoints' card and the
READMEs, between their markers.

A table is a setting (checkpoint, data, modes) and rows of data; to add a row, add a line to it in TABLES. Tables with the
same setting share its folder below WORK, so a row that stands in two of them is measured once. A run that was stopped goes
on with what is missing; delete WORK, or a row's folder in it, to measure again. See peers/compare.py for the other tools'
environments; rows of theirs that are not there say so.

exit code  0 every row was measured, 3 some were not, 2 the request cannot be done
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))  # the rooms import each other from the root

import numpy as np
import yaml

from ms_pangu_quant.checkpoint.config import ModelConfig
from ms_pangu_quant.errors import PanguQuantError
from ms_pangu_quant.evaluation.samples import write_pieces
from ms_pangu_quant.evaluation.statistics import Interval, retention, wilson
from ms_pangu_quant.evaluation.summary import scores
from ms_pangu_quant.evaluation.tasks import TASKS, load_problems
from ms_pangu_quant.job.arguments import Parser
from ms_pangu_quant.recipe.parse import find_recipe
from ms_pangu_quant.report.comparison import Comparison, compare
from ms_pangu_quant.report.results import Run, load_runs
from tools.dev import make_checkpoint
from tools.embedded import rescale_outliers
from tools.peers import compare as peers
from tools.peers.compare import ASSETS, CHANNEL, FLOAT, GROUP, MIXED, STATIC, W8A8, markdown, number, passed
from tools.peers.measure import OURS, ROOT, Record, Row, Setting, recorded
from tools.real import checkpoint as real

PAGE, RECIPES, KV_CACHE = (ROOT / f"docs/{name}.md" for name in ("accuracy", "recipes", "kv_cache"))
READMES = (ROOT / "README.md", ROOT / "README.zh-CN.md")
CARD = ASSETS / "README.md"
MINI, TIED = ASSETS / "openpangu-mini", ASSETS / "openpangu-mini-tied"
MODES = ("no_think", "slow_think", "auto_think")
RETAINED = {W8A8: 0.99, STATIC: 0.98, GROUP: 0.98, CHANNEL: 0.97}  # what each scheme is to keep of pass@1
LAYERS_1B = {"layers": 2, "vocab_size": 8192}  # the 1B's layers, two of them, and a small vocabulary


def recipes(*names: str, scheme: dict[str, str] | None = None, what: str = "") -> tuple[Row, ...]:
    """Rows of this project's recipes, by name, which is also what the table calls them."""
    schemes = {"w8a8": W8A8, "w8a8_static": STATIC, "w4a8_g128": GROUP, "w4a8": CHANNEL, "w4a8_rtn": CHANNEL}
    schemes["w4a8_mixed"] = MIXED
    schemes |= scheme or {}
    return tuple(Row(name, schemes.get(name, ""), OURS, what or f"`{name}`", name) for name in names)


MAIN = ("w8a8", "w8a8_static", "w4a8_g128", "w4a8")
PAPER = tuple(
    Row(name, scheme, OURS, f"`{name}`", name)
    for name, scheme in (
        ("paper_w8a8", "W8A8"),
        ("paper_w4a8", "W4A8"),
        ("paper_w4a8_smooth", "W4A8 + SmoothQuant"),
        ("paper_w4a8_hadamard", "W4A8 + Hadamard"),
    )
)
EVERY = ("w8a8_rtn", "w8a8", "w8a8_static", "w4a8_rtn", "w4a8_g128_rtn", "w4a8", "w4a8_mixed", "w4a8_g128", "w4a8_g256")
HALF, GPTQ, ROTATED = {"smooth": {"alpha": 0.5}}, {"gptq": {"damping": 0.01}}, ["rotate", "smooth_search"]
AUTO = yaml.safe_load(find_recipe("w4a8_g128").read_text(encoding="utf-8"))["rounding"]["gptq"]


def own(name: str, what: str, *, of: str = "w4a8_g128", **changed: Any) -> Row:
    """A row of a shipped recipe with some of its keys changed."""
    recipe = yaml.safe_load(find_recipe(of).read_text(encoding="utf-8"))
    return Row(name, "", OURS, what, {**recipe, **changed})


PARTS = (
    own("smooth_rtn", "smoothing with alpha 0.5, rounding to nearest", transforms=[HALF], rounding="rtn"),
    own("smooth_gptq", "smoothing with alpha 0.5, GPTQ", transforms=[HALF], rounding=GPTQ),
    own("search_gptq", "`smooth_search`, GPTQ", transforms=["smooth_search"], rounding=GPTQ),
    own("search_signround", "`smooth_search`, learned rounding", transforms=["smooth_search"], rounding="signround"),
    *recipes("w4a8_g128", what="`smooth_search`, GPTQ with `correct`, damping and strength `auto`, `temper`: `w4a8_g128`"),
    own(
        "search_sweeps", "the same with two sweeps", transforms=["smooth_search"], rounding={"gptq": {**AUTO, "sweeps": 2}}
    ),
    own("rotated_gptq", "rotated, `smooth_search`, GPTQ", transforms=ROTATED, rounding=GPTQ),
    own("rotated_auto", "rotated, `smooth_search`, GPTQ as in `w4a8_g128`", transforms=ROTATED),
)


def cached(name: str, what: str, of: str = "kv8", **settings: Any) -> Row:
    return own(name, what, of=of, kv_cache={"int8": settings} if settings else "int8")


CACHES = (
    *recipes("kv8", what="float weights, **a scale for each channel** (`kv8`)"),
    cached("kv_zero_points", "the same with zero points", symmetric=False),
    cached("kv_mse", "the same, range by `mse`", method="mse"),
    cached("kv_percentile", "the same, range by `percentile`", method="percentile"),
    cached("kv_keys_head", "keys a scale for each head, values for each channel", keys="head"),
    cached("kv_values_head", "values a scale for each head, keys for each channel", values="head"),
    cached("kv_heads", "both a scale for each head", keys="head", values="head"),
    *recipes("w8a8", "w8a8_kv8", "w4a8"),
    cached("w4a8_kv8", "`w4a8` with `kv_cache: int8`", of="w4a8"),
    *recipes("w4a8_g128"),
    cached("w4a8_g128_kv8", "`w4a8_g128` with `kv_cache: int8`", of="w4a8_g128"),
)
AGAINST_PEERS_1B = ("llmc_w8a8_gptq", "slim_w8a8_iter", "llmc_w4a8_gptq", "llmc_w4a8_channel", "slim_w4a8_iter")


@dataclass(frozen=True)
class Table:
    """folder  below WORK; tables of one folder have the same checkpoint and data.
    render  (records, setting) -> Markdown.
    page    the file that it is written into.
    """

    name: str
    folder: str
    rows: Sequence[Row]
    modes: Sequence[str]
    render: Callable[[Sequence[Record], Setting], str]
    page: Path = PAGE


def peers_table(records: Sequence[Record], setting: Setting) -> str:
    return f"{peers.table(records, setting.modes)}\n\n{peers.ratios(records)}"


def retention_table(records: Sequence[Record], setting: Setting) -> str:
    """Paired with the float model's answers to the same problems."""
    modes = setting.modes
    titles = ["scheme", "recipe", *(f"{mode}: passed, retention [95 %]" for mode in modes)]
    titles += ["retention, all modes", "wanted", "KL", "lost / gained, p"]
    lines = [titles, ["---"] * len(titles)]
    found, together = paired(records, setting)
    for record in records:
        row = record["row"]
        against = found.get(row["name"], {})
        whole = percent(together[row["name"]]) if row["name"] in together else ""
        wanted = f">= {RETAINED[row['scheme']]:.0%}" if row["scheme"] in RETAINED and row["name"] in MAIN else ""
        kl = number(record["compare"]["kl_mean"]) if "compare" in record else "0"
        cells = [kept(record, mode, against.get(mode)) for mode in modes]
        lines.append([row["scheme"], row["what"], *cells, whole, wanted, kl, "; ".join(map(flipped, against.values()))])
    return markdown(lines)


def paired(records: Sequence[Record], setting: Setting) -> tuple[dict[str, dict[str, Comparison]], dict[str, Interval]]:
    """Of the rows whose answers are there, against the float model's: row -> mode -> comparison, and row -> retention over
    all modes, a problem's score being the share of the modes in which it is solved."""
    names = [record["row"]["name"] for record in records if is_evaluated(record, setting)]
    if FLOAT.name not in names or len(names) < 2:
        return {}, {}
    ordered = [FLOAT.name, *(name for name in names if name != FLOAT.name)]
    runs = load_runs([setting.work / name / "evaluation" for name in ordered], ordered)
    against: dict[str, dict[str, Comparison]] = {}
    for each in compare(runs, 0.9):
        if each.cell[0] == setting.task and each.cell[1] in setting.modes:
            against.setdefault(each.run.name, {})[each.cell[1]] = each
    solved = {run.name: shares(run, setting) for run in runs}
    reference = solved.pop(FLOAT.name)
    together = {}
    for name, mine in solved.items():
        shared = [problem for problem in reference if problem in mine]
        found = retention([reference[problem] for problem in shared], [mine[problem] for problem in shared])
        if found is not None:
            together[name] = found.ratio
    return against, together


def is_evaluated(record: Record, setting: Setting) -> bool:
    """In all of the setting's modes."""
    return bool(setting.modes) and set(setting.modes) <= set(record.get("evaluate", ()))


def shares(run: Run, setting: Setting) -> dict[str, float]:
    """Problem -> share of the setting's modes in which it is solved; of problems judged in all of them."""
    by_mode = [scores(run.of(setting.task, mode)) for mode in setting.modes]
    return {key: float(np.mean([of[key] for of in by_mode])) for key in by_mode[0] if all(key in of for of in by_mode)}


def kept(record: Record, mode: str, against: Comparison | None) -> str:
    """Share that passed; retention with its interval, or for the float model the Wilson interval of the share."""
    share = passed(record, mode)
    if against is not None and against.retention is not None:
        return f"{share}, {percent(against.retention.ratio)}"
    entry = record.get("evaluate", {}).get(mode)
    if entry is None:
        return share
    return f"{share} {bounds(wilson(entry['passed'], entry['problems']))}"


def percent(interval: Interval) -> str:
    return f"{interval.value:.1%} {bounds(interval)}"


def bounds(interval: Interval) -> str:
    return f"[{100 * interval.low:.1f}, {100 * interval.high:.1f}]"


def flipped(against: Comparison) -> str:
    """Problems that only one of the two passed, and McNemar's exact p."""
    if against.flips is None:
        return ""
    p = f"{against.flips.p:.2f}" if against.flips.p >= 0.01 else "< .01"
    return f"{len(against.flips.lost)}/{len(against.flips.gained)} {p}"


def kl_table(records: Sequence[Record], setting: Setting) -> str:
    return peers.table(records, ())


def results_table(records: Sequence[Record], setting: Setting) -> str:
    """A row for each of this project's recipes: its KL, the best other tool's in the same scheme, and what is retained."""
    titles = ["scheme", "recipe", "mean KL, nats", "best other tool", "pass@1 kept [95 %]", "size"]
    lines = [titles, ["---", "---", "---:", "---:", "---", "---:"]]
    _, together = paired([record for record in records if record["row"]["tool"] == OURS], setting)
    for record in records:
        row = record["row"]
        if row["tool"] != OURS or "compare" not in record:
            continue
        others = _others(records, row["scheme"])
        best = number(min(others)) if others and row["name"] in MAIN else ""
        whole = percent(together[row["name"]]) if row["name"] in together else ""
        size = f"{record['quantize']['bytes'] / 2**20:.2f} MiB"
        lines.append([row["scheme"], row["what"], number(record["compare"]["kl_mean"]), best, whole, size])
    return markdown(lines)


def real_results_table(records: Sequence[Record], setting: Setting) -> str:
    """A row for each of this project's recipes: its KL, the best other tool's in the same scheme, agreement and size."""
    titles = ["scheme", "recipe", "mean KL, nats", "s.e.", "best other tool", "top-1", "size"]
    lines = [titles, ["---", "---", "---:", "---:", "---:", "---:", "---:"]]
    for record in records:
        row, found = record["row"], record.get("compare")
        if row["tool"] != OURS or found is None:
            continue
        others = [] if row["name"].endswith("_rtn") else _others(records, row["scheme"])  # plain rounding is no rival
        best = number(min(others)) if others else ""
        figures = [number(found["kl_mean"]), number(found["kl_se"], 1), best, f"{found['top1_agreement']:.2%}"]
        lines.append([row["scheme"], row["what"], *figures, f"{record['quantize']['bytes'] / 2**20:.2f} MiB"])
    return markdown(lines)


def _others(records: Sequence[Record], scheme: str) -> list[float]:
    """KLs of the other tools' rows of a scheme."""
    rows = [each for each in records if each["row"]["tool"] != OURS and each["row"]["scheme"] == scheme]
    return [each["compare"]["kl_mean"] for each in rows if "compare" in each]


def chosen_table(records: Sequence[Record], setting: Setting) -> str:
    """What recipes are chosen by."""
    lines = [["", "mean KL, nats", "s.e.", "top-1"], ["---", "---:", "---:", "---:"]]
    for record in records:
        found = record.get("compare")
        cells = ["not measured", "", ""]
        if found is not None:
            cells = [number(found["kl_mean"]), number(found["kl_se"], 1), f"{found['top1_agreement']:.2%}"]
        lines.append([record["row"]["what"], *cells])
    return markdown(lines)


def card_table(records: Sequence[Record], setting: Setting) -> str:
    """A row for each mode: what the checkpoint solves, of how many steps, and how long its answers are."""
    steps = {key: len(each.row["steps"]) for key, each in load_problems(TASKS[setting.task]).by_id.items()}
    lengths = sorted(set(steps.values()))
    titles = ["mode", "pass@1 [95 %]", *(f"{length} steps" for length in lengths), "tokens an answer", "of them thought"]
    lines = [titles, ["---", "---", *["---:"] * (len(titles) - 2)]]
    evaluated = [record for record in records if is_evaluated(record, setting)]
    run = load_runs([setting.work / evaluated[0]["row"]["name"] / "evaluation"])[0] if evaluated else None
    for mode in setting.modes if run else ():
        results = run.of(setting.task, mode)
        solved = scores(results)
        cells = [f"{np.mean([of for key, of in solved.items() if steps[key] == length]):.1%}" for length in lengths]
        share = f"{np.mean([*solved.values()]):.1%} {bounds(wilson(round(sum(solved.values())), len(solved)))}"
        tokens = [f"{np.mean([result[name] or 0 for result in results]):.0f}" for name in ("tokens", "thought_tokens")]
        lines.append([mode, share, *cells, *tokens])
    return markdown(lines)


TABLES = (
    Table("real", "real", peers.REAL_ROWS, (), peers_table),
    Table("peers", "mini", peers.ROWS, ("no_think", "slow_think"), peers_table),
    Table("retention", "mini", (FLOAT, *recipes(*MAIN, "w4a8_mixed", "w4a8_rtn")), MODES, retention_table),
    Table("paper", "mini", (replace(FLOAT, scheme="FP16 of the paper, here bfloat16"), *PAPER), MODES, retention_table),
    Table("outliers_x128", "x128", recipes(*MAIN, "w4a8_rtn"), (), kl_table),
    Table("outliers_none", "none", recipes(*MAIN, "w4a8_rtn"), (), kl_table),
    Table(
        "layers_1b",
        "layers_1b",
        (
            *recipes(*MAIN, "w4a8_rtn"),
            *(row for row in peers.ROWS if row.name in AGAINST_PEERS_1B),
        ),
        (),
        peers_table,
    ),
    Table("recipes", "mini", recipes(*EVERY, *(row.name for row in PAPER)), (), chosen_table, RECIPES),
    Table("parts", "choice", PARTS, (), chosen_table, RECIPES),
    Table("kv_cache", "choice", CACHES, (), chosen_table, KV_CACHE),
    Table("openpangu-mini", "mini", (FLOAT,), MODES, card_table, CARD),
    Table("openpangu-mini-tied", "tied", (FLOAT,), MODES, card_table, CARD),
)


RESULTS = (  # of what the other tables have measured, in both READMEs
    Table("results_real", "real", peers.REAL_ROWS, (), real_results_table),
    Table(
        "results",
        "mini",
        (FLOAT, *recipes(*MAIN, "w4a8_mixed", "w4a8_rtn"), *(row for row in peers.ROWS if row.tool != OURS)),
        MODES,
        results_table,
    ),
)


# --- checkpoints ----------------------------------------------------------------------------------------------------


def setting_of(table: Table, chosen: argparse.Namespace) -> Setting:
    """Makes the folder's checkpoint and data if they are not there."""
    work = chosen.work / table.folder
    checkpoint, calibration, texts = MINI, ASSETS / "calibration.jsonl", ASSETS / "validation.jsonl"
    if table.folder == "tied":
        checkpoint = TIED
    if table.folder in ("x128", "none"):
        checkpoint = work / "float_checkpoint"
        if not (checkpoint / "config.json").exists():
            rescale_outliers.write(MINI, checkpoint, 2.0 if table.folder == "x128" else None)
    if table.folder == "layers_1b":
        checkpoint, calibration, texts = random_checkpoint(work)
    if table.folder == "real":
        checkpoint, calibration, texts = (work / "model" / name for name in (real.CHECKPOINT, *real.TEXTS))
        if not (work / "model" / real.ORIGIN).exists():
            shutil.rmtree(work / "model", ignore_errors=True)  # of a run that was stopped
            real.write(work / "model")
    limit = Setting.limit
    if table.folder == "choice":  # the rows on which recipes are chosen
        texts, limit = work / "texts.jsonl", 150
        if not texts.exists():
            rows = (ASSETS / "validation.jsonl").read_bytes().splitlines(keepends=True)
            write_pieces(texts, [b"".join(rows[300 : 300 + limit])])
    setting = peers.setting_of(chosen, checkpoint, calibration, texts, work)
    return replace(setting, modes=table.modes, limit=limit)


def random_checkpoint(work: Path) -> tuple[Path, Path, Path]:
    """(checkpoint, calibration data, held-out data) of the 1B's layer shape; weights and token ids are random."""
    checkpoint, calibration, texts = work / "float_checkpoint", work / "calibration.jsonl", work / "texts.jsonl"
    if not texts.exists():
        config = make_checkpoint.make_config("1b", eos_token_id=2, **LAYERS_1B)
        if not (checkpoint / "config.json").exists():
            make_checkpoint.write_checkpoint(checkpoint, config, seed=0)
        vocabulary = ModelConfig.from_file(checkpoint / "config.json").vocab_size
        draw = np.random.default_rng(0)
        for path, rows, length in ((calibration, 128, 128), (texts, 32, 128)):
            ids = draw.integers(3, vocabulary, (rows, length))
            write_pieces(path, [b"".join(json.dumps({"token_ids": row.tolist()}).encode() + b"\n" for row in ids)])
    return checkpoint, calibration, texts


# --- the page -------------------------------------------------------------------------------------------------------


def replaced(page: str, name: str, text: str) -> str:
    """The page with another text between <!-- table: NAME --> and <!-- end -->. Raises ValueError without the markers."""
    pattern = re.compile(rf"(<!-- table: {re.escape(name)} -->\n).*?(<!-- end -->)", re.DOTALL)
    if not pattern.search(page):
        raise ValueError(f"no markers <!-- table: {name} --> and <!-- end -->")
    return pattern.sub(lambda match: f"{match[1]}{text}\n{match[2]}", page)


def write(page: Path, name: str, text: str) -> None:
    write_pieces(page, [replaced(page.read_text(encoding="utf-8"), name, text).encode()])


def page_of(page: Path, into: Path | None) -> Path:
    """The page itself, or its copy in a folder, made if it is not there."""
    if into is None:
        return page
    copy = into / page.relative_to(ROOT)
    if not copy.exists():
        copy.parent.mkdir(parents=True, exist_ok=True)
        write_pieces(copy, [page.read_bytes()])
    return copy


def main(arguments: list[str] | None = None) -> int:
    parser = Parser(description=__doc__, example="python tools/dev/tables.py --only retention --into copies")
    names = [table.name for table in (*TABLES, *RESULTS)]
    parser.add_argument("--only", nargs="+", choices=names, help="these tables alone")
    parser.add_argument("--into", type=Path, help="folder for copies of the pages to write into, in place of themselves")
    parser.add_argument("--as-is", action="store_true", help="write what has been measured so far, measure nothing")
    peers.add_options(parser)
    chosen = parser.parse_args(arguments)
    failed = False
    try:
        for table in TABLES:
            if chosen.only and table.name not in chosen.only:
                continue
            setting = setting_of(table, chosen)
            if chosen.as_is:
                records = [recorded(row, setting) for row in table.rows]
            else:
                records = peers.measure_all(table.rows, setting)
            records = [{**record, "row": vars(row)} for record, row in zip(records, table.rows, strict=True)]
            failed = failed or any("failure" in record for record in records)
            text = f"{table.render(records, setting)}\n\n{peers.provenance(records)}"
            write(page_of(table.page, chosen.into), table.name, text)
        for table in RESULTS:
            if chosen.only and table.name not in chosen.only:
                continue
            setting = setting_of(table, chosen)
            records = [{**recorded(row, setting), "row": vars(row)} for row in table.rows]
            for page in READMES:
                write(page_of(page, chosen.into), table.name, table.render(records, setting))
    except (PanguQuantError, make_checkpoint.MakeCheckpointError, ValueError, OSError) as error:
        print(f"tables: {error}", file=sys.stderr)
        return 2
    return 3 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
