"""The networks on the CPU as nnabla sees them, with cpu_kernels.py inside.

gpu.py offers the same names for a GPU: folded_weights, implicit, rendering, SurfaceEvaluation, Sdf. network.py chooses.
"""
import sys
from collections import namedtuple
from types import ModuleType
from typing import List, Tuple

import nnabla as nn
import numpy as np
from nnabla.function import PythonFunction

from backends import cpu_kernels
from backends.architecture import array_sizes, inverse_slope

Layers = List[Tuple[nn.Variable, nn.Variable, nn.Variable]]     # v (in, out), g (out,) and b (out,) of each layer

# A network's weights as one Variable, and (in, out) of each of its layers, an array (L, 2).
PackedWeights = namedtuple("PackedWeights", "packed sizes")


# --- this process -----------------------------------------------------------------------------------------------------

def set_up() -> None:
    """Prepare this process for the kernels: BLAS on one thread, and nnabla's module look-ups answered at once.

    Scripts call it once, through context.set_context. Without it everything works, but slower.
    """
    import nnabla_ext
    import nnabla_ext.cpu
    cpu_kernels.limit_blas_threads()
    answer_at_once(nn)
    answer_at_once(nnabla_ext)
    sys.modules.setdefault("nnabla.nnabla_ext.cpu", nnabla_ext.cpu)


def answer_at_once(module: ModuleType) -> None:
    """Put a stand-in for `module` in sys.modules where nnabla's compiled modules look for it first.

    They import nnabla and nnabla_ext.cpu at every access to an array. They look in their own package first, where these
    are not. Python takes longer for this failing look-up than for the access: 7 of 10 us, 130 times in a step, which is
    a tenth of a small step. The stand-in is no package, so nothing is loaded twice.
    """
    def attribute(name):
        if name.startswith("__"):       # __path__ would make it a package
            raise AttributeError(name)
        return getattr(module, name)

    stand_in = ModuleType(f"nnabla.{module.__name__}")
    stand_in.__getattr__ = attribute
    sys.modules.setdefault(stand_in.__name__, stand_in)


# --- weights ----------------------------------------------------------------------------------------------------------

def packed_arrays(v: List[np.ndarray], g: List[np.ndarray], b: List[np.ndarray]) -> Tuple[np.ndarray, List[np.ndarray]]:
    """Return the packed weights of the layers whose arrays these three lists hold, and |v| (out,) of each layer."""
    norms = [np.linalg.norm(array, axis=0) for array in v]
    return cpu_kernels.pack(zip(map(cpu_kernels.fold, v, g, norms), b)), norms


def unpacked_gradients(v: List[np.ndarray], g: List[np.ndarray], norms: List[np.ndarray], grad_packed: np.ndarray,
                       sizes: np.ndarray) -> List[np.ndarray]:
    """Return the gradients of v, g, b, v, g, b, ... from that of the packed weights."""
    gradients = []
    for layer, (grad_w, grad_b) in zip(zip(v, g, norms), cpu_kernels.unpack(grad_packed, sizes)):
        gradients += [*cpu_kernels.fold_backward(*layer, grad_w), grad_b]
    return gradients


def folded_weights(layers: Layers) -> PackedWeights:
    """Return the PackedWeights of layers, a list of Variables (v, g, b), for a graph: W = g v / |v|, per output."""
    sizes = array_sizes(layers)
    return PackedWeights(FoldFunction(sizes)(*(p for layer in layers for p in layer)), sizes)


# --- functions of nnabla's graphs -------------------------------------------------------------------------------------

