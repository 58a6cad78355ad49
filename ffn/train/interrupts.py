"""Ctrl-C that lets a step end: the first one asks, the second one stops."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def interrupts() -> Iterator[Callable[[], bool]]:
    """Within, the first Ctrl-C or SIGTERM only makes the function say True; a second one acts as usual."""
    caught: list[int] = []
    if threading.current_thread() is not threading.main_thread():  # only there may handlers be set
        yield lambda: False
        return
    before: dict[int, Any] = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def handle(number: int, frame: object) -> None:
        caught.append(number)
        signal.signal(number, before[number])
        os.write(
            2, b"\nstopping after this step; once more stops at once\n"
        )  # print may be what it interrupts

    for number in before:
        signal.signal(number, handle)
    try:
        yield lambda: bool(caught)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
