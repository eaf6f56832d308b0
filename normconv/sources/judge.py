"""Hold a scanned file to the list: which names it uses, and what it does with them."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from normconv.errors import Problem
from normconv.sources.allow import REBUILD_LAYER, Entry, Kind, Refusal, resolve
from normconv.sources.arguments import arguments_fit, numpy_state_fits, target_path, values_of, walk
from normconv.sources.pickle_scan import (
    Atom,
    Build,
    Call,
    Container,
    Global,
    Node,
    Persistent,
    Scan,
)
from normconv.sources.trust import Trust

__all__ = ["Verdict", "judge"]

_CREATES = ("NEWOBJ",)
_HOOK_KEY = re.compile(r"_(pre_)?hooks$")


@dataclass
class Verdict:
    """What the file may use, and what is wrong with it.

    Attributes:
        entries: every name of the file that is on the list.
        problems: everything that is refused.
    """

    entries: dict[Global, Entry] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

    def globals_for_torch(self, trust: Trust) -> list[Any]:
        """Return the list for `torch.serialization.safe_globals`; imports the trusted names."""
        return [
            (trust.resolve(*_parts(name)) if entry.kind is Kind.TRUSTED else entry.value, name.path)
            for name, entry in self.entries.items()
        ]


def _parts(name: Global) -> tuple[str, str]:
    return name.module, name.name


def judge(scan: Scan, where: str, trust: Trust) -> Verdict:
    """Decide on every name, call and state of a scanned pickle.

    Args:
        scan: what the pickle would do.
        where: the file, for the problems.
        trust: what the user vouches for.
    """
    return _Judge(scan, where, trust).run()


class _Judge:
    def __init__(self, scan: Scan, where: str, trust: Trust) -> None:
        self.scan = scan
        self.where = where
        self.trust = trust
        self.verdict = Verdict()
        self.said: set[str] = set()

    def run(self) -> Verdict:
        for name in self.scan.globals:
            found = resolve(name, self.trust)
            if isinstance(found, Entry):
                self.verdict.entries[name] = found
            else:
                self.refuse_name(name, found)
        for oddity in self.scan.oddities:
            self.say(oddity, "no option takes such a file")
        for call in self.scan.calls:
            if reason := self.call_reason(call):
                self.say(reason, "no option takes it; pass --model and the weights as a state dict")
        for build in self.scan.builds:
            if reason := self.build_reason(build):
                self.say(reason, "no option takes it; pass --model and the weights as a state dict")
        for reference in self.scan.persistent:
            if reason := self.persistent_reason(reference):
                self.say(reason, "no option takes such a file")
        return self.verdict

    def say(self, what: str, way_out: str) -> None:
        if what not in self.said:
            self.said.add(what)
            self.verdict.problems.append(Problem(self.where, what, way_out))

    def refuse_name(self, name: Global, refusal: Refusal) -> None:
        self.say(f"names {name.path}, {refusal.why}", refusal.way_out)

    def entry(self, node: Node) -> Entry | None:
        return self.verdict.entries.get(node) if isinstance(node, Global) else None

    def kind(self, node: Node) -> Kind | None:
        found = self.entry(node)
        return found.kind if found else None

    # Calls

    def call_reason(self, call: Call) -> str:
        target = call.target
        if not isinstance(target, Global):
            return "calls something that it made itself"
        kind = self.kind(target)
        if kind is None or kind is Kind.TRUSTED:
            return ""  # refused by name already, or trusted
        args = call.args.items if isinstance(call.args, Container) else None
        # A list or dict of arguments could grow after the call and hide what it was called with.
        if args is None or _kind_of(call.args) != "tuple" or call.keywords is not None:
            return f"calls {target.path} in an unusual way"
        if call.op in _CREATES and kind in (Kind.MODULE, Kind.PLAIN, Kind.HOOK):
            return "" if not args else f"creates {target.path} with arguments"
        if call.op != "REDUCE":
            return f"creates {target.path} in an unusual way ({call.op})"
        if kind is Kind.ENUM:
            return "" if len(args) == 1 and self.is_data(args[0]) else _odd_arguments(target)
        if kind is Kind.CALL:
            return "" if arguments_fit(self, target.path, args) else _odd_arguments(target)
        return f"calls {target.path} with arguments, where it may only be created and given state"

    def is_data(self, node: Node) -> bool:
        """Say whether a node holds data only: no class, no function, no object."""
        for part in walk(node):
            if isinstance(part, Global) and self.kind(part) not in (Kind.VALUE, Kind.TRUSTED):
                return False
            if isinstance(part, Call) and (
                self.kind(part.target) not in (Kind.CALL, Kind.ENUM, Kind.TRUSTED)
                or target_path(part) in (REBUILD_LAYER, "functools.partial", "builtins.getattr")
            ):
                return False
        return True

    def is_callable_value(self, node: Node) -> bool:
        return self.kind(node) in (Kind.MODULE, Kind.FUNCTION, Kind.TRUSTED) or (
            isinstance(node, Call)
            and target_path(node) in ("functools.partial", "builtins.getattr")
        )

    # State

    def build_reason(self, build: Build) -> str:
        target, state = build.target, build.state
        if not isinstance(target, Call):
            return "gives state to something that is no object"
        kind, path = self.kind(target.target), target_path(target)
        if kind in (None, Kind.TRUSTED):
            return ""
        if path == "functools.partial":
            return "" if self.partial_fits(state) else "gives an odd state to a functools.partial"
        if path.startswith("numpy."):
            fits = isinstance(state, Container) and numpy_state_fits(path, state.items)
            return "" if fits else f"gives an odd state to {path}"
        if path == "collections.OrderedDict":
            fits = isinstance(state, Container) and self.is_data(state)
            return "" if fits else f"gives an odd state to {path}"
        if kind not in (Kind.MODULE, Kind.PLAIN, Kind.HOOK):
            return f"gives state to {path}"
        found = self.entry(target.target)
        assert found is not None
        return self.state_reason(path, found.value, state)

    def state_reason(self, path: str, owner: type, state: Node) -> str:
        """Say what is odd in the `__dict__` that an object of `owner` is given."""
        if not isinstance(state, Container) or state.kind != "dict":
            return f"gives {path} a state that is no dict"
        for key, value in state.pairs():
            name = key.value if isinstance(key, Atom) else None
            if not isinstance(name, str):
                return f"gives {path} an attribute whose name is no text"
            if name.startswith("__"):
                return f"sets {name} of a {path}"
            shadowed = getattr(owner, name, None)
            if callable(shadowed) and not isinstance(shadowed, type) and not self.is_data(value):
                return f"replaces the method {name} of a {path}"
            if issubclass(owner, nn.Module) and _HOOK_KEY.search(name):
                for item in values_of(value):
                    if not self.is_hook(item):
                        return f"hangs a foreign hook on a {path} ({name})"
        return ""

    def is_hook(self, node: Node) -> bool:
        if isinstance(node, Call):
            return self.kind(node.target) in (Kind.HOOK, Kind.TRUSTED)
        return isinstance(node, Atom) or self.kind(node) is Kind.TRUSTED

    def partial_fits(self, state: Node) -> bool:
        if not isinstance(state, Container) or len(state.items) != 4:
            return False
        function, *rest = state.items
        return self.is_callable_value(function) and all(
            isinstance(part, (Atom, Container, Persistent))
            or self.is_callable_value(part)
            or self.is_data(part)
            for node in rest
            for part in walk(node, into_calls=False)
        )

    def persistent_reason(self, reference: Persistent) -> str:
        items = reference.pid.items if isinstance(reference.pid, Container) else []
        word = items[0].value if items and isinstance(items[0], Atom) else None
        if word == "storage":
            return "" if all(self.is_data(item) for item in items) else "refers to an odd storage"
        return "refers to something outside of it that is no tensor"


def _kind_of(node: Node) -> str:
    return node.kind if isinstance(node, Container) else ""


def _odd_arguments(target: Global) -> str:
    return f"calls {target.path} with arguments that no saved model has"
