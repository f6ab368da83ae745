"""Run a command for an Ascend that is not there: MindSpore's dry run with stub libraries in CANN's place.

    python scripts/dry_run/dry_run.py [--soc Ascend910B2] [--kernels FILE] COMMAND...

Graphs are compiled for the device, every operator gets its kernel, and device memory is counted; nothing is
computed. So it shows that graphs compile for an Ascend, by which kernels and in how much memory; not numbers,
times, or what CANN's own compiler says. See docs/ascend.md.
"""

import argparse
import json
import os
import re
import subprocess
import sys
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]

from make_stubs import make_stubs, mindspore_folder  # noqa: E402

from ldm.files import cache_folder  # noqa: E402

SELECTED = re.compile(r"CollectOpSelectedType\] (\w+) select (\w+) kernel")
BACKED_OFF = re.compile(r"CollectOpSelectedType\] (\w+) .*backoff")
LAUNCHED = re.compile(r"Begin launch kernel: .*?(\w+)-op\d+$", re.MULTILINE)
VLOG = "(12902,13000)"  # MindSpore's log of launches and of kernels that are chosen


@dataclass
class Kernels:
    """What a dry run would have started.

    Attributes:
        launches: operator to the number of its launches. MindSpore launches nothing for a Reshape.
        kinds: operator to `aclnn` (CANN's newer kernels), `aclop` (its old ones, dear for the host), `hccl`.
        on_cpu: operators without a kernel for an Ascend.
    """

    launches: dict[str, int]
    kinds: dict[str, str]
    on_cpu: list[str]

    def count(self, kind: str) -> int:
        return sum(number for name, number in self.launches.items() if self.kinds.get(name) == kind)


def environment(soc: str = "Ascend910B2", simulates: bool = True, **more: str) -> dict[str, str]:
    """Variables with which a process of MindSpore finds an Ascend of that name.

    Args:
        simulates: otherwise the runtime starts for real, as far as empty functions take it.
    """
    stubs = make_stubs(cache_folder() / "cann_stubs")
    variables = {
        "ASCEND_HOME_PATH": str(stubs / "latest"),
        "ASCEND_OPP_PATH": str(stubs / "latest/opp"),
        "LD_LIBRARY_PATH": f"{stubs / 'latest/lib64'}:{mindspore_folder() / 'lib'}",
        "LD_PRELOAD": str(stubs / "libd_collective.so"),
        "PYTHONPATH": f"{stubs / 'python'}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
        "DRY_RUN_SOC": soc,
        "MS_DEV_SAVE_GRAPHS_PATH": str(stubs / "left"),  # else MindSpore leaves a folder where one works
        "MS_SIMULATION_LEVEL": "1" if simulates else "",
    }
    return os.environ | variables | more


def run_counted(command: list[str], soc: str = "Ascend910B2", timeout: float = 1800, **more: str):
    """Run a command of Python under the dry run.

    Returns:
        The finished process, with its output, and its Kernels.
    """
    done = subprocess.run(
        [sys.executable, *command], env=environment(soc, VLOG_v=VLOG, **more), capture_output=True, text=True,
        timeout=timeout,
    )  # fmt: skip
    text = done.stdout + done.stderr
    done.stdout, done.stderr = (
        "\n".join(line for line in part.splitlines() if not line.startswith("[V1"))
        for part in (done.stdout, done.stderr)
    )
    launches = Counter(LAUNCHED.findall(text))
    return done, Kernels(
        dict(launches.most_common()), dict(SELECTED.findall(text)), sorted(set(BACKED_OFF.findall(text)))
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--soc", default="Ascend910B2", help="CANN's name of the device [%(default)s]")
    parser.add_argument("--kernels", type=Path, metavar="FILE", help="write the kernels there, as JSON")
    parser.add_argument(
        "command", nargs=argparse.REMAINDER, help="of Python: train_dreambooth.py --device=Ascend ..."
    )
    given = parser.parse_args()
    if not given.command:
        parser.error("a command is missing")
    if not given.kernels:
        os.execve(sys.executable, [sys.executable, *given.command], environment(given.soc))
    done, kernels = run_counted(given.command, given.soc)
    print(done.stdout)
    print(done.stderr, file=sys.stderr)
    given.kernels.write_text(json.dumps(asdict(kernels), indent=2) + "\n")
    raise SystemExit(done.returncode)


if __name__ == "__main__":
    main()
