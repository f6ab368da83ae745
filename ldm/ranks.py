"""The processes of a data-parallel training: how they were started, who does what, what they tell each other.

`mpirun` (OpenMPI), `msrun` or a rank table start one process per device. On Ascend MindSpore's own `init`
knows all three (HCCL). On a CPU its collectives know msrun only: under mpirun the processes meet at a TCP
store that rank 0 opens.
"""

import hashlib
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property
from zlib import crc32

import numpy as np

TIMEOUT_SECONDS = 3600  # how long a process waits for another that compiles, encodes or saves


@dataclass(frozen=True)
class Ranks:
    """This process among `size`: number `rank`, from 0.

    A process alone is rank 0 of 1, for which nothing below costs anything.
    """

    rank: int = 0
    size: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this process writes checkpoints, log and images."""
        return self.rank == 0

    def share(self, items: Sequence) -> Sequence:
        """This process's part of `items`; every item is in the part of one process."""
        return items[self.rank :: self.size]

    @cached_property
    def _sum(self):
        from mindspore import nn, ops

        class Sum(nn.Cell):
            def __init__(self) -> None:
                super().__init__(auto_prefix=False)
                self.all_reduce = ops.AllReduce()

            def construct(self, x):
                return self.all_reduce(x)

        return Sum()

    def total(self, values: np.ndarray) -> np.ndarray:
        """The sum over all processes of their float32 arrays, the same in all."""
        if self.size == 1:
            return values
        from mindspore import Tensor

        return self._sum(Tensor(np.asarray(values, np.float32))).asnumpy()

    def mean(self, values: np.ndarray) -> np.ndarray:
        return self.total(values) / self.size

    def wait(self) -> None:
        """Return when all processes have come here."""
        self.total(np.zeros(1, np.float32))

    def divide(
        self, look: Callable[[], Sequence], do: Callable[[Sequence], None], missing: Sequence | None = None
    ) -> Sequence:
        """Have done what is missing, each process its share of it.

        Returns what is missing now, for lack of a common disk.

        Args:
            look: says what is missing. All processes have looked before one of them does anything.
            do: does the given part of it.
            missing: what `look` has said already.
        """
        missing = look() if missing is None else missing
        self.wait()
        do(self.share(missing))
        self.wait()
        return look() if missing and self.size > 1 else []

    def any(self, flag: bool) -> bool:
        return bool(self.total(np.array([flag], np.float32))[0])

    def first(self, array: np.ndarray) -> np.ndarray:
        """Rank 0's float32 array, in all processes."""
        return self.total(array if self.is_first else np.zeros_like(array))

    def largest(self, value: float) -> float:
        """The largest of all processes' values, which are 0 or more."""
        table = np.zeros(self.size, np.float32)
        table[self.rank] = value
        return float(self.total(table).max())

    def require_equal(self, arrays: Iterable[np.ndarray], what: str) -> None:
        """Raises ValueError, in all processes, where `arrays` are not the same in all of them, bit by bit."""
        if different := self.differing(arrays):
            raise ValueError(f"{what} differ between rank 0 and rank {', '.join(map(str, different))}")

    def differing(self, arrays: Iterable[np.ndarray]) -> list[int]:
        """The ranks whose `arrays` are not those of rank 0, bit by bit; the same list in all processes."""
        if self.size == 1:
            return []
        digest = hashlib.sha256()
        for array in arrays:
            digest.update(np.ascontiguousarray(array))
        # whole numbers up to 255: exact in float32
        mine = np.frombuffer(digest.digest()[:16], np.uint8).astype(np.float32)
        table = np.zeros((self.size, len(mine)), np.float32)
        table[self.rank] = mine
        table = self.total(table)
        return [rank for rank in range(self.size) if not np.array_equal(table[rank], table[0])]


ALONE = Ranks()


def launcher() -> str | None:
    """What started this process among several: "mpirun", "msrun", "a rank table" or nothing."""
    if "MS_ROLE" in os.environ:
        return "msrun"
    if "OMPI_COMM_WORLD_SIZE" in os.environ:
        return "mpirun"
    return "a rank table" if "RANK_TABLE_FILE" in os.environ and "RANK_ID" in os.environ else None


def check_launch(use_parallel: bool) -> None:
    """Raises ValueError where option and launch do not fit."""
    found = launcher()
    if use_parallel and not found:
        raise ValueError(
            "use_parallel=True, but nothing started several processes: use mpirun -n 2 python ... or msrun "
            "--worker_num=2 ..."
        )
    sizes = {"mpirun": "OMPI_COMM_WORLD_SIZE", "msrun": "MS_WORKER_NUM", "a rank table": "RANK_SIZE"}
    if found and not use_parallel and os.environ.get(sizes[found]) != "1":
        raise ValueError(
            f"{found} started several processes: add --use_parallel=True, or start the command without "
            f"{found}"
        )


def join(device: str, use_parallel: bool) -> Ranks:
    """Join the other processes, if there are any; the device is chosen already. msrun's scheduler ends in
    here.

    Raises:
        RuntimeError: they do not come together.
    """
    if not use_parallel:
        return ALONE
    from mindspore import communication

    if device == "CPU":
        # MindSpore's default of 30 seconds is for a peer that computes, not for one that compiles or writes a
        # checkpoint.
        os.environ.setdefault("MS_CPU_COMM_OP_TIMEOUT", str(TIMEOUT_SECONDS))
    if device == "CPU" and launcher() == "mpirun":
        return _join_by_store(
            int(os.environ["OMPI_COMM_WORLD_RANK"]), int(os.environ["OMPI_COMM_WORLD_SIZE"])
        )
    communication.init()
    return Ranks(communication.get_rank(), communication.get_group_size())


def _join_by_store(rank: int, size: int) -> Ranks:
    try:
        from mindspore.communication.management import _init_with_store
        from mindspore.mint.distributed import TCPStore
    except ImportError:
        raise ValueError(
            "mpirun on a CPU needs MindSpore 2.10: this version has no way to join; use msrun"
        ) from None
    os.environ.setdefault("RANK_ID", str(rank)), os.environ.setdefault("RANK_SIZE", str(size))
    # The job's name is the same in all its processes and differs between jobs of a machine.
    job = os.environ.get("PMIX_NAMESPACE") or os.environ.get("OMPI_MCA_ess_base_jobid", "")
    host = os.environ.get("MS_STORE_HOST", "127.0.0.1")
    port = int(os.environ.get("MS_STORE_PORT", 20000 + crc32(job.encode()) % 10000))
    limit = timedelta(seconds=TIMEOUT_SECONDS)
    _init_with_store("mccl", limit, size, rank, TCPStore(host, port, size, rank == 0, limit))
    return Ranks(rank, size)
