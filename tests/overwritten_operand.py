"""A gradient of a weight and a bias in two forms, one of which has an operand overwritten on sm_90.

Compiles both and prints what bench.machine_code.ttgir finds, see test_machine_code.py; planted.py runs them.
"""

import json

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget

from bench.machine_code.ttgir import overwritten


@triton.jit
def gradient_kernel(dy_ptr, a_ptr, dw_ptr, db_ptr, N, AGAIN: tl.constexpr, PRECISION: tl.constexpr):
    """dw = dy^T a and db, the sum of dy over its rows; with AGAIN each iteration loads dy a second time for db."""
    rows, columns = tl.arange(0, 64), tl.arange(0, 64)
    offs = rows[:, None] * 64 + columns[None, :]
    acc, acc_b = tl.zeros((64, 64), tl.float32), tl.zeros((64, 64), tl.float32)
    for n in tl.range(0, N, 64, num_stages=2):
        mask = (n + rows < N)[:, None]
        dy = tl.load(dy_ptr + n * 64 + offs, mask=mask, other=0.0)
        a = tl.load(a_ptr + n * 64 + offs, mask=mask, other=0.0)
        acc = tl.dot(tl.trans(dy), a, acc, input_precision=PRECISION)
        if AGAIN:
            acc_b += tl.load(dy_ptr + n * 64 + offs, mask=mask, other=0.0, cache_modifier=".ca").to(tl.float32)
        else:
            acc_b += dy.to(tl.float32)
    tl.store(dw_ptr + offs, acc)
    tl.store(db_ptr + columns, tl.sum(acc_b, axis=0))


def main():
    found = {}
    for dtype, precision in (("bf16", "ieee"), ("fp32", "tf32")):
        for again in (False, True):
            signature = {"dy_ptr": f"*{dtype}", "a_ptr": f"*{dtype}", "dw_ptr": "*fp32", "db_ptr": "*fp32", "N": "i32"}
            pointers = {(i,): [["tt.divisibility", 16]] for i in range(4)}
            source = triton.compiler.ASTSource(
                gradient_kernel,
                {**signature, "AGAIN": "constexpr", "PRECISION": "constexpr"},
                {"AGAIN": again, "PRECISION": precision},
                pointers,
            )
            kernel = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})
            found[f"{'loaded again' if again else 'shared'}, {dtype}"] = overwritten(kernel.asm["ttgir"])
    print(json.dumps(found))


if __name__ == "__main__":
    main()
