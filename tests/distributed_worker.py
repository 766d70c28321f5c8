"""Run by test_distributed.py under torchrun, in two processes over gloo; exits with 1 where a gradient differs."""

import sys

import tensor_parallel
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import tritonnet
import tritonnet.nn as nn


def build(module):
    torch.manual_seed(0)
    return torch.nn.Sequential(
        module.Conv2d(2, 4, 3, padding=1), module.ReLU(), module.MaxPool2d(2), module.Conv2d(4, 4, 3, groups=4),
        module.ReLU(inplace=True), torch.nn.Flatten(), module.Linear(16, 3),
    ).double()  # fmt: skip


def whole(t):
    return t.full_tensor() if hasattr(t, "full_tensor") else t


def no_update_from_another_process(rank):
    """One process has a loss that is not finite: all share its gradients, so no process makes an update."""
    model = DistributedDataParallel(build(nn))
    step = tritonnet.TrainStep(model, torch.nn.CrossEntropyLoss(), torch.optim.SGD(model.parameters(), lr=0.1))
    x, target = torch.ones(2, 2, 8, 8, dtype=torch.float64), torch.tensor([0, 2])
    before = [p.detach().clone() for p in model.parameters()]
    try:
        step(x * (float("nan") if rank == 1 else 1), target)
    except FloatingPointError as e:
        assert ("another process" in str(e)) == (rank == 0), e
    else:
        raise AssertionError("nothing was reported")
    assert all(map(torch.equal, before, model.parameters()))
    step(x, target)
    assert all(p.isfinite().all() for p in model.parameters())
    assert not any(map(torch.equal, before, model.parameters()))


def main(backend):
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(1)
    x = torch.randn(2 * world, 2, 8, 8, dtype=torch.float64)
    truth = build(torch.nn)
    truth(x).pow(2).mean().backward()
    mesh = torch.distributed.init_device_mesh("cpu", (world,))
    with tritonnet.backend(backend):
        for wrap in (DistributedDataParallel, lambda m: fully_shard(m, mesh=mesh)):
            model = wrap(build(nn))
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            model(x.chunk(world)[rank]).pow(2).mean().backward()
            for p, q in zip(model.parameters(), truth.parameters(), strict=True):
                torch.testing.assert_close(whole(p.grad), q.grad)
            optimizer.step()
        no_update_from_another_process(rank)
        if backend == "reference":
            # The rules do not depend on what computes the parts.
            tensor_parallel.check(mesh)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
