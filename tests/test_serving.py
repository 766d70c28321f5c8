"""serve(): calls of torch's functions in a block; and, in it and in fuse, what such calls stand in."""

import copy
import threading

import pytest
import torch
import torch.nn.functional as TF
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

import tritonnet
import tritonnet.nn.functional as F
from tritonnet import serving

CALLS = {
    "F.conv2d": lambda x, w: TF.conv2d(x, w, padding=1),
    "torch.conv2d": lambda x, w: torch.conv2d(x, w, None, 2),
    "F.linear": lambda x, w: TF.linear(x, w[:, 0, 0]),
    "F.max_pool2d": lambda x, w: TF.max_pool2d(x, 2),
    "torch.max_pool2d": lambda x, w: torch.max_pool2d(x, 3, 1, 1),
    "F.max_pool2d with indices": lambda x, w: TF.max_pool2d(x, 2, return_indices=True)[0],
    "F.avg_pool2d": lambda x, w: TF.avg_pool2d(x, 2, 1),
    "F.adaptive_avg_pool2d": lambda x, w: TF.adaptive_avg_pool2d(x, 2),
    "F.relu": lambda x, w: TF.relu(x),
    "F.relu in place": lambda x, w: TF.relu(x * 1, inplace=True),
    "torch.relu": lambda x, w: torch.relu(x),
    "relu": lambda x, w: x.relu(),
    "relu_": lambda x, w: (x * 1).relu_(),
    "F.relu_": lambda x, w: TF.relu_(x * 1),
    "F.relu6": lambda x, w: TF.relu6(x),
    "F.hardtanh": lambda x, w: TF.hardtanh(x, 0.0, 6.0),
    "F.hardtanh_": lambda x, w: TF.hardtanh_(x * 1, 0.0, 6.0),
    "F.leaky_relu": lambda x, w: TF.leaky_relu(x, 0.2),
    "F.leaky_relu_": lambda x, w: TF.leaky_relu_(x * 1, 0.2),
    "F.silu": lambda x, w: TF.silu(x),
    "F.hardswish": lambda x, w: TF.hardswish(x),
    "F.gelu": lambda x, w: TF.gelu(x, approximate="tanh"),
    "F.sigmoid": lambda x, w: TF.sigmoid(x),
    "torch.sigmoid": lambda x, w: torch.sigmoid(x),
    "sigmoid": lambda x, w: x.sigmoid(),
    "F.hardsigmoid": lambda x, w: TF.hardsigmoid(x),
    "F.cross_entropy": lambda x, w: TF.cross_entropy(x[:, 0, 0] * 1, torch.tensor([3, 1], device=x.device)),
}


# What the last two keep for backward has the sizes of what torch keeps, so that no checkpoint would notice.
CHECKPOINTED = {
    "F.conv2d": CALLS["F.conv2d"],
    "F.hardsigmoid": CALLS["F.hardsigmoid"],
    "F.batch_norm": lambda x, w: TF.batch_norm(x, w.new_zeros(3), w.new_ones(3), training=True),
}


def inputs(device):
    return [
        torch.randn(size, dtype=torch.float64, device=device, requires_grad=True)
        for size in ((2, 3, 6, 5), (4, 3, 5, 5))
    ]


def results(function, tensors):
    """The result and all gradients, taken outside of any block."""
    y = function(*tensors)
    return [y, *torch.autograd.grad(y.pow(2).sum(), tensors, materialize_grads=True)]


@pytest.mark.parametrize("name", CALLS)
def test_every_call(name, device):
    function, tensors = CALLS[name], inputs(device)

    def served(*tensors):
        with tritonnet.serve():
            return function(*tensors)

    with tritonnet.count_launches() as launches:
        ours = results(served, tensors)
    assert launches
    with tritonnet.count_launches() as launches:
        theirs = results(function, tensors)
    assert not launches
    torch.testing.assert_close(ours, theirs)


def test_all_of_torchs_names_are_known():
    """What tritonnet.nn.functional has under a name of torch.nn.functional's is served."""
    own = {name for name, value in vars(F).items() if getattr(value, "__module__", "").startswith("tritonnet.nn")}
    both = {name for name in own if hasattr(TF, name) and not name.startswith("__")}
    assert "conv2d" in both and both <= {f.__name__ for f in serving._SERVED.values()}


