"""How the operators' work is divided among processes: their sharding rules for DTensor, torch.distributed.tensor.

A rule is one way or several. A way has a letter for each tensor argument and, behind ">", for each result:

    0, 1, ...  Shard(0), Shard(1), ...: each process has a part of that dimension
    *          Shard of any dimension, which is the same for all letters of the way
    r          Replicate: each process has all of it
    p          Partial: each process has a summand

So "0rr > 0" says of y = conv2d(x, w, bias) that with its images, the weights and the bias a process can compute its
images of y. A batch or rows come first; then what is divided by output and by input channels, or features. Every
operator can also have everything replicated. DTensor moves tensors to the way that costs least.

Private names of PyTorch in this file:

- `OpOverload._schema`: which arguments are tensors, and the names of the others.
- `DTensor._op_dispatcher.sharding_propagator.op_to_schema_info`: what register_sharding has noted of an operator. By it
  DTensor caches a result's shape for the tensors and the arguments from the first int on, which would leave out lists
  and strings before it, such as strides.
"""

from . import ops

_RULES = {
    ops.conv2d: ("0rr > 0", "r00 > 1", "11p > p"),
    ops.conv2d_input_grad: ("0r > 0", "10 > p", "r1 > 1"),
    ops.conv2d_weight_grad: ("00 > pp", "1r > 00", "r1 > 1r"),
    ops.conv2d_grads: ("00r > 0pp", "1r0 > p00", "r11 > 11r"),
    ops.conv2d_relu: ("0rr > 0", "r00 > 1"),
    ops.conv2d_relu_weight_grad: ("000 > pp", "11r > 00", "rr1 > 1r"),
    ops.conv2d_epilogue: ("0rrrrrr0 > 0", "r0000001 > 1"),
    ops.conv2d_relu_max_pool2d: ("0rr > 00", "r00 > 11"),
    ops.conv2d_relu_max_pool2d_input_grad: ("00r > 0", "110 > p", "rr1 > 1"),
    ops.conv2d_relu_max_pool2d_weight_grad: ("000 > pp", "11r > 00", "rr1 > 1r"),
    ops.conv2d_relu_max_pool2d_grads: ("000r > 0pp", "11r0 > p00", "rr11 > 11r"),
    ops.max_pool2d: ("0 > 00", "1 > 11"),
    ops.max_pool2d_values: ("0 > 0", "1 > 1"),
    ops.max_pool2d_scatter: ("00 > 0", "11 > 1"),
    ops.max_pool2d_gather: ("00 > 0", "11 > 1"),
    ops.max_pool2d_indices: ("0 > 0", "1 > 1"),
    ops.avg_pool2d: ("0 > 0", "1 > 1"),
    ops.avg_pool2d_grad: ("0 > 0", "1 > 1"),
    ops.adaptive_avg_pool2d: ("0 > 0", "1 > 1"),
    ops.adaptive_avg_pool2d_grad: ("0 > 0", "1 > 1"),
    ops.squeeze_excite: ("0rrrr > 0",),
    ops.relu: ("* > *",),
    ops.relu_: ("* >",),
    ops.relu_grad: ("** > *",),
    ops.epilogue: ("0rrrr0 > 0", "100001 > 1"),
    # Statistics are those of a whole batch.
    ops.batch_statistics: ("1 > 00",),
    ops.tracked_statistics: ("1000 > 00",),
    ops.batch_norm: ("100001 > 1",),
    # By whether dz and y are wanted; they are empty otherwise.
    ops.batch_norm_grad: {
        (False, False): ("1110000 > 100rr",),
        (False, True): ("1110000 > 100r1",),
        (True, False): ("1110000 > 1001r",),
        (True, True): ("1110000 > 10011",),
    },
    # By whether there are statistics.
    ops.norm_conv2d: {True: ("rrrrr0000 > 100",), False: ("0rrrrrrrr > 0rr", "rrrrr0000 > 1rr")},
    ops.activate_: ("* >",),
    ops.activation_grad: ("** > *",),
    ops.linear: ("0rr > 0", "r00 > 1", "11p > p"),
    ops.linear_relu: ("0rr > 0", "r00 > 1"),
    ops.linear_epilogue: ("0rrrrrr0 > 0", "r0000001 > 1"),
    ops.linear_weight_grad: ("00 > pp", "1r > 00", "r1 > 1r"),
    ops.linear_chain: ("0rrrrrrrr > 00",),
    ops.linear_chain_input_grad: ("00rrrr > 00",),
    ops.linear_chain_weight_grad: ("0000 > pp",),
    # By the reduction; a mean divides by what only all rows show.
    ops.cross_entropy: {"none": ("00r > 00",), "sum": ("00r > p0",), "mean": ()},
    # By the dimensions of dloss.
    ops.cross_entropy_grad: {0: ("r00 > 0",), 1: ("000 > 0",)},
}


