"""A fused model does what the unfused one does: numbers, dtypes, gradients, side effects, errors, and later changes."""

import collections
import contextlib
import copy
import io
import math
import os
import pickle
import random
import threading
import types
import warnings

import numpy as np
import pytest
import torch
import torch.nn as tnn
import torch.nn.functional as TF
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

import tritonnet

# Forwards that are drawn at random; the suite has time for some.
DRAWN = int(os.environ.get("TRITONNET_TEST_FORWARDS", 40))


@pytest.fixture(autouse=True)
def on_the_reference():
    """What runs is not the question here; and a limit of captures that others have used up, nobody's."""
    torch.compiler.reset()
    with tritonnet.backend("reference"):
        yield


class Part(tnn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.drop, self.enabled, self.scale = tnn.Conv2d(4, 4, 1), tnn.Dropout(0.5), True, 1.5

    def features(self, x):
        return self.drop(TF.relu(self.conv(x))) if self.enabled else x

    def forward(self, x):
        return self.features(x) * self.scale


class Net(tnn.Module):
    """Something of everything that a forward can reach."""

    def __init__(self):
        super().__init__()
        self.conv, self.other, self.down = tnn.Conv2d(1, 4, 3), tnn.Conv2d(4, 4, 3, padding=1), None
        self.relu, self.pool, self.drop, self.part = tnn.ReLU(), tnn.MaxPool2d(2), tnn.Dropout(0.5), Part()
        self.blocks = tnn.ModuleList([tnn.Conv2d(4, 4, 1), tnn.ReLU()])
        self.layers = tnn.Sequential(tnn.Conv2d(4, 4, 1), tnn.ReLU(inplace=True))
        self.register_buffer("offset", torch.ones(4, 1, 1))
        self.slope, self.sizes, self.names, self.log, self.calls = 2.0, [3.0], {"a": 1.0}, [], 0

    def row(self, x):
        return TF.relu(self.conv(x))

    def forward(self, x):
        x = self.layers(self.pool(self.relu(self.conv(x))))
        for block in self.blocks:
            x = block(x)
        return self.part(self.drop(x)) * self.slope * self.sizes[0] * self.names["a"]


class Scaled(tnn.Sequential):
    """A Sequential whose forward is its own."""

    calls = 0

    def forward(self, x):
        self.calls += 1
        with torch.no_grad():
            factor = super().forward(x).mean()
        return super().forward(x) * factor


GLOBAL, FACTORS, SEEN = 2.0, [3.0], []

# Bodies of Net's forward. Each takes x (2, 1, 8, 8); `row` is convolution and rectifier.
FORWARDS = {
    # Written in place in eager, and so seen under all names of what is written to.
    "an alias": "y = self.row(x); z = y; y += 1; return z * 1",
    "a list of features": "y = self.row(x); features = [y]; y += 1; return features[0] * 2",
    "a view": "y = self.conv(x); v = y[0]; y = TF.relu_(y); return v.sum() + y",
    "a view that is written to": "y = self.conv(x); y[:, 0] = 7; return TF.relu(y)",
    "a view of the result": "y = self.row(x); y[:, 1].mul_(2); return y",
    "the caller's tensor": "x += 1; return self.row(x)",
    "the caller's tensor in between": "y = self.conv(x); x.zero_(); return TF.relu(y)",
    "a buffer": "y = self.row(x); self.offset += 1; return y * self.offset",
    "a buffer by another name": "b = self.offset; b *= 2; return self.row(x) * b",
    "weights in between": "y = self.conv(x)\nwith torch.no_grad(): self.conv.weight.mul_(0.5)\nreturn TF.relu(y)",
    "detached": "y = self.conv(x); z = y.detach(); y = TF.relu_(y); return y + z",
    "data": "y = self.row(x); y.data.mul_(2); return y",
    "data of a weight": "self.conv.weight.data.mul_(0.5); return self.row(x)",
    "identity": "y = self.conv(x); z = TF.relu_(y); return z * (2 if y is z else 1)",
    "memory": "y = self.conv(x); z = TF.relu_(y); return z * (2 if y.data_ptr() == z.data_ptr() else 1)",
    "out=": "return torch.add(self.row(x).detach(), 1, out=torch.empty(0, dtype=x.dtype))",
    "strides": "y = self.row(x); return y * y.stride()[0]",
    # What torch answers without a tensor.
    "a random branch": "y = self.row(x)\nif torch.rand(1) < 0.5: y = y * 2\nreturn y",
    "a random number": "return self.row(x) * torch.randn(()).item()",
    "Python's random numbers": "return self.row(x) * random.random()",
    "numpy's random numbers": "return self.row(x) * np.random.rand()",
    "a seed": "torch.manual_seed(3); return self.row(x) * torch.rand(1)",
    "a seed behind": "y = self.row(x); torch.manual_seed(3); return TF.dropout(y)",
    "is_autocast_enabled": "return self.row(x) * (2 if torch.is_autocast_enabled('cpu') else 1)",
    "get_default_dtype": "return self.row(x) * (2 if torch.get_default_dtype() == torch.float64 else 1)",
    "is_tracing": "return self.row(x) * (2 if torch.jit.is_tracing() else 1)",
    "is_compiling": "return self.row(x) * (2 if torch.compiler.is_compiling() else 1)",
    "is_dynamo_compiling": "return self.row(x) * (2 if torch.compiler.is_dynamo_compiling() else 1)",
    "is_grad_enabled": "return self.row(x) * (2 if torch.is_grad_enabled() else 1)",
    "is_inference_mode_enabled": "return self.row(x) * (2 if torch.is_inference_mode_enabled() else 1)",
    "deterministic algorithms": "return self.row(x) * (2 if torch.are_deterministic_algorithms_enabled() else 1)",
    "threads": "return self.row(x) * torch.get_num_threads()",
    "flags": "return self.row(x) * (2 if torch.backends.mkldnn.enabled and torch.backends.cudnn.enabled else 1)",
    "the environment": "return self.row(x) * float(os.environ.get('TRITONNET_NOTHING', '1'))",
    "grad_fn": "y = self.row(x); return y * (2 if y.grad_fn is None else 1)",
    "requires_grad": "return self.row(x) * (2 if x.requires_grad else 1)",
    "a checkpoint": "return checkpoint(lambda v: TF.relu(self.other(self.row(v))), x, use_reentrant=False)",
    "a checkpoint with dropout": "return checkpoint(lambda v: TF.dropout(self.row(v)), x, use_reentrant=False)",
    "a reentrant checkpoint": "return checkpoint(lambda v: self.row(v) * self.slope, x, use_reentrant=True)",
    # What changes how autograd or autocast work, in between or around.
    "no_grad around the rectifier": "y = self.conv(x)\nwith torch.no_grad(): z = TF.relu(y)\nreturn z + self.offset",
    "no_grad around the convolution": "with torch.no_grad(): y = self.conv(x)\nreturn TF.relu(y) + y.mean()",
    "autocast around the convolution":
        "with torch.autocast('cpu', torch.bfloat16): y = self.conv(x.float())\nreturn TF.relu(y)",
    "autocast around the rectifier": "y = self.conv(x)\nwith torch.autocast('cpu', torch.bfloat16): return TF.relu(y)",
    "a hook on a tensor": "y = self.conv(x); y.register_hook(lambda g: g * 2); return TF.relu(y)",
    "hooks on what is saved":
        "with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t * 2): y = self.conv(x)\n"
        "return TF.relu(y)",
    # Modules in it.
    "an attribute of a layer": "return TF.dropout(self.row(x), self.drop.p, self.drop.training)",
    "a method of a part": "return self.part.features(self.row(x)) * self.part.scale",
    "an optional part": "return self.row(x) if self.down is None else self.down(x)",
    "getattr": "return getattr(self, 'relu')(getattr(self, 'conv')(x))",
    "what a part remembers": "y = self.row(x); self.part.last = y; return y + 1",
    "what it remembers": "y = self.conv(x); self.last = y; return TF.relu(y)",
    "evaluation of a part": "self.drop.eval(); return self.drop(self.row(x))",
    "training of a part": "self.drop.train(); return self.drop(self.row(x))",
    "a layer that is made": "y = self.row(x); return tnn.Identity()(tnn.ReLU()(y))",
    "a copied layer": "return TF.relu(copy.deepcopy(self.conv)(x))",
    "a generator": "return sum(TF.relu(block(self.row(x))) for block in self.blocks)",
    # Side effects.
    "a counter": "self.calls += 1; return self.row(x) * self.calls",
    "a log": "y = self.row(x); self.log.append(y.sum().item()); return y",
    "a log of tensors": "y = self.row(x); self.log.append(y); return y * 2",
    "print": "y = self.row(x); print('here', y.shape); return y",
    "a warning": "y = self.row(x); warnings.warn('hm'); return y",
    "a global that is written": "global GLOBAL\nGLOBAL = GLOBAL + 1\nreturn self.row(x) * GLOBAL",
    "a global list": "SEEN.append(1); return self.row(x) * FACTORS[0] * len(SEEN)",
    # Errors.
    "raise": "y = self.row(x)\nif y.shape[1] == 4: raise ValueError('bad')\nreturn y",
    "assert": "y = self.row(x)\nassert y.shape[1] == 3, 'three'\nreturn y",
    "assert of a tensor": "y = self.row(x)\nassert (y < 0).any(), 'negative'\nreturn y",
    "a wrong shape": "return self.row(x).view(7, -1)",
    "a wrong shape that is caught": "try: y = self.row(x).view(7, -1)\nexcept RuntimeError: y = x\nreturn y",
    "a wrong type": "return torch.cat([1, self.row(x)])",
    "a wrong call": "return TF.relu(self.conv(x), 1, 2)",
    "a wrong dimension": "return self.row(x).sum(9)",
    "a wrong probability": "return TF.dropout(self.row(x), 1.5)",
    "no such key": "return {}['a'] * self.row(x)",
    "no such attribute": "return self.row(x) + self.nothing",
    "division by zero": "return self.row(x) * (1 / 0)",
    # Results and numbers.
    "a dict": "return {'a': self.row(x), 'b': 3}",
    "none": "return None if x is None else self.row(x)",
    "by value": "y = self.row(x)\nreturn y * 2 if y.sum() > 0 else y",
    "a loop by value": "y = self.row(x)\nwhile y.sum() < 1000: y = y * 2 + 1\nreturn y",
    "an element": "y = self.row(x); return y * y.max().item()",
    "numpy": "return self.row(x) * float(np.sqrt(2.0)) * math.sin(1.0)",
    "numpy's array": "return torch.from_numpy(self.row(x).detach().numpy() * 2)",
    "rows": "y = self.row(x)\nfor r in y: y = y + r.sum()\nreturn y",
    "used twice": "y = self.conv(x); return TF.relu(y) + y",
    "pooled and not": "y = self.row(x); return self.pool(y).sum() + y",
    "indices": "y, i = TF.max_pool2d(self.row(x), 2, return_indices=True); return y + i",
    "an import inside": "import torch.nn.functional as functional\nreturn functional.relu(self.conv(x))",
}  # fmt: skip


def with_forward(body):
    """A Net whose forward has this body."""
    lines = "\n".join(f"    {line}" for line in body.split("\n"))
    own = {}
    exec(f"def forward(self, x):\n{lines}", globals(), own)
    torch.manual_seed(0)
    return type("Drawn", (Net,), own)()





def run(model, x, calls=3):
    """All that can be seen of some calls, with their backward passes."""
    global GLOBAL
    GLOBAL = 2.0
    SEEN.clear()
    outcomes = []
    for seed in range(calls):
        torch.manual_seed(seed), random.seed(seed), np.random.seed(seed)
        model.zero_grad()
        given, printed, saved = x.clone(), io.StringIO(), []
        with warnings.catch_warnings(record=True) as warned, contextlib.redirect_stdout(printed):
            warnings.simplefilter("always")
            try:
                y = model(given)
                if isinstance(y, torch.Tensor) and y.requires_grad:
                    y.square().sum().backward()
            except Exception as e:
                y = type(e), str(e).partition("\n")[0][:80]
        said = [str(w.message) for w in warned if "Dynamo does not know" not in str(w.message)]
        state = [t.clone() for t in (*model.parameters(), *model.buffers())]
        gradients = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
        modes = [module.training for module in model.modules()]
        own = copy.copy(model.log), model.calls, getattr(model, "last", None), getattr(model.part, "last", None)
        drawn = torch.rand(1), random.random(), np.random.rand()
        outcomes.append((y, given, state, gradients, modes, own, drawn, printed.getvalue(), said, GLOBAL, len(SEEN)))
    return outcomes


def assert_same(a, b):
    assert type(a) is type(b)
    if isinstance(a, torch.Tensor):
        assert (a.dtype, a.shape, a.requires_grad, a.stride()) == (b.dtype, b.shape, b.requires_grad, b.stride())
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9, equal_nan=True)
    elif isinstance(a, (tuple, list)):
        assert len(a) == len(b)
        for one, other in zip(a, b):
            assert_same(one, other)
    elif isinstance(a, dict):
        assert_same(sorted(a.items()), sorted(b.items()))
    else:
        assert a == b or a != a and b != b


def assert_faithful(model, x, calls=3):
    fused = tritonnet.fuse(copy.deepcopy(model))
    expected = run(model, x, calls)
    found = run(fused, x, calls)
    assert_same(found, expected)


def images():
    torch.manual_seed(5)
    return torch.randn(2, 1, 8, 8, dtype=torch.float64)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", FORWARDS)
def test_forwards(name, training):
    assert_faithful(with_forward(FORWARDS[name]).double().train(training), images())