class CpuFunction(PythonFunction):
    """A nnabla function whose forward and backward passes take and give NumPy arrays, in the current context."""

    def __init__(self, sizes: np.ndarray):
        super().__init__(nn.get_current_context())
        self.sizes = sizes      # (in, out) of each of the network's layers, an array (L, 2)

    @property
    def name(self):
        return type(self).__name__

    def grad_depends_output_data(self, i, o):
        return False

    def grad_depends_input_data(self, i, j):
        return True

    @staticmethod
    def hand_back(inputs: list, gradients: list, propagate_down: list, accum: list) -> None:
        """Write each gradient where nnabla wants it, or add it there."""
        for variable, gradient, wanted, add in zip(inputs, gradients, propagate_down, accum):
            if wanted:
                target = variable.grad.data
                target[...] = target + gradient if add else gradient


class FoldFunction(CpuFunction):
    """Inputs: v, g, b, v, g, b, ... Output: the packed weights."""

    def min_outputs(self):
        return 1

    def setup_impl(self, inputs, outputs):
        outputs[0].reset_shape((int(((self.sizes[:, 0] + 1) * self.sizes[:, 1]).sum()),), True)

    def forward_impl(self, inputs, outputs):
        self.arrays = [i.data.data for i in inputs]         # kept for backward_impl, since each access takes time
        outputs[0].data.data[...], self.norms = packed_arrays(*(self.arrays[part::3] for part in range(3)))

    def backward_impl(self, inputs, outputs, propagate_down, accum):
        v, g = self.arrays[0::3], self.arrays[1::3]
        gradients = unpacked_gradients(v, g, self.norms, outputs[0].grad.data, self.sizes)
        self.arrays = self.norms = None
        self.hand_back(inputs, gradients, propagate_down, accum)


class ImplicitFunction(CpuFunction):
    """Inputs: points (N, 3) and the packed weights. Outputs: sdf (N, 1), feature (N, F) and normal (N, 3).

    It has no backward pass: in training, SurfaceEvaluation takes its place.
    """

    def min_outputs(self):
        return 3

    def setup_impl(self, inputs, outputs):
        for output, columns in zip(outputs, (1, self.sizes[-1, 1] - 1, 3)):
            output.reset_shape((inputs[0].shape[0], columns), True)

    def forward_impl(self, inputs, outputs):
        output, normals, _ = cpu_kernels.implicit_forward(*(i.data.data for i in inputs), self.sizes)
        for target, result in zip(outputs, (output[:, :1], output[:, 1:], normals)):
            target.data.data[...] = result


class RenderingFunction(CpuFunction):
    """Inputs: the renderer's input and the packed weights. Output: rgb."""

    def min_outputs(self):
        return 1

    def setup_impl(self, inputs, outputs):
        outputs[0].reset_shape((inputs[0].shape[0], 3), True)

    def grad_depends_output_data(self, i, o):
        return True

    def forward_impl(self, inputs, outputs):
        h, packed = (i.data.data for i in inputs)
        outputs[0].data.data[...], self.saved = cpu_kernels.rendering_forward(h, packed, self.sizes)

    def backward_impl(self, inputs, outputs, propagate_down, accum):
        gradients = cpu_kernels.rendering_backward(
            self.saved, inputs[1].data.data, self.sizes, outputs[0].data.data, outputs[0].grad.data)
        self.saved = None
        self.hand_back(inputs, gradients, propagate_down, accum)


def implicit(x: nn.Variable, weights: PackedWeights) -> Tuple[nn.Variable, nn.Variable, nn.Variable]:
    """As network.implicit; weights: a PackedWeights."""
    return ImplicitFunction(weights.sizes)(x, weights.packed)


def rendering(h: nn.Variable, weights: PackedWeights) -> nn.Variable:
    """Return the renderer's rgb (N, 3) of its joined inputs h (N, in); weights: a PackedWeights."""
    return RenderingFunction(weights.sizes)(h, weights.packed)


# --- the evaluation of a training step --------------------------------------------------------------------------------