def launched(function):
    with tritonnet.count_launches() as launches:
        function()
    return dict(launches)


def test_the_block_ends(device):
    """With an exception, when nested, and for no other thread."""
    x = torch.ones(3, device=device)
    with tritonnet.serve():
        with tritonnet.serve():
            assert launched(lambda: torch.relu(x)) == {"relu_kernel": 1}
        assert launched(lambda: torch.relu(x)) == {"relu_kernel": 1}
        counts = []
        thread = threading.Thread(target=lambda: counts.append(launched(lambda: torch.relu(x))))
        thread.start()
        thread.join()
        assert counts == [{}]
    assert launched(lambda: torch.relu(x)) == {}
    with pytest.raises(RuntimeError, match="conv2d: input must have"), tritonnet.serve():
        torch.conv2d(torch.ones(1, 2, 3, 3, device=device), torch.ones(1, 3, 1, 1, device=device))
    assert launched(lambda: torch.relu(x)) == {}


class Logged(torch.Tensor):
    calls: list = []

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        cls.calls.append(func)
        return super().__torch_function__(func, types, args, kwargs)


def test_what_is_left_to_torch(device):
    """Calls with `out`, and tensors of a subclass, whose own __torch_function__ gets torch's function."""
    x, y = torch.randn(3, device=device), torch.empty(3, device=device)
    logged = torch.randn(3, device=device).as_subclass(Logged)
    with tritonnet.serve(), tritonnet.count_launches() as launches:
        torch.sigmoid(x, out=y)
        assert torch.equal(torch.relu(x=x), x.clamp(min=0))  # numpy's name for `input`
        assert torch.equal(y, torch.sigmoid(x.as_subclass(Logged)).as_subclass(torch.Tensor))
        torch.relu(logged)
    assert Logged.calls[-1] is torch.relu and not launches


def test_fuse_leaves_calls_with_out(device):
    """They write a tensor that is an argument: sigmoid, a product behind which relu comes, and means."""

    class Writes(torch.nn.Module):
        def forward(self, x, w):
            y, z, m = x.new_empty(2, 3), x.new_empty(2, 4), x.new_empty(2)
            torch.sigmoid(x, out=y)
            torch.relu(torch._C._nn.linear(y, w, out=z))
            torch.mean(z.view(2, 4, 1, 1), (2, 3), out=z)
            torch.add(z[:, 0], z[:, 1], out=m)
            return y, z, m

    model, arguments = Writes(), (torch.randn(2, 3, device=device), torch.randn(4, 3, device=device))
    theirs = model(*arguments)
    torch.testing.assert_close(tritonnet.fuse(model)(*arguments), theirs)


def of_graph(program):
    return [str(node.target) for node in program.graph.nodes if node.op == "call_function"]


def test_tracers(device):
    """torch.export and make_fx record our operators in the block; torch.fx, which records functions, torch's."""

    class Sum(torch.nn.Module):
        def forward(self, x):
            return x.relu() + torch.relu(x)

    model, x = Sum(), torch.randn(3, device=device)
    with tritonnet.serve(), tritonnet.backend("reference"):
        for strict in (False, True):
            found = of_graph(torch.export.export(model, (x,), strict=strict))
            assert found == ["tritonnet.relu.default"] * 2 + ["aten.add.Tensor"]
        assert of_graph(make_fx(model)(x)) == found
        assert not any("tritonnet" in target for target in of_graph(torch.fx.symbolic_trace(model)))


def test_with_other_modes_and_autocast(device):
    x, w = torch.randn(2, 3, device=device), torch.randn(4, 3, device=device)
    for outer, inner in ((torch.device(device), tritonnet.serve()), (tritonnet.serve(), torch.device(device))):
        with outer, inner, torch.autocast(device.type, torch.bfloat16), tritonnet.count_launches() as launches:
            y = TF.linear(x, w)
        assert y.dtype == torch.bfloat16 and launches["linear_forward_kernel"] == 1


def test_checkpoint_in_which_the_block_is_opened(device):
    net, x = torch.nn.Linear(3, 4).to(device), torch.randn(2, 3, device=device, requires_grad=True)

    def served(x):
        with tritonnet.serve():
            return torch.relu(net(x))

    with tritonnet.count_launches() as launches:
        grad = torch.autograd.grad(checkpoint(served, x, use_reentrant=False).sum(), x)
    assert launches["relu_kernel"] == 2
    torch.testing.assert_close(grad, torch.autograd.grad(torch.relu(net(x)).sum(), x))


