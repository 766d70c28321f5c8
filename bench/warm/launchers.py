"""The C that Triton builds on a machine with an NVIDIA GPU when a kernel is launched first, built without one.

triton 3.6 makes a C function of each kind of arguments, about half a second of gcc each; a later one has the same
function for all of them. Both have one module that speaks to the driver. They lie in Triton's cache beside the
kernels. Where such a library cannot be loaded, Triton builds it anew, so that none of them can do harm.

They are linked with libcuda.so.1, which only a driver brings: a library of that name, whose functions do nothing,
stands in for it, and what is built is not loaded here.
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
    """An error whole but for its end: a compiler says in many lines what is wrong."""
    return f"{type(error).__name__}: {error}".strip().replace("\n", " | ")[:2000]


def _stand_in(folder):
    """Makes the library, of every function that Triton's sources may mean, and leaves it where it is looked for."""
    sources = [Path(driver.__file__).with_suffix(ending).read_text("utf-8") for ending in (".c", ".py")]
    # Python starts its functions like that, too.
    names = sorted({name for source in sources for name in re.findall(r"\b(cu[A-Z]\w*)\s*\(", source)})
    source = Path(folder, f"libcuda-{os.getpid()}.c")  # other processes make one too
    source.write_text("".join(f"void {name}(void) {{}}\n" for name in names), encoding="utf-8")
    made = source.with_suffix(".so")
    compiler = shutil.which("gcc") or shutil.which("clang") or "gcc"
    subprocess.run([compiler, "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", source, "-o", made], check=True)
    made.replace(source.with_name("libcuda.so.1"))


class Launchers:
    """Called with a compiled kernel, builds what its launch needs, into Triton's cache.

    Where the first cannot be built, `findings` hears of it once, and no other is tried.
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
            except Exception as error:  # without a compiler, Triton needs none here and has to find one there
                self.works = False
                self.findings.add(left_out=f"the C that Triton builds at a first launch: {in_a_line(error)}")
