"""Whether the program can start at all: its Python and its packages. For this to run on an older Python, it
has no newer syntax.
"""

import sys
from importlib.util import find_spec

OLDEST_PYTHON = (3, 10)
# as they are imported; their versions are compared in ldm/device.py
PACKAGES = ("mindspore", "numpy", "PIL", "omegaconf", "safetensors", "ml_dtypes", "ftfy", "regex", "tqdm")


def require_installation():
    """End the process with one line and status 2 where it cannot start, before any import fails."""
    missing = [name for name in PACKAGES if find_spec(name) is None]
    if sys.version_info[:2] < OLDEST_PYTHON:
        found = f"{sys.version_info[0]}.{sys.version_info[1]} ({sys.executable})"
        reason = f"Python must be {OLDEST_PYTHON[0]}.{OLDEST_PYTHON[1]} or newer, got {found}"
    elif missing:
        reason = (
            f"not installed: {', '.join(missing)}; pip install -r requirements.txt (README, Dependencies)"
        )
    else:
        return
    sys.stderr.write(f"{sys.argv[0].rpartition('/')[2]}: error: {reason}\n")
    sys.exit(2)
