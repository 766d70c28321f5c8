"""What ends work early: a time limit inside a process, and signals that ask the process to stop."""

import contextlib
import signal


class OutOfTime(BaseException):
    """A block took longer than `limited` allowed. Not an Exception, so that code in the block does not catch it."""


@contextlib.contextmanager
def limited(seconds):
    """Raises OutOfTime in the block once it has run for so many seconds. Only for the main thread.

    It is raised between two Python instructions: a call that waits in C is not interrupted.
    """

    def stop(signum, frame):
        raise OutOfTime(f"more than {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, stop)
    # Repeated every second, in case it is first raised where exceptions are dropped, such as in a destructor.
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.001), 1.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextlib.contextmanager
def interrupted_by_sigterm():
    """Inside, SIGTERM raises KeyboardInterrupt as Ctrl-C does, so that results so far are reported.

    So does SIGHUP, sent when the terminal closes, unless it is ignored as under nohup.
    """

    def stop(signum, frame):
        raise KeyboardInterrupt(signal.Signals(signum).name)

    heard = [s for s in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(s) != signal.SIG_IGN]
    before = {s: signal.signal(s, stop) for s in heard}
    try:
        yield
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)
