"""Stand-ins for packages that are not here, so that programs which import them can be run without."""

import importlib.abc
import importlib.machinery
import types


class StandIns(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """For sys.meta_path: any module of `packages`, with any name in it, which is value(module's name, name)."""

    def __init__(self, packages, value):
        self.packages, self.value = packages, value

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in self.packages:
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
            return vars(module).setdefault(name, self.value(module.__name__, name))

        module.__getattr__ = attribute
