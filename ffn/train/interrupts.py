"""Ctrl-C that lets the current step finish; a second one stops at once."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def interrupts() -> Iterator[Callable[[], bool]]:
    """Yield a function that returns True after a first Ctrl-C or SIGTERM; a second one acts as usual.

    In a thread other than the main one no handler can be set: the function always returns False.
    """
    caught: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    before: dict[int, Any] = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def handle(number: int, frame: object) -> None:
        caught.append(number)
        signal.signal(number, before[number])
        # os.write, because the handler may interrupt a print
        os.write(2, b"\nstopping after this step; once more stops at once\n")

    for number in before:
        signal.signal(number, handle)
    try:
        yield lambda: bool(caught)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
