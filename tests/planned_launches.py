"""Compares planned launches with Triton's own on a GPU that does nothing: see test_launching.py.

Consecutive calls differ in one property, such as alignment. Each is made twice, so that the second uses the plan that
the first has left, and then once more through Triton.
"""

import collections
import contextlib
import itertools
import json
import sys
from unittest import mock

import torch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

import tritonnet
from bench.no_launch import gpu_that_does_nothing
from tritonnet.kernels import launchers, launching, product

ZEROS = (1, 1), (0, 0, 0, 0), (1, 1), 1, "zeros"
POOL = (2, 2), (2, 2), (0, 0)
WINDOW = (2, 2), (2, 2), (0, 0), (1, 1)


def tensors(dtype):
    """Functions that make a tensor of a size, in variants for which Triton compiles different kernels."""

    def shifted(*size):
        return torch.empty(torch.Size(size).numel() + 1, dtype=dtype)[1:].view(size)

    def channels_last(*size):
        format = torch.channels_last if len(size) == 4 else torch.contiguous_format
        return torch.empty(size, dtype=dtype, memory_format=format)

    def gaps(*size):
        return torch.empty([2 * n + 1 for n in size], dtype=dtype)[tuple(slice(1, None, 2) for _ in size)]

    return lambda *size: torch.empty(size, dtype=dtype), shifted, channels_last, gaps


def calls(t):
    """Launchers' calls on tensors made by t, of sizes 1, divisible by 16, not divisible, and so on."""
    for m, k, n in ((16, 32, 16), (17, 32, 16), (16, 33, 16), (1, 32, 16), (16, 1, 1), (4096, 32, 48)):
        x, w, b = t(m, k), t(n, k), t(n)
        yield launchers.linear, x, w, b
        yield launchers.linear, x, w, None
        yield launchers.linear_relu, x, w, b
        yield launchers.linear, x.t().contiguous().t(), w, b
        yield launchers.linear_weight_grad, t(m, n), x, True
        yield launchers.linear_weight_grad, t(m, n), x, False
        yield launchers.relu, x
        yield launchers.relu_grad, x, t(m, k)
        for smoothing, ignored in ((0.0, -100), (0.1, -100), (0.1, 1)):
            for reduction in ("mean", "sum", "none"):
                target = torch.empty(m, dtype=torch.int64)
                yield launchers.cross_entropy, t(m, n), target, None, reduction, ignored, smoothing
        yield launchers.cross_entropy, t(m, n), torch.empty(m, dtype=torch.uint8), t(n), "mean", -100, 0.0
        for dloss, ignored in ((t(1)[0], -100), (t(1)[0], 1), (t(m), 1), (t(1).expand(m), 1)):
            yield launchers.cross_entropy_grad, dloss, t(m, n), torch.empty(m, dtype=torch.int64), ignored
        layers = t(n, k), t(n), t(16, n), t(16), None, None, None, None
        yield launchers.linear_chain, x, *layers, True
        yield launchers.linear_chain, x, *layers, False
        hidden = t(m, n)
        yield launchers.linear_chain_input_grad, t(m, 16), hidden, t(n, k), t(16, n), None, None, True
        yield launchers.linear_chain_weight_grad, t(m, 16), hidden, x, hidden, (n,), True
    sizes = (2, 1, 12, 6), (2, 3, 12, 6), (3, 3, 12, 6), (2, 16, 16, 16), (2, 17, 16, 16), (40, 32, 16, 17)
    for n, c, h, oc in sizes:
        q = (h - 2) // 2
        x, w, b, dy = t(n, c, h, h), t(oc, c, 3, 3), t(oc), t(n, oc, h - 2, h - 2)
        yield launchers.conv2d, x, w, b, *ZEROS
        yield launchers.conv2d, x, w, None, *ZEROS
        yield launchers.conv2d, x, w, b, (2, 1), (1, 1, 1, 1), (1, 2), 1, "reflect"
        yield launchers.conv2d_relu, x, w, b, *ZEROS
        yield launchers.conv2d_partials, x, w, *ZEROS
        yield launchers.conv2d_input_grad, dy, w, x.shape, *ZEROS
        yield launchers.conv2d_weight_grad, dy, x, w.shape, *ZEROS, True
        yield launchers.conv2d_relu_weight_grad, dy, torch.empty_like(dy), x, w.shape, *ZEROS, True
        y, code = t(n, oc, q, q), torch.empty(n, oc, q, q, dtype=torch.uint8)
        yield launchers.conv2d_relu_max_pool2d, x, w, b, *ZEROS, *POOL, False
        yield launchers.conv2d_relu_max_pool2d, x, w, None, *ZEROS, *POOL, False
        yield launchers.conv2d_relu_max_pool2d_input_grad, y, code, w, x.shape, *ZEROS, *POOL
        yield launchers.conv2d_relu_max_pool2d_weight_grad, y, code, x, w.shape, *ZEROS, *POOL, True
        yield launchers.max_pool2d, x, *WINDOW, False
        yield launchers.max_pool2d, x, (3, 3), *WINDOW[1:], True
        yield launchers.max_pool2d_values, x, *WINDOW, False
        yield launchers.max_pool2d_scatter, y, code, (h - 2, h - 2), *WINDOW
        yield launchers.max_pool2d_indices, code, h, *WINDOW
        yield launchers.avg_pool2d, x, *WINDOW[:3], False, True, None
        yield launchers.avg_pool2d, x, (3, 3), (2, 2), (1, 1), True, False, None
        yield launchers.avg_pool2d_grad, y, (h - 2, h - 2), *WINDOW[:3], False, True, None, h % 2 == 0
        yield launchers.avg_pool2d_grad, y, (3 * q, 3 * q), (3, 3), (3, 3), (0, 0), False, True, 5, False
        yield launchers.adaptive_avg_pool2d, x, (1, 1)
        yield launchers.adaptive_avg_pool2d, x, (5, 7)
        yield launchers.adaptive_avg_pool2d_grad, t(n, oc, 1, 1), (h, h), h % 2 == 0
        depthwise = (1, 1), (1, 1, 1, 1), (1, 1), c, "zeros"
        yield launchers.conv2d, x, t(2 * c, 1, 3, 3), t(2 * c), *depthwise
        yield launchers.conv2d_input_grad, t(n, 2 * c, h, h), t(2 * c, 1, 3, 3), x.shape, *depthwise
        yield launchers.conv2d_weight_grad, t(n, 2 * c, h, h), x, (2 * c, 1, 3, 3), *depthwise, True


