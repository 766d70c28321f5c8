"""Whole networks in evaluation, converted, fused and compiled, against torch in float64.

They are small versions of the networks of bench/networks.py: an eighth of the channels, a quarter of the blocks of the
first stages, images of 32 x 32. Weights are in channels_last, in which the interpreter runs depthwise convolutions in
reasonable time.
"""

import contextlib
import copy
import functools

import pytest
import torch
from conftest import thorough_if
from torch import nn

import tritonnet
from bench import traffic
from bench.networks import NETWORKS, PARAMETERS, settle
from tritonnet.compiler import compile_graph

# The third stage of MobileNetV3 is its first with squeeze and excitation.
SIZES = {name: dict(width=1 / 8, depth=1 / 4, stages=2, classes=100) for name in NETWORKS}
SIZES["mobilenet_v3"]["stages"] = 3
IMAGE = 3, 32, 32
# How many times as far as torch's own run in the same format a result may be from float64. Both round the same stored
# values, and torch no less often; only sums are in another order.
FACTOR = 2
# The ways to run a network with the formats for each. float32 shows mistakes that are smaller than 16 bits' roundoff.
WAYS = {
    "fused": [(name, torch.float32) for name in NETWORKS],
    "fused in 16 bits": [
        ("resnet50", torch.bfloat16),
        ("efficientnet_b0", torch.bfloat16),
        ("vgg16_bn", torch.float16),
    ],
    "converted": [(name, torch.float16) for name in NETWORKS],
    "compiled": [(name, torch.bfloat16) for name in NETWORKS],
}
# Those that run in every run; a thorough run has all of them.
SOME = {
    "fused": ("resnet50", "vgg16_bn", "efficientnet_b0", "densenet121"),
    "fused in 16 bits": ("resnet50", "vgg16_bn"),
    "converted": ("mobilenet_v3", "densenet121"),
    "compiled": ("resnet18", "regnet_y_400mf"),
}
# Of a network that is converted and fused: launches of kernels, and the calls of torch's operators that are left.
LEFT = {
    "resnet18": (14, {}),
    "resnet50": (17, {}),
    "vgg16_bn": (10, {"clone": 1}),
    "mobilenet_v2": (13, {}),
    "mobilenet_v3": (19, {}),
    "efficientnet_b0": (17, {}),
    "regnet_x_400mf": (14, {}),
    "regnet_y_400mf": (22, {}),
    "densenet121": (26, {"cat": 7}),
    "resnet_of_timm": (20, {}),
}


@pytest.fixture(autouse=True)
def nothing_captured():
    torch.compiler.reset()


@pytest.fixture(autouse=True)
def exact_products(full_precision):
    pass


@functools.cache
def settled(name):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return settle(NETWORKS[name](**SIZES[name]), torch.randn(8, *IMAGE))


def small(name, dtype, device="cpu"):
    """(the network in evaluation, two images)."""
    images = torch.randn(2, *IMAGE, generator=torch.Generator().manual_seed(1))
    return copy.deepcopy(settled(name)).to(device, dtype), images.to(device, dtype)


def error(actual, truth):
    return (torch.linalg.vector_norm(actual.cpu().double() - truth) / torch.linalg.vector_norm(truth)).item()


@pytest.mark.parametrize("name", PARAMETERS)
def test_the_published_number_of_parameters(name):
    with torch.device("meta"):
        model = NETWORKS[name]()
    assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS[name]


def check(function, model, images):
    """Runs the function of images on the kernels and on the reference; returns the launches of the first run."""
    with torch.no_grad():
        truth = copy.deepcopy(model).double().cpu()(images.double().cpu())
        allowed = FACTOR * error(model(images), truth)
        for backend in ("triton", "reference"):
            with tritonnet.backend(backend), tritonnet.count_launches() as launches:
                result = function(images)
            assert result.dtype == images.dtype and (found := error(result, truth)) <= allowed, (
                backend,
                found,
                allowed,
            )
            if backend == "triton":
                launched = launches.total()
    return launched


