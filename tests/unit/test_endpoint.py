"""inference/endpoint.py: a server is asked as a loaded model is; whatever it does is told in one line and loses nothing."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
import time
from itertools import count, pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ms_pangu_quant.checkpoint.files import CheckpointNote
from ms_pangu_quant.checkpoint.tokenizer import Tokenizer
from ms_pangu_quant.cli import main
from ms_pangu_quant.cli.generate import generate_command
from ms_pangu_quant.errors import CheckpointError, EndpointError, RequestError
from ms_pangu_quant.evaluation import run
from ms_pangu_quant.evaluation.prompts import PROMPTS
from ms_pangu_quant.evaluation.samples import read_records
from ms_pangu_quant.evaluation.tasks import TASKS, load_problems
from ms_pangu_quant.inference import compare as comparing
from ms_pangu_quant.inference import endpoint
from ms_pangu_quant.inference.compare import log_likelihoods, lumped_kl
from ms_pangu_quant.inference.model import Generation
from ms_pangu_quant.inference.sampling import GenerationSettings
from ms_pangu_quant.report.results import load_runs
from tests.unit.openai_server import Answer, Server, running

SETTINGS = GenerationSettings(max_new_tokens=100)
THOUGHT = "[unused16]first this\nthen that[unused17]```python\ndef f(x):\n    return x + {}\n```"


@pytest.fixture(autouse=True)
def patience(monkeypatch):
    """Waits in hundredths of their length."""
    monkeypatch.setattr(endpoint, "_WAITS", tuple(wait / 100 for wait in endpoint._WAITS))
    monkeypatch.delenv(endpoint.API_KEY, raising=False)


@pytest.fixture(scope="module")
def tokenizer():
    from tests.unit.conftest import ROOT

    return Tokenizer(ROOT / "ms_pangu_quant/assets/openpangu-mini")


@pytest.fixture
def serving(tokenizer):
    """(fields of Server) -> a running server that thinks, and adds a number of its prompt's."""
    contexts = []

    def start(**fields) -> Server:
        fields.setdefault("reply", lambda prompt: THOUGHT.format(len(prompt)))
        context = running(Server(tokens=lambda text: [*tokenizer.encode_part(text), tokenizer.eos_id], **fields))
        contexts.append(context)
        return context.__enter__()

    yield start
    for context in contexts:
        context.__exit__(None, None, None)


def served(server: Server, tokenizer, *, context_length=None, **fields) -> endpoint.ServedModel:
    return endpoint.ServedModel(endpoint.Server(endpoint.Endpoint(server.url, **fields)), tokenizer, context_length)


def answers(model, prompts, settings=SETTINGS, **more):
    return [answer for _, answer in sorted(model.stream(prompts, settings, **more), key=lambda pair: pair[0])]


def chat(text, mode="no_think"):
    return run.Chat([{"role": "user", "content": text}], mode)


# --- the same as from a loaded model --------------------------------------------------------------------------------


def test_token_ids_are_asked_with_and_answered_as_a_model_answers(serving, tokenizer):
    server, counted = serving(), []
    model = served(server, tokenizer)
    prompts = [[1, 5, 9], [1, 7]]
    found = answers(model, prompts, max_batch=1, on_tokens=counted.append)
    assert [body["prompt"] for _, body in server.questions] == prompts
    assert found == [
        Generation.of(tokenizer, tokenizer.encode_part(THOUGHT.format(len(prompt))), len(prompt), "eos")
        for prompt in prompts
    ]
    assert found[0].thought == "first this\nthen that"
    assert sum(counted) == sum(len(each.token_ids) for each in found)
    assert not model.takes_chats
    assert model.context_length == 512


def test_what_generation_config_says_on_a_server_is_not_taken(serving, tokenizer):
    server = serving()
    answers(served(server, tokenizer), [[1, 5]], GenerationSettings(77, temperature=0.5, top_p=0.9, top_k=4, seed=2))
    ((_, body),) = server.questions
    wanted = {"max_tokens": 77, "temperature": 0.5, "top_p": 0.9, "top_k": 4, "repetition_penalty": 1.0, "min_p": 0.0}
    wanted |= {"stop_token_ids": sorted(tokenizer.end_ids), "skip_special_tokens": False, "stream": False}
    assert {name: body[name] for name in wanted} == wanted


