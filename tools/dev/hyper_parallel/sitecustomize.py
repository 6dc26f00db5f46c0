"""A stand-in for the package hyper_parallel, so that MindFormers 2.x can be imported: any module of it, with any name.

On PYTHONPATH Python imports this module first; tests/network must stand beside it there. MindFormers' inference imports the
package by way of its PyNative training models and calls none of it; a class is an empty class, anything else a mock.
"""

import sys
from unittest import mock

from stand_ins import StandIns


def _value(module, name):
    if name[0].isupper():
        return type(name, (), {"__init__": lambda self, *_, **__: None})
    return mock.MagicMock(name=f"{module}.{name}")


sys.meta_path.append(StandIns(["hyper_parallel"], _value))
