"""Every way that PyTorch runs a function, for every operator: rows are checks, columns are operators.

One line in OPERATORS gives a new operator all of them. The truth is torch's own function under the same transform, in
float64. The checks run on the reference and again on the kernels.
"""

import gc
import io
import itertools
import warnings
import weakref

import pytest
import torch
import torch._dynamo.testing
import torch.func as tf
from conftest import thorough_if
from torch.autograd import gradcheck, gradgradcheck
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import tritonnet
import tritonnet.nn.functional as F
from bench import unfused as TF
from tritonnet import ops

# name: a function of a module of functionals and its tensors; their sizes, the first of which starts with the batch.
OPERATORS = {
    "conv2d": (lambda f, x, w, b: f.conv2d(x, w, b, (2, 1), 1, groups=2), (4, 4, 5, 3), (6, 2, 3, 2), (6,)),
    "conv2d depthwise": (lambda f, x, w: f.conv2d(x, w, padding="same", groups=4), (4, 4, 3, 4), (4, 1, 3, 3)),
    "max_pool2d": (lambda f, x: f.max_pool2d(x, 3, 2, 1), (4, 2, 5, 4)),
    "avg_pool2d, adaptive_avg_pool2d": (
        lambda f, x: f.adaptive_avg_pool2d(f.avg_pool2d(x, 3, 2, 1, True, False), (2, None)), (4, 2, 5, 4),
    ),
    "relu": (lambda f, x: f.relu(x), (4, 3, 5)),
    "relu_": (lambda f, x: f.relu_(x * 1.5), (4, 3, 5)),
    "linear": (lambda f, x, w, b: f.linear(x, w, b), (4, 3, 5), (6, 5), (6,)),
    "conv2d_relu": (lambda f, x, w, b: f.conv2d_relu(x, w, b, padding=1), (4, 2, 3, 4), (3, 2, 2, 3), (3,)),
    "conv2d_relu_max_pool2d": (
        lambda f, x, w, b: f.conv2d_relu_max_pool2d(
            x, w, b, (1, 2), 1, groups=2, pool_kernel_size=(2, 3), pool_padding=1, pool_ceil_mode=True
        ),
        (4, 4, 4, 5), (4, 2, 3, 2), (4,),
    ),
    "linear_relu": (lambda f, x, w, b: f.linear_relu(x, w, b), (4, 3, 5), (6, 5), (6,)),
    # Of these eps and slope are given: Dynamo takes defaults that are floats for inputs, and then captures again.
    "conv2d_epilogue": (
        lambda f, x, w, b, scale: f.conv2d_epilogue(
            x, w, b, 1, 1, scale=scale, eps=1e-5, residual=x, activation="silu", slope=0.01
        ),
        (4, 2, 3, 4), (2, 2, 3, 3), (2,), (2,),
    ),
    "linear_epilogue": (
        lambda f, x, w, mean, shift: f.linear_epilogue(
            x, w, mean=mean, shift=shift, eps=1e-5, activation="leaky_relu", slope=0.1
        ),
        (4, 5), (6, 5), (6,), (6,),
    ),
    "epilogue": (
        lambda f, x, var: f.epilogue(x, var=var, eps=2.0, residual=x.flip(0), activation="gelu", slope=0.01),
        (4, 3, 2, 2), (3,),
    ),
    "batch_norm, batch_norm_epilogue": (
        lambda f, x, w, b: f.batch_norm_epilogue(
            f.batch_norm(x, None, None, w, None, True, 0.1, 1e-5),
            None, None, None, b, True, 0.1, 1e-5, residual=x, activation="silu", slope=0.01,
        ),
        (4, 2, 3), (2,), (2,),
    ),
    "squeeze_excite": (
        lambda f, x, w1, w2, b2: f.squeeze_excite(x, w1, None, w2, b2, "silu"), (4, 5, 3, 2), (3, 5), (5, 3), (5,),
    ),
    "silu in place": (lambda f, x: f.silu(x * 1.5, inplace=True), (4, 3, 5)),
    "linear_chain": (
        lambda f, x, w1, b1, w2: f.linear_chain(x, [w1, w2], [b1, None]), (4, 3, 5), (6, 5), (6,), (3, 6),
    ),
    "cross_entropy": (
        lambda f, x: f.cross_entropy(x, x.argmin(1), label_smoothing=0.1), (4, 5),
    ),
}  # fmt: skip


