"""`convert`: plan, apply and prove in one call, on a copy or in place."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

from torch import nn

from normconv.api.proving import META, is_meta, prove_conversion, proved, to_graph, unproved
from normconv.calibration import (
    Lesson,
    Progress,
    calibrate_and_recover,
    check_asked,
    check_calibrable,
    initialise_converted,
)
from normconv.calibration.batches import DataUse, Source
from normconv.calibration.replay import Cache
from normconv.errors import Problem, UsageError
from normconv.numerics import give_back_memory
from normconv.plan import Plan, Recipe, Rule
from normconv.proof import (
    prove_converted,
    record_original_within,
)
from normconv.sources import example_inputs as inputs_for
from normconv.surgery import (
    Layers,
    Result,
    apply_plan,
    apply_plan_,
    check_plan,
    checked_inputs,
    lazy_modules,
    lazy_note,
    make_plan,
    materialise_,
    materialised,
)

__all__ = ["convert", "convert_"]


def convert(
    model: nn.Module,
    to: str | Rule | Recipe | Sequence[Rule] | Plan = "wn",
    *,
    example_inputs: tuple[Any, ...] | None = None,
    example_kwargs: Mapping[str, Any] | None = None,
    include: Iterable[str] = (),
    exclude: Iterable[str] = (),
    options: Mapping[str, Any] | None = None,
    strict: bool = True,
    drop_unreached: bool = False,
    at: str = "",
    layers: Layers | None = None,
    insert_after: str | Iterable[str] = (),
    output: Literal["module", "graph"] = "module",
    data: Source | None = None,
    init: Literal["", "data"] = "",
    held_out: Source | None = None,
    min_agreement: float | None = None,
    recover: int | Lesson = 0,
    recover_data: Source | None = None,
    data_use: DataUse = "public",
    cache: Cache = "memory",
    progress: Callable[[str], Progress] | None = None,
) -> Result:
    """Return a copy of the model with its norms rewritten, proved to compute the same.

    The result is of the same class with the same attribute names; training flags, dtype and device
    stay. The proof runs both models in eval mode on the example inputs. Lazy layers of the copy get
    their shapes from them.

    Args:
        model: any module with BatchNorm, or with ``wn`` any with layers that have weights; not changed.
        to: a target name (``wn``, ``wn+mobn``, ``plain``, ``frozen``, ``gn``, ``gn+ws``), rules, a
            `Recipe`, or a `Plan` to carry out.
        example_inputs: positional inputs; None takes the model's own config, else what its first
            layer takes, and the report says what was used.
        example_kwargs: keyword inputs.
        include: globs of sites to convert; all by default.
        exclude: globs of sites to keep.
        options: the target's options.
        strict: refuse when a norm would stay that was not excluded.
        drop_unreached: empty the slots of norms that neither eval nor train mode calls.
        at: the name of a submodule: only its norms are converted, and only it need be traceable. The
            inputs are still those of the whole model. The proof is made on what the submodule gets
            there, and on the whole model's outputs where that repeats itself.
        layers: which layers ``wn`` reparametrises, ``normed`` or ``all``, see `make_plan`.
        insert_after: with ``gn``, globs of layers that have no norm and get one.
        output: ``graph`` returns an `fx.GraphModule` rewritten by FX passes.
        data: unlabelled batches; norms of a ``gn`` target are calibrated on them, see `calibrate`.
        init: ``data`` starts an untrained result on `data` instead, see `initialise`.
        held_out: other batches, to measure how near the result is to the original.
        min_agreement: the least share of samples with the original's top-1, where there is data.
        recover: steps that the calibrated model is then taught by the original, or a whole `Lesson`.
        recover_data: batches for that; None for `data`, which should then be more than a few.
        data_use: see `calibrate`.
        cache: see `calibrate`.
        progress: makes of ``calibrate`` or ``recover`` a function as they take it.

    Raises:
        PlanError: some norm cannot be converted; names each, with the reason and the way out.
        CaptureError: no dataflow graph could be made of the model.
        CheckFailed: the proof failed, or the agreement is too low; carries the report and the rejected
            model.
        UsageError: unknown target or option, a rule that matches nothing.

    >>> import torch, normconv as nc
    >>> net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    >>> model, report = nc.convert(net, to="wn", example_inputs=(torch.randn(2, 3, 8, 8),))
    >>> report.passed, type(model[0]).__name__, type(model[1]).__name__
    (True, 'WNConv2d', 'Identity')
    """
    if output not in ("module", "graph"):
        raise UsageError(Problem("output", f"it is 'module' or 'graph', not {output!r}"))
    if at and output == "graph":
        raise UsageError(
            Problem("at", 'it goes with output="module"', "convert the submodule alone")
        )
    _check_at(to, at)
    check_asked(data, init, (held_out, min_agreement, recover or None, recover_data), data_use)
    args, kwargs, origin = _inputs_of(model, example_inputs, example_kwargs)
    notes = _lazy_notes(model)
    model = materialised(model, args, kwargs)
    base = to_graph(model, args, kwargs) if output == "graph" else model
    if isinstance(to, Plan):
        plan = to
    else:
        plan = make_plan(
            base,
            to,
            example_inputs=args,
            example_kwargs=kwargs,
            include=include,
            exclude=exclude,
            options=options,
            strict=strict,
            drop_unreached=drop_unreached,
            at=at,
            layers=layers,
            insert_after=insert_after,
        )
    if data is not None and not init:
        check_calibrable(plan)
    result = apply_plan(base, plan)
    result = result._replace(report=result.report.extended(notes=notes))
    # The sites of a graph are those of the trace: it may have norms that the model calls as functions.
    traced = base if base is not model else None
    del base
    give_back_memory(cycles=True)  # other traces, which hold the original
    result = prove_conversion(model, result, plan, args, kwargs, origin=origin, traced=traced)
    give_back_memory()
    if data is None:
        return result._replace(report=result.report.extended(facts={"data": "none"}))
    if init:
        return initialise_converted(result, data, data_use=data_use, progress=progress)
    return calibrate_and_recover(
        result,
        plan,
        data,
        reference=traced or model,
        held_out=held_out,
        min_agreement=min_agreement,
        lesson=Lesson(steps=recover) if isinstance(recover, int) else recover,
        lesson_data=recover_data,
        data_use=data_use,
        cache=cache,
        progress=progress,
    )


def convert_(
    model: nn.Module,
    to: str | Rule | Recipe | Sequence[Rule] | Plan = "wn",
    *,
    example_inputs: tuple[Any, ...] | None = None,
    example_kwargs: Mapping[str, Any] | None = None,
    include: Iterable[str] = (),
    exclude: Iterable[str] = (),
    options: Mapping[str, Any] | None = None,
    strict: bool = True,
    drop_unreached: bool = False,
    at: str = "",
    layers: Layers | None = None,
    insert_after: str | Iterable[str] = (),
    prove: bool = True,
) -> Result:
    """Rewrite the norms of the model itself, as `convert` does on a copy, without the memory of a copy.

    What refuses does so before the first write; see `apply_plan_` for memory, and for which parameters
    keep their identity. The proof records what the original puts out, in its own dtype and in float64,
    before the edit, and compares afterwards.

    Args:
        model: any module with BatchNorm; changed, and the model of the result.
        to: a target name, rules, a `Recipe`, or a `Plan` to carry out.
        example_inputs: positional inputs; None finds some as `convert` does.
        example_kwargs: keyword inputs.
        include: globs of sites to convert; all by default.
        exclude: globs of sites to keep.
        options: the target's options.
        strict: refuse when a norm would stay that was not excluded.
        drop_unreached: empty the slots of norms that neither eval nor train mode calls.
        at: the name of a submodule: only its norms are converted, and only it need be traceable. The
            inputs are still those of the whole model. The proof is made on what the submodule gets
            there, and on the whole model's outputs where that repeats itself.
        layers: which layers ``wn`` reparametrises, ``normed`` or ``all``, see `make_plan`.
        insert_after: with ``gn``, globs of layers that have no norm and get one.
        prove: compare; without it nothing is run, and the report says so.

    Raises:
        PlanError: some norm cannot be converted; the model is as it was.
        CaptureError: no dataflow graph could be made; the model is as it was.
        CheckFailed: the proof failed. The model has been changed by then and nothing brings it back:
            where that would be a loss keep a checkpoint, or use `convert`.
        UsageError: unknown target or option, a rule that matches nothing; the model is as it was.

    >>> import torch, normconv as nc
    >>> net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    >>> weight = net[0].weight
    >>> model, report = nc.convert_(net, to="plain", example_inputs=(torch.randn(2, 3, 8, 8),))
    >>> report.passed, model is net, model[0].weight is weight, type(model[1]).__name__
    (True, True, True, 'Identity')
    """
    _check_at(to, at)
    args, kwargs, origin = _inputs_of(model, example_inputs, example_kwargs)
    notes = _lazy_notes(model)
    shaped = materialised(model, args, kwargs)
    if isinstance(to, Plan):
        plan = to
    else:
        plan = make_plan(
            shaped,
            to,
            example_inputs=args,
            example_kwargs=kwargs,
            include=include,
            exclude=exclude,
            options=options,
            strict=strict,
            drop_unreached=drop_unreached,
            at=at,
            layers=layers,
            insert_after=insert_after,
        )
    check_plan(shaped, plan, in_place=True)
    if shaped is not model:
        del shaped
        materialise_(model, args, kwargs)
    give_back_memory(cycles=True)  # traces, which hold the weights
    proving = prove and not is_meta(model)
    recording = None
    if proving:
        recording = record_original_within(model, plan.at, plan.steps, args, kwargs, for_good=True)
    result = apply_plan_(model, plan)
    result = result._replace(report=result.report.extended(notes=notes))
    facts = {"example inputs": origin, "result class": type(model).__name__}
    if recording is None:
        return unproved(result, facts, META if prove else "nothing was proved: prove=False")
    return proved(result, prove_converted(recording, model), facts)


def _check_at(to: object, at: str) -> None:
    if isinstance(to, Plan) and at not in ("", to.at):
        what = f"the plan is for {to.at!r}" if to.at else "the plan is for the whole model"
        raise UsageError(Problem(f"at={at!r}", what, "leave at= out"))


def _inputs_of(
    model: nn.Module, args: tuple[Any, ...] | None, kwargs: Mapping[str, Any] | None
) -> tuple[tuple[Any, ...], dict[str, Any], str]:
    """Return positional and keyword inputs, and where they come from."""
    origin = "given"
    if args is None and kwargs is None and isinstance(model, nn.Module):
        found = inputs_for(model)
        args, kwargs, origin = found.args, found.kwargs, found.origin
    return (*checked_inputs(model, args, kwargs), origin)


def _lazy_notes(model: nn.Module) -> tuple[str, ...]:
    lazy = len(lazy_modules(model))
    return (lazy_note(lazy),) if lazy else ()
