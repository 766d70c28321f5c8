"""A run of `tritonnet train` and its checkpoint, from which it can be resumed after any step."""

import functools
import math
import re
from collections.abc import Callable, Container
from pathlib import Path
from typing import Any

import torch

from .. import LeNet
from . import checkpoint
from .checkpoint import Unfit, entries, fitted, shown
from .terminal import UserError

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "sgd": functools.partial(torch.optim.SGD, momentum=0.9, nesterov=True),
}
# Values of --precision, and TrainStep's names for them.
PRECISIONS = {"float32": "ieee", "tf32": "tf32", "bfloat16": "bfloat16"}
# The largest count of updates that torch's optimizers can keep in float32.
COUNTED = 2**24


class Run:
    """A LeNet in training: all that a checkpoint holds, and nothing else that could change the result.

    The order of the digits needs no state, as it follows from the seed and the epoch. Nor does the schedule, with the
    values that it sets in the optimizer's groups, as it follows from the number of steps.
    """

    def __init__(self, options: dict[str, Any], images: int, device: torch.device) -> None:
        torch.manual_seed(options["seed"])
        self.options, self.images, self.device = options, images, device
        self.net = LeNet().to(device)
        world = options["processes"]
        self.share = math.ceil(options["batch_size"] / world)  # images of a batch in one process
        self.steps = math.ceil(math.ceil(images / world) / self.share)  # of one epoch
        self.optimizer = OPTIMIZERS[options["optimizer"]](self.net.parameters(), options["lr"])
        self.schedule = self.schedule_after(0)
        self.epoch = 0  # epochs that are finished
        self.losses: list[float] = []  # of every step so far
        self.seconds = 0.0  # of training, in the epoch that is not finished
        self.history: list[dict[str, float]] = []  # one entry an epoch

    def schedule_after(self, steps: int) -> torch.optim.lr_scheduler.OneCycleLR:
        """The learning rate schedule after `steps` steps; it sets the rate in the optimizer."""
        return torch.optim.lr_scheduler.OneCycleLR(
            self.optimizer, self.options["lr"], total_steps=self.options["epochs"] * self.steps, last_epoch=steps - 1
        )

    def state(self) -> dict[str, Any]:
        return {
            "options": self.options, "images": self.images, "epoch": self.epoch, "losses": self.losses,
            "seconds": self.seconds, "history": self.history, "model": self.net.state_dict(),
            "optimizer": self.optimizer.state_dict(), "random": torch.get_rng_state(),
        }  # fmt: skip

    def load(self, state: dict[str, Any]) -> None:
        """Load a state that `read_checkpoint` has returned."""
        if state["images"] != self.images:
            raise UserError(f"the run was on {state['images']} digits, but --data has {self.images}: give the same")
        self.net.load_state_dict(state["model"])
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state["optimizer"], "param_groups": groups})
        torch.set_rng_state(state["random"])
        for name in ("epoch", "losses", "seconds", "history"):
            setattr(self, name, state[name])
        self.schedule = self.schedule_after(len(self.losses))


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The state of a run in `path`, for `Run.load`, with every part checked."""
    try:
        return checked_state(checkpoint.load(path))
    except Unfit as e:
        raise UserError(
            f"{path} holds no run to go on with ({e}): give the checkpoint.pt of `tritonnet train`, or train anew"
        ) from None


def checked_state(value: Any) -> dict[str, Any]:
    """A copy of a `Run.state` from a file, compared with that of a new run with the same options.

    Returns:
        all that `Run.load` takes; "optimizer" is the state of each parameter.

    Raises:
        Unfit: a part is missing, or is not one that such a run can have.
    """
    found = entries(value)
    # Runs of earlier versions used torch's number of threads.
    options = checked({"threads": None, **entries(found.get("options"))}, OPTIONS, "options")
    state = checked(found, NUMBERS, "the state")
    steps, run = len(state["losses"]), Run(options, state["images"], torch.device("cpu"))
    epoch, begun = divmod(steps, run.steps)
    if epoch != state["epoch"] or epoch + (begun > 0) > options["epochs"]:
        raise Unfit(f"in epoch {state['epoch']} of {options['epochs']} it cannot have {steps} losses")
    history = [checked(entry, HISTORY, f"history[{i}]") for i, entry in enumerate(state["history"])]
    if [entry["epoch"] for entry in history] != list(range(1, epoch + 1)):
        raise Unfit(f"history is not of {epoch} epochs")
    random = fitted(found.get("random"), torch.get_rng_state(), "random")
    try:
        torch.Generator().set_state(random)
    except RuntimeError:
        raise Unfit("random is no state of a generator of random numbers") from None
    model = fitted(found.get("model"), run.net.state_dict(), "model")
    optimizer = checked_optimizer(entries(found.get("optimizer")).get("state"), run, steps)
    return {
        **state, "options": options, "history": history, "model": model, "optimizer": optimizer, "random": random
    }  # fmt: skip


def checked_optimizer(value: Any, run: Run, steps: int) -> dict[int, dict[str, torch.Tensor]]:
    """The optimizer's state of each parameter from a file, checked for a run after `steps` steps; steps `run` once."""
    for parameter in run.net.parameters():
        parameter.grad = torch.zeros_like(parameter)
    run.optimizer.step()
    kept = fitted(value, run.optimizer.state_dict()["state"] if steps else {}, "optimizer")
    for i, of_parameter in kept.items():
        if of_parameter.get("step", steps) != min(steps, COUNTED):
            raise Unfit(f"optimizer[{i}] has not made {steps} steps")
        if "exp_avg_sq" in of_parameter and (of_parameter["exp_avg_sq"] < 0).any():
            raise Unfit(f"optimizer[{i}]['exp_avg_sq'] has negative numbers")
    return kept