def test_a_draw_has_a_seed_of_its_own_whatever_else_is_asked(serving, tokenizer):
    server = serving()
    model, drawing = served(server, tokenizer), GenerationSettings(50, temperature=1.0, seed=3)
    answers(model, [[1, 5], [1, 6]], drawing, streams=[10, 11])
    answers(model, [[1, 6]], drawing, streams=[11])
    seeds = {tuple(body["prompt"]): body["seed"] for _, body in server.questions[:2]}
    assert len(set(seeds.values())) == 2
    assert server.questions[2][1]["seed"] == seeds[1, 6]


def test_text_without_ids_is_split_and_counted_the_same(serving, tokenizer):
    server = serving(only_openai=True)
    assert answers(served(server, tokenizer), [[1, 5, 9]]) == answers(served(serving(), tokenizer), [[1, 5, 9]])
    assert all(
        set(body) <= {"model", "prompt", "max_tokens", "temperature", "top_p", "stream"} for _, body in server.questions
    )


@pytest.mark.parametrize("reasoning", [False, True])
def test_a_server_that_takes_no_ids_is_asked_in_chats(serving, tokenizer, reasoning):
    server = serving(takes_ids=False, reasoning=reasoning)
    model = served(server, tokenizer)
    assert model.takes_chats
    (found,) = answers(model, [chat("hello")])
    ((path, body),) = server.questions
    assert (path, body["messages"]) == ("/v1/chat/completions", [{"role": "user", "content": "hello /no_think"}])
    assert (found.thought, found.thought_closed) == ("first this\nthen that", True)
    assert found.answer == THOUGHT.format(len("hello /no_think")).partition("[unused17]")[2]
    assert found.prompt_tokens == len(tokenizer.encode_chat([{"role": "user", "content": "hello"}], mode="no_think"))


@pytest.mark.parametrize(
    ("text", "thought", "answer", "closed"),
    [
        ("plain", None, "plain", True),
        ("[unused16]never ends", "never ends", "", False),
        ("no begin[unused17]end", "no begin", "end", True),
        ("[unused16][unused17]end", "", "end", True),
    ],
)
def test_a_thought_in_a_text_is_told_from_the_answer_as_in_ids(serving, tokenizer, text, thought, answer, closed):
    for only_openai in (True, False):
        server = serving(only_openai=only_openai, reply=lambda prompt: text)
        (found,) = answers(served(server, tokenizer), [[1, 5]])
        assert (found.thought, found.answer, found.thought_closed) == (thought, answer, closed)


def test_an_answer_has_no_more_tokens_than_the_context_leaves(serving, tokenizer):
    server = serving(reply=lambda prompt: "x " * 600)
    (found,) = answers(served(server, tokenizer), [[1] * 500])
    assert server.questions[0][1]["max_tokens"] == 12
    assert (found.finish_reason, len(found.token_ids)) == ("length", 12)


def test_so_many_are_asked_at_a_time(serving, tokenizer):
    gate = threading.Barrier(3)

    def wait(path, body, number):
        gate.wait(5)  # passes only three together

    server = serving(misbehave=wait)
    found = answers(served(server, tokenizer), [[1, index + 2] for index in range(9)], max_batch=3)
    assert len(found) == 9
    assert server.most == 3


# --- a server that fails for a while --------------------------------------------------------------------------------

SHORT = [
    Answer({"error": {"message": "busy"}}, 429, {"Retry-After": "0.3"}),
    Answer({"error": "broken"}, 500),
    Answer("starting", 503),
    Answer(reset=True),
    Answer({"choices": []}, cut=True),
]


@pytest.mark.parametrize("wrong", SHORT, ids=["429", "500", "503", "reset", "cut"])
def test_what_passes_is_asked_again(serving, tokenizer, wrong):
    server = serving(misbehave=lambda path, body, number: wrong if number in (0, 1) else None)
    started = time.monotonic()
    (found,) = answers(served(server, tokenizer), [[1, 5]])
    assert found.finish_reason == "eos"
    assert len(server.questions) == 3
    assert (time.monotonic() - started >= 0.6) == ("Retry-After" in wrong.headers)


