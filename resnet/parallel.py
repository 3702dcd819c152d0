"""Training by several processes through ChainerMN: each has its share of every batch.

Order and augmentation are those of one process: a share is a part of the same batch. Gradients are
averaged before each update, so all processes keep the same weights. Batch statistics are each
process's own, over its share alone; the running averages, of which training makes no use, are
averaged before they are: for an evaluation or a snapshot.
"""

from __future__ import annotations

import os
import platform
import sys
import time

import chainer
import numpy as np

from resnet import command, record
from resnet.command import USAGE, InputError

COMMUNICATORS = ("naive", "flat", "pure_nccl")


class Processes:
    """The processes that train together; just this one without a communicator.

    Attributes:
        rank: Number of this one.
        size: How many they are.
        local: Number of this one among those on its computer.
    """

    def __init__(self, communicator=None) -> None:
        self._communicator = communicator
        self.rank = communicator.rank if communicator else 0
        self.size = communicator.size if communicator else 1
        self.local = communicator.intra_rank if communicator else 0

    def share(self, count: int) -> slice:
        """Tell which of ``count`` things in a row are this process's."""
        return slice(self.rank * count // self.size, (self.rank + 1) * count // self.size)

    def sum(self, *numbers: float) -> list[float]:
        """Add up each number over the processes, in double precision."""
        if self._communicator is None:
            return [float(number) for number in numbers]
        mine = np.array([float(number) for number in numbers])
        return self._communicator.mpi_comm.allreduce(mine).tolist()

    def any(self, flag: bool) -> bool:
        """Tell whether the flag is true in one of the processes; all get the same answer."""
        return self.sum(flag)[0] > 0

    def agree(self, flag: bool) -> bool:
        """Return the first process's flag."""
        return self.any(flag and self.rank == 0)

    def wait(self) -> None:
        """Return when all processes have come here."""
        if self._communicator is not None:
            self._communicator.mpi_comm.barrier()

    def average_gradients(self, network: chainer.Link) -> None:
        """Make every parameter's gradient the mean over the processes."""
        if self._communicator is not None:
            self._communicator.multi_node_mean_grad(network)

    def average_statistics(self, network: chainer.Link) -> None:
        """Make the running averages of batch normalization the mean over the processes."""
        if self._communicator is None:
            return
        for link in network.links():
            if isinstance(link, chainer.links.BatchNormalization):
                for array in (link.avg_mean, link.avg_var):
                    mine = chainer.cuda.to_cpu(array)
                    mean = self._communicator.mpi_comm.allreduce(mine) / self.size
                    array[...] = chainer.get_device(link.device).send(mean)


ALONE = Processes()


def join(name: str | None) -> Processes:
    """Find the other processes that this one was started with.

    Args:
        name: ``--communicator``; without one this process is alone.

    Raises:
        InputError: ChainerMN, MPI or what the communicator needs is missing.
    """
    if name is None:
        return ALONE
    try:
        import chainermn

        communicator = chainermn.create_communicator(name)
    except (ImportError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f"--communicator {name}: {reason}; legal: naive on a CPU, with an MPI and "
            "pip install mpi4py; flat or pure_nccl on GPUs, the latter with NCCL: "
            "pip install nvidia-nccl-cu13, or -cu12",
            USAGE,
        ) from None
    processes = Processes(communicator)
    if processes.size > 1:
        _share_fate(processes)
    # Threads of each process, unless someone has said how many: a launcher may bind each of them
    # to cores of its own, several to the same ones, or none.
    here = platform.node(), record.PROCESSORS
    there = communicator.mpi_comm.allgather(here)
    cores = set().union(*(cores for node, cores in there if node == here[0]))
    threads = max(1, len(cores) // communicator.intra_size)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    return processes


def _share_fate(processes: Processes) -> None:
    """Let the first process speak for all, and one that fails end all."""
    from mpi4py import MPI

    if processes.rank > 0:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 until the process ends

    def fail(message: str, code: int) -> None:
        if processes.rank > 0:
            time.sleep(2)  # what all have met, the first one says
        sys.stdout.flush()
        print(message, file=sys.stderr, flush=True)
        MPI.COMM_WORLD.Abort(code)

    command.fail = fail
