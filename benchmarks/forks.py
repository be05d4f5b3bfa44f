"""Work in a forked process: with memory of its own, and a time limit."""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def in_a_fork(work: Callable[[], T], limit: float) -> T | str:
    """What ``work`` returns in a forked process, which is given ``limit`` seconds; or why there is nothing."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)

    def run() -> None:
        try:
            sender.send(work())
        except Exception as error:
            sender.send(f"{type(error).__name__}: {str(error).strip()}".splitlines()[0])

    give_back_freed_memory()  # the fork would use it up before it grows
    process = context.Process(target=run, daemon=True)
    process.start()
    sender.close()
    try:
        result: T | str = receiver.recv() if receiver.poll(limit) else f"not done within {limit:g} s"
    except EOFError:
        result = "its process ended without a word; was memory short?"
    finally:
        process.kill()
        process.join()
    return result


def give_back_freed_memory() -> None:
    """Have this process hold no more than it uses. Does nothing without glibc."""
    gc.collect()
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    except OSError:
        return
