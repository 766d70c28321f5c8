"""Builds, without a GPU, the C libraries that Triton builds at a kernel's first launch on an NVIDIA GPU.

triton 3.6 compiles a C function for each signature, about half a second of gcc each; later versions have one function
for all of them. Both have one module that calls the driver. The libraries are in Triton's cache beside the kernels.
Triton rebuilds a library that it cannot load, so that none of them can do harm.

They are linked with libcuda.so.1, which comes with the driver. A stub library of that name stands in for it here, and
what is built is not loaded.
"""

import os
import re
import shutil
import subprocess
from pathlib import Path
from unittest import mock

from triton import knobs
from triton.backends.nvidia import driver
from triton.runtime import build


def in_a_line(error):
    """An error in one long line: a compiler's message has many lines."""
    return f"{type(error).__name__}: {error}".strip().replace("\n", " | ")[:2000]


def _stand_in(folder):
    """Builds the stub library, with every function that Triton's sources may call, where the linker looks for it."""
    sources = [Path(driver.__file__).with_suffix(ending).read_text("utf-8") for ending in (".c", ".py")]
    # driver.py of triton 3.6 has C code in it too.
    names = sorted({name for source in sources for name in re.findall(r"\b(cu[A-Z]\w*)\s*\(", source)})
    source = Path(folder, f"libcuda-{os.getpid()}.c")  # other processes make one too
    source.write_text("".join(f"void {name}(void) {{}}\n" for name in names), encoding="utf-8")
    made = source.with_suffix(".so")
    compiler = shutil.which("gcc") or shutil.which("clang") or "gcc"
    subprocess.run([compiler, "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", source, "-o", made], check=True)
    made.replace(source.with_name("libcuda.so.1"))


class Launchers:
    """Called with a compiled kernel, builds what its launch needs into Triton's cache.

    After the first failure `findings` gets one line, and nothing more is built.
    """

    def __init__(self, findings):
        self.findings, self.begun, self.works = findings, False, True

    def __call__(self, kernel):
        if not self.works:
            return
        with mock.patch.object(build, "_load_module_from_path", mock.Mock()):
            try:
                if not self.begun:
                    self.begun = True
                    _stand_in(knobs.nvidia.libcuda_path)
                    driver.CudaUtils()
                if hasattr(driver, "make_launcher"):
                    driver.CudaLauncher(kernel.src, kernel.metadata)
            except Exception as error:  # such as no C compiler: then the machine with the GPU needs one
                self.works = False
                self.findings.add(left_out=f"the C that Triton builds at a first launch: {in_a_line(error)}")