@pytest.mark.parametrize("name", CHECKPOINTED)
@pytest.mark.parametrize("backward_inside", [True, False])
def test_checkpoint_in_the_block(name, backward_inside, device):
    """It runs again as torch's functions, as modes are off while backward runs, and so for the first time, too."""
    function, (x, w) = CHECKPOINTED[name], inputs(device)
    expected = torch.autograd.grad(function(x, w).pow(3).sum(), (x, w), materialize_grads=True)
    with tritonnet.serve(), tritonnet.count_launches() as launches:
        y = checkpoint(function, x, w, use_reentrant=False).pow(3).sum()
        assert not launches
        if backward_inside:
            found = torch.autograd.grad(y, (x, w), materialize_grads=True)
        torch.relu(x)
        assert launches
    if not backward_inside:
        found = torch.autograd.grad(y, (x, w), materialize_grads=True)
    torch.testing.assert_close(found, expected)


class Standardized(torch.nn.Conv2d):
    """A weight that is standardised by F.batch_norm and multiplied by a gain, as in timm's ScaledStdConv2d."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.gain = torch.nn.Parameter(torch.linspace(0.5, 1.5, self.out_channels))

    def forward(self, x):
        rows = self.weight.reshape(1, self.out_channels, -1)
        weight = TF.batch_norm(rows, None, None, weight=self.gain, training=True, momentum=0.0, eps=1e-6)
        weight = weight.reshape_as(self.weight)
        return TF.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class StandardizedByHand(torch.nn.Conv2d):
    def _conv_forward(self, x, weight, bias):
        var, mean = torch.var_mean(weight, dim=(1, 2, 3), keepdim=True, unbiased=False)
        return super()._conv_forward(x, (weight - mean) * torch.rsqrt(var + 1e-6), bias)


class Same(torch.nn.Conv2d):
    """Padding by the size of the input, as in TensorFlow and in timm's Conv2dSame."""

    def forward(self, x):
        (h, w), (kh, kw), (sh, sw) = x.shape[-2:], self.kernel_size, self.stride
        rows, columns = (max((-(-n // s) - 1) * s + k - n, 0) for n, k, s in ((h, kh, sh), (w, kw, sw)))
        x = TF.pad(x, (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2))
        return TF.conv2d(x, self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


class Functional(torch.nn.Module):
    """Layers, and functions of torch between them, as in GoogLeNet; and a product with a part of a weight."""

    def __init__(self):
        super().__init__()
        self.conv, self.fc = torch.nn.Conv2d(3, 8, 3), torch.nn.Linear(8, 5)

    def forward(self, x):
        x = TF.max_pool2d(TF.relu(self.conv(x)), 2)
        x = torch.max_pool2d(torch.relu(x - 0.1), 2, ceil_mode=True).sigmoid()
        return TF.linear(TF.adaptive_avg_pool2d(x, 1).flatten(1)[:, 1:], self.fc.weight[:, 1:], self.fc.bias)


def attend(**options):
    class Attention(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = torch.nn.MultiheadAttention(8, 2, batch_first=True, **options.get("layer", {}))

        def forward(self, x):
            x = x.flatten(1)[:, :80].reshape(-1, 10, 8)
            others = {"cross": 2 * x}.get(options.get("kind"), x)
            return self.attention(x, others, others, **options.get("call", {}))[0]

    return Attention


class Encoder(torch.nn.TransformerEncoderLayer):
    def __init__(self):
        super().__init__(8, 2, 16, dropout=0.0, batch_first=True)

    def forward(self, x):
        return super().forward(x.flatten(1)[:, :80].reshape(-1, 10, 8))


# name: the model, and how many convolutions and products of torch's its forward has.
MODELS = {
    "standardised": (
        lambda: torch.nn.Sequential(Standardized(3, 8, 3, 2, 1), torch.nn.ReLU(), Standardized(8, 4, 3)),
        2,
    ),
    "standardised by hand": (lambda: StandardizedByHand(3, 4, 3, groups=1), 1),
    "same": (lambda: torch.nn.Sequential(Same(3, 4, 3, 2), Same(4, 4, (2, 3), groups=4)), 2),
    "functional": (Functional, 2),
    "attention": (attend(), 2),
    "attention without weights": (attend(call={"need_weights": False}), 2),
    "attention, own projections": (attend(layer={"kdim": 8, "vdim": 8, "bias": False}), 2),
    "attention to others": (attend(kind="cross"), 3),
    "encoder": (Encoder, 4),
}


@pytest.fixture
def without_fast_path():
    torch.backends.mha.set_fastpath_enabled(False)
    yield
    torch.backends.mha.set_fastpath_enabled(True)


class Served(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        with tritonnet.serve():
            return self.model(x)


WAYS = {
    "serve": Served,
    "fuse": lambda model: tritonnet.fuse(tritonnet.convert(model)),
    "compile in serve": lambda model: Served(torch.compile(model, backend="eager", fullgraph=True)),
    "serve in compile": lambda model: torch.compile(Served(model), backend="eager", fullgraph=True),
}
# In training gradients are taken, and in evaluation none are recorded.
CASES = [(way, name, training) for way in ("serve", "fuse") for name in MODELS for training in (True, False)]
CASES += [(way, *of) for way in WAYS if "compile" in way for of in (("standardised", True), ("encoder", False))]
# Kernels that compute a convolution or a product with a weight in a forward, and how many.
FORWARDS = {
    "conv2d_forward_kernel": 1, "few_channels_product_kernel": 1, "depthwise_forward_kernel": 1,
    "conv2d_relu_max_pool2d_forward_kernel": 1, "linear_forward_kernel": 1, "linear_chain_forward_kernel": 2,
}  # fmt: skip


@pytest.mark.parametrize(("way", "name", "training"), CASES)
@pytest.mark.sampled(2)
def test_models(way, name, training, device, without_fast_path):
    """Results and gradients are torch's in float64, and every convolution and product is on our kernels."""
    torch._dynamo.reset()
    make, products = MODELS[name]
    theirs = make().double().train(training)
    ours = copy.deepcopy(theirs).to(device)
    x = torch.randn(2, 3, 9, 8, dtype=torch.float64)
    results = []
    for model, net, image in ((WAYS[way](ours), ours, x.to(device)), (theirs, theirs, x)):
        image = image.clone().requires_grad_(training)
        with torch.set_grad_enabled(training), tritonnet.count_launches() as launches:
            y = model(image)
        if net is ours:
            assert sum(FORWARDS.get(kernel, 0) * n for kernel, n in launches.items()) == products, launches
        grads = torch.autograd.grad(y.pow(2).sum(), [image, *net.parameters()]) if training else ()
        results.append([t.cpu() for t in (y, *grads)])
    torch.testing.assert_close(*results)


def test_attention_follows_replaced_functions(device, monkeypatch, without_fast_path):
    """As other libraries replace torch.nn.functional.scaled_dot_product_attention."""
    attention, x = torch.nn.MultiheadAttention(8, 2, batch_first=True).to(device), torch.randn(2, 5, 8, device=device)
    calls, theirs = [], TF.scaled_dot_product_attention

    def replacement(*args, **kwargs):
        calls.append(args)
        return theirs(*args, **kwargs)

    expected = attention(x, x, x, need_weights=False)[0]
    monkeypatch.setattr(TF, "scaled_dot_product_attention", replacement)
    with tritonnet.serve():
        torch.testing.assert_close(attention(x, x, x, need_weights=False)[0], expected)
    assert len(calls) == 1


def test_without_the_switch_torch_takes_its_fast_path(device):
    """A whole layer in C++ in evaluation without gradients: fuse leaves it, and serve does not."""
    torch._dynamo.reset()
    model, x = Encoder().eval().to(device), torch.randn(2, 3, 9, 8, device=device)
    with torch.no_grad():
        theirs = model(x)
        with tritonnet.count_launches() as launches:
            fused = tritonnet.fuse(copy.deepcopy(model))(x)
        assert not launches
        with tritonnet.serve(), tritonnet.count_launches() as launches:
            served = model(x)
    assert launches["linear_forward_kernel"] == 4
    for ours in (fused, served):
        torch.testing.assert_close(ours, theirs)
