"""The losses of a training step's calls: their memory on the device, and the first that is not finite."""

import torch

from ..dispatch import launchers, on_device

if launchers is not None:
    from ..kernels.lenet import layout

# Losses in one allocation.
BLOCK = 64
# Calls between two checks for a loss that is not finite. What one check copies to the host is read at the next.
LOOK_EVERY = 32


def new_block(device):
    """Memory for the next losses; the kernel reads its address from device memory."""
    return torch.empty(BLOCK, dtype=torch.float32, device=device)


class Losses:
    """Gives each call's loss memory of its own, so that losses are neither copied nor overwritten.

    Attributes:
        place: (1) int64 on the device, the address that the next call's kernel writes its loss to. The kernel
            advances it, so that a captured launch needs nothing from the host but a new block now and then.
    """

    def __init__(self, device):
        self.device, self.place = device, torch.zeros(1, dtype=torch.int64, device=device)
        self._block, self._left = None, []

    def next(self):
        """The tensor () at the address in `place`, for one launch that fills it."""
        if not self._left:
            self._block = new_block(self.device)
            self.place.fill_(layout.address(self._block))
            self._left = list(self._block.unbind())[::-1]
        return self._left.pop()

    def start_anew(self):
        """Begin another block, as a launch that failed may or may not have advanced `place`."""
        self._left = []


def send(numbers):
    """(copy of a GPU's tensor on the host, event after which the copy is complete), without waiting for it."""
    with on_device(numbers.device):
        event = torch.Event(numbers.device)
        there = torch.empty(numbers.shape, dtype=numbers.dtype, device="cpu", pin_memory=True)
        there.copy_(numbers, non_blocking=True)
        event.record()
    return there, event


class FirstBad:
    """The number of the first call whose loss was not finite, kept on the device.

    Attributes:
        numbers: (4) int32 on the device, see `trouble` in kernels/lenet/update.py: the number of that call, 0 while
            there is none and negative if every label was ignored; the calls so far; whether a
            loss of this accumulation group, and whether one of its earlier calls, was not finite.
    """

    def __init__(self, device, calls=0, spoiled=False):
        self.device = device
        self.numbers = torch.tensor([0, calls, spoiled, 0], dtype=torch.int32, device=device)
        self._first, self._look, self._far = self.numbers[0], None, device.type != "cpu"

    def look(self, calls):
        """After call number `calls`: raises what `check` does for a call at most 64 calls old.

        On the CPU there is nothing to wait for. On a GPU the copy that one look starts is read at the next look: the
        host waits for it only if it is that far ahead, while the GPU still has work queued.
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
        """Whether a call of the last group had a loss that was not finite; waits for the device."""
        return bool(self.numbers[2])

    def check(self):
        """FloatingPointError if a call since the last check had a loss that was not finite; waits for the device."""
        first = int(self._first)
        if first:
            self._first.zero_()
            raise not_finite(abs(first), first < 0)


def not_finite(call, ignored):
    """The FloatingPointError for a call whose loss was not finite; `ignored`: because every label was ignored."""
    what = "an update by gradients of zero, as torch makes it: every label was ignored" if ignored else "no update"
    return FloatingPointError(f"the loss of call {call} was not a finite number, and it made {what}")
