"""Counts the bytes that a network's evaluation moves between operators, as it is written and as it is fused.

    python -m bench.traffic resnet50 --batch 64 --format bfloat16

An operator reads each of its tensor arguments once and writes each of its results once:

- Arguments that are the same view of the same memory count once. An expanded tensor counts what it has in memory.
- An operand that is changed in place is read and written, or only written by copy_, fill_ and zero_.
- A view, or an operator that returns its argument, moves nothing, and nor does allocating memory.
- What an operator does inside, such as another pass over its argument or a copy of it in another layout, is not seen,
  and nor are caches: the count is what is moved if no result is still in a cache when the next operator reads it.

Operators are those that PyTorch's dispatcher runs in evaluation: max_pool2d of torch writes 64-bit indices, and conv2d
is one operator with its bias. Nothing is computed, and on the meta device nothing is allocated.
"""

import argparse
import collections
import copy
from typing import NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import tritonnet
from tritonnet.compiler import compile_graph

from . import FORMATS
from .case import CHANNELS_LAST, CONTIGUOUS, TIMED, lay_out
from .networks import NETWORKS
from .table import markdown

IMAGE = 3, 224, 224
ONLY_WRITTEN = "aten::copy_", "aten::fill_", "aten::zero_"
ALLOCATING = "aten::empty", "aten::empty_like", "aten::empty_strided", "aten::new_empty", "aten::new_empty_strided"


class Row(NamedTuple):
    operator: str
    calls: int
    bytes: int


class Moved(NamedTuple):
    """What an evaluation moves: a Row for each operator, in the order of their first calls."""

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
        self.bytes[name] += sum(sum(of.values()) for of in (read, written, new))
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


@torch.no_grad()
def captured(model, images):
    """A function of images: what the model moves if it is converted and fused. The model itself is not changed.

    The graph is that of `images`, and other batches run through it too.

    Raises:
        RuntimeError: the model was not captured as one graph.
    """
    graphs, calls = [], []

    def backend(graph_module, example_inputs):
        graphs.append(compile_graph(graph_module, example_inputs))

        def run(*args):
            calls.append(args)
            return graphs[-1](*args)

        return run

    fused = tritonnet.convert(copy.deepcopy(model))
    # As in fuse, numbers such as eps stay constants if another network has other ones.
    with torch._dynamo.config.patch(specialize_float=True):
        torch.compile(fused, backend=backend, fullgraph=True)(images)
    if len(graphs) != 1 or len(calls) != 1:
        raise RuntimeError(f"{type(model).__name__} is {len(graphs)} graphs, not one")

    @torch.no_grad()
    def moved(images_of_call):
        with Counting() as counting:
            graphs[0](*(images_of_call if argument is images else argument for argument in calls[0]))
        return counting.moved

    return moved


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


def page(network, batch, format, layout):
    """The table of a network's traffic, as written on torch's layers and fused."""
    model, images = on_meta(network, batch, format, layout)
    ways = [of_eager(model, images), of_fused(model, images)]
    by_name = [{row.operator: row for row in moved.rows} for moved in ways]
    lines = []
    for name in dict.fromkeys(name for rows in by_name for name in rows):
        found = [rows.get(name, Row(name, 0, 0)) for rows in by_name]
        lines.append((name, *(value for row in found for value in (row.calls or "", _megabytes(row.bytes)))))
    eager, fused = (moved.bytes for moved in ways)
    totals = [value for moved in ways for value in (sum(row.calls for row in moved.rows), _megabytes(moved.bytes))]
    lines.append(("all", *totals))
    left = ", ".join(f"{count} {name}" for name, count in ways[1].of_torch.items()) or "none"
    header = "operator", "calls in eager", "MB", "calls fused", "MB fused"
    return (
        f"# {network}, batch {batch}, {format}, {layout}\n\n{markdown(header, lines)}\n"
        f"Fused, it moves {fused / eager:.0%} of the bytes. Operators of torch that are left: {left}.\n"
    )


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
    args = parser.parse_args(argv)
    print(page(args.network, args.batch, args.format, args.layout))


if __name__ == "__main__":
    main()
