"""Data-parallel training: one process per GPU, started by Open MPI's mpirun, connected by nnabla's communicator (NCCL).

    mpirun -n 4 --bind-to none python train.py --config config/default.yaml

All processes hold the same networks, and each takes its own rays. In each step, their gradients and losses are
averaged. Only the first process writes files and prints. Without mpirun, no communicator is loaded.
"""
import io
import os
import shutil
import socket
import sys
import time
import traceback
import zlib
from pathlib import Path
from typing import NamedTuple

import nnabla as nn
import numpy as np

import helper
from backends import context

PATIENCE = 3.0      # seconds; after one process fails, mpirun kills the others well within this time


class Launched(NamedTuple):
    """The number of this process and the number of processes, over all machines and on this one."""
    rank: int
    size: int
    local_rank: int
    local_size: int


def launched():
    """Return this process's Launched, from the environment set by Open MPI's mpirun; (0, 1, 0, 1) without mpirun."""
    says = (os.environ.get(f"OMPI_COMM_WORLD_{name}", "") for name in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE"))
    return Launched(*(int(value) if value.isdigit() else default for value, default in zip(says, (0, 1, 0, 1))))


class World:
    """The processes of a training; by default a single one, whose means are its own values."""

    def __init__(self, rank=0, size=1, communicator=None):
        self.rank, self.size, self.communicator = rank, size, communicator
        self.writes = rank == 0     # only the first process writes files and prints

    def mean_gradients(self):
        """Replace the gradients of nnabla's parameters by their means over the processes.

        Each process has the mean over its own R rays. The result is the gradient of one step over size * R rays.
        """
        if self.communicator:
            parameters = sorted(nn.get_parameters().items())    # the same order in all processes
            self.communicator.all_reduce([p.grad for _, p in parameters], division=True, inplace=False)

    def mean(self, values):
        """Return the means of `values`, {name: number}, over the processes, in float32.

        All processes must pass the same names. A value that is not finite in one process makes the mean not finite.
        """
        if not self.communicator:
            return values
        shared = nn.NdArray((len(values),))
        shared.data = np.array(list(values.values()), np.float32)
        self.communicator.all_reduce(shared, division=True, inplace=True)
        return dict(zip(values, shared.data.tolist()))

    def wait(self):
        """Wait until all processes have called this."""
        self.mean({"here": 1.0})

    def check_same(self, values, says):
        """Raise UserError(says) unless `values` and nnabla's parameters are the same in all processes.

        values: anything whose repr identifies it.
        """
        if not self.communicator:
            return
        number = zlib.crc32(repr(values).encode())
        for name, parameter in sorted(nn.get_parameters().items()):
            number = zlib.crc32(parameter.d.tobytes(), zlib.crc32(name.encode(), number))
        halves = {"high": float(number >> 16), "low": float(number & 0xffff)}      # exact in float32
        if self.mean(halves) != halves:
            raise helper.UserError(says)


def connect(where, device_id):
    """Set nnabla's context as context.set_context does, and return the World of this process.

    Each of several processes takes the GPU with its local rank. Raises UserError if the processes were started by
    another MPI, if one has no GPU, or if NCCL or Open MPI's library is missing.
    """
    here = launched()
    if here.size == 1:
        for name in ("PMI_SIZE", "SLURM_STEP_NUM_TASKS"):
            if "OMPI_COMM_WORLD_SIZE" not in os.environ and os.environ.get(name, "1") not in ("", "1"):
                raise helper.UserError(f"{name} says that there are {os.environ[name]} processes, but they were not "
                                       "started by Open MPI's mpirun, which nnabla's communicator requires; see "
                                       "docs/multi-gpu.md")
        context.set_context(where, device_id)
        return World()
    if where == "cpu":
        raise helper.UserError(f"--context cpu with {here.size} processes: nnabla connects processes on GPUs only; on "
                               "the CPU, one process uses all cores, so start it without mpirun")
    if device_id != "0":
        raise helper.UserError(f"--device-id {device_id} with {here.size} processes: each takes the GPU with its own "
                               "number; leave it out, and choose GPUs with CUDA_VISIBLE_DEVICES")
    point_to_libraries()
    chosen, why = context.gpu_or_reason(here.local_size - 1)
    if chosen == "cpu":
        raise helper.UserError(f"mpirun started {here.local_size} processes on {socket.gethostname()}, one per GPU: "
                               f"{why}; start fewer (mpirun -n) or fix that")
    context.set_context("cudnn", here.local_rank)
    communicator = nccl_communicator(here)
    print(f"{here.size} processes, {here.local_size} of them on {socket.gethostname()}")
    if hasattr(os, "sched_getaffinity") and len(os.sched_getaffinity(0)) < min(2, os.cpu_count()):
        print("notice: mpirun has bound each process to one core, which slows steps down; use mpirun --bind-to none")
    return World(here.rank, here.size, communicator)


def nccl_communicator(here):
    """Return nnabla's communicator, connected to all processes; here: from launched().

    Raises UserError if a library is missing, or if libmpi.so does not belong to the mpirun that started us.
    """
    try:
        import nnabla.communicators
        communicator = nnabla.communicators.MultiProcessDataParallelCommunicator(nn.get_current_context())
        communicator.init()
    except Exception as error:      # nnabla raises an exception class of its own if a library is missing
        lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        raise helper.UserError(f"nnabla's communicator cannot be set up: {lines[-1].strip()}; it needs Open MPI's "
                               "libmpi.so and NCCL's libnccl.so.2, found by OMPI_HOME and NCCL_HOME, and nnabla 1.31 "
                               "or newer; see docs/multi-gpu.md") from error
    if (communicator.rank, communicator.size) != (here.rank, here.size):
        raise helper.UserError(f"mpirun started {here.size} processes, but the libmpi.so that nnabla loads finds "
                               f"{communicator.size}: it belongs to another installation; set OMPI_HOME to mpirun's, "
                               "see docs/multi-gpu.md")
    return communicator


def point_to_libraries():
    """Set OMPI_HOME and NCCL_HOME, unless they are set, to the places where the libraries are found.

    nnabla's extension loads lib/libmpi.so and lib/libnccl.so.2 from there. The first is looked for beside mpirun and
    where Debian puts it, the second in the Python package nvidia-nccl-cu12.
    """
    mpirun = shutil.which("mpirun") or "/usr/bin/mpirun"
    places = {"OMPI_HOME": ("libmpi.so", [Path(mpirun).resolve().parent.parent, Path(mpirun).parent.parent,
                                          Path("/usr/lib/x86_64-linux-gnu/openmpi")]),
              "NCCL_HOME": ("libnccl.so.2", [Path(folder) / "nvidia" / "nccl" for folder in sys.path])}
    for variable, (library, homes) in places.items():
        for home in homes:
            if (home / "lib" / library).exists():
                os.environ.setdefault(variable, str(home))
                break


def run(main):
    """Run a script's `main()` as helper.run does; of several processes, only the first one prints.

    If all processes fail with the same error, only the first prints it: the others wait, and mpirun kills them. A
    process that fails alone prints its own error.
    """
    here = launched()
    if here.size == 1:
        return helper.run(main)
    stderr = sys.stderr
    if here.rank:
        sys.stdout, sys.stderr = open(os.devnull, "w"), io.StringIO()
    try:
        return helper.run(main)
    except SystemExit as ended:
        if ended.code in (None, 0) or ended.code > 128:     # --help or a signal; it ends all processes
            raise
        status = ended.code
    except Exception:
        traceback.print_exc()
        status = 1
    if here.rank:
        time.sleep(PATIENCE * min(here.rank, 10))       # lower ranks may print the same error
        print(f"process {here.rank} of {here.size}, on {socket.gethostname()}: {sys.stderr.getvalue()}", end="",
              file=stderr)
    for stream in (sys.stdout, stderr):
        stream.flush()
    os._exit(status)    # skip MPI's finalisation, which would wait for processes that wait for this one
