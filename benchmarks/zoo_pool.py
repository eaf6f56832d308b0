"""One forked process per job, under a wall-clock and a memory limit.

The parent has the libraries loaded and computes nothing with torch, so that forking is cheap and safe.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, NoReturn, TypeVar

from normconv.report import jsonable

__all__ = ["Limits", "Outcome", "Tell", "run_all"]

Job = TypeVar("Job")
Tell = Callable[[dict[str, Any]], None]
"""What a job reports with: any number of times, each adding to what was told before."""

_PAGE = os.sysconf("SC_PAGE_SIZE")
_POLL = 0.05


@dataclass(frozen=True)
class Limits:
    """What one process may take.

    Args:
        seconds: wall clock.
        memory: resident bytes.
    """

    seconds: float
    memory: float


@dataclass
class Outcome(Generic[Job]):
    """What became of a job: what it told, and why it ended early if it did."""

    job: Job
    told: dict[str, Any]
    ended: str
    seconds: float
    processor: float
    peak: int


@dataclass
class _Running(Generic[Job]):
    job: Job
    pid: int
    pipe: int
    start: float = field(default_factory=time.monotonic)
    text: bytes = b""
    peak: int = 0
    killed: str = ""


def run_all(
    jobs: Iterable[Job],
    work: Callable[[Job, Tell], None],
    limits: Limits,
    workers: int,
) -> Iterator[Outcome[Job]]:
    """Run every job in a process of its own; yield the outcomes as they come.

    Args:
        jobs: taken one by one, in order.
        work: called in the child with the job and a function that reports a dict.
        limits: of each process.
        workers: how many run at once.
    """
    gc.collect()
    gc.freeze()  # collections in the children then skip what the parent has loaded
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that no child is left behind
    waiting = iter(jobs)
    running: list[_Running[Job]] = []
    more = True
    try:
        while more or running:
            while more and len(running) < workers:
                job = next(waiting, None)
                more = job is not None
                if job is not None:
                    running.append(_start(job, work))
            time.sleep(_POLL)
            for one in list(running):
                if outcome := _look_at(one, limits):
                    running.remove(one)
                    yield outcome
    finally:
        gc.unfreeze()
        for one in running:
            os.kill(one.pid, signal.SIGKILL)
            os.waitpid(one.pid, 0)


def _start(job: Job, work: Callable[[Job, Tell], None]) -> _Running[Job]:
    read, write = os.pipe()
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        os.close(read)
        _child(job, work, write)
    os.close(write)
    os.set_blocking(read, False)
    return _Running(job, pid, read)


def _child(job: Job, work: Callable[[Job, Tell], None], pipe: int) -> NoReturn:
    def tell(part: dict[str, Any]) -> None:
        text = (json.dumps(jsonable(part)) + "\n").encode()
        while text:
            text = text[os.write(pipe, text) :]

    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        sink = os.open(os.devnull, os.O_WRONLY)
        os.dup2(sink, 1)
        os.dup2(sink, 2)
        work(job, tell)
    except MemoryError:
        tell({"status": "memory"})
    except BaseException as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{Path(where.filename).name}:{where.lineno}"
        tell({"status": "crashed", "reason": f"{type(error).__name__}: {error} ({place})"[:300]})
    os._exit(0)


def _look_at(one: _Running[Job], limits: Limits) -> Outcome[Job] | None:
    """Read what a child told, hold it to its limits; return its outcome once it has ended."""
    _read(one)
    resident = _resident(one.pid)
    one.peak = max(one.peak, resident)
    if not one.killed and resident > limits.memory:
        one.killed = "memory"
    elif not one.killed and time.monotonic() - one.start > limits.seconds:
        one.killed = "timeout"
    if one.killed:
        os.kill(one.pid, signal.SIGKILL)
    pid, status, usage = os.wait4(one.pid, 0 if one.killed else os.WNOHANG)
    if pid == 0:
        return None
    _read(one)
    os.close(one.pipe)
    ended = one.killed
    if not ended and os.WIFSIGNALED(status):
        ended = f"signal {os.WTERMSIG(status)}"
    told: dict[str, Any] = {}
    for line in one.text.splitlines():
        with suppress(ValueError):  # a killed child's last line may be cut off
            told |= json.loads(line)
    peak = max(one.peak, usage.ru_maxrss * 1024)
    processor = usage.ru_utime + usage.ru_stime
    return Outcome(one.job, told, ended, time.monotonic() - one.start, processor, peak)


def _read(one: _Running[Job]) -> None:
    with suppress(BlockingIOError):
        while part := os.read(one.pipe, 1 << 16):
            one.text += part


def _resident(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * _PAGE
    except (OSError, IndexError):
        return 0
