"""How long a call takes: medians over pairs of events, cycling over tensors that do not fit in the caches."""

import contextlib
import functools
import gc
import itertools
import statistics
import time
from typing import NamedTuple

import torch

from . import FORMATS

# A pair of events spans about this long, so that one late launch counts little.
SPAN_MS = 0.5
FEWEST, MOST = 10, 200  # pairs of events
# Calls queued at once. Each may have some tens of launches, and a GPU's queue holds about a thousand.
MOST_QUEUED = 10


class Timing(NamedTuple):
    """Milliseconds of one call: the median, and the quartiles around it."""

    ms: float
    low: float
    high: float


class Cuda:
    """The current GPU: events in its queue, and CUDA graphs."""

    torch_device = torch.device("cuda")
    synchronize = staticmethod(torch.cuda.synchronize)

    def __init__(self):
        self.l2_bytes = torch.cuda.get_device_properties().L2_cache_size
        # Objects from importing torch and Triton are not collected: scanning them would take `allocated` 0.1 s a call.
        gc.collect()
        gc.freeze()

    def mark(self):
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def milliseconds(self, start, end):
        return start.elapsed_time(end)

    def capture(self, steps):
        """(replay, first): a function that runs all of `steps` as one CUDA graph, and the result of the first."""
        current, stream = torch.cuda.current_stream(), torch.cuda.Stream()
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            for step in steps[:3]:
                step()
        current.wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                first = steps[0]()  # kept, so that no later step reuses its memory
                for step in steps[1:]:
                    step()
        finally:
            # If ending the capture fails, torch leaves its stream the current one, for everything timed later.
            torch.cuda.set_stream(current)
        return graph.replay, first

    def free_bytes(self):
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info()[0]

    def allocated(self):
        """Bytes that tensors hold, after unreachable ones are collected."""
        gc.collect()
        return torch.cuda.memory_allocated()

    def peak_bytes(self, call):
        """The most bytes that tensors hold while call() runs."""
        torch.cuda.reset_peak_memory_stats()
        call()
        self.synchronize()
        return torch.cuda.max_memory_allocated()


class Host:
    """The CPU, timed by the wall clock; it has no graphs and does not count memory."""

    torch_device = torch.device("cpu")
    l2_bytes = 0
    capture = None
    allocated = peak_bytes = None

    def synchronize(self):
        pass

    def mark(self):
        return time.perf_counter()

    def milliseconds(self, start, end):
        return (end - start) * 1e3

    def free_bytes(self):
        return 2**28


@contextlib.contextmanager
def precision(format):
    """Inside, torch and tritonnet compute float32 products of convolutions and matrices as `format` says.

    It sets torch's older flags, because Inductor reads them, and reading them raises once the newer flags have set
    "ieee". The previous values are read from the newer flags, which never raise.
    """
    previous = [owner.fp32_precision == "tf32" for owner in (torch.backends.cudnn.conv, torch.backends.cuda.matmul)]
    tf32 = FORMATS[format][1] == "tf32"
    torch.backends.cudnn.allow_tf32 = tf32
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = previous[0]
        torch.set_float32_matmul_precision("high" if previous[1] else "highest")


def copies(size, device):
    """How many sets of inputs of `size` bytes overflow the device's L2 cache, so that none is there when it is used."""
    return device.l2_bytes // size + 1


def measure(steps, device, seconds=0.1):
    """The Timing of one call of `steps`, which do the same work on tensors of their own and take turns.

    Args:
        steps: functions without arguments; each is called once before it is timed, which compiles and tunes.
        seconds: how long to measure, about.
    """
    for step in steps:
        step()
    turns = itertools.cycle(steps)

    def span(calls):
        start = device.mark()
        for _ in range(calls):
            next(turns)()
        return start, device.mark()

    device.synchronize()
    pilot = span(3)
    device.synchronize()
    ms = device.milliseconds(*pilot) / 3
    calls = max(1, round(SPAN_MS / ms))
    spans = [span(calls) for _ in range(int(min(MOST, max(FEWEST, seconds * 1e3 / (calls * ms)))))]
    device.synchronize()
    return _quartiles([device.milliseconds(*s) / calls for s in spans])


def _quartiles(times):
    low, median, high = statistics.quantiles(times, n=4)
    return Timing(median, low, high)


def measure_graph(steps, device, seconds=0.1):
    """(Timing of one call of `steps` inside one CUDA graph of them all, result of the first of them)."""
    replay, first = device.capture(steps)
    return Timing(*(ms / len(steps) for ms in measure([replay], device, seconds))), first


def measure_host(steps, device, seconds=0.1):
    """The Timing of one call of `steps` on the host, until it returns; the device is synchronized between spans.

    A span is short enough to fit in the device's queue.
    """
    turns = itertools.cycle(steps)

    def span():
        """Seconds until the calls have returned, and until the device has finished them."""
        start = time.perf_counter()
        for _ in range(MOST_QUEUED):
            next(turns)()
        returned = time.perf_counter()
        device.synchronize()
        return returned - start, time.perf_counter() - start

    device.synchronize()
    _, whole = span()
    spans = [span() for _ in range(int(min(MOST, max(3, seconds / whole))))]
    return _quartiles([returned / MOST_QUEUED * 1e3 for returned, _ in spans])


def ceilings(formats, device, size=8192):
    """The highest rates of the device: bytes/s of a large copy, FLOP/s of a product of `size` x `size` by format.

    Returns:
        {"bytes_per_s": float, "flops_per_s": {format: float}}
    """
    rates = {}
    for format in formats:
        with precision(format):
            rates[format] = _product_rate(FORMATS[format][0], size, device)
    return {"bytes_per_s": _copy_rate(device), "flops_per_s": rates}


def _copy_rate(device):
    source = torch.randn(min(2**28, device.free_bytes() // 16), device=device.torch_device)
    copy = functools.partial(torch.empty_like(source).copy_, source)
    return 2 * source.nbytes / measure([copy], device).ms * 1e3


def _product_rate(dtype, size, device):
    a, b = (torch.randn(size, size, device=device.torch_device).to(dtype) for _ in range(2))
    product = functools.partial(torch.mm, a, b, out=torch.empty_like(a))
    return 2 * size**3 / measure([product], device).ms * 1e3
