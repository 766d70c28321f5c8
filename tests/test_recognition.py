"""Which forwards are recognised as a LeNet's: only those that do nothing else, in both modes, for any batch size."""

import pytest
import torch
import torch.nn as tnn
import torch.nn.functional as TF
from test_train_step import small
from written import forward_of

import tritonnet
from bench.libraries import TutorialLeNet
from tritonnet.lenet.recognition import find_layers
from tritonnet.lenet.served import NotServed

SEEN, COUNT = [], 0
HEAD = "self.fc3(TF.relu(self.fc2(TF.relu(self.fc1(x)))))"
CONVOLVED = "x = TF.max_pool2d(TF.relu(self.conv1(x)), 2); x = TF.max_pool2d(TF.relu(self.conv2(x)), 2); "
NET = "TutorialLeNet.forward(self, x)"

LENETS = {
    "as it is": f"return {NET}",
    "view(-1, features)": f"{CONVOLVED} return {HEAD.replace('(x)', '(x.view(-1, 400))')}",
    "view(N, -1)": f"{CONVOLVED} return {HEAD.replace('(x)', '(x.view(x.size(0), -1))')}",
    "reshape(len, -1)": f"{CONVOLVED} return {HEAD.replace('(x)', '(x.reshape(len(x), -1))')}",
    "flat features counted":
        "def count(t):\n    n = 1\n    for s in t.size()[1:]: n *= s\n    return n\n"
        f"{CONVOLVED} return {HEAD.replace('(x)', '(x.view(-1, count(x)))')}",
    "pooled before it is rectified":
        "x = TF.relu(TF.max_pool2d(self.conv1(x), 2)); x = TF.max_pool2d(self.conv2(x).relu_(), 2); "
        f"return {HEAD.replace('(x)', '(x.flatten(1))')}",
    "an optional part": f"x = x if self.down is None else self.down(x)\nreturn {NET}",
    "dropout of nothing": f"return TF.dropout({NET}, 0.5, training=False)",
}  # fmt: skip
OTHERS = {
    "more than layers": (f"return {NET} * 2", "calls mul"),
    "a counter": (f"self.calls += 1; return {NET}", "does more"),
    "a log": (f"SEEN.append(1); return {NET}", "does more"),
    "a global": (f"global COUNT\nCOUNT = 1\nreturn {NET}", "does more"),
    "print": (f"print('here'); return {NET}", "cannot be captured"),
    "it remembers": (f"self.last = {NET}; return self.last", "does more"),
    "by the number of images": (f"y = {NET}; return y * 2 if x.shape[0] > 100 else y", "cannot be captured"),
    "by one number of images": (f"y = {NET}; return y * 2 if len(x) == 37 else y", "cannot be captured"),
    "by a remainder": (f"assert len(x) % 8 == 0\nreturn {NET}", "how many images"),
    "but for one number": (f"assert x.shape[0] != 7\nreturn {NET}", "how many images"),
    "by torch's check": (f"torch._check(x.shape[0] < 100); return {NET}", "how many images"),
    "by value": (f"return {NET} if x.mean() > 0 else {NET} * 2", "cannot be captured"),
    "by chance": (f"return {NET} if torch.rand(1) < 0.5 else {NET} * 2", "cannot be captured"),
    "by mode": (f"y = {NET}; return y if self.training else y.softmax(1)", "calls softmax"),
    "if it is compiled": (f"y = {NET}; return y * 2 if torch.compiler.is_compiling() else y", "does more"),
    "a dict": (f"return {{'logits': {NET}}}", "does not give logits"),
    "images too": (f"return {NET}, x", "does not give logits"),
    "a tuple": (f"return ({NET},)", "does not give logits"),
    "an attribute of the result": (f"y = {NET}; y.name = 'logits'; return y", "cannot be captured"),
    "a hook on a tensor": (f"y = {NET}; y.register_hook(lambda g: g * 2); return y", "calls"),
    "detached": (f"return {NET}.detach()", "calls detach"),
    "no_grad": (f"with torch.no_grad(): return {NET}", "_set_grad_enabled"),
    "autocast": (f"with torch.autocast('cpu', torch.bfloat16): return {NET}", "_enter_autocast"),
    "images written to": (f"x += 1; return {NET}", "calls iadd"),
    "other images": ("x = self.template; " + f"return {NET}", "does not give logits"),
    "other weights": (CONVOLVED + "x = x.flatten(1); x = TF.relu(TF.linear(x, self.fc1.weight * 2, self.fc1.bias)); "
                      "return self.fc3(TF.relu(self.fc2(x)))", "calls mul"),
    "another order of pixels": (f"{CONVOLVED} return {HEAD.replace('(x)', '(x.mT.flatten(1))')}", "calls"),
    "another pooling": (
        f"{CONVOLVED.replace('max', 'avg', 1)} return {HEAD.replace('(x)', '(x.flatten(1))')}", "calls avg_pool2d"
    ),
    "squeezed": (f"return {NET}.squeeze()", "calls squeeze"),
    "dropout": (f"return TF.dropout({NET}, 0.5, training=self.training)", "calls dropout"),
}  # fmt: skip


