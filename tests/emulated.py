"""Runs the tests on compiled kernels without a GPU: TRITONNET_TEST_DEVICE=sm_80, sm_90 or sm_100, see package `ptx`.

Tensors are on the CPU, kernels have that GPU's tiles and layouts, and their PTX runs in numpy.
"""

import contextlib
from unittest import mock

import ptx

from bench.no_launch import kernels_unless_reference, served_by
from tritonnet.kernels.lenet import layout as lenet


@contextlib.contextmanager
def emulated(arch, seed):
    """Inside the block, CPU tensors stand in for those of a GPU of this architecture."""
    with served_by(kernels_unless_reference), ptx.emulate(arch, seed=seed) as emulator:
        address = lenet.address

        def known_address(tensor):
            # Kernels find this address in memory.
            emulator.memory.keep(tensor)
            return address(tensor)

        with mock.patch.object(lenet, "address", known_address):
            yield emulator
