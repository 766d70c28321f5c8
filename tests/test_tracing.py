"""Tools that look into a model or write it down see our layers as they see torch's: torch.fx, FLOPs and ONNX."""

import contextlib
import importlib
import operator
import sys
import zipfile

import pytest
import torch
import torch.fx
import torch.nn.utils.parametrizations
from conftest import run_python
from torch.utils.flop_counter import FlopCounterMode

import tritonnet
import tritonnet.nn.functional as F
from bench.networks import NETWORKS
from tritonnet import nn
from tritonnet.compiler import compile_graph
from tritonnet.imports import when_imported

SMALL = dict(width=1 / 8, depth=1 / 4, stages=2, classes=100)


def small(name):
    torch.manual_seed(0)
    return NETWORKS[name](**SMALL)


def calls(model, tracer=None):
    """[(kind of node, target)] of what torch.fx traces, without inputs, parameters and output."""
    graph = (tracer or torch.fx.Tracer()).trace(model)
    return [(n.op, n.target) for n in graph.nodes if n.op not in ("placeholder", "get_attr", "output")]


def one_of_each():
    """A layer of every class, and images that they pass on."""
    layers = [
        nn.Conv2d(2, 4, 3, padding=1, padding_mode="reflect"), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2dReLU(4, 4, 3),
        nn.AvgPool2d(3, 1, 1), nn.ReLU6(), nn.LeakyReLU(), nn.SiLU(inplace=True), nn.Hardswish(), nn.GELU(),
        nn.Sigmoid(), nn.Hardsigmoid(), nn.Conv2dReLUMaxPool2d(4, 4, 3, padding=1), nn.AdaptiveAvgPool2d(2),
        nn.Flatten(), nn.LinearReLU(16, 8), nn.LinearChain(8, 8, 8), nn.Linear(8, 5),
    ]  # fmt: skip
    return nn.Sequential(*layers), torch.randn(3, 2, 12, 12)


