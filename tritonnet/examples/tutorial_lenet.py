"""The LeNet of PyTorch's tutorials with two import lines changed.

python -m tritonnet.examples.tutorial_lenet
"""

import torch

import tritonnet
import tritonnet.nn as nn  # was: import torch.nn as nn
import tritonnet.nn.functional as F  # was: import torch.nn.functional as F
from tritonnet.data import load_digits


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 6, 5)
        self.conv2 = nn.Conv2d(6, 16, 5)
        self.fc1 = nn.Linear(16 * 5 * 5, 120)
        self.fc2 = nn.Linear(120, 84)
        self.fc3 = nn.Linear(84, 10)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        x = torch.flatten(x, 1)
        x = F.relu(self.fc1(x))
        x = F.relu(self.fc2(x))
        return self.fc3(x)


def main():
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    train_x, train_y, test_x, test_y = (t.to(device) for t in load_digits())
    net = Net().to(device)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.02, momentum=0.9)
    criterion = nn.CrossEntropyLoss()

    with tritonnet.count_launches() as launches:
        for epoch in range(2):
            for batch in torch.randperm(len(train_x), device=device).split(64):
                optimizer.zero_grad()
                loss = criterion(net(train_x[batch]), train_y[batch])
                loss.backward()
                optimizer.step()
            with torch.no_grad():
                right = (net(test_x).argmax(1) == test_y).float().mean().item()
            print(f"epoch {epoch + 1}: {right:.1%} of the test digits are right")

    print("kernels launched:", dict(launches) or "none, there is no GPU: plain torch has done their work")


if __name__ == "__main__":
    main()