class Operator:
    """One column: our function and torch's of the same tensors."""

    def __init__(self, name, device):
        self.name, self.device = name, device
        function, *self.sizes = OPERATORS[name]
        self.ours = lambda *tensors: function(F, *tensors)
        self.theirs = lambda *tensors: function(TF, *tensors)

    def inputs(self, batch=None, grad=False, dtype=torch.float64):
        sizes = [list(size) for size in self.sizes]
        if batch is not None:
            sizes[0][0] = batch
        # The same values at every call, all distinct, so that no maximum is a tie.
        seed = torch.Generator().manual_seed(0)
        made = [torch.randperm(torch.Size(s).numel(), generator=seed).view(s) for s in sizes]
        made = [(t - t.numel() / 2 + 0.25) / t.numel() for t in made]
        return [t.to(self.device, dtype).requires_grad_(grad) for t in made]

    def module(self, f):
        """The same as a module, whose parameters are a factor and all tensors except the first."""
        function, (x, *tensors) = OPERATORS[self.name][0], self.inputs()

        class Module(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.factor = torch.nn.Parameter(torch.tensor(0.7, dtype=torch.float64, device=x.device))
                for i, t in enumerate(tensors):
                    self.register_parameter(f"weight{i}", torch.nn.Parameter(t))

            def forward(self, x):
                return function(f, x * self.factor, *[getattr(self, f"weight{i}") for i in range(len(tensors))])

        return Module()


def same(a, b):
    for p, q in zip(pytree.tree_leaves(a), pytree.tree_leaves(b), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-9)


def loss(function):
    return lambda *tensors: function(*tensors).pow(3).sum()


def value_and_grads(function, inputs):
    inputs = [t.detach().clone().requires_grad_() for t in inputs]
    y = function(*inputs)
    y.pow(3).sum().backward()
    return y.detach(), [t.grad for t in inputs]


def gradients_forward_backward_and_batched(op):
    assert gradcheck(
        op.ours, op.inputs(2, grad=True), check_forward_ad=True, check_batched_grad=True,
        check_batched_forward_grad=True, fast_mode=False,
    )  # fmt: skip


def second_derivatives_forward_over_reverse(op):
    assert gradgradcheck(op.ours, op.inputs(1, grad=True), check_fwd_over_rev=True, check_batched_grad=True)


def transforms(op):
    """grad, vjp, jvp, jacrev, jacfwd, and both nestings of two."""
    inputs = op.inputs(2)
    every = tuple(range(len(inputs)))
    tangents = tuple(torch.randn_like(t) for t in inputs)
    results = []
    for function in (op.ours, op.theirs):
        gradient = tf.grad(loss(function), every)
        results.append([
            gradient(*inputs),
            tf.vjp(function, *inputs)[0],
            tf.jvp(function, tuple(inputs), tangents),
            tf.jacrev(function, every)(*inputs),
            tf.jacfwd(function, every)(*inputs),
            tf.jvp(gradient, tuple(inputs), tangents),
            tf.grad(lambda *t, g=gradient: sum(d.pow(2).sum() for d in g(*t)), every)(*inputs),
            tf.grad(lambda *t, f=function: tf.jvp(loss(f), t, tangents)[1], every)(*inputs),
        ])  # fmt: skip
    same(*results)


def hessian(op):
    inputs = op.inputs(1)
    every = tuple(range(len(inputs)))
    same(*(tf.hessian(loss(function), every)(*inputs) for function in (op.ours, op.theirs)))


def vmap_over(op, choices):
    """A batch on the chosen arguments at one dimension: values and gradients, without vmap's warning of a slow loop."""
    inputs = op.inputs(2)
    every = tuple(range(len(inputs)))
    for chosen, place in choices:
        dims = tuple(place if i in chosen else None for i in every)
        batched = [t if d is None else torch.stack([t, 2 * t, t.flip(0)], d) for t, d in zip(inputs, dims)]
        for wrap in (lambda f: f, lambda f: tf.grad(loss(f), every), lambda f: tf.grad(loss(f), every[-1])):
            with warnings.catch_warnings():
                warnings.simplefilter("error", UserWarning)  # the slow loop's warning
                ours = tf.vmap(wrap(op.ours), dims)(*batched)
            same(ours, tf.vmap(wrap(op.theirs), dims)(*batched))


def vmap_over_any_argument(op):
    """Every choice of arguments, with the batch at two dimensions."""
    every = range(len(op.sizes))
    choices = [chosen for n in every for chosen in itertools.combinations(every, n + 1)]
    vmap_over(op, itertools.product(choices, (0, 1)))


def vmap_over_one_argument_and_all(op):
    """The batch at two dimensions by turns; and a batch of batches."""
    every = range(len(op.sizes))
    vmap_over(op, [*(((i,), i % 2) for i in every), (every, 1)])
    twice = [torch.stack([torch.stack([t, t + 1])] * 3) for t in op.inputs(2)]
    same(*(tf.vmap(tf.vmap(f), in_dims=1)(*[t.transpose(0, 1) for t in twice]) for f in (op.ours, op.theirs)))


def per_sample_gradients(op):
    inputs = op.inputs(3)
    results = []
    for function in (op.ours, op.theirs):
        one = tf.grad(lambda x, *weights, f=function: loss(f)(x[None], *weights), tuple(range(len(inputs))))
        results.append(tf.vmap(one, (0, *[None] * (len(inputs) - 1)))(*inputs))
    same(*results)


def same_when_compiled(op, batches, **options):
    """No graph break, and values and gradients for several batch sizes."""
    torch._dynamo.reset()
    compiled = torch.compile(op.ours, fullgraph=True, **options)
    for batch in batches:
        inputs = op.inputs(batch)
        same(value_and_grads(compiled, inputs), value_and_grads(op.theirs, inputs))


def compiles(backend, batches=(4, 3)):
    """The second batch is compiled with a size that is a symbol."""

    def check(op):
        same_when_compiled(op, batches, backend=backend)

    return check


def compiles_dynamic_shapes_once(op):
    """A shorter last batch must not recompile."""
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    # Dynamo would take a batch size that equals another size for the same symbol.
    same_when_compiled(op, (12, 11, 10), backend=counter, dynamic=True)
    assert counter.frame_count == 1


def compiles_dynamic_inductor(op):
    same_when_compiled(op, (12, 10), dynamic=True)


def compiles_without_gradients(op):
    torch._dynamo.reset()
    compiled = torch.compile(op.ours, fullgraph=True)
    with torch.no_grad():
        same(compiled(*op.inputs()), op.theirs(*op.inputs()))
    with torch.inference_mode():
        same(compiled(*op.inputs()), op.theirs(*op.inputs()))


def compiled_transforms(op):
    inputs = op.inputs(2)
    every = tuple(range(len(inputs)))
    batched = [torch.stack([t, 2 * t]) for t in inputs]
    for wrap, arguments in (
        (lambda f: tf.grad(loss(f), every), inputs),
        (lambda f: tf.vmap(f), batched),
        (lambda f: tf.vmap(tf.grad(loss(f), every)), batched),
    ):
        torch._dynamo.reset()
        compiled = torch.compile(wrap(op.ours), fullgraph=True, backend="aot_eager")
        same(compiled(*arguments), wrap(op.theirs)(*arguments))


def compiled_checkpoint(op):
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda *t: checkpoint(op.ours, *t, use_reentrant=False).sin(), fullgraph=True, backend="aot_eager"
    )
    same(value_and_grads(compiled, op.inputs()), value_and_grads(lambda *t: op.theirs(*t).sin(), op.inputs()))