FAULTS = {
    "no JSON": (Answer("<html>bad gateway</html>"), "no JSON, wanted one JSON object; it begins with '<html>bad gateway"),
    "stream": (Answer('data: {"choices": []}\n\n', headers={"Content-Type": "text/event-stream"}), "got a stream, wanted"),
    "list": (Answer([1]), "got a JSON list, wanted an object"),
    "error": (Answer({"error": {"message": "out of memory"}}), "the server says 'out of memory'"),
    "no choices": (Answer({"choices": []}), "an answer without choices"),
    "null choices": (Answer({"choices": None}), "an answer without choices"),
    "no text": (Answer({"choices": [{"finish_reason": "stop"}]}), "a choice without text"),
    "abort": (Answer({"choices": [{"text": "x", "finish_reason": "abort"}]}), "finish_reason 'abort', wanted"),
    "cut": (
        Answer(
            {"choices": [{"text": "x", "finish_reason": "length"}], "usage": {"completion_tokens": 40, "prompt_tokens": 2}}
        ),
        "the server cut an answer after 40 tokens, with 100 asked for and a context of 512",
    ),
    "400": (Answer({"error": {"message": "too long"}}, 400), "the server refuses with 400 (too long)"),
    "422": (Answer({"detail": "what is this"}, 422), "the server refuses with 422 (what is this)"),
    "401": (Answer({"error": {"message": "who are you"}}, 401), f"environment variable {endpoint.API_KEY}"),
    "404": (Answer({"error": {"message": "gone"}}, 404), "refuses with 404 (gone); wanted the address of an OpenAI"),
    "500": (Answer({"error": {"message": "broken"}}, 500), "refuses with 500 (broken), asked 6 times"),
    "reset": (
        Answer(reset=True),
        "the server is away (",
    ),
    "slow": (Answer({"choices": []}, after=0.5), "no answer within 0.2 s; give it longer (--timeout)"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_stays_wrong_is_told_in_one_line(serving, tokenizer, fault):
    wrong, said = FAULTS[fault]
    server = serving(misbehave=lambda path, body, number: wrong)
    model = served(server, tokenizer, timeout=0.2 if fault == "slow" else 600)
    with pytest.raises(EndpointError) as found:
        answers(model, [[1, 5]])
    assert said in str(found.value)
    assert server.url in str(found.value)
    assert len(server.questions) == (6 if fault in ("500", "reset") else 1)


def test_a_server_that_is_away_is_told(serving, tokenizer):
    server = serving(models=())
    with pytest.raises(RequestError, match=r"serves 0 models \(none\)"):
        served(server, tokenizer)
    with pytest.raises(EndpointError, match=r"/v1/models: the server is away \(.*refused\); start it"):
        endpoint.Server(endpoint.Endpoint("http://127.0.0.1:1/v1"))


def test_an_address_without_its_version_is_told(serving):
    server = serving()
    with pytest.raises(EndpointError, match=r"refuses with 404 .*wanted the address of an OpenAI-compatible API"):
        endpoint.Server(endpoint.Endpoint(server.url.removesuffix("/v1")))


def test_a_model_that_is_not_served_is_told_with_those_that_are(serving, tokenizer):
    server = serving(models=[{"id": name} for name in ("pangu-7b", "pangu-1b")])
    with pytest.raises(
        RequestError, match=r"does not serve 'pangu-7bb' \(did you mean 'pangu-7b'\?\), it serves pangu-7b, p"
    ):
        served(server, tokenizer, model="pangu-7bb")
    with pytest.raises(RequestError, match=r"serves 2 models \(pangu-7b, pangu-1b\); name one"):
        served(server, tokenizer)
    with pytest.raises(RequestError, match="does not say how long its context is"):
        served(server, tokenizer, model="pangu-1b")
    assert served(server, tokenizer, model="pangu-1b", context_length=300).context_length == 300


@pytest.mark.parametrize("url", ["localhost:8000/v1", "ftp://x/v1", "http://", "http://x/v1?key=1", "http://x:y/v1", ""])
def test_what_is_no_address_is_refused(url):
    with pytest.raises(RequestError, match="wanted a URL such as"):
        endpoint.Endpoint(url)


def test_a_key_comes_from_the_environment_and_goes_into_the_header_alone(serving, tokenizer, tmp_path, monkeypatch, mini):
    with pytest.raises(RequestError, match=endpoint.API_KEY):
        endpoint.Endpoint("http://me:secret@localhost/v1")
    monkeypatch.setenv("OPENAI_API_KEY", "another")
    monkeypatch.setenv("OPENAI_ORG_ID", "organization")
    server = serving()
    served(server, tokenizer)
    assert not any("another" in str(headers) or "organization" in str(headers) for headers in server.headers)
    monkeypatch.setenv(endpoint.API_KEY, "secret-key")
    assert main(evaluate(mini, server, tmp_path / "out")) == 0
    assert server.headers[-1]["authorization"] == "Bearer secret-key"
    assert not any(b"secret-key" in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    server.misbehave = lambda path, body, number: Answer({"error": {"message": "Incorrect key: secret-key"}}, 401)
    with pytest.raises(EndpointError, match=r"Incorrect key: \*\*\*"):
        answers(served(server, tokenizer), [[1, 5]])


# --- a run ----------------------------------------------------------------------------------------------------------


def questions(tokenizer, limit=6):
    problems = {"mini": load_problems(TASKS["mini"])}
    prompts = {"mini": PROMPTS["zero_shot_instruct"]}
    encode = lambda messages, mode: tokenizer.encode_chat(messages, mode=mode)  # noqa: E731
    return [*run.questions(problems, ["no_think"], prompts, encode, run.Settings(SETTINGS), limit)]


def test_a_server_that_goes_away_loses_no_answer_and_is_asked_nothing_twice(serving, tokenizer, tmp_path):
    whole, asked = serving(), questions(tokenizer)
    target = lambda model, name: run.Target(tmp_path / name, model.id, run.Settings(SETTINGS))  # noqa: E731
    model = served(whole, tokenizer)
    run.answer(model, asked, target(model, "whole"), max_batch=2)

    away = serving(misbehave=lambda path, body, number: None if number < 3 else Answer(after=0.05, reset=True))
    model = served(away, tokenizer)
    with pytest.raises(EndpointError, match="the server is away"):
        run.answer(model, asked, target(model, "stopped"), max_batch=2)
    assert len([*read_records(tmp_path / "stopped" / run.SAMPLES_FILE)]) == 3
    away.misbehave = lambda path, body, number: None
    run.answer(served(away, tokenizer), asked, target(model, "stopped"), max_batch=2)
    prompts = [tuple(prompt) for prompt in away.answered if len(prompt) > 1]
    assert len(prompts) == len(set(prompts)) == 6
    bytes_of = lambda name: (tmp_path / name / run.SAMPLES_FILE).read_bytes()  # noqa: E731
    assert bytes_of("stopped") == bytes_of("whole")


def test_what_is_under_way_when_an_answer_fails_is_kept_and_no_other_is_begun(serving, tokenizer):
    both = threading.Barrier(2)

    def wrong(path, body, number):
        both.wait(5)
        refused = body["prompt"] == [1, 5]
        time.sleep(0 if refused else 0.3)
        return Answer({"error": {"message": "no"}}, 400) if refused else None

    server = serving(misbehave=wrong)
    stream = served(server, tokenizer).stream([[1, 5], [1, 6], [1, 7]], SETTINGS, max_batch=2)
    assert next(stream)[0] == 1
    with pytest.raises(EndpointError, match=r"400 \(no\)"):
        next(stream)
    assert len(server.questions) == 2


def test_a_server_of_another_model_does_not_go_on_with_a_run(serving, tokenizer):
    ids = [
        served(serving(**fields), tokenizer).id
        for fields in (
            {},
            {"models": [{"id": "mini", "root": "/models/other", "max_model_len": 512}]},
            {"models": [{"id": "mini", "root": "/models/mini", "max_model_len": 300}]},
            {"takes_ids": False},
        )
    ]
    assert len(set(ids)) == 4
    assert served(serving(version="0.33.0"), tokenizer).id == ids[0]


def evaluate(mini, server, output, *more):
    return [
        *("evaluate", str(mini), "--endpoint", server.url, "--model", "mini", "--tasks", "mini", "--modes", "no_think"),
        *("--limit", "6", "--max-new-tokens", "100", "--sandbox", "rlimits", "--output", str(output), *more),
    ]


def test_a_served_model_is_scored_and_says_so(serving, tokenizer, mini, tmp_path, capsys):
    solutions = {
        tuple(question.token_ids): f"```python\n{question.problem.reference}\n```" for question in questions(tokenizer)
    }
    server = serving(reply=lambda prompt: solutions.get(tuple(prompt), "none"))
    assert main([*evaluate(mini, server, tmp_path / "served"), "--max-new-tokens", "400"]) == 0
    summary = json.loads((tmp_path / "served/summary.json").read_text())
    assert summary["entries"][0]["passed"] == summary["entries"][0]["samples"] == 6
    told = json.loads((tmp_path / "served/run.json").read_text())
    assert told["served_by"] == {
        "url": server.url, "model": "mini", "software": "vllm", "version": "0.32.0", "root": "/models/mini",
        "max_model_len": 512, "asked_with": "token ids",
    }  # fmt: skip
    (loaded,) = load_runs([tmp_path / "served"])
    assert loaded.label == "served (served by vllm 0.32.0)"
    assert main(["report", str(tmp_path / "served"), "--output", str(tmp_path)]) == 0
    for page in ("report.html", "report.md"):
        assert "served by vllm 0.32.0" in (tmp_path / page).read_text()


def test_a_server_is_asked_at_the_checkpoints_own_temperature_with_a_limit_for_each_mode(
    serving, tokenizer, mini, tmp_path
):
    """generation_config.json beside the tokenizer says how; several answers to each problem, each with its own seed."""
    server = serving()
    own = tmp_path / "own"
    shutil.copytree(mini, own)
    said = json.loads((own / "generation_config.json").read_text())
    (own / "generation_config.json").write_text(json.dumps({**said, "temperature": 0.6, "top_p": 0.95, "top_k": -1}))
    arguments = evaluate(own, server, tmp_path / "out", "--sampled", "--n", "2", "--modes", "slow_think,no_think")
    assert main([*arguments, "--max-new-tokens", "30,slow_think=70"]) == 0
    asked = [body for path, body in server.questions if path.endswith(endpoint.COMPLETIONS) and body["max_tokens"] > 1]
    assert {(body["temperature"], body["top_p"], body["top_k"]) for body in asked} == {(0.6, 0.95, 0)}
    assert sorted(body["max_tokens"] for body in asked) == [30] * 12 + [70] * 12
    assert len({body["seed"] for body in asked}) == 24
    found = json.loads((tmp_path / "out/summary.json").read_text())["entries"]
    told = [(entry["mode"], entry["decoding"], entry["max_new_tokens"], entry["samples"]) for entry in found]
    assert told == [
        (mode, "temperature 0.6, top-p 0.95", [limit], 12) for mode, limit in (("slow_think", 70), ("no_think", 30))
    ]


def test_a_tokenizer_alone_is_enough_and_mindspore_is_not_started(serving, mini, tmp_path):
    server = serving()
    for name in ("tokenizer.model", "tokenizer_config.json"):
        (tmp_path / "tokenizer").mkdir(exist_ok=True)
        (tmp_path / "tokenizer" / name).write_bytes((mini / name).read_bytes())
    arguments = evaluate(tmp_path / "tokenizer", server, tmp_path / "out", "--samples-only")
    program = f"import sys; from ms_pangu_quant.cli import main; code = main({arguments!r}); "
    program += "sys.exit(code or 'mindspore' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)


def test_a_process_that_is_killed_goes_on_where_it_was(serving, mini, tmp_path):
    numbers = count()
    server = serving(misbehave=lambda path, body, number: Answer(after=60) if next(numbers) == 3 else None)
    command = [
        sys.executable,
        "-m",
        "ms_pangu_quant",
        *evaluate(mini, server, tmp_path, "--batch-size", "1", "--samples-only"),
    ]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 60
        while len(server.questions) < 4 and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        process.kill()
    assert main(evaluate(mini, server, tmp_path, "--samples-only")) == 0
    prompts = [tuple(body["prompt"]) for _, body in server.questions]
    assert len(prompts) == 7  # the one under way is asked again, and no other
    assert prompts[3] in prompts[4:]
    assert len(set(prompts)) == len([*read_records(tmp_path / run.SAMPLES_FILE)]) == 6


def test_the_1b_is_asked_in_its_only_mode_and_that_is_said(serving, mini, tmp_path, capsys):
    shape = {"hidden_size": 1536, "num_hidden_layers": 26, "num_attention_heads": 12, "vocab_size": 153376}
    (tmp_path / "1b").mkdir()
    for path in mini.glob("*.json"):
        told = json.loads(path.read_text())
        (tmp_path / "1b" / path.name).write_text(json.dumps(told | shape if path.name == "config.json" else told))
    (tmp_path / "1b/tokenizer.model").write_bytes((mini / "tokenizer.model").read_bytes())
    arguments = evaluate(tmp_path / "1b", serving(), tmp_path / "out", "--samples-only")
    place = arguments.index("--modes")
    assert main([*arguments[:place], *arguments[place + 2 :]]) == 0
    assert "openPangu-Embedded-1B thinks in no mode but no_think, which is taken" in " ".join(
        capsys.readouterr().err.split()
    )
    records = [record for _, record in read_records(tmp_path / "out" / run.SAMPLES_FILE)]
    assert [record["mode"] for record in records] == ["no_think"] * 6
    with pytest.warns(CheckpointNote, match="no mode but no_think"), pytest.raises(CheckpointError):  # has no weights
        generate_command(tmp_path / "1b", ["hello"])
    assert main([*arguments[: place + 1], "slow_think", *arguments[place + 2 :]]) == 2
    assert "this model thinks in no mode but no_think" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--device", "ascend"], "the server's own business"),
        (["--tensor-parallel", "2"], "the server's own business"),
        (["--timeout", "0"], "timeout: got 0.0"),
        (["--score-only"], "--score-only needs no model"),
    ],
)
def test_options_that_do_not_go_with_a_server_are_refused(serving, mini, tmp_path, capsys, more, said):
    server = serving()
    assert main(evaluate(mini, server, tmp_path / "out", *more)) == 2
    assert said in " ".join(capsys.readouterr().err.split())
    assert not server.asked
    assert not (tmp_path / "out").exists()


def test_options_of_a_server_need_one(mini, capsys):
    assert main(["evaluate", str(mini), "--model", "mini"]) == 2
    assert "--model goes with --endpoint" in capsys.readouterr().err
    assert main(["evaluate", "--endpoint", "http://localhost:1/v1"]) == 2
    assert "prompts are encoded with its tokenizer" in " ".join(capsys.readouterr().err.split())


def test_the_missing_library_is_told_with_how_to_get_it(mini, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "openai", None)
    assert main(["evaluate", str(mini), "--endpoint", "http://localhost:1/v1", "--output", str(tmp_path / "out")]) == 2
    assert "openai is not installed; pip install 'openai" in " ".join(capsys.readouterr().err.split())


# --- distributions --------------------------------------------------------------------------------------------------

CHANCES = [{7: -0.1, 3: -2.5, 330: -9.0}, {8: -1.5, 3: -0.3, 916: -4.0}]  # behind the first two of 1, 7, 8


def of_prompt(prompt, top):
    said = [{str(token): {"logprob": chance, "rank": 1} for token, chance in each.items()} for each in CHANCES]
    return {"prompt_logprobs": [None, *said]}


def of_echo(prompt, top, form="token_id:{}"):
    named = [{form.format(token): chance for token, chance in each.items()} for each in CHANCES]
    tokens = [form.format(token) for token in (*prompt, 5)]
    own = [None, *(each[token] for each, token in zip(CHANCES, prompt[1:], strict=True)), -0.2]
    return {"logprobs": {"tokens": tokens, "token_logprobs": own, "top_logprobs": [None, *named, {tokens[-1]: -0.2}]}}


def distributions(server, texts=((1, 7, 8),), top=3):
    return endpoint.PromptLogprobs(endpoint.Server(endpoint.Endpoint(server.url)), top).ask(texts)


@pytest.mark.parametrize("form", [of_prompt, of_echo])
def test_distributions_are_those_of_the_tokens_that_were_sent(serving, form):
    server = serving(logprobs=form)
    assert distributions(server, [(1, 7, 8)] * 5) == [CHANCES] * 5
    _, body = server.asked[-1]
    assert body["prompt_logprobs" if form is of_prompt else "logprobs"] == 3


OTHERS = {
    "none": (lambda prompt, top: {}, "gives no log-probabilities of a prompt's tokens"),
    "names": (lambda prompt, top: of_echo(prompt, top, "<{}>"), "gives no log-probabilities of a prompt's tokens"),
    "other tokens": (
        lambda prompt, top: {"prompt_logprobs": [None, *[{"3": {"logprob": -1.0}}] * 2]},
        "of other tokens than",
    ),
    "fewer": (lambda prompt, top: {"prompt_logprobs": [None, {"7": {"logprob": -1.0}}]}, "of other tokens than the 3"),
    "other form": (lambda prompt, top: {"prompt_logprobs": [None, [1]]}, "of another form than vLLM's"),
}


@pytest.mark.parametrize("other", OTHERS)
def test_a_server_that_does_not_give_them_is_told(serving, other):
    form, said = OTHERS[other]
    with pytest.raises(EndpointError, match=said):
        distributions(serving(logprobs=form))


def test_more_than_a_server_gives_is_told_in_its_words(serving):
    refusal = Answer({"error": {"message": "21 is greater than max allowed: 20"}}, 400)
    server = serving(logprobs=lambda prompt, top: {}, misbehave=lambda path, body, number: refusal)
    server.answer, usual = (lambda path, body: refusal if path == "/v1/completions" else usual(path, body)), server.answer
    with pytest.raises(EndpointError, match="max allowed: 20"):
        distributions(server, top=21)


@given(st.integers(0, 2**32), st.integers(1, 12), st.floats(0.05, 8))
def test_kl_of_lumped_events_is_a_lower_bound_that_rises_with_what_is_known(seed, events, spread):
    """By the log-sum inequality, whichever events are known; of all of them it is the KL."""
    random = np.random.default_rng(seed)
    p, q = (np.exp(random.normal(0, spread, (20, events + 3))) for _ in range(2))
    log_p, log_q = (np.log(each / each.sum(axis=1, keepdims=True)) for each in (p, q))
    whole = (np.exp(log_p) * (log_p - log_q)).sum(axis=1)
    known = np.argsort(-log_q, axis=1)
    pick = lambda values, count: np.take_along_axis(values, known[:, :count], axis=1)  # noqa: E731
    bounds = [lumped_kl(pick(log_p, count), pick(log_q, count)) for count in range(1, events + 4)]
    assert all((bound <= whole + 1e-9).all() for bound in bounds)
    if np.exp(log_q).min() > 1e-6:  # as small a rest as a server's float32 tells from none
        assert all((lower <= higher + 1e-9).all() for lower, higher in pairwise(bounds))
        np.testing.assert_allclose(bounds[-1], whole, atol=1e-9)
    padded = [
        np.pad(pick(each, 2), ((0, 0), (0, 3)), constant_values=rest) for each, rest in ((log_p, 0), (log_q, -np.inf))
    ]
    np.testing.assert_array_equal(lumped_kl(*padded), bounds[1])


def test_log_likelihoods_are_those_of_the_whole_distribution(monkeypatch):
    monkeypatch.setattr(comparing, "_SLICE_BYTES", 4 * 7 * 5)  # five words at a time
    random = np.random.default_rng(3)
    head, states = (random.normal(size=(rows, 6)).astype(np.float32) for rows in (23, 7))
    wanted = random.integers(-1, 23, (7, 4))
    log_p, best = log_likelihoods(lambda start, stop: head[start:stop], 23, states, wanted)
    logits = (states @ head.T).astype(np.float64)
    whole = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    np.testing.assert_allclose(log_p, np.where(wanted < 0, 0, np.take_along_axis(whole, wanted, axis=1)), atol=1e-6)
    assert (best == logits.argmax(axis=1)).all()


def test_compare_wants_another_directory_or_a_server(mini, capsys):
    for more in ([], [str(mini), "--endpoint", "http://localhost:1/v1"]):
        assert main(["compare", str(mini), *more, "--data", "x"]) == 2
        assert "give a second directory, or --endpoint" in capsys.readouterr().err
