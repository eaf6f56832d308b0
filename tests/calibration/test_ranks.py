"""Two processes with half of the data each get what one gets of all of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import normconv as nc
from normconv.calibration import Lesson
from normconv.numerics import relative_l2
from tests.calibration.test_calibrate import DATA, HELD_OUT, net

__all__ = ["net"]

ROOT = Path(__file__).parents[2]
SCRIPT = """
import sys, torch, torch.distributed as dist, normconv as nc
torch.set_num_threads(1)
rank, folder = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
given = torch.load(f"{folder}/given.pt", weights_only=False)
data, held_out = given["data"][rank::2], given["held_out"][rank::2]
for refit in (False, True):
    result = nc.calibrate(given["model"], given["plan"], data, reference=given["net"],
                          held_out=held_out, refit=refit)
    facts = result.report.facts["after"]
    torch.save((result.model.state_dict(), facts["agreement"], facts["samples"]),
               f"{folder}/{rank}-{refit}.pt")
half = [batch[rank * 16 : rank * 16 + 16] for batch in given["data"]]
lesson = nc.calibration.Lesson(steps=6, every=3)
taught = nc.recover(given["model"], given["net"], half, lesson=lesson, held_out=held_out,
                    checkpoint=f"{folder}/lesson.pt")
torch.save((taught.model.state_dict(), taught.report.facts["after"]), f"{folder}/{rank}-taught.pt")
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_two_ranks_give_what_one_process_gives(net: nn.Module, tmp_path: Path) -> None:
    plan = nc.make_plan(net, "gn", example_inputs=(DATA[0][:2],), options={"groups": 4})
    model = nc.apply_plan(net, plan).model
    given = {"model": model, "plan": plan, "net": net, "data": DATA, "held_out": HELD_OUT}
    torch.save(given, tmp_path / "given.pt")
    (tmp_path / "rank.py").write_text(SCRIPT)
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    running = [
        subprocess.Popen([sys.executable, tmp_path / "rank.py", str(rank), tmp_path], env=env)
        for rank in range(2)
    ]
    assert [process.wait(timeout=180) for process in running] == [0, 0]
    for refit in (False, True):
        one = nc.calibrate(model, plan, DATA, reference=net, held_out=HELD_OUT, refit=refit)
        wanted = one.model.state_dict()
        for rank in range(2):
            state, agreement, samples = torch.load(tmp_path / f"{rank}-{refit}.pt")
            assert samples == 256
            assert agreement == one.report.facts["after"]["agreement"]
            for name, value in wanted.items():
                assert relative_l2(state[name], value) <= 1e-6, (refit, name)
    data = [batch[:32] for batch in DATA]
    lesson = Lesson(steps=6, every=3)
    alone = nc.recover(model, net, data, lesson=lesson, held_out=HELD_OUT)
    (first, facts), (second, others) = (torch.load(tmp_path / f"{n}-taught.pt") for n in range(2))
    assert facts == others
    assert torch.load(tmp_path / "lesson.pt")["state"]["step"] == 6
    before = model.state_dict()
    for name, value in alone.model.state_dict().items():
        assert torch.equal(first[name], second[name])
        if (moved := value - before[name]).is_floating_point() and moved.any():
            assert relative_l2(first[name] - before[name], moved) < 0.02, name


@pytest.mark.slow
def test_processes_started_by_torchrun_teach_one_student(net: nn.Module, tmp_path: Path) -> None:
    torch.manual_seed(0)
    small = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten())
    small.append(nn.Linear(8 * 36, 4))
    images = torch.randn(48, 3, 8, 8)
    small(images)
    torch.save(small.eval(), tmp_path / "net.pt")
    torch.save(images, tmp_path / "images.pt")
    words = ["convert", "net.pt", "--to", "gn", "--input", "2x3x8x8", "--calib", "images.pt"]
    words += ["--recover", "4", "--batch-size", "8", "--device", "cpu", "--json"]
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *launch, "normconv", *words],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout)  # one process prints
    assert report["facts"]["data"]["samples"] == 24  # of its part
    assert report["facts"]["recover"]["steps"] == 4
    assert report["facts"]["after"]["samples"] == 48  # all processes together
    assert isinstance(nc.load(tmp_path / "net.gn.pt")[1], nn.GroupNorm)
