"""LeNet as any tutorial writes it, with the two import lines changed; the training program; the digits."""

import copy
import inspect
import json

import pytest
import torch
from conftest import write_mnist

import tritonnet
from bench.libraries import TutorialLeNet

pytest.importorskip("matplotlib")
pytest.importorskip("rich")
from tritonnet import cli, data
from tritonnet.cli import pictures


def tutorial_net(nn):
    """The tutorial's LeNet with its layers and functions imported from `nn`."""
    imports = f"import {nn} as nn\nimport {nn}.functional as TF\n"
    space = {"torch": torch}
    exec(imports + inspect.getsource(TutorialLeNet), space)
    torch.manual_seed(0)
    return space["TutorialLeNet"]()


def nets():
    return tutorial_net("tritonnet.nn"), tutorial_net("torch.nn")


def test_same_numbers_and_gradients(backend, device, full_precision):
    ours, theirs = nets()
    ours.to(device)
    seen = []
    ours.conv2.register_forward_hook(lambda m, x, y: seen.append(y.shape))
    ours.fc1.register_full_backward_hook(lambda m, dx, dy: seen.append(dy[0].shape))
    x, target = torch.randn(4, 1, 32, 32), torch.randint(10, (4,))
    y, true_y = ours(x.to(device)), theirs(x)
    torch.testing.assert_close(y.cpu(), true_y, rtol=1e-4, atol=1e-4)
    torch.nn.CrossEntropyLoss()(y, target.to(device)).backward()
    torch.nn.CrossEntropyLoss()(true_y, target).backward()
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters()):
        torch.testing.assert_close(p.grad.cpu(), q.grad, rtol=1e-4, atol=1e-4, msg=name)
    assert seen == [(4, 16, 10, 10), (4, 120)]


@pytest.mark.parametrize(
    "loss, optimizer", [("CrossEntropyLoss", "SGD"), ("MSELoss", "RMSprop"), ("CrossEntropyLoss", "Adam")]
)
@pytest.mark.sampled(3)
def test_optimizers_and_losses_train_it(optimizer, loss, device):
    """Two steps on the kernels agree with torch's, then fifteen on the reference reduce the loss."""
    ours, theirs = nets()
    ours.to(device).double()
    theirs.double()
    x, target = torch.randn(3, 1, 32, 32).double(), torch.randint(10, (3,))
    wanted = target if loss == "CrossEntropyLoss" else torch.nn.functional.one_hot(target, 10).double()
    losses = {}
    for net, where in ((ours, device), (theirs, "cpu")):
        steps = getattr(torch.optim, optimizer)(net.parameters(), lr=1e-3 if optimizer != "SGD" else 1e-2)
        for step in range(17):
            with tritonnet.backend("triton" if step < 2 else "auto" if device.type != "cpu" else "reference"):
                value = getattr(torch.nn, loss)()(net(x.to(where)), wanted.to(where))
                steps.zero_grad()
                value.backward()
                steps.step()
            losses.setdefault(net, []).append(value.item())
    assert losses[ours] == pytest.approx(losses[theirs], rel=1e-6)
    assert losses[ours][-1] < losses[ours][0]


def test_state_dict_goes_both_ways(tmp_path):
    ours, theirs = tritonnet.LeNet(), nets()[1]
    torch.save(theirs.state_dict(), tmp_path / "net.pt")
    ours.load_state_dict(torch.load(tmp_path / "net.pt", weights_only=True))
    x = torch.randn(2, 1, 32, 32)
    with tritonnet.backend("reference"):
        torch.testing.assert_close(ours(x), theirs(x))
    theirs.load_state_dict(tritonnet.LeNet().state_dict())
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in theirs.named_parameters()]


