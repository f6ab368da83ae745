"""Damage small files of every kind that is read, at random, and see that each is read or refused in words.

    python scripts/faults/fuzz.py                # 2,000 of each of sixteen kinds of files: minutes
    python scripts/faults/fuzz.py --count 100 --seed 1 --kind ckpt

A mutation cuts, flips bits, moves or repeats parts, or puts extreme numbers where lengths may be. It passes
if the file is read, or refused by this project's own error of one line, within 10 s and with no more memory
than twice the file and 200 MB. "Other values" are damage to the values alone: the .ckpt and safetensors
formats have no checksum of their own, checkpoints.sha256 beside those that are trained here has;
configurations and pictures have none. Prints a table; exit status 1 where a mutation did not pass, whose file
is kept.
"""

import argparse
import random
import resource
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from fuzz_kinds import KINDS, RUN, make, read
from tqdm.auto import tqdm

SECONDS, MEMORY = 10, 200 * 2**20
EXTREMES = [
    b"\0",
    b"\xff",
    b"\x7f" + b"\xff" * 7,
    b"\xff" * 8,
    b"\x80" * 9 + b"\x01",
    b"\0" * 8,
    b"99999999999",
    b"-1",
    b"1e999",
    b'"',
    b"[" * 2000,
]
OUTCOMES = ("read, the same", "read, other values", "refused", "FAILED")


def mutate(content: bytes, rng: random.Random) -> bytes:
    """One to three kinds of damage."""
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        at, length = rng.randrange(len(data) + 1), rng.choice((1, 2, 4, 8, 16, 64))
        how = rng.randrange(6)
        if how == 0:
            del data[at:]
        elif how == 1:
            for _ in range(rng.randint(1, 8)):
                if data:
                    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        elif how == 2:
            start = rng.randrange(len(data) + 1)
            data[at : at + length * rng.randrange(2)] = data[start : start + length]
        elif how == 3:
            extreme = rng.choice(EXTREMES)
            data[at : at + len(extreme)] = extreme
        elif how == 4:
            del data[at : at + length]
        else:
            data[at:at] = rng.randbytes(length)
    return bytes(data)


def address_space() -> int:
    return next(
        1024 * int(line.split()[1])
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith("VmSize")
    )


class TooSlow(BaseException):
    pass


def on_alarm(*_) -> None:
    raise TooSlow(f"more than {SECONDS} s")


def work(kind: str, seed: int, first: int, count: int, folder: Path) -> None:
    """Try mutations, printing an outcome a line: in a process of its own, which may crash."""
    path = folder / f"sound.{kind}"
    make(kind, path)
    sound, expected = path.read_bytes(), read(kind, path) if kind != "command" else None
    signal.signal(signal.SIGALRM, on_alarm)
    damaged = folder / f"damaged.{kind}"
    for number in range(first, count):
        data = mutate(sound, random.Random(f"{seed} {kind} {number}"))
        damaged.write_bytes(data)
        print(number, end=" ", flush=True)
        limit = address_space() + 2 * len(data) + MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
        signal.alarm(SECONDS)
        try:
            outcome = OUTCOMES[0] if read(kind, damaged) == expected else OUTCOMES[1]
        except ValueError as error:
            words = str(error)
            own = words.strip() and "Traceback" not in words and "\n" not in words.strip()
            outcome = OUTCOMES[2] if own else f"FAILED {words!r}"
        except BaseException as error:
            outcome = f"FAILED {type(error).__name__}: {error}"
        signal.alarm(0)
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        outcome = f"FAILED {RUN}" if (folder / RUN).exists() else outcome
        print(" ".join(outcome.split()), flush=True)


def fuzz(kind: str, seed: int, count: int, folder: Path) -> tuple[Counter, list[str]]:
    """Outcomes and their number, and what failed."""
    outcomes, failures, first = Counter(), [], 0
    while first < count:
        command = [sys.executable, __file__, "--work", kind, str(seed), str(first), str(count), str(folder)]
        errors = open(folder / "errors.txt", "w+")
        process, before = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True), first
        for line in tqdm(process.stdout, kind, total=count - first, leave=False, disable=None):
            number, _, outcome = line.strip().partition(" ")
            first = int(number) + 1
            outcomes[outcome.split(" ")[0] if outcome.startswith("FAILED") else outcome or "FAILED"] += 1
            if outcome.startswith("FAILED") or not outcome:
                kept = folder / f"failed-{number}.{kind}"
                (folder / f"damaged.{kind}").replace(kept)
                failures.append(f"{kept}: {outcome or 'the process crashed'}")
        if process.wait() and first == before:  # it did not come to its first mutation
            errors.seek(0)
            sys.exit(errors.read())
    return outcomes, failures


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=2000, help="mutations of each kind [%(default)s]")
    parser.add_argument("--seed", type=int, default=0, help="of the mutations [%(default)s]")
    parser.add_argument(
        "--kind", choices=KINDS, action="append", help="only this one; may be given several times"
    )
    parser.add_argument("--work", nargs=5, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.work:
        kind, seed, first, count, folder = options.work
        work(kind, int(seed), int(first), int(count), Path(folder))
        return 0
    folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
    print(f"| file | mutations | {' | '.join(OUTCOMES)} |\n|---|---|{'---|' * len(OUTCOMES)}")
    failures = []
    for kind in options.kind or KINDS:
        outcomes, failed = fuzz(kind, options.seed, options.count, folder)
        failures += failed
        print(
            f"| {kind} | {options.count} | {' | '.join(str(outcomes[outcome]) for outcome in OUTCOMES)} |",
            flush=True,
        )
    print("\n".join(failures))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
