"""A short run of scripts/faults/fuzz.py; 2,000 mutations a kind are run by hand, see docs/reliability.md."""

import subprocess
import sys

from conftest import ROOT


def test_damaged_files_are_read_or_refused_in_words():
    command = [sys.executable, str(ROOT / "scripts/faults/fuzz.py"), "--count=150", "--seed=1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line.split("|")[1:-1] for line in done.stdout.splitlines() if line.startswith("| ")][1:]
    assert len(rows) == 16 and all(int(row[-1]) == 0 and sum(map(int, row[2:])) == 150 for row in rows)
