"""`convert_file`: a checkpoint file from one convention to another, one tensor at a time."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

import torch

from normconv.bridges.bridging import Bridge, bridged
from normconv.bridges.conventions import recognised
from normconv.bridges.history import metadata_after
from normconv.bridges.jobs import Findings
from normconv.bridges.opening import Opened, opened
from normconv.bridges.request import Request
from normconv.bridges.state_dicts import carried_out, report_of, request_of
from normconv.bridges.streaming import SafetensorsWriter, unwritable
from normconv.bridges.tensors import INDEX, Spec, Tensors
from normconv.errors import LoadError, NormconvError, Problem, UsageError
from normconv.files import atomic_path
from normconv.report import Report
from normconv.sources.saving import SHARED

__all__ = ["ENDINGS", "convert_file"]

_PICKLED = (".pt", ".pth", ".bin", ".ckpt")
ENDINGS = (".safetensors", INDEX, *_PICKLED)


def convert_file(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    to: str = "plain",
    *,
    key: str | None = None,
    trust: Sequence[str] = (),
    **options: Any,
) -> Report:
    """Take a checkpoint file from one convention of names to another, without the model.

    A safetensors file is read and written tensor by tensor: beyond the mapped pages of the file it takes
    about the memory of the largest tensor. A file of `torch.save` is mapped too, but written from memory.
    The output appears whole or not at all.

    Args:
        source: ``.safetensors``, a file of `torch.save` with the state dict as it is or nested
            (``{"generator": {...}}``), or an index of shards (``….safetensors.index.json``,
            ``….bin.index.json``).
        out: ``.safetensors``, an index (of shards as the source has them), or ``.pt``, which keeps
            the nesting.
        to: the convention of the result.
        key: take only the weights under this dotted key.
        trust: packages whose classes a file of `torch.save` may name.
        **options: those of `convert_state_dict`.

    Raises:
        UsageError: the call is wrong, or the keys do not tell something that has to be said.
        LoadError: the file is damaged, a shard is missing, or some key does not fit; lists all such.
    """
    source, out = Path(source), Path(out)
    request = request_of(to, **options)
    _check_paths(source, out)
    with opened(source, key=key, trust=trust) as found:
        chosen = _chosen(found, request, out)
        bridges = _bridges(found, request, chosen)
        findings = {name: Findings() for name in bridges}
        if out.name.endswith(_PICKLED):
            _save(found, bridges, findings, out)
        else:
            ((name, tensors),) = found.sections.items()
            shards = found.shards if out.name.endswith(INDEX) else ()
            _stream(bridges[name], tensors, request, findings[name], out, shards)
        reports = {
            name: report_of(bridge, found.sections[name], request, findings[name])
            for name, bridge in bridges.items()
        }
    return _joined(reports, str(source), request.to)


def _check_paths(source: Path, out: Path) -> None:
    problems = []
    if not out.name.endswith(ENDINGS):
        what = f"{out.name} does not end in {' or '.join(ENDINGS)}"
        problems.append(Problem("OUT", what, "give it such a name"))
    if out.exists() and source.exists() and out.samefile(source):
        problems.append(Problem("OUT", f"{out} is the source", "name another file"))
    if problems:
        raise UsageError(problems)


def _chosen(found: Opened, request: Request, out: Path) -> list[str]:
    """The sections that are converted: all that hold something to convert."""
    sections = found.sections
    if len(sections) == 1:
        if not out.name.endswith(INDEX) or found.shards:
            return list(sections)
        raise UsageError(Problem("OUT", "the source is no index of safetensors", "name a file"))
    listed, way_out = ", ".join(sections), f"choose with --key, e.g. --key {next(iter(sections))}"
    if not out.name.endswith(_PICKLED):
        what = f"safetensors do not nest, and there are state dicts under {listed}"
        raise UsageError(Problem("OUT", what, f"{way_out}, or write a .pt"))
    if request.like or request.plan or request.layers:
        what = f"--like, --plan and --layers are about one of the state dicts {listed}"
        raise UsageError(Problem("--key", what, way_out))
    chosen, problems = [], list[Problem]()
    for name, tensors in sections.items():
        try:
            shapes = {key: spec.shape for key, spec in tensors.specs.items()}
            if recognised(shapes, request.from_)[0]:
                chosen.append(name)
        except LoadError as error:
            problems += _within(name, error)
    if problems:
        raise LoadError(problems)
    return chosen or list(sections)


def _within(section: str, error: NormconvError) -> list[Problem]:
    start = f"{section}." if section else ""
    return [Problem(start + each.where, each.what, each.way_out) for each in error.problems]


def _bridges(found: Opened, request: Request, chosen: Sequence[str]) -> dict[str, Bridge]:
    bridges: dict[str, Bridge] = {}
    problems: dict[type[NormconvError], list[Problem]] = {}
    for name in chosen:
        try:
            bridges[name] = bridged(found.sections[name], request)
        except (LoadError, UsageError) as error:
            problems.setdefault(type(error), []).extend(_within(name, error))
    if problems:
        kind = LoadError if LoadError in problems else UsageError
        raise kind([problem for each in problems.values() for problem in each])
    return bridges


def _save(
    found: Opened, bridges: Mapping[str, Bridge], findings: Mapping[str, Findings], out: Path
) -> None:
    made: dict[str, dict[str, Any]] = {}
    for name, bridge in bridges.items():
        tensors = found.sections[name]
        made[name] = {**carried_out(bridge, tensors, findings[name]), **tensors.others}
    document = made[""] if "" in made else _replaced(found.document, made, ())
    with atomic_path(out) as temporary:
        torch.save(document, temporary)


def _replaced(value: Any, made: Mapping[str, Any], path: tuple[str, ...]) -> Any:
    """Copy nested dicts with new state dicts at their places; all else is what it was."""
    here = ".".join(path)
    if here in made:
        return made[here]
    if not isinstance(value, Mapping) or not any(key.startswith(here) for key in made):
        return value
    return {key: _replaced(item, made, (*path, str(key))) for key, item in value.items()}


def _stream(
    bridge: Bridge,
    tensors: Tensors,
    request: Request,
    findings: Findings,
    out: Path,
    shards: tuple[str, ...],
) -> None:
    specs = {name: spec for job in bridge.jobs for name, spec in job.outputs.items()}
    problems = [Problem(name, "is no tensor", "write a .pt") for name in tensors.others]
    problems += [
        Problem(name, f"safetensors has no dtype {specs[name].dtype}") for name in unwritable(specs)
    ]
    if problems:
        raise LoadError(problems)
    shared = _shared(bridge) if tensors.shared else {}
    metadata = metadata_after(
        tensors.metadata,
        from_=bridge.from_,
        to=request.to,
        plan=request.plan,
        like=None if request.like is None else request.like[1],
    )
    if shared:
        metadata[SHARED] = json.dumps(shared)
    names = dict(zip(shards, _shard_names(out, shards), strict=True)) if shards else {"": out.name}
    if taken := [name for name in names.values() if name in shards and _same_folder(tensors, out)]:
        what = f"its shard {taken[0]} would replace one of the source"
        raise UsageError(Problem("OUT", what, "write to another folder"))
    homes = {
        name: names[tensors.home(job.inputs[0]) if shards else ""]
        for job in bridge.jobs
        for name in job.outputs
        if name not in shared
    }
    with atomic_path(out) as temporary:
        writers = {}
        for file in names.values():
            in_it = {name: specs[name] for name, home in homes.items() if home == file}
            writers[file] = SafetensorsWriter(temporary.with_name(file), in_it, metadata)
        for job in bridge.jobs:
            own = {name: homes[name] for name in job.outputs if name in homes}
            made = job.make(tensors.read, findings) if own else {}
            for name, home in own.items():
                writers[home].write(name, made[name])
            del made  # not beside the next
        for writer in writers.values():
            writer.close()
        if shards:
            total = sum(_size(specs[name]) for name in homes)
            before = json.loads(Path(tensors.where).read_text(encoding="utf-8")).get("metadata")
            about = {**(before or {}), "total_size": total}
            index = {"metadata": about, "weight_map": homes}
            temporary.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _same_folder(tensors: Tensors, out: Path) -> bool:
    return Path(tensors.where).resolve().parent == out.resolve().parent


def _shared(bridge: Bridge) -> dict[str, str]:
    """Names whose tensor another name has already, as the source left such names out."""
    owners: dict[object, tuple[str, ...]] = {}
    shared: dict[str, str] = {}
    for job in bridge.jobs:
        names = tuple(job.outputs)
        if job.same is not None:
            owner = owners.setdefault(job.same, names)
            shared |= {name: one for name, one in zip(names, owner, strict=True) if name != one}
    return shared


def _shard_names(out: Path, shards: tuple[str, ...]) -> list[str]:
    stem = out.name.removesuffix(INDEX)
    return [f"{stem}-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]


def _size(spec: Spec) -> int:
    return prod(spec.shape) * spec.dtype.itemsize


def _joined(reports: Mapping[str, Report], subject: str, target: str) -> Report:
    """One report of a file with several state dicts."""
    if len(reports) == 1:
        (report,) = reports.values()
        return report
    sites, notes = [], []
    for name, report in reports.items():
        notes += [f"{name}: {note}" for note in report.notes]
        sites += [
            type(row)(**{**row.__dict__, "site": f"{name}.{row.site}"}) for row in report.sites
        ]
    facts: dict[str, Any] = {name: dict(report.facts) for name, report in reports.items()}
    facts = {"state dicts": ", ".join(reports), "weights converted": len(sites), **facts}
    return Report(
        "state-dict convert", subject, target, sites=tuple(sites), facts=facts, notes=tuple(notes)
    )
