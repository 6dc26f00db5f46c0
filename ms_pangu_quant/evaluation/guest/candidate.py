"""The process that holds the candidate program. It knows no test: it is called, and answers.

It answers ("ready",), ("value", result), ("error", type name, text), ("exit",), ("syntax", text) or, where a problem's test
has to run here, ("passed",) or ("failed", text). Everything here must survive a candidate that patches the builtins.
"""

import builtins

__builtins__ = dict(vars(builtins))  # a copy: functions keep the builtins of the module they are defined in

import os
import sys
import types

import wire

wire_send, wire_receive, wire_encode = wire.send, wire.receive, wire.encode


def serve(program, channel):
    """Run the program, then answer calls until the tester hangs up."""
    module = types.ModuleType("candidate")
    sys.modules["candidate"] = module
    reply = _attempt(lambda: _execute(program, module.__dict__))
    _answer(channel, reply)
    while reply[0] == "ready":
        request = wire_receive(channel)
        if request is None:
            break
        action, name, arguments, keywords = wire.decode(request)
        if action == "call":
            _answer(channel, _attempt(lambda n=name, a=arguments, k=keywords: _call(module.__dict__, n, a, k)))
        else:
            _answer(channel, _attempt(lambda n=name: _test(n, module.__dict__)))
    os._exit(0)


def _execute(program, namespace):
    try:
        code = compile(program, "<candidate>", "exec", dont_inherit=True)
    except (SyntaxError, ValueError) as error:
        return "syntax", _text(error)
    exec(code, namespace)
    return ("ready",)


def _call(namespace, name, arguments, keywords):
    if name not in namespace:
        raise NameError(f"name {name!r} is not defined")
    return "value", namespace[name](*arguments, **keywords)


def _test(test, namespace):
    try:
        exec(compile(test, "<test>", "exec", dont_inherit=True), namespace)
    except AssertionError as error:
        return "failed", _text(error)
    return ("passed",)


def _attempt(action):
    try:
        return action()
    except SystemExit:
        return ("exit",)
    except BaseException as error:
        return "error", type(error).__name__, _text(error)


def _answer(channel, reply):
    try:
        payload = wire_encode(reply)
    except BaseException as error:  # too deep, too large, or an iterator that fails
        exited = isinstance(error, SystemExit)
        payload = wire_encode(("exit",) if exited else ("error", type(error).__name__, _text(error)))
    wire_send(channel, payload)


def _text(error):
    try:
        return str(error)[:300].encode("ascii", "backslashreplace").decode()
    except BaseException:
        return "its message cannot be read"
