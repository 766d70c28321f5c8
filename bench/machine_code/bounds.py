"""Lower bounds on the time of a launch on an H200, by its machine code, by arithmetic and by memory.

The iterations of each loop are known from the launch; the instructions of an iteration are read from machine code.
"""

import itertools
import math
from types import SimpleNamespace

from . import sass


class Launch(SimpleNamespace):
    """The arguments of a launch by name, its `grid` and its `num_warps`."""

    @property
    def programs(self):
        return math.prod(self.grid)


def _cdiv(a, b):
    return -(-a // b)


def _forward(a):
    return a.blocks, [], a.y_ptr.numel() * a.C * a.KH * a.KW


def _forward_pooled(a):
    # The loop over the window's positions encloses the loop with the products.
    blocks = _cdiv(a.C * a.KH * a.KW, a.BLOCK_K) if a.FLAT else a.KH * a.KW * _cdiv(a.C, a.BLOCK_K)
    return blocks, [a.WH * a.WW], a.y_ptr.numel() * a.C * a.KH * a.KW * a.WH * a.WW


def _pooled_product(a):
    chunks = _cdiv(a.OC, a.BLOCK_OC)
    turns = _cdiv(a.M, a.BLOCK_M) * chunks / a.programs
    return turns, [], a.y_ptr.numel() * 4 * a.C * a.KH * a.KW


def _pooled_lanes(a):
    # With one channel there is no loop over channels.
    turns, others = (a.C, [a.TURNS]) if a.C > 1 else (a.TURNS, [])
    return turns, others, a.y_ptr.numel() * 4 * a.C * a.KH * a.KW


def _taps(block, step, patch):
    """At least how many taps a filter has, along one dimension: see conv2d_few/cut.py."""
    if step >= block:
        return patch - (block - 1) * step // block
    return block // step * (patch - 1 - step) + 2


def _patch_taps(a, channels):
    """At least how many taps a filter has; a run may begin before and end after what the block depends on."""
    inner = channels if a.PLANES == 1 else 1
    patch_w = a.RUN // inner if inner % a.UNIT == 0 else (a.RUN - 2 * (a.UNIT - 1)) // inner
    return max(1, _taps(a.BH, a.STEP_H, a.PATCH_H)) * max(1, _taps(a.BW, a.STEP_E // inner, patch_w))


def _few_product(a):
    channels = a.image_ptr.shape[1]
    taps = _patch_taps(a, channels)
    # At most the pixels of the convolution's result, unless it is padded widely.
    pixels = min(a.image_ptr[:, 0].numel(), a.out_ptr[:, 0].numel())
    return a.LENGTH / a.BLOCK_K, [], pixels * channels * a.CO * taps


def _few_lanes(a):
    # At most the pixels of the convolution's result, unless it is padded widely.
    pixels = min(a.image_ptr[:, 0].numel(), a.out_ptr[:, 0].numel())
    return a.CI, [], pixels * a.CI * a.CO * a.KH * a.KW


def _few_weight_grad(a):
    channels, blocks = a.x_ptr.shape[1], _cdiv(min(a.per_split, a.M), a.BLOCK_K)
    products = a.dy_ptr.numel() * channels * _patch_taps(a, channels)
    return blocks, [blocks / (a.LENGTH // a.BLOCK_N)], products


def _few_fold(a):
    return 0, [_cdiv(a.SPLITS * a.BH * a.BW, a.BLOCK_S)], 0


def _input_grad(a):
    taps = [len(range(h, a.KH, a.SH)) * len(range(w, a.KW, a.SW)) for h in range(a.SH) for w in range(a.SW)]
    blocks = [_cdiv(a.OC * n, a.BLOCK_K) if a.WALK == "flat" else n * _cdiv(a.OC, a.BLOCK_K) for n in taps]
    return sum(blocks) / len(blocks), [], a.dy_ptr.numel() * a.C * a.KH * a.KW


def _weight_grad(a):
    by_taps = _cdiv(a.KH * a.KW, a.TAPS) * _cdiv(a.C, a.BLOCK_N)
    columns = _cdiv(a.C * a.KH * a.KW, a.BLOCK_N) if a.WALK == "flat" else by_taps
    blocks = _cdiv(min(a.per_split, a.K), a.BLOCK_K)
    # One column of programs computes the bias's sum.
    return blocks, [blocks / columns], a.dy_ptr.numel() * a.C * a.KH * a.KW


def _depthwise(a):
    """Iterations over rows of taps and groups of a row's taps, and multiply-adds, of a forward pass."""
    return a.KH if a.UNROLL == 1 else 1, [], a.y_ptr.numel() * a.KH * a.KW


def _depthwise_input_grad(a):
    rows = _cdiv(a.KH, a.STEP_H)
    return rows if a.UNROLL == 1 else 1, [], a.dy_ptr.numel() * a.KH * a.KW


def _depthwise_weight_grad(a):
    return _cdiv(min(a.per_split, a.P), a.BLOCK_P), [], a.dy_ptr.numel() * a.KH * a.KW


def _reached(size, block, step, low, reach, pooled):
    """How many pooled pixels a block reaches on average, along one dimension of `size` pixels."""
    blocks = _cdiv(size, block)
    return sum(min(pooled, i * step + low + reach) - max(0, i * step + low) for i in range(blocks)) / blocks


def _input_grad_pooled(a):
    rows = _reached(a.H, a.BH, a.STEP_H, a.LOW_H, a.REACH_H, a.QH)
    columns = _reached(a.W, a.BW, a.STEP_W, a.LOW_W, a.REACH_W, a.QW)
    blocks = _cdiv(a.H, a.BH) * _cdiv(a.W, a.BW)
    # Once for each pooled pixel, not for each position in its window; some of a block's filters are zeros.
    products = blocks * rows * columns * a.N * a.OC * a.C * a.BH * a.BW
    return rows * columns * _cdiv(a.OC, a.BLOCK_OC), [], products


def _weight_grad_pooled(a):
    return min(a.per_split, a.turns), [], a.dy_ptr.numel() * a.C * a.KH * a.KW


def _product(a):
    n, k = a.N * a.UNITS[4], a.K
    return _cdiv(min(a.per_split, k), a.BLOCK_K), [], a.IMAGES * a.PIXELS * a.UNITS[0] * n * k


def _linear(a):
    n, k = a.N * a.UNITS[0], a.K * a.UNITS[1]
    return _cdiv(k, a.BLOCK_K), [], a.M * n * k


def _linear_weight_grad(a):
    blocks = _cdiv(min(a.per_split, a.M), a.BLOCK_K)
    n, k = a.N * a.UNITS[0], a.K * a.UNITS[1]
    return blocks, [blocks / _cdiv(k, a.BLOCK_N)], a.M * n * k


def _chain(a):
    """Multiply-adds of a chain, and the fewest iterations that the product of a later layer takes.

    The compiler unrolls the loops of only some of the later layers, so that each counts as the shortest.
    """
    widths = [n for n in (a.N1, a.N2, a.N3, a.N4) if n]
    return a.M * sum(n * k for n, k in zip(widths, [a.K, *widths])), _cdiv(min(widths[:-1]), a.BLOCK_K)


def _chain_forward(a):
    products, least = _chain(a)
    return _cdiv(a.K, a.BLOCK_K), [least] * a.LAYERS, products


def _chain_input_grad(a):
    products, least = _chain(a)
    least = min(least, _cdiv(a.K, a.BLOCK_N))
    return least, [least] * a.LAYERS, products


def _pool(a):
    # Loops over small windows are unrolled.
    return 0, [] if a.UNROLLED else [a.KH, a.KW], 0


def _mean_grad(a):
    return 0, [_cdiv(a.KH, a.SH), _cdiv(a.KW, a.SW)], 0


def _bins(a):
    return 0, [a.most_h, a.most_w], 0


def _whole_mean(a):
    return 0, [_cdiv(a.P * a.P_UNIT, a.BLOCK_P)], 0


def _cross_entropy(a):
    # Whole blocks of targets; blocks of rows, and inside this loop the two passes over a wide row, one after the other.
    columns = _cdiv(a.C, a.BLOCK_C)
    return 0, [a.N // a.BLOCK_T, _cdiv(a.rows, a.BLOCK_N), columns, columns], 0


def _steps(a):
    return a.rows / (a.BLOCK_M * a.UNROLL * (1 if a.CHANNELS else a.BLOCK_N))


def _statistics(a):
    # Behind the loop over whole steps is one over blocks, which only the last program of a channel enters.
    return 0, [_steps(a), 0], 0


def _scatter(a):
    return 0, [_cdiv(a.KH, a.STEP_H), _cdiv(a.KW, a.STEP_W)], 0


def _lenet_forward(a):
    # The loops in the order of the machine code: short ones are unrolled, except for sums in float32.
    ieee, squares, windows = a.PRECISION == "ieee", (a.Q1 // 2) ** 2, a.Q2**2
    groups = _cdiv(a.N, a.BLOCK_I)
    turns = [] if a.TRAIN else [groups / a.programs]
    if a.LANES:
        # Patches, filters one or two at a time, channels; then patches, filters four at a time, channels.
        turns += [_cdiv(a.BLOCK_I * squares, a.BLOCK_M1), 6] if a.C == 1 else []
        turns += [_cdiv(a.BLOCK_I * squares, a.BLOCK_M1), 3, a.C] if a.C > 1 else []
        blocks = _cdiv(a.BLOCK_I * windows, a.BLOCK_M2)
        turns += [blocks] * (blocks > 1) + [4, 6]
    else:
        turns += [a.BLOCK_I / a.BLOCK_S] * (a.BLOCK_I > a.BLOCK_S)
        turns += [_cdiv(a.BLOCK_S * squares, a.BLOCK_M1)]
        turns += [a.C * 64 / a.BLOCK_K1] * (not a.KEPT and a.C * 64 > a.BLOCK_K1)
        turns += [_cdiv(a.BLOCK_S * windows, a.BLOCK_M2)]
        turns += [288 / a.BLOCK_K2] * (a.KEPT < 2)
    turns += [_cdiv(a.F, a.BLOCK_K)] + [128 / a.BLOCK_K] * ieee
    if a.TRAIN:
        turns += [128 / a.BLOCK_K] * ieee + [_cdiv(a.F, a.BLOCK_F)] + [128 / a.BLOCK_K] * ieee
    convolutions = 6 * 25 * a.C * 4 * a.Q1**2 + 16 * 150 * 4 * windows
    linears = 120 * a.F + 84 * 120 + a.CLASSES * 84
    return None, turns, a.N * (convolutions + linears * (2 if a.TRAIN else 1))


def _lenet_gradient(a):
    side, windows, tiles = a.Q1 // 2, a.Q2**2, _cdiv(a.F, a.BLOCK_N3) + 256 // a.BLOCK_N3
    pairs = _cdiv(side, 2)
    first, second = a.splits1 * a.PARTS1, a.splits2 * a.PARTS2
    third = a.programs - first - second
    if a.LANES:
        # Blocks of images and pairs of rows, rows of windows that reach these (each reaches three), filters; then
        # channels, blocks as before, their squares, the two rows of a square.
        blocks = _cdiv(a.N, a.BLOCK_M1) * side / a.splits1
        turns = [blocks, 3 * a.Q2 / side, 16, *[a.C] * (a.C > 1), blocks, side, 2]
    else:
        # Each row of windows reaches three rows of squares, and each column two columns of pairs.
        reached = 6 * windows / (side * pairs) * 64 / a.BLOCK_K1
        turns = [_cdiv(a.N, a.BLOCK_M1) * side * pairs * a.C / first, reached, side / pairs]
    loops = len(turns)
    seconds = _cdiv(a.N * windows, a.BLOCK_M2) / a.splits2 if a.LANES else _cdiv(a.N, a.BLOCK_M2) * windows / a.splits2
    turns += [seconds, _cdiv(a.N, a.BLOCK_M3) * tiles / third]
    # Only the largest pixel of each window has a gradient.
    products = 150 * a.C * a.Q1**2 + 2 * 16 * 150 * windows + 120 * a.F + 84 * 120 + a.CLASSES * 84
    roles = [(loops, first / a.programs), (1, second / a.programs), (1, third / a.programs)]
    return None, turns, a.N * products, roles


def _lenet_pack(a):
    starts = [0, a.P2, a.PD, a.P3, a.P4, a.P5, a.PF, a.PB - 1, a.programs]
    return 0, [], 0, [(0, (end - start) / a.programs) for start, end in itertools.pairwise(starts) if end > start]


# The kernels that are one product, whose programs read each block of their operands once from L2.
PRODUCTS = (
    "conv2d_forward_kernel", "conv2d_input_grad_kernel", "conv2d_weight_grad_kernel", "product_kernel",
    "linear_forward_kernel", "linear_weight_grad_kernel",
)  # fmt: skip
# By kernel: iterations of the loop with the products (None where several loops have products; these are then among the
# others), iterations of the other loops from the outermost in, and multiply-adds of the whole launch. Where programs
# have roles, also the number of loops of each role and its share of the programs. A kernel not listed has no loop.
MODEL = {
    "conv2d_forward_kernel": _forward,
    "conv2d_relu_max_pool2d_forward_kernel": _forward_pooled,
    "conv2d_relu_max_pool2d_product_kernel": _pooled_product,
    "conv2d_relu_max_pool2d_lanes_kernel": _pooled_lanes,
    "few_channels_product_kernel": _few_product,
    "few_channels_lanes_kernel": _few_lanes,
    "few_channels_weight_grad_kernel": _few_weight_grad,
    "fold_few_weight_grad_kernel": _few_fold,
    "conv2d_input_grad_kernel": _input_grad,
    "conv2d_weight_grad_kernel": _weight_grad,
    "depthwise_forward_kernel": _depthwise,
    "depthwise_input_grad_kernel": _depthwise_input_grad,
    "depthwise_weight_grad_kernel": _depthwise_weight_grad,
    "conv2d_relu_max_pool2d_input_grad_kernel": _input_grad_pooled,
    "conv2d_relu_max_pool2d_weight_grad_kernel": _weight_grad_pooled,
    "lenet_forward_kernel": _lenet_forward,
    "lenet_gradient_kernel": _lenet_gradient,
    "lenet_pack_kernel": _lenet_pack,
    "product_kernel": _product,
    "linear_forward_kernel": _linear,
    "linear_weight_grad_kernel": _linear_weight_grad,
    "linear_chain_forward_kernel": _chain_forward,
    "linear_chain_input_grad_kernel": _chain_input_grad,
    "cross_entropy_kernel": _cross_entropy,
    "max_pool2d_forward_kernel": _pool,
    "max_pool2d_scatter_kernel": _scatter,
    "avg_pool2d_forward_kernel": _pool,
    "avg_pool2d_grad_kernel": _mean_grad,
    "adaptive_avg_pool2d_kernel": _bins,
    "whole_avg_pool2d_kernel": _whole_mean,
    "batch_statistics_kernel": _statistics,
    "fold_statistics_kernel": lambda a: (0, [_cdiv(a.P, a.BLOCK_P)] * 2, 0),
    "batch_norm_sums_kernel": lambda a: (0, [_steps(a)], 0),
    "fold_sums_kernel": lambda a: (0, [_cdiv(a.P, a.BLOCK_P)], 0),
    "batch_norm_grad_kernel": lambda a: (0, [_steps(a)], 0),
    "sum_partials_kernel": lambda a: (0, [a.SPLITS], 0),
}


def _by_role(instructions, loops, roles):
    """How often a program runs each instruction on average, if the code of each role ends with an EXIT.

    That is the last EXIT before the next role's loops, or, for a role without loops, the next EXIT.
    """
    exits = [i for i, instruction in enumerate(instructions) if instruction.opcode == "EXIT"]
    weights, seen = [], 0
    for number, (count, share) in enumerate(roles):
        seen += count
        if number == len(roles) - 1:
            end = len(instructions)
        elif count:
            end = max(i for i in exits if i < loops[seen][0]) + 1
        else:
            end = min(i for i in exits if i >= len(weights)) + 1
        weights += [share] * (end - len(weights))
    return weights


# Bytes a second that an H200's L2 delivers to all SMs, which is assumed.
L2 = 8e12


def waves(programs):
    """How much longer a launch takes because an SM runs a whole number of programs."""
    return _cdiv(programs, sass.SMS) * sass.SMS / programs


def _l2_bytes(kernel, launch, steps):
    """Bytes that the programs of a product read from L2, each its own operands; 0 of other kernels."""
    if kernel not in PRODUCTS:
        return 0
    itemsize = next(t.element_size() for t in _tensors(launch))
    taps, rows, columns = getattr(launch, "TAPS", 1), launch.BLOCK_M, launch.BLOCK_N
    if getattr(launch, "WALK", "") == "whole":
        rows, columns = rows * launch.KH, columns * launch.KW
    elif taps > 1:  # the last program of a filter has fewer
        columns *= launch.KH * launch.KW / _cdiv(launch.KH * launch.KW, taps)
    return launch.programs * steps * (rows + columns) * launch.BLOCK_K * itemsize


def _tensors(launch):
    arguments = [getattr(value, "base", value) for value in vars(launch).values()]
    return {t.data_ptr(): t for t in arguments if hasattr(t, "data_ptr") and t.numel()}.values()


def bounds(kernel, launch, instructions, format):
    """Least microseconds by the machine code's instructions, L1 and matrix units, by arithmetic, and by memory.

    Beside them `waves`, and for products l2_us, the time in which L2 delivers their operands.
    """
    main_turns, other_turns, products, *roles = MODEL.get(kernel, lambda a: (0, [], 0))(launch)
    weights = [1.0] * len(instructions)
    main = sass.main_loop(instructions) if products and main_turns is not None else None
    others = sorted(loop for loop in sass.loops(instructions) if loop != main)
    if roles and len(others) == len(other_turns):
        weights = _by_role(instructions, others, *roles)
    # The compiler may have unrolled loops, of a nest the inner ones.
    turns = [(main, main_turns)] if main else []
    turns += list(zip(others, other_turns))
    for (first, last), n in turns:
        weights[first : last + 1] = [w * n for w in weights[first : last + 1]]
    rate = sass.RATES[format]
    # A pipelined loop copies the first blocks before it and nothing in as many of its last iterations.
    copied = [i for i in range(len(instructions)) if main and not main[0] <= i <= main[1]]
    cost = sass.cost(instructions, weights, launch.num_warps, rate, set(copied))
    if kernel == "product_kernel":
        # The copies of descriptors' blocks, whose instructions do not say how many bytes they are.
        blocks = _l2_bytes(kernel, launch, main_turns) / launch.programs
        cost = cost._replace(l1=cost.l1 + blocks / 128)

    def microseconds(cycles):
        return cycles / sass.SMS / sass.CLOCK * 1e6

    return {
        **{f"{name}_us": microseconds(cycles * launch.programs) for name, cycles in cost._asdict().items()},
        "arithmetic_us": microseconds(2 * products / rate),
        "memory_us": sum(t.numel() * t.element_size() for t in _tensors(launch)) / sass.MEMORY * 1e6,
        "waves": waves(launch.programs),
        "l2_us": _l2_bytes(kernel, launch, main_turns) / L2 * 1e6,
        "loops": len(others) + bool(main),
        "unaccounted_loops": max(0, len(others) - len(other_turns)),
    }