def compiled_autocast(op):
    torch._dynamo.reset()
    compiled = torch.compile(op.ours, fullgraph=True, backend="aot_eager")
    inputs = op.inputs(grad=True, dtype=torch.float32)
    with torch.autocast(op.device.type, torch.bfloat16):
        ours, theirs = compiled(*inputs), op.theirs(*inputs)
    assert ours.dtype == theirs.dtype
    ours.float().sum().backward()
    assert all(t.grad.dtype == torch.float32 for t in inputs)


def compiled_autograd(op):
    torch._dynamo.reset()
    inputs = op.inputs(grad=True)
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="aot_eager", fullgraph=True, dynamic=True)):
        loss(torch.compile(op.ours, backend="aot_eager"))(*inputs).backward()
    same([t.grad for t in inputs], value_and_grads(op.theirs, inputs)[1])


def exports(strict):
    def check(op):
        """A dynamic batch, saved, loaded and run; and the program trains before it is decomposed."""
        ours, theirs = op.module(F), op.module(TF)
        theirs.load_state_dict(ours.state_dict())
        x = op.inputs()[0]
        dims = {"x": {0: torch.export.Dim("batch", min=2, max=64)}}
        program = torch.export.export(ours, (x,), dynamic_shapes=dims, strict=strict)
        file = io.BytesIO()
        torch.export.save(program, file)
        file.seek(0)
        loaded = torch.export.load(file).module()
        program.run_decompositions()
        for batch in (4, 7):
            x = op.inputs(batch)[0]
            same(loaded(x), theirs(x))
        module = program.module()
        for m in (module, theirs):
            m(x).pow(3).sum().backward()
        same([p.grad for p in module.parameters()], [p.grad for p in theirs.parameters()])

    return check


