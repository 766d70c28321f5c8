"""DTensor in two processes: every operator in every way of its rule, and models; see distributed_worker.py.

The truth is what one process computes, in float64.
"""

import copy

import torch
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import tritonnet
import tritonnet.nn as nn
import tritonnet.nn.functional as F
from tritonnet import ops, sharding


def random(*size):
    return torch.randn(size, dtype=torch.float64)


def calls():
    """(operator, arguments) of every operator."""
    x, y = random(4, 6, 5, 4), random(4, 8, 3, 4)
    w, b, wide, pooled = random(8, 6, 3, 3), random(8), random(4, 8, 5, 4), random(4, 8, 2, 2)
    geometry, pool = ((2, 1), (1, 1, 1, 1), (1, 1), 1, "zeros"), ((2, 2), (2, 2), (1, 0))
    window, means = (*pool, (1, 1)), (*pool, False, True, None)
    _, code = ops.max_pool2d(y, *window, False)
    vectors, act = (b, b.exp(), b, b), (1e-5, "silu", 0.0)
    for stride in ((2, 1), (1, 1)):
        yield ops.conv2d, x, w, b, stride, *geometry[1:]
    yield ops.conv2d, x, w[:, :3], None, *geometry[:3], 2, "circular"
    yield ops.conv2d_relu, x, w, None, *geometry
    yield ops.conv2d_epilogue, x, w, b, *geometry, *vectors, y, *act
    yield ops.conv2d_input_grad, y, w, x.shape, *geometry
    yield ops.conv2d_weight_grad, y, x, w.shape, *geometry, True
    yield ops.conv2d_weight_grad, y, x, (8, 3, 3, 3), *geometry[:3], 2, "zeros", False
    yield ops.conv2d_relu_weight_grad, y, y, x, w.shape, *geometry, True
    yield ops.conv2d_grads, y, x, w, *geometry, True
    yield ops.conv2d_relu_max_pool2d, x, w, b, *geometry, *pool, False
    yield ops.conv2d_relu_max_pool2d_input_grad, pooled, code, w, x.shape, *geometry, *pool
    yield ops.conv2d_relu_max_pool2d_weight_grad, pooled, code, x, w.shape, *geometry, *pool, True
    yield ops.conv2d_relu_max_pool2d_grads, pooled, code, x, w, *geometry, *pool, True
    yield ops.max_pool2d, y, *window, False
    yield ops.max_pool2d_values, y, *window, False
    yield ops.max_pool2d_scatter, pooled, code, (3, 4), *window
    yield ops.max_pool2d_gather, y, code, *window
    yield ops.max_pool2d_indices, code, 4, *window
    yield ops.avg_pool2d, y, *means
    yield ops.avg_pool2d_grad, pooled, (3, 4), *means, False
    yield ops.adaptive_avg_pool2d, y, (2, 1)
    yield ops.adaptive_avg_pool2d_grad, pooled, (5, 4), False
    yield ops.squeeze_excite, wide, random(3, 8), None, random(8, 3), b, "silu", "sigmoid"
    for t in (y, random(4, 2, 6)):
        yield ops.relu, t
        yield ops.relu_grad, t, t.flip(0)
        yield ops.activation_grad, t, t.flip(0), "gelu", 0.0
    yield ops.relu_, y
    yield ops.activate_, y, "silu", 0.0
    yield ops.epilogue, y, *vectors, y.flip(0), *act
    yield ops.batch_statistics, y
    yield ops.tracked_statistics, y, b, b.clone(), b.exp(), 0.3
    yield ops.batch_norm, y, *vectors, y.flip(0), *act
    for result, with_dz in ((None, False), (y.sigmoid(), True)):
        yield ops.batch_norm_grad, y.flip(0), y, result, *vectors, 1e-5, "sigmoid", 0.0, with_dz, not with_dz
    c = random(6)
    for norm, groups, running, statistics in (
        ((c, c.exp(), c, c), 1, (b, b.exp()), True), ((None,) * 4, 2, (None, None), True),
        ((c, c.exp(), None, c), 2, (None, None), False), ((c, c.exp(), None, None), 1, (None, None), False),
    ):  # fmt: skip
        filters = w[:, : 6 // groups]
        yield ops.norm_conv2d, x, *norm, *act, filters, b, *geometry[:3], groups, "zeros", *running, 0.3, statistics
    rows, m, dy, layers = random(4, 6), random(8, 6), random(4, 8), (random(8, 6), b, random(2, 8), None, *[None] * 4)
    yield ops.linear, rows, m, b
    yield ops.linear, rows, m, None
    yield ops.linear_relu, rows, m, b
    yield ops.linear_epilogue, rows, m, b, *vectors, dy, *act
    yield ops.linear_weight_grad, dy, rows, True
    yield ops.linear_chain, rows, *layers, True
    yield ops.linear_chain_input_grad, random(4, 2), dy, layers[0], layers[2], None, None, True
    yield ops.linear_chain_weight_grad, random(4, 2), dy, rows, dy, (8,), True
    target = torch.tensor([0, 5, 2, 2])
    for reduction, dloss in (("none", random(4)), ("sum", random(1)[0]), ("mean", random(1)[0])):
        yield ops.cross_entropy, rows, target, random(6).exp(), reduction, -100, 0.1
        yield ops.cross_entropy_grad, dloss, rows, target, 2


def whole(results):
    return [t.full_tensor() if isinstance(t, DTensor) else t for t in results]


def every_way_of_every_operator(mesh):
    """Tensors that lie as a way wants them are computed with in that way, without communication."""
    placements, tested = {"r": Replicate(), **{str(dim): Shard(dim) for dim in range(4)}}, set()

    def placed(t, letter):
        if letter == "p":
            return DTensor.from_local(t / mesh.size(), mesh, [Partial()])
        return distribute_tensor(t, mesh, [placements[letter]], src_data_rank=None)

    for operator, *args in calls():
        tested.add(operator)
        for way in sharding._ways(operator, args):
            own, parts = copy.deepcopy(args), copy.deepcopy(args)
            parts = [placed(a, s) if isinstance(a, torch.Tensor) else a for a, s in zip(parts, way[0])]
            with CommDebugMode() as communication:
                ours = operator(*parts)
            assert communication.get_total_counts() == 0, (operator, way)
            true = operator(*own)
            ours, true = (r if isinstance(r, tuple) else (r,) for r in (ours, true))
            if true == (None,):
                ours, true = parts[:1], own[:1]
            for a, b in zip(whole(ours), true, strict=True):
                torch.testing.assert_close(a, b, msg=lambda text, at=(operator, way): f"{at}: {text}")
    assert tested == {value for value in vars(ops).values() if isinstance(value, torch._ops.OpOverload)}


def net():
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Conv2d(2, 6, 3, padding=1), torch.nn.BatchNorm2d(6), torch.nn.ReLU(), torch.nn.MaxPool2d(2),
        torch.nn.Conv2d(6, 4, 3, groups=2), torch.nn.ReLU(inplace=True), torch.nn.AdaptiveAvgPool2d(1),
        torch.nn.Flatten(), torch.nn.Linear(4, 3),
    ).double()  # fmt: skip