def huge():
    """Tensors whose offsets need 64 bits, in virtual memory only."""
    x = torch.empty(2**31 + 16, dtype=torch.float16)
    yield launchers.relu, x
    yield launchers.relu, x[: 2**20]
    yield launchers.linear, x.view(-1, 16), torch.empty(1, 16, dtype=torch.float16), None
    yield launchers.linear, x[: 2**31 - 2**21].view(-1, 16), torch.empty(1, 16, dtype=torch.float16), None


def every_call():
    for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
        made = [list(calls(t)) for t in tensors(dtype)]
        # One call in all layouts before the next.
        yield from itertools.chain(*zip(*made))
    yield from huge()


# Integers are below it, addresses above.
ADDRESS = 2**40
launched, inputs, in_full, noting = [], set(), collections.Counter(), True
real_launch = launching.launch


def note(x, y, z, stream, name, metadata, launch_metadata, enter, leave, *args):
    """Records a launch, without the addresses of new tensors, which differ from call to call."""
    if not noting:
        return
    args = [arg.data_ptr() if isinstance(arg, torch.Tensor) else arg for arg in args]
    for i, arg in enumerate(args):
        if isinstance(arg, TensorDescriptor):
            args[i] = arg.base.data_ptr()
            args.append((tuple(arg.shape), tuple(arg.strides), tuple(arg.block_shape), arg.padding))
    args = ["new" if isinstance(arg, int) and arg >= ADDRESS and arg not in inputs else arg for arg in args]
    launched.append((x, y, z, stream, name, metadata, args))


def note_in_full(kernel, *args, **options):
    in_full[kernel.fn.__name__] += 1
    return real_launch(kernel, *args, **options)


