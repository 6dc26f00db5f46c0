"""Answers of a model to the problems of tasks, in each thinking mode, into a samples file.

One stream of requests over all tasks and modes: a batch's slot is filled again as soon as its answer ends, so one long
thought holds nobody up. Each answer is written when it ends; a run that was stopped goes on with what is missing. A drawn
answer has its own stream of random numbers, named by task, mode, problem and sample: neither the batch size nor what was
finished before changes which are drawn. They can change what a float checkpoint makes of them, whose last bits depend on
what else is in the batch.

Ranks of an msrun job answer a share of the questions each, and write into a file of their own; rank 0 brings all answers
together. What is left of a job that was stopped is found by the next, with however many ranks.
"""

from __future__ import annotations

import hashlib
import json
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ms_pangu_quant.errors import OutputError, RequestError
from ms_pangu_quant.evaluation.lengths import periodic_tail
from ms_pangu_quant.evaluation.prompts import Messages, Prompt
from ms_pangu_quant.evaluation.samples import Journal, Record, line, places_of_records, read_records, rearrange, write_json
from ms_pangu_quant.evaluation.tasks.task import Problem, Problems
from ms_pangu_quant.inference.sampling import GenerationSettings
from ms_pangu_quant.job.ranks import ALONE, Ranks

if TYPE_CHECKING:
    from ms_pangu_quant.inference.model import Generation

SAMPLES_FILE, RUN_FILE = "samples.jsonl", "run.json"
_RANK_FILES = "samples.rank*.jsonl"
GENERATION = GenerationSettings(max_new_tokens=4096)  # a slow thought is long
Key = tuple[str, str, str, int]


class Generator(Protocol):
    """What answers: a loaded Model, or a ServedModel behind an HTTP API.

    context_length  tokens that a prompt and its answer may have together.
    takes_chats     whether it is given each prompt as a Chat, rather than as token ids.
    """

    takes_chats: bool

    @property
    def context_length(self) -> int: ...

    def stream(
        self,
        prompts: Sequence[Any],
        settings: GenerationSettings,
        *,
        streams: Sequence[int],
        limits: Sequence[int],
        max_batch: int | None,
        on_tokens: Callable[[int], None],
    ) -> Iterator[tuple[int, Generation]]:
        """(place of a prompt, its answer) as each ends; on_tokens is called with how many tokens there are more.

        limits  tokens that the answer to each prompt may have, in place of settings.max_new_tokens.
        """


@dataclass(frozen=True)
class Chat:
    """A prompt that someone else renders."""

    messages: Messages
    mode: str


@dataclass(frozen=True)
class Settings:
    """What an answer depends on beside its question. `samples` answers to each problem; head as of load().

    limits  thinking mode -> tokens an answer may have, generation's where none is named.
    """

    generation: GenerationSettings = GENERATION
    samples: int = 1
    head: str = "stored"
    limits: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.samples > 1 and self.generation.temperature == 0:
            raise RequestError(
                f"--n {self.samples}: greedy answers would all be the same; draw them with --sampled, or a --temperature "
                "above 0"
            )

    def limit(self, mode: str) -> int:
        """Tokens an answer may have, its thought included."""
        return self.limits.get(mode, self.generation.max_new_tokens)

    def told(self, mode: str) -> Record:
        """As a sample says them."""
        stop = list(self.generation.stop)
        told = {**asdict(self.generation), "max_new_tokens": self.limit(mode), "stop": stop, "head": self.head}
        if self.head == "stored":
            del told["head"]  # as in files of the time when there was no other
        if not stop:
            del told["stop"]
        return told


@dataclass(frozen=True)
class Target:
    """Where answers go, and whose they are: the model's id is the checkpoint's hash, or ServedModel.id.

    provenance  written to `output`/run.json once the samples there are known to be of this model and these settings.
    """

    output: Path
    model: str
    settings: Settings
    provenance: Record | None = None

    @property
    def samples(self) -> Path:
        return self.output / SAMPLES_FILE


