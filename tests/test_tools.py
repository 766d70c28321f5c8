"""Tools that come with torch and are put around a model: what they make of our layers is what they make of torch's.

Each check gets a small network of torch's layers, ours (the same, converted) and images. Those of tools that go by the
exact class of a layer hold what they do then, and that `revert` is the way round.
"""

import copy
import io
import json
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.ao import quantization
from torch.nn.utils import fuse_conv_bn_eval, parametrizations, prune
from torch.optim import swa_utils
from torch.profiler import ProfilerActivity, profile, record_function

import tritonnet


class Net(nn.Module):
    """A convolution with batch norm, one without, pooling, and two linear layers."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn, self.relu1 = nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU()
        self.pool, self.conv2, self.relu2 = nn.MaxPool2d(2), nn.Conv2d(4, 6, 3), nn.ReLU()
        self.fc1, self.relu3, self.fc2 = nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)

    def forward(self, x):
        x = self.pool(self.relu1(self.bn(self.conv1(x))))
        x = self.relu2(self.conv2(x)).amax((2, 3))
        return self.fc2(self.relu3(self.fc1(x)))


LAYERS = (nn.Conv2d, nn.Linear)


def layers_of(model):
    return [module for module in model.modules() if isinstance(module, LAYERS)]


def same(a, b):
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def value_and_grads(model, x):
    model.zero_grad()
    y = model(x)
    y.pow(2).sum().backward()
    return [y.detach(), *(p.grad for p in model.parameters())]


def alike(change, ours, theirs, x):
    """The same change to both, with the same random numbers, leaves results and gradients the same."""
    results = []
    for model in (ours, theirs):
        torch.manual_seed(1)
        change(model)
        results.append(value_and_grads(model, x))
    same(*results)


def profiler(ours, theirs, x):
    """Operators by name with sizes, forward and backward; autograd's nodes by the layer's name; a trace as JSON."""
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True, with_flops=True) as profiled:
        with record_function("my step"):
            ours(x).sum().backward()
    found = {event.key: event for event in profiled.key_averages()}
    operators = (
        "conv2d", "conv2d_grads", "conv2d_weight_grad", "linear", "linear_weight_grad", "max_pool2d_values", "relu"
    )  # fmt: skip
    nodes = "Conv2dBackward", "LinearBackward", "MaxPool2dBackward", "ReLUBackward"
    assert {"my step", *(f"tritonnet::{name}" for name in operators), *nodes} <= set(found)
    sizes = [event.input_shapes[:2] for event in profiled.key_averages(True) if event.key == "tritonnet::conv2d"]
    assert [list(x.shape), list(ours.conv1.weight.shape)] in sizes
    assert not [event for event in found.values() if event.key.startswith("tritonnet::") and event.flops]


def chrome_trace(ours, theirs, x, tmp_path):
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiled:
        ours(x)
    profiled.export_chrome_trace(str(tmp_path / "trace.json"))
    events = json.loads((tmp_path / "trace.json").read_text(encoding="utf-8"))["traceEvents"]
    first = next(event for event in events if event.get("name") == "tritonnet::conv2d")
    assert first["args"]["Input Dims"][:2] == [list(x.shape), list(ours.conv1.weight.shape)]


def fuse_modules(ours, theirs, x):
    """It refuses our layers, and fuses them after revert."""
    pairs = [["conv1", "bn", "relu1"], ["conv2", "relu2"], ["fc1", "relu3"]]
    with pytest.raises(AssertionError, match="did not find fuser method for.*tritonnet"):
        quantization.fuse_modules(ours.eval(), pairs)
    expected = theirs.eval()(x)
    fused = quantization.fuse_modules(tritonnet.revert(ours), pairs)
    same(fused(x), expected)
    with tritonnet.backend("reference"):
        same(tritonnet.convert(fused)(x), expected)
    assert type(fused.conv1[0]) is tritonnet.nn.Conv2d and type(fused.bn) is nn.Identity


def quantize_dynamic(ours, theirs, x):
    """It passes over our layers without a word, and knows them after revert."""
    passed_over = quantization.quantize_dynamic(ours, dtype=torch.qint8)
    assert type(passed_over.fc1) is tritonnet.nn.Linear
    quantized = [quantization.quantize_dynamic(m, dtype=torch.qint8) for m in (tritonnet.revert(ours), theirs)]
    assert all(isinstance(model.fc1, torch.ao.nn.quantized.dynamic.Linear) for model in quantized)
    same(*(model.eval()(x) for model in quantized))


def prepare(ours, theirs, x):
    """It observes none of our layers, without a word, and all of them after revert."""

    def observed(model):
        model.eval().qconfig = quantization.get_default_qconfig("x86")
        prepared = quantization.prepare(model)
        return {name for name, module in prepared.named_modules() if hasattr(module, "activation_post_process")}

    assert not observed(copy.deepcopy(ours)) & {"conv1", "conv2", "fc1", "fc2"}
    assert observed(tritonnet.revert(ours)) == observed(theirs) >= {"conv1", "conv2", "fc1", "fc2"}


def prepare_qat(ours, theirs, x):
    """It passes over our layers; after revert its own, which call F.conv2d and F.linear, are served in a block."""
    for model in (ours, theirs):
        model.qconfig = quantization.get_default_qat_qconfig("x86")
    assert type(quantization.prepare_qat(ours).conv1) is tritonnet.nn.Conv2d
    prepared, expected = (quantization.prepare_qat(model) for model in (tritonnet.revert(ours), theirs))
    assert isinstance(prepared.conv1, torch.ao.nn.qat.Conv2d)
    with profile(activities=[ProfilerActivity.CPU]) as profiled, tritonnet.serve():
        y = prepared(x)
    assert {"tritonnet::conv2d", "tritonnet::linear"} <= {event.key for event in profiled.key_averages()}
    same(y, expected(x))


def pruned(ours, theirs, x):
    alike(lambda m: [prune.l1_unstructured(layer, "weight", 0.5) for layer in layers_of(m)], ours, theirs, x)
    assert float((ours.conv2.weight == 0).float().mean()) == 0.5
    alike(lambda m: [prune.remove(layer, "weight") for layer in layers_of(m)], ours, theirs, x)


def pruned_globally(ours, theirs, x):
    def change(model):
        chosen = [(layer, "weight") for layer in layers_of(model)]
        prune.global_unstructured(chosen, prune.L1Unstructured, amount=0.3)

    alike(change, ours, theirs, x)


def each_layer(change):
    def check(ours, theirs, x):
        def change_all(model):
            for layer in layers_of(model):
                change(layer)

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # two of these are deprecated
            alike(change_all, ours, theirs, x)

    return check


def fused_with_batch_norm(ours, theirs, x):
    ours.eval(), theirs.eval()
    fused = fuse_conv_bn_eval(ours.conv1, ours.bn)
    assert type(fused) is tritonnet.nn.Conv2d
    same(fused(x), theirs.bn(theirs.conv1(x)))


def traced(ours, theirs, x):
    """Saved, loaded, frozen and optimised, with another batch size."""
    expected = theirs.eval()(x)
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # sizes that are checked become constants; all of it is deprecated
        torch.jit.save(torch.jit.trace(ours.eval(), x[:2]), file)
        file.seek(0)
        loaded = torch.jit.load(file)
        for module in (loaded, torch.jit.freeze(loaded), torch.jit.optimize_for_inference(loaded)):
            assert "tritonnet::conv2d" in str(module.inlined_graph)
            same(module(x), expected)


def scripted(ours, theirs, x):
    """The deprecated torch.jit.script needs types that our functions' arguments do not have; after revert it works."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(RuntimeError):
            torch.jit.script(ours)
        same(torch.jit.script(tritonnet.revert(ours))(x), theirs(x))


