"""Load what `torch.save` wrote without running what the file says.

First the pickle is read on symbols and held to a list (`pickle_scan`, `judge`); then torch's
weights-only unpickler loads it with exactly those names allowed. A file that does not pass is
refused with everything that is wrong with it, and nothing of it has run.
"""

from __future__ import annotations

import io
import pickle
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch

from normconv.errors import LoadError, Problem
from normconv.sources.judge import Verdict, judge
from normconv.sources.legacy import MAGIC, scan_legacy, without_sources
from normconv.sources.pickle_scan import Atom, MalformedPickleError, Scan, scan_pickle
from normconv.sources.recognise import FileKind
from normconv.sources.trust import Trust

__all__ = ["safe_load"]

# What torch's weights-only unpickler reads; others belong to other pickle protocols.
_READ_TEXT = """
GLOBAL NEWOBJ REDUCE BUILD APPEND APPENDS SETITEM SETITEMS MARK TUPLE TUPLE1 TUPLE2 TUPLE3
NONE NEWFALSE NEWTRUE EMPTY_TUPLE EMPTY_LIST EMPTY_DICT EMPTY_SET BININT BININT1 BININT2
BINFLOAT BINUNICODE SHORT_BINSTRING BINPERSID BINGET LONG_BINGET BINPUT LONG_BINPUT LONG1
PROTO STOP
"""
_READ = frozenset(_READ_TEXT.split())
_AGAIN = "copy or download it again"


def safe_load(path: Path, kind: FileKind, trust: Trust, *, mmap: bool = False) -> Any:
    """Load a file of `torch.save` on the CPU.

    Args:
        path: the file.
        kind: what `recognise` found it to be.
        trust: whose classes it may name beyond the list.
        mmap: leave the numbers in the file until they are read (zip format only).

    Raises:
        LoadError: when it names or calls what is not on the list, or is damaged.
    """
    if kind is FileKind.ZIP:
        verdict = _verdict([_scan_zip(path)], str(path), trust)
        return _torch_load(path, path, verdict, trust, mmap=mmap)
    data = path.read_bytes()
    verdict, rewritten = _read_legacy(path, data, trust)
    return _torch_load(path, io.BytesIO(rewritten), verdict, trust, mmap=False)


def _scan_zip(path: Path) -> Scan:
    # torch's own reader, so that the bytes scanned are the bytes loaded even in a crafted zip.
    try:
        reader = torch._C.PyTorchFileReader(str(path))
        data = reader.get_record("data.pkl")
    except RuntimeError as error:
        what = f"is truncated or damaged ({_first_line(error)})"
        raise LoadError(Problem(str(path), what, _AGAIN)) from None
    try:
        return scan_pickle(io.BytesIO(data))
    except MalformedPickleError as error:
        what = f"is damaged: the pickle in it {error}"
        raise LoadError(Problem(str(path), what, _AGAIN)) from None


def _read_legacy(path: Path, data: bytes, trust: Trust) -> tuple[Verdict, bytes]:
    where = str(path)
    try:
        scans, (start, end) = scan_legacy(io.BytesIO(data))
        if scans[0].root != Atom(MAGIC):
            raise LoadError(
                [
                    *judge(scans[0], where, trust).problems,
                    Problem(
                        where,
                        "is a plain pickle, not a file of torch.save",
                        "load it where you trust it and save the weights with torch.save",
                    ),
                ]
            )
        main = without_sources(data[start:end], scans[3])
        scans[3] = scan_pickle(io.BytesIO(main))
        rewritten = data[:start] + main + data[end:]
    except MalformedPickleError as error:
        what = f"is truncated or damaged: it {error}"
        raise LoadError(Problem(where, what, _AGAIN)) from None
    return _verdict(scans, where, trust), rewritten


def _verdict(scans: list[Scan], where: str, trust: Trust) -> Verdict:
    """Judge all pickles of a file together.

    Raises:
        LoadError: with every problem, when there is one.
    """
    whole = Verdict()
    for scan in scans:
        found = judge(scan, where, trust)
        whole.entries |= found.entries
        whole.problems += [problem for problem in found.problems if problem not in whole.problems]
    foreign = sorted(set().union(*(scan.opcode_names for scan in scans)) - _READ)
    if foreign and not whole.problems:
        what = f"uses opcodes of another pickle protocol ({', '.join(foreign[:4])})"
        way_out = "save it again with torch.save's own pickle_protocol (2)"
        whole.problems.append(Problem(where, what, way_out))
    if whole.problems:
        raise LoadError(whole.problems)
    return whole


def _torch_load(path: Path, file: Any, verdict: Verdict, trust: Trust, *, mmap: bool) -> Any:
    wanted = verdict.globals_for_torch(trust)
    wanted += _instances_of_numpy(verdict)
    present = set(torch.serialization.get_safe_globals())
    names = [pair for pair in wanted if pair not in present]
    try:
        with torch.serialization.safe_globals(names), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(file, map_location="cpu", weights_only=True, mmap=mmap)
    except pickle.UnpicklingError as error:
        what = f"cannot be loaded safely ({_reason(error)})"
        way_out = "pass --model and the weights as a state dict"
        raise LoadError(Problem(str(path), what, way_out)) from None
    except (
        RuntimeError, ValueError, TypeError, KeyError, IndexError, AttributeError, EOFError,
        AssertionError, OSError, ImportError, zipfile.BadZipFile,
    ) as error:  # fmt: skip
        what = f"is damaged, or of another version ({type(error).__name__}: {_first_line(error)})"
        raise LoadError(Problem(str(path), what, _AGAIN)) from None


def _instances_of_numpy(verdict: Verdict) -> list[Any]:
    """Name NumPy's own classes of dtypes, which the unpickler asks for when it sets their state."""
    if not any(name.path == "numpy.dtype" for name in verdict.entries):
        return []
    import numpy as np

    kinds = {type(np.dtype(code)) for code in "?bhilqBHILQefdgFDGSUMm"}
    return [(kind, f"{kind.__module__}.{kind.__name__}") for kind in sorted(kinds, key=str)]


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def _reason(error: pickle.UnpicklingError) -> str:
    """Pick torch's reason out of its long message."""
    for line in str(error).splitlines():
        if "WeightsUnpickler error:" in line:
            return line.partition("WeightsUnpickler error:")[2].strip()[:200]
    return _first_line(error)
