"""Counts the bytes that a network moves between operators, as it is written and as it is fused.

    python -m bench.traffic resnet50 --batch 64 --format bfloat16  # in evaluation
    python -m bench.traffic resnet50 --training                    # in training: forward, loss and backward

An operator reads each of its tensor arguments once and writes each of its results once:

- Arguments that are the same view of the same memory count once. An expanded tensor counts what it has in memory.
- An operand that is changed in place is read and written, or only written by copy_, fill_ and zero_.
- A view, or an operator that returns its argument, moves nothing, and nor does allocating memory.
- The operators of training in AGAIN take several passes: batch norm needs the sums over all elements before its
  result, and each gradient of a convolution reads that of the result. What those read and write again counts again.
- What other operators do inside, such as another pass over an argument or a copy of it in another layout, is not seen,
  and nor are caches: the count is what is moved if no result is still in a cache when the next operator reads it.

Operators are those that PyTorch's dispatcher runs: max_pool2d of torch writes 64-bit indices, and conv2d is one
operator with its bias. In training all weights have the format, too. The optimizer's update is not counted: it is the
same for both. Nothing is computed, and on the meta device nothing is allocated.
"""

import argparse
import collections
import copy
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import tritonnet
from tritonnet.compiler import compile_graph
from tritonnet.fusion import calling

from . import FORMATS
from .case import CHANNELS_LAST, CONTIGUOUS, TIMED, lay_out
from .networks import NETWORKS
from .saved import saved_bytes
from .table import markdown

IMAGE = 3, 224, 224
ONLY_WRITTEN = "aten::copy_", "aten::fill_", "aten::zero_"
ALLOCATING = "aten::empty", "aten::empty_like", "aten::empty_strided", "aten::new_empty", "aten::new_empty_strided"
# Convolutions of fewer channels store no statistics, see kernels/launchers.py: conv2d_partials.
FEW = 16


def _of_norm_grad(given, results):
    """Sums first, and then dx. Where the sums' launch stores dz, the other reads that in place of dy and y."""
    return [given["x"], results[3]] if given["with_dz"] else [given["x"], given["dy"], given["y"]]


def _of_norm_conv(given, results):
    """The convolution's image, written and read in place of x; and its result, where another launch has the statistics.

    That is so for depthwise convolutions and for few channels.
    """
    image = [given["x"]] * 2 if given["mean"] is not None else []
    channels, depthwise = given["w"].shape[1], given["groups"] > 1 and given["w"].shape[1] == 1
    apart = depthwise or (channels < FEW and given["groups"] == 1)
    return image + [results[0]] * (given["statistics"] and apart)


# {operator: function of its arguments by name and its results: the tensors that its launches read or write again}.
AGAIN = {
    "aten::native_batch_norm": lambda given, results: [given["input"]] * given["training"],
    "aten::native_batch_norm_backward": lambda given, _: [given["input"], given["grad_out"]] * given["train"],
    "aten::convolution_backward": lambda given, _: [given["grad_output"]] * (sum(given["output_mask"]) - 1),
    "tritonnet::batch_norm_grad": _of_norm_grad,
    "tritonnet::norm_conv2d": _of_norm_conv,
    "tritonnet::conv2d_grads": lambda given, _: [given["dy"]],
    "tritonnet::conv2d_relu_max_pool2d_grads": lambda given, _: [given["dy"], given["code"]],
}


class Row(NamedTuple):
    operator: str
    calls: int
    bytes: int


class Moved(NamedTuple):
    """What an evaluation or a step moves: a Row for each operator, in the order of their first calls."""

    rows: list

    @property
    def bytes(self):
        return sum(row.bytes for row in self.rows)

    @property
    def of_torch(self):
        """{operator: calls} of torch's own operators that move anything."""
        return {row.operator: row.calls for row in self.rows if not row.operator.startswith("tritonnet::")}

    @property
    def of_ours(self):
        return {row.operator: row.calls for row in self.rows if row.operator.startswith("tritonnet::")}


