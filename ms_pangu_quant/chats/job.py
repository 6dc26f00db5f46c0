"""calibrate(): the float model answers prompts in its thinking modes, and what it says becomes calibration text.

The model's own words are what its layers will see when it is served: no other text has its thoughts, and none keeps to what
it finds likely (LLM-QAT, arXiv:2305.17888). A row holds the ids that were generated, prompt in front and what ended them at
the end, because text that is encoded again may have others; beside them stand the messages, to be read.

Answers are drawn with the checkpoint's own temperature, top-p and top-k. Dropped are those that loop, whose thought does
not end, that say nothing, or that hold a benchmark's problem; each is replaced by another prompt's, TRIES prompts in all.
An answer that is cut behind its thought is kept: what is too long for a row is cut in any case.

One process answers, a group of questions after the other, and journals each answer. A float network's last bits depend on
what else is in its batch, and after enough drawn tokens so does the answer: a run that was killed asks the whole group that
it was in again, and so goes on to the bytes of an undisturbed one.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from ms_pangu_quant.calibration.overlap import find_benchmark
from ms_pangu_quant.chats.facts import facts_file, facts_of, origin_of
from ms_pangu_quant.chats.prompts import Asked, Prompts, Question, load_prompts, prompts_of
from ms_pangu_quant.checkpoint.files import json_text, size, write_atomically, write_json
from ms_pangu_quant.checkpoint.reader import CheckpointReader
from ms_pangu_quant.checkpoint.tokenizer import Tokenizer
from ms_pangu_quant.checkpoint.writer import absent_folders, lock, remove_empty
from ms_pangu_quant.errors import DataError, OutputError, RequestError
from ms_pangu_quant.evaluation.lengths import periodic_tail
from ms_pangu_quant.evaluation.samples import Journal, read_records
from ms_pangu_quant.formats import kv_cache
from ms_pangu_quant.inference.sampling import OWN, GenerationSettings, own_settings
from ms_pangu_quant.job import ranks
from ms_pangu_quant.network import runtime
from ms_pangu_quant.pipeline.prepare import checkpoint_hash
from ms_pangu_quant.recipe.recipe import CalibrationSettings

if TYPE_CHECKING:
    from ms_pangu_quant.inference.model import Generation, Model

SAMPLES = CalibrationSettings().texts  # as many as the shipped recipes read
MAX_NEW_TOKENS = 2048
TRIES = 3  # prompts that a row's place is offered
GROUP = 4  # batches: the fewer, the less is asked again, and the more places in a batch stay empty at a group's end
_ANSWERS = "answers.jsonl"
_PARTIAL = ".partial"  # the folder beside the output while a run is under way


@dataclass(frozen=True)
class CalibrationRequest:
    """Which checkpoint answers what, and how. Raises RequestError for what makes no sense.

    checkpoint      float directory.
    prompts         .jsonl file of prompts (chats/prompts.py). None: the prompts.jsonl in the checkpoint's folder, or the
                    shipped ones where it has none.
    modes           thinking modes; None: all that the model has.
    samples         rows that are wanted.
    max_new_tokens  tokens an answer may have, its thought included.
    temperature, top_p, top_k  None: those of generation_config.json; where it names none, sampling.OWN.
    batch_size      answers under way at a time, for all of which there is memory; other sizes draw other answers.
    """

    checkpoint: str | Path
    prompts: str | Path | None = None
    modes: Sequence[str] | None = None
    samples: int = SAMPLES
    max_new_tokens: int = MAX_NEW_TOKENS
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    seed: int = 0
    batch_size: int = 16
    device: str = "cpu"

    def __post_init__(self) -> None:
        for name in ("samples", "batch_size"):
            if getattr(self, name) < 1:
                raise RequestError(f"{name}: got {getattr(self, name)}, wanted at least 1")
        asked = {name: value for name in OWN if (value := getattr(self, name)) is not None}
        GenerationSettings(self.max_new_tokens, seed=self.seed, **asked)


@dataclass(frozen=True)
class Chats:
    """facts: what made the file, and figures of its rows, as the JSON file beside it has them."""

    output: Path
    facts: Mapping[str, Any]
    was_complete: bool = False


@dataclass(frozen=True)
class Prepared:
    """A request, opened; fingerprint is what the answers depend on."""

    request: CalibrationRequest
    reader: CheckpointReader
    tokenizer: Tokenizer
    prompts: Prompts
    modes: Sequence[str]
    settings: GenerationSettings
    fingerprint: Mapping[str, Any]

    @property
    def digest(self) -> str:
        return hashlib.sha256(json.dumps(self.fingerprint, sort_keys=True).encode()).hexdigest()


def prepare(request: CalibrationRequest, on_bytes: Callable[[int], None] = lambda count: None) -> Prepared:
    """Reads the whole checkpoint once, for its hash. Raises PanguQuantError for what does not fit together."""
    if ranks.in_job():
        raise RequestError("calibrate: one process answers; start it without msrun, and give its file to the job")
    reader = CheckpointReader(Path(request.checkpoint))
    tokenizer = Tokenizer(reader.directory)
    modes = tokenizer.modes if request.modes is None else tuple(dict.fromkeys(request.modes))
    if not modes:
        raise RequestError(f"modes: got none, wanted some of {', '.join(tokenizer.modes)}")
    for mode in modes:
        tokenizer.render_chat([{"role": "user", "content": "?"}], mode=mode)  # refuses what the model does not have
    prompts = load_prompts(prompts_of(reader.directory) if request.prompts is None else Path(request.prompts))
    asked = {name: getattr(request, name) for name in OWN}
    settings = own_settings(reader.directory, request.max_new_tokens, request.seed, asked)
    fingerprint = {
        "checkpoint": checkpoint_hash(reader, on_bytes),
        "prompts": prompts.sha256,
        "modes": list(modes),
        "samples": request.samples,
        "settings": {name: value for name, value in asdict(settings).items() if name != "stop"},
        "batch": request.batch_size,
        "version of ms_pangu_quant": version("ms_pangu_quant"),
    }
    return Prepared(request, reader, tokenizer, prompts, modes, settings, fingerprint)


def calibrate(
    request: CalibrationRequest,
    output: str | Path,
    *,
    resume: bool = False,
    on_begin: Callable[[int], None] = lambda count: None,
    on_tokens: Callable[[int], None] = lambda count: None,
    on_row: Callable[[], None] = lambda: None,
) -> Chats:
    """The float model's own answers to prompts, as rows of the calibration file `output`, a new .jsonl; what is known of
    them in a .json beside it.

    resume     go on with an unfinished run, or leave a finished one; byte-identical to an undisturbed run's.
    on_begin   called once the model is loaded, with how many rows are wanted.
    on_tokens  called after each pass with how many tokens it gave.
    on_row     called for each row, also for those that an earlier run has.
    Raises     PanguQuantError, as the command does, before anything is generated where that is possible.
    """
    path = Path(output)
    check_output(path, resume)
    return answer(prepare(request), path, resume=resume, on_begin=on_begin, on_tokens=on_tokens, on_row=on_row)


def check_output(output: Path, resume: bool) -> None:
    """Raises OutputError where answer() would, as far as it can be told before there is anything to write."""
    if output.suffix != ".jsonl" or output.is_dir():
        raise OutputError(f"{output}: wanted the name of a .jsonl file")
    for path in (output, facts_file(output)):
        if path.exists() and not resume:
            raise OutputError(f"{path}: is there already; choose another --output")


def answer(
    prepared: Prepared,
    output: Path,
    *,
    resume: bool = False,
    on_begin: Callable[[int], None] = lambda count: None,
    on_tokens: Callable[[int], None] = lambda count: None,
    on_row: Callable[[], None] = lambda: None,
) -> Chats:
    """calibrate() of a prepared request."""
    check_output(output, resume)
    found = finished(prepared, output)
    if found is not None:
        shutil.rmtree(_partial(output), ignore_errors=True)  # killed before it was removed
        return found
    with _journal(prepared, output, resume) as (journal, known):
        asked, too_long = _asked(prepared)
        with _model(prepared) as model:
            on_begin(prepared.request.samples)
            rows, faults = _Asking(prepared, model, journal, known, on_tokens, on_row).all(asked)
        if rows:
            written = write_atomically(output, (json_text(row, ascii=False).encode() + b"\n" for row in rows))
            facts = {
                "made_by": "pangu-quant calibrate",
                "fingerprint": dict(prepared.fingerprint),
                "sha256": written.sha256,
                **facts_of(rows, faults, too_long, prepared.request.samples),
            }
            write_json(facts_file(output), facts)
            return Chats(output, facts)
    said = ", ".join(f"{name} {faults.count(name)}" for name in dict.fromkeys(faults))
    raise DataError(f"{prepared.reader.directory}: not one of {len(faults)} answers is of use ({said})")


def finished(prepared: Prepared, output: Path) -> Chats | None:
    """What an earlier run of the same request wrote; None where there is nothing. Raises OutputError for anything else."""
    if not output.exists():
        return None
    facts = origin_of(output)
    if facts is None and not facts_file(output).exists() and _partial(output).exists():
        return None  # killed between its two files
    if facts is None or facts.get("fingerprint") != dict(prepared.fingerprint):
        what = "is not what calibrate wrote there, or was changed since" if facts is None else "is of another run"
        raise OutputError(f"{output}: {what}; delete it with its .json, or choose another --output")
    return Chats(output, facts, was_complete=True)


def _partial(output: Path) -> Path:
    return output.with_name(f"{output.name}{_PARTIAL}")


@contextmanager
def _journal(prepared: Prepared, output: Path, resume: bool) -> Iterator[tuple[Journal, dict[Any, dict[str, Any]]]]:
    """(journal, what it has by key), in a folder of its own beside the output while a run is under way; it has a lock."""
    folder, done = _partial(output), False
    made, path = absent_folders(folder), folder / _ANSWERS
    descriptor = lock(folder)
    try:
        if not _has_answers(path):
            path.unlink(missing_ok=True)
        elif not resume:
            raise OutputError(f"{folder}: holds an unfinished run; continue it with --resume, or choose another --output")
        with Journal(path) as journal:
            records = [record for _, record in read_records(path)]
            if not records:
                journal.append({"fingerprint": dict(prepared.fingerprint)})
            elif records[0].get("fingerprint") != dict(prepared.fingerprint):
                raise OutputError(
                    f"{folder}: was begun with another checkpoint, prompts or settings; a run can be resumed only with "
                    "what it was begun with: choose another --output"
                )
            yield journal, {tuple(record["key"]): record for record in records[1:]}
        done = True
    finally:
        if done or not _has_answers(path):
            shutil.rmtree(folder, ignore_errors=True)
            remove_empty(made[1:])
        os.close(descriptor)


def _has_answers(path: Path) -> bool:
    """Beside the line that says what the run was begun with."""
    return path.exists() and path.read_bytes().count(b"\n") > 1


def _asked(prepared: Prepared) -> tuple[Asked, int]:
    """What is asked, and how many prompts are too long for the model's context."""
    room = prepared.reader.config.max_position_embeddings
    fitting = [
        prompt
        for prompt in prepared.prompts.all
        if all(len(_ids(prepared, Question(mode, prompt, 0))) < room for mode in prepared.modes)
    ]
    if not fitting:
        raise DataError(f"every prompt is longer than the model's max_position_embeddings {room}")
    asked = Asked(fitting, prepared.modes, prepared.request.samples, prepared.request.seed)
    return asked, len(prepared.prompts.all) - len(fitting)


