"""Choose nnabla's device, the CPU or a GPU, and load the CUDA libraries that a GPU needs."""
import contextlib
import ctypes
import sys
from pathlib import Path
from types import ModuleType
from typing import Optional, Tuple

import nnabla as nn
from nnabla.ext_utils import get_extension_context
from nnabla.logger import logger

from backends import cpu
from helper import UserError

cuda: Optional[ModuleType] = None      # backends/cuda.py, once set_context has found that it works on the GPU


def set_context(context: str, device_id: str) -> str:
    """Make `context` ("auto", "cpu" or "cudnn") nnabla's default and prepare this process for it.

    Every script that runs a network calls this once, at its start. Returns "cpu" or "cudnn". Raises UserError if
    "cudnn" is requested and there is no usable GPU.
    """
    logger.setLevel("WARNING")      # otherwise nnabla logs every saved file, in the middle of the progress bar
    cpu.set_up()
    chosen, why = "cpu", ""
    if context != "cpu":
        chosen, why = gpu_or_reason(device_id)
        if context == "cudnn" and chosen == "cpu":
            raise UserError(f"--context cudnn: {why}; fix this or use --context cpu")
    nn.set_default_context(get_extension_context(chosen, device_id=str(device_id)))
    where = f"GPU {device_id} {cuda_or_reason(device_id)}" if chosen == "cudnn" else "the CPU"
    print(f"computing on {where}" + (f": {why}" if why else ""))
    return chosen


def cuda_or_reason(device_id: str) -> str:
    """Set `cuda` if CuPy works on this GPU. Return in words what computes the networks there, and why."""
    global cuda
    cuda = None
    try:
        from backends import cuda as module
        module.set_up(device_id)
    except ModuleNotFoundError as error:
        return (f"in nnabla's functions, which CuPy would speed up: {error.name} is not installed "
                "(requirements-gpu.txt lists it)")
    except Exception as error:      # a library that is missing, or too old for the driver or the GPU, ...
        lines = [line.strip() for line in str(error).splitlines() if line.strip(" =")] or [type(error).__name__]
        return f"in nnabla's functions, which CuPy would speed up, but: {lines[-1]}"
    cuda = module
    return "with CuPy"


def gpu_or_reason(device_id: str) -> Tuple[str, str]:
    """Return ("cudnn", "") if nnabla can use this GPU, else ("cpu", the reason in one line)."""
    why = driver_complaint()
    if why:
        return "cpu", why
    load_cuda_libraries()
    try:
        import nnabla_ext.cudnn
    except ModuleNotFoundError:
        return "cpu", "nnabla's CUDA extension is not installed (requirements-gpu.txt lists it)"
    except Exception as error:      # a missing library, an unsupported GPU, ...
        return "cpu", f"nnabla's CUDA extension does not load: {str(error).splitlines()[0]} (see docs/install.md)"
    try:
        count = nnabla_ext.cudnn.get_device_count()
        if not str(device_id).isdigit() or int(device_id) >= count:
            return "cpu", f"there is no CUDA device {device_id} (found {count})"
        nnabla_ext.cudnn.context(str(device_id))    # needs a further library of the driver, for the GPU's name
    except Exception as error:  # the extension wraps CUDA's errors in classes of its own
        return "cpu", f"no usable CUDA device: {str(error).splitlines()[-1].rstrip('.')}"
    return "cudnn", ""


def driver_complaint() -> str:
    """Return in one line why the NVIDIA driver offers no GPU, or "" if it offers one.

    Called before nnabla's CUDA extension is imported, which prints several errors without a driver or a device.
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


# The libraries that nnabla-ext-cuda120 links to, with their dependencies, each after those it depends on; and CuPy's
# compiler.
CUDA_LIBRARIES = ("libcudart.so.12", "libcublasLt.so.12", "libcublas.so.12", "libnvJitLink.so.12", "libcusparse.so.12",
                  "libcusolver.so.11", "libcurand.so.10", "libcufft.so.11", "libcudnn.so.8", "libnvrtc.so.12")


def load_cuda_libraries() -> None:
    """Load CUDA 12's libraries from the nvidia-*-cu12 packages, as far as these are installed.

    The linker does not search these packages, but it accepts a library of the right name that is loaded already. So the
    user need not set LD_LIBRARY_PATH. Libraries in no package (CUDA's own installation, the Docker image) are left to
    the linker.
    """
    for name in CUDA_LIBRARIES:
        found = [path for folder in sys.path for path in Path(folder).glob(f"nvidia/*/lib/{name}")]
        with contextlib.suppress(OSError):      # the extension's import reports missing libraries
            if found:
                ctypes.CDLL(str(found[0]), ctypes.RTLD_GLOBAL)
