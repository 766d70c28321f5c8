"""Two processes over gloo: DistributedDataParallel, fully_shard, and the training program under torchrun."""

import pytest
import torch
from conftest import INTERPRETER_RUNS, run_python

import tritonnet

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


@pytest.mark.skipif(not INTERPRETER_RUNS, reason="the interpreter of triton 3.6 needs numpy before 2.4")
@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_data_parallel_and_sharded(backend):
    """Gradients of both halves of the batch, averaged, are those of one process and torch's own layers."""
    result = run_python(*TORCHRUN, "tests/distributed_worker.py", backend, TRITON_INTERPRET="1", OMP_NUM_THREADS="1")
    assert result.returncode == 0, result.stderr[-3000:]


def test_training_under_torchrun(tmp_path):
    """Rank 0 alone prints and saves, and two processes reach what one reaches."""
    pytest.importorskip("tqdm")
    save = tmp_path / "lenet.pt"
    result = run_python(
        *TORCHRUN, "-m", "tritonnet.train", "--device", "cpu", "--save", str(save), TRITON_INTERPRET=None,
        OMP_NUM_THREADS="1",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    lines = result.stdout.splitlines()
    assert lines[0] == "LeNet on 8000 digits, 2 x cpu, backend: reference (plain torch)", result.stdout
    assert len(lines) == 12 and lines[-1] == f"saved {save}", result.stdout
    assert float(lines[-2].split()[-1].rstrip("%")) > 97
    tritonnet.LeNet().load_state_dict(torch.load(save, weights_only=True))
