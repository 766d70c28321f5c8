"""Runs TrainStep on batches of several sizes for sm_90 and prints what was compiled: see test_machine_code.py.

The driver cannot launch anything, so finishing without an error shows that nothing was launched.
"""

import json
import threading

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

import tritonnet
from bench.machine_code.compile import NoDevice
from tritonnet import train_step
from tritonnet.kernels import launchers
from tritonnet.kernels.lenet import forward as lenet_forward
from tritonnet.kernels.lenet import gradient as lenet_gradient
from tritonnet.kernels.lenet import pack as lenet_pack
from tritonnet.kernels.lenet import update as lenet_update
from tritonnet.lenet import step as lenet_step

driver.set_active(NoDevice(GPUTarget("cuda", 90, 32)))
# CPU tensors are served as a GPU's would be.
lenet_step.implementation = train_step.implementation = lambda tensor: launchers
threads = set()
made = triton.compiler.compiler.CompiledKernel.__init__


def note_the_thread(self, *args):
    threads.add(threading.get_ident())
    made(self, *args)


triton.compiler.compiler.CompiledKernel.__init__ = note_the_thread
net = tritonnet.LeNet()
step = tritonnet.TrainStep(net, torch.nn.CrossEntropyLoss(), torch.optim.Adam(net.parameters()), "bfloat16")._step
modules = {"pack": lenet_pack, "forward": lenet_forward, "gradient": lenet_gradient, "update": lenet_update}
kernels = [getattr(module, f"lenet_{name}_kernel") for name, module in modules.items()]
compiled = []
with tritonnet.count_launches() as launches:
    # All but the last two sizes share their tiles.
    for size in (100, 101, 110, 128, 1000, 2**14):
        images, labels = torch.empty(size, 1, 32, 32), torch.zeros(size, dtype=torch.int64)
        step._new_batch(size, images, labels, add=False, update=True)
        caches = [k.device_caches[0][0].values() for k in kernels]
        assert all(type(c) is triton.compiler.CompiledKernel for cache in caches for c in cache)
        compiled.append({k.fn.__name__: len(cache) for k, cache in zip(kernels, caches)})
threads.discard(threading.get_ident())

# A compilation that fails in a thread is not kept: the kernel is compiled again at its launch.
for kernel in kernels:
    kernel.device_caches.clear()
compile, failed = triton.compiler.compile, []


def compile_but_gradients(src, *args, **kwargs):
    if src.fn is lenet_gradient.lenet_gradient_kernel and threading.current_thread() is not threading.main_thread():
        failed.append(src)
        raise SystemError("AST constructor recursion depth mismatch")
    return compile(src, *args, **kwargs)


triton.compiler.compile = compile_but_gradients
images, labels = torch.empty(100, 1, 32, 32), torch.zeros(100, dtype=torch.int64)
step._new_batch(100, images, labels, add=False, update=True)
kept = [len(k.device_caches[0][0]) for k in kernels]
print(
    json.dumps(
        {
            "compiled": compiled,
            "launches": launches.total(),
            "threads": len(threads),
            "failed": len(failed),
            "kept": kept,
        }
    )
)
