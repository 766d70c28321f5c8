"""Launches every kernel on small tensors, forward and backward, for the sanitizers:

    compute-sanitizer --tool memcheck python -m bench.machine_code.every_kernel

Fails if a kernel was not launched, so that none is forgotten.
"""

import sys
from unittest import mock

import torch

import tritonnet
import tritonnet.nn.functional as F
from tritonnet.dispatch import float32_products
from tritonnet.kernels import launchers, product
from tritonnet.nn import _norm

DTYPES = torch.float32, torch.float16, torch.bfloat16
# The batch of a step on a GPU, too large to be captured: captures are not possible with the sanitizers' allocations.
BATCH = 8192


def calls(t):
    """Results to differentiate; t(*size) makes an input. Sizes are odd, to reach the edges of tiles."""
    x, images = t(5, 7), t(3, 4, 9, 11)
    w, b = t(6, 4, 3, 3), t(6)
    last = images.to(memory_format=torch.channels_last)
    yield F.relu(images)
    yield F.relu_(images * 2)
    yield F.linear(x, t(9, 7), t(9))
    yield F.linear_relu(x, t(9, 7), t(9))
    yield F.conv2d(images, w, b, stride=2, padding=1)
    yield F.conv2d(last, w, b, padding=1, dilation=2)
    yield F.conv2d(last, t(4, 1, 3, 3), padding="same", groups=4)
    yield F.conv2d(last, t(4, 1, 7, 7), b[:4], stride=2, padding=3, groups=4)
    yield F.conv2d(images[..., :10], t(4, 1, 5, 5), padding=2, groups=4)
    yield F.conv2d_relu(last, w, b)
    yield F.conv2d_epilogue(last, w, b, scale=t(6), residual=t(3, 6, 7, 9), activation="silu")
    yield F.linear_epilogue(x, t(9, 7), mean=t(9), activation="gelu")
    yield F.epilogue(images, shift=t(4), residual=last, activation="hardswish")
    yield F.batch_norm_epilogue(images, None, None, t(4), t(4), True, activation="silu")
    yield F.batch_norm_epilogue(last, None, None, t(4), t(4), True, residual=images, activation="relu")
    yield F.squeeze_excite(last.detach(), t(3, 4).detach(), None, t(4, 3).detach(), None) * images
    yield F.conv2d_relu_max_pool2d(images, w, b, padding=1)
    yield F.conv2d_relu_max_pool2d(last, w, b, padding=1, pool_kernel_size=3)
    yield F.linear_chain(x, (t(9, 7), t(4, 9)), (t(9), t(4)))
    yield F.max_pool2d(last, 3, 2, 1)
    yield F.max_pool2d(images[..., :10], 3, 2, 1)
    yield F.max_pool2d(images, 3, dilation=2)
    yield F.max_pool2d(images, 2, return_indices=True)[0]
    yield F.avg_pool2d(last, 3, 2, 1, count_include_pad=False)
    yield F.avg_pool2d(images[..., :10], 3, 2, 1)
    yield F.avg_pool2d(images, 5, 3, 2, ceil_mode=True)
    yield F.adaptive_avg_pool2d(last, (4, 3))
    yield F.adaptive_avg_pool2d(images, 1)
    yield F.cross_entropy(x, torch.arange(5, device=x.device))
    yield F.cross_entropy(x, torch.arange(5, device=x.device), reduction="none", ignore_index=1)
    for mode in ("reflect", "replicate", "circular"):
        yield tritonnet.nn.Conv2d(4, 2, 3, padding=1, padding_mode=mode).to(x)(images)
    # Long sums are split between programs, and another kernel adds them up.
    yield F.linear(t(4096, 8), t(8, 8), t(8))
    yield F.cross_entropy(t(4096, 10), torch.arange(4096, device=x.device) % 10)
    # Descriptors are for large products; the patch holds until the caller has also run the backward.
    with mock.patch.object(product, "LARGE", 1):
        yield F.linear(t(37, 24), t(40, 24), t(40))
        yield F.conv2d(t(3, 24, 5, 7).to(memory_format=torch.channels_last), t(40, 24, 1, 1), t(40))
        for size in (1, 3):
            yield _norm.norm_conv2d(t(3, 24, 5, 7), None, (None, None, 0.0), t(40, 24, size, size))[0]


def train(device, batch):
    model = tritonnet.LeNet().to(device)
    step = tritonnet.TrainStep(model, torch.nn.CrossEntropyLoss(), torch.optim.SGD(model.parameters(), lr=0.01))
    step(torch.randn(batch, 1, 32, 32, device=device), torch.arange(batch, device=device) % 10)


def launch_all(device, batch):
    """Every launch on a device; `batch` is that of the training step."""
    for dtype in DTYPES:

        def t(*size, dtype=dtype):
            return torch.randn(size, device=device, dtype=dtype, requires_grad=True)

        for y in calls(t):
            y.backward(torch.randn_like(y))
    # What only full float32 launches.
    with float32_products("ieee"):
        images = torch.randn(3, 4, 9, 11, device=device)
        F.conv2d(images, torch.randn(6, 4, 3, 3, device=device))
        F.conv2d_relu_max_pool2d(images, torch.randn(6, 4, 3, 3, device=device))
    # What only second derivatives launch.
    x = torch.randn(2, 2, 6, 6, device=device, requires_grad=True)
    (dx,) = torch.autograd.grad(F.max_pool2d(x, 2).square().sum(), x, create_graph=True)
    dx.sum().backward()
    F.max_pool2d(x, 2, return_indices=True)
    F.max_pool2d(x.detach(), 2)
    if hasattr(tritonnet, "TrainStep"):
        train(device, batch)


def main():
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    with tritonnet.backend("triton"), tritonnet.count_launches() as launches:
        launch_all(device, BATCH if device == "cuda" else 2)
    if device == "cuda":
        torch.cuda.synchronize()
    print(", ".join(f"{name} {count}" for name, count in sorted(launches.items())))
    absent = set() if product.described() else {"product_kernel"}
    if forgotten := {kernel.fn.__name__ for kernel in launchers.KERNELS} - absent - set(launches):
        sys.exit(f"never launched: {', '.join(sorted(forgotten))}")


if __name__ == "__main__":
    main()
