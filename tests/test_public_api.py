"""The public names are a promise: what is in, that it resolves, and that it says what it is."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import normconv

VERBS = {
    "apply_plan",
    "apply_plan_",
    "audit",
    "bench",
    "calibrate",
    "convert",
    "convert_",
    "export_onnx",
    "fold",
    "freeze_norms",
    "initialise",
    "initialise_",
    "load",
    "load_folded",
    "make_plan",
    "recover",
    "refactor",
    "save",
    "verify",
    "verify_certificate",
    "wrap",
}
DATA = {"Check", "Plan", "Recipe", "Report", "Result", "Rule", "Step"}
ERRORS = {
    "CaptureError",
    "CheckFailed",
    "LoadError",
    "MissingDependency",
    "NormconvError",
    "PlanError",
    "Problem",
    "Refused",
    "UsageError",
}
PUBLIC = VERBS | DATA | ERRORS | {"__version__"}


def test_all_is_exactly_what_is_promised() -> None:
    assert len(normconv.__all__) == len(set(normconv.__all__))
    assert set(normconv.__all__) == PUBLIC


def test_dir_lists_all() -> None:
    assert dir(normconv) == sorted(normconv.__all__)


@pytest.mark.parametrize("name", sorted(PUBLIC - {"__version__"}))
def test_every_name_resolves_and_is_documented(name: str) -> None:
    value = getattr(normconv, name)
    assert value is getattr(normconv, name)
    assert value.__name__ == name
    assert value.__module__.startswith("normconv.")
    doc = inspect.getdoc(value)
    assert doc
    first = doc.splitlines()[0]
    assert first.endswith((".", ":")), first
    if name in VERBS:
        assert inspect.isfunction(value)
        parameters = inspect.signature(value).parameters.values()
        assert all(p.annotation is not inspect.Parameter.empty for p in parameters)
        assert not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters), (
            "a typo must not pass"
        )
        assert inspect.signature(value).return_annotation is not inspect.Signature.empty


@pytest.mark.parametrize("name", sorted(ERRORS - {"NormconvError", "Problem"}))
def test_errors_have_one_root(name: str) -> None:
    assert issubclass(getattr(normconv, name), normconv.NormconvError)


def test_unknown_names_are_attribute_errors() -> None:
    with pytest.raises(AttributeError, match="no attribute 'convrt'"):
        normconv.convrt  # noqa: B018
    assert not hasattr(normconv, "torch")


def test_star_import_gives_all() -> None:
    code = "from normconv import *\nassert callable(make_plan) and callable(fold)"
    subprocess.run(
        [sys.executable, "-c", code], check=True, cwd=Path(normconv.__file__).parent.parent
    )


def test_typing_sees_what_runs() -> None:
    """The names under TYPE_CHECKING and the table of lazy names are the same, from the same rooms."""
    import ast

    tree = ast.parse(Path(normconv.__file__).read_text(encoding="utf-8"))
    block = next(
        n for n in tree.body if isinstance(n, ast.If) and "TYPE_CHECKING" in ast.unparse(n.test)
    )
    typed = {
        a.asname: n.module for n in block.body if isinstance(n, ast.ImportFrom) for a in n.names
    }
    assert typed == normconv._PUBLIC


@pytest.mark.parametrize("name", ["PlanError", "Report", "Plan"])
def test_light_names_stay_light(name: str) -> None:
    assert normconv._PUBLIC[name] in ("normconv.errors", "normconv.report", "normconv.plan")


def test_typed_marker_is_shipped() -> None:
    assert (Path(normconv.__file__).parent / "py.typed").is_file()
