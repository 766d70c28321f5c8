"""Train a small residual network with batch norm on the package's digits, with one call for each step.

python -m tritonnet.examples.resnet_digits
torchrun --nproc-per-node 2 -m tritonnet.examples.resnet_digits
"""

import os
import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import tritonnet
from tritonnet.data import load_digits

BATCH = 64


class Block(nn.Module):
    def __init__(self, inputs, channels, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut = nn.Identity()
        if stride > 1:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )  # fmt: skip

    def forward(self, x):
        y = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


def build(width=16):
    """A model written without tritonnet, for images of 28 x 28 pixels."""
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True),
        Block(width, width, 1), Block(width, 2 * width, 2), Block(2 * width, 4 * width, 2),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * width, 10),
    )  # fmt: skip


def shifted(images):
    """The images (N, 1, 28, 28), each cut out of one of 32 x 32 at a place that is drawn; in channels_last."""
    pixels = torch.arange(28, device=images.device)
    top, left = torch.randint(5, (2, len(images), 1, 1), device=images.device)
    n = torch.arange(len(images), device=images.device)[:, None, None]
    return images[n, :, top + pixels[:, None], left + pixels].permute(0, 3, 1, 2)


def main(epochs=8, digits=8000):
    if "RANK" in os.environ:
        dist.init_process_group()
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    say = print if rank == 0 else lambda *_: None
    device = torch.device("cuda", rank % torch.cuda.device_count()) if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    train_x, train_y, test_x, test_y = (t[:digits].to(device) for t in load_digits())

    net = tritonnet.convert(build().to(device), channels_last=True)
    model = DistributedDataParallel(net) if world > 1 else net  # the line for torchrun
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05)
    steps = epochs * (digits // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, steps + 1, cycle_momentum=False)
    precision = "bfloat16" if device != "cpu" else None
    step = tritonnet.TrainStep(model, nn.CrossEntropyLoss(), optimizer, precision, report=say)

    for epoch in range(epochs):
        model.train()
        for batch in torch.randperm(digits).split(BATCH)[: digits // BATCH]:
            mine = batch[rank::world].to(device)
            loss = step(shifted(train_x[mine]), train_y[mine])
            schedule.step()
        model.eval()
        with torch.no_grad():
            right = (net(test_x[:, :, 2:-2, 2:-2]).argmax(1) == test_y).float().mean()
        say(f"epoch {epoch + 1}: loss {loss.item():.3f}, {right.item():.2%} of the test digits are right")
    step.check()
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
