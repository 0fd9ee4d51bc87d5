"""`R2Trainer` on two processes (gloo) equals one, also with a restricted weight that no forward pass uses."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.workers.train_tiny import main

ROOT = Path(__file__).parents[1]


def train(out, processes, **options):
    """What each process ended with; one process is this one."""
    out.mkdir()
    options = {"optim": "sgd", "max_grad_norm": 0, "lr_scheduler_type": "constant", "range_weight": 0.5, **options}
    if processes == 1:
        main(str(out), options)
    else:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        line = [sys.executable, *launcher, "-m", "tests.workers.train_tiny", str(out), json.dumps(options)]
        done = subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
    return [load_file(out / f"result-{process}.safetensors") for process in range(processes)]


def test_two_processes_equal_one(tmp_path):
    options = {"train_sampling_strategy": "sequential"}
    (one,) = train(tmp_path / "one", 1, per_device_train_batch_size=8, **options)
    for two in train(tmp_path / "two", 2, per_device_train_batch_size=4, **options):
        for name, value in one.items():
            torch.testing.assert_close(two[name], value, rtol=0, atol=1e-6, msg=name)


@pytest.mark.parametrize("method", ["lsq", "pact"])
def test_two_processes_train_quantized_as_one_does(tmp_path, method):
    recipe = {"method": method, "weight_bits": 3, "act_bits": 4}
    options = {"train_sampling_strategy": "sequential", "recipe": recipe, "learning_rate": 1e-3}
    (one,) = train(tmp_path / "one", 1, per_device_train_batch_size=8, **options)
    for two in train(tmp_path / "two", 2, per_device_train_batch_size=4, **options):
        for name, value in one.items():
            torch.testing.assert_close(two[name], value, rtol=0, atol=1e-6, msg=name)


def test_weights_that_no_or_not_every_process_uses(tmp_path):
    """DDP leaves a weight without its range gradient in a process whose forward pass does not use it; one process does not."""
    options = {"train_sampling_strategy": "sequential", "unused": True}
    (one,) = train(tmp_path / "one", 1, per_device_train_batch_size=8, **options)
    first, second = train(tmp_path / "two", 2, per_device_train_batch_size=2, gradient_accumulation_steps=2, **options)
    for name, value in first.items():
        torch.testing.assert_close(second[name], value, rtol=0, atol=0, msg=name)  # no process drifts from the others
        if not name.startswith(("spare", "sometimes", "alphas", "log.loss", "log.range_loss")):
            torch.testing.assert_close(value, one[name], rtol=0, atol=1e-6, msg=name)
    torch.testing.assert_close(first["alphas"][:-2], one["alphas"][:-2], rtol=0, atol=1e-6)
    assert not torch.equal(one["spare.weight"], first["spare.weight"])
    assert first["alphas"][-2] == pytest.approx(0.1)  # of the spare weight: nothing moves it
    assert first["alphas"][-1] != pytest.approx(0.1)  # of the other: half the pull
