"""The launches that are compiled: every tile in every format for every architecture.

What the other constants switch (memory orders, widths, outputs that are not asked for) is compiled in bfloat16
everywhere and in tf32 and float32 for sm_90. A brief run leaves out second programs of a kernel, tile and format.
"""

from types import SimpleNamespace

import torch

import tritonnet  # noqa: F401  (tritonnet.kernels needs its parent)
from tritonnet.kernels import _common, launchers, linear, product
from tritonnet.kernels import shapes as kernel_shapes
from tritonnet.kernels import tiles as tile_tables
from tritonnet.kernels.conv2d import patches
from tritonnet.kernels.lenet import forward as lenet_forward
from tritonnet.kernels.lenet import gradient as lenet_gradient
from tritonnet.kernels.lenet import layout as lenet
from tritonnet.kernels.lenet import pack as lenet_pack
from tritonnet.kernels.lenet import update as lenet_update
from tritonnet.kernels.linear_chain import fused as linear_chain
from tritonnet.kernels.tile_tables import NARROW

from .. import FORMATS

# The architecture and the formats for which bounds on times are computed.
BOUNDED = "sm_90", ("bfloat16", "tf32", "float32")
# (format, case) of shapes of which --once has every launch.
MAIN = {
    ("bfloat16", case)
    for case in ("ResNet 3x3, 64", "ResNet 3x3, 256", "ResNet NCHW 3x3, 64", "ResNet 1x1, 64 to 256", "linear 4096^3")
}
# The formats of LeNet's launches.
LENET = "bfloat16", "tf32", "float32"


