"""A child process that works through jobs, so that a kernel that crashes or hangs costs one contender, not the run.

An illegal access leaves a CUDA context that answers nothing any more, and a kernel that waits for ever cannot be
called off: only the end of its process ends either.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


class Pulse:
    """What the child does just now, in memory that outlives it."""

    def __init__(self, context: Any) -> None:
        self._name, self._count = context.RawArray("c", 200), context.RawValue("L", 0)

    def beat(self, name: str = "") -> None:
        """``name``: the contender that is about to run; "" for the program's own work."""
        self._name.value = name.encode()[:199]
        self._count.value += 1

    @property
    def count(self) -> int:
        return int(self._count.value)

    @property
    def name(self) -> str:
        return self._name.value.decode(errors="replace")


@dataclass(frozen=True)
class Failure:
    """A child that is no more."""

    contender: str  #: who ran; "" for none
    reason: str


class Child:
    """``serve(job, pulse, *arguments)`` in a process of its own, one job after another."""

    def __init__(self, serve: Callable[..., Any], arguments: tuple[Any, ...], patience_s: float = 90.0) -> None:
        context = multiprocessing.get_context("spawn")
        self.patience_s, self.pulse = patience_s, Pulse(context)
        self._connection, other = context.Pipe()
        self._process = context.Process(target=_work, args=(other, serve, self.pulse, arguments), daemon=True)
        self._process.start()
        other.close()
        self._ready = False

    def run(self, job: Any) -> Any:
        """What ``serve`` returned, or a :class:`Failure`, after which this child is of no use."""
        try:
            if not self._ready:  # its imports take as long as they take
                self._ready = bool(self._connection.recv())
            self._connection.send(job)
            count, since = self.pulse.count, time.monotonic()
            while not self._connection.poll(1.0):
                if self.pulse.count != count:
                    count, since = self.pulse.count, time.monotonic()
                elif time.monotonic() - since > self.patience_s:
                    return self._failed(f"no answer in {self.patience_s:.0f} s")
            return self._connection.recv()
        except (EOFError, BrokenPipeError, ConnectionResetError):
            self._process.join()
            return self._failed(f"the process ended with {self._process.exitcode}")

    def _failed(self, what: str) -> Failure:
        self.stop()
        return Failure(self.pulse.name, what)

    def stop(self) -> None:
        self._process.kill()
        self._process.join()
        self._connection.close()


def _work(connection: Any, serve: Callable[..., Any], pulse: Pulse, arguments: tuple[Any, ...]) -> None:
    connection.send(True)
    while True:
        try:
            job = connection.recv()
        except EOFError:
            os._exit(0)
        connection.send(serve(job, pulse, *arguments))
