"""linear_chain: every layer within its format's bound of float64, forward and backward; bit for bit the layers."""

import copy
import pickle

import pytest
import torch
import torch.func as tf
import torch.nn.functional as TF
from exact import DTYPES, assert_exact
from test_linear import strided
from torch.utils._python_dispatch import TorchDispatchMode

import tritonnet
import tritonnet.nn as nn
import tritonnet.nn.functional as F
from bench import unfused
from tritonnet import ops

# name: rows, input features and widths of the layers, which of them have a bias
CASES = {
    "LeNet head": (9, (400, 120, 84, 10), (1, 1, 1)),
    "two layers, no bias": (5, (7, 6, 3), (0, 0)),
    "two layers, biases": (5, (7, 6, 3), (1, 1)),
    "four layers, some biases": (40, (33, 17, 128, 16, 5), (1, 0, 1, 0)),
    "of one feature": (1, (1, 1, 1), (1, 1)),
    "more rows than a tile": (130, (20, 30, 3), (1, 1)),
    "too wide": (5, (7, 129, 4), (1, 1)),
}


def make(case, dtype, device):
    M, widths, biases = CASES[case]
    w = [torch.randn(n, k).to(device, dtype) for k, n in zip(widths, widths[1:])]
    b = [torch.randn(n).to(device, dtype) if has else None for n, has in zip(widths[1:], biases)]
    return torch.randn(M, widths[0]).to(device, dtype), w, b


def flat(*lists):
    """Weights, or weights and biases, in the order that the operators take."""
    pairs = [t for layer in zip(*lists) for t in layer]
    return pairs + [None] * (4 * len(lists) - len(pairs))


def double(t):
    return t.detach().cpu().double()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.sampled(3)
def test_every_layer(case, dtype, backend, device):
    """A layer's truth is computed from the actual result of the one before; no tolerance for tf32."""
    x, w, b = make(case, dtype, device)
    y, hidden = ops.linear_chain(x, *flat(w, b), True)
    widths = [t.shape[0] for t in w][:-1]
    h = (x, *hidden.split(widths, 1))
    for i, (result, a) in enumerate(zip((*h[1:], y), h)):
        z, size = double(a) @ double(w[i]).t(), double(a).abs() @ double(w[i]).abs().t()
        if b[i] is not None:
            z, size = z + double(b[i]), size + double(b[i]).abs()
        assert_exact(f"layer {i}", result, z if i == len(w) - 1 else z.relu(), size, a.shape[1] + 1)
    assert torch.equal(ops.linear_chain(x, *flat(w, b), False)[0], y)

    dy = torch.randn(y.shape).to(y)
    dx, dz = ops.linear_chain_input_grad(dy, hidden, *flat(w), True)
    d = (*dz.split(widths, 1), dy)
    for i, result in enumerate((dx, *d[:-1])):
        truth, size = double(d[i]) @ double(w[i]), double(d[i]).abs() @ double(w[i]).abs()
        passed = 1 if i == 0 else double(h[i]) > 0
        assert_exact(f"gradient before layer {i}", result, truth * passed, size * passed, w[i].shape[0])
    without_dx, again = ops.linear_chain_input_grad(dy, hidden, *flat(w), False)
    assert without_dx.shape == (len(x), 0) and torch.equal(again, dz)

    dw, db = ops.linear_chain_weight_grad(dy, dz, x, hidden, widths, True)
    for i, (g, s) in enumerate(zip(dw.split([t.numel() for t in w]), db.split([*widths, y.shape[1]]))):
        truth, size = double(d[i]).t() @ double(h[i]), double(d[i]).abs().t() @ double(h[i]).abs()
        assert_exact(f"weight {i}", g.view(truth.shape), truth, size, len(x))
        assert_exact(f"bias {i}", s, double(d[i]).sum(0), double(d[i]).abs().sum(0), len(x))


def gradients(function, x, w, b, dy=None):
    leaves = [t.detach().requires_grad_() for t in (x, *w, *b) if t is not None]
    given = iter(leaves)
    x, *rest = (next(given) if t is not None else None for t in (x, *w, *b))
    y = function(x, rest[: len(w)], rest[len(w) :])
    return y, *torch.autograd.grad(y, leaves, torch.ones_like(y[..., :1]).expand(y.shape) if dy is None else dy)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_bits_of_the_layers(dtype, backend, device):
    """Sums of integers are exact in any order, so that only the roundings between the layers remain."""
    x, w, b = ([t.mul(3).round() for t in ts] for ts in ((torch.randn(21, 50),), *make_small()))
    x, w, b = ([t.to(device, dtype) for t in ts] for ts in (x, w, b))
    dy = torch.randint(-3, 4, (21, 3)).to(device, dtype)
    ours, theirs = (gradients(f, x[0], w, b, dy) for f in (F.linear_chain, layer_by_layer))
    assert all(map(torch.equal, ours, theirs))


def make_small():
    widths = 50, 20, 11, 3
    return [torch.randn(n, k) for k, n in zip(widths, widths[1:])], [torch.randn(n) for n in widths[1:]]