def autocast(op):
    for dtype in (torch.bfloat16, torch.float16):
        inputs = op.inputs(grad=True, dtype=torch.float32)
        with torch.autocast(op.device.type, dtype):
            ours, theirs = op.ours(*inputs), op.theirs(*inputs)
        assert ours.dtype == theirs.dtype
        ours.float().sum().backward()
        assert all(t.grad.dtype == torch.float32 for t in inputs)


def checkpoints(op):
    for reentrant in (True, False):
        ours = value_and_grads(lambda *t, r=reentrant: checkpoint(op.ours, *t, use_reentrant=r), op.inputs())
        same(ours, value_and_grads(op.theirs, op.inputs()))


def selective_checkpoint(op):
    from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

    def policy(context, operator, *args, **kwargs):
        ours = getattr(operator, "namespace", "") == "tritonnet"
        return CheckpointPolicy.MUST_SAVE if ours else CheckpointPolicy.PREFER_RECOMPUTE

    def context():
        return create_selective_checkpoint_contexts(policy)

    ours = value_and_grads(lambda *t: checkpoint(op.ours, *t, use_reentrant=False, context_fn=context), op.inputs())
    same(ours, value_and_grads(op.theirs, op.inputs()))


def views(view):
    def check(op):
        """Inputs and gradients that are views of this kind; second gradients too."""
        results = []
        for function in (op.ours, op.theirs):
            inputs = op.inputs(2, grad=True)
            y = function(*map(view, inputs))
            dy = torch.linspace(1, 2, y.numel(), dtype=y.dtype, device=y.device).view(y.shape).requires_grad_()
            first = torch.autograd.grad(y, inputs, view(dy), create_graph=True)
            total = sum(g.pow(2).sum() for g in first)
            results.append((y, first, torch.autograd.grad(total, (*inputs, dy), materialize_grads=True)))
        same(*results)

    return check


def saved_tensor_hooks(op):
    inputs = op.inputs(grad=True)
    with torch.autograd.graph.save_on_cpu():
        y = op.ours(*inputs)
    same(torch.autograd.grad(y.pow(3).sum(), inputs), value_and_grads(op.theirs, inputs)[1])


