"""Jobs for a child process, in a module that imports nothing heavy: the child imports it. And one that is none."""

from __future__ import annotations

import multiprocessing
import os
import time
from typing import Any

from benchmarks.isolated import Failure, Pulse


def serve(job: str, pulse: Pulse) -> str:
    pulse.beat(f"who does {job}")
    if job == "exit":
        os._exit(7)
    if job == "hang":
        time.sleep(600)
    return job


class Crash(BaseException):
    """What a process that dies looks like to the one that waits for it."""


class InProcess:
    """A Child that shares this process."""

    made = 0

    def __init__(self, serve: Any, arguments: tuple[Any, ...], patience_s: float) -> None:
        InProcess.made += 1
        self.pulse, self.serve, self.arguments = Pulse(multiprocessing), serve, arguments

    def run(self, job: Any) -> Any:
        try:
            return self.serve(job, self.pulse, *self.arguments)
        except Crash:
            return Failure(self.pulse.name, "the process ended with -11")

    def stop(self) -> None:
        pass
