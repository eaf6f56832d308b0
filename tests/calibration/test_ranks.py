"""Two processes with half of the data each get what one gets of all of it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import normconv as nc
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