def test_a_training_step_runs_on_the_kernels(device):
    net = tritonnet.LeNet().to(device)
    with tritonnet.count_launches() as launches:
        torch.nn.functional.cross_entropy(
            net(torch.randn(2, 1, 32, 32, device=device)), torch.tensor([1, 2], device=device)
        ).backward()
    splits = launches.pop("sum_partials_kernel", 0)
    assert launches == {
        "conv2d_relu_max_pool2d_product_kernel": 2, "place_filters_kernel": 2,
        "filters_for_blocks_kernel": 1, "conv2d_relu_max_pool2d_input_grad_kernel": 1,
        "conv2d_relu_max_pool2d_weight_grad_kernel": 2,
        "linear_chain_forward_kernel": 1, "linear_chain_input_grad_kernel": 1, "linear_chain_weight_grad_kernel": 1,
    } and splits <= 3  # fmt: skip


def test_training_reaches_97_percent(trained):
    """The README's command, on the reference as on a machine without a GPU."""
    folder, output = trained
    assert output.splitlines()[0] == "LeNet on 8000 digits, 1 x cpu, backend: reference (plain torch)"
    assert json.loads((folder / "metrics.json").read_text())["test_accuracy"] > 0.97
    tritonnet.LeNet().load_state_dict(torch.load(folder / "model.pt", weights_only=True))


@pytest.mark.thorough
def test_training_on_zipped_idx_files_through_the_kernels(tmp_path, capsys, device, monkeypatch, no_graphs):
    """test_cli.py trains on unzipped files."""
    data, out = tmp_path / "data", tmp_path / "out"
    data.mkdir()
    x, y = torch.randint(256, (15, 28, 28)), torch.randint(10, (15,))
    write_mnist(data, x[:10], y[:10], x[10:], y[10:], zipped=True)
    options = ["--data", data, "--epochs", "1", "--batch-size", "4", "--out", out, "--device", device]
    monkeypatch.setattr(pictures, "draw", lambda *args: [])
    with tritonnet.count_launches() as launches:
        assert cli.main(["train", "--backend", "triton", *map(str, options)]) == 0
    # Three batches, and one test batch after the epoch and one at the end.
    steps = {name: launches[f"lenet_{name}_kernel"] for name in ("pack", "forward", "gradient", "update")}
    assert steps == {"pack": 3 + 2, "forward": 3 + 2, "gradient": 3, "update": 3}
    assert not any(name.startswith(("conv2d", "linear")) for name in launches)
    said = capsys.readouterr().out
    assert "10 digits" in said and "Triton kernels" in said and "fused launches" in said and (out / "model.pt").exists()


def test_digits():
    train_x, train_y, test_x, test_y = data.load_digits()
    assert train_x.shape == (8000, 1, 32, 32) and test_x.shape == (2000, 1, 32, 32) and train_x.dtype == torch.float32
    assert train_y.shape == (8000,) and set(test_y.tolist()) == set(range(10))
    background = -data.MEAN / data.STD
    assert train_x[:, :, :2].unique().tolist() == [pytest.approx(background)]
    assert train_x.max().item() == pytest.approx((1 - data.MEAN) / data.STD)
    assert train_x[:, :, 2:-2, 2:-2].mean().abs() < 0.02


@pytest.mark.parametrize(
    "change",
    [
        lambda net: net.conv1.bias.add_(1),
        lambda net: setattr(net.fc1, "bias", torch.nn.Parameter(net.fc1.bias + 1)),
        lambda net: setattr(net, "fc3", torch.nn.Linear(84, 7).to(net.fc3.weight.device)),
        lambda net: setattr(net.conv1, "padding", (1, 1)),
        lambda net: net.fc2.register_forward_hook(lambda module, arguments, result: result + 1),
        lambda net: net.double(),
    ],
    ids=["a value", "a parameter", "a layer", "a setting", "a hook", "the dtype"],
)
def test_what_changes_between_batches_is_seen(change, device):
    """Inference in fused launches caches that the layers are a LeNet's, and checks that they still are."""
    images, net = torch.randn(2, 1, 32, 32, device=device), tritonnet.LeNet().to(device).eval()
    with torch.no_grad():
        before = net(images)
        change(net)
        images = images.to(net.conv1.weight.dtype)
        after = net(images)
        # The same net without any cached state.
        assert torch.equal(after, copy.deepcopy(net)(images))
    assert after.shape != before.shape or not torch.allclose(after.float(), before, rtol=0, atol=1e-9)
