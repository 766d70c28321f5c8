"""Has TrainStep meet a batch of another size on sm_90 and prints what was compiled: see test_machine_code.py.

The driver cannot launch anything: that all ends well says that nothing was launched.
"""

import json
import threading

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

import tritonnet
from bench.compile import NoDevice
from tritonnet import lenet_step, train_step
from tritonnet.kernels import launchers, lenet_forward, lenet_gradient, lenet_update

driver.set_active(NoDevice(GPUTarget("cuda", 90, 32)))
# Tensors on the CPU stand in for a GPU's.
lenet_step.implementation = train_step.implementation = lambda tensor: launchers
threads = set()
made = triton.compiler.compiler.CompiledKernel.__init__


def note_the_thread(self, *args):
    threads.add(threading.get_ident())
    made(self, *args)


triton.compiler.compiler.CompiledKernel.__init__ = note_the_thread
net = tritonnet.LeNet()
step = tritonnet.TrainStep(net, torch.nn.CrossEntropyLoss(), torch.optim.Adam(net.parameters()), "bfloat16")._step
packed = torch.zeros(step.geometry.packed[-1], dtype=torch.bfloat16)
kernels = lenet_forward.lenet_forward_kernel, lenet_gradient.lenet_gradient_kernel, lenet_update.lenet_update_kernel
compiled = []
with tritonnet.count_launches() as launches:
    # All but the last two share their tiles.
    for size in (100, 101, 110, 128, 1000, 2**14):
        images, labels = torch.empty(size, 1, 32, 32), torch.zeros(size, dtype=torch.int64)
        step._new_batch(size, images, labels, packed, add=False, update=True)
        caches = [k.device_caches[0][0].values() for k in kernels]
        assert all(type(c) is triton.compiler.CompiledKernel for cache in caches for c in cache)
        compiled.append({k.fn.__name__: len(cache) for k, cache in zip(kernels, caches)})
threads.discard(threading.get_ident())
print(json.dumps({"compiled": compiled, "launches": launches.total(), "threads": len(threads)}))