class SurfaceEvaluation:
    """The implicit network at a step's points, and at the differentiable hits of its first rays (equation 3).

    layers: the network's parameters, Variables (v, g, b). points: (N, 3) Variable. directions: (S, 3) Variable, of the
    first S points' rays.
    Leaves for the graph of the losses, filled by forward(): sdf (N, 1), normal (N, 3); and of the S rays hit (S, 3),
    hit_normal (S, 3) and hit_feature (S, F), each None where S is 0. backward() carries the leaves' gradients back and
    adds to those of the parameters.

    A hit has the value of its point, so one evaluation serves both.
    """

    def __init__(self, layers: Layers, points: nn.Variable, directions: nn.Variable, want_grad_points: bool = False):
        self.layers, self.points, self.directions = layers, points, directions
        self.sizes, (rows, num_hits) = array_sizes(layers), (points.shape[0], directions.shape[0])
        self.sdf, self.normal = (nn.Variable((rows, columns), need_grad=True) for columns in (1, 3))
        self.hit = self.hit_normal = self.hit_feature = None
        if num_hits:
            self.hit, self.hit_normal, self.hit_feature = (
                nn.Variable((num_hits, columns), need_grad=True) for columns in (3, 3, self.sizes[-1, 1] - 1))

    def leaves(self) -> List[nn.Variable]:
        return [leaf for leaf in (self.sdf, self.normal, self.hit, self.hit_normal, self.hit_feature) if leaf]

    def forward(self) -> None:
        """Compute the leaves from the current parameters and points."""
        self.arrays = [[p.d for p in part] for part in zip(*self.layers)]      # kept, since each access takes time
        self.packed, self.norms = packed_arrays(*self.arrays)
        x, num_hits = self.points.d, self.directions.shape[0]
        output, self.normals, self.saved = cpu_kernels.implicit_forward(x, self.packed, self.sizes, num_hits)
        results = output[:, :1], self.normals, x[:num_hits], self.normals[:num_hits], output[:num_hits, 1:]
        for leaf, result in zip(self.leaves(), results):
            leaf.d = result
            leaf.grad.zero()

    def backward(self) -> None:
        """Add the loss's gradients to those of the parameters, once its graph has given the leaves theirs."""
        grad_sdf, grad_normals, *grad_hits = (leaf.g for leaf in self.leaves())
        hits = None
        if grad_hits:
            directions = self.directions.d
            slopes = (directions * self.normals[:len(directions)]).sum(axis=1)
            hits = cpu_kernels.Hits(directions, inverse_slope(slopes), *grad_hits)
        grad_packed, self.grad_sdf, self.grad_hits = cpu_kernels.implicit_backward(
            self.saved, self.packed, self.sizes, grad_sdf, grad_normals, hits)
        v, g, _ = self.arrays
        gradients = unpacked_gradients(v, g, self.norms, grad_packed, self.sizes)
        for parameter, gradient in zip((p for layer in self.layers for p in layer), gradients):
            parameter.g += gradient
        self.saved = self.arrays = self.norms = None

    def grad_points(self) -> np.ndarray:
        """Return the loss's gradient with respect to the points (N, 3), after backward().

        A ray's point takes its hit along, and its sdf changes by normal . movement. The part that comes through the
        normal's loss is left out.
        """
        grad = self.grad_sdf * self.normals
        if self.grad_hits is not None:
            grad[:len(self.grad_hits)] += self.grad_hits
        return grad


# --- the sdf without gradient -----------------------------------------------------------------------------------------

class Sdf:
    """The sdf of layers, a list of Variables (v, g, b), as network.sdf_evaluator describes it."""

    half_precision = None

    def __init__(self, layers: Layers):
        self.layers, self.sizes = layers, array_sizes(layers)
        self.refresh()

    def refresh(self) -> None:
        self.packed, _ = packed_arrays(*zip(*([p.d for p in layer] for layer in self.layers)))

    def __call__(self, points: np.ndarray) -> np.ndarray:
        return cpu_kernels.implicit_sdf(points, self.packed, self.sizes)
