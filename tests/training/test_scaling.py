"""Two processes take the trajectory of one: DDP and FSDP2, both forms, however they are trained."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.training import scaling_cases as cases

ROOT = Path(__file__).parents[2]
BOUND = 1e-6


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, torch.Tensor]]:
    """What one launch of two processes made of all cases."""
    folder = tmp_path_factory.mktemp("ranks")
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    script = ["-m", "tests.training.scaling_cases", str(folder)]
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *launch, *script],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    states: dict[str, dict[str, torch.Tensor]] = torch.load(folder / "found.pt", weights_only=True)
    return states


@pytest.mark.slow
@pytest.mark.parametrize("case", cases.CASES, ids=str)
def test_two_processes_are_one(case: cases.Case, found: dict[str, dict[str, torch.Tensor]]) -> None:
    one = cases.alone(case)
    start = cases.made(case).state_dict()
    assert found[str(case)].keys() == one.keys()
    for name, value in one.items():
        torch.testing.assert_close(found[str(case)][name], value, rtol=0, atol=BOUND)
    moved = max(float((value - start[name]).abs().max()) for name, value in one.items())
    assert moved > 1000 * BOUND


@pytest.mark.slow
def test_the_comparison_sees_gradients_that_are_not_exchanged(
    found: dict[str, dict[str, torch.Tensor]],
) -> None:
    lonely = found["lonely"]
    one = cases.alone(cases.CASES[0])
    assert max(float((lonely[name] - value).abs().max()) for name, value in one.items()) > BOUND


@pytest.mark.slow
def test_refusals_of_sharded_weights_name_the_way_out(
    found: dict[str, dict[str, torch.Tensor]],
) -> None:
    """The processes check them; see `scaling_cases.refusals`."""
    assert set(found["refused"]) == {"transposed", "grouped transposed", "cached weights"}
