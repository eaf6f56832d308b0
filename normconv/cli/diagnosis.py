"""What `normconv doctor` finds: every runtime tried for real, with a tiny model."""

from __future__ import annotations

import functools
import platform
import re
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

from normconv.errors import CheckFailed, NormconvError
from normconv.report import Check, Report

__all__ = ["Finding", "diagnose", "extras", "shared_runtime"]

WORKS, ABSENT, BROKEN = "works", "absent", "broken"

_RUNTIME = "onnxruntime"
_NEEDS = {
    "cuda": "it needs a GPU, its driver and CUDA's libraries; those of torch's CUDA wheels serve",
    "tensorrt": "it needs what cuda needs, and NVIDIA's libraries: pip install tensorrt",
}
_NO_EXTRA = frozenset({"test", "docs"})  # they are for working on normconv itself
_REQUIREMENT = re.compile(
    r"(?P<name>[\w.-]+)(?:\[[^]]*\])?\s*(?:>=(?P<least>[\w.]+))?[^;]*"
    r"(?:;.*extra\s*==\s*['\"](?P<extra>[\w-]+)['\"].*)?$"
)


@dataclass(frozen=True)
class Finding:
    """One part of the machine.

    Args:
        part: what it is.
        state: ``works``, ``absent`` or ``broken``.
        version: of the package that brings it.
        detail: what was seen.
        way_out: how to get or mend it.
        needed: the main job cannot run without it.
    """

    part: str
    state: str
    version: str = ""
    detail: str = ""
    way_out: str = ""
    needed: bool = False


def diagnose() -> Report:
    """Try every runtime and the main job; say what works, what is missing and what brings it.

    The main job is to convert a tiny network, to export it and to compare the file with it in ONNX
    Runtime. Its check is the verdict; the others say why it may fail.
    """
    findings = [
        _tried("torch on the CPU", "torch", _torch_cpu, needed=True),
        _tried("torch on CUDA", "torch", _torch_cuda),
        _tried("torch.compile", "torch", _compile),
        _tried("onnx", "onnx", _onnx, needed=True),
        _tried("onnxscript", "onnxscript", lambda: _imported("onnxscript"), needed=True),
        *_runtimes(),
        _tried("the main job", "normconv", _main_job, needed=True),
    ]
    checks = tuple(
        Check(each.part, each.state == WORKS, detail=each.detail, way_out=each.way_out)
        for each in findings
        if each.needed
    )
    optional = extras()
    notes = () if optional else ("normconv is not installed by pip: its extras are not known",)
    facts: dict[str, Any] = {
        "system": f"{platform.system()} {platform.machine()}",
        "runtimes": [asdict(each) for each in findings],
        "extras": [asdict(each) for each in optional],
    }
    return Report("doctor", checks=checks, facts=facts, notes=notes)


# --- trying -------------------------------------------------------------------------------------


class _Absent(Exception):
    """It is not there: what was seen, and the way out."""

    def __init__(self, detail: str, way_out: str = "") -> None:
        super().__init__(detail)
        self.way_out = way_out


class _Broken(_Absent):
    """It is there and does not work."""


def _tried(part: str, package: str, attempt: Callable[[], str], *, needed: bool = False) -> Finding:
    """Make a finding of an attempt, which returns what it saw; it may fail in any way."""
    version = _version(package)
    try:
        return Finding(part, WORKS, version, attempt(), needed=needed)
    except _Absent as error:
        state = BROKEN if isinstance(error, _Broken) else ABSENT
        return Finding(part, state, version, str(error), error.way_out, needed)
    except ModuleNotFoundError as error:
        missing = error.name or package
        detail = f"{missing} is not installed"
        return Finding(part, ABSENT, version, detail, f"pip install {missing}", needed)
    except NormconvError as error:
        problem = error.problems[0]
        return Finding(part, BROKEN, version, str(problem), problem.way_out, needed)
    except Exception as error:
        # A library that is broken fails in a way of its own; all are findings.
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        detail = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
        return Finding(part, BROKEN, version, detail, "install it anew", needed)


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def _imported(name: str) -> str:
    import_module(name)
    return ""


def _torch_cpu() -> str:
    import torch

    _convolve(torch.device("cpu"))
    return f"{torch.get_num_threads()} threads"


def _torch_cuda() -> str:
    import torch

    if torch.version.cuda is None:
        raise _Absent("this torch is built without CUDA", "https://pytorch.org/get-started/locally")
    if not torch.cuda.is_available():
        raise _Absent(f"built for CUDA {torch.version.cuda}, and no usable GPU or driver is found")
    _convolve(torch.device("cuda"))
    return f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}"


def _convolve(device: Any) -> None:
    import torch

    ones = torch.ones(1, 1, 3, 3, device=device)
    found = float(torch.nn.functional.conv2d(ones, ones))
    if found != 9.0:
        raise _Broken(f"a convolution gives {found} for 9")


def _compile() -> str:
    from normconv.deploy.contenders import compiler_problem

    if problem := compiler_problem():
        raise _Broken(problem, "install a C++ compiler such as g++, and Python's headers")
    return ""


def _onnx() -> str:
    import onnx

    from normconv.deploy.probing import tiny_model

    onnx.checker.check_model(tiny_model())
    return ""


