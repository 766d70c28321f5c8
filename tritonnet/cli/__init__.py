"""The command line: tritonnet train, predict, bench, doctor."""

import argparse
import contextlib
import importlib
import os
import sys
from collections.abc import Iterator, Sequence

import torch

from .terminal import Parser, UserError, say

COMMANDS = {
    "train": "train LeNet on handwritten digits",
    "predict": "read the digits in image files",
    "bench": "check and time the kernels on this machine",
    "doctor": "show what is installed and which backend runs, and check every layer",
}
# The modules that the extra `cli` installs.
_EXTRA = ("matplotlib", "numpy", "PIL", "rich")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit code.

    0, 1 for a failed check, 2 for a user's error, 130 for Ctrl-C, 141 for a closed pipe, or that of the bench.
    """
    from .. import __version__

    commands = "\n".join(f"  {name:10}{what}" for name, what in COMMANDS.items())
    parser = Parser(
        "tritonnet",
        usage="tritonnet COMMAND ... (tritonnet COMMAND --help lists its options)",
        description="LeNet and its layers on Triton kernels.",
        epilog=f"commands:\n{commands}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"tritonnet {__version__}")
    parser.add_argument("command", nargs="?", choices=COMMANDS, help=argparse.SUPPRESS)
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.command is None:
        parser.error(f"name a command: {', '.join(COMMANDS)}")
    return run(args.command, args.arguments)


@contextlib.contextmanager
def usual_tensors() -> Iterator[None]:
    """Default dtype float32 and default device CPU, whatever defaults the program that runs a command has set."""
    dtype = torch.get_default_dtype()
    # Entered only if needed: inside it, Python code runs at every call of a torch function.
    on_cpu = torch.device("cpu") if torch.get_default_device().type != "cpu" else contextlib.nullcontext()
    torch.set_default_dtype(torch.float32)
    try:
        with on_cpu:
            yield
    finally:
        torch.set_default_dtype(dtype)


def run(command: str, arguments: Sequence[str] | None = None) -> int:
    """Run one command with its arguments (None: those of this process); returns its exit code."""
    try:
        with usual_tensors():
            return importlib.import_module(f".{command}", __name__).main(arguments)
    except UserError as e:
        message = str(e)
    except ModuleNotFoundError as e:
        if (e.name or "").partition(".")[0] not in _EXTRA:
            raise
        message = f"{e.name} is not installed: pip install 'tritonnet[cli]'"
    except BrokenPipeError:
        # The reader of the pipe has closed it (tritonnet predict DIR | head); the interpreter's last flush would fail.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as e:
        reason = e.strerror or str(e)
        message = reason if e.filename is None else f"{e.filename}: {reason}"
    except KeyboardInterrupt:
        say("", error=True)
        return 130
    # All processes of torchrun fail with the same error: one of them prints it.
    if os.environ.get("RANK", "0") == "0":
        say(f"tritonnet {command}: {message}", error=True)
    return 2
