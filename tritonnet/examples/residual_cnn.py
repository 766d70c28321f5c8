"""Convert and fuse an existing model, here a small residual network, and get the same results.

python -m tritonnet.examples.residual_cnn
"""

import torch
from torch import nn

import tritonnet


class Block(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU()

    def forward(self, x):
        y = self.relu(self.norm1(self.conv1(x)))
        return self.relu(x + self.norm2(self.conv2(y)))


def build():
    """A model written without tritonnet."""
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), Block(16), Block(16),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10),
    )  # fmt: skip


def main():
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    # float64, so that rounding cannot hide a difference.
    model = build().to(device).double()
    x, target = torch.randn(8, 3, 32, 32).to(device).double(), torch.randint(10, (8,), device=device)
    before = model(x)
    nn.functional.cross_entropy(before, target).backward()
    gradients = [p.grad.clone() for p in model.parameters()]

    tritonnet.convert(model)  # every layer that tritonnet has kernels for, in place
    tritonnet.fuse(model, report=print)  # sequences of layers as one kernel

    model.zero_grad()
    after = model(x)
    nn.functional.cross_entropy(after, target).backward()
    pairs = [(after, before), *((p.grad, g) for p, g in zip(model.parameters(), gradients))]
    apart = max(((a - b).norm() / b.norm()).item() for a, b in pairs)
    assert apart < 1e-10, apart
    print(f"{sum(type(m).__module__ == 'tritonnet.nn' for m in model.modules())} layers are tritonnet's now;", end=" ")
    print(f"results and gradients differ by {apart:.0e} of their size")

    build().load_state_dict(model.state_dict())
    print("the converted model's checkpoint loads into the original")


if __name__ == "__main__":
    main()
