"""Processes that compile or launch kernels: their environment, and how they are ended."""

import contextlib
import os
import signal


def environment(**variables):
    """This process's environment, with kernels compiled and not interpreted, and with some variables set."""
    return {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | variables


def kill_session(process):
    """Kill a process that has a session of its own, and everything else in that session."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
