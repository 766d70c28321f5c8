"""Runs the PTX that Triton compiles for sm_80, sm_90 and sm_100 on a CPU, in numpy; reports races and faults by name.

    with ptx.emulate("sm_90", seed=3) as machine:  # TRITON_INTERPRET must not be set
        launchers.conv2d(x, w, ...)  # CPU tensors
    print(machine.instructions)

parse reads the text and flow finds its basic blocks. translate, with values and operations, makes a Python function of
each block. What instructions do is in arithmetic, formats, warp, matrix, memory, shared, copies, products and operands,
for the products of sm_100 in mbarrier, tensor, tensor_products and flight, and for copies of tensor descriptors' boxes
in mbarrier, bulk and descriptors. schedule runs the blocks, and launch takes Triton's launches.

An unknown instruction raises; nothing is guessed.
"""

from .faults import KINDS, Fault
from .launch import ARCHITECTURES, Emulator, emulate

__all__ = ["ARCHITECTURES", "KINDS", "Emulator", "Fault", "emulate"]