def _tensors(values):
    return [t for t in tree_leaves(values) if isinstance(t, torch.Tensor)]


def _memory(t):
    """What identifies the memory that a tensor occupies, and its bytes."""
    kept = [(size, stride) for size, stride in zip(t.shape, t.stride()) if stride]
    count = torch.Size(size for size, _ in kept).numel() if t.numel() else 0
    return (t.untyped_storage()._cdata, t.storage_offset(), tuple(kept)), count * t.itemsize


class Counting(TorchDispatchMode):
    """Inside, counts the bytes that every operator moves."""

    def __init__(self):
        super().__init__()
        self.bytes, self.calls = collections.Counter(), collections.Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        name = function.name().partition(".")[0]
        schema = function._schema.arguments
        given = {**{argument.name: value for argument, value in zip(schema, args)}, **kwargs}
        changed = [given[a.name] for a in schema if a.alias_info and a.alias_info.is_write and a.name in given]
        written = dict(map(_memory, _tensors(changed)))
        read = dict(map(_memory, _tensors(given)))
        storages = {storage for storage, *_ in read}
        # A result in an argument's memory is a view of it, or the argument that was changed.
        new = {memory: size for memory, size in map(_memory, _tensors(result)) if memory[0] not in storages}
        of_shapes = torch.Tag.inplace_view in function.tags  # such as as_strided_
        if name in ALLOCATING or of_shapes or not (new or written):
            return result
        if name in ONLY_WRITTEN:
            read = {memory: size for memory, size in read.items() if memory not in written}
        self.calls[name] += 1
        again = AGAIN[name](given, result) if name in AGAIN else []
        self.bytes[name] += sum(sum(of.values()) for of in (read, written, new))
        self.bytes[name] += sum(_memory(t)[1] for t in _tensors(again))
        return result

    @property
    def moved(self):
        return Moved([Row(name, calls, self.bytes[name]) for name, calls in self.calls.items()])


@torch.no_grad()
def of_eager(model, images):
    """What the model moves as it is written, on torch's layers or ours."""
    with Counting() as counting:
        model(images)
    return counting.moved


def loss_of(model):
    """A function of images and labels: the mean cross-entropy of the model's logits, as a training step begins."""
    return lambda images, labels: F.cross_entropy(model(images), labels)


def of_eager_step(model, images, labels):
    """What forward, loss and backward of the model move as it is written; its gradients are set."""
    with Counting() as counting:
        loss_of(model)(images, labels).backward()
    return counting.moved


def _graph(function, *inputs):
    """The fused graph of function(*inputs), a function of such inputs that returns a tuple.

    The graph is that of these inputs, and other batches run through it too.

    Raises:
        RuntimeError: the function was not captured as one graph.
    """
    graphs, calls = [], []

    def backend(graph_module, example_inputs):
        graphs.append(compile_graph(graph_module, example_inputs))

        def run(*args):
            calls.append(args)
            return graphs[-1](*args)

        return run

    # As in fuse, numbers such as eps stay constants if another network has other ones.
    # So do sizes, and code of its own has no graphs of other networks.
    with torch._dynamo.config.patch(specialize_float=True):
        torch.compile(calling(function), backend=backend, fullgraph=True, dynamic=False)(*inputs)
    if len(graphs) != 1 or len(calls) != 1:
        raise RuntimeError(f"{len(graphs)} graphs were captured, not one")
    of_input = {id(given): i for i, given in enumerate(inputs)}

    def call(*others):
        return graphs[0](*(others[of_input[id(a)]] if id(a) in of_input else a for a in calls[0]))

    return call


def captured(model, images):
    """A function of images: what the model moves if it is converted and fused. The model itself is not changed.

    It raises as `_graph` does, and its result takes other batches.
    """
    with torch.no_grad():
        graph = _graph(tritonnet.convert(copy.deepcopy(model)), images)

    @torch.no_grad()
    def moved(images_of_call):
        with Counting() as counting:
            graph(images_of_call)
        return counting.moved

    return moved


