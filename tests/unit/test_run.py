"""evaluation/run.py: every question is answered once, with a draw of its own, however often the run is stopped.

The model is a fake that draws its answers with the real scheduler's interface: from the prompt and the stream alone.
"""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from ms_pangu_quant.errors import OutputError, RankLostError, RequestError
from ms_pangu_quant.evaluation import run
from ms_pangu_quant.evaluation.prompts import PROMPTS
from ms_pangu_quant.evaluation.samples import read_records
from ms_pangu_quant.evaluation.tasks import TASKS, load_problems
from ms_pangu_quant.inference.model import Generation
from ms_pangu_quant.inference.sampling import GenerationSettings
from tests.unit.linked import at_once, linked

GENERATION = GenerationSettings(max_new_tokens=50, temperature=1.0, seed=3)
SETTINGS = run.Settings(GENERATION, samples=2)
STOPPING = run.Settings(replace(GENERATION, stop=("\nassert",)), samples=2)


class Killed(BaseException):
    pass


class FakeModel:
    """Ends its answers in an order that depends on the batch; `left` answers, then it is killed."""

    context_length, takes_chats = 4000, False

    def __init__(self, left=10**9):
        self.left, self.asked, self.limits = left, 0, []

    def stream(self, prompts, settings, *, streams, limits, max_batch, on_tokens):
        order = np.random.default_rng(max_batch or 0).permutation(len(prompts))
        self.limits += limits
        for index in order:
            if self.left == 0:
                raise Killed
            self.left -= 1
            self.asked += 1
            draw = np.random.default_rng([settings.seed, streams[index], *prompts[index][:3]]).integers(1 << 40)
            on_tokens(4)
            text = f"[unused16]{draw}[unused17]answer"
            yield int(index), Generation(text, str(draw), "answer", (1, 2, 3, 4), len(prompts[index]), "eos", True, 1)


def asked(settings=SETTINGS, tasks=("humaneval", "mini"), limit=3, modes=("slow_think", "no_think"), suffix=""):
    return [
        *run.questions(
            {task: load_problems(TASKS[task]) for task in tasks},
            modes,
            dict.fromkeys(tasks, PROMPTS["zero_shot_instruct"]),
            lambda messages, mode: [*f"{mode}{messages[-1]['content']}{suffix}".encode()],
            settings,
            limit,
        )
    ]


def answer(model, questions, folder, name="model", settings=SETTINGS, *, provenance=None, **more):
    run.answer(model, questions, run.Target(folder, name, settings, provenance), **more)


def content(folder) -> bytes:
    return (folder / run.SAMPLES_FILE).read_bytes()


def test_there_is_one_question_for_each_task_mode_problem_and_sample():
    keys = [question.key for question in asked()]
    assert len(keys) == len(set(keys)) == 2 * 2 * 3 * 2
    assert len({question.stream for question in asked()}) == len(keys)
    assert keys[:2] == [("humaneval", "slow_think", "HumanEval/0", 0), ("humaneval", "slow_think", "HumanEval/0", 1)]


@pytest.mark.parametrize("stops", [[0], [1], [23], [5, 1, 7], [24]])
def test_a_run_stopped_anywhere_loses_and_repeats_nothing(stops, tmp_path):
    answer(FakeModel(), asked(), tmp_path / "whole")
    models = [FakeModel(left) for left in stops]
    for number, model in enumerate(models):
        try:
            answer(model, asked(), tmp_path / "stopped", max_batch=number + 1)
        except Killed:
            with open(tmp_path / "stopped" / run.SAMPLES_FILE, "ab") as file:
                file.write(b'{"task": "humaneval", "mo')  # a line that was being written
    last = FakeModel()
    answer(last, asked(), tmp_path / "stopped")
    assert sum(model.asked for model in [*models, last]) == len(asked())
    assert content(tmp_path / "stopped") == content(tmp_path / "whole")


def test_more_problems_or_samples_are_added_to_an_earlier_run_and_other_tasks_stay(tmp_path):
    model = FakeModel()
    answer(model, asked(tasks=("humaneval",), limit=2), tmp_path)
    answer(model, asked(tasks=("mini",)), tmp_path)
    more = replace(SETTINGS, samples=3)
    answer(model, asked(more, tasks=("humaneval",)), tmp_path, settings=more)
    keys = [
        (record["task"], record["task_id"], record["sample_id"]) for _, record in read_records(tmp_path / "samples.jsonl")
    ]
    assert len(keys) == 2 * 3 * 2 + 2 * 3 * 3 == model.asked


@pytest.mark.parametrize("change", ["model", "settings", "stop", "head", "prompt_sha256"])
def test_a_run_of_another_model_prompt_or_setting_is_not_continued(change, tmp_path):
    answer(FakeModel(), asked(), tmp_path, provenance={"run": "first"})
    before = content(tmp_path)
    settings = {
        "settings": replace(SETTINGS, generation=replace(GENERATION, temperature=0.5)),
        "stop": STOPPING,
        "head": replace(SETTINGS, head="int8"),
    }.get(change, SETTINGS)
    model = "another" if change == "model" else "model"
    questions = asked(suffix="!" if change == "prompt_sha256" else "")
    with pytest.raises(OutputError, match=f"another {'settings' if change in ('stop', 'head') else change}"):
        answer(FakeModel(), questions, tmp_path, model, settings, provenance={"run": "second"})
    assert content(tmp_path) == before
    assert json.loads((tmp_path / "run.json").read_text()) == {"run": "first"}