def layer_by_layer(x, w, b):
    for weight, bias in zip(w[:-1], b):
        x = F.linear_relu(x, weight, bias)
    return F.linear(x, w[-1], b[-1])


@pytest.mark.parametrize("case", ["four layers, some biases", "two layers, no bias"])
@pytest.mark.parametrize("prepare", [strided, lambda t: t], ids=["strided", "contiguous"])
def test_functional(case, prepare, backend, device):
    """Against torch, with an expanded gradient."""
    x, w, b = make(case, torch.float64, device)
    laid_out = prepare(x), [prepare(t) for t in w], [None if t is None else prepare(t) for t in b]
    torch.testing.assert_close(gradients(F.linear_chain, *laid_out), gradients(unfused.linear_chain, x, w, b))


@pytest.mark.parametrize("leading", [(), (0,), (2, 3), (1,), (15,), (16,), (17,), (8193,)], ids=str)
@pytest.mark.sampled(2)
def test_leading_sizes(leading, backend, device):
    w, b = ([t.double().to(device) for t in ts] for ts in make_small())
    x = torch.randn(*leading, 50, device=device).double()
    torch.testing.assert_close(gradients(F.linear_chain, x, w, b), gradients(unfused.linear_chain, x, w, b))


@pytest.mark.parametrize("count", [1, 5, 6])
def test_numbers_of_layers_that_one_launch_does_not_take(count, backend, device):
    w = [torch.randn(4, 4, device=device).double() for _ in range(count)]
    x, none = torch.randn(3, 4, device=device).double(), [None] * count
    torch.testing.assert_close(gradients(F.linear_chain, x, w, none), gradients(unfused.linear_chain, x, w, none))


@pytest.mark.parametrize("wanted", [(0,), (1,), (3,), (4,), (6,), (0, 5), (2, 4), (3, 6)], ids=str)
def test_only_the_gradients_asked_for(wanted, backend, device):
    """Arguments: x, three weights, three biases."""
    w, b = ([t.double().to(device) for t in ts] for ts in make_small())
    found = []
    for f in (F.linear_chain, unfused.linear_chain):
        tensors = [t.detach() for t in (torch.linspace(-1, 1, 250).view(5, 50).double().to(device), *w, *b)]
        leaves = [tensors[i].requires_grad_() for i in wanted]
        f(tensors[0], tensors[1:4], tensors[4:]).square().sum().backward()
        found.append([t.grad for t in leaves])
        assert all(t.grad is None for i, t in enumerate(tensors) if i not in wanted)
    torch.testing.assert_close(*found)


def test_launches(device):
    x, w, b = make("LeNet head", torch.float32, device)
    leaves = [t.requires_grad_() for t in (x, *w, *b)]
    with tritonnet.backend("triton"), tritonnet.count_launches() as launches:
        y = F.linear_chain(x, w, b)
        assert launches == {"linear_chain_forward_kernel": 1}
        torch.autograd.grad(y.sum(), leaves)
    assert launches.pop("sum_partials_kernel", 1) == 1
    names = "forward", "input_grad", "weight_grad"
    assert launches == dict.fromkeys((f"linear_chain_{name}_kernel" for name in names), 1)
    x, w, b = make("too wide", torch.float32, device)
    with tritonnet.backend("triton"), tritonnet.count_launches() as launches:
        F.linear_chain(x, w, b)
    assert launches == {"linear_forward_kernel": 2}


