"""A stand-in for the package hyper_parallel, so that MindFormers 2.x can be imported: any module of it, with any name.

On PYTHONPATH Python imports this module first. MindFormers' inference imports it by way of its PyNative training models
and calls none of it; a class is an empty class, anything else a mock.
"""

import importlib.abc
import importlib.machinery
import sys
import types
from unittest import mock


class StandIn(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "hyper_parallel":
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        module = types.ModuleType(spec.name)
        module.__path__ = []
        return module

    def exec_module(self, module):
        def attribute(name):
            if name.startswith("__"):
                raise AttributeError(name)
            empty = type(name, (), {"__init__": lambda self, *_, **__: None})
            made = empty if name[0].isupper() else mock.MagicMock(name=f"{module.__name__}.{name}")
            return vars(module).setdefault(name, made)

        module.__getattr__ = attribute


sys.meta_path.append(StandIn())