def inference_mode(op):
    with torch.inference_mode():
        y = op.ours(*op.inputs())
    assert y.is_inference()
    same(y, op.theirs(*op.inputs()))


def meta_and_fake(op):
    """Size, strides and dtype without data are those of the real call."""
    from torch._subclasses import FakeTensorMode

    real = op.ours(*op.inputs())
    found = [op.ours(*[t.to("meta") for t in op.inputs()])]
    with FakeTensorMode() as mode:
        found.append(op.ours(*[mode.from_tensor(t) for t in op.inputs()]))
    for y in found:
        assert (y.shape, y.stride(), y.dtype) == (real.shape, real.stride(), real.dtype)


def make_fx(op):
    from torch.fx.experimental.proxy_tensor import make_fx

    inputs = op.inputs()
    graph = make_fx(tf.grad(loss(op.ours), tuple(range(len(inputs)))), tracing_mode="symbolic")(*inputs)
    assert any("tritonnet" in str(n.target) for n in graph.graph.nodes)
    same(graph(*inputs), tf.grad(loss(op.theirs), tuple(range(len(inputs))))(*inputs))


def symbolic_trace(op):
    """torch.fx puts our functions into its graph, from which Python code is made."""
    ours, theirs = op.module(F), op.module(TF)
    graph = torch.fx.symbolic_trace(ours)
    assert any(getattr(n.target, "__module__", "").startswith("tritonnet.nn") for n in graph.graph.nodes)
    same(*(value_and_grads(m, op.inputs()[:1]) for m in (graph, theirs)))


def jit_trace(op):
    """Traced, saved and loaded; gradients too."""
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.save(torch.jit.trace(op.module(F), op.inputs()[0]), file)
        file.seek(0)
        loaded = torch.jit.load(file)
    same(*(value_and_grads(m, op.inputs(3)[:1]) for m in (loaded, op.module(TF))))


def flops(op):
    """FlopCounterMode counts what it counts for torch, and what backward computes again.

    That is the convolution for the gradients of silu and of the scale, once, and the first of the two products.
    """

    def count(function, *arguments):
        with FlopCounterMode(display=False) as counter:
            function(*arguments)
        return counter.get_total_flops()

    with torch.no_grad():
        forward = count(op.theirs, *op.inputs())
        assert count(op.ours, *op.inputs()) == forward
    again = {"conv2d_epilogue": 1, "squeeze_excite": 0.5}.get(op.name, 0) * forward
    assert count(value_and_grads, op.ours, op.inputs()) == count(value_and_grads, op.theirs, op.inputs()) + again


def decomposes(op):
    """An exported program with a dynamic batch in terms of torch's own operators, recorded for gradients or not."""
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            dims = {"x": {0: torch.export.Dim("batch", min=2, max=64)}}
            program = torch.export.export(op.module(F), (op.inputs()[0],), dynamic_shapes=dims)
        program = program.run_decompositions(tritonnet.decompositions())
        assert not any("tritonnet" in str(n.target) for n in program.graph.nodes)
        for batch in (4, 7):
            x = op.inputs(batch)[0]
            same(program.module()(x), op.module(TF)(x))


def profiled(op):
    """The profiler lists each call once, by the operator's name, with the sizes of its arguments, in backward too."""
    with torch.profiler.profile(record_shapes=True) as profile:
        value_and_grads(op.ours, op.inputs())
    events = [e for e in profile.events() if e.name.startswith("tritonnet::")]
    assert events and all(any(e.input_shapes) for e in events)
    assert not any(e.cpu_parent is not None and e.cpu_parent.name == e.name for e in events)


def deterministic_algorithms(op):
    assert torch.are_deterministic_algorithms_enabled()
    runs = [value_and_grads(op.ours, op.inputs()) for torch_seed in (0, 0) if torch.manual_seed(torch_seed)]
    for a, b in zip(*map(pytree.tree_leaves, runs)):
        assert torch.equal(a, b)


