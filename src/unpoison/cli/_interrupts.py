"""Ctrl-C and SIGTERM: both unwind the stack, so that every half-written artefact is removed on the way out.

Python turns SIGINT into an exception but lets SIGTERM kill the process on the spot, which would leave the
staging directory behind. Here both raise, once: a second Ctrl-C cannot break into the tidying up that the
first one started, and neither can break into a `shielded` block, where a finished directory is being
renamed into place.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any, final


@final
class Terminated(BaseException):
    """SIGTERM arrived. Like KeyboardInterrupt, not an Exception: nothing on the way out may swallow it."""


@final
class Interrupts:
    """While entered, SIGINT raises KeyboardInterrupt and SIGTERM raises `Terminated`, the first of them only.

    Outside the main thread, where Python does not let handlers be set, it does nothing.
    """

    def __init__(self) -> None:
        self._previous: dict[signal.Signals, Any] = {}
        self._shielded = False
        self._waiting: signal.Signals | None = None
        self._raised = False

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    @contextlib.contextmanager
    def shielded(self, *, forget: bool = False) -> Iterator[None]:
        """Let the block finish; a signal that came meanwhile is raised after it, or forgotten."""
        self._shielded = True
        try:
            yield
        finally:
            self._shielded = False
            waiting, self._waiting = self._waiting, None
        if waiting is not None and not forget:
            self._raise(waiting)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self._raised:
            return
        if self._shielded:
            self._waiting = signal.Signals(number)
            return
        self._raise(signal.Signals(number))

    def _raise(self, number: signal.Signals) -> None:
        self._raised = True
        raise Terminated if number == signal.SIGTERM else KeyboardInterrupt
