"""The process that holds the tests, and alone decides. The functions it tests are proxies for calls to the candidate."""

import builtins
import json
import os
import random
import select
import time

import wire

_ANSWERS = {"ready": 1, "passed": 1, "exit": 1, "value": 2, "failed": 2, "syntax": 2, "error": 3}  # kind -> length


class Ended(BaseException):
    """The test cannot go on; a BaseException, so that no test catches it."""

    def __init__(self, verdict, detail=""):
        super().__init__(verdict, detail)
        self.verdict, self.detail = verdict, detail


def run(job, channel, slow):
    """{"verdict", "detail"} of a test. slow(seconds) is called whenever the candidate has made us wait that long."""
    link = _Link(channel, job["wall_seconds"], slow)
    try:
        link.reply()  # that it is ready
        if job["in_process"]:
            link.run_test("\n".join((job["preamble"], job["test"])))
        else:
            _run_here(job, link)
    except Ended as end:
        return {"verdict": end.verdict, "detail": end.detail[:300]}
    except wire.NotPlain as error:
        return {"verdict": "not_plain", "detail": str(error)}
    except BaseException as error:
        if getattr(error, "from_candidate", False):
            kind = "out_of_memory" if isinstance(error, MemoryError) else "exception"
            return {"verdict": kind, "detail": f"{type(error).__name__}: {error}"[:300]}
        return {"verdict": "wrong_answer", "detail": f"{type(error).__name__}: {error}"[:300]}
    return {"verdict": "pass", "detail": ""}


def _run_here(job, link):
    namespace = {"__name__": "tester"}
    exec(job["preamble"], namespace)
    for name in job["names"]:
        namespace[name] = link.proxy(name)
    random.seed(0)
    exec(compile(job["test"], "<test>", "exec"), namespace)


class _Link:
    def __init__(self, channel, wall, slow):
        self._channel, self._wall, self._slow = channel, wall, slow
        self._waited, self._warned = 0.0, 0.0

    def run_test(self, test):
        self._request(("test", test, (), {}))
        self.reply()

    def proxy(self, name):
        def call(*arguments, **keywords):
            self._request(("call", name, arguments, keywords))
            return self.reply()

        call.__name__ = name
        return call

    def _request(self, request):
        payload = wire.encode(request, strict=True)
        try:
            wire.send(self._channel, payload)
        except OSError:
            raise Ended("gone") from None

    def reply(self):
        try:
            payload = wire.receive(self._channel, self._wait)
        except OverflowError as error:
            raise Ended("output_limit", str(error)) from None
        if payload is None:
            raise Ended("gone")
        try:
            answer = wire.decode(payload)
            if type(answer) is not tuple or len(answer) != _ANSWERS.get(answer[0]):
                raise ValueError("not an answer")
        except MemoryError:
            raise Ended("output_limit", "an answer too large to hold") from None
        except Exception as error:
            raise Ended("wrong_answer", f"not a plain value: {error}") from None
        return self._value(*answer)

    def _value(self, kind, *rest):
        if kind == "value":
            return rest[0]
        if kind in ("ready", "passed"):
            return None
        if kind == "failed":
            raise Ended("wrong_answer", f"AssertionError: {rest[0]}")
        if kind == "syntax":
            raise Ended("syntax_error", str(rest[0]))
        if kind == "exit":
            raise Ended("early_exit", "SystemExit")
        raise _as_exception(str(rest[0]), str(rest[1]))

    def _wait(self):
        poll = select.poll()
        poll.register(self._channel, select.POLLIN)
        started = time.monotonic()
        while not poll.poll(100):
            waited = self._waited + time.monotonic() - started
            if waited - self._warned >= self._wall:
                self._warned = waited
                self._slow(waited)
        self._waited += time.monotonic() - started


def _as_exception(name, text):
    """The candidate's exception, of its own type where that is a builtin, so that a test may expect it."""
    kind = vars(builtins).get(name)
    if not (isinstance(kind, type) and issubclass(kind, Exception) and not issubclass(kind, UnicodeError)):
        kind, text = RuntimeError, f"{name}: {text}"
    error = kind(text)
    error.from_candidate = True
    return error


def child(job, channel, control):
    """Run in a forked process: send the result and leave."""

    def slow(seconds):
        wire.send(control, json.dumps({"waited": seconds}).encode())

    wire.send(control, json.dumps(run(job, channel, slow)).encode())
    os._exit(0)