def _ways(operator, args):
    """The ways of an operator with these arguments, in which tensors are objects with ndim: (letters, letters) each.

    The first has a letter for each argument, which is a space for those that are no tensors.
    """
    arguments = operator._schema.arguments
    ways, named = _RULES[operator], {a.name: value for a, value in zip(arguments, args)}
    if operator is ops.cross_entropy:
        ways = ways[named["reduction"]]
    elif operator is ops.cross_entropy_grad:
        ways = ways[named["dloss"].ndim]
    elif operator is ops.batch_norm_grad:
        ways = ways[named["with_dz"], named["with_y"]]
    elif operator is ops.norm_conv2d:
        ways = ways[named["statistics"]]
    if named.get("groups", 1) != 1:
        # All processes are given the number of groups, so that none can have some of the groups.
        ways = [way for way in ways if way.startswith("0")]
    is_tensor = [_is_tensor(a) for a in arguments]
    ways = [way.replace("*", str(dim)) for way in ways for dim in range(args[0].ndim if "*" in way else 1)]
    ways.append("r" * sum(is_tensor) + ">" + "r" * len(operator._schema.returns))
    every = []
    for way in ways:
        of_tensors, _, of_results = way.replace(" ", "").partition(">")
        letters = iter(of_tensors)
        every.append(("".join(next(letters) if tensor else " " for tensor in is_tensor), of_results))
    return every


def _is_tensor(argument):
    return str(argument.type) in ("Tensor", "Optional[Tensor]")


def register():
    """Registers the rules with DTensor. Imports torch.distributed.tensor, which takes a second."""
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
    from torch.distributed.tensor.experimental import register_sharding

    def placement(letter):
        return {"r": Replicate(), "p": Partial()}.get(letter) or Shard(int(letter))

    def register_one(operator):
        # DTensor leaves in place by itself what operators without results overwrite.
        schema = operator._schema
        writes = [bool(schema.returns) and a.alias_info is not None and a.alias_info.is_write for a in schema.arguments]

        def stays(of_arguments, args):
            """Whether a way has what is overwritten as it lies: DTensor would move it, and what is written be lost."""
            written = [(s, arg) for s, arg, write in zip(of_arguments, args, writes) if write and arg is not None]
            return all([p == placement(s) for s, arg in written for p in arg.placements])

        def rule(*args):
            ways = [way for way in _ways(operator, args) if stays(way[0], args)]
            if not ways:
                raise RuntimeError(
                    f"{operator}: running statistics must lie alike in all dimensions of the mesh: {args}"
                )
            return [
                (
                    [placement(letter) for letter in of_results],
                    [None if s == " " or arg is None else placement(s) for s, arg in zip(of_arguments, args)],
                )
                for of_arguments, of_results in ways
            ]

        register_sharding(operator)(rule)
        noted = DTensor._op_dispatcher.sharding_propagator.op_to_schema_info[operator]
        noted.static_argnum = [*map(_is_tensor, operator._schema.arguments), False].index(False)

    for operator in _RULES:
        register_one(operator)
