"""Times each kernel against torch's eager operator on one GPU:  python bench/kernels.py [--dtype bfloat16]

Each line is first checked against float64, then timed: the median over device events, forward and forward with
backward, in milliseconds. Inputs are random and outputs are rewritten in every repetition.
"""

import argparse
import datetime

import torch
import torch.nn.functional as TF
import triton
import triton.testing

import tritonnet
import tritonnet.nn.functional as F

# The error that a sum of this many rounded operands may show, relative to the norm of the result.
TOLERANCE = {"float64": 1e-12, "float32": 2e-3, "float16": 2e-3, "bfloat16": 1e-2}


def cases(dtype):
    """(name, function of a module of functionals, inputs)."""

    def t(*size):
        return torch.randn(size, device="cuda").to(dtype)

    def last(x):
        return x.contiguous(memory_format=torch.channels_last)

    for name, size, filters, arguments in (
        ("LeNet conv1, batch 1024", (1024, 1, 32, 32), (6, 1, 5, 5), {}),
        ("LeNet conv2, batch 1024", (1024, 6, 14, 14), (16, 6, 5, 5), {}),
        ("ResNet stem", (64, 3, 224, 224), (64, 3, 7, 7), dict(stride=2, padding=3)),
        ("ResNet 3x3, 64 channels", (64, 64, 56, 56), (64, 64, 3, 3), dict(padding=1)),
        ("ResNet 3x3, 256 channels", (64, 256, 14, 14), (256, 256, 3, 3), dict(padding=1)),
        ("ResNet 3x3, stride 2", (64, 128, 56, 56), (128, 128, 3, 3), dict(padding=1, stride=2)),
        ("ResNet 1x1", (64, 256, 56, 56), (64, 256, 1, 1), {}),
        ("depthwise 3x3", (64, 144, 56, 56), (144, 1, 3, 3), dict(padding=1, groups=144)),
    ):
        x, w = t(*size), t(*filters) / filters[1] ** 0.5
        yield f"conv2d {name}, NCHW", lambda f, x, w, a=arguments: f.conv2d(x, w, **a), (x, w)
        yield f"conv2d {name}, channels_last", lambda f, x, w, a=arguments: f.conv2d(x, w, **a), (last(x), last(w))
    x = t(64, 64, 112, 112)
    yield "max_pool2d 3x3 stride 2", lambda f, x: f.max_pool2d(x, 3, 2, 1), (x,)
    yield "max_pool2d 3x3 stride 2, channels_last", lambda f, x: f.max_pool2d(x, 3, 2, 1), (last(x),)
    yield "relu", lambda f, x: f.relu(x), (x,)
    for M, K, N in ((1024, 400, 120), (4096, 4096, 4096)):
        yield f"linear {M} x {K} x {N}", lambda f, x, w, b: f.linear(x, w, b), (t(M, K), t(N, K), t(N))


def relative_error(call, inputs):
    """How far our result lies from float64, by norms."""
    truth = call(TF, *(t.double() for t in inputs))
    return ((call(F, *inputs).double() - truth).norm() / truth.norm()).item()


def measure(call, f, inputs):
    """Median milliseconds of forward, and of forward and backward."""
    leaves = [t.detach().requires_grad_() for t in inputs]
    dy = torch.randn_like(call(f, *leaves))
    with torch.no_grad():
        forward = triton.testing.do_bench(lambda: call(f, *inputs), return_mode="median")
    both = triton.testing.do_bench(lambda: torch.autograd.grad(call(f, *leaves), leaves, dy), return_mode="median")
    return forward, both


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", choices=list(TOLERANCE), default="bfloat16")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("a GPU is needed: nothing is timed in the interpreter")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}, "
          f"tritonnet {tritonnet.__version__}, {args.dtype}, {datetime.date.today()}")  # fmt: skip
    print(f"{'':52} {'forward ms':>23}   {'forward + backward ms':>23}")
    print(f"{'':52} {'ours':>7} {'torch':>7} {'ratio':>7}   {'ours':>7} {'torch':>7} {'ratio':>7}")
    for name, call, inputs in cases(getattr(torch, args.dtype)):
        error = relative_error(call, inputs)
        if not error < TOLERANCE[args.dtype]:
            print(f"{name:52} WRONG: relative error {error:.2g}")
            continue
        (ours, ours_both), (theirs, theirs_both) = measure(call, F, inputs), measure(call, TF, inputs)
        print(f"{name:52} {ours:7.3f} {theirs:7.3f} {theirs / ours:7.2f}   "
              f"{ours_both:7.3f} {theirs_both:7.3f} {theirs_both / ours_both:7.2f}", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