def frozen_parameters(op):
    inputs = op.inputs()
    for i in range(len(inputs)):
        chosen = [t.clone().requires_grad_(i == j) for j, t in enumerate(inputs)]
        (ours,) = torch.autograd.grad(loss(op.ours)(*chosen), chosen[i])
        same(ours, torch.autograd.grad(loss(op.theirs)(*chosen), chosen[i])[0])


def no_reference_cycles(op):
    """A call's memory is freed with its result, without the garbage collector."""
    gc.disable()
    try:
        inputs = op.inputs(grad=True)
        hidden = [t * 1 for t in inputs]
        y = op.ours(*hidden)
        watched = [weakref.ref(y), *map(weakref.ref, hidden)]
        y.sum().backward()
        del y, hidden
        assert not any(ref() is not None for ref in watched)
    finally:
        gc.enable()


CHECKS = {
    check.__name__: check
    for check in (
        gradients_forward_backward_and_batched, second_derivatives_forward_over_reverse, transforms, hessian,
        vmap_over_any_argument, vmap_over_one_argument_and_all, per_sample_gradients, compiles_dynamic_shapes_once,
        compiles_dynamic_inductor, compiles_without_gradients, compiled_transforms, compiled_checkpoint,
        compiled_autocast, compiled_autograd,
        autocast, checkpoints, selective_checkpoint, saved_tensor_hooks, inference_mode, meta_and_fake, make_fx,
        symbolic_trace, jit_trace, flops, decomposes, profiled,
        deterministic_algorithms, frozen_parameters, no_reference_cycles,
    )
} | {
    "compiles_eager": compiles("eager"), "compiles_aot_eager": compiles("aot_eager"),
    # Inductor compiles symbols in compiles_dynamic_inductor.
    "compiles_inductor": compiles("inductor", (4,)), "exports": exports(False), "exports_strict": exports(True),
    # The memory of the first holds its elements negated, as that of z.conj().imag does.
    "views_negative": views(lambda t: torch._neg_view(-t)),
    "views_expanded": views(lambda t: t[:1].expand(t.shape) if t.dim() else t),
}  # fmt: skip

# Thousands of launches each; test_gradcheck.py and the rows of transforms and of one argument need fewer.
# The rules for vmap are the same on both; what they give the kernels for a batch of each input is tested there, too.
SLOW_ON_KERNELS = {
    "gradients_forward_backward_and_batched", "second_derivatives_forward_over_reverse", "hessian",
    "vmap_over_any_argument",
}  # fmt: skip

# What tools see is the operators, whatever computes them.
OF_TOOLS = {"symbolic_trace", "flops", "decomposes", "profiled"}

# Tracers see the operators and not what serves them, so that these rows are the same on both. Of them the kernels have
# that of Inductor's code, which calls them. Nested transforms, too, are calls of operators that other rows make.
TRACED = {name for name in CHECKS if name.startswith(("compile", "export", "make_fx", "decomposes"))}


def of_another_turn(check, operator):
    """Tracing takes seconds: of these rows each operator has a fifth, by turns."""
    return check in TRACED and (list(CHECKS).index(check) + list(OPERATORS).index(operator)) % 5 != 0


@pytest.mark.parametrize("check, operator", thorough_if(of_another_turn, itertools.product(CHECKS, OPERATORS)))
def test_on_the_reference(check, operator, device):
    with tritonnet.backend("reference"):
        CHECKS[check](Operator(operator, device))


# One switch in the kernels of conv2d and linear; test_fused.py compares it bit by bit with the separate functions.
SWITCHES = {"conv2d_relu", "linear_relu", "conv2d_epilogue", "linear_epilogue"}


@pytest.mark.parametrize("operator", [name for name in OPERATORS if name not in SWITCHES])
@pytest.mark.parametrize(
    "check",
    thorough_if(
        lambda check: check in TRACED - {"compiles_inductor"} | {"transforms"},
        [name for name in CHECKS if name not in SLOW_ON_KERNELS | OF_TOOLS],
    ),
)
@pytest.mark.sampled(3)
def test_on_the_kernels(check, operator, device):
    with tritonnet.backend("triton"), tritonnet.count_launches() as launches:
        CHECKS[check](Operator(operator, device))
    assert launches or check == "meta_and_fake"


