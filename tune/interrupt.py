"""SIGTERM and Ctrl-C -> KeyboardInterrupt, once: what ends the runs after it must not be interrupted itself. Or a wish
to stop: one run grants it after its step, a search before its next."""

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)
DEAF_S = 10.0
"""So long after a signal, others are not heard: ending every run takes less."""
_blocks: list[list[float]] = []
"""When each block that hears signals, from the outermost on, heard the last one."""


@contextmanager
def interruptible() -> Iterator[None]:
    """Turns both signals into one KeyboardInterrupt while the block runs."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may hear signals
        return
    with _armed():
        try:
            yield
        except SystemExit as leaving:  # a library took SIGTERM meanwhile
            raise KeyboardInterrupt from leaving


@contextmanager
def stop_asked() -> Iterator[Callable[[], bool]]:
    """Yields what tells whether a signal has come; one that comes much later raises KeyboardInterrupt."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked.is_set
        return
    with _armed(asked):
        yield asked.is_set


@contextmanager
def between_steps() -> Iterator[Callable[[], None]]:
    """Yields what raises KeyboardInterrupt once a signal has come, as does the end of the block.

    An interrupt elsewhere may leave a query to SQLite unread, which locks the file for all that is written after it, or
    be swallowed, as Python does with what a weak reference's end raises."""
    with stop_asked() as should_stop:

        def heed() -> None:
            if should_stop():
                raise KeyboardInterrupt

        yield heed
        heed()


@contextmanager
def _armed(asked: threading.Event | None = None) -> Iterator[None]:
    """Hears both signals while the block runs; the first one sets the event, if there is one.

    A block within another shares what was heard last: what the inner one heard interrupts the outer one's end no more.
    """
    heard_s = _blocks[-1] if _blocks else [-DEAF_S]

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        now_s = time.monotonic()
        if now_s - heard_s[0] < DEAF_S:
            return
        heard_s[0] = now_s
        if asked is None or asked.is_set():
            raise KeyboardInterrupt
        asked.set()

    before = [signal.signal(number, interrupt) for number in SIGNALS]
    _blocks.append(heard_s)
    try:
        yield
    finally:
        _blocks.pop()
        for number, handler in zip(SIGNALS, before, strict=True):
            signal.signal(number, handler)