def test_every_layer_is_a_leaf():
    model, x = one_of_each()
    assert calls(model) == [("call_module", str(i)) for i in range(len(model))]
    traced = torch.fx.symbolic_trace(model)
    assert torch.equal(traced(x), model(x))
    assert all(type(traced.get_submodule(name)) is type(layer) for name, layer in model.named_children())

    class Loss(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.loss = nn.CrossEntropyLoss()

        def forward(self, x, target):
            return self.loss(x, target=target)

    assert calls(Loss()) == [("call_module", "loss")]
    assert torch.fx.symbolic_trace(Loss())(torch.zeros(2, 5), torch.tensor([1, 2])).item() == pytest.approx(1.609438)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_converted_network_has_the_graph_of_torchs(name):
    model = small(name).eval()
    before = calls(model)
    assert calls(tritonnet.convert(model)) == before


def test_lenet_has_its_layers():
    assert calls(tritonnet.LeNet()) == [
        ("call_module", "conv1"), ("call_module", "conv2"), ("call_method", "flatten"), ("call_module", "fc1"),
        ("call_module", "fc2"), ("call_module", "fc3"),
    ]  # fmt: skip


class Doubled(nn.Conv2d):
    """A user's layer, which torch.fx traces through."""

    def forward(self, x):
        return super().forward(2 * x)


@pytest.mark.parametrize(
    "make, expected",
    [
        (lambda: Doubled(2, 3, 3), [operator.mul, F.conv2d]),
        (lambda: nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular"), [torch.nn.functional.pad, F.conv2d]),
        (lambda: nn.Conv2dReLU(2, 3, 3), [F.conv2d_relu]),
        (lambda: nn.Conv2dReLUMaxPool2d(2, 3, 3), [F.conv2d_relu_max_pool2d]),
        (lambda: nn.ReLU(), [F.relu]),
    ],
    ids=["a subclass", "a padding mode", "Conv2dReLU", "Conv2dReLUMaxPool2d", "ReLU"],
)
def test_what_is_traced_through_are_public_functions(make, expected):
    """A user's subclass, a layer that is the model itself, and what a tracer is told to trace through."""
    layer, x = make(), torch.randn(2, 2, 6, 6)

    class Through(torch.fx.Tracer):
        def is_leaf_module(self, module, name):
            return False

    inside = nn.Sequential(layer)
    assert [target for _, target in calls(layer)] == expected
    assert [target for _, target in calls(inside, Through())] == expected
    assert (calls(inside) == [("call_module", "0")]) == (type(layer) is not Doubled)
    torch.testing.assert_close(torch.fx.symbolic_trace(layer)(x), layer(x))


def test_hooks_run_once():
    """A layer with hooks is traced through, which records what they do."""
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    model[0].register_forward_hook(lambda module, args, y: y + 1)
    traced, x = torch.fx.symbolic_trace(model), torch.randn(3, 2)
    assert torch.equal(traced(x), model(x))


@pytest.mark.parametrize(
    "is_leaf",
    [
        lambda module, usual: False if isinstance(module, torch.nn.Conv2d) else usual,
        lambda module, usual: False if type(module).__name__ == "ReLU" else usual,
        lambda module, usual: not getattr(module, "expand", False),
    ],
    ids=["by a base class", "by a name", "by an attribute"],
)
def test_a_tracer_that_asks_for_some_layers(is_leaf):
    class Picky(torch.fx.Tracer):
        def is_leaf_module(self, module, name):
            return is_leaf(module, super().is_leaf_module(module, name))

    def kinds(nn):
        model = torch.nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.MaxPool2d(2))
        model[1].expand = True
        graph, classes = [n.op for n in Picky().trace(model).nodes], [type(layer) for layer in model]
        assert classes == [nn.Conv2d, nn.ReLU, nn.MaxPool2d]
        return graph

    assert kinds(nn) == kinds(torch.nn)


def test_layers_append_to_a_graph():
    """A proxy that is made by hand has a tracer that does not know the model."""
    traced, x = torch.fx.symbolic_trace(torch.nn.Identity()), torch.randn(2, 1, 4, 4)
    (*_, output) = traced.graph.nodes
    with traced.graph.inserting_before(output):
        output.args = (nn.MaxPool2d(2)(nn.ReLU()(torch.fx.Proxy(output.args[0]))).node,)
    traced.recompile()
    assert torch.equal(traced(x), F.max_pool2d(torch.relu(x), 2))


def test_a_parametrized_layer_is_a_leaf():
    model = nn.Sequential(torch.nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)))
    assert calls(model) == [("call_module", "0")]
    traced, x = torch.fx.symbolic_trace(model), torch.randn(3, 2)
    assert torch.equal(traced(x), model(x))


def count(function):
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_flop_counts()


@pytest.mark.parametrize("name", NETWORKS)
def test_flops_of_networks(name):
    """In all and module by module, in a training step and in evaluation, equal to those of torch's layers."""
    counts = []
    for change in (lambda model: model, lambda model: tritonnet.fuse(tritonnet.convert(model))):
        with torch.device("meta"):
            model, x = change(NETWORKS[name](depth=1 / 4)), torch.empty(2, 3, 224, 224)
        step = count(lambda model=model, x=x: model(x).sum().backward())
        with torch.no_grad():
            evaluation = count(lambda model=model, x=x: model.eval()(x))
        counts.append([{module: sum(c.values()) for module, c in table.items()} for table in (step, evaluation)])
    assert counts[0] == counts[1] and counts[0][0]["Global"] > counts[0][1]["Global"] > 0


def test_flops_of_a_compiled_network():
    """Fused by the backend, operators with an epilogue count what the convolutions in them do."""
    model, x = tritonnet.convert(small("resnet18")).eval(), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = count(lambda: model(x))["Global"]
        torch.compiler.reset()
        compiled = torch.compile(model, backend=compile_graph)
        compiled(x)
        assert sum(count(lambda: compiled(x))["Global"].values()) == sum(expected.values())


