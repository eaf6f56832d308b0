"""Files of torch before the zip format: five pickles in a row, then the raw numbers.

They name each class of a module once together with its source text. torch's weights-only unpickler
does not take that, so the text is cut out of the opcodes and the bare class name stays.
"""

from __future__ import annotations

import io
import struct
from typing import IO

from normconv.sources.pickle_scan import (
    Atom,
    Container,
    Global,
    MalformedPickleError,
    Op,
    Persistent,
    Scan,
    scan_pickle,
)

__all__ = ["MAGIC", "scan_legacy", "without_sources"]

MAGIC = 0x1950A86A20F9469CFC6C
_MAIN = 3
_PICKLES = 5
_PUTS = ("BINPUT", "LONG_BINPUT")
_GETS = ("BINGET", "LONG_BINGET")


def scan_legacy(stream: IO[bytes]) -> tuple[list[Scan], tuple[int, int]]:
    """Scan the five pickles; the first must be torch's magic number.

    Returns:
        The scans, and where the fourth pickle, which holds the object, begins and ends.

    Raises:
        MalformedPickleError: when it is another kind of file or breaks off.
    """
    scans: list[Scan] = []
    main = (0, 0)
    for index in range(_PICKLES):
        start = stream.tell()
        scans.append(scan_pickle(stream, keep_ops=index == _MAIN))
        if index == 0 and scans[0].root != Atom(MAGIC):
            break
        if index == _MAIN:
            main = (start, stream.tell())
    return scans, main


def without_sources(data: bytes, scan: Scan) -> bytes:
    """Return the main pickle with each ``(module, class, file, source)`` reduced to the class.

    Later references to a text that was cut out get the text itself.

    Raises:
        MalformedPickleError: when the opcodes are not those that torch writes.
    """
    cuts = _class_references(scan)
    if not cuts:
        return data
    out = io.BytesIO()
    lost: dict[int, bytes] = {}
    for index, op in enumerate(scan.ops):
        raw = data[op.start : op.end]
        if any(start <= index <= end for start, end in cuts[:1]):
            if _kept(scan.ops, index):
                out.write(raw)
            elif op.name in _PUTS:
                lost[op.argument] = _text_of(scan.ops[index - 1], data)
            if index == cuts[0][1]:
                cuts.pop(0)
        elif op.name in _GETS and op.argument in lost:
            if not lost[op.argument]:
                raise MalformedPickleError("refers to the place of a class")
            out.write(lost[op.argument])
        else:
            if op.name in _PUTS:
                lost.pop(op.argument, None)
            out.write(raw)
    return out.getvalue()


def _is_class_reference(reference: Persistent) -> bool:
    """Say whether a reference names a class with its source, as old files of whole modules do."""
    match reference.pid:
        case Container("tuple", [Atom("module"), Global(), Atom(), Atom()]):
            return True
    return False


def _class_references(scan: Scan) -> list[tuple[int, int]]:
    """Find the opcode ranges, MARK to BINPERSID, that name a class with its source."""
    found = []
    references = iter(scan.persistent)
    last_mark = 0
    for index, op in enumerate(scan.ops):
        if op.name == "MARK":
            last_mark = index
        elif op.name == "BINPERSID" and _is_class_reference(next(references)):
            found.append((last_mark, index))
    return found


def _kept(ops: list[Op], index: int) -> bool:
    """Keep the class itself and the memo entry made of it."""
    op = ops[index]
    if op.name == "GLOBAL":
        return True
    return op.name in _PUTS and ops[index - 1].name == "GLOBAL"


def _text_of(op: Op, data: bytes) -> bytes:
    if op.name == "BINUNICODE":
        text = data[op.start : op.end]
        assert struct.unpack("<I", text[1:5])[0] == len(text) - 5
        return text
    return b""
