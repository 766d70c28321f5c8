"""The losses of a training step's calls: where they lie on the device, and which was the first that is not finite."""

import torch

from ..dispatch import launchers, on_device

if launchers is not None:
    from ..kernels.lenet import layout

# Losses that lie side by side.
BLOCK = 64
# Calls between two looks at whether a loss was not finite; what one finds is heard of at the next.
LOOK_EVERY = 32


def new_block(device):
    """Places for the next losses; the kernel that fills them finds their address in memory."""
    return torch.empty(BLOCK, dtype=torch.float32, device=device)


class Losses:
    """Hands out a place for each call's loss, so that no loss is copied and none ever changes.

    Attributes:
        place: (1) int64 on the device, the address of the place that the coming call's kernel writes to. The kernel
            moves it on, so that a captured launch needs nothing from the host but a fresh block now and then.
    """

    def __init__(self, device):
        self.device, self.place = device, torch.zeros(1, dtype=torch.int64, device=device)
        self._block, self._left = None, []

    def next(self):
        """The place that `place` stands for, (), for one launch that fills it."""
        if not self._left:
            self._block = new_block(self.device)
            self.place.fill_(layout.address(self._block))
            self._left = list(self._block.unbind())[::-1]
        return self._left.pop()

    def start_anew(self):
        """Begin another block: whether a launch that failed has moved `place` on is not known."""
        self._left = []


def send(numbers):
    """(copy of a GPU's tensor on the host, event after which it holds the numbers), without waiting for them."""
    with on_device(numbers.device):
        event = torch.Event(numbers.device)
        there = torch.empty(numbers.shape, dtype=numbers.dtype, device="cpu", pin_memory=True)
        there.copy_(numbers, non_blocking=True)
        event.record()
    return there, event


class FirstBad:
    """The number of the first call whose loss was not finite, kept on the device.

    Attributes:
        numbers: (4) int32 on the device, see kernels/lenet/update.py: the number of that call, 0 while there is none
            and negative if every label was ignored; how many calls there were; what a group of calls remembers.
    """

    def __init__(self, device, calls=0, spoiled=False):
        self.device = device
        self.numbers = torch.tensor([0, calls, spoiled, 0], dtype=torch.int32, device=device)
        self._first, self._look, self._far = self.numbers[0], None, device.type != "cpu"

    def look(self, calls):
        """After call number `calls`: raises what `check` does for a call at most 64 calls old.

        On the CPU there is nothing to wait for. On a GPU the numbers are sent to the host in time to be there at the
        next look: only a host that is so far ahead waits for them, while the GPU has work left.
        """
        if not self._far:
            self.check()
        elif calls % LOOK_EVERY == 0:
            before, self._look = self._look, self._send()
            if before is not None:
                numbers, event = before
                event.synchronize()
                if numbers[0]:
                    self.check()

    def _send(self):
        return send(self.numbers)

    def in_group(self):
        """Whether a call of the last group was in trouble; waits for the device."""
        return bool(self.numbers[2])

    def check(self):
        """FloatingPointError if the loss of a call was not finite since the last time; waits for the device."""
        first = int(self._first)
        if first:
            self._first.zero_()
            raise not_finite(abs(first), first < 0)


def not_finite(call, ignored):
    """The FloatingPointError of a call whose loss was not finite, as all of its labels were ignored or otherwise."""
    what = "an update by gradients of zero, as torch makes it: every label was ignored" if ignored else "no update"
    return FloatingPointError(f"the loss of call {call} was not a finite number, and it made {what}")
