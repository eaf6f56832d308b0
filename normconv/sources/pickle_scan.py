"""Read what a pickle would do without doing it: names, calls and state, opcode by opcode.

A pickle is a program for a small stack machine. This runs it on symbols: where the real machine
would import, call or set state, a node says so. Nothing is imported and nothing is called.
"""

from __future__ import annotations

import pickletools
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import IO, Any, TypeAlias

__all__ = [
    "Atom",
    "Build",
    "Call",
    "Container",
    "Global",
    "MalformedPickleError",
    "Node",
    "Op",
    "Persistent",
    "Scan",
    "scan_pickle",
]

MAX_OPS = 20_000_000


class MalformedPickleError(ValueError):
    """The bytes are no complete pickle."""


@dataclass(frozen=True)
class Atom:
    """A literal: text, number, bytes, None, True or False."""

    value: Any


@dataclass(frozen=True)
class Global:
    """A name that the pickle imports."""

    module: str
    name: str

    @property
    def path(self) -> str:
        """The dotted name."""
        return f"{self.module}.{self.name}"


@dataclass(eq=False)
class Container:
    """A tuple, list, set or dict; a dict's items are keys and values in turn."""

    kind: str
    items: list[Node] = field(default_factory=list)

    def pairs(self) -> Iterator[tuple[Node, Node]]:
        """Yield a dict's keys with their values."""
        return zip(self.items[::2], self.items[1::2], strict=False)


@dataclass(eq=False)
class Call:
    """A call of `target` (or the creation of an object of it), and what is put into the result."""

    op: str
    target: Node
    args: Node
    keywords: Node | None = None
    items: list[Node] = field(default_factory=list)


@dataclass(eq=False)
class Persistent:
    """A reference out of the pickle; in torch files a storage, or a class with its source."""

    pid: Node


@dataclass(frozen=True)
class Build:
    """State given to an object."""

    target: Node
    state: Node


@dataclass(frozen=True)
class Op:
    """One opcode with its place in the bytes."""

    name: str
    argument: Any
    start: int
    end: int


Node: TypeAlias = "Atom | Global | Container | Call | Persistent"


@dataclass
class Scan:
    """What one pickle would do.

    Attributes:
        root: the object it gives.
        globals: every name it imports, in order, once each.
        calls: every call and every creation of an object.
        builds: every setting of state.
        persistent: every reference out of the pickle.
        oddities: what only a hostile or foreign writer produces, as sentences.
        ops: the opcodes, when they were asked for.
        opcode_names: the names of all opcodes used.
    """

    root: Node = field(default_factory=lambda: Atom(None))
    globals: dict[Global, None] = field(default_factory=dict)
    calls: list[Call] = field(default_factory=list)
    builds: list[Build] = field(default_factory=list)
    persistent: list[Persistent] = field(default_factory=list)
    oddities: list[str] = field(default_factory=list)
    ops: list[Op] = field(default_factory=list)
    opcode_names: set[str] = field(default_factory=set)


def scan_pickle(stream: IO[bytes], *, keep_ops: bool = False) -> Scan:
    """Run the pickle that starts at the stream's position on symbols, up to its STOP.

    Args:
        stream: a seekable binary stream; afterwards it stands behind the pickle.
        keep_ops: record every opcode with its place.

    Raises:
        MalformedPickleError: when the bytes end early or make no sense.

    >>> import io, pickle
    >>> found = scan_pickle(io.BytesIO(pickle.dumps(print, protocol=2)))
    >>> [name.path for name in found.globals]
    ['builtins.print']
    """
    machine = _Machine(Scan())
    base = stream.tell()
    previous: tuple[pickletools.OpcodeInfo, Any, int] | None = None
    try:
        for count, (opcode, argument, position) in enumerate(pickletools.genops(stream)):
            if count > MAX_OPS:
                raise MalformedPickleError(f"has more than {MAX_OPS} opcodes")
            if keep_ops and previous is not None:
                _keep(machine.scan, previous, base, position or 0)
            previous = (opcode, argument, position or 0)
            machine.step(opcode.name, argument)
        if keep_ops and previous is not None:
            _keep(machine.scan, previous, base, stream.tell())
    except MalformedPickleError:
        raise
    except Exception as error:  # genops and a stack run dry raise many kinds
        raise MalformedPickleError(f"breaks off or makes no sense ({error})") from None
    return machine.scan


def _keep(scan: Scan, op: tuple[pickletools.OpcodeInfo, Any, int], base: int, end: int) -> None:
    opcode, argument, start = op
    scan.ops.append(Op(opcode.name, argument, start - base, end - base))


_LITERALS_TEXT = """
INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT STRING BINSTRING
SHORT_BINSTRING UNICODE SHORT_BINUNICODE BINUNICODE BINUNICODE8 BINBYTES SHORT_BINBYTES
BINBYTES8 BYTEARRAY8
"""
_LITERALS = frozenset(_LITERALS_TEXT.split())
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_EMPTY = {"EMPTY_TUPLE": "tuple", "EMPTY_LIST": "list", "EMPTY_DICT": "dict", "EMPTY_SET": "set"}
_FROM_MARK = {"TUPLE": "tuple", "LIST": "list", "DICT": "dict", "FROZENSET": "set"}
_SHORT_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