@pytest.mark.parametrize(
    "way, name, dtype",
    thorough_if(
        lambda way, name, dtype: name not in SOME[way],
        [(way, *case) for way, cases in WAYS.items() for case in cases],
    ),
    ids=str,
)
def test_evaluation(way, name, dtype, device):
    model, images = small(name, dtype, device)
    if way == "compiled":
        check(torch.compile(model, backend="tritonnet"), model, images)
        return
    ours = tritonnet.convert(copy.deepcopy(model), channels_last=True)
    if way == "converted":
        check(ours, model, images)
        return
    counting, graphs = traffic.Counting(), []

    def backend(graph_module, example_inputs):
        graphs.append(compile_graph(graph_module, example_inputs))

        def run(*args):
            # Only the first run is counted, that on the kernels.
            with counting if not counting.calls else contextlib.nullcontext():
                return graphs[-1](*args)

        return run

    if way != "fused":
        check(tritonnet.fuse(ours, fullgraph=True), model, images)
        return
    launched = check(torch.compile(ours, backend=backend, fullgraph=True), model, images)
    assert len(graphs) == 1
    launches, left = LEFT[name]
    assert {key.removeprefix("aten::"): calls for key, calls in counting.moved.of_torch.items()} == left
    # On a GPU another kernel may serve a convolution, in another number of launches.
    assert device.type != "cpu" or launched == launches


def halve_statistics(model):
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.mul_(0.5)
            module.running_var.mul_(2)


def replace_weight(model):
    norm = next(module for module in model.modules() if isinstance(module, nn.BatchNorm2d))
    norm.weight = nn.Parameter(norm.weight.detach() * -2)


def replace_buffer(model):
    norm = next(module for module in model.modules() if isinstance(module, nn.BatchNorm2d))
    norm.running_var = norm.running_var * 3


def raise_eps(model):
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = 0.5


def train_and_back(model):
    model.train()
    model(torch.randn(4, *IMAGE, dtype=torch.float64, generator=torch.Generator().manual_seed(2)))
    model.eval()


def load(model):
    generator = torch.Generator().manual_seed(3)
    state = {name: t * (1 + 0.1 * torch.rand(t.shape, generator=generator)) if t.is_floating_point() else t
             for name, t in model.state_dict().items()}  # fmt: skip
    model.load_state_dict(state)


@pytest.mark.parametrize(
    "way, name",
    thorough_if(
        lambda *case: case != ("fused", "resnet18"),
        [("fused", "resnet18"), ("compiled", "resnet18"), ("fused", "mobilenet_v3")],
    ),
)
def test_follows_later_changes(way, name):
    """Each change is made to torch's network too, and changes what that computes."""
    theirs, images = small(name, torch.float64)
    ours = tritonnet.convert(copy.deepcopy(theirs))
    run = tritonnet.fuse(ours) if way == "fused" else torch.compile(ours, backend="tritonnet")
    with torch.no_grad(), tritonnet.backend("reference"):
        torch.testing.assert_close(run(images), before := theirs(images))
        for change in (halve_statistics, replace_weight, load, raise_eps, train_and_back, replace_buffer):
            for model in (theirs, ours):
                change(model)
            truth = theirs(images)
            assert not torch.allclose(before, truth, rtol=1e-3), change.__name__
            torch.testing.assert_close(run(images), truth, msg=lambda m, change=change: f"{change.__name__}: {m}")
            before = truth
        # In training mode the batch's own statistics count, and the running ones change.
        results = []
        for model in (run, theirs):
            torch.manual_seed(4)  # of dropout
            results.append(model.train()(images))
        torch.testing.assert_close(*results)
        torch.testing.assert_close(ours.state_dict(), theirs.state_dict())
        torch.testing.assert_close(run.eval()(images), theirs.eval()(images))
