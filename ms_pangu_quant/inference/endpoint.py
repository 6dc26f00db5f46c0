"""A model that an OpenAI-compatible server answers for, asked as a loaded one is.

Prompts go to /completions as the token ids that this project encodes, so that no template or bos of the server's comes
between. A server that takes no ids is asked at /chat/completions, where its own template renders the chat. What it returns
as ids is decoded here; text is taken as it is, its tokens counted with the same tokenizer.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

from ms_pangu_quant.checkpoint.config import read_json
from ms_pangu_quant.checkpoint.tokenizer import Tokenizer
from ms_pangu_quant.errors import EndpointError, RequestError
from ms_pangu_quant.inference.model import Generation
from ms_pangu_quant.inference.sampling import GenerationSettings
from ms_pangu_quant.suggestion import did_you_mean

if TYPE_CHECKING:
    from openai import APIError, OpenAI

Answered = TypeVar("Answered")
API_KEY = "PANGU_QUANT_API_KEY"  # of this project's own, so that a key of OpenAI's goes nowhere by accident
COMPLETIONS, CHAT = "/completions", "/chat/completions"
CONCURRENT = 16
_WAITS = (0.5, 1.0, 2.0, 4.0, 8.0)  # seconds before something is asked again, or what the server's Retry-After says
_LONGEST_WAIT = 120.0
_PASSING = (408, 409, 429)  # and from 500 on: statuses of a server that may answer soon
_CONNECT_SECONDS = 10.0
_CHAT_ROOM = 16  # tokens by which the server's template may be longer than ours
_SHOWN = 300  # characters of what a server says
_THINK_START, _THINK_END = "[unused16]", "[unused17]"
_REFUSED = (400, 404, 405, 415, 422, 501)  # for what is asked, not for who asks or when
_EXTRAS = {  # beyond OpenAI's API: vLLM's and what follows it; the defaults of generation_config.json are not meant here
    "return_token_ids": True,
    "skip_special_tokens": False,
    "repetition_penalty": 1.0,
    "min_p": 0.0,
}


@dataclass(frozen=True)
class Endpoint:
    """Where an OpenAI-compatible server is. Raises RequestError for what is no address.

    url      up to and with the version, http://host:port/v1.
    model    as the server calls it; None for the only one that it serves.
    timeout  seconds in which an answer must come, each time that it is asked for.

    A key is read from the environment variable PANGU_QUANT_API_KEY and written nowhere.
    """

    url: str
    model: str | None = None
    timeout: float = 600.0

    def __post_init__(self) -> None:
        try:
            parts = urlsplit(self.url)
            fits = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        except ValueError:
            fits = False
        if fits and (parts.username is not None or parts.password is not None):
            raise RequestError(f"endpoint: a URL with a user or password in it; put a key into {API_KEY} instead")
        if not fits or parts.query or parts.fragment:
            raise RequestError(f"endpoint: got {self.url!r}, wanted a URL such as http://localhost:8000/v1")
        if not 0 < self.timeout < float("inf"):
            raise RequestError(f"timeout: got {self.timeout}, wanted seconds, more than 0")


@dataclass(frozen=True)
class Description:
    """What a server says of itself and the model; None where it does not say."""

    url: str
    model: str
    software: str | None
    version: str | None
    root: str | None
    max_model_len: int | None


class Server:
    """Sends requests and checks what comes back. Raises EndpointError where the server is away, refuses, or answers what
    cannot be read, RequestError for a model that it does not serve."""

    def __init__(self, endpoint: Endpoint) -> None:
        self.url, self.timeout = endpoint.url.rstrip("/"), endpoint.timeout
        self._key = os.environ.get(API_KEY, "")
        self._client = self._new_client(endpoint.timeout)
        served = self._models()
        name = self._chosen(endpoint.model, [*served])
        said = served[name]
        length = said.get("max_model_len")
        self.description = Description(
            self.url,
            name,
            _text(said.get("owned_by")),
            self._version(),
            _text(said.get("root")),
            length if isinstance(length, int) and length > 0 else None,
        )

    def _new_client(self, seconds: float) -> OpenAI:
        """Without its own retries, which would wait for a server that hangs as often as for one that starts."""
        from openai import OpenAI, Timeout

        timeout = Timeout(seconds, connect=min(_CONNECT_SECONDS, seconds))
        client = OpenAI(base_url=self.url, api_key=self._key or "none", timeout=timeout, max_retries=0)
        client.organization = client.project = None  # it takes OpenAI's from the environment, to send them along
        return client

    def post(self, path: str, **body: Any) -> dict[str, Any]:
        """The JSON object of an answer. Raises EndpointError; its status is that of a refusal."""
        body = {"model": self.description.model, **body, "stream": False}
        return self._answered(path, lambda: self._client.post(path, cast_to=str, body=body))

    def _models(self) -> dict[str, Mapping[str, Any]]:
        answered = self._answered("/models", lambda: self._client.get("/models", cast_to=str))
        entries = answered.get("data")
        if not isinstance(entries, list) or not all(isinstance(each, dict) and _text(each.get("id")) for each in entries):
            raise EndpointError(f"{self.url}/models: got no list of models, wanted what an OpenAI-compatible server gives")
        return {each["id"]: each for each in entries}

    def _chosen(self, wanted: str | None, served: Sequence[str]) -> str:
        names = ", ".join(served) or "none"
        if wanted is None and len(served) != 1:
            raise RequestError(f"model: {self.url} serves {len(served)} models ({names}); name one")
        if wanted is not None and wanted not in served:
            raise RequestError(
                f"model: {self.url} does not serve {wanted!r}{did_you_mean(wanted, served)}, it serves {names}"
            )
        return served[0] if wanted is None else wanted

    def _version(self) -> str | None:
        """vLLM's and SGLang's say it beside the API."""
        from openai import OpenAIError

        client = self._new_client(_CONNECT_SECONDS)
        try:
            said = json.loads(client.get(f"{self.url.removesuffix('/v1')}/version", cast_to=str))
        except (OpenAIError, ValueError):
            return None
        return _text(said.get("version")) if isinstance(said, dict) else None

    def _answered(self, path: str, ask: Callable[[], str]) -> dict[str, Any]:
        from openai import APIConnectionError, APIError, APITimeoutError, OpenAIError

        where = f"{self.url}{path}"
        try:
            text = _asked_again(ask)
        except APIConnectionError as error:
            if isinstance(error, APITimeoutError) and not _is_away(error):
                raise EndpointError(
                    f"{where}: no answer within {self.timeout:g} s; give it longer (--timeout), or ask for less at a time "
                    "(--batch-size)"
                ) from None
            raise EndpointError(
                f"{where}: the server is away ({self._shown(_cause(error))}); start it, or mend the endpoint"
            ) from None
        except APIError as error:
            raise self._refusal(where, error) from None
        except OpenAIError as error:
            raise EndpointError(f"{where}: {self._shown(str(error))}") from None
        try:
            answered = json.loads(text)
        except ValueError:
            what = "a stream" if text.lstrip().startswith(("data:", "event:")) else "no JSON"
            raise EndpointError(
                f"{where}: got {what}, wanted one JSON object; it begins with {self._shown(text)!r}"
            ) from None
        if not isinstance(answered, dict):
            raise EndpointError(f"{where}: got a JSON {type(answered).__name__}, wanted an object")
        if answered.get("error"):
            raise EndpointError(f"{where}: the server says {self._shown(_message(answered['error']))!r}")
        return answered

    def _refusal(self, where: str, error: APIError) -> EndpointError:
        status = getattr(error, "status_code", None)
        said = self._shown(_message(error.body) or error.message)
        todo = {
            401: f"; put the server's key into the environment variable {API_KEY}",
            403: f"; put a key that may into the environment variable {API_KEY}",
            404: "; wanted the address of an OpenAI-compatible API, such as http://localhost:8000/v1",
        }.get(status or 0, "")
        tried = f", asked {len(_WAITS) + 1} times" if _may_pass(error) else ""
        return EndpointError(f"{where}: the server refuses with {status} ({said}){tried}{todo}", status)

    def _shown(self, text: str) -> str:
        text = " ".join(text.split())
        text = text.replace(self._key, "***") if self._key else text
        return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


class ServedModel:
    """Generates as a loaded Model does: stream() gives the same for the same arguments.

    takes_chats     whether prompts are evaluation.run.Chat, messages and thinking mode, rather than token ids.
    context_length  tokens that a prompt and its answer may have together.
    """

    def __init__(self, server: Server, tokenizer: Tokenizer, context_length: int | None) -> None:
        """context_length  where the server does not say it. Raises EndpointError, RequestError where neither is known."""
        length = server.description.max_model_len or context_length
        if length is None:
            raise RequestError(
                f"{server.url}: does not say how long its context is (max_model_len); copy config.json beside the tokenizer"
            )
        self.context_length = length
        self.description = server.description
        self._server, self._tokenizer = server, tokenizer
        self._extras: dict[str, Any] = {}
        self.takes_chats = not self._takes_ids()

    @property
    def asked_with(self) -> str:
        return "chats" if self.takes_chats else "token ids"

    @property
    def id(self) -> str:
        """A hash of what the server says that its answers depend on."""
        said = self.description
        known = [said.model, said.root, said.max_model_len, self.asked_with]
        return hashlib.sha256(json.dumps(known).encode()).hexdigest()

    def _takes_ids(self) -> bool:
        """Found out with one token, and whether it also takes what is beyond OpenAI's API."""
        prompt = [self._tokenizer.eos_id if self._tokenizer.bos_id is None else self._tokenizer.bos_id]
        for extras in ({**_EXTRAS, "top_k": 0, "stop_token_ids": sorted(self._tokenizer.end_ids)}, {}):
            try:
                self._server.post(COMPLETIONS, prompt=prompt, max_tokens=1, temperature=0.0, **extras)
            except EndpointError as error:
                if error.status not in _REFUSED:
                    raise
                continue
            self._extras = extras
            return True
        return False

    def stream(
        self,
        prompts: Sequence[Any],
        settings: GenerationSettings,
        *,
        streams: Sequence[int] | None = None,
        limits: Sequence[int] | None = None,
        max_batch: int | None = None,
        on_tokens: Callable[[int], None] = lambda count: None,
    ) -> Iterator[tuple[int, Generation]]:
        """(place of a prompt, its answer) as each ends; at most max_batch are asked for at a time."""
        if settings.top_k and not self._extras:
            raise RequestError(
                f"top_k: {self._server.url} takes only what OpenAI's API has, and that has none; leave it out"
            )
        numbers = range(len(prompts)) if streams is None else streams
        asking = [
            partial(self._answer, prompt, each, stream)
            for prompt, each, stream in zip(prompts, settings.of_each(len(prompts), limits), numbers, strict=True)
        ]
        for index, generation in _as_they_end(asking, max_batch or CONCURRENT):
            on_tokens(len(generation.token_ids))
            yield index, generation

    def _answer(self, prompt: Any, settings: GenerationSettings, stream: int) -> Generation:
        body = {"temperature": settings.temperature, "top_p": settings.top_p, **self._extras}
        if self._extras:
            body["top_k"] = settings.top_k
        if settings.temperature:
            body["seed"] = int(settings.generator(stream).integers(1 << 31))
        if settings.stop:
            body["stop"] = list(settings.stop)
        ids = self._tokenizer.encode_chat(prompt.messages, mode=prompt.mode) if self.takes_chats else list(prompt)
        room = self.context_length - len(ids)
        if self.takes_chats:
            chat = self._tokenizer.chat(prompt.messages, mode=prompt.mode)
            most = max(1, min(settings.max_new_tokens, room - _CHAT_ROOM))
            path, answered = CHAT, self._server.post(CHAT, messages=chat, max_tokens=most, **body)
        else:
            most = min(settings.max_new_tokens, room)
            path, answered = COMPLETIONS, self._server.post(COMPLETIONS, prompt=ids, max_tokens=most, **body)
        return self._generation(f"{self._server.url}{path}", answered, len(ids), most)

    def _generation(self, where: str, answered: Mapping[str, Any], prompt_tokens: int, most: int) -> Generation:
        choice = only_choice(where, answered)
        reason, stopped_by = choice.get("finish_reason"), choice.get("stop_reason")
        if reason not in ("stop", "length"):
            raise EndpointError(f"{where}: an answer ended with finish_reason {reason!r}, wanted 'stop' or 'length'")
        ended = "length" if reason == "length" else "stop" if isinstance(stopped_by, str) else "eos"
        ids = choice.get("token_ids")
        if isinstance(ids, list) and all(type(each) is int for each in ids) and not self.takes_chats:
            kept = self._tokenizer.before_end(ids)
            found = Generation.of(self._tokenizer, kept, prompt_tokens, ended, stopped_by if ended == "stop" else None)
        else:
            found = _of_text(self._tokenizer, _answer_text(where, choice), prompt_tokens, ended)
        self._check_length(where, answered, found, most)
        return found

    def _check_length(self, where: str, answered: Mapping[str, Any], found: Generation, most: int) -> None:
        """Raises EndpointError for an answer that the server, and neither its context nor what was asked for, has cut."""
        used = answered.get("usage")
        used = used if isinstance(used, dict) else {}
        tokens, prompt = used.get("completion_tokens"), used.get("prompt_tokens")
        tokens = tokens if isinstance(tokens, int) else len(found.token_ids)
        prompt = prompt if isinstance(prompt, int) else found.prompt_tokens
        if found.finish_reason == "length" and tokens < most and prompt + tokens < self.context_length:
            raise EndpointError(
                f"{where}: the server cut an answer after {tokens} tokens, with {most} asked for and a context of "
                f"{self.context_length}; raise its limit (of vLLM: max_new_tokens in --override-generation-config), or ask "
                f"for at most {tokens} (--max-new-tokens)"
            )


