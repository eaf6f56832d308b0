"""One architecture of every model file of three libraries, as `benchmarks.zoo` measures it."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.zoo_judge import CEILING

pytestmark = pytest.mark.zoo

ROOT = Path(__file__).parents[1]
LISTING = ROOT / "docs" / "results" / "zoo-listing.json"
# Seconds in which architectures are started, smallest first; together under 12 minutes on 2 cores.
BUDGETS = {"timm": 270, "torchvision": 90, "transformers": 180}
KNOWN_REFUSALS = {"transformers:slanet": "does not run in float64"}


def _representatives() -> list[tuple[str, str]]:
    document = json.loads(LISTING.read_text())
    found = []
    for library in BUDGETS:
        families: dict[str, str] = {}
        for name, family, _, _ in document[library]["with"]:
            families.setdefault(family, name)
        found += [(library, name) for name in families.values()]
    return found


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("zoo")
    shutil.copy(LISTING, folder / "listing.json")
    done: dict[str, dict[str, Any]] = {}

    def of(library: str) -> dict[str, Any]:
        if library not in done:
            out = folder / f"{library}.json"
            words = ["--library", library, "--sample", "999", "--workers", "2"]
            words += ["--budget", str(BUDGETS[library]), "--seconds", "100", "--out", str(out)]
            words += ["--listing", str(folder / "listing.json")]
            env = os.environ | {"OMP_NUM_THREADS": "1"}
            command = [sys.executable, "-W", "ignore", "-m", "benchmarks.zoo", *words]
            subprocess.run(command, cwd=ROOT, env=env, check=True, stdout=subprocess.DEVNULL)
            done[library] = json.loads(out.read_text())["architectures"]
        return done[library]

    return of


@pytest.mark.parametrize(("library", "name"), _representatives())
def test_one_of_every_model_file_is_converted_or_refused_for_a_known_reason(
    library: str, name: str, measured: Any
) -> None:
    if importlib.util.find_spec(library) is None:
        pytest.skip(f"{library} is not installed")
    records = measured(library)
    if name not in records:
        pytest.skip("no time was left for it, or this version of the library has another one")
    record = records[name]
    if record["status"] in ("timeout", "memory"):
        pytest.skip(record["reason"])
    if known := KNOWN_REFUSALS.get(f"{library}:{name}"):
        assert record["status"] == "refused"
        assert known in json.dumps(record)
        return
    assert record["status"] == "converted", record
    for target in record["targets"].values():
        said = target["float64"]
        # The bound is 1e-10 but for a network that ends in float32, or one that one ulp moves.
        assert said["error"] <= said["bound"] <= CEILING
        assert said["left"] == 0
