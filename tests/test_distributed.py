"""Two processes over gloo: DistributedDataParallel, fully_shard, DTensor, and the training program under torchrun."""

import json
import os
import signal
import subprocess
import sys

import pytest
import torch
from conftest import INTERPRETER_RUNS, run_python, thorough_if, write_mnist

import tritonnet
from tritonnet import cli
from tritonnet.data import MEAN, STD, load_digits

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


@pytest.mark.skipif(not INTERPRETER_RUNS, reason="the interpreter of triton 3.6 needs numpy before 2.4")
@pytest.mark.parametrize("backend", thorough_if(lambda name: name == "triton", ["triton", "reference"]))
def test_data_parallel_and_sharded(backend):
    """Gradients of both halves of the batch, averaged, are those of one process and of torch's own layers.

    With the reference DTensor runs in the same processes, which take longer to start: see tensor_parallel.py.
    """
    result = run_python(*TORCHRUN, "tests/distributed_worker.py", backend, TRITON_INTERPRET="1", OMP_NUM_THREADS="1")
    assert result.returncode == 0, result.stderr[-3000:]


@pytest.mark.thorough
def test_training_under_torchrun(tmp_path):
    """Only rank 0 prints and saves, Ctrl-C stops both after the same batch, and two processes do what one does."""
    data, out, alone = (tmp_path / name for name in ("data", "out", "alone"))
    data.mkdir()
    train_x, train_y, test_x, test_y = load_digits()
    train_x, test_x = (((x[:, 0, 2:-2, 2:-2] * STD + MEAN) * 255).round().byte() for x in (train_x, test_x))
    write_mnist(data, train_x[:640], train_y[:640], test_x[:100], test_y[:100])
    fresh = ["--data", str(data), "--batch-size", "32", "--optimizer", "sgd", "--lr", "0.002"]
    command = (*TORCHRUN, "-m", "tritonnet.train", "--device", "cpu")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"OMP_NUM_THREADS": "1"}
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    with subprocess.Popen([sys.executable, *command, *fresh, "--out", str(out)], env=environment, **pipes) as process:
        assert process.stdout.readline() == "LeNet on 640 digits, 2 x cpu, backend: reference (plain torch)\n"
        assert process.stdout.readline().startswith("epoch 1:")
        process.send_signal(signal.SIGINT)
        _, error = process.communicate()
    assert f"tritonnet train --resume {out}" in error, error[-3000:]
    result = run_python(*command, "--resume", str(out), TRITON_INTERPRET=None, OMP_NUM_THREADS="1")
    assert result.returncode == 0, result.stderr[-3000:]
    epochs = [line.partition(":")[0] for line in result.stdout.splitlines() if line.startswith("epoch ")]
    assert epochs[0] != "epoch 1" and epochs[-1] == "epoch 10" and result.stdout.count("model.pt") == 1
    assert cli.main(["train", "--device", "cpu", "--backend", "reference", *fresh, "--out", str(alone)]) == 0
    losses, true_losses = (json.loads((run / "metrics.json").read_text())["losses"] for run in (out, alone))
    # At this rate 200 steps do not amplify a rounding. At 0.005 the loss falls so fast from step 160 on that roundings
    # grew to some millionths on one CPU and to 5 % on another.
    assert losses == pytest.approx(true_losses, rel=1e-5) and len(losses) == 200
    tritonnet.LeNet().load_state_dict(torch.load(out / "model.pt", weights_only=True))