class PromptLogprobs:
    """Asks a server for its distributions at the tokens of texts: of each the most likely, and the text's own.

    It gives them as vLLM's prompt_logprobs, else as logprobs of an echoed prompt, if tokens are named by their ids there.
    """

    def __init__(self, server: Server, top: int) -> None:
        """top: tokens of each distribution; vLLM gives 20, or as many as its --max-logprobs says."""
        self._server, self._top, self._where = server, top, f"{server.url}{COMPLETIONS}"
        self._form = self._of_prompt

    def ask(
        self, texts: Sequence[Sequence[int]], on_text: Callable[[], None] = lambda: None
    ) -> list[list[dict[int, float]]]:
        """Of each text, for each token behind its first: token id -> log-probability, nats. Raises EndpointError where the
        server gives none, or those of other tokens."""
        first = self._first(texts[0])
        on_text()
        found = [first, *([] for _ in texts[1:])]
        for index, said in _as_they_end([partial(self._form, text) for text in texts[1:]], CONCURRENT):
            found[index + 1] = said
            on_text()
        return found

    def _first(self, text: Sequence[int]) -> list[dict[int, float]]:
        """Finds out which form it has."""
        try:
            return self._of_prompt(text)
        except EndpointError as error:
            if error.status is not None and error.status not in _REFUSED:
                raise
            self._form = self._of_echo
            try:
                return self._of_echo(text)
            except EndpointError:
                raise error from None

    def _of_prompt(self, text: Sequence[int]) -> list[dict[int, float]]:
        asked = {"prompt": list(text), "max_tokens": 1, "temperature": 0.0, "prompt_logprobs": self._top}
        said = only_choice(self._where, self._server.post(COMPLETIONS, **asked)).get("prompt_logprobs")
        if not isinstance(said, list):
            raise EndpointError(
                f"{self._where}: gives no log-probabilities of a prompt's tokens, neither as vLLM's prompt_logprobs nor as "
                "logprobs with echo"
            )
        try:
            found = [{int(token): float(each["logprob"]) for token, each in entry.items()} for entry in said[1:]]
        except (AttributeError, KeyError, TypeError, ValueError):
            raise EndpointError(f"{self._where}: prompt_logprobs of another form than vLLM's") from None
        return self._checked(text, found)

    def _of_echo(self, text: Sequence[int]) -> list[dict[int, float]]:
        asked = {"prompt": list(text), "max_tokens": 1, "temperature": 0.0, "logprobs": self._top, "echo": True}
        answered = self._server.post(COMPLETIONS, **asked, return_tokens_as_token_ids=True)
        said: Any = only_choice(self._where, answered).get("logprobs")
        try:
            found = [
                {int(token.removeprefix("token_id:")): float(each) for token, each in {**top, own: chance}.items()}
                for top, own, chance in zip(said["top_logprobs"], said["tokens"], said["token_logprobs"], strict=True)
                if top is not None
            ]
        except (AttributeError, KeyError, TypeError, ValueError):
            raise EndpointError(f"{self._where}: logprobs of another form than OpenAI's, or not of token ids") from None
        return self._checked(text, found[: len(text) - 1])

    def _checked(self, text: Sequence[int], found: list[dict[int, float]]) -> list[dict[int, float]]:
        """Raises EndpointError where they are of other tokens than the text's."""
        if len(found) != len(text) - 1 or any(token not in each for token, each in zip(text[1:], found, strict=True)):
            raise EndpointError(f"{self._where}: log-probabilities of other tokens than the {len(text)} that were sent")
        return found


