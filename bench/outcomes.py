"""A pytest plugin that saves the outcome of every test as it ends, and leaves out tests that need not run again:

    python -m pytest -p bench.outcomes --outcomes FILE tests/test_relu.py

FILE is JSON: {"tests": {file: {"passed": [names], "skipped": [names], "failed": {name: its traceback}}}}.
"""

import os
from pathlib import Path

import pytest
import torch

from .keep import read_json, write_json

# How much of the end of a traceback is kept.
MOST_CHARACTERS = 4000


def pytest_addoption(parser):
    parser.addoption("--outcomes", type=Path, metavar="FILE", help="JSON file for the outcome of every test")


class Outcomes:
    """Runs in the process that receives the report of every test, which under xdist runs none itself."""

    def __init__(self, path):
        self.path, self.found = path, read_json(path)
        self.tests = self.found.setdefault("tests", {})
        # Fixed at the start: a worker that starts late must collect the same tests as the others, or it gets none.
        self.well_before = self.well()

    def well(self):
        """Tests that need not run again: those that passed or were skipped."""
        return [f"{file}::{name}" for file, of in self.tests.items() for name in (*of["passed"], *of["skipped"])]

    @pytest.hookimpl(optionalhook=True)  # xdist's
    def pytest_configure_node(self, node):
        node.workerinput["well"] = self.well_before

    def pytest_runtest_logreport(self, report):
        file, _, name = report.nodeid.partition("::")
        of_file = self.tests.setdefault(file, {"passed": [], "skipped": [], "failed": {}})
        if report.failed:
            of_file["failed"][name] = str(report.longrepr)[-MOST_CHARACTERS:]
            for kind in ("passed", "skipped"):
                if name in of_file[kind]:  # and then failed in the teardown of its fixtures
                    of_file[kind].remove(name)
        elif report.skipped or report.when == "call":
            of_file["failed"].pop(name, None)  # of an earlier run
            of_file["skipped" if report.skipped else "passed"].append(name)
        else:
            return
        write_json(self.path, self.found)


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config):
    path = config.getoption("--outcomes")
    if path and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Outcomes(path), "kept outcomes")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config, items):
    outcomes = config.pluginmanager.get_plugin("kept outcomes")
    well = set(outcomes.well_before if outcomes else getattr(config, "workerinput", {}).get("well", ()))
    config.hook.pytest_deselected(items=[item for item in items if item.nodeid in well])
    items[:] = [item for item in items if item.nodeid not in well]


@pytest.hookimpl(trylast=True)
def pytest_runtest_logfinish(nodeid, location):
    """Ends an xdist worker whose GPU context is lost, where every later test would fail."""
    if "PYTEST_XDIST_WORKER" in os.environ and torch.cuda.is_available():
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            os._exit(1)  # xdist starts another
