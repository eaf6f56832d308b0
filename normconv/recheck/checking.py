"""`verify_certificate`: seals, files, weights by name, structure, and answers on golden data."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import onnx
from google.protobuf.message import DecodeError

from normconv.deploy.fingerprints import (
    differing,
    file_record,
    initializers_of,
    onnx_files,
    onnx_structure,
)
from normconv.deploy.golden import Golden, read_golden
from normconv.deploy.session import Session
from normconv.errors import LoadError, Problem, Refused, UsageError
from normconv.recheck.answering import answers
from normconv.report import Check, Report, versions
from normconv.report.certificate import broken_seals, read_certificate

__all__ = ["verify_certificate"]

_SHOWN = 8  # changed weights that are named
_UNCHANGED = ("onnxruntime", "onnxruntime-gpu", "onnxruntime-directml")
_NEW_FILE = "copy the certified file again, or certify the new one with normconv export"


def verify_certificate(
    certificate: str | os.PathLike[str],
    *,
    golden: str | os.PathLike[str] | None = None,
    provider: str | None = None,
) -> Report:
    """Check a certified file again, without torch and without the original model.

    The certificate's seals; the files beside it by size and SHA-256; every weight of an ``.onnx`` file
    by name; its norm nodes, BatchNormalization nodes and weight arithmetic, counted anew; and, where the
    golden data are there, its outputs in ONNX Runtime against the original's float64 outputs,
    ‖y − y₆₄‖₂ / ‖y₆₄‖₂ ≤ the certified bound. A file that is not the certified one is not run.

    Args:
        certificate: the ``NAME.certificate.json``; the files it speaks of are looked for beside it.
        golden: the golden data; None looks for those that the certificate names, beside it.
        provider: what to run on: ``"cpu"``, ``"cuda"`` or ``"tensorrt"``, also written ``"ort-cuda"``;
            None takes the CPU.

    Returns:
        The report. What is not as certified is a failed check.

    Raises:
        UsageError: there is no such certificate or golden file, or nothing to run for `provider`.
        LoadError: it is no certificate.
        Refused: the provider is absent.
        MissingDependency: golden data are there and no ONNX Runtime is.
    """
    path = Path(certificate)
    document = read_certificate(path)
    if provider is not None and document["golden"] is None:
        what = f"{path.name} has no golden data: nothing can be run on {provider}"
        raise UsageError(Problem("provider", what, "export with golden='g.npz' (--golden g.npz)"))
    if golden is not None and not Path(golden).is_file():
        raise UsageError(Problem(str(golden), "there is no such file"))
    artefact = document["artefact"]
    model = path.with_name(artefact["files"][0]["name"])
    report = Report("verify", subject=f"{model.name} against {path.name}")
    report = report.extended(checks=(*_seal_checks(document), *_stated(document)))
    file_checks = [_file(path.with_name(file["name"]), file) for file in artefact["files"]]
    report = report.extended(checks=tuple(file_checks))
    if artefact["form"] == "onnx" and model.is_file():
        report = report.extended(checks=tuple(_contents(model, document)))
    elif artefact["form"] != "onnx":
        note = f"{model.name} is read by torch: its weights and outputs are not checked here"
        report = report.extended(notes=(note,))
    report = report.extended(facts=_facts(document), notes=tuple(_version_notes(document)))
    return _with_answers(report, path, document, model, golden, provider)


def _seal_checks(document: Mapping[str, Any]) -> list[Check]:
    way_out = "ask for the certificate as it was written"
    broken = broken_seals(document)
    if not broken:
        return [Check("seals", True, detail=f"{len(document['seals']['sections'])} sections")]
    return [Check(f"seal of {p.where}", False, detail=p.what, way_out=way_out) for p in broken]


def _stated(document: Mapping[str, Any]) -> Iterator[Check]:
    """Hold the certificate's own numbers against its own bounds."""
    failed = [check["name"] for check in document["checks"] if not check["passed"]]
    missed = [
        row.get("what") or row.get("site")
        for row in (*document["errors"], *document["sites"])
        if row["error"] is not None and row["bound"] is not None and not _within(row)
    ]
    wrong = [str(name) for name in (*failed, *missed)]
    count = len(document["errors"]) + len(document["sites"])
    detail = f"beyond their bounds: {', '.join(wrong[:_SHOWN])}" if wrong else f"{count} numbers"
    yield Check("certified numbers are within their bounds", not wrong, detail=detail)


def _within(row: Mapping[str, Any]) -> bool:
    # "nan" and "inf" stand as words in the document.
    return float(row["error"]) <= float(row["bound"])