def test_hidden_layers_are_kept_for_backward_only(backend, device):
    x, w, b = make("two layers, no bias", torch.float32, device)
    kept = []

    class Calls(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function is ops.linear_chain:
                kept.append(args[-1])
            return function(*args, **(kwargs or {}))

    with Calls():
        F.linear_chain(x, w, b)
        F.linear_chain(x, [w[0], w[1].requires_grad_()], b)
        with torch.no_grad():
            F.linear_chain(x, w, b)
    assert kept == [False, True, False]


def test_biases_may_be_overwritten_before_the_gradient_of_a_batch(backend, device):
    """As an optimiser does between torch.func.vjp and the pull-back, where no version counter is checked."""
    x, w, b = make("two layers, biases", torch.float64, device)
    results = []
    for f in (F, unfused):
        biases = [t.clone() for t in b]
        y, pull_back = tf.vjp(tf.vmap(lambda row, f=f, biases=biases: f.linear_chain(row, w, biases)), x)
        for t in biases:
            t.add_(10)
        results.append(pull_back(torch.ones_like(y)))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")], ids=str)
def test_special_values_stay_in_their_row(value, backend, device):
    """Lanes past a layer's width must not spread them."""
    x, w, b = make("four layers, some biases", torch.float32, device)
    w = [t.abs() + 1 for t in w]
    x[3, 2] = value
    truth = unfused.linear_chain(x.cpu(), [t.cpu() for t in w], [None if t is None else t.cpu() for t in b])
    torch.testing.assert_close(F.linear_chain(x, w, b).cpu(), truth, rtol=1e-4, atol=1e-4, equal_nan=True)


def test_other_dtypes_and_autocast(backend, device):
    x, w, b = make("two layers, no bias", torch.float32, device)
    with torch.autocast(device.type, torch.bfloat16):
        y = F.linear_chain(x, [t.requires_grad_() for t in w], b)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert all(t.grad.dtype == torch.float32 for t in w)
    x, w = torch.randint(-3, 4, (2, 3)), [torch.randint(-3, 4, size) for size in ((4, 3), (2, 4))]
    assert torch.equal(F.linear_chain(x, w), TF.linear(TF.relu(TF.linear(x, w[0])), w[1]))


X, W, B = torch.ones(2, 3), (torch.ones(4, 3), torch.ones(5, 4)), (torch.ones(4), None)


@pytest.mark.parametrize(
    "arguments, kind, message",
    [
        ((X, W[0]), TypeError, "weights must be a list or tuple, got Tensor"),
        ((X, W, B[0]), TypeError, "biases must be a list or tuple, got Tensor"),
        ((X, (W[0], 3)), TypeError, "weights[1] must be a Tensor, got int"),
        ((X, W, (1.0, None)), TypeError, "biases[0] must be a Tensor, got float"),
        ((3, W), TypeError, "input must be a Tensor, got int"),
        ((X, ()), RuntimeError, "got 0 weights and 0 biases"),
        ((X, W, B[:1]), RuntimeError, "got 2 weights and 1 biases"),
        ((X[0, 0], W), RuntimeError, "input must be (..., K), got size []"),
        ((X, W[::-1]), RuntimeError, "weights[0] must be (N, 3) for the 3 features before it, got size [5, 4]"),
        ((X, (W[0], W[0])), RuntimeError, "weights[1] must be (N, 4) for the 4 features before it, got size [4, 3]"),
        ((X, W, (None, torch.ones(4))), RuntimeError, "biases[1] must have size [5], got [4]"),
        ((X, (W[0], W[1].double())), RuntimeError, "input and weights[1] must have the same dtype"),
        ((X, W, (None, torch.ones(5, device="meta"))), RuntimeError, "input and biases[1] must be on the same device"),
    ],
    ids=lambda value: value[:45] if isinstance(value, str) else "",
)
def test_errors(arguments, kind, message, backend):
    with pytest.raises(kind) as e:
        F.linear_chain(*arguments)
    assert str(e.value).startswith("linear_chain: ") and message in str(e.value)


def test_module(device):
    """The modules, initial values, repr and state_dict of the equivalent Sequential."""
    torch.manual_seed(3)
    chain = nn.LinearChain(7, 6, 5, 2)
    torch.manual_seed(3)
    apart = torch.nn.Sequential(
        torch.nn.Linear(7, 6), torch.nn.ReLU(), torch.nn.Linear(6, 5), torch.nn.ReLU(), torch.nn.Linear(5, 2)
    )
    assert list(chain.state_dict()) == list(apart.state_dict()) and isinstance(chain, torch.nn.Sequential)
    assert all(map(torch.equal, chain.parameters(), apart.parameters()))
    assert repr(chain) == repr(apart).replace("Sequential", "LinearChain")
    apart.load_state_dict(chain.state_dict())
    chain, x = chain.to(device), torch.randn(3, 7)
    for twin in (chain, copy.deepcopy(chain), pickle.loads(pickle.dumps(chain))):
        with tritonnet.backend("triton"), tritonnet.count_launches() as launches, torch.no_grad():
            torch.testing.assert_close(twin(x.to(device)).cpu(), apart(x))
        assert type(twin) is nn.LinearChain and launches == {"linear_chain_forward_kernel": 1}
    assert type(chain[:3]) is torch.nn.Sequential and list(chain[2:].state_dict())[0] == "2.weight"
    assert nn.LinearChain(3, 2, 1, bias=False, dtype=torch.float64)[2].bias is None
    with pytest.raises(ValueError, match=r"at least one layer, got \(3,\)"):
        nn.LinearChain(3)


def test_module_whose_layers_were_changed(backend, device):
    chain, x, seen = nn.LinearChain(7, 6, 2).to(device), torch.randn(3, 7, device=device), []
    expected = chain(x)
    handle = chain[0].register_forward_hook(lambda module, args, y: seen.append(y.shape))
    torch.testing.assert_close(chain(x), expected)
    handle.remove()
    chain[1] = torch.nn.Sigmoid()
    torch.testing.assert_close(chain(x), chain[2](chain[0](x).sigmoid()))
    chain[1] = nn.ReLU()
    torch.testing.assert_close(chain.append(nn.ReLU())(x), expected.relu())
    assert seen == [(3, 6)]


def test_lenet_with_hooks(device):
    net, x, seen = tritonnet.LeNet().to(device), torch.randn(2, 1, 32, 32, device=device), []
    with tritonnet.backend("reference"):
        expected = net(x)
        net.fc2.register_forward_hook(lambda module, args, y: seen.append(y.shape))
        torch.testing.assert_close(net(x), expected)
    assert seen == [(2, 84)]
