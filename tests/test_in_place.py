"""relu in place against torch's: values, gradients, counted writes, other views of the memory, and errors."""

import contextlib

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
import torch.func as tf
import torch.nn.functional as TF
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

import tritonnet.nn.functional as F


class Marked(torch.Tensor):
    pass


def negative(t):
    """A view of t whose memory holds its elements negated."""
    return torch._neg_view(t)


def imaginary(t):
    """The same as it occurs in programs: the imaginary part of a conjugate."""
    return torch.complex(t * 0, t).conj().imag


VIEWS = {
    "itself": lambda t: t,
    "negative": negative,
    "imaginary": imaginary,
    "real": lambda t: torch.complex(t, t * 0).conj().real,
    "negative, gaps": lambda t: negative(t)[:, 1:],
    "gaps": lambda t: t[:, ::2],
    "transposed": lambda t: t.t(),
    "empty": lambda t: t[:0],
    "negative, empty": lambda t: negative(t)[:0],
    "scalar": lambda t: t[0, 0],
    "expanded": lambda t: t[:1].expand(4, -1),
    "negative, expanded": lambda t: negative(t)[:1].expand(4, -1),
    "subclass": lambda t: t.as_subclass(Marked),
    "negative, subclass": lambda t: negative(t).as_subclass(Marked),
    "chunk": lambda t: t.chunk(2)[0],
    "split": lambda t: t.split(2)[1],
    "unbind": lambda t: t.unbind()[1],
    "detached": lambda t: t.detach(),
}


def through(view):
    """For a view of a tensor with gradients: result, base, both version counters, and the gradient through either."""

    def run(relu_, t):
        leaf = t.requires_grad_()
        base = leaf * 1
        x = VIEWS[view](base)
        before = x._version
        y = relu_(x)
        assert y is x
        total = y.pow(2).sum() + base.pow(3).sum()
        return y, type(y), y.is_neg(), base, x._version - before, base._version, torch.autograd.grad(total, leaf)

    return run


def without_gradients(view, made_in, written_in):
    def run(relu_, t):
        with made_in():
            x = VIEWS[view](t)
        with written_in():
            y = relu_(x)
        assert y is x
        return y, t, y.requires_grad, None if x.is_inference() else x._version, t._version

    return run


def leaf(relu_, t):
    relu_(t.requires_grad_())


def view_of_leaf(relu_, t):
    relu_(negative(t.requires_grad_()))


def leaf_without_gradients(relu_, t):
    t = torch.nn.Parameter(t)
    with torch.no_grad():
        relu_(t[1:])
    return t, t._version


def view_made_without_gradients(relu_, t):
    x = t.requires_grad_() * 1
    with torch.no_grad():
        view = x[1:]
    relu_(view)


def view_made_in_inference_mode(relu_, t):
    x = t.requires_grad_() * 1
    with torch.inference_mode():
        view = x[1:]
    relu_(view)


def of_inference_mode(relu_, t):
    with torch.inference_mode():
        x = t + 1
    relu_(x)


def saved_before(relu_, t):
    x = t.requires_grad_() * 1
    y = x.square()
    relu_(x)
    y.sum().backward()


def saved_before_inference_mode(relu_, t):
    """The write in inference mode is counted like any other; otherwise the gradient would be silently wrong."""
    x = t.requires_grad_() * 1
    y = x.square()
    with torch.inference_mode():
        relu_(x)
    y.sum().backward()


def second_derivative(relu_, t):
    x = negative(t.requires_grad_() ** 3)
    relu_(x)
    (gradient,) = torch.autograd.grad(x.sum(), t, create_graph=True)
    return torch.autograd.grad(gradient.sum(), t)


def forward_mode(view):
    def run(relu_, t):
        with forward_ad.dual_level():
            base = forward_ad.make_dual(t, t + 1)
            relu_(VIEWS[view](base))
            return *forward_ad.unpack_dual(base), base._version

    return run


