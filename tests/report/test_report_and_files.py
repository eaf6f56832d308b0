"""Reports, errors and files: nothing passes by accident, nothing is left half-written."""

from __future__ import annotations

import hashlib
import json
import math
import os
import pickle
from pathlib import Path

import pytest

from normconv.errors import (
    CaptureError,
    CheckFailed,
    LoadError,
    MissingDependency,
    NormconvError,
    PlanError,
    Problem,
    Refused,
    UsageError,
)
from normconv.files import atomic_path, rejected_path, sha256_of, write_json
from normconv.report import Check, Report, SiteRow, jsonable, versions


@pytest.mark.parametrize(
    ("measured", "bound", "passed"),
    [
        (0.5, 1.0, True),
        (1.0, 1.0, True),
        (1.1, 1.0, False),
        (math.nan, 1.0, False),
        (0.5, math.nan, False),
        (math.nan, math.nan, False),
        (math.inf, 1.0, False),
    ],
)
def test_a_check_passes_only_what_is_at_most_its_bound(
    measured: float, bound: float, passed: bool
) -> None:
    check = Check.at_most("error", measured, bound)
    assert check.passed is passed
    assert ("is not <=" in check.describe()) is not passed
    report = Report("verify", checks=(Check("other", True), check))
    assert report.passed is passed
    assert len(report.failed_checks) == (not passed)


def test_a_report_is_json_whatever_is_in_it() -> None:
    report = Report(
        "convert",
        sites=(SiteRow("bn", "BatchNorm2d", "conv", "wn: fold", "exact", "why", math.nan, 1.0),),
        checks=(Check.at_most("output", math.inf, 1e-6),),
        facts={"path": Path("a"), "seen": {2, 1}, "pair": (1, None), 3: True},
    )
    document = json.loads(report.to_json())
    assert document["schema"] == "normconv.report/1"
    assert document["passed"] is False
    assert document["sites"][0]["error"] == "nan"
    assert document["checks"][0]["measured"] == "inf"
    assert document["facts"] == {"path": "a", "seen": [1, 2], "pair": [1, None], "3": True}
    assert {"python", "torch"} <= versions().keys()
    assert jsonable(-math.inf) == "-inf"


def test_extending_adds_and_replaces_rows_only_when_given() -> None:
    row = SiteRow("a", "B", "", "keep", "", "")
    report = Report("x", sites=(row,), facts={"a": 1}, notes=("n",))
    longer = report.extended(checks=(Check("c", True),), facts={"b": 2}, notes=("m",))
    assert longer.sites == (row,)
    assert longer.facts == {"a": 1, "b": 2}
    assert longer.notes == ("n", "m")
    assert report.extended(sites=()).sites == ()
    assert report.checks == ()


def test_errors_form_the_tree_with_its_exit_codes() -> None:
    for kind in (LoadError, CaptureError, PlanError, MissingDependency):
        assert issubclass(kind, Refused)
        assert kind("x").exit_code == 3
    assert UsageError("x").exit_code == 2
    assert CheckFailed(Report("x")).exit_code == 1
    assert not issubclass(UsageError, Refused)
    assert issubclass(Refused, NormconvError)


def test_errors_collect_problems_and_survive_pickle() -> None:
    problems = [Problem("a", "is wrong", "mend it"), Problem("", "is odd")]
    error = PlanError(problems)
    assert str(error) == "2 problems\n  - a: is wrong; mend it\n  - is odd"
    twin = pickle.loads(pickle.dumps(error))
    assert (type(twin), twin.problems, str(twin)) == (PlanError, error.problems, str(error))
    failed = CheckFailed(Report("x", checks=(Check.at_most("out", 2.0, 1.0),)))
    twin = pickle.loads(pickle.dumps(failed))
    assert twin.report == failed.report
    assert "out: 2 is not <= 1" in str(twin)


def test_atomic_path_writes_whole_with_companions(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "model.onnx"
    with atomic_path(target) as temporary:
        assert temporary.name == target.name
        temporary.write_text("model")
        temporary.with_name("model.onnx.data").write_text("weights")
        assert not target.exists()
    assert sorted(p.name for p in target.parent.iterdir()) == ["model.onnx", "model.onnx.data"]


def test_companions_are_there_before_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved: list[str] = []
    real = os.replace

    def replace(source: object, destination: object) -> None:
        moved.append(Path(str(destination)).name)
        real(source, destination)

    monkeypatch.setattr(os, "replace", replace)
    with atomic_path(tmp_path / "b") as temporary:
        for name in ("a", "c"):
            temporary.with_name(name).write_text(name)
        temporary.write_text("b")
    assert sorted(moved[:2]) == ["a", "c"]
    assert moved[2:] == ["b"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_exception_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, error: type[BaseException]
) -> None:
    target = tmp_path / "a.json"
    target.write_text("old")
    with pytest.raises(error), atomic_path(target) as temporary:  # noqa: PT012
        temporary.write_text("half")
        temporary.with_name("companion").write_text("half")
        raise error
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]
    assert target.read_text() == "old"


def test_json_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"a": [1, "γ"]})
    assert json.loads(path.read_text(encoding="utf-8")) == {"a": [1, "γ"]}
    assert path.read_text().endswith("}\n")
    with pytest.raises(ValueError, match="JSON"):
        write_json(path, {"a": math.nan})
    assert json.loads(path.read_text(encoding="utf-8")) == {"a": [1, "γ"]}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_hash_and_rejected_name(tmp_path: Path) -> None:
    path = tmp_path / "blob"
    content = b"x" * ((1 << 20) + 3)
    path.write_bytes(content)
    assert sha256_of(path) == hashlib.sha256(content).hexdigest()
    assert rejected_path(path) == tmp_path / "blob.rejected"
