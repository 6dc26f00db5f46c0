"""An evaluation from end to end: a checkpoint's answers to benchmarks, and what passes of them.

answer() loads the checkpoint with a cache that fits the questions and the memory, and writes samples; score() judges a file
of samples, whoever wrote it, and writes results and summary; evaluate() is one after the other.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType

import psutil

from ms_pangu_quant.checkpoint.config import ModelConfig
from ms_pangu_quant.checkpoint.tokenizer import THINKING_MODES, Tokenizer
from ms_pangu_quant.checkpoint.writer import absent_folders, lock, remove_empty
from ms_pangu_quant.errors import CheckpointError, EndpointError, RequestError
from ms_pangu_quant.evaluation import run
from ms_pangu_quant.evaluation.packages import find_packages
from ms_pangu_quant.evaluation.prompts import PROMPTS
from ms_pangu_quant.evaluation.provenance import environment, of_checkpoint, of_endpoint
from ms_pangu_quant.evaluation.samples import Record, write_json
from ms_pangu_quant.evaluation.sandbox import BUBBLEWRAP, VERSION, Sandbox, find_isolation
from ms_pangu_quant.evaluation.score import load_samples
from ms_pangu_quant.evaluation.score import score as judge
from ms_pangu_quant.evaluation.summary import summarize
from ms_pangu_quant.evaluation.tasks import check_tasks, load_tasks
from ms_pangu_quant.evaluation.tasks.task import Problems
from ms_pangu_quant.evaluation.verdict import Limits
from ms_pangu_quant.formats import kv_cache
from ms_pangu_quant.formats.reader import open_checkpoint
from ms_pangu_quant.inference.endpoint import Endpoint, ServedModel, Server, stated_context
from ms_pangu_quant.inference.sampling import GenerationSettings, own_settings
from ms_pangu_quant.job import ranks
from ms_pangu_quant.network import runtime
from ms_pangu_quant.suggestion import did_you_mean

RESULTS_FILE, SUMMARY_FILE = "results.jsonl", "summary.json"
PROMPT = "zero_shot_instruct"
_held: set[Path] = set()  # folders that this process has locked


@dataclass(frozen=True)
class EvaluationRequest:
    """What to ask which checkpoint, and how. Raises RequestError for what does not exist or does not fit together.

    checkpoint  directory, float or quantized.
    output      directory of the results; a run begun there goes on.
    tasks       benchmarks by name.
    modes       thinking modes; None: all that the model has.
    prompts     benchmark -> name of its prompt, zero_shot_instruct where none is named.
    data        benchmark -> file of your own problems in that benchmark's form.
    limit       ask the first so many problems of each benchmark.
    generation  how answers are drawn, greedily by default, and where they end.
    samples     answers to each problem; more than 1 must be drawn.
    batch_size  answers under way at a time; does not change them, but for drawn ones of a float checkpoint.
    endpoint    a server to ask instead of loading the checkpoint, whose tokenizer is enough then, with config.json where
                the server does not say how long its context is.
    sampled     draw at the checkpoint's own temperature, top_p and top_k, from its generation_config.json (1, 1 and 0 where
                it names none), in place of generation's.
    max_new_tokens  thinking mode -> tokens an answer may have, generation's where none is named.
    device, head and tensor_parallel are those of load(), for a checkpoint that is loaded.
    """

    checkpoint: str | Path
    output: str | Path
    tasks: Sequence[str] = ("humaneval", "mbpp")
    modes: Sequence[str] | None = None
    prompts: Mapping[str, str] = field(default_factory=dict)
    data: Mapping[str, str | Path] = field(default_factory=dict)
    limit: int | None = None
    generation: GenerationSettings = run.GENERATION
    samples: int = 1
    batch_size: int = 16
    device: str = "cpu"
    head: str = "stored"
    tensor_parallel: int = 1
    endpoint: Endpoint | None = None
    sampled: bool = False
    max_new_tokens: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_tasks(self.tasks, self.data)
        if self.modes is not None:
            _check_modes(self.modes)
        _check_prompts(self.prompts, self.tasks)
        _check_limits(self.max_new_tokens, THINKING_MODES if self.modes is None else self.modes)
        for name in ("limit", "samples", "batch_size"):
            count = getattr(self, name)
            if count is not None and count < 1:
                raise RequestError(f"{name}: got {count}, wanted at least 1")
        _settings(self)  # refuses what draws nothing, or twice
        if self.endpoint is not None and (self.device, self.head, self.tensor_parallel) != ("cpu", "stored", 1):
            raise RequestError("endpoint: device, head and tensor_parallel are the server's own business; leave them out")


@dataclass(frozen=True)
class Judging:
    """How answers are judged.

    sandbox      "bubblewrap", or "rlimits" where it is missing: answers can then reach files and network.
    cpu_seconds  CPU time a program may take; four times for the + sets.
    workers      programs judged at a time; all cores by default.
    packages     what answers may import beside the standard library: names of installed packages, or such as numpy==1.26.4.
    """

    sandbox: str = BUBBLEWRAP
    cpu_seconds: int = 15
    workers: int | None = None
    packages: Sequence[str] = ()


SANDBOXED = Judging()


def evaluate(
    request: EvaluationRequest,
    judging: Judging = SANDBOXED,
    *,
    on_begin: Callable[[int], None] = lambda count: None,
    on_tokens: Callable[[int], None] = lambda count: None,
    on_answer: Callable[[], None] = lambda: None,
    on_verdict: Callable[[str], None] = lambda verdict: None,
) -> Record | None:
    """HumanEval, MBPP and the like in the thinking modes: generate answers, run them in a sandbox, count what passes.

    Returns  what is written to `output`/summary.json, with a score for each task and mode under "entries". None on ranks of
             an msrun job but the first, which scores for all.
    Callbacks and errors are those of answer() and score().
    """
    with alone_in(Path(request.output)):
        answer(request, on_begin=on_begin, on_tokens=on_tokens, on_answer=on_answer)
        if not ranks.current().is_first:
            return None
        samples = Path(request.output) / run.SAMPLES_FILE
        return score(samples, request.output, request.tasks, request.data, judging, on_verdict=on_verdict)


@contextmanager
def alone_in(output: Path) -> Iterator[None]:
    """Refuses, with OutputError, where another process evaluates into this folder; this one may enter again.

    Of a job's ranks the first stands for all, once they have met. Folders that it made and that stay empty are removed.
    """
    folder, job = Path(os.path.realpath(output)), ranks.current()
    if folder in _held or (ranks.in_job() and (job is ranks.ALONE or not job.is_first)):
        yield
        return
    made = absent_folders(folder)
    descriptor = lock(output)
    _held.add(folder)
    try:
        yield
    finally:
        _held.remove(folder)
        remove_empty(made)
        os.close(descriptor)


def answer(
    request: EvaluationRequest,
    *,
    on_begin: Callable[[int], None] = lambda count: None,
    on_tokens: Callable[[int], None] = lambda count: None,
    on_answer: Callable[[], None] = lambda: None,
) -> None:
    """Write the checkpoint's answers into `output`/samples.jsonl, and into run.json what made them.

    on_begin   called once the model is loaded, with how many answers are wanted.
    on_tokens  called after each pass with how many tokens it gave.
    on_answer  called for each answer of this rank, also for those that an earlier run has written.
    Raises     PanguQuantError, as the command does, before anything is generated where that is possible.
    """
    tasks, output = load_tasks(request.tasks, request.data), Path(request.output)
    watch = run.Watch(on_begin, on_tokens, on_answer)
    with alone_in(output):
        if request.endpoint is None:
            _ask_checkpoint(request, tasks, watch)
        else:
            _ask_server(request, request.endpoint, tasks, watch)


def _ask_checkpoint(request: EvaluationRequest, tasks: Mapping[str, Problems], watch: run.Watch) -> None:
    from ms_pangu_quant.inference.model import check_head, load

    directory, output = Path(request.checkpoint), Path(request.output)
    reader = open_checkpoint(directory)
    check_head(request.head, reader, request.device)
    asked = _asked(request, tasks)
    runtime.start(request.device, "graph", tensor_parallel=request.tensor_parallel)
    job = ranks.current()
    with alone_in(output):  # now it is known who is first
        provenance = of_checkpoint(directory, request.device, request.head)
        job.agree("checkpoint", provenance["checkpoint_sha256"])
        cache = min(job.gather(_cache_tokens(request, reader.config, asked)))  # ranks of one model batch alike
        model = load(
            directory,
            request.device,
            kv_cache_tokens=cache,
            head=request.head,
            tensor_parallel=request.tensor_parallel,
        )
        target = run.Target(output, provenance["checkpoint_sha256"], _settings(request), provenance)
        share = run.Share(job, request.tensor_parallel)
        run.answer(model, asked, target, share=share, max_batch=request.batch_size, watch=watch)


def _ask_server(request: EvaluationRequest, endpoint: Endpoint, tasks: Mapping[str, Problems], watch: run.Watch) -> None:
    if ranks.in_job():
        raise RequestError("endpoint: one process asks a server; start it without msrun, with a larger batch_size")
    directory = Path(request.checkpoint)
    asked = _asked(request, tasks)
    model = ServedModel(Server(endpoint), Tokenizer(directory), stated_context(directory))
    provenance = of_endpoint(model.description, model.asked_with, directory)
    target = run.Target(Path(request.output), model.id, _settings(request), provenance)
    try:
        run.answer(model, asked, target, max_batch=request.batch_size, watch=watch)
    except EndpointError as error:
        raise EndpointError(f"{error}; what was answered is kept, and the same command goes on from there") from None


def score(
    samples: str | Path,
    output: str | Path,
    tasks: Sequence[str],
    data: Mapping[str, str | Path] = MappingProxyType({}),
    judging: Judging = SANDBOXED,
    *,
    on_begin: Callable[[int], None] = lambda count: None,
    on_verdict: Callable[[str], None] = lambda verdict: None,
) -> Record:
    """Judge a file of samples, lines of task_id, sample_id and completion, and write results.jsonl and summary.json.

    data      benchmark -> file of your own problems, as in EvaluationRequest.
    on_begin  called before the first verdict, with how many there will be; on_verdict with each.
    Returns   what summary.json holds.
    Raises    DataError for a file that cannot be scored, RequestError where the sandbox is not there.
    """
    problems, folder = load_tasks(tasks, data), Path(output)
    answers = load_samples(Path(samples), problems)
    limits = Limits(cpu_seconds=judging.cpu_seconds, wall_seconds=3.0 * judging.cpu_seconds)
    isolation, packages = find_isolation(judging.sandbox), find_packages(judging.packages)
    judges = Sandbox(isolation, limits, min(judging.workers or os.cpu_count() or 1, len(answers)), packages)
    with alone_in(folder):
        on_begin(len(answers))
        results = judge(answers, folder / RESULTS_FILE, judges, on_result=on_verdict)
        summary = {
            "entries": summarize(results, [sample.record for sample in answers], problems),
            "sandbox": {
                **vars(isolation),
                "packages": packages.versions,
                "rules_version": VERSION,
                "limits": vars(limits),
            },
            **environment(),
        }
        write_json(folder / SUMMARY_FILE, summary)
    return summary


def _settings(request: EvaluationRequest) -> run.Settings:
    """Raises RequestError, CheckpointError for what draws nothing."""
    given = request.generation
    if not request.sampled:
        return run.Settings(given, request.samples, request.head, request.max_new_tokens)
    if (given.temperature, given.top_p, given.top_k) != (0, 1, 0):
        raise RequestError("sampled: draws at the checkpoint's own temperature, top_p and top_k; leave these out, or it")
    own = own_settings(Path(request.checkpoint), given.max_new_tokens, given.seed)
    if own.temperature == 0:
        raise CheckpointError(
            f"{request.checkpoint}: generation_config.json has temperature 0, which draws nothing; give one without sampled"
        )
    return run.Settings(replace(own, stop=given.stop), request.samples, request.head, request.max_new_tokens)


def _check_modes(modes: Sequence[str]) -> None:
    unknown = [mode for mode in modes if mode not in THINKING_MODES]
    if not modes or unknown:
        close = did_you_mean(unknown[0], THINKING_MODES) if unknown else ""
        raise RequestError(f"modes: got {list(modes)}{close}, wanted some of {', '.join(THINKING_MODES)}")


def _check_limits(limits: Mapping[str, int], modes: Sequence[str]) -> None:
    for mode, limit in limits.items():
        if mode not in modes:
            close = did_you_mean(mode, modes)
            raise RequestError(f"max_new_tokens: got {limit} of {mode!r}{close}, wanted some of {', '.join(modes)}")
        if limit < 1:
            raise RequestError(f"max_new_tokens: got {limit} of {mode}, wanted at least 1")


def _check_prompts(prompts: Mapping[str, str], tasks: Sequence[str]) -> None:
    for task, name in prompts.items():
        if name not in PROMPTS or task not in tasks:
            close = did_you_mean(name, PROMPTS) if name not in PROMPTS else did_you_mean(task, tasks)
            raise RequestError(
                f"prompts: got {name!r} of {task!r}{close}, wanted one of {', '.join(PROMPTS)} of a benchmark"
            )


def _asked(request: EvaluationRequest, tasks: Mapping[str, Problems]) -> list[run.Question]:
    tokenizer = Tokenizer(Path(request.checkpoint))
    prompts = {task: PROMPTS[request.prompts.get(task, PROMPT)] for task in tasks}

    def encode(chat: list[dict[str, str]], mode: str) -> list[int]:
        return tokenizer.encode_chat(chat, mode=mode)

    if request.modes is None:
        tokenizer.tell_only_mode()
    modes = tokenizer.modes if request.modes is None else request.modes
    _check_limits(request.max_new_tokens, modes)
    return [*run.questions(tasks, modes, prompts, encode, _settings(request), request.limit)]


def _cache_tokens(request: EvaluationRequest, config: ModelConfig, asked: Sequence[run.Question]) -> int:
    """Room for a batch of the longest answers, in at most a quarter of the memory that is free; at least for one."""
    from ms_pangu_quant.inference.model import BLOCK_SIZE

    settings = _settings(request)
    longest = max(len(each.token_ids) + settings.limit(each.mode) for each in asked)
    answer_tokens = min(longest, config.max_position_embeddings) + 2 * BLOCK_SIZE
    affordable = int(psutil.virtual_memory().available) // 4 // kv_cache.bytes_per_token(config, 4)
    return max(answer_tokens, min(min(request.batch_size, len(asked)) * answer_tokens, affordable))
