"""Registers rules with parts of PyTorch that take long to import, once something else imports them."""

import importlib.abc
import importlib.util
import sys
import warnings
from collections.abc import Callable


class _Finder(importlib.abc.MetaPathFinder):
    """Finds one module where the other finders find it, and calls a function after it has run."""

    def __init__(self, name: str, function: Callable[[], object]) -> None:
        self.name, self.function, self.asks_others = name, function, False

    def find_spec(self, fullname, path, target=None):
        if fullname != self.name or self.asks_others:
            return None
        self.asks_others = True
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self.asks_others = False
        if spec is None or spec.loader is None:
            return spec
        loader, run = spec.loader, spec.loader.exec_module

        def run_and_call(module):
            # A loader may serve several modules, as that of a zip file does.
            loader.exec_module = run  # type: ignore[method-assign]
            run(module)
            # Others may have replaced the list.
            if self in sys.meta_path:
                sys.meta_path.remove(self)
            _call(self.name, self.function)

        loader.exec_module = run_and_call  # type: ignore[method-assign]
        return spec


def _call(name, function):
    try:
        function()
    except Exception as e:
        warnings.warn(f"tritonnet has no rules for {name}: {type(e).__name__}: {e}", stacklevel=2)


def when_imported(name: str, function: Callable[[], object]) -> None:
    """Call function() now if the module `name` has been imported, or else right after it is imported.

    What it raises, such as for names that a later release of PyTorch lacks, is a warning: whoever imports the module
    may not need these rules.
    """
    if name in sys.modules:
        _call(name, function)
    else:
        sys.meta_path.insert(0, _Finder(name, function))
