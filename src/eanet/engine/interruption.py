"""A signal asks a run to stop: the step is finished and saved first."""

import signal
import threading
from collections.abc import Generator
from contextlib import contextmanager
from types import FrameType

from eanet.errors import Interrupted

__all__ = ["Interrupted", "SignalWatch", "watch_signals"]

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class SignalWatch:
    """Remembers whether a signal has asked to stop."""

    def __init__(self) -> None:
        self.caught = False

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Note the signal; a second one ends the process at once."""
        del number, frame
        self.caught = True
        for other in _SIGNALS:
            signal.signal(other, signal.SIG_DFL)


@contextmanager
def watch_signals() -> Generator[SignalWatch]:
    """Note SIGINT, SIGTERM and SIGUSR1 instead of dying of them.

    Outside the main thread Python delivers no signals; then nothing is ever noted.
    """
    watch = SignalWatch()
    if threading.current_thread() is not threading.main_thread():
        yield watch
        return
    before = {number: signal.signal(number, watch.handle) for number in _SIGNALS}
    try:
        yield watch
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