def _as_they_end(asking: Sequence[Callable[[], Answered]], most: int) -> Iterator[tuple[int, Answered]]:
    """(place, what it gives) of each call, at most so many at a time.

    Once one has raised an EndpointError no other is begun; those under way are waited for, and given, before it is raised.
    """
    waiting = iter(enumerate(asking))
    running: dict[Future[Answered], int] = {}
    failed: EndpointError | None = None
    pool = ThreadPoolExecutor(most, thread_name_prefix="endpoint")
    try:
        while True:
            while failed is None and len(running) < most and (each := next(waiting, None)):
                running[pool.submit(each[1])] = each[0]
            if not running:
                break
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                index = running.pop(future)
                try:
                    answered = future.result()
                except EndpointError as error:
                    failed = failed or error
                    continue
                yield index, answered
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
    if failed is not None:
        raise failed


def stated_context(directory: Path) -> int | None:
    """max_position_embeddings of a config.json, of whatever architecture; None where there is none."""
    path = directory / "config.json"
    length = read_json(path).get("max_position_embeddings") if path.exists() else None
    return length if isinstance(length, int) and length > 0 else None


def only_choice(where: str, answered: Mapping[str, Any]) -> Mapping[str, Any]:
    """Raises EndpointError where there is no choice, or none of the wanted form."""
    choices = answered.get("choices")
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        raise EndpointError(f"{where}: an answer without choices; wanted one")
    first: Mapping[str, Any] = choices[0]
    return first


