"""What a file looks like for each runtime, as data."""

from __future__ import annotations

from dataclasses import dataclass

from normconv.errors import Problem, UsageError

__all__ = ["PROFILES", "Profile", "profile_of"]


@dataclass(frozen=True)
class Profile:
    """How a model is written for one runtime.

    From opset 21 on a group norm is one GroupNormalization node; before, it is Reshape,
    InstanceNormalization, Reshape, Mul and Add. The opset therefore chooses the form.

    Args:
        name: the runtime.
        opset: the operator set written when none is asked for.
        opsets: those that may be asked for; below 18 the exporter has no operators.
        provider: the provider the file is checked on; None takes the best there is.
        why: why no other opset is taken.
    """

    name: str
    opset: int
    opsets: range
    provider: str | None
    why: str = "the exporter writes no other"

    def checked_opset(self, opset: int | None) -> int:
        """Return the opset to write.

        Raises:
            UsageError: it is not among those of this runtime.

        >>> PROFILES["generic"].checked_opset(None)
        20
        """
        if opset is None:
            return self.opset
        if opset in self.opsets:
            return opset
        first, last = self.opsets[0], self.opsets[-1]
        raise UsageError(
            Problem(
                "opset",
                f"{opset} is not in {first} to {last} for {self.name}: {self.why}",
                f"use opset={min(max(opset, first), last)}",
            )
        )

    def group_norm(self, opset: int) -> str:
        """Name the form of a group norm: ``"node"`` or ``"decomposed"``."""
        return "node" if opset >= 21 else "decomposed"


_DECOMPOSED = range(18, 21)
_ALL = range(18, 22)

PROFILES = {
    profile.name: profile
    for profile in (
        Profile(
            "generic",
            20,
            _DECOMPOSED,
            None,
            "from 21 on a group norm is one node, which runtimes inline or misread",
        ),
        Profile(
            "ort-cpu",
            20,
            _DECOMPOSED,
            "cpu",
            "from 21 on a group norm is one node, twice as slow in ONNX Runtime on CPU",
        ),
        Profile("ort-cuda", 20, _ALL, "cuda"),
        Profile(
            "tensorrt",
            20,
            _DECOMPOSED,
            "tensorrt",
            "from 21 on a group norm is one node, which TensorRT gets wrong for one group",
        ),
    )
}


def profile_of(runtime: str) -> Profile:
    """Return the profile of a runtime.

    Raises:
        UsageError: there is none of that name.

    >>> profile_of("ort")
    Traceback (most recent call last):
    normconv.errors.UsageError: runtime: 'ort' is not one of generic, ort-cpu, ort-cuda, tensorrt
    """
    if runtime not in PROFILES:
        names = ", ".join(PROFILES)
        raise UsageError(Problem("runtime", f"{runtime!r} is not one of {names}"))
    return PROFILES[runtime]