def _runtimes() -> list[Finding]:
    """Look at ONNX Runtime: which distributions brought it, and every provider it lists."""
    owners = sorted(set(metadata.packages_distributions().get(_RUNTIME, ())))
    finding = _tried("ONNX Runtime", owners[0] if owners else _RUNTIME, _runtime, needed=True)
    found = [finding]
    if len(owners) > 1:
        versions = {name: _version(name) for name in owners}
        found.append(shared_runtime(versions, gpu="onnxruntime-gpu" in owners))
    if finding.state != WORKS:
        return found
    from normconv.deploy.session import PROVIDERS, onnxruntime_module

    short = {name: word for word, name in PROVIDERS.items()}
    for name in onnxruntime_module().get_available_providers():
        provider = short.get(name, name)
        part = f"ONNX Runtime on {provider}"
        attempt = functools.partial(_provider, provider)
        found.append(_tried(part, owners[0], attempt, needed=provider == "cpu"))
    if "CUDAExecutionProvider" not in onnxruntime_module().get_available_providers():
        detail = "this distribution has no CUDA provider"
        way_out = f"pip uninstall {' '.join(owners)}; pip install 'normconv[gpu]'"
        found.append(Finding("ONNX Runtime on cuda", ABSENT, "", detail, way_out))
    return found


def _runtime() -> str:
    from normconv.deploy.session import onnxruntime_module

    module = onnxruntime_module()
    return f"version {module.__version__}"


def _provider(provider: str) -> str:
    from normconv.deploy.probing import provider_problem

    if problem := provider_problem(provider):
        raise _Absent(problem, _NEEDS.get(provider, ""))
    return ""


def shared_runtime(versions: Mapping[str, str], *, gpu: bool) -> Finding:
    """Say that several distributions wrote into one folder, and how to mend that.

    >>> found = shared_runtime({"onnxruntime": "1.23.0", "onnxruntime-gpu": "1.24.0"}, gpu=True)
    >>> found.way_out
    "pip uninstall -y onnxruntime onnxruntime-gpu && pip install 'normconv[gpu]'"
    """
    names = " and ".join(f"{name} {version}" for name, version in versions.items())
    detail = (
        f"{names} share the folder {_RUNTIME}: the one installed last has overwritten the other"
    )
    extra = "gpu" if gpu else "cpu"
    way_out = f"pip uninstall -y {' '.join(versions)} && pip install 'normconv[{extra}]'"
    return Finding("ONNX Runtime's distributions", BROKEN, "", detail, way_out)


def _main_job() -> str:
    import torch
    from torch import nn

    from normconv.api import convert
    from normconv.deploy import export_onnx

    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).eval()
    x = torch.linspace(-1.0, 1.0, 2 * 3 * 5 * 5).reshape(2, 3, 5, 5)
    try:
        made, _ = convert(net, "wn", example_inputs=(x,))
        with tempfile.TemporaryDirectory() as folder:
            report = export_onnx(made, Path(folder) / "tiny.onnx", example_inputs=(x,))
    except CheckFailed as error:
        raise _Broken(str(error.problems[0])) from error
    return f"converted, exported and compared: {len(report.checks)} checks of the file"


# --- extras -------------------------------------------------------------------------------------


def extras(requirements: Sequence[str] | None = None) -> list[Finding]:
    """Say of each extra which of its packages are missing or too old, as its own metadata asks for.

    An extra for a runtime is left out: `diagnose` tries those.

    Args:
        requirements: as a distribution's metadata lists them; None reads normconv's.

    >>> (found,) = extras(["no-such-package>=1.0; extra == 'mine'"])
    >>> found.part, found.state, found.way_out
    ('mine', 'absent', "pip install 'normconv[mine]'")
    """
    if requirements is None:
        try:
            requirements = metadata.requires("normconv") or ()
        except metadata.PackageNotFoundError:
            return []
    by_extra: dict[str, list[tuple[str, str]]] = {}
    for line in requirements:
        match = _REQUIREMENT.match(line)
        if match is None or match["extra"] is None or match["extra"] in _NO_EXTRA:
            continue
        if not match["name"].startswith((_RUNTIME, "normconv")):
            by_extra.setdefault(match["extra"], []).append((match["name"], match["least"] or ""))
    return [_extra(name, packages) for name, packages in by_extra.items()]


def _extra(name: str, packages: Iterable[tuple[str, str]]) -> Finding:
    have, lack, old = [], [], []
    for package, least in packages:
        version = _version(package)
        if not version:
            lack.append(package)
        elif _numbers(version) < _numbers(least):
            old.append(f"{package} {version}, {least} or later is needed")
        else:
            have.append(f"{package} {version}")
    if not lack and not old:
        return Finding(name, WORKS, "", ", ".join(have))
    missing = [f"{', '.join(lack)} not installed"] if lack else []
    state = ABSENT if lack else BROKEN
    return Finding(name, state, "", "; ".join(missing + old), f"pip install 'normconv[{name}]'")


def _numbers(version: str) -> tuple[int, ...]:
    """The numbers a version begins with.

    >>> _numbers("2.15.0+cu126") > _numbers("2.9"), _numbers("")
    (True, ())
    """
    return tuple(int(part) for part in re.match(r"[\d.]*", version)[0].split(".") if part)  # type: ignore[index]
