"""Compiles LeNet's three launches for sm_90 side by side and prints what was done: see test_machine_code.py.

The driver cannot launch anything.
"""

import json
import threading

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

import tritonnet
from bench.compile import Calls, NoDevice
from tritonnet.kernels import lenet_forward, lenet_gradient, lenet_update
from tritonnet.kernels._common import compiled_together

driver.set_active(NoDevice(GPUTarget("cuda", 90, 32)))
threads = set()
made = triton.compiler.compiler.CompiledKernel.__init__


def note_the_thread(self, *args):
    threads.add(threading.get_ident())
    made(self, *args)


triton.compiler.compiler.CompiledKernel.__init__ = note_the_thread
with tritonnet.count_launches() as launches, compiled_together():
    Calls(torch.bfloat16).lenet(64)
kernels = lenet_forward.lenet_forward_kernel, lenet_gradient.lenet_gradient_kernel, lenet_update.lenet_update_kernel
compiled = {k.fn.__name__: [type(c).__name__ for c in k.device_caches[0][0].values()] for k in kernels}
threads.discard(threading.get_ident())
print(json.dumps({"compiled": compiled, "launches": launches.total(), "threads": len(threads)}))
