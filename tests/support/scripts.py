"""Scripts of benchmarks/ as modules."""

import contextlib
import importlib.util
import sys


@contextlib.contextmanager
def loaded(path):
    """A script as a module of its own name, which is gone at the end."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[path.stem]
