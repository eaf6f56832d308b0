"""What a program says of itself: which norms no target may take, and which must be folded."""

from __future__ import annotations

from collections import Counter
from typing import Any

from normconv.numerics import evaluating
from tests.random_networks.layers import NORMS, OPERATORS
from tests.random_networks.program import Layer, Program

__all__ = ["must_fold", "refused_norms"]


def _refused(layer: Layer) -> bool:
    """No statistics, or not an affine map."""
    return layer.kind == "odd" or layer.options.get("track_running_stats") is False


def refused_norms(program: Program) -> set[str]:
    """Paths of the norms that every target must refuse."""
    return {layer.path for _, _, layer in program.calls(aux=True) if _refused(layer)}


def must_fold(program: Program) -> dict[str, str]:
    """Norms that nothing keeps from the operator right before them, and that operator.

    Both are called once, nobody else takes what is between them, the channels are the operator's rows,
    no weight is tied or read elsewhere, and no hook would see another value.
    """
    if any(layer.kind == "functional" for layer in program.layers):
        return {}  # its graph is another model
    every = (*program.ops, *program.aux)
    times = Counter(layer.path for _, _, layer in program.calls(aux=True))
    users = Counter(index for op in every for index in op.inputs) + Counter(program.outputs)
    read = {program.layer(op.path).path for op in every if op.kind == "reads"}
    tied = {layer.path for layer in program.layers if layer.tie}
    tied |= {layer.tie for layer in program.layers}
    ranks = _ranks(program)
    makers = {index: layer for index, _, layer in program.calls()}
    found = {}
    for _, op, norm in program.calls():
        maker = makers.get(op.inputs[0])
        if maker is None or norm.kind not in NORMS or maker.kind not in OPERATORS:
            continue
        alone = times[norm.path] == times[maker.path] == users[op.inputs[0]] == 1
        rows = maker.kind != "linear" or ranks[maker.path] == 2
        free = maker.path not in read | tied and not (norm.hook or maker.hook)
        if alone and rows and free and not _refused(norm):
            found[norm.path] = maker.path
    return found


def _ranks(program: Program) -> dict[str, int]:
    """The rank of what each linear operator puts out."""
    net, ranks = program.fresh(), {}

    def note(path: str) -> Any:
        def hook(module: Any, args: Any, output: Any) -> None:
            ranks[path] = output.dim()

        return hook

    for layer in program.layers:
        net.get_submodule(layer.path).register_forward_hook(note(layer.path))
    with evaluating(net):
        net(*program.args(), **program.kwargs())
    return ranks