def operator_calls(device):
    """The operators themselves, as the dispatcher sees them, with arguments."""

    def t(*size):
        return torch.randn(size, dtype=torch.float64, device=device, requires_grad=True)

    conv = ([2, 1], [1, 0, 2, 1], [1, 2], 2, "zeros")
    window = ([3, 2], [2, 2], [1, 0], [1, 1])
    x, w = t(2, 4, 6, 7), t(6, 2, 3, 2)
    dy = torch.randn_like(ops.conv2d(x, w, None, *conv)).requires_grad_()
    y, code = ops.max_pool2d(x.detach(), *window, False)
    pool, means = ([2, 2], [2, 1], [1, 0]), ([3, 2], [2, 2], [1, 0], True, False, None)
    q, dead = ops.conv2d_relu_max_pool2d(x.detach(), w.detach(), None, *conv, *pool, True)
    dq, weight = torch.randn_like(q).requires_grad_(), t(4).detach().abs()
    end = (0.1, "silu", 0.0)

    def vectors(channels):
        return t(channels), torch.rand(channels, dtype=torch.float64, device=device), t(channels), t(channels)

    running = torch.rand(2, 6, dtype=torch.float64, device=device).unbind()

    def norm(channels):
        mean, var, scale, shift = vectors(channels)
        return mean.detach(), var, scale, shift

    layers = t(5, 4), t(5), t(2, 5), None, t(6, 2), t(6), None, None
    return {
        ops.conv2d: (x, w, t(6), *conv),
        ops.conv2d_input_grad: (dy, w, list(x.shape), *conv),
        ops.conv2d_weight_grad: (dy, x, list(w.shape), *conv, True),
        ops.conv2d_grads: (dy, x, w, *conv, True),
        ops.conv2d_relu: (x, w, t(6), *conv),
        ops.conv2d_relu_weight_grad: (dy, torch.randn_like(dy), x, list(w.shape), *conv, True),
        ops.conv2d_relu_max_pool2d: (x, w, t(6), *conv, *pool, True),
        ops.conv2d_relu_max_pool2d_input_grad: (dq, dead, w, list(x.shape), *conv, *pool),
        ops.conv2d_relu_max_pool2d_weight_grad: (dq, dead, x, list(w.shape), *conv, *pool, True),
        ops.conv2d_relu_max_pool2d_grads: (dq, dead, x, w, *conv, *pool, True),
        ops.max_pool2d: (x, *window, False),
        ops.max_pool2d_values: (x, *window, False),
        ops.max_pool2d_scatter: (torch.randn_like(y).requires_grad_(), code, [6, 7], *window),
        ops.max_pool2d_gather: (x, code, *window),
        ops.max_pool2d_indices: (code, 7, *window),
        ops.avg_pool2d: (x, *means),
        ops.avg_pool2d_grad: (t(2, 4, 4, 4), [6, 7], *means, True),
        ops.adaptive_avg_pool2d: (x, [4, 1]),
        ops.adaptive_avg_pool2d_grad: (t(2, 4, 3, 1), [5, 6], False),
        ops.relu: (x,),
        ops.relu_: (x.detach().clone(),),
        ops.relu_grad: (t(3, 4), t(3, 4)),
        ops.conv2d_epilogue: (x, w, t(6), *conv, *vectors(6), torch.randn_like(dy), *end),
        ops.epilogue: (t(3, 4), *vectors(4), t(3, 4), *end),
        ops.squeeze_excite: (x, t(3, 4), t(3), t(4, 3), None, "relu", "sigmoid"),
        ops.batch_statistics: (x,),
        ops.tracked_statistics: (x.detach(), weight, weight * 2, weight * 3, 0.3),
        ops.batch_norm: (x, *norm(4), t(2, 4, 6, 7), *end),
        ops.batch_norm_grad: (torch.randn_like(x).requires_grad_(), x, None, *norm(4), *end, True, True),
        ops.norm_conv2d: (x, *norm(4), *end, w, t(6), *conv, *running, 0.3, True),
        ops.activate_: (x.detach().clone(), "silu", 0.0),
        ops.activation_grad: (t(3, 4), t(3, 4), "gelu", 0.0),
        ops.cross_entropy: (t(3, 4), torch.tensor([1, -100, 3], device=device), weight, "mean", -100, 0.1),
        ops.cross_entropy_grad: (t(3), t(3, 4), torch.tensor([1, -100, 3], device=device), -100),
        ops.linear: (t(3, 4), t(5, 4), t(5)),
        ops.linear_relu: (t(3, 4), t(5, 4), t(5)),
        ops.linear_epilogue: (t(3, 4), t(5, 4), t(5), *vectors(5), t(3, 5), *end),
        ops.linear_weight_grad: (t(3, 5), t(3, 4), True),
        ops.linear_chain: (t(3, 4), *layers, True),
        ops.linear_chain_input_grad: (t(3, 6), t(3, 7), *layers[::2], True),
        ops.linear_chain_weight_grad: (t(3, 6), t(3, 7), t(3, 4), t(3, 7), [5, 2], True),
    }