def _answer_text(where: str, choice: Mapping[str, Any]) -> str:
    """A completion's, or a chat message's; the thought that a reasoning parser has set apart is in its markers again."""
    message = choice.get("message")
    if message is None and isinstance(choice.get("text"), str):
        return str(choice["text"])
    if not isinstance(message, dict) or not isinstance(message.get("content"), str | None):
        raise EndpointError(f"{where}: a choice without text, wanted a text or a message with content")
    thought = message.get("reasoning_content") or message.get("reasoning")
    content = message.get("content")
    if not isinstance(thought, str) or not thought:
        return content or ""
    return f"{_THINK_START}{thought}" + ("" if content is None else f"{_THINK_END}{content}")


def _of_text(tokenizer: Tokenizer, text: str, prompt_tokens: int, ended: str) -> Generation:
    """The thought ends at the first marker in the text; a start marker without it is a thought that never ends."""
    head, marker, tail = text.partition(_THINK_END)
    begun = _THINK_START in head
    thought = head.partition(_THINK_START)[2] if begun else head
    thinks = bool(marker) or begun
    ids = tokenizer.encode_part(text)
    return Generation(
        text,
        thought if thinks else None,
        tail if marker else "" if begun else text,
        tuple(ids),
        prompt_tokens,
        ended,
        bool(marker) or not begun,
        len(tokenizer.encode_part(thought)) if thinks else 0,
    )