def checked(value: Any, checks: dict[str, Callable[[Any], bool]], name: str) -> dict[str, Any]:
    """The entries of a dict of a file that `checks` names, if they pass; `name` is the dict's in Unfit's message."""
    found = entries(value)
    for key, check in checks.items():
        if key not in found:
            raise Unfit(f"{name} has no {key!r}")
        if not check(found[key]):
            raise Unfit(f"{name} has {shown(found[key])} as {key!r}")
    return {key: found[key] for key in checks}


def is_whole(value: Any, least: int) -> bool:
    return type(value) is int and least <= value < 2**63


def is_finite(value: Any) -> bool:
    return type(value) is float and math.isfinite(value)


def is_positive(value: Any) -> bool:
    return is_finite(value) and value > 0


def is_word(value: Any, words: Container[str]) -> bool:
    return type(value) is str and value in words


def is_path(value: Any) -> bool:
    """Whether it has no characters that a path, or a message of one line, cannot contain."""
    return type(value) is str and not re.search("[\0-\x1f\x7f-\x9f\u2028\u2029]", value)


# Checks of the parts of a state that are not tensors: the options as on the command line,
OPTIONS: dict[str, Callable[[Any], bool]] = {
    "epochs": lambda value: is_whole(value, 1),
    "batch_size": lambda value: is_whole(value, 1),
    "optimizer": lambda value: is_word(value, OPTIMIZERS),
    "lr": is_positive,
    "precision": lambda value: is_word(value, PRECISIONS),
    "seed": lambda value: is_whole(value, 0),
    "processes": lambda value: is_whole(value, 1),
    "data": lambda value: value is None or is_path(value),
    "threads": lambda value: value is None or is_whole(value, 1),
}
# the progress of the run,
NUMBERS: dict[str, Callable[[Any], bool]] = {
    "images": lambda value: is_whole(value, 1),
    "epoch": lambda value: is_whole(value, 0),
    "losses": lambda value: type(value) is list and all(map(is_finite, value)),
    "seconds": lambda value: is_finite(value) and value >= 0,
    "history": lambda value: type(value) is list,
}
# and an entry of its history. TrainStep rejects training losses that are not finite, but a test loss may be.
HISTORY: dict[str, Callable[[Any], bool]] = {
    "epoch": lambda value: is_whole(value, 1),
    "train_loss": is_finite,
    "test_loss": lambda value: type(value) is float,
    "test_accuracy": lambda value: is_finite(value) and 0 <= value <= 1,
    "seconds": is_positive,
    "images_per_second": is_positive,
}
