"""Jobs for a child process, in a module that imports nothing heavy: the child imports it."""

from __future__ import annotations

import os
import time

from benchmarks.isolated import Pulse


def serve(job: str, pulse: Pulse) -> str:
    pulse.beat(f"who does {job}")
    if job == "exit":
        os._exit(7)
    if job == "hang":
        time.sleep(600)
    return job