def _asked_again(ask: Callable[[], str]) -> str:
    """What `ask` gives, in several tries where the server is away or busy; what takes too long is not awaited twice."""
    from openai import APIError

    for pause in _WAITS:
        try:
            return ask()
        except APIError as error:
            if not _may_pass(error):
                raise
            time.sleep(max(pause * random.uniform(0.8, 1.2), _retry_after(error)))  # not all at once
    return ask()


def _may_pass(error: APIError) -> bool:
    from openai import APIConnectionError, APITimeoutError

    if isinstance(error, APIConnectionError):
        return not isinstance(error, APITimeoutError) or _is_away(error)
    status = getattr(error, "status_code", 0)
    return status in _PASSING or status >= 500


def _is_away(error: APIError) -> bool:
    """Whether a connection was not even made."""
    return type(error.__cause__).__name__ == "ConnectTimeout"


def _retry_after(error: APIError) -> float:
    """Seconds that a refusal asks to wait for; 0 where it names none, or a date."""
    response = getattr(error, "response", None)
    try:
        return min(float(response.headers["retry-after"]), _LONGEST_WAIT) if response is not None else 0.0
    except (KeyError, ValueError):
        return 0.0


def _message(body: object) -> str:
    """What a server's error says: OpenAI's form, FastAPI's, or whatever it is."""
    if isinstance(body, dict):
        said = body.get("message") or body.get("detail") or body.get("error") or body
        return _message(said) if isinstance(said, dict) and said is not body else str(said)
    return "" if body is None else str(body)


def _cause(error: APIError) -> str:
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    return str(cause) or type(cause).__name__


def _text(value: object) -> str | None:
    return value if isinstance(value, str) and value else None
