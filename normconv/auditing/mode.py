"""One mode of a model: the runs of it, and what they show."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from normconv.auditing.batches import Batch
from normconv.auditing.comparing import Blame, Comparison
from normconv.auditing.functions import FunctionWatch
from normconv.auditing.recording import Listener, Record, Recorder, hooked
from normconv.auditing.slots import bound_of, relative_change
from normconv.auditing.twin import Twin
from normconv.errors import NormconvError
from normconv.graph import capture, couples_in_training
from normconv.graph.coupling import batch_norm_calls
from normconv.graph.running import first_line

__all__ = ["Seen", "first_run", "observe"]

#: Where a model differs from itself by more than this, it is random, and not only rounded otherwise.
_RANDOM = 1e-3


@dataclass
class Seen:
    """What the runs in one mode show.

    Args:
        record: the run before any change.
        samples: which samples were changed in turn.
        blames: of all runs, the largest of each module and kind.
        reached: modules at which a change arrived.
        opaque: modules that were judged by their outputs alone: what they call depends on the values.
        state: tensors written from the data, with the relative change that another sample makes.
        functions: what blamed modules call that couples.
        batch_norms: how many calls of `F.batch_norm` the graph holds that normalize activations with
            their own batch; None where nothing calls it or there is no graph.
        failures: why runs on changed samples could not be held against the first.
        sizes_vary: the sizes of the outputs depend on the values.
        gathered_outputs: some output has no axis of samples.
        responds: some output changes when a sample does.
    """

    record: Record
    samples: tuple[int, ...] = ()
    blames: dict[tuple[str, str], Blame] = field(default_factory=dict)
    reached: dict[str, None] = field(default_factory=dict)
    opaque: frozenset[str] = frozenset()
    state: dict[str, float] = field(default_factory=dict)
    functions: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    batch_norms: int | None = None
    failures: list[str] = field(default_factory=list)
    sizes_vary: bool = False
    gathered_outputs: bool = False
    responds: bool = False


def first_run(twin: Twin, batch: Batch, training: bool) -> tuple[Record, dict[str, Tensor]]:
    """Run the batch as it is; return what is handed over, and the tensors written to.

    Raises:
        Exception: whatever the forward raises.
    """
    recorder = Recorder(twin.devices)
    return recorder.record, _run(twin, batch, training, recorder)


def observe(
    twin: Twin, batch: Batch, training: bool, record: Record, written: Mapping[str, Tensor]
) -> Seen:
    """Change one sample after the other and hold each run against the first.

    Args:
        twin: the copy to run.
        batch: what the first run was on.
        training: the mode.
        record: of the first run.
        written: the tensors that the first run wrote to.
    """
    opaque: frozenset[str] = frozenset()
    while True:
        seen, also = _all_runs(twin, batch, training, record, written, opaque)
        if also <= opaque:
            break
        opaque |= also
    _watch_functions(twin, batch, training, seen)
    return seen


def _all_runs(
    twin: Twin,
    batch: Batch,
    training: bool,
    record: Record,
    written: Mapping[str, Tensor],
    opaque: frozenset[str],
) -> tuple[Seen, set[str]]:
    """Hold all runs against the first; return also which modules should have been opaque."""
    seen = Seen(record, _chosen(batch.samples), opaque=opaque)
    norms = frozenset(n for n, m in twin.model.named_modules() if couples_in_training(m))
    again = Comparison(record, batch.samples, None, twin.devices, opaque=opaque)
    _run(twin, batch, training, again)
    for blame in again.blames:
        if blame.size > _RANDOM:
            _keep_largest(seen.blames, Blame(blame.module, "random", blame.size))
    found = [again]
    for sample in seen.samples:

        def fresh(sample: int = sample) -> Comparison:
            return Comparison(
                record, batch.samples, sample, twin.devices, norms, again.noise, opaque
            )

        after, one = _compared(twin, batch, training, sample, fresh, seen.failures)
        if one is not None:
            found.append(one)
            _take_in(seen, one)
            for name, size in _differing(written, after):
                seen.state[name] = max(size, seen.state.get(name, 0.0))
    return seen, {name for one in found for name in (*one.opaque, *one.missing())}


def _take_in(seen: Seen, found: Comparison) -> None:
    for blame in found.blames:
        _keep_largest(seen.blames, blame)
    seen.reached |= found.reached
    seen.sizes_vary |= found.sizes_vary
    seen.gathered_outputs |= found.gathered_outputs
    seen.responds |= found.responds


def _chosen(samples: int) -> tuple[int, ...]:
    """All of a few samples; of more the first, one between and the last: a cumsum goes one way."""
    few = 4
    return tuple(range(samples)) if samples <= few else (0, samples // 2, samples - 1)


def _run(twin: Twin, batch: Batch, training: bool, listener: Listener) -> dict[str, Tensor]:
    args, kwargs = batch.fresh()
    with twin.running(training), hooked(twin.model, listener):
        twin.model(*args, **kwargs)
        return twin.written()


def _compared(
    twin: Twin,
    batch: Batch,
    training: bool,
    sample: int,
    fresh: Callable[[], Comparison],
    failures: list[str],
) -> tuple[dict[str, Tensor], Comparison | None]:
    """Run the batch with one sample changed, in the first way that the model takes."""
    reason: Exception | None = None
    for changed in batch.changed(sample):
        found = fresh()
        try:
            return _run(twin, changed, training, found), found
        except Exception as error:  # the forward is the user's; it may take another way of changing
            reason = error
    if reason is not None:
        failures.append(f"with sample {sample} changed it raises {first_line(reason)}")
    return {}, None


def _keep_largest(blames: dict[tuple[str, str], Blame], blame: Blame) -> None:
    key = (blame.module, blame.kind)
    if key not in blames or not blame.size <= blames[key].size:
        blames[key] = blame


def _differing(
    first: Mapping[str, Tensor], second: Mapping[str, Tensor]
) -> Iterator[tuple[str, float]]:
    """Tensors that hold other values after the second run than after the first, and by how much."""
    for name in dict.fromkeys([*first, *second]):
        a, b = first.get(name), second.get(name)
        if a is None or b is None or a.shape != b.shape:
            yield name, float("inf")
        elif (size := relative_change(a, b)) > bound_of(a):
            yield name, size


def _watch_functions(twin: Twin, batch: Batch, training: bool, seen: Seen) -> None:
    """Watch one more run for the functions that modules call themselves."""
    norms = {name for name, m in twin.model.named_modules() if couples_in_training(m)}
    blamed = frozenset(n for n, kind in seen.blames if kind == "couples" and n not in norms)
    watch = FunctionWatch(batch.samples, blamed)
    args, kwargs = batch.fresh()
    with twin.running(training), hooked(twin.model, watch), watch:
        twin.model(*args, **kwargs)
    seen.functions = {name: tuple(said) for name, said in watch.culprits.items()}
    if watch.batch_norms - norms:
        seen.batch_norms = _functional_norms(twin, batch, training)


def _functional_norms(twin: Twin, batch: Batch, training: bool) -> int | None:
    """Ask the graph: weight standardization calls `F.batch_norm` too, and on no activation."""
    args, kwargs = batch.fresh()
    try:
        with twin.running(training):
            graph = capture(twin.model, args, kwargs, methods=("fx", "hooks"))
        return batch_norm_calls(graph)
    except NormconvError:  # what it does was measured all the same
        return None
