"""Every example runs and prints what it shows."""

import pkgutil
import runpy

import pytest

import tritonnet
from tritonnet import examples

SAYS = {
    "compiled_and_exported": "on a batch of another size: tritonnet.conv2d_relu_max_pool2d.default",
    "per_sample_gradients": "fc3.bias       (16, 10)             as one by one",
    "residual_cnn": "results and gradients differ by",
    "resnet_digits": "% of the test digits are right",
    "tutorial_lenet": "epoch 2: 9",
}
# Epochs and digits, for one that trains for minutes.
ARGUMENTS = {"resnet_digits": ["1", "256"]}


@pytest.mark.parametrize("name", sorted(module.name for module in pkgutil.iter_modules(examples.__path__)))
def test_example(name, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", [name, *ARGUMENTS.get(name, ())])
    with tritonnet.backend("reference"):
        runpy.run_module(f"tritonnet.examples.{name}", run_name="__main__")
    assert SAYS[name] in capsys.readouterr().out
