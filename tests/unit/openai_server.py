"""A small OpenAI-compatible server in this process, which misbehaves as it is told."""

from __future__ import annotations

import json
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

OPENAI = {"model", "prompt", "messages", "max_tokens", "temperature", "top_p", "seed", "stop", "stream"}


@dataclass
class Answer:
    """What is sent back. reset: the connection is broken instead; cut: it is closed in the middle of the body."""

    body: Any = None
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    after: float = 0.0
    reset: bool = False
    cut: bool = False


@dataclass
class Server:
    """reply      the text that a prompt is answered with: of its token ids, or of its last message.
    tokens        text -> ids; given back where the server is asked for them and knows vLLM's fields.
    misbehave     (path, body, how many requests came before) -> what is answered instead; None where nothing is.
    """

    reply: Callable[[Any], str]
    tokens: Callable[[str], Sequence[int]]
    models: Sequence[dict[str, Any]] = ({"id": "mini", "owned_by": "vllm", "root": "/models/mini", "max_model_len": 512},)
    version: str | None = "0.32.0"
    takes_ids: bool = True
    only_openai: bool = False
    reasoning: bool = False
    misbehave: Callable[[str, dict[str, Any], int], Answer | None] = lambda path, body, number: None
    logprobs: Callable[[list[int], int], Any] | None = None
    asked: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    answered: list[Any] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    under_way: int = 0
    most: int = 0
    url: str = ""

    def __post_init__(self) -> None:
        self.lock = threading.Lock()

    @property
    def questions(self) -> list[tuple[str, dict[str, Any]]]:
        """What was asked, without what is only tried out."""
        return [
            (path, body) for path, body in self.asked if body and (body["max_tokens"] != 1 or "prompt_logprobs" in body)
        ]

    def answer(self, path: str, body: dict[str, Any] | None) -> Answer:
        with self.lock:
            number = len(self.questions)
            self.asked.append((path, body or {}))
        if body is not None and body["max_tokens"] != 1 and (wrong := self.misbehave(path, body, number)):
            return wrong
        if path == "/version":
            return Answer({"version": self.version}) if self.version else Answer("", 404)
        if path == "/v1/models":
            return Answer({"object": "list", "data": self.models})
        if body is None or (body["model"] not in [each["id"] for each in self.models]):
            return Answer({"error": {"message": "no such model", "code": 404}}, 404)
        if self.only_openai and set(body) - OPENAI:
            return Answer({"error": {"message": f"unknown {sorted(set(body) - OPENAI)}"}}, 400)
        if path == "/v1/completions":
            if not self.takes_ids:
                return Answer({"error": {"message": "prompt: expected a string"}}, 400)
            return Answer(self._completion(body))
        return Answer(self._chat(body)) if path == "/v1/chat/completions" else Answer("not found", 404)

    def _completion(self, body: dict[str, Any]) -> Any:
        text = self.reply(body["prompt"])
        ids = [*self.tokens(text)]
        reason = "stop" if len(ids) <= body["max_tokens"] else "length"
        ids = ids[: body["max_tokens"]]
        choice: dict[str, Any] = {"index": 0, "text": text, "finish_reason": reason}
        if body.get("return_token_ids"):
            choice |= {"token_ids": ids, "stop_reason": None, "prompt_token_ids": body["prompt"]}
        if self.logprobs:
            choice |= self.logprobs(body["prompt"], body.get("prompt_logprobs", body.get("logprobs")))
        usage = {"prompt_tokens": len(body["prompt"]), "completion_tokens": len(ids)}
        return {"object": "text_completion", "model": body["model"], "choices": [choice], "usage": usage}

    def _chat(self, body: dict[str, Any]) -> Any:
        text = self.reply(body["messages"][-1]["content"])
        message = {"role": "assistant", "content": text}
        if self.reasoning:
            thought, _, answer = text.removeprefix("[unused16]").partition("[unused17]")
            message |= {"content": answer, "reasoning": thought}
        return {"choices": [{"index": 0, "message": message, "finish_reason": "stop"}]}


@contextmanager
def running(server: Server) -> Iterator[Server]:
    """The server, under its url."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._respond(None)

        def do_POST(self) -> None:
            self._respond(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

        def _respond(self, body: dict[str, Any] | None) -> None:
            with server.lock:
                server.headers.append({name.lower(): value for name, value in self.headers.items()})
                server.under_way += 1
                server.most = max(server.most, server.under_way)
            try:
                self._send(server.answer(self.path, body), body)
            finally:
                with server.lock:
                    server.under_way -= 1

        def _send(self, answer: Answer, body: dict[str, Any] | None) -> None:
            time.sleep(answer.after)
            if answer.reset:
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.connection.close()
                self.close_connection = True
                return
            content = answer.body.encode() if isinstance(answer.body, str) else json.dumps(answer.body).encode()
            try:
                self.send_response(answer.status)
                for name, value in {"Content-Type": "application/json", **answer.headers}.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content[: len(content) // 2] if answer.cut else content)
                if answer.cut:
                    self.close_connection = True
                elif answer.status == 200 and body is not None:
                    server.answered.append(body.get("prompt") or body.get("messages"))
            except (BrokenPipeError, ConnectionResetError):
                pass  # who asked has gone

        def log_message(self, form: str, *values: Any) -> None:
            pass

    class Quiet(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, request: Any, address: Any) -> None:
            pass

    with Quiet(("127.0.0.1", 0), Handler) as listening:
        threading.Thread(target=listening.serve_forever, args=(0.02,), daemon=True).start()
        server.url = f"http://127.0.0.1:{listening.server_address[1]}/v1"
        try:
            yield server
        finally:
            listening.shutdown()
