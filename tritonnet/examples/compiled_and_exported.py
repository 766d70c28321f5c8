"""torch.compile without graph breaks, and torch.export to a file that another program can run.

python -m tritonnet.examples.compiled_and_exported
"""

import tempfile
from pathlib import Path

import torch

import tritonnet
import tritonnet.nn.functional as F


def main():
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    net = tritonnet.LeNet().to(device)
    x, target = torch.randn(8, 1, 32, 32, device=device), torch.randint(10, (8,), device=device)
    F.cross_entropy(net(x), target).backward()
    gradients = [p.grad for p in net.parameters()]

    # On a CPU inductor would need a C++ compiler; aot_eager is the same up to that point.
    compiled = torch.compile(net, fullgraph=True, backend="inductor" if device == "cuda" else "aot_eager")
    net.zero_grad()
    F.cross_entropy(compiled(x), target).backward()
    torch.testing.assert_close([p.grad for p in net.parameters()], gradients)
    print("compiled in one graph, forward and backward, with the same gradients")

    batch = torch.export.Dim("batch", min=1, max=4096)
    program = torch.export.export(net, (x,), dynamic_shapes=({0: batch},))
    names = [str(node.target) for node in program.graph.nodes if "tritonnet" in str(node.target)]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "lenet.pt2"
        torch.export.save(program, path)
        loaded = torch.export.load(path).module()
    other = torch.randn(3, 1, 32, 32, device=device)
    torch.testing.assert_close(loaded(other), net(other))
    print(f"exported, saved, loaded, and run on a batch of another size: {', '.join(names)}")


if __name__ == "__main__":
    main()