def made(call):
    """The launches of a call."""
    function, *args = call
    inputs.clear()
    inputs.update(arg.data_ptr() for arg in args if isinstance(arg, torch.Tensor))
    launched.clear()
    function(*args)
    return list(launched)


@contextlib.contextmanager
def through_triton():
    """Inside, launches go through Triton, as they do whenever a hook watches them."""
    with tritonnet.count_launches():
        yield


def compare(calls):
    """Makes every call twice, and once more through Triton.

    Returns (launches, distinct kernels, calls that did not launch the same, full launches of the second time).
    """
    calls = list(calls)
    first = [made(call) for call in calls]
    before = in_full.total()
    again = [made(call) for call in calls]
    in_full_again = in_full.total() - before
    with through_triton():
        full = [made(call) for call in calls]
    wrong = [str(call[0]) for call, a, b, c in zip(calls, first, again, full) if not a == b == c]
    kernels = {launch[4] for launches in full for launch in launches}
    return sum(map(len, full)), len(kernels), wrong, in_full_again


def hashes(order):
    """{kernel: hash of its source}, as Triton computes it when it has seen no source before."""
    for function in (value for module in list(sys.modules.values()) for value in vars(module).values()):
        if isinstance(function, JITFunction):
            function.hash, function.used_global_vals = None, {}
    for kernel in order:
        launching.settle(kernel)
    return {kernel.fn.__name__: kernel.hash for kernel in order}


def python_calls(function):
    """How many Python and C functions a call of `function` calls: a cost that does not depend on the machine."""
    count = 0

    def profile(frame, event, arg):
        nonlocal count
        count += event in ("call", "c_call")

    function()
    sys.setprofile(profile)
    try:
        function()
    finally:
        sys.setprofile(None)
    return count


result = {}
with gpu_that_does_nothing(launch=note) as gpu, mock.patch.object(launching, "launch", note_in_full):
    result["calls"] = compare(every_call())
    # The same calls in another precision, on another device, and on another architecture.
    matrices = [call for t in tensors(torch.float32) for call in calls(t)]
    with tritonnet.dispatch.float32_products("tf32"):
        result["tf32"] = compare(matrices)
    # Operands by tensor descriptors, where they are aligned.
    halves = [call for t in tensors(torch.float16) for call in calls(t)]
    with mock.patch.object(product, "LARGE", 0):
        result["descriptors"] = compare(halves)
    gpu.get_current_device, target, gpu.target = lambda: 1, gpu.target, GPUTarget("cuda", 80, 32)
    result["another device"] = compare(matrices)
    gpu.get_current_device, gpu.target = lambda: 0, target

    x, w = torch.empty(16, 16), torch.empty(16, 16)
    plain = made((launchers.linear, x, w, None))
    before = in_full.total()
    with mock.patch.object(knobs.runtime, "debug", True):
        result["debugging"] = made((launchers.linear, x, w, None))[0][4] != plain[0][4]
    knobs.runtime.launch_enter_hook.add(print)
    made((launchers.linear, x, w, None))
    knobs.runtime.launch_enter_hook.remove(print)
    for _ in range(2):
        made((launchers.linear, x, w, torch.empty(16, device="meta")))
    result["in full"] = in_full.total() - before
    net, images = tritonnet.LeNet().eval(), torch.empty(2, 1, 32, 32)
    with torch.no_grad():
        functions = {"linear": lambda: launchers.linear(x, w, None), "LeNet": lambda: net(images)}
        noting = False
        result["python calls"] = {name: python_calls(function) for name, function in functions.items()}
        noting = True
        net.to(memory_format=torch.channels_last)
        before = len(launched)
        net(images)
        result["launches of a LeNet in channels_last"] = len(launched) - before

    launching.forget()
    with mock.patch.object(launching, "MOST_KEPT", 8):
        for n in range(1, 30):
            made((launchers.linear, torch.empty(n, 5), torch.empty(7, 5), None))
    result["kept"] = max(map(len, launching._kept))
result["hashes"] = [hashes(order) for order in (launchers.KERNELS, launchers.KERNELS[::-1])]
print(json.dumps(result))
