"""The networks on the CPU as nnabla sees them, with cpu_kernels.py inside.

gpu.py offers the same names for a GPU: folded_weights, implicit, rendering, Sdf. network.py chooses.
"""
import ctypes
import sys
from types import ModuleType
from typing import List, Tuple

import nnabla as nn
import numpy as np
from nnabla.function import PythonFunction

from backends import cpu_kernels
from backends.architecture import array_sizes
from backends.cpu_kernels import Weights

Layers = List[Tuple[nn.Variable, nn.Variable, nn.Variable]]     # v (in, out), g (out,) and b (out,) of each layer


# --- this process -----------------------------------------------------------------------------------------------------

def set_up() -> None:
    """Prepare this process for the kernels: BLAS on one thread, freed memory kept, and nnabla's module look-ups
    answered at once.

    Scripts call it once, through context.set_context. Without it everything works, but slower.
    """
    import nnabla_ext
    import nnabla_ext.cpu
    cpu_kernels.limit_blas_threads()
    keep_freed_memory()
    answer_at_once(nn)
    answer_at_once(nnabla_ext)
    sys.modules.setdefault("nnabla.nnabla_ext.cpu", nnabla_ext.cpu)


def keep_freed_memory() -> None:
    """Make the C library (glibc) keep freed arrays of up to 32 MB for the next ones.

    It would hand them back to the kernel, which clears each page when it is used again: up to a fifth of a step.
    """
    if sys.platform == "linux" and hasattr(ctypes.CDLL(None), "mallopt"):
        trim_threshold, mmap_threshold = -1, -3     # as in malloc.h
        ctypes.CDLL(None).mallopt(trim_threshold, 1 << 30)
        ctypes.CDLL(None).mallopt(mmap_threshold, 1 << 25)


def answer_at_once(module: ModuleType) -> None:
    """Put a stand-in for `module` in sys.modules where nnabla's compiled modules look for it first.

    They import nnabla and nnabla_ext.cpu at every access to an array. They look in their own package first, where these
    are not. Python takes longer for this failing look-up than for the access: 7 of 10 us, 130 times in a step, which is
    a tenth of a small step. The stand-in is no package, so nothing is loaded twice.
    """
    def attribute(name):
        if name.startswith("__"):       # __path__ would make it a package
            raise AttributeError(name)
        setattr(stand_in, name, getattr(module, name))      # so that the next look-up finds it there
        return getattr(module, name)

    stand_in = ModuleType(f"nnabla.{module.__name__}")
    stand_in.__getattr__ = attribute
    sys.modules.setdefault(stand_in.__name__, stand_in)


# --- weights ----------------------------------------------------------------------------------------------------------

class PackedWeights:
    """The weights of layers, a list of Variables (v, g, b), normalised (W = g v / |v|, per output) and packed.

    fold() takes over the current parameters. backward() adds to their gradients.
    """

    def __init__(self, layers: Layers):
        self.layers, self.sizes = layers, array_sizes(layers)
        self.packed = np.empty(((self.sizes[:, 0] + 1) * self.sizes[:, 1]).sum(), np.float32)
        # A parameter is updated and loaded in place. To ask nnabla for its array takes 3 us each time.
        self.values = [parameter.d.ravel() for layer in layers for parameter in layer]
        self.flat = self.norms = None

    def fold(self) -> Weights:
        """Pack the current parameters. The arrays are those of the call before, overwritten."""
        weights = Weights(self.packed, self.sizes)
        # Joined, as each further argument of a compiled function, and each call, takes as long as a layer's work.
        self.flat = np.concatenate(self.values)
        self.norms = cpu_kernels.fold(self.flat, weights)
        return weights

    def backward(self, grad_packed: np.ndarray) -> None:
        """Add to the parameters' gradients, once after each fold().

        grad_packed: the loss's gradient with respect to the packed weights, in parts (parts, P) to be summed.
        """
        gradient, start = cpu_kernels.fold_backward(self.flat, self.norms, Weights(grad_packed, self.sizes)), 0
        for parameter in (parameter for layer in self.layers for parameter in layer):
            own, start = parameter.g, start + parameter.size
            own += gradient[start - parameter.size:start].reshape(own.shape)
        self.flat = self.norms = None


def folded_weights(layers: Layers) -> PackedWeights:
    """Return the PackedWeights of layers, a list of Variables (v, g, b): W = g v / |v|, per output."""
    return PackedWeights(layers)


# --- functions of nnabla's graphs -------------------------------------------------------------------------------------

class CpuFunction(PythonFunction):
    """A nnabla function whose forward and backward passes take and give NumPy arrays, in the current context.

    The network's parameters are no inputs: in each forward pass, nnabla takes 9 us for each input of a function in
    Python. The passes take them from weights, a PackedWeights.
    """

    def __init__(self, weights: PackedWeights):
        super().__init__(nn.get_current_context())
        self.weights, self.sizes = weights, weights.sizes

    @property
    def name(self):
        return type(self).__name__

    def grad_depends_output_data(self, i, o):
        return True

    def grad_depends_input_data(self, i, j):
        return True


class ImplicitFunction(CpuFunction):
    """Input: points (N, 3). Outputs: sdf (N, 1), feature (N, F) and normal (N, 3).

    It has no backward pass: training/cpu_step.py has that of a training.
    """

    def min_outputs(self):
        return 3

    def setup_impl(self, inputs, outputs):
        for output, columns in zip(outputs, (1, self.sizes[-1, 1] - 1, 3)):
            output.reset_shape((inputs[0].shape[0], columns), True)

    def forward_impl(self, inputs, outputs):
        output, normals = cpu_kernels.implicit_forward(inputs[0].data.data, self.weights.fold())
        for target, result in zip(outputs, (output[:, :1], output[:, 1:], normals)):
            target.data.data[...] = result


class RenderingFunction(CpuFunction):
    """Input: the renderer's input. Output: rgb. It has no backward pass either."""

    def min_outputs(self):
        return 1

    def setup_impl(self, inputs, outputs):
        outputs[0].reset_shape((inputs[0].shape[0], 3), True)

    def forward_impl(self, inputs, outputs):
        cpu_kernels.rendering_forward(inputs[0].data.data, self.weights.fold(), outputs[0].data.data)


def implicit(x: nn.Variable, weights: PackedWeights) -> Tuple[nn.Variable, nn.Variable, nn.Variable]:
    """As network.implicit; weights: a PackedWeights."""
    return ImplicitFunction(weights)(x)


def rendering(h: nn.Variable, weights: PackedWeights) -> nn.Variable:
    """Return the renderer's rgb (N, 3) of its joined inputs h (N, in); weights: a PackedWeights."""
    return RenderingFunction(weights)(h)


# --- the sdf without gradient -----------------------------------------------------------------------------------------

class Sdf:
    """The sdf of layers, a list of Variables (v, g, b), as network.sdf_evaluator describes it."""

    half_precision = search = None

    def __init__(self, layers: Layers):
        self.weights = PackedWeights(layers)
        self.refresh()

    def refresh(self) -> None:
        self.folded = self.weights.fold()

    def __call__(self, points: np.ndarray) -> np.ndarray:
        return cpu_kernels.implicit_sdf(points, self.folded)