class CapturedStep:
    """Forward, loss and backward of a model that is converted and fused; the model itself is not changed.

    It raises as `_graph` does, and its methods take other batches.
    """

    def __init__(self, model, images, labels):
        self.model = tritonnet.convert(copy.deepcopy(model))
        self.graph = _graph(loss_of(self.model), images, labels)

    def loss(self, images, labels):
        (loss,) = self.graph(images, labels)
        return loss

    def moved(self, images, labels):
        with Counting() as counting:
            self.loss(images, labels).backward()
        return counting.moved


def of_fused(model, images):
    """What the model moves if it is converted and fused; see `captured`."""
    return captured(model, images)(images)


def on_meta(network, batch, format, layout=CHANNELS_LAST, image=IMAGE, **sizes):
    """(a network of NETWORKS in evaluation, its images) on the meta device; `sizes` are the network's arguments."""
    dtype = FORMATS[format][0]
    with torch.device("meta"):
        model = NETWORKS[network](**sizes).to(dtype).eval()
        images = lay_out(torch.empty(batch, *image, dtype=dtype), layout)
    return model.to(memory_format=torch.channels_last) if layout == CHANNELS_LAST else model, images


def labels_on_meta(batch):
    return torch.zeros(batch, dtype=torch.int64, device="meta")


def page(network, batch, format, layout):
    """The table of a network's traffic in evaluation, as written on torch's layers and fused."""
    model, images = on_meta(network, batch, format, layout)
    eager, fused = of_eager(model, images), of_fused(model, images)
    return f"# {network}, batch {batch}, {format}, {layout}\n\n{_table(eager, fused)}{_left(eager, fused)}.\n"


def page_of_training(network, batch, format, layout):
    """The same of a training step, with what its forward saves for backward beside parameters and buffers."""
    (model, images), labels = on_meta(network, batch, format, layout), labels_on_meta(batch)
    step = CapturedStep(model.train(), images, labels)
    eager, fused = of_eager_step(model, images, labels), step.moved(images, labels)
    forwards = (lambda: loss_of(model)(images, labels), model), (lambda: step.loss(images, labels), step.model)
    saved = [saved_bytes(forward, of) for forward, of in forwards]
    return (
        f"# {network} in training, batch {batch}, {format}, {layout}\n\n{_table(eager, fused)}{_left(eager, fused)}.\n"
        f"For backward, eager saves {_megabytes(saved[0])} MB, fused {_megabytes(saved[1])} MB, or "
        f"{saved[1] / saved[0]:.0%}.\n"
    )


def _table(eager, fused):
    by_name = [{row.operator: row for row in moved.rows} for moved in (eager, fused)]
    lines = []
    for name in dict.fromkeys(name for rows in by_name for name in rows):
        found = [rows.get(name, Row(name, 0, 0)) for rows in by_name]
        lines.append((name, *(value for row in found for value in (row.calls or "", _megabytes(row.bytes)))))
    totals = [(sum(row.calls for row in moved.rows), _megabytes(moved.bytes)) for moved in (eager, fused)]
    lines.append(("all", *totals[0], *totals[1]))
    return markdown(("operator", "calls in eager", "MB", "calls fused", "MB fused"), lines)


def _left(eager, fused):
    left = ", ".join(f"{count} {name}" for name, count in fused.of_torch.items()) or "none"
    return f"\nFused, it moves {fused.bytes / eager.bytes:.0%} of the bytes. Operators of torch that are left: {left}"


def _megabytes(count):
    return f"{count / 1e6:.1f}" if count else ""


def main(argv=None):
    parser = argparse.ArgumentParser(
        prog="python -m bench.traffic", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("network", choices=NETWORKS)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--format", choices=TIMED, default="bfloat16")
    parser.add_argument("--layout", choices=(CHANNELS_LAST, CONTIGUOUS), default=CHANNELS_LAST)
    parser.add_argument("--training", action="store_true", help="a training step in place of an evaluation")
    args = parser.parse_args(argv)
    show = page_of_training if args.training else page
    print(show(args.network, args.batch, args.format, args.layout))


if __name__ == "__main__":
    main()
