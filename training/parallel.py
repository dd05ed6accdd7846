"""Data-parallel training: one process per GPU, started by Open MPI's mpirun, joined by nnabla's communicator (NCCL).

    mpirun -n 4 --bind-to none python train.py --config config/default.yaml

Every process holds the same networks and takes rays of its own; what they share in a step is the mean of their
gradients and of their losses. The first process alone writes and speaks. Without mpirun nothing of this is loaded.
"""
import io
import os
import shutil
import socket
import sys
import time
import traceback
import zlib
from collections import namedtuple
from pathlib import Path

import nnabla as nn
import numpy as np

import helper
from backends import context

PATIENCE = 3.0      # seconds in which mpirun has surely ended the others after one has failed

# The number of this process and how many there are, of all machines and of this one.
Launched = namedtuple("Launched", "rank size local_rank local_size")


def launched():
    """Return what Open MPI's mpirun says of this process, as a Launched; without mpirun it is the one of one."""
    says = (os.environ.get(f"OMPI_COMM_WORLD_{name}", "") for name in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE"))
    return Launched(*(int(value) if value.isdigit() else default for value, default in zip(says, (0, 1, 0, 1))))


class World:
    """The processes of a training. By default a single one, whose means are its own values."""

    def __init__(self, rank=0, size=1, communicator=None):
        self.rank, self.size, self.communicator = rank, size, communicator
        self.writes = rank == 0     # only the first process writes and prints

    def mean_gradients(self):
        """Replace the gradients of nnabla's parameters by their means over the processes.

        Each process has the mean over its own R rays, so this is the gradient of one step over all size * R rays.
        """
        if self.communicator:
            parameters = sorted(nn.get_parameters().items())    # in one order everywhere
            self.communicator.all_reduce([p.grad for _, p in parameters], division=True, inplace=False)

    def mean(self, values):
        """Return {name: number}, the same names in all processes, as means over the processes, in float32.

        A number that is not finite in one process is so in all.
        """
        if not self.communicator:
            return values
        shared = nn.NdArray((len(values),))
        shared.data = np.array(list(values.values()), np.float32)
        self.communicator.all_reduce(shared, division=True, inplace=True)
        return dict(zip(values, shared.data.tolist()))

    def wait(self):
        """Wait until all processes are here."""
        self.mean({"here": 1.0})

    def check_same(self, values, says):
        """Raise UserError, with what it `says`, unless `values` (of any kind that repr tells apart) and nnabla's
        parameters are the same in all processes."""
        if not self.communicator:
            return
        number = zlib.crc32(repr(values).encode())
        for name, parameter in sorted(nn.get_parameters().items()):
            number = zlib.crc32(parameter.d.tobytes(), zlib.crc32(name.encode(), number))
        halves = {"high": float(number >> 16), "low": float(number & 0xffff)}      # float32 holds those
        if self.mean(halves) != halves:
            raise helper.UserError(says)


def connect(where, device_id):
    """Set nnabla's context as context.set_context does, and return the World that this process is in.

    Of several processes each takes the GPU of its number on its machine. Raises UserError where the processes were
    started by another MPI, where one has no GPU, and where NCCL or Open MPI's library is missing.
    """
    here = launched()
    if here.size == 1:
        for name in ("PMI_SIZE", "SLURM_STEP_NUM_TASKS"):
            if "OMPI_COMM_WORLD_SIZE" not in os.environ and os.environ.get(name, "1") not in ("", "1"):
                raise helper.UserError(f"{name} says that there are {os.environ[name]} processes, but they were not "
                                       "started by Open MPI's mpirun, which nnabla's communicator needs (see README.md)")
        context.set_context(where, device_id)
        return World()
    if where == "cpu":
        raise helper.UserError(f"--context cpu with {here.size} processes: nnabla joins processes on GPUs only; on the "
                               "CPU one process takes all cores, so start it without mpirun")
    if device_id != "0":
        raise helper.UserError(f"--device-id {device_id} with {here.size} processes: each takes the GPU of its number "
                               "on its machine; leave it out, and choose GPUs with CUDA_VISIBLE_DEVICES")
    point_to_libraries()
    chosen, why = context.gpu_or_reason(here.local_size - 1)
    if chosen == "cpu":
        raise helper.UserError(f"mpirun started {here.local_size} processes on {socket.gethostname()}, one per GPU: "
                               f"{why}; start fewer (mpirun -n) or mend that")
    context.set_context("cudnn", here.local_rank)
    communicator = nccl_communicator(here)
    print(f"{here.size} processes, this one of {here.local_size} on {socket.gethostname()}")
    if hasattr(os, "sched_getaffinity") and len(os.sched_getaffinity(0)) < min(2, os.cpu_count()):
        print("notice: mpirun has bound each process to one core, which makes a step slower; mpirun --bind-to none")
    return World(here.rank, here.size, communicator)


def nccl_communicator(here):
    """Return nnabla's communicator of all processes, which has met the others; `here` is what launched() gives."""
    try:
        import nnabla.communicators
        communicator = nnabla.communicators.MultiProcessDataParallelCommunicator(nn.get_current_context())
        communicator.init()
    except Exception as error:      # the extension raises what is missing in a class of its own
        lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        raise helper.UserError(f"nnabla's communicator cannot be set up: {lines[-1].strip()}; it needs Open MPI's "
                               "libmpi.so and NCCL's libnccl.so.2, found by OMPI_HOME and NCCL_HOME, and nnabla 1.31 "
                               "or newer (see README.md)")
    if (communicator.rank, communicator.size) != (here.rank, here.size):
        raise helper.UserError(f"mpirun started {here.size} processes, but the libmpi.so that nnabla loads knows of "
                               f"{communicator.size}: it is of another installation than mpirun; set OMPI_HOME to "
                               "mpirun's (see README.md)")
    return communicator


def point_to_libraries():
    """Set OMPI_HOME and NCCL_HOME, where nnabla's extension looks for lib/libmpi.so and lib/libnccl.so.2, where they are
    unset and the libraries lie beside mpirun, at Debian's place or in the package nvidia-nccl-cu12."""
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
    """Call a script's `main()` as helper.run does, where several processes may run it: the first one speaks for all.

    An error that all have is told once. One that another process has alone it tells itself, a little later: mpirun ends
    all processes with the first that fails.
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
        if ended.code in (None, 0) or ended.code > 128:     # --help, or stopped: all of them are
            raise
        status = ended.code
    except Exception:
        traceback.print_exc()
        status = 1
    if here.rank:
        time.sleep(PATIENCE * min(here.rank, 10))       # the ones before it may tell the same
        print(f"process {here.rank} of {here.size}, on {socket.gethostname()}: {sys.stderr.getvalue()}", end="",
              file=stderr)
    for stream in (sys.stdout, stderr):
        stream.flush()
    os._exit(status)    # no farewell to MPI: it would wait for processes that wait for this one