def exported(model, x, batch=None):
    """A function of images that runs the model in onnxruntime, and the kinds of its nodes."""
    import onnxruntime

    shapes = None if batch is None else ({0: torch.export.Dim("batch", min=1, max=64)},)
    with contextlib.redirect_stdout(None):
        if isinstance(model, torch.export.ExportedProgram):
            program = torch.onnx.export(model, dynamo=True, verbose=False)
        else:
            program = torch.onnx.export(model, (x,), dynamo=True, verbose=False, dynamic_shapes=shapes)
    nodes = {node.domain + node.op_type for node in program.model_proto.graph.node}
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString())
    name = session.get_inputs()[0].name
    return lambda x: torch.from_numpy(session.run(None, {name: x.numpy()})[0]), nodes


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("name", ["LeNet", "vgg16_bn", "resnet18", "one of each"])
def test_onnx(name):
    """A file of torch's operators, for any batch, with torch's numbers in onnxruntime."""
    x = torch.randn(3, 3, 32, 32)
    if name == "LeNet":
        model, x = tritonnet.LeNet(), x[:, :1]
    elif name == "one of each":
        model, x = one_of_each()
    else:
        model = tritonnet.convert(small(name))
    model.eval()
    run, nodes = exported(model, x, batch=3)
    assert "Conv" in nodes and not any("tritonnet" in node for node in nodes)
    for images in (x, x[:2]):
        with torch.no_grad():
            expected = model.double()(images.double())
        model.float()
        torch.testing.assert_close(run(images).double(), expected, rtol=1e-4, atol=1e-5)


def test_when_imported(tmp_path, monkeypatch):
    """The function is called once: after the module has run, or at once if it had; not if the module cannot run."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "meta_path", sys.meta_path.copy())
    called, file = [], tmp_path / "imported_later.py"
    when_imported("imported_later", lambda: called.append(sys.modules["imported_later"].value))
    file.write_text("1 / 0")
    with pytest.raises(ZeroDivisionError):
        importlib.import_module("imported_later")
    file.write_text("value = 12345")
    importlib.invalidate_caches()
    assert importlib.import_module("imported_later").value == 12345
    assert called == [12345]
    when_imported("imported_later", lambda: called.append("at once"))
    del sys.modules["imported_later"]
    importlib.import_module("imported_later")
    assert called == [12345, "at once"]
    with pytest.warns(UserWarning, match="tritonnet has no rules for imported_later: KeyError: 'changed'"):
        when_imported("imported_later", lambda: {}["changed"])


def test_when_imported_with_one_loader_for_several_modules(tmp_path, monkeypatch):
    with zipfile.ZipFile(tmp_path / "modules.zip", "w") as file:
        file.writestr("zipped.py", "import zipped_too")
        file.writestr("zipped_too.py", "")
    monkeypatch.syspath_prepend(tmp_path / "modules.zip")
    called = []
    when_imported("zipped", lambda: called.append(sys.modules["zipped_too"]))
    importlib.import_module("zipped")
    assert called == [sys.modules["zipped_too"]]


def test_when_imported_after_the_finders_have_been_replaced(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "meta_path", sys.meta_path.copy())
    called = []
    (tmp_path / "replaces.py").write_text("import sys; sys.meta_path = sys.meta_path[1:]")
    when_imported("replaces", lambda: called.append(1))
    importlib.import_module("replaces")
    assert called == [1]


def test_importing_imports_no_tool():
    """What takes long to import is waited for."""
    late = "torch._dynamo", "torch.distributed.tensor", "torch.onnx", "torch.utils.flop_counter"
    result = run_python("-c", f"import tritonnet, sys; print([m for m in {late} if m in sys.modules])")
    assert result.stdout.strip() == "[]", result.stderr


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("name", ["LeNet", "resnet18", "mobilenet_v3"])
@pytest.mark.sampled(3)
def test_onnx_of_an_exported_program(name):
    """In-place activations, too, are torch's operators then."""
    if name == "LeNet":
        model, x = tritonnet.LeNet().eval(), torch.randn(2, 1, 32, 32)
    else:
        model, x = tritonnet.convert(small(name)).eval(), torch.randn(2, 3, 32, 32)
    program = torch.export.export(model, (x,)).run_decompositions(tritonnet.decompositions())
    targets = {node.target for node in program.graph.nodes if node.op == "call_function"} - {operator.getitem}
    assert {target.namespace for target in targets} == {"aten"}
    run, _ = exported(program, x)
    torch.testing.assert_close(run(x), model(x).detach(), rtol=1e-4, atol=1e-5)