def net(body):
    own = {"forward": forward_of(body, globals())}
    model = type("Net", (TutorialLeNet,), own)()
    model.register_buffer("template", torch.zeros(2, 1, 32, 32))
    model.down, model.calls = None, 0
    return model


@pytest.fixture(autouse=True)
def nothing_captured():
    torch.compiler.reset()
    SEEN.clear()


@pytest.mark.parametrize("name", LENETS)
@pytest.mark.sampled(2)
def test_lenets(name):
    model = net(LENETS[name])
    modes = [module.training for module in model.modules()]
    layers = find_layers(model)
    assert [p is q for layer, own in zip(layers, (model.conv1, model.conv2, model.fc1, model.fc2, model.fc3))
            for p, q in ((layer.weight, own.weight), (layer.bias, own.bias))] == [True] * 10  # fmt: skip
    assert modes == [module.training for module in model.modules()] and model.calls == 0


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.sampled(2)
def test_others(name):
    body, reason = OTHERS[name]
    model = net(body)
    with pytest.raises(NotServed, match=reason):
        find_layers(model)
    # It was inspected, not run.
    assert model.calls == 0 and not SEEN and not hasattr(model, "last")


def test_layers_of_all_kinds():
    sequence = tnn.Sequential(tnn.Sequential(tnn.Conv2d(1, 6, 5), tnn.ReLU(True), tnn.MaxPool2d(2)), tnn.Identity())
    sequence.extend([tnn.Conv2d(6, 16, 5), tnn.MaxPool2d(2, ceil_mode=True), tnn.ReLU(), tnn.Flatten()])
    sequence.extend([tnn.Linear(256, 120), tnn.ReLU(), tnn.Linear(120, 84), tnn.ReLU(), tnn.Linear(84, 3)])
    fused = tnn.Sequential(
        tritonnet.nn.Conv2dReLUMaxPool2d(3, 6, 5, padding=2), tritonnet.nn.Conv2dReLU(6, 16, 5), tnn.MaxPool2d(2),
        tnn.Flatten(), tritonnet.nn.LinearReLU(400, 120), tritonnet.nn.LinearReLU(120, 84), tnn.Linear(84, 10),
    )  # fmt: skip
    for model in (sequence, tritonnet.convert(sequence), fused, tritonnet.fuse(TutorialLeNet()), small()):
        layers = find_layers(model)
        assert [layer.weight for layer in layers] == [p for p in model.parameters() if p.dim() > 1]


class Called(TutorialLeNet):
    def __call__(self, x):
        return super().__call__(x) * 2


def test_hooks_and_replaced_methods_count():
    looks, changes, replaced = TutorialLeNet(), TutorialLeNet(), TutorialLeNet()
    looks.conv1.register_forward_hook(lambda module, args, y: SEEN.append(1))
    changes.conv1.register_forward_hook(lambda module, args, y: y * 2)
    replaced.conv1._conv_forward = lambda x, w, b: TF.conv2d(x, w * 2, b)
    whole, compiled = TutorialLeNet(), TutorialLeNet()
    whole.register_forward_hook(lambda module, args, y: y * 2)
    compiled._compiled_call_impl = lambda x: compiled._call_impl(x) * 2
    for model in (looks, changes, replaced, whole, compiled, Called()):
        with pytest.raises(NotServed):
            find_layers(model)