def test_a_run_with_stop_texts_goes_on_with_the_same(tmp_path):
    model = FakeModel()
    for limit in (1, 2):
        answer(model, asked(STOPPING, limit=limit), tmp_path, settings=STOPPING)
    assert model.asked == len(asked(STOPPING, limit=2))


def test_each_mode_has_its_own_limit_and_a_run_with_another_is_not_continued(tmp_path):
    """A limit of a mode is to its answers what a number for all is: the same samples, which either goes on with."""
    limited, model = replace(SETTINGS, limits={"slow_think": 9}), FakeModel()
    answer(model, asked(limited), tmp_path / "one", settings=limited)
    assert model.limits == [{"slow_think": 9, "no_think": 50}[question.mode] for question in asked(limited)]
    for mode, limit in (("slow_think", 9), ("no_think", 50)):
        plain = replace(SETTINGS, generation=replace(GENERATION, max_new_tokens=limit))
        answer(FakeModel(left=0), asked(plain, modes=(mode,)), tmp_path / "one", settings=plain)
    with pytest.raises(OutputError, match="another settings"):
        answer(FakeModel(), asked(), tmp_path / "one")


def test_a_prompt_longer_than_the_context_is_recorded_and_not_asked(tmp_path):
    model = FakeModel()
    questions = asked()
    room = int(np.median([len(question.token_ids) for question in questions]))
    model.context_length = room
    long = [question for question in questions if len(question.token_ids) >= room]
    assert 0 < len(long) < len(questions)
    answered = []
    answer(model, questions, tmp_path, watch=run.Watch(on_answer=lambda: answered.append(1)))
    records = [record for _, record in read_records(tmp_path / "samples.jsonl")]
    assert sum(record["finish_reason"] == "prompt_too_long" for record in records) == len(long)
    assert len(answered) == len(records) == len(questions)
    assert model.asked == len(questions) - len(long)


def test_a_sample_tells_thought_from_answer(tmp_path):
    answer(FakeModel(), asked(limit=1), tmp_path)
    record = json.loads(content(tmp_path).split(b"\n")[0])
    assert (record["tokens"], record["thought_tokens"], record["answer_tokens"]) == (4, 1, 1)
    assert (record["answer"], record["closed"], record["prompt"]) == ("answer", True, "zero_shot_instruct/v1")


def test_several_greedy_answers_are_refused():
    with pytest.raises(RequestError, match="would all be the same"):
        run.Settings(samples=2)


# --- several ranks --------------------------------------------------------------------------------------------------


def ranks_answer(job, folder, tensor_parallel=1, left=10**9):
    """Each rank with a model of its own; one that is killed breaks its links, as a process does. Returns the models."""
    models = [FakeModel(left) for _ in job]

    def work(rank):
        try:
            answer(models[rank.rank], asked(), folder, share=run.Share(rank, tensor_parallel))
        finally:
            for link in rank.links:
                link.close()

    return models, at_once(job, work)


@pytest.mark.parametrize(("size", "tensor_parallel"), [(2, 1), (5, 1), (2, 2), (4, 2)])
def test_the_samples_do_not_depend_on_the_number_of_ranks(size, tensor_parallel, tmp_path):
    answer(FakeModel(), asked(), tmp_path / "one")
    models, results = ranks_answer(linked(size), tmp_path / "job", tensor_parallel)
    assert results == [None] * size
    assert content(tmp_path / "job") == content(tmp_path / "one")
    assert [path.name for path in (tmp_path / "job").iterdir()] == [run.SAMPLES_FILE]
    shares = [model.asked for model in models[::tensor_parallel]]
    assert sum(shares) == len(asked())
    assert max(shares) - min(shares) <= 1


@pytest.mark.parametrize("sizes", [(3, 1), (2, 3), (1, 2), (3, 2, 1)])
def test_a_stopped_job_goes_on_with_another_number_of_ranks(sizes, tmp_path):
    answer(FakeModel(), asked(), tmp_path / "one")
    count = 0
    for size in sizes[:-1]:
        models, results = ranks_answer(linked(size), tmp_path / "job", left=3)
        assert all(isinstance(result, (Killed, RankLostError)) for result in results)
        count += sum(model.asked for model in models)
    models, results = ranks_answer(linked(sizes[-1]), tmp_path / "job")
    assert results == [None] * sizes[-1]
    assert count + sum(model.asked for model in models) == len(asked())
    assert content(tmp_path / "job") == content(tmp_path / "one")
    assert [path.name for path in (tmp_path / "job").iterdir()] == [run.SAMPLES_FILE]


def test_a_line_that_a_rank_could_not_finish_is_asked_again(tmp_path):
    answer(FakeModel(), asked(), tmp_path / "one")
    ranks_answer(linked(2), tmp_path / "job", left=3)
    torn = tmp_path / "job" / "samples.rank1.jsonl"
    torn.write_bytes(torn.read_bytes()[:-20])
    ranks_answer(linked(2), tmp_path / "job")
    assert content(tmp_path / "job") == content(tmp_path / "one")
