"""Where nnabla computes: on the CPU or a GPU, with the CUDA libraries that it needs."""
import contextlib
import ctypes
import sys
from pathlib import Path

import nnabla as nn
from nnabla.ext_utils import get_extension_context
from nnabla.logger import logger

from backends import cpu
from helper import UserError


def set_context(context, device_id):
    """Make `context` ("auto", "cpu" or "cudnn") nnabla's default and prepare this process for it.

    Every script that runs a network calls this once, at its start. Returns "cpu" or "cudnn". Raises UserError where the
    GPU is asked for and not there.
    """
    logger.setLevel("WARNING")      # nnabla would tell of every file saved, in the midst of the progress bar
    cpu.set_up()
    chosen, why = "cpu", ""
    if context != "cpu":
        chosen, why = gpu_or_reason(device_id)
        if context == "cudnn" and chosen == "cpu":
            raise UserError(f"--context cudnn: {why}; use --context cpu or mend that")
    nn.set_default_context(get_extension_context(chosen, device_id=str(device_id)))
    print(f"computing on {'GPU ' + str(device_id) if chosen == 'cudnn' else 'the CPU'}" + (f": {why}" if why else ""))
    return chosen


def gpu_or_reason(device_id):
    """Return ("cudnn", "") where nnabla can use that GPU, else ("cpu", one line that says why not)."""
    why = driver_complaint()
    if why:
        return "cpu", why
    load_cuda_libraries()
    try:
        import nnabla_ext.cudnn
    except ModuleNotFoundError:
        return "cpu", "nnabla's CUDA extension is not installed (requirements-gpu.txt names it)"
    except Exception as error:      # a library that is missing, a GPU that the extension calls unfit, ...
        return "cpu", f"nnabla's CUDA extension does not load: {str(error).splitlines()[0]} (see README.md)"
    try:
        count = nnabla_ext.cudnn.get_device_count()
        if not str(device_id).isdigit() or int(device_id) >= count:
            return "cpu", f"there is no CUDA device {device_id} (found {count})"
        nnabla_ext.cudnn.context(str(device_id))    # it asks another of the driver's libraries for the GPU's name
    except Exception as error:  # the extension raises what CUDA says, in a class of its own
        return "cpu", f"no usable CUDA device: {str(error).splitlines()[-1].rstrip('.')}"
    return "cudnn", ""


def driver_complaint():
    """Return what keeps the NVIDIA driver from offering a GPU, in one line, or "" where it offers one.

    The driver is asked first: without it, or without a device, nnabla's CUDA extension tells of several failures.
    """
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return "there is no NVIDIA driver, libcuda.so.1 (install it; in Docker, run with --gpus all)"
    status, said = driver.cuInit(0), ctypes.c_char_p()
    if status == 0:
        return ""
    driver.cuGetErrorString(status, ctypes.byref(said))
    reason = (said.value or b"error %d" % status).decode()
    return f"the NVIDIA driver offers no GPU: {reason} (see nvidia-smi and CUDA_VISIBLE_DEVICES)"


# What nnabla-ext-cuda120 links to, and what that needs in turn, each after what it needs itself.
CUDA_LIBRARIES = ("libcudart.so.12", "libcublasLt.so.12", "libcublas.so.12", "libnvJitLink.so.12", "libcusparse.so.12",
                  "libcusolver.so.11", "libcurand.so.10", "libcufft.so.11", "libcudnn.so.8")


def load_cuda_libraries():
    """Load CUDA 12's libraries from the nvidia-*-cu12 packages, where they are installed.

    The linker does not look there, but it takes a library of the right name that is loaded already; so the user need
    not set LD_LIBRARY_PATH. What is in no package (CUDA's own installation, the Docker image) is left to the linker.
    """
    for name in CUDA_LIBRARIES:
        found = [path for folder in sys.path for path in Path(folder).glob(f"nvidia/*/lib/{name}")]
        with contextlib.suppress(OSError):      # the extension's import says what is missing
            if found:
                ctypes.CDLL(str(found[0]), ctypes.RTLD_GLOBAL)
