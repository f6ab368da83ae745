"""The signal handlers, in a process of their own; tests/test_stopping.py has whole commands."""

import subprocess
import sys

from conftest import ROOT


def test_stop_signals():
    """Postponed, the first one is only noted and the second one stops; otherwise the first one stops.

    The status is the shell's.
    """
    program = """
import os, signal, time
from ldm.command_line import Interrupted
from ldm.run.stopping import StopSignals

def status_of(number):
    try:
        os.kill(os.getpid(), number)
        time.sleep(0.5)
    except Interrupted as end:
        return end.code

signal.signal(signal.SIGHUP, signal.SIG_DFL)  # where the tests themselves run under nohup
signals = StopSignals()
with signals.postponed():
    print(status_of(signal.SIGTERM), signals.received == signal.SIGTERM, status_of(signal.SIGINT))
print(status_of(signal.SIGTERM), StopSignals().received, status_of(signal.SIGINT), status_of(signal.SIGHUP))
signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
StopSignals()
print(status_of(signal.SIGHUP))
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines() == ["None True 130", "143 None 130 129", "None"]