@dataclass(frozen=True)
class Share:
    """A rank's part. Every tensor_parallel ranks hold one model together and answer the same questions; one writes."""

    ranks: Ranks = ALONE
    tensor_parallel: int = 1

    def of(self, missing: Sequence[Question]) -> Sequence[Question]:
        return missing[self.ranks.rank // self.tensor_parallel :: self.ranks.size // self.tensor_parallel]

    @property
    def writes(self) -> bool:
        return self.ranks.rank % self.tensor_parallel == 0

    def file(self, samples: Path) -> Path:
        """What this rank writes into: the samples file itself where it is alone."""
        return samples if self.ranks.size == 1 else samples.with_name(_RANK_FILES.replace("*", str(self.ranks.rank)))


WHOLE = Share()


@dataclass(frozen=True)
class Watch:
    """What is told of a run that is under way, as in job.answer()."""

    on_begin: Callable[[int], None] = lambda count: None
    on_tokens: Callable[[int], None] = lambda count: None
    on_answer: Callable[[], None] = lambda: None


UNWATCHED = Watch()


@dataclass(frozen=True)
class Question:
    """A problem to answer once more: which, in what mode, and the prompt, as token ids and as messages."""

    task: str
    mode: str
    problem: Problem
    sample_id: int
    token_ids: tuple[int, ...]
    messages: Messages
    prompt_id: str

    @property
    def key(self) -> Key:
        return self.task, self.mode, self.problem.task_id, self.sample_id

    @property
    def stream(self) -> int:
        return int.from_bytes(hashlib.sha256(json.dumps(self.key).encode()).digest()[:8], "big")

    def identity(self, model: str, settings: Settings) -> Record:
        """What a sample must share with a question to be its answer."""
        task, mode, task_id, sample_id = self.key
        return {
            "task": task,
            "mode": mode,
            "task_id": task_id,
            "sample_id": sample_id,
            "model": model,
            "prompt": self.prompt_id,
            "prompt_sha256": hashlib.sha256(json.dumps(self.token_ids).encode()).hexdigest(),
            "settings": settings.told(mode),
        }


def questions(
    tasks: Mapping[str, Problems],
    modes: Sequence[str],
    prompts: Mapping[str, Prompt],
    encode: Callable[[list[dict[str, str]], str], list[int]],
    settings: Settings,
    limit: int | None = None,
) -> Iterator[Question]:
    """All there is to ask, task by task and mode by mode. prompts by task; encode(messages, mode) gives token ids."""
    for name, problems in tasks.items():
        for mode in modes:
            for problem in [*problems.by_id.values()][:limit]:
                messages = prompts[name].render(problem)
                ids = tuple(encode(messages, mode))
                for sample_id in range(settings.samples):
                    yield Question(name, mode, problem, sample_id, ids, messages, prompts[name].id)


def answer(
    model: Generator,
    asked: Sequence[Question],
    target: Target,
    *,
    share: Share = WHOLE,
    max_batch: int | None = None,
    watch: Watch = UNWATCHED,
) -> None:
    """Write the answers into target.samples, in the questions' order once all are there.

    Raises OutputError where the file has samples of another model, prompt or settings.
    """
    watch.on_begin(len(asked))
    records = {question.key: question.identity(target.model, target.settings) for question in asked}
    found = share.ranks.from_first(lambda: _begin(target, records))
    for _ in found:
        watch.on_answer()
    missing = share.of([question for question in asked if question.key not in found])
    own = share.file(target.samples)
    with Journal(own) if share.writes else nullcontext() as journal:
        for question, sample in _answers(model, missing, target.settings, max_batch, watch.on_tokens):
            if journal:
                journal.append({**records[question.key], **sample})
            watch.on_answer()
    _end(share, own, target.samples, [question.key for question in asked])


def _begin(target: Target, records: Mapping[Key, Record]) -> set[Key]:
    """The questions that need not be asked again."""
    _bring_together(target.samples)
    found = _written(target.samples, records, target.model)
    if target.provenance is not None:
        write_json(target.output / RUN_FILE, target.provenance)
    return found


def _answers(
    model: Generator,
    missing: Sequence[Question],
    settings: Settings,
    max_batch: int | None,
    on_tokens: Callable[[int], None],
) -> Iterator[tuple[Question, Record]]:
    """Questions with their samples, as answers end; first those that leave no room for one."""
    room = model.context_length
    yield from ((question, _too_long(question)) for question in missing if len(question.token_ids) >= room)
    fitting = [question for question in missing if len(question.token_ids) < room]
    answers = model.stream(
        [Chat(each.messages, each.mode) if model.takes_chats else each.token_ids for each in fitting],
        settings.generation,
        streams=[question.stream for question in fitting],
        limits=[settings.limit(question.mode) for question in fitting],
        max_batch=max_batch,
        on_tokens=on_tokens,
    )
    for index, generation in answers:
        yield fitting[index], _sample(generation)


def _end(share: Share, own: Path, samples: Path, asked: Sequence[Key]) -> None:
    """All that the ranks have answered, in one file and in order."""
    if own != samples:
        _hand_over(own if share.writes else None, samples, share.ranks)
    if share.ranks.is_first:
        _put_in_order(samples, asked)
    share.ranks.meet()
    if own != samples:
        own.unlink(missing_ok=True)


def _hand_over(own: Path | None, path: Path, ranks: Ranks) -> None:
    """Append what each rank has answered to the samples file, which only the first may be able to reach."""
    answered = [record for _, record in read_records(own)] if own else []
    everything = ranks.fold(answered, operator.add)
    if ranks.is_first:
        with Journal(path) as journal:
            for record in everything:
                journal.append(record)


def _put_in_order(path: Path, asked: Sequence[Key]) -> None:
    """What is not asked first, as it stands; then the questions' order."""
    places = {_key(record): start for start, record in places_of_records(path)}
    wanted = set(asked)
    rearrange(path, [*(start for key, start in places.items() if key not in wanted), *(places[key] for key in asked)])


def _bring_together(path: Path) -> None:
    """Move what the ranks of a job that was stopped have written into the samples file."""
    with Journal(path) as journal:
        files = sorted(path.parent.glob(_RANK_FILES))
        there = {hashlib.sha256(line(record)).digest() for _, record in read_records(path)} if files else set()
        for file in files:
            with Journal(file):  # drops a line that was cut short
                for _, record in read_records(file):
                    if hashlib.sha256(line(record)).digest() not in there:
                        journal.append(record)
            file.unlink()


def _written(path: Path, wanted: Mapping[Key, Record], model_id: str) -> set[Key]:
    """The questions that an earlier run has answered. It may also have answered, with the same model, what is not asked."""
    found: set[Key] = set()
    for number, record in read_records(path):
        key = _key(record)
        identity = wanted.get(key, {"model": model_id})
        different = [name for name, value in identity.items() if record.get(name) != value]
        if different:
            raise OutputError(
                f"{path}: line {number} is from another run, with another {' and '.join(different)}; "
                "write to another directory, or repeat the run with its settings"
            )
        if key in wanted:
            found.add(key)
    return found


def _key(record: Mapping[str, Any]) -> Any:
    return tuple(record.get(name) for name in ("task", "mode", "task_id", "sample_id"))


def _sample(generation: Generation) -> Record:
    """completion is the raw text; answer is what follows the think-end token, by its id."""
    tail = periodic_tail(generation.token_ids)
    tokens = len(generation.token_ids)
    return {
        "completion": generation.text,
        "answer": generation.answer,
        "closed": generation.thought_closed,
        "finish_reason": generation.finish_reason,
        "prompt_tokens": generation.prompt_tokens,
        "tokens": tokens,
        "thought_tokens": None if generation.thought is None else generation.thought_tokens,
        "answer_tokens": _answer_tokens(generation),
        "tail_period": tail.period,
        "tail_copies": round(tail.copies, 3),
        "repetitive": tail.repetitive,
    }


def _answer_tokens(generation: Generation) -> int:
    """Tokens that are neither thought nor its markers."""
    tokens = len(generation.token_ids)
    if generation.thought is None:
        return tokens
    return max(0, tokens - generation.thought_tokens - 2) if generation.thought_closed else 0


def _too_long(question: Question) -> Record:
    from ms_pangu_quant.inference.model import Generation

    return _sample(Generation("", None, "", (), len(question.token_ids), "prompt_too_long"))