class _Machine:
    """The pickle machine on symbols. Marks are kept as saved stacks, as torch's unpickler does."""

    def __init__(self, scan: Scan) -> None:
        self.scan = scan
        self.stack: list[Node] = []
        self.saved: list[list[Node]] = []
        self.memo: dict[int, Node] = {}

    def step(self, name: str, argument: Any) -> None:
        self.scan.opcode_names.add(name)
        if name in _LITERALS:
            self.stack.append(Atom(argument))
        elif name in _CONSTANTS:
            self.stack.append(Atom(_CONSTANTS[name]))
        elif name in _EMPTY:
            self.stack.append(Container(_EMPTY[name]))
        elif name in _FROM_MARK:
            self.push(Container(_FROM_MARK[name], self.pop_mark()))
        elif name in _SHORT_TUPLES:
            size = _SHORT_TUPLES[name]
            items = [self.pop() for _ in range(size)][::-1]
            self.push(Container("tuple", items))
        elif name in _HANDLERS:
            _HANDLERS[name](self, argument)
        else:
            raise MalformedPickleError(f"uses the unknown opcode {name}")

    def push(self, node: Node) -> None:
        self.stack.append(node)

    def pop(self) -> Node:
        return self.stack.pop()

    def pop_mark(self) -> list[Node]:
        items = self.stack
        self.stack = self.saved.pop()
        return items

    def mark(self, _: Any) -> None:
        self.saved.append(self.stack)
        self.stack = []

    def drop(self, _: Any) -> None:
        if self.stack:
            self.pop()
        else:
            self.pop_mark()

    def drop_mark(self, _: Any) -> None:
        self.pop_mark()

    def name(self, module: str, name: str) -> Global:
        # Files of Python 2 name Python 2 modules; torch maps them whatever the protocol.
        if (module, name) in NAME_MAPPING:
            module, name = NAME_MAPPING[(module, name)]
        elif module in IMPORT_MAPPING:
            module = IMPORT_MAPPING[module]
        found = Global(module, name)
        self.scan.globals[found] = None
        return found

    def global_(self, argument: str) -> None:
        module, _, name = argument.partition(" ")
        self.push(self.name(module, name))

    def stack_global(self, _: Any) -> None:
        name, module = self.pop(), self.pop()
        texts = [getattr(node, "value", None) for node in (module, name)]
        if all(isinstance(text, str) for text in texts):
            self.push(self.name(str(texts[0]), str(texts[1])))
        else:
            self.scan.oddities.append("imports a name that is not written in it as text")
            self.push(Atom(None))

    def extension(self, code: int) -> None:
        self.scan.oddities.append(f"uses extension code {code} of the copyreg registry")
        self.push(Atom(None))

    def call(self, op: str, target: Node, args: Node, keywords: Node | None = None) -> None:
        found = Call(op, target, args, keywords)
        self.scan.calls.append(found)
        self.push(found)

    def reduce(self, op: str) -> None:
        args, target = self.pop(), self.pop()
        self.call(op, target, args)

    def new_object_ex(self, _: Any) -> None:
        keywords, args, target = self.pop(), self.pop(), self.pop()
        self.call("NEWOBJ_EX", target, args, keywords)

    def inst(self, argument: str) -> None:
        module, _, name = argument.partition(" ")
        self.call("INST", self.name(module, name), Container("tuple", self.pop_mark()))

    def obj(self, _: Any) -> None:
        target, *args = self.pop_mark()
        self.call("OBJ", target, Container("tuple", args))

    def build(self, _: Any) -> None:
        state = self.pop()
        self.scan.builds.append(Build(self.stack[-1], state))

    def add(self, items: list[Node]) -> None:
        owner = self.stack[-1]
        if isinstance(owner, (Container, Call)):
            owner.items.extend(items)
        else:
            self.scan.oddities.append("puts items into something that holds none")

    def persistent(self, pid: Node) -> None:
        found = Persistent(pid)
        self.scan.persistent.append(found)
        self.push(found)

    def get(self, index: int) -> None:
        self.push(self.memo[index])

    def put(self, index: int) -> None:
        self.memo[index] = self.stack[-1]

    def stop(self, _: Any) -> None:
        self.scan.root = self.pop()


_HANDLERS: dict[str, Callable[[_Machine, Any], None]] = {
    "PROTO": lambda machine, _: None,
    "FRAME": lambda machine, _: None,
    "MARK": _Machine.mark,
    "POP": _Machine.drop,
    "POP_MARK": _Machine.drop_mark,
    "DUP": lambda machine, _: machine.push(machine.stack[-1]),
    "GLOBAL": _Machine.global_,
    "STACK_GLOBAL": _Machine.stack_global,
    "EXT1": _Machine.extension,
    "EXT2": _Machine.extension,
    "EXT4": _Machine.extension,
    "REDUCE": lambda machine, _: machine.reduce("REDUCE"),
    "NEWOBJ": lambda machine, _: machine.reduce("NEWOBJ"),
    "NEWOBJ_EX": _Machine.new_object_ex,
    "INST": _Machine.inst,
    "OBJ": _Machine.obj,
    "BUILD": _Machine.build,
    "APPEND": lambda machine, _: machine.add([machine.pop()]),
    "APPENDS": lambda machine, _: machine.add(machine.pop_mark()),
    "ADDITEMS": lambda machine, _: machine.add(machine.pop_mark()),
    "SETITEM": lambda machine, _: machine.add([machine.pop(), machine.pop()][::-1]),
    "SETITEMS": lambda machine, _: machine.add(machine.pop_mark()),
    "PERSID": lambda machine, text: machine.persistent(Atom(text)),
    "BINPERSID": lambda machine, _: machine.persistent(machine.pop()),
    "GET": _Machine.get,
    "BINGET": _Machine.get,
    "LONG_BINGET": _Machine.get,
    "PUT": _Machine.put,
    "BINPUT": _Machine.put,
    "LONG_BINPUT": _Machine.put,
    "MEMOIZE": lambda machine, _: machine.put(len(machine.memo)),
    "NEXT_BUFFER": lambda machine, _: machine.push(Atom(None)),
    "READONLY_BUFFER": lambda machine, _: None,
    "STOP": _Machine.stop,
}