class Calls:
    """Launcher calls over tensors of one dtype, in virtual memory only: no kernel runs and no page is touched."""

    def __init__(self, dtype):
        self.dtype = dtype

    def tensor(self, *size, last=False):
        layout = torch.channels_last if last and len(size) == 4 else torch.contiguous_format
        return torch.empty(size, dtype=self.dtype, memory_format=layout)

    def conv(self, n, c, h, oc, k, stride=1, pad=None, dilation=1, groups=1, mode="zeros", last=True, bias=False):
        """Forward and both gradients."""
        pad = dilation * (k // 2) if pad is None else pad
        g = ((stride, stride), (pad,) * 4, (dilation, dilation), groups, mode)
        x, w = self.tensor(n, c, h, h, last=last), self.tensor(oc, c // groups, k, k, last=last)
        dy = launchers.conv2d(x, w, self.tensor(oc) if bias else None, *g)
        launchers.conv2d_input_grad(dy, w, x.shape, *g)
        launchers.conv2d_weight_grad(dy, x, w.shape, *g, bias)

    def normed(self, n, c, h, oc, k, activation, stride=1, groups=1, last=True, residual=False):
        """Forward with batch norm, perhaps a residual, and an activation in the epilogue."""
        x, w = self.tensor(n, c, h, h, last=last), self.tensor(oc, c // groups, k, k, last=last)
        g = (stride, stride), (k // 2,) * 4, (1, 1), groups, "zeros"
        size = kernel_shapes.conv2d_size((h, h), (k, k), *g[:3])
        added = self.tensor(n, oc, *size, last=last) if residual else None
        vectors = [torch.empty(oc) for _ in range(4)]
        launchers.conv2d_epilogue(x, w, None, *g, *vectors, added, 1e-5, activation, 0.0)

    def with_statistics(self, n, c, h, oc, k, stride=1, last=True):
        """Forward that stores the statistics of its tiles."""
        x, w = self.tensor(n, c, h, h, last=last), self.tensor(oc, c, k, k, last=last)
        launchers.conv2d_partials(x, w, (stride, stride), (k // 2,) * 4, (1, 1), 1, "zeros")

    def linear_normed(self, m, k, n, activation):
        """Forward with all parts of an epilogue."""
        vectors = [torch.empty(n) for _ in range(4)]
        tensors = self.tensor(m, k), self.tensor(n, k), self.tensor(n)
        launchers.linear_epilogue(*tensors, *vectors, self.tensor(m, n), 1e-5, activation, 0.0)

    def elementwise(self, *size, last):
        """An epilogue alone with all its parts, an activation in place, and the gradient of another."""
        x, vectors = self.tensor(*size, last=last), [torch.empty(size[1]) for _ in range(4)]
        launchers.epilogue(x, *vectors, x, 1e-5, "relu", 0.0)
        launchers.activate_(x, "silu", 0.0)
        launchers.activation_grad(x, x, "hardswish", 0.0)

    def batch_norm(self, *size, activation, last, residual=False):
        """The statistics of a batch, its norm in front of an activation, and the gradients.

        With a residual, y decides the activation's derivative, and the residual's gradient is stored.
        """
        x, C = self.tensor(*size, last=last), size[1]
        mean, var = launchers.tracked_statistics(x, None, torch.empty(C), torch.empty(C), 0.1)
        vectors, values = (mean, var, torch.empty(C), torch.empty(C)), (1e-5, activation, 0.0)
        y = launchers.batch_norm(x, *vectors, x if residual else None, *values)
        launchers.batch_norm_grad(y, x, y if residual else None, *vectors, *values, residual, False)

    def conv_pool(self, n, c, h, oc, k, pad=0, pool=(2, 2, 0), last=True, gradients=False):
        """Forward through relu and pooling, whose window, stride and padding are `pool`, and both gradients."""
        x, w = self.tensor(n, c, h, h, last=last), self.tensor(oc, c, k, k, last=last)
        g = ((1, 1), (pad,) * 4, (1, 1), 1, "zeros", *((value, value) for value in pool))
        y, code = launchers.conv2d_relu_max_pool2d(x, w, self.tensor(oc), *g, False)
        if gradients:
            launchers.conv2d_relu_max_pool2d_input_grad(y, code, w, x.shape, *g)
            launchers.conv2d_relu_max_pool2d_weight_grad(y, code, x, w.shape, *g, True)

    def conv_forward(self, c, oc, k, d):
        """Forward alone, with dilation d: the product is (40960, c * k * k) x (c * k * k, oc)."""
        x, w = self.tensor(40, c, 32, 32, last=True), self.tensor(oc, c, k, k, last=True)
        launchers.conv2d(x, w, self.tensor(oc), (1, 1), (d * (k // 2),) * 4, (d, d), 1, "zeros")

    def conv_input_grad(self, c, oc, k, d):
        """The input's gradient alone: (40960, oc * k * k) x (oc * k * k, c)."""
        dy, w = self.tensor(40, oc, 32, 32, last=True), self.tensor(oc, c, k, k, last=True)
        launchers.conv2d_input_grad(dy, w, (40, c, 32, 32), (1, 1), (d * (k // 2),) * 4, (d, d), 1, "zeros")

    def conv_strided_input_grad(self, c, oc):
        """The input's gradient in NCHW for a stride of 2, whose results have addresses of their own."""
        dy, w = self.tensor(40, oc, 32, 32), self.tensor(oc, c, 3, 3)
        launchers.conv2d_input_grad(dy, w, (40, c, 64, 64), (2, 2), (1,) * 4, (1, 1), 1, "zeros")

    def conv_weight_grad(self, c, oc, k, d):
        """The weight's gradient alone: (oc, pixels) x (pixels, c * k * k)."""
        dy, x = self.tensor(32, oc, 32, 32, last=True), self.tensor(32, c, 32, 32, last=True)
        launchers.conv2d_weight_grad(dy, x, (oc, c, k, k), (1, 1), (d * (k // 2),) * 4, (d, d), 1, "zeros", True)

    def pool(self, size, kernel, stride, pad, last, dilation=1, all=True):
        window = ((kernel, kernel), (stride, stride), (pad, pad), (dilation, dilation))
        x = self.tensor(*size, last=last)
        y, code = launchers.max_pool2d(x, *window, False)
        launchers.max_pool2d_scatter(y, code, size[2:], *window)
        if all:
            launchers.max_pool2d_gather(x, code, *window)
            launchers.max_pool2d_indices(code, size[3], *window)

    def pool_values(self, size, kernel, stride, pad, last):
        x = self.tensor(*size, last=last)
        launchers.max_pool2d_values(x, (kernel, kernel), (stride, stride), (pad, pad), (1, 1), False)

    def means(self, size, kernel, stride, pad, last, include_pad=True):
        """The means of windows, and their gradient."""
        window = ((kernel, kernel), (stride, stride), (pad, pad), False, include_pad, None)
        y = launchers.avg_pool2d(self.tensor(*size, last=last), *window)
        launchers.avg_pool2d_grad(y, size[2:], *window, last)

    def bins(self, size, bins, last):
        """The means of bins, and their gradient."""
        y = launchers.adaptive_avg_pool2d(self.tensor(*size, last=last), bins)
        launchers.adaptive_avg_pool2d_grad(y, size[2:], last)

    def rows_apart(self, *size):
        """The means of images that are slices of wider ones."""
        launchers.adaptive_avg_pool2d(self.tensor(*size[:3], 2 * size[3])[..., : size[3]], (1, 1))

    def squeeze_excite(self, size, r, last, biases=True):
        """Squeeze and excitation to r units."""
        C = size[1]
        b1, b2 = (self.tensor(r), self.tensor(C)) if biases else (None, None)
        x, w1, w2 = self.tensor(*size, last=last), self.tensor(r, C), self.tensor(C, r)
        launchers.squeeze_excite(x, w1, b1, w2, b2, "silu", "sigmoid")

    def relu(self, *size, last=False):
        y = launchers.relu(self.tensor(*size, last=last))
        launchers.relu_grad(y, y)

    def cross_entropy(self, n, c, weighted=False):
        """Forward, and backward of the loss."""
        weight = self.tensor(c) if weighted else None
        target = torch.empty(n, dtype=torch.int64)
        smoothing = 0.1 if weighted else 0.0
        loss, grad = launchers.cross_entropy(self.tensor(n, c), target, weight, "mean", -100, smoothing)
        launchers.cross_entropy_grad(loss, grad, target, -100)

    def losses_of_rows(self, n, c):
        """The gradient of a loss for each row: of contiguous rows, and of rows that are slices of wider ones."""
        target = torch.empty(n, dtype=torch.int64)
        for grad in (self.tensor(n, c), self.tensor(n, 2 * c)[:, :c]):
            launchers.cross_entropy_grad(self.tensor(n), grad, target, -100)

    def linear(self, m, k, n):
        """Forward and both gradients."""
        x, w = self.tensor(m, k), self.tensor(n, k)
        dy = launchers.linear(x, w, self.tensor(n))
        launchers.linear(dy, w.t(), None)
        launchers.linear_weight_grad(dy, x, True)

    def linear_weight_grad(self, m, k, n):
        """The weight's gradient alone."""
        launchers.linear_weight_grad(self.tensor(m, n), self.tensor(m, k), True)

    def chain(self, m, *widths, keep=True, weight_grad=True):
        """Forward with `keep` for backward, and backward where it is asked for."""
        layers = [t for k, n in zip(widths, widths[1:]) for t in (self.tensor(n, k), self.tensor(n))]
        layers += [None] * (8 - len(layers))
        x = self.tensor(m, widths[0])
        y, hidden = launchers.linear_chain(x, *layers, keep)
        if keep:
            _, dz = launchers.linear_chain_input_grad(y, hidden, *layers[0::2], True)
        if keep and weight_grad:
            launchers.linear_chain_weight_grad(y, dz, x, hidden, widths[1:-1], True)

    def lenet_net(self, n, train, channels=1, classes=10, size=32, raw=False):
        """A LeNet with n images, bytes of 28 pixels if they are raw: what its launches take, and its `forward`."""
        format = "bfloat16" if self.dtype == torch.bfloat16 else linear.precision()
        pixels = lenet_forward.Pixels((size - 28) // 2, 0.01, -0.4) if raw else lenet_forward.Pixels()
        side = 28 if raw else size
        x = torch.empty(n, channels, side, side, dtype=torch.uint8 if raw else torch.float32)
        geometry = lenet.Geometry(channels, size, (32 - size) // 2, classes)
        memory = lenet_forward.activations(n, geometry, format, "cpu", train=train)
        places = torch.empty(10, lenet.PLACES, dtype=torch.int64)
        plain, packed = torch.empty(geometry.plain[-1]), torch.empty(geometry.packed[-1], dtype=self.dtype)

        def forward(target, logits):
            lenet_forward.forward(x, target, plain, packed, geometry, format, pixels, memory, logits)

        return SimpleNamespace(
            x=x, geometry=geometry, format=format, pixels=pixels, memory=memory, places=places, plain=plain,
            packed=packed, forward=forward,
        )  # fmt: skip

    def lenet(self, n, backward=True, **images):
        """The launches of a training step of n images, or the forward alone; see lenet_net."""
        net = self.lenet_net(n, train=True, **images)
        net.forward(torch.empty(n, dtype=torch.int64), net.memory["logits"])
        if not backward:
            return
        steps, trouble = torch.empty(10, dtype=torch.int32), torch.empty(4, dtype=torch.int32)
        lenet_pack.pack(net.places, torch.float32, net.plain, net.packed, net.geometry, net.format, steps, trouble)
        splits = lenet_gradient.splits_for(net.format, n, net.geometry)
        scratch, partial = lenet_gradient.sums(net.geometry, splits, "cpu")
        lenet_gradient.gradients(
            net.x, net.packed, net.geometry, net.format, net.pixels, net.memory, splits, scratch, partial
        )
        table, numbers = torch.empty(16, lenet.COLUMNS, dtype=torch.int32), torch.empty(10, lenet.NUMBERS)
        lenet_update.update(
            net.places, net.geometry, table, numbers, steps, partial, net.memory["loss"],
            torch.empty(1, dtype=torch.int64), trouble, moments=2, rule="Adam", decoupled=True,
        )  # fmt: skip

    def lenet_inference(self, n, **images):
        """The whole forward of n images; see lenet_net."""
        net = self.lenet_net(n, train=False, **images)
        lenet_pack.pack(net.places, torch.float32, net.plain, net.packed, net.geometry, net.format)
        net.forward(None, torch.empty(n, net.geometry.classes, dtype=self.dtype))

    def rectified(self):
        """The products that end in a relu."""
        geometry = (1, 1), (1,) * 4, (1, 1)
        x = self.tensor(4, 32, 16, 16, last=True)
        launchers.conv2d_relu(x, self.tensor(32, 32, 3, 3, last=True), None, *geometry, 1, "zeros")
        launchers.conv2d_relu(x, self.tensor(32, 1, 3, 3), None, *geometry, 32, "zeros")
        launchers.linear_relu(self.tensor(256, 64), self.tensor(64, 64), None)

    def first_layer(self, last):
        """The weight's gradient of a layer with relu, whose images need no gradient: the product itself masks dy."""
        x, y = self.tensor(16, 3, 32, 32, last=last), self.tensor(16, 64, 32, 32, last=last)
        geometry = (1, 1), (1,) * 4, (1, 1), 1, "zeros"
        launchers.conv2d_relu_weight_grad(y, y, x, (64, 3, 3, 3), *geometry, True)

    def past_32_bits(self):
        """Each operator with a tensor of more than 2^31 elements."""
        big = 2**31
        self.normed(1, 16, 11600, 16, 1, "silu", residual=True)
        self.normed(1, 1, 2**15 + 1, 2, 3, "silu", last=False, residual=True)
        self.normed(1, 2, 2**15, 2, 3, "silu", groups=2, last=False, residual=True)
        self.linear_normed(big // 16, 64, 32, "silu")
        self.elementwise(1, 8, 2**14, 2**14 + 1, last=True)
        self.batch_norm(1, 8, 2**14, 2**14 + 1, activation="relu", last=True)
        self.batch_norm(1, 8, 2**14, 2**14 + 1, activation="relu", last=False)
        self.with_statistics(1, 16, 11600, 16, 1)
        self.conv(1, 16, 11600, 16, 1, bias=True)
        self.conv(1, 1, 2**15 + 1, 2, 3, pad=1, last=False)
        self.conv(1, 2, 2**15, 2, 3, groups=2, last=False)
        self.conv(1, 1, 2**15 + 1, 1, 3, mode="reflect", last=False)
        self.pool((1, 1, 2**16, 2**15 + 1), 2, 2, 0, False)
        self.means((1, 1, 2**16, 2**15 + 1), 2, 2, 0, False)
        self.means((1, 1, 2**16, 2**15 + 1), 5, 3, 2, False)
        self.bins((1, 1, 2**16, 2**15 + 1), (3, 4), False)
        self.bins((1, 1, 2**16, 2**15 + 1), (1, 1), False)
        self.conv_pool(1, 16, 11600, 16, 1)
        self.conv_pool(big // 2**10, 1, 32, 6, 5, last=False, gradients=True)
        self.cross_entropy(big // 64, 128)
        self.relu(big + 8)
        self.squeeze_excite((big // 2**10, 16, 8, 9), 4, True, biases=False)
        self.linear(big // 16, 64, 32)
        self.chain(big // 64, 64, 32, 16)


def followed(c):
    """(name, call) of layers of ResNet-50 and MobileNetV2 with what follows their product in its epilogue."""
    for name, *size, options in (
        ("ResNet 3x3, 64", 64, 64, 56, 64, 3, {"activation": "relu"}),
        ("ResNet 3x3, 64", 64, 64, 56, 64, 3, {"activation": "relu", "residual": True}),
        ("ResNet 3x3, 256", 64, 256, 14, 256, 3, {"activation": "relu"}),
        ("ResNet 1x1, 64 to 256", 64, 64, 56, 256, 1, {"activation": "relu", "residual": True}),
        ("ResNet 1x1, 64 to 256", 64, 64, 56, 256, 1, {"activation": "silu"}),
        ("ResNet 7x7/2, 3 to 64", 64, 3, 224, 64, 7, {"activation": "relu", "stride": 2}),
        ("ResNet NCHW 3x3, 64", 64, 64, 56, 64, 3, {"activation": "relu", "last": False}),
        ("ResNet NCHW 1x1, 64 to 256", 64, 64, 56, 256, 1, {"activation": "relu", "residual": True, "last": False}),
        ("depthwise 3x3, 144", 64, 144, 56, 144, 3, {"activation": "relu6", "groups": 144}),
        ("depthwise 3x3, 144", 64, 144, 56, 144, 3, {"activation": "silu", "groups": 144}),
        ("NCHW depthwise 3x3, 144", 64, 144, 56, 144, 3, {"activation": "relu6", "groups": 144, "last": False}),
    ):  # fmt: skip
        name = ", ".join([name, "norm", *["residual"] * options.get("residual", False), options["activation"]])
        yield name, lambda size=size, options=options: c.normed(*size, **options)
    for name, *size, options in (
        ("ResNet 3x3, 64", 64, 64, 56, 64, 3, {}),
        ("ResNet 3x3, 128", 64, 128, 28, 128, 3, {}),
        ("ResNet 3x3, 256", 64, 256, 14, 256, 3, {}),
        ("ResNet 3x3/2, 128", 64, 128, 56, 128, 3, {"stride": 2}),
        ("ResNet 1x1, 64 to 256", 64, 64, 56, 256, 1, {}),
        ("ResNet 1x1, 256 to 64", 64, 256, 56, 64, 1, {}),
        ("ResNet NCHW 3x3, 64", 64, 64, 56, 64, 3, {"last": False}),
        ("ResNet NCHW 3x3, 256", 64, 256, 14, 256, 3, {"last": False}),
        ("ResNet NCHW 1x1, 64 to 256", 64, 64, 56, 256, 1, {"last": False}),
    ):  # fmt: skip
        yield f"{name}, statistics", lambda size=size, options=options: c.with_statistics(*size, **options)


def shapes(c):
    """(name, call) of the shapes with bounds on times: LeNet at batch 1024 unless named, some of ResNet-50 at 64."""
    yield "LeNet conv1", lambda: c.conv(1024, 1, 28, 6, 5, pad=2, last=False, bias=True)
    yield "LeNet conv2", lambda: c.conv(1024, 6, 14, 16, 5, pad=0, last=False, bias=True)
    yield "LeNet pool", lambda: c.pool((1024, 6, 28, 28), 2, 2, 0, False, all=False)
    yield "LeNet pool, values", lambda: c.pool_values((1024, 6, 28, 28), 2, 2, 0, False)
    yield "LeNet relu", lambda: c.relu(1024, 6, 28, 28)
    yield "LeNet conv1 to pool", lambda: c.conv_pool(1024, 1, 32, 6, 5, last=False, gradients=True)
    yield "LeNet conv2 to pool", lambda: c.conv_pool(1024, 6, 14, 16, 5, last=False, gradients=True)
    yield "LeNet loss", lambda: c.cross_entropy(1024, 10)
    yield "loss of 1000 classes", lambda: c.cross_entropy(8192, 1000)
    yield "LeNet fc1", lambda: c.linear(1024, 400, 120)
    yield "LeNet fc3", lambda: c.linear(1024, 84, 10)
    # The weight gradient is left out: its programs run different code for each layer, so that it has no single bound.
    yield "LeNet head", lambda: c.chain(1024, 400, 120, 84, 10, weight_grad=False)
    yield "LeNet step", lambda: c.lenet(1024)
    yield "LeNet inference", lambda: c.lenet_inference(1024)
    # The block of images grows with the batch, and is largest here.
    yield "LeNet step, batch 65536", lambda: c.lenet(2**16)
    yield "LeNet inference, batch 65536", lambda: c.lenet_inference(2**16)
    yield "ResNet 7x7/2, 3 to 64", lambda: c.conv(64, 3, 224, 64, 7, stride=2)
    for name, *window, last in (
        ("ResNet pool 3x3/2", 3, 2, 1, True), ("NCHW pool 3x3/2", 3, 2, 1, False), ("pool 2x2/2", 2, 2, 0, True)
    ):  # fmt: skip
        pool = (64, 64, 112, 112), *window, last
        yield name, lambda pool=pool: c.pool(*pool, all=False)
        yield f"{name}, values", lambda pool=pool: c.pool_values(*pool)
    for name, last in (("", True), ("NCHW ", False)):
        yield f"{name}means 2x2/2", lambda last=last: c.means((64, 128, 56, 56), 2, 2, 0, last)
        yield f"{name}means 3x3", lambda last=last: c.means((64, 128, 56, 56), 3, 1, 1, last, include_pad=False)
        yield f"{name}means of images", lambda last=last: c.bins((64, 2048, 7, 7), (1, 1), last)
        options = {"activation": "relu", "last": last}
        yield f"{name}batch norm, relu", lambda options=options: c.batch_norm(64, 64, 112, 112, **options)
        options = {**options, "residual": True}
        yield f"{name}batch norm, residual, relu", lambda options=options: c.batch_norm(64, 256, 56, 56, **options)
    yield from followed(c)
    yield "norm, residual, relu", lambda: c.elementwise(64, 256, 56, 56, last=True)
    yield "NCHW norm, residual, relu", lambda: c.elementwise(64, 256, 56, 56, last=False)
    yield "ResNet relu", lambda: c.relu(64, 64, 112, 112, last=True)
    yield "ResNet 3x3, 64", lambda: c.conv(64, 64, 56, 64, 3)
    yield "ResNet 3x3, 256", lambda: c.conv(64, 256, 14, 256, 3)
    yield "ResNet 3x3/2, 128", lambda: c.conv(64, 128, 56, 128, 3, stride=2)
    yield "ResNet 1x1, 64 to 256", lambda: c.conv(64, 64, 56, 256, 1)
    yield "ResNet NCHW 3x3, 64", lambda: c.conv(64, 64, 56, 64, 3, last=False)
    yield "ResNet NCHW 3x3, 256", lambda: c.conv(64, 256, 14, 256, 3, last=False)
    yield "ResNet NCHW 1x1, 64 to 256", lambda: c.conv(64, 64, 56, 256, 1, last=False)
    yield "depthwise 3x3, 144", lambda: c.conv(64, 144, 56, 144, 3, groups=144)
    yield "depthwise 3x3/2, 144", lambda: c.conv(64, 144, 56, 144, 3, stride=2, groups=144)
    yield "depthwise 5x5, 144", lambda: c.conv(64, 144, 56, 144, 5, groups=144)
    yield "depthwise 5x5/2, 144", lambda: c.conv(64, 144, 56, 144, 5, stride=2, groups=144)
    yield "NCHW depthwise 3x3, 144", lambda: c.conv(64, 144, 56, 144, 3, groups=144, last=False)
    yield "NCHW depthwise 3x3/2, 144", lambda: c.conv(64, 144, 56, 144, 3, stride=2, groups=144, last=False)
    yield "linear 4096^3", lambda: c.linear(4096, 4096, 4096)
    # By descriptors and, with few rows, by pointers.
    yield "linear to 1000 features", lambda: c.linear(1024, 2048, 1000)
    yield "linear to 1000 features, 64 rows", lambda: c.linear(64, 2048, 1000)


def _by(family, tile, call):
    """The call with every product of a family computed by one tile."""

    def run():
        with tile_tables.only(family, tile):
            call()

    return run


def tiles(c, format, brief):
    """(name, call) of every tile of every family of products."""
    row = _common.number_format(*FORMATS[format])
    for tile in tile_tables.table("patches", row):
        for walk, channels in (("taps", 128), ("short", patches.SHORT_K)):
            if walk == "short" and (tile.K <= patches.SHORT_K or brief and tile.N > NARROW):
                continue  # the same as by taps, or hardly different
            for call, sizes in ((c.conv_forward, (channels, tile.N)), (c.conv_input_grad, (tile.N, channels))):
                call = _by("patches", tile, lambda call=call, sizes=sizes: call(*sizes, k=3, d=1))
                yield f"{walk}, {tile.M}x{tile.N}", call
    for tile in tile_tables.table("narrow patches", row):
        if format not in ("float16", "float64"):  # "patches" compiles these tiles; this walk in the most used formats
            # Few channels without dilation have kernels of their own.
            for call, sizes in ((c.conv_forward, (3, tile.N)), (c.conv_input_grad, (tile.N, 3))):
                call = _by("narrow patches", tile, lambda call=call, sizes=sizes: call(*sizes, k=5, d=2))
                yield f"flat, {tile.M}x{tile.N}", call
        strided = _by("narrow patches", tile, lambda n=tile.N: c.conv_strided_input_grad(n, 64))
        yield f"strided, {tile.M}x{tile.N}", strided
    for tile in tile_tables.table("pooled", row):
        for walk, k, channels in (("taps", 3, 64), ("flat", 5, 3)):
            size = {"h": 32, "oc": tile.N, "k": k, "pad": 1, "pool": (3, 2, 1)}
            yield f"{walk} to pool, {tile.M}x{tile.N}", lambda n=channels, size=size: c.conv_pool(4, n, **size)
    for tile in tile_tables.table("gradient", row):
        if tile.num_warps > 2 or tile.N <= NARROW:  # two warps have no registers for more addresses
            name = f"taps, {tile.M}x{tile.N}" + f", {tile.taps} taps" * (tile.taps > 1)
            yield name, _by("gradient", tile, lambda t=tile: c.conv_weight_grad(t.N, t.M, k=3, d=1))
        if tile.taps == 1:
            name = f"rows, {tile.M}x{tile.N}"
            yield name, _by("gradient", tile, lambda t=tile: c.linear_weight_grad(320 * t.M, t.N, t.M))
    for tile in tile_tables.table("flat gradient", row):
        call = _by("flat gradient", tile, lambda m=tile.M: c.conv_weight_grad(12, m, k=5, d=2))
        yield f"flat, {tile.M}x{tile.N}", call
    for tile in tile_tables.table("matrices", row):
        call = _by("matrices", tile, lambda t=tile: c.linear(320 * t.M // t.N, 4 * t.N, t.N))
        yield f"{tile.M}x{tile.N}", call
    for tile in tile_tables.table("products", row) if product.described() else ():
        yield f"descriptors, {tile.M}x{tile.N}", _by("products", tile, lambda: c.linear(8192, 512, 256))
    if format == "bfloat16" or not brief:
        for tile in tile_tables.table("patches", row):
            call = _by("patches", tile, lambda n=tile.N: c.normed(8, 128, 32, n, 3, "silu", residual=True))
            yield f"taps, {tile.M}x{tile.N}, norm, residual, silu", call
        for tile in tile_tables.table("products", row) if product.described() else ():
            call = _by("products", tile, lambda: c.linear_normed(8192, 512, 256, "gelu"))
            yield f"descriptors, {tile.M}x{tile.N}, norm, residual, gelu", call
        for tile in tile_tables.table("patches", row):
            call = _by("patches", tile, lambda n=tile.N: c.with_statistics(8, 128, 32, n, 3))
            yield f"taps, {tile.M}x{tile.N}, statistics", call
        for tile in tile_tables.table("products", row) if product.described() else ():
            call = _by("products", tile, lambda: c.with_statistics(8, 512, 32, 256, 1))
            yield f"descriptors, {tile.M}x{tile.N}, statistics", call
    for tile in tile_tables.table("chain gradient", row):
        call = _by("chain gradient", tile, lambda: c.chain(1024, 256, 128, 128))
        yield f"chain gradient, {tile.M}x{tile.N}", call
    for tile in linear_chain.ROWS[row]:
        # Enough rows that this tile is chosen, and layers of the largest width.
        m, wide = 129 * tile.M, (256, *[kernel_shapes.MOST_WIDTH] * 3)
        yield f"chain, {tile.M} rows", lambda m=m, wide=wide: c.chain(m, *wide)


def layers(c, format, brief):
    """(name, call) of the kernels without a table of tiles."""
    if format != "float64":
        yield "few channels", lambda: c.conv(64, 3, 32, 64, 3, bias=True)
        yield "NCHW few channels", lambda: c.conv(64, 6, 14, 16, 5, pad=0, last=False, bias=True)
        yield "few channels to pool, padded", lambda: c.conv_pool(4, 3, 32, 40, 5, pad=2)
        if not brief:
            yield "few output channels", lambda: c.conv(16, 64, 64, 3, 3)
            yield "few channels, odd sizes", lambda: c.conv(16, 3, 33, 32, 3, last=False)
            yield "one channel to pool past 2^31", lambda: c.conv_pool(1, 1, 46400, 2, 3, last=False)
        yield "few channels, norm", lambda: c.normed(64, 3, 32, 64, 3, "silu", residual=True)
        yield "NCHW few channels, norm", lambda: c.normed(64, 3, 32, 32, 3, "silu", residual=True, last=False)
    yield "linear, norm", lambda: c.linear_normed(64, 128, 64, "gelu_tanh")
    yield "elementwise", lambda: c.elementwise(8, 64, 16, 16, last=True)
    yield "batch norm", lambda: c.batch_norm(8, 64, 16, 16, activation="relu", last=True)
    yield "NCHW batch norm", lambda: c.batch_norm(8, 64, 16, 16, activation="silu", last=False)
    yield "depthwise, norm", lambda: c.normed(4, 32, 16, 32, 3, "silu", groups=32, residual=True)
    yield "NCHW depthwise, norm", lambda: c.normed(4, 32, 16, 32, 3, "hardswish", groups=32, residual=True, last=False)
    yield "depthwise", lambda: c.conv(4, 32, 16, 64, 3, stride=2, groups=32, bias=True)
    yield "NCHW depthwise", lambda: c.conv(4, 32, 16, 32, 3, groups=32, last=False)
    # A loop over rows of taps, lines that are not whole, and pixels a stride apart.
    yield "depthwise 7x7", lambda: c.conv(4, 32, 15, 32, 7, stride=9, groups=32)
    yield "first layer", lambda: c.first_layer(True)
    yield "pool", lambda: c.pool((4, 8, 16, 16), 3, 2, 1, False)
    yield "pool, dilated", lambda: c.pool((4, 8, 16, 16), 3, 2, 1, True, dilation=2)
    yield "means", lambda: c.means((4, 8, 16, 16), 3, 2, 1, False)
    yield "means, large windows", lambda: c.means((4, 8, 16, 16), 6, 3, 3, True, include_pad=False)
    yield "bins", lambda: c.bins((4, 8, 16, 16), (7, 6), True)
    yield "images' means, NCHW", lambda: c.bins((64, 512, 7, 7), (1, 1), False)
    yield "squeeze and excitation", lambda: c.squeeze_excite((64, 1152, 7, 7), 48, True)
    yield "squeeze to many units", lambda: c.squeeze_excite((4, 3712, 7, 7), 348, True, biases=False)
    yield "NCHW squeeze and excitation", lambda: c.squeeze_excite((64, 96, 56, 56), 4, False)
    yield "relu", lambda: c.relu(4096)
    yield "loss", lambda: c.cross_entropy(4096, 1000, weighted=True)
    yield "loss of many classes", lambda: c.cross_entropy(64, 50000)
    yield "loss of each row", lambda: c.losses_of_rows(64, 1000)


def lenet_again(c, format, lanes, bounded, brief):
    """(name, call) of the parts of `shapes` that are compiled without bounds too, and of LeNet's other tiles."""
    if format != "float64":
        # In full float32 this fusion has no gradient kernels, see conv2d_pool/gradient.py.
        options = {"last": False, "gradients": format != "float32"}
        yield "one channel to pool", lambda: c.conv_pool(64, 1, 32, 6, 5, **options)
        yield "few channels to pool", lambda: c.conv_pool(128, 6, 14, 16, 5, **options)
    if format not in LENET:
        return
    # The block of images grows with the batch, and is largest here. Many classes have a block of their own.
    if not bounded:
        images = {"n": 2**14, "raw": not brief}
        # Kernels for full float32 compile slowly: here images have one channel, and no case has colours.
        classes = 1000 if lanes and not brief else 10
        yield "LeNet step" + " of bytes" * (not brief), lambda: c.lenet(classes=classes, **images)
        yield "LeNet inference" + " of bytes" * (not brief), lambda: c.lenet_inference(**images)
    if brief:
        return
    if bounded or not lanes:
        # Images of bytes are compiled above, or here together with colours.
        colours = {"raw": bounded, "channels": 3, "classes": 1000, "size": 28}
        yield "LeNet step of padded colours", lambda: c.lenet(2**14, **colours)
    if format != "float32":
        # Small batches have tiles of their own, and on sm_90 so have their gradients.
        yield "LeNet step, batch 64", lambda: c.lenet(64, backward=bounded)


def switches(c, format, brief):
    """(name, call) of constants that no tile depends on: layouts, outputs not asked for, modes, 64-bit offsets."""
    if not brief:
        # Windows that share a patch and windows with a patch each, contiguous pixels and channels, masked padding.
        gradients = format != "float32"
        few, one = {"gradients": gradients}, {"pad": 2, "last": False, "gradients": gradients}
        yield "few channels to pool, channels_last", lambda: c.conv_pool(128, 6, 14, 16, 5, **few)
        yield "one channel to pool, padded", lambda: c.conv_pool(64, 1, 28, 6, 5, **one)
        yield "LeNet's head", lambda: c.chain(1024, 400, 120, 84, 10)
        yield "NCHW first layer", lambda: c.first_layer(False)
        yield "chain without backward", lambda: c.chain(1024, 400, 120, 84, 10, keep=False)
        yield "pool, channels_last", lambda: c.pool((4, 8, 16, 16), 3, 2, 1, True)
        yield "pool, large windows", lambda: c.pool((4, 8, 16, 16), 6, 2, 3, False)
        yield "means, channels_last", lambda: c.means((4, 8, 16, 16), 3, 2, 1, True, include_pad=False)
        yield "batch norm, residual", lambda: c.batch_norm(8, 64, 16, 16, activation="relu", last=True, residual=True)
        yield "batch norm, odd sizes", lambda: c.batch_norm(8, 21, 7, 7, activation="relu", last=True)
        yield "NCHW batch norm, odd sizes", lambda: c.batch_norm(8, 21, 7, 7, activation="relu", last=False)
        yield "images' means, rows apart", lambda: c.rows_apart(64, 512, 9, 8)
    if format != "bfloat16":
        return
    yield "groups, dilation", lambda: c.conv(4, 32, 16, 32, 3, dilation=2, groups=2)
    yield "rectified", c.rectified
    for mode in ("reflect", "replicate", "circular"):
        yield mode, lambda mode=mode: c.conv(4, 32, 16, 32, 3, mode=mode)
    if not brief:
        yield "past 2^31", c.past_32_bits


def has_tiles(arch, format, brief):
    """Whether the tables of tiles are compiled.

    A brief run compiles NVIDIA's float32 for sm_90 alone, because it is FMA on every card.
    """
    return not (brief and format == "float32" and arch in ("sm_80", "sm_100"))


def calls(arch, format, brief=False):
    """(case, call) of what is compiled for an architecture in a format."""
    dtype, precision = FORMATS[format]
    torch.backends.cudnn.conv.fp32_precision = precision
    torch.backends.cuda.matmul.fp32_precision = precision
    c = Calls(dtype)
    bounded = arch == BOUNDED[0] and format in BOUNDED[1]
    lanes = format == "float32" and arch != "gfx942"
    if bounded:
        # Launches in full float32 compile the slowest: a brief run has those of one batch.
        skipped = ("LeNet step", "LeNet inference") if brief and format == "float32" else ()
        yield from ((name, call) for name, call in shapes(c) if name not in skipped)
    if has_tiles(arch, format, brief):
        yield from tiles(c, format, brief)
    yield from layers(c, format, brief)
    if not (brief and bounded):
        yield from lenet_again(c, format, lanes, bounded, brief)
    if bounded or format == "bfloat16":
        yield from switches(c, format, brief)