def _model(prepared: Prepared) -> Model:
    """With room for a whole batch of the longest answers, so that what is in a batch does not depend on the memory.

    Raises RequestError where that much is not free.
    """
    from ms_pangu_quant.inference.model import BLOCK_SIZE, load

    request, reader = prepared.request, prepared.reader
    lengths = (len(_ids(prepared, Question(prepared.modes[-1], prompt, 0))) for prompt in prepared.prompts.all)
    longest = min(max(lengths) + request.max_new_tokens, reader.config.max_position_embeddings)
    room = request.batch_size * (longest + 2 * BLOCK_SIZE)
    each = kv_cache.bytes_per_token(reader.config, 4)
    free = int(psutil.virtual_memory().available) - reader.bytes
    if room * each > free:
        raise RequestError(
            f"batch_size {request.batch_size}: answers of up to {longest} tokens take a cache of {size(room * each)}, and "
            f"beside the model {size(max(free, 0))} are free; lower --batch-size or --max-new-tokens"
        )
    runtime.start(request.device, "graph")
    return load(reader.directory, request.device, kv_cache_tokens=room)


def _ids(prepared: Prepared, question: Question) -> list[int]:
    return prepared.tokenizer.encode_chat(question.prompt.messages, mode=question.mode)


class _Asking:
    def __init__(
        self,
        prepared: Prepared,
        model: Model,
        journal: Journal,
        known: Mapping[Any, dict[str, Any]],
        on_tokens: Callable[[int], None],
        on_row: Callable[[], None],
    ) -> None:
        self._prepared, self._model, self._journal = prepared, model, journal
        self._known = dict(known)
        self._on_tokens, self._on_row = on_tokens, on_row

    def all(self, asked: Asked) -> tuple[list[dict[str, Any]], list[str]]:
        """(rows in the order of their places, what is wrong with each answer that was dropped)."""
        rows: dict[int, dict[str, Any]] = {}
        faults: list[str] = []
        for _ in range(TRIES):
            empty = [place for place in range(len(asked.places)) if place not in rows]
            questions = asked.fill(empty)
            self._answer(questions)
            for place, question in zip(empty, questions, strict=True):
                record = self._known[question.key]
                if record["fault"] is None:
                    rows[place] = record["row"]
                else:
                    faults.append(record["fault"])
        return [rows[place] for place in sorted(rows)], faults

    def _answer(self, questions: Sequence[Question]) -> None:
        """Journals what is not known yet."""
        for question in questions:
            if question.key in self._known and self._known[question.key]["fault"] is None:
                self._on_row()
        step = GROUP * self._prepared.request.batch_size
        for start in range(0, len(questions), step):
            group = questions[start : start + step]
            if any(question.key not in self._known for question in group):
                self._answer_group(group)

    def _answer_group(self, group: Sequence[Question]) -> None:
        prompts = [_ids(self._prepared, question) for question in group]
        answers = self._model.stream(
            prompts,
            self._prepared.settings,
            streams=[question.stream for question in group],
            max_batch=self._prepared.request.batch_size,
            on_tokens=self._on_tokens,
        )
        for index, generation in answers:
            question = group[index]
            if question.key in self._known:
                continue
            row = _row(question, prompts[index], generation, self._prepared.tokenizer)
            wrong = fault(generation, self._prepared.tokenizer.decode(row["token_ids"]))
            record = {"key": question.key, "fault": wrong, "row": row if wrong is None else None}
            self._journal.append(record)
            self._known[question.key] = record
            if wrong is None:
                self._on_row()


def _row(question: Question, prompt: Sequence[int], generation: Generation, tokenizer: Tokenizer) -> dict[str, Any]:
    end = [] if generation.end_id is None else [generation.end_id]
    said = tokenizer.chat(question.prompt.messages, mode=question.mode)
    return {
        "token_ids": [*prompt, *generation.token_ids, *end],
        "messages": [*said, {"role": "assistant", "content": generation.text}],
        "mode": question.mode,
        "kind": question.prompt.kind,
        "language": question.prompt.language,
        "prompt": question.prompt.number,
        "prompt_tokens": len(prompt),
        "thought_tokens": generation.thought_tokens,
        "finish_reason": generation.finish_reason,
    }


def fault(generation: Generation, text: str) -> str | None:
    """Why an answer is of no use, one of facts.FAULTS; None where it is. text  prompt and answer."""
    if periodic_tail(generation.token_ids).repetitive:
        return "loop"
    if not generation.thought_closed:
        return "unfinished thought"
    if not generation.answer.strip():
        return "empty"
    return "benchmark" if find_benchmark(text) is not None else None
