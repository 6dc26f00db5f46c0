"""errors.py: one family, so that the command line can tell the user's mistakes from ours."""

import ast
import inspect
import pickle

import pytest

from ms_pangu_quant import PanguQuantError, errors

CLASSES = [each for each in vars(errors).values() if inspect.isclass(each) and each.__module__ == errors.__name__]


@pytest.mark.parametrize("error", CLASSES)
def test_every_error_is_caught_as_a_pangu_quant_error_and_as_nothing_python_raises_itself(error):
    assert issubclass(error, PanguQuantError)
    assert error.__bases__ == ((Exception,) if error is PanguQuantError else (PanguQuantError,))
    assert error.__doc__


def test_a_message_survives_the_way_from_a_worker_process():
    for error in CLASSES:
        copy = pickle.loads(pickle.dumps(error("config.json: bits is 3, wanted 4")))
        assert type(copy) is error
        assert str(copy) == "config.json: bits is 3, wanted 4"


def test_every_error_the_package_raises_is_one_line(root):
    """A line break in a message would be two lines on the command line; constants and f-strings are looked through."""
    names = {error.__name__ for error in CLASSES}
    raised = 0
    for file in (root / "ms_pangu_quant").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            call = node.exc if isinstance(node, ast.Raise) else None
            if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id in names:
                raised += 1
                assert call.args, f"{file}:{node.lineno}: an error without a message"
                texts = [
                    part.value
                    for part in ast.walk(call.args[0])
                    if isinstance(part, ast.Constant) and isinstance(part.value, str)
                ]
                assert not any("\n" in text for text in texts), f"{file}:{node.lineno}"
    assert raised > 50