def of_negative_tangent(relu_, t):
    with forward_ad.dual_level():
        return (*forward_ad.unpack_dual(relu_(forward_ad.make_dual(t, negative(t + 1)))),)


def batched(relu_, t):
    y = tf.vmap(lambda row: relu_(row[1:]))(t)
    return y, t, t._version


def differentiated(view):
    def run(relu_, t):
        def loss(t):
            base = t * 1
            relu_(VIEWS[view](base))
            return base.pow(3).sum()

        return tf.grad(loss)(t), tf.jvp(loss, (t,), (t + 1,))

    return run


def per_sample(relu_, t):
    def loss(row):
        base = row * 1
        relu_(base[1:])
        return base.pow(3).sum()

    return tf.vmap(tf.grad(loss))(t), tf.vmap(tf.hessian(loss))(t)


def argument_of_a_transform(relu_, t):
    tf.grad(lambda t: relu_(t).sum())(t)


def traced(relu_, t):
    def call(t):
        base = t * 1
        relu_(negative(base))
        return base

    return make_fx(call)(t)(t), make_fx(call, tracing_mode="symbolic")(t)(t)


def fake(relu_, t):
    with FakeTensorMode() as mode:
        x = negative(mode.from_tensor(t))
        return relu_(x).is_neg(), x._version


def meta(relu_, t):
    x = negative(t.to("meta"))
    return relu_(x).is_neg(), x._version


def zeros(relu_, t):
    relu_(torch._efficientzerotensor((3,), dtype=t.dtype, device=t.device))


ANYWHERE = contextlib.nullcontext, torch.no_grad, torch.inference_mode
CASES = {
    **{f"through {view}": through(view) for view in VIEWS},
    **{
        f"{view}, made in {made_in.__name__}, written in {written_in.__name__}": without_gradients(
            view, made_in, written_in
        )
        for view in ("itself", "negative", "imaginary", "gaps", "subclass", "unbind")
        for made_in in ANYWHERE
        for written_in in ANYWHERE
    },
    **{f"forward mode, {view}": forward_mode(view) for view in ("gaps", "negative", "chunk")},
    **{f"differentiated, {view}": differentiated(view) for view in ("gaps", "negative", "chunk")},
    **{
        case.__name__: case
        for case in (
            leaf, view_of_leaf, leaf_without_gradients, view_made_without_gradients, view_made_in_inference_mode,
            of_inference_mode, saved_before, saved_before_inference_mode, second_derivative, of_negative_tangent,
            batched, per_sample, argument_of_a_transform, traced, fake, meta, zeros,
        )
    },
}  # fmt: skip


def outcome(case, relu_, device):
    """The leaves of a case's result, or the type of its exception."""
    t = torch.randn(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).to(device)
    try:
        return pytree.tree_leaves(case(relu_, t))
    except Exception as e:
        return type(e)


# The derivative of leaky_relu_ is computed from its result, that of silu from a copy of its argument.
FUNCTIONS = {
    "relu_": lambda f: f.relu_,
    "leaky_relu_": lambda f: lambda t: f.leaky_relu_(t, 0.3),
    "silu": lambda f: lambda t: f.silu(t, inplace=True),
}


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.sampled(3)
def test_as_torch_does(case, function, backend, device):
    theirs, ours = (outcome(CASES[case], FUNCTIONS[function](f), device) for f in (TF, F))
    if isinstance(theirs, type) or isinstance(ours, type):
        assert ours is theirs
        return
    for p, q in zip(ours, theirs, strict=True):
        if isinstance(p, torch.Tensor):
            torch.testing.assert_close(p, q)
        else:
            assert p == q


def test_layer_over_a_conjugate(backend, device):
    import tritonnet.nn as nn

    z = torch.randn(3, 4, dtype=torch.complex64, device=device)
    twin = z.clone()
    y = nn.ReLU(inplace=True)(z.conj().imag)
    true_y = torch.nn.ReLU(inplace=True)(twin.conj().imag)
    assert y.is_neg() and torch.equal(y, true_y) and torch.equal(z, twin)
