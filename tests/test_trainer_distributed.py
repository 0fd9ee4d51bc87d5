"""`R2Trainer` on two processes (gloo) equals one, also with a restricted weight that no forward pass uses."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parents[1]


def train(out, processes, **options):
    out.mkdir()
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    launcher = (
        ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)] if processes > 1 else []
    )
    options = {"optim": "sgd", "max_grad_norm": 0, "lr_scheduler_type": "constant", "range_weight": 0.5, **options}
    line = [sys.executable, *launcher, "-m", "tests.workers.train_tiny", str(out), json.dumps(options)]
    done = subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return load_file(out / "result.safetensors")


@pytest.mark.parametrize("unused", [False, True])
def test_two_processes_equal_one(tmp_path, unused):
    options = {"train_sampling_strategy": "sequential", "unused": unused}
    one = train(tmp_path / "one", 1, per_device_train_batch_size=8, **options)
    two = train(tmp_path / "two", 2, per_device_train_batch_size=4, **options)
    for name, value in one.items():
        if unused and (name.startswith("spare") or name == "alphas"):
            continue  # DDP leaves a weight that no forward pass used without its range gradient; one process does not
        torch.testing.assert_close(two[name], value, rtol=0, atol=1e-6, msg=name)
    if unused:
        assert not torch.equal(one["spare.weight"], two["spare.weight"])
        torch.testing.assert_close(two["alphas"][:-1], one["alphas"][:-1], rtol=0, atol=1e-6)
