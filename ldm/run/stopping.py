"""What happens at Ctrl-C, at SIGTERM, and when the terminal is closed (SIGHUP).

Before training a signal ends the command at once: no update is in hand, and files appear whole or not at all.
While it trains (`postponed`), the first signal is only noted. The update ends; `requested` tells it
to all processes, which agree on it even if only one of them got the signal; the command saves a state and
calls `exit`. In the last update nothing is left to stop: the run ends as if it had not been asked. A second
signal ends the command at once. The exit status is the shell's, 130, 143 or 129, and
`ldm.command_line.Ending` prints how to continue. Under nohup, which ignores SIGHUP, it stays ignored.
"""

import contextlib
import logging
import os
import signal
import threading
from collections.abc import Iterator

from ldm.command_line import Interrupted

logger = logging.getLogger(__name__)


class StopSignals:
    """The handlers of SIGINT, SIGTERM and SIGHUP.

    To be made before any thread is started, so before NumPy is imported. MindSpore puts a handler of its own
    for SIGINT in place with every graph that it runs, which turns it into SIGTERM. So SIGINT is blocked, and
    a thread that waits for it passes it on as SIGUSR1.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._is_postponed = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._handle)
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as under nohup
            signal.signal(signal.SIGHUP, self._handle)
        signal.signal(signal.SIGUSR1, lambda _, frame: self._handle(signal.SIGINT, frame))
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        threading.Thread(target=self._pass_on, daemon=True).start()

    def _pass_on(self) -> None:
        while True:
            signal.sigwait({signal.SIGINT})
            os.kill(os.getpid(), signal.SIGUSR1)

    def _handle(self, number: int, frame) -> None:
        if self.received or not self._is_postponed:
            raise Interrupted(128 + number)
        self.received = number
        logger.info("%s: stopping after this update; once more stops at once", signal.Signals(number).name)

    @contextlib.contextmanager
    def postponed(self) -> Iterator[None]:
        """Within the block the first signal only sets `received`, for the update in hand to end."""
        self._is_postponed = True
        try:
            yield
        finally:
            self._is_postponed = False

    def requested(self, ranks) -> bool:
        """Whether any of the processes (ldm.ranks.Ranks) was asked to stop: all get the same answer."""
        return ranks.any(self.received is not None)

    def exit_if(self, stops: bool, ranks) -> None:
        """End the command once all processes have come here: the first one has saved its state by then."""
        if not stops:
            return
        ranks.wait()
        raise Interrupted(128 + (self.received or signal.SIGTERM))
