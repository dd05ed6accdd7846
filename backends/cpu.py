"""The networks on the CPU as nnabla sees them, with cpu_kernels.py inside.

gpu.py offers the same names for a GPU: folded_weights, implicit, rendering, SurfaceEvaluation, Sdf. network.py chooses.
"""
import ctypes
import sys
from types import ModuleType
from typing import List, Tuple

import nnabla as nn
import numpy as np
from nnabla.function import PythonFunction

from backends import cpu_kernels
from backends.architecture import array_sizes, inverse_slope
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
        self.arrays = self.norms = None

    def fold(self) -> Weights:
        """Pack the current parameters. The arrays are those of the call before, overwritten."""
        weights = Weights(self.packed, self.sizes)
        self.arrays = [tuple(p.d for p in layer) for layer in self.layers]      # kept, since each access takes time
        self.norms = [cpu_kernels.fold(layer, weights, k) for k, layer in enumerate(self.arrays)]
        return weights

    def backward(self, grad_packed: np.ndarray) -> None:
        """Add to the parameters' gradients, once after each fold().

        grad_packed: the loss's gradient with respect to the packed weights, in parts (parts, P) to be summed.
        """
        for k, ((v, g, _), norm, layer) in enumerate(zip(self.arrays, self.norms, self.layers)):
            gradients = Weights(grad_packed, self.sizes)
            cpu_kernels.fold_backward((v, g, norm), gradients, k, tuple(p.g for p in layer))
        self.arrays = self.norms = None


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

    It has no backward pass: in training, SurfaceEvaluation takes its place.
    """

    def min_outputs(self):
        return 3

    def setup_impl(self, inputs, outputs):
        for output, columns in zip(outputs, (1, self.sizes[-1, 1] - 1, 3)):
            output.reset_shape((inputs[0].shape[0], columns), True)

    def forward_impl(self, inputs, outputs):
        output, normals, _ = cpu_kernels.implicit_forward(inputs[0].data.data, self.weights.fold())
        for target, result in zip(outputs, (output[:, :1], output[:, 1:], normals)):
            target.data.data[...] = result


class RenderingFunction(CpuFunction):
    """Input: the renderer's input. Output: rgb. The backward pass also adds to the gradients of the parameters."""

    def min_outputs(self):
        return 1

    def setup_impl(self, inputs, outputs):
        outputs[0].reset_shape((inputs[0].shape[0], 3), True)

    def forward_impl(self, inputs, outputs):
        self.folded = self.weights.fold()
        self.kept = cpu_kernels.rendering_forward(inputs[0].data.data, self.folded, outputs[0].data.data)

    def backward_impl(self, inputs, outputs, propagate_down, accum):
        rgb, grad_rgb = outputs[0].data.data, outputs[0].grad.data
        grad_input, grad_packed = cpu_kernels.rendering_backward(self.kept, self.folded, rgb, grad_rgb)
        self.weights.backward(grad_packed)
        self.kept, target = None, inputs[0].grad.data
        target[...] = target + grad_input if accum[0] else grad_input


def implicit(x: nn.Variable, weights: PackedWeights) -> Tuple[nn.Variable, nn.Variable, nn.Variable]:
    """As network.implicit; weights: a PackedWeights."""
    return ImplicitFunction(weights)(x)


def rendering(h: nn.Variable, weights: PackedWeights) -> nn.Variable:
    """Return the renderer's rgb (N, 3) of its joined inputs h (N, in); weights: a PackedWeights."""
    return RenderingFunction(weights)(h)


# --- the evaluation of a training step --------------------------------------------------------------------------------

class SurfaceEvaluation:
    """The implicit network at a step's points, and at the differentiable hits of its first rays (equation 3).

    layers: the network's parameters, Variables (v, g, b). points: (N, 3) Variable. directions: (S, 3) Variable, of the
    first S points' rays.
    Leaves for the graph of the losses, filled by forward(): sdf (N, 1), normal (N, 3); and of the S rays hit (S, 3),
    hit_normal (S, 3) and hit_feature (S, F), each None where S is 0. backward() carries the leaves' gradients back and
    adds to those of the parameters.

    A hit has the value of its point, so one evaluation serves both. least_slope: of architecture.inverse_slope.
    """

    def __init__(self, layers: Layers, points: nn.Variable, directions: nn.Variable, want_grad_points: bool,
                 least_slope: float):
        self.least_slope = least_slope
        self.weights, self.points, self.directions = PackedWeights(layers), points, directions
        rows, num_hits, num_features = points.shape[0], directions.shape[0], self.weights.sizes[-1, 1] - 1
        self.sdf, self.normal = (nn.Variable((rows, columns), need_grad=True) for columns in (1, 3))
        self.hit = self.hit_normal = self.hit_feature = None
        if num_hits:
            self.hit, self.hit_normal, self.hit_feature = (
                nn.Variable((num_hits, columns), need_grad=True) for columns in (3, 3, num_features))

    def leaves(self) -> List[nn.Variable]:
        return [leaf for leaf in (self.sdf, self.normal, self.hit, self.hit_normal, self.hit_feature) if leaf]

    def forward(self) -> None:
        """Compute the leaves from the current parameters and points."""
        x, num_hits = self.points.d, self.directions.shape[0]
        self.folded = self.weights.fold()
        output, self.normals, self.kept = cpu_kernels.implicit_forward(x, self.folded, num_hits)
        results = output[:, :1], self.normals, x[:num_hits], self.normals[:num_hits], output[:num_hits, 1:]
        for leaf, result in zip(self.leaves(), results):
            leaf.d = result
            leaf.grad.zero()

    def backward(self) -> None:
        """Add the loss's gradients to those of the parameters, once its graph has given the leaves theirs."""
        grad_sdf, grad_normals, *grad_hits = (leaf.g for leaf in self.leaves())
        if not grad_hits:
            grad_hits = [np.empty((0, columns), np.float32) for columns in (3, 3, self.folded.sizes[-1, 1] - 1)]
        v = self.directions.d
        moves = -v * inverse_slope((v * self.normals[:len(v)]).sum(axis=1, keepdims=True), self.least_slope)
        self.grads = cpu_kernels.Gradients(grad_sdf.copy(), grad_normals, grad_hits[0].copy(), *grad_hits[1:], moves)
        self.weights.backward(cpu_kernels.implicit_backward(self.kept, self.folded, self.grads))
        self.kept = None

    def grad_points(self) -> np.ndarray:
        """Return the loss's gradient with respect to the points (N, 3), after backward().

        A ray's point takes its hit along, and its sdf changes by normal . movement. The part that comes through the
        normal's loss is left out.
        """
        grad = self.grads.sdf * self.normals
        grad[:len(self.grads.hits)] += self.grads.hits
        return grad


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