def _file(path: Path, certified: Mapping[str, Any]) -> Check:
    name = f"file {path.name}"
    if not path.is_file():
        way_out = "put the certified files beside the certificate"
        return Check(name, False, detail="it is missing", way_out=way_out)
    found = file_record(path)
    if found["bytes"] != certified["bytes"]:
        detail = f"it has {found['bytes']} bytes, certified were {certified['bytes']}"
        return Check(name, False, detail=detail, way_out=_NEW_FILE)
    same = found["sha256"] == certified["sha256"]
    detail = f"SHA-256 {found['sha256'][:16]}…"
    if not same:
        detail += f", certified was {certified['sha256'][:16]}…"
    return Check(name, same, detail=detail, way_out="" if same else _NEW_FILE)


def _contents(model: Path, document: Mapping[str, Any]) -> Iterator[Check]:
    """Read an ONNX file and hold its weights and its structure against the certificate."""
    try:
        files = {file.name for file in onnx_files(model)}
        certified_files = {file["name"] for file in document["artefact"]["files"]}
        if strangers := files - certified_files:
            names = ", ".join(sorted(strangers))
            detail = f"it looks for its weights in files that were not certified: {names}"
            yield Check(f"file {model.name} external data", False, detail=detail)
            return
        structure = onnx_structure(model)
        weights = initializers_of(model)
    except (DecodeError, onnx.checker.ValidationError, OSError, ValueError, KeyError) as error:
        line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        yield Check(f"file {model.name} is ONNX", False, detail=f"it cannot be read: {line}")
        return
    yield from _weight_checks(document["artefact"]["tensors"], weights)
    yield from _structure_checks(document["structure"], structure)


def _weight_checks(certified: Mapping[str, Any], found: Mapping[str, Any]) -> Iterator[Check]:
    wrong = differing(certified, found)
    if not wrong:
        yield Check("weights", True, detail=f"all {len(found)} initializers are the certified ones")
        return
    for name, what in list(wrong.items())[:_SHOWN]:
        yield Check(f"weight {name}", False, detail=what, way_out=_NEW_FILE)
    if len(wrong) > _SHOWN:
        yield Check("weights", False, detail=f"{len(wrong) - _SHOWN} more are not as certified")


def _structure_checks(certified: Mapping[str, Any], found: Mapping[str, Any]) -> Iterator[Check]:
    for key in ("batch_norm_nodes", "norm_nodes", "weight_arithmetic"):
        detail = f"{found[key]}, certified were {certified[key]}"
        yield Check(key.replace("_", " "), found[key] == certified[key], detail=detail)
    was, now = certified.get("node_counts", {}), found["node_counts"]
    other = sorted(op for op in {*was, *now} if was.get(op, 0) != now.get(op, 0))
    changed = ", ".join(f"{now.get(op, 0)} {op}, certified were {was.get(op, 0)}" for op in other)
    yield Check("node counts", not other, detail=changed or f"{sum(now.values())} nodes")


def _facts(document: Mapping[str, Any]) -> dict[str, Any]:
    structure = document["structure"]
    return {
        "certificate seal": document["seals"]["sha256"],
        "source": document["source"]["given"],
        "norm_nodes": structure["norm_nodes"],
        "weight_arithmetic": structure["weight_arithmetic"],
        "certified with": document["versions"],
    }


def _version_notes(document: Mapping[str, Any]) -> Iterator[str]:
    here, there = versions(), document["versions"]
    for name in _UNCHANGED:
        if name in here and name in there and here[name] != there[name]:
            yield f"certified with {name} {there[name]}, here is {here[name]}"


def _with_answers(
    report: Report,
    path: Path,
    document: Mapping[str, Any],
    model: Path,
    golden: str | os.PathLike[str] | None,
    provider: str | None,
) -> Report:
    """Run the certified file on its golden data."""
    certified = document["golden"]
    if document["artefact"]["form"] != "onnx":
        return report
    if certified is None:
        if golden is not None:
            detail = "the certificate names no golden data: these prove nothing"
            return report.extended(
                checks=(Check(f"file {Path(golden).name}", False, detail=detail),)
            )
        note = "outputs were not checked: the file was exported without golden data"
        return report.extended(notes=(note,))
    place = path.with_name(certified["file"]["name"]) if golden is None else Path(golden)
    check = _file(place, certified["file"])
    if not place.is_file():
        check = Check(check.name, False, detail=check.detail, way_out="name it: --golden g.npz")
    report = report.extended(checks=(check,))
    if not report.passed:
        note = "the file was not run: it, its golden data or its certificate are not the certified ones"
        return report.extended(notes=(note,))
    try:
        data = read_golden(place)
    except LoadError as error:
        return report.extended(checks=(Check(check.name, False, detail=str(error)),))
    return _answered(report, model, data, provider)


def _answered(report: Report, model: Path, golden: Golden, provider: str | None) -> Report:
    name = "cpu" if provider is None else provider.removeprefix("ort-")
    session = Session(model, name)
    try:
        checks, rows = answers(session, golden)
    except Refused as refusal:
        return report.extended(checks=(Check(f"{name} run", False, detail=str(refusal)),))
    ran = {"nodes_by_provider": session.nodes_per_provider(), "outputs": rows}
    return report.extended(checks=tuple(checks), facts={f"{session.provider} run": ran})