@pytest.mark.parametrize("backend", thorough_if(lambda name: name == "triton", ("reference", "triton")), indirect=True)
@pytest.mark.parametrize("name", [name for name, op in vars(ops).items() if isinstance(op, torch._ops.OpOverload)])
@pytest.mark.sampled(2)
def test_opcheck(name, backend, device):
    """PyTorch's own checks of schema, fake tensors, autograd registration and tracing, for every operator."""
    operator, calls = getattr(ops, name), operator_calls(device)
    assert set(calls) == {op for op in vars(ops).values() if isinstance(op, torch._ops.OpOverload)}
    torch.library.opcheck(operator, calls[operator])


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compiles_channels_last(dynamic, device):
    """The compiler sees the real call's layout for input, output and gradients."""
    torch._dynamo.reset()

    def net(f, x, w, v):
        return f.max_pool2d(f.relu(f.conv2d(f.conv2d(x, w, padding=1), v, groups=6)), 2)

    compiled = torch.compile(lambda x, w, v: net(F, x, w, v), fullgraph=True, dynamic=dynamic)
    with tritonnet.backend("reference"):
        for batch in (12, 10):
            x = torch.randn(batch, 3, 9, 8, device=device).double()
            x = x.contiguous(memory_format=torch.channels_last)
            inputs = [
                x,
                torch.randn(6, 3, 3, 3, device=device).double(),
                torch.randn(6, 1, 2, 2, device=device).double(),
            ]
            results = []
            for f in (compiled, lambda x, w, v: net(TF, x, w, v)):
                leaves = [t.detach().requires_grad_() for t in inputs]
                y = f(*leaves)
                results.append((y, *torch.autograd.grad(y.pow(2).sum(), leaves)))
            same(*results)
            assert results[0][0].stride() == results[1][0].stride() and results[0][1].stride() == x.stride()


def test_lenet_trains_compiled(device):
    """Forward, loss and backward in one compiled function, a shorter last batch, two steps: eager's results."""
    torch._dynamo.reset()
    twins = []
    for compiles in (True, False):
        torch.manual_seed(0)
        net = tritonnet.LeNet().double().to(device)
        model = torch.compile(net, fullgraph=True, dynamic=True) if compiles else net
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        with tritonnet.backend("reference"):
            for batch in (8, 5):
                seed = torch.Generator().manual_seed(batch)
                x = torch.randn(batch, 1, 32, 32, generator=seed, dtype=torch.float64).to(device)
                optimizer.zero_grad()
                TF.cross_entropy(model(x), torch.arange(batch, device=device)).backward()
                optimizer.step()
        twins.append(list(net.parameters()))
    same(*twins)