def compare(model, truth, x, x_placed, target, placed_target):
    """The loss, the gradients of all parameters and of the images, and running statistics."""
    x, x_placed = x.requires_grad_(), x_placed.requires_grad_()
    losses = F.cross_entropy(model(x_placed), placed_target), torch.nn.functional.cross_entropy(truth(x), target)
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(*whole(losses))
    pairs = [(x_placed, x), *zip(model.parameters(), truth.parameters(), strict=True)]
    for ours, true in pairs:
        torch.testing.assert_close(*whole((ours.grad, true.grad)))
    torch.testing.assert_close(whole(model.buffers()), whole(truth.buffers()))


def models(mesh):
    """A batch with replicated parameters; output channels, whose convolution with groups gathers them; and an MLP.

    Running statistics, which are replicated, are updated by what lies in parts.
    """

    def channels(name, module, mesh):
        for name, p in module.named_parameters(recurse=False):
            if isinstance(module, torch.nn.Conv2d):
                p = torch.nn.Parameter(distribute_tensor(p, mesh, [Shard(0)]))
                module.register_parameter(name, p)

    def place(t, placement):
        return distribute_tensor(t.detach(), mesh, [placement])

    x, target = random(4, 2, 8, 8), torch.tensor([0, 2, 1, 1])
    for partition, placement in ((None, Shard(0)), (channels, Replicate())):
        model = distribute_module(tritonnet.convert(net()), mesh, partition)
        compare(model, net(), x.detach(), place(x, placement), target, place(target, placement))

    rows = random(4, 6)
    mlp = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3)).double()
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).double()
    model.load_state_dict(mlp.state_dict())
    model = parallelize_module(model, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel(use_local_output=False)})
    compare(model, mlp, rows, place(rows, Replicate()), target, place(target, Replicate()))


def check(mesh):
    torch.manual_seed(1)
    every_way_of_every_operator(mesh)
    models(mesh)