def functional_call(ours, theirs, x):
    weights = {name: p.detach() + 0.1 for name, p in ours.named_parameters()}
    same(*(torch.func.functional_call(model, weights, (x,)) for model in (ours, theirs)))
    same(*(nn.utils.stateless.functional_call(model, weights, (x,)) for model in (ours, theirs)))


def ensemble(ours, theirs, x):
    """torch.func.stack_module_state and vmap."""
    results = []
    for model in (ours.eval(), theirs.eval()):
        state = torch.func.stack_module_state([model, model])
        results.append(torch.func.vmap(lambda p, b, m=model: torch.func.functional_call(m, (p, b), (x,)))(*state))
    same(*results)


def copies(ours, theirs, x):
    """deepcopy, pickle, torch.save of the whole model, and shared memory."""
    file = io.BytesIO()
    torch.save(ours, file)
    file.seek(0)
    for made in (
        copy.deepcopy(ours), pickle.loads(pickle.dumps(ours)), torch.load(file, weights_only=False),
        ours.share_memory(), nn.DataParallel(ours),
    ):  # fmt: skip
        assert [type(layer).__module__ for layer in layers_of(made)] == ["tritonnet.nn"] * 4
        same(value_and_grads(made, x), value_and_grads(theirs, x))


def averaged(ours, theirs, x):
    """Weights averaged over two steps, and batch norm's statistics of them."""
    results = []
    for model in (ours, theirs):
        average = swa_utils.AveragedModel(model, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(0.5))
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        for _ in range(2):
            value_and_grads(model, x)
            optimizer.step()
            average.update_parameters(model)
        swa_utils.update_bn([x], average)
        results.append(average.eval()(x))
    same(*results)


def hooks(ours, theirs, x):
    """Forward, pre-forward and full backward hooks get what they get from torch's layers."""
    results = []
    for model in (ours, theirs):
        seen = []
        for layer in layers_of(model):
            layer.register_forward_pre_hook(lambda m, args, seen=seen: seen.append(args[0]))
            layer.register_forward_hook(lambda m, args, y, seen=seen: seen.append(y))
            layer.register_full_backward_hook(lambda m, dx, dy, seen=seen: seen.extend([*dx[-1:], *dy]))
        value_and_grads(model, x.clone().requires_grad_())
        results.append(seen)
    assert len(results[0]) == 16
    same(*results)


CHECKS = {
    check.__name__: check
    for check in (
        profiler, chrome_trace, fuse_modules, quantize_dynamic, prepare, prepare_qat, pruned, pruned_globally,
        fused_with_batch_norm, traced, scripted, functional_call, ensemble, copies, averaged, hooks,
    )
} | {
    "weight_norm": each_layer(parametrizations.weight_norm),
    "weight_norm_by_hook": each_layer(nn.utils.weight_norm),
    "spectral_norm": each_layer(parametrizations.spectral_norm),
    "spectral_norm_by_hook": each_layer(nn.utils.spectral_norm),
    "orthogonal": lambda ours, theirs, x: alike(lambda m: parametrizations.orthogonal(m.fc2), ours, theirs, x),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*torch.ao.quantization is deprecated:DeprecationWarning")
@pytest.mark.parametrize("check", CHECKS)
def test_tool(check, request):
    theirs = Net()
    ours = tritonnet.convert(copy.deepcopy(theirs))
    more = {"tmp_path": request.getfixturevalue("tmp_path")} if check == "chrome_trace" else {}
    with tritonnet.backend("reference"):
        CHECKS[check](ours, theirs, torch.randn(3, 3, 8, 8), **more)
