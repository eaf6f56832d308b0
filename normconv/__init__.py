"""normconv: take BatchNorm out of a PyTorch model, keep what it computes, prove it, deploy it.

The names below are resolved when they are first used: `import normconv` loads no torch.

>>> import normconv as nc
>>> sorted(nc.__all__)[:3]
['CaptureError', 'Check', 'CheckFailed']
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# One table: a public name and the module that defines it.
_PUBLIC = {
    "apply_plan": "normconv.surgery",
    "apply_plan_": "normconv.surgery",
    "audit": "normconv.auditing",
    "bench": "normconv.deploy",
    "calibrate": "normconv.calibration",
    "convert": "normconv.api",
    "convert_": "normconv.api",
    "export_onnx": "normconv.deploy",
    "fold": "normconv.folding",
    "freeze_norms": "normconv.api",
    "initialise": "normconv.calibration",
    "initialise_": "normconv.calibration",
    "load": "normconv.sources",
    "load_folded": "normconv.sources",
    "make_plan": "normconv.surgery",
    "recover": "normconv.calibration",
    "refactor": "normconv.api",
    "save": "normconv.sources",
    "verify": "normconv.deploy",
    "verify_certificate": "normconv.recheck",
    "wrap": "normconv.api",
    "Check": "normconv.report",
    "Plan": "normconv.plan",
    "Recipe": "normconv.plan",
    "Report": "normconv.report",
    "Result": "normconv.surgery",
    "Rule": "normconv.plan",
    "Step": "normconv.plan",
    "CaptureError": "normconv.errors",
    "CheckFailed": "normconv.errors",
    "LoadError": "normconv.errors",
    "MissingDependency": "normconv.errors",
    "NormconvError": "normconv.errors",
    "PlanError": "normconv.errors",
    "Problem": "normconv.errors",
    "Refused": "normconv.errors",
    "UsageError": "normconv.errors",
}

__all__ = [*_PUBLIC, "__version__"]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        value = getattr(import_module(_PUBLIC[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'normconv' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)


if TYPE_CHECKING:
    from normconv.api import convert as convert
    from normconv.api import convert_ as convert_
    from normconv.api import freeze_norms as freeze_norms
    from normconv.api import refactor as refactor
    from normconv.api import wrap as wrap
    from normconv.auditing import audit as audit
    from normconv.calibration import calibrate as calibrate
    from normconv.calibration import initialise as initialise
    from normconv.calibration import initialise_ as initialise_
    from normconv.calibration import recover as recover
    from normconv.deploy import bench as bench
    from normconv.deploy import export_onnx as export_onnx
    from normconv.deploy import verify as verify
    from normconv.errors import CaptureError as CaptureError
    from normconv.errors import CheckFailed as CheckFailed
    from normconv.errors import LoadError as LoadError
    from normconv.errors import MissingDependency as MissingDependency
    from normconv.errors import NormconvError as NormconvError
    from normconv.errors import PlanError as PlanError
    from normconv.errors import Problem as Problem
    from normconv.errors import Refused as Refused
    from normconv.errors import UsageError as UsageError
    from normconv.folding import fold as fold
    from normconv.plan import Plan as Plan
    from normconv.plan import Recipe as Recipe
    from normconv.plan import Rule as Rule
    from normconv.plan import Step as Step
    from normconv.recheck import verify_certificate as verify_certificate
    from normconv.report import Check as Check
    from normconv.report import Report as Report
    from normconv.sources import load as load
    from normconv.sources import load_folded as load_folded
    from normconv.sources import save as save
    from normconv.surgery import Result as Result
    from normconv.surgery import apply_plan as apply_plan
    from normconv.surgery import apply_plan_ as apply_plan_
    from normconv.surgery import make_plan as make_plan
