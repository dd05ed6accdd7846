"""The two networks of the paper (section 5.1): every constant, size and input, for all backends."""
from typing import Callable, Protocol, Sequence, Tuple, TypeVar

import numpy as np

# The paper's frequencies: of a point's encoding (39 columns), and of the view direction's (27 columns).
POSITION_BANDS, VIEW_BANDS = 6, 4
SKIP_LAYER = 4          # its input is [h, gamma(x)] / sqrt(2)
SOFTPLUS_BETA = 100.0
RENDERING_LAYERS = 5
OPTIONAL_INPUTS = ("view", "normal", "feature")     # of the renderer, in their order; network.without may name them
LEAST_SLOPE = 1e-6      # n . v in the differentiable hit: a smaller one is float32's rounding


class Network(Protocol):
    """What is taken of a configuration's network section."""
    width: int
    feature: int
    layers: int
    position_bands: int
    view_bands: int
    without: Sequence[str]


Values = TypeVar("Values")      # np.ndarray or nn.Variable


def encoded_columns(bands: int) -> int:
    """Return the number of columns of gamma(x), an encoding of three coordinates: 3 + 6 bands."""
    return 3 + 6 * bands


def encoded_bands(columns: int) -> int:
    """Return the bands of an encoding of so many columns."""
    return (columns - 3) // 6


def has_skip(layer: int, num_layers: int) -> bool:
    """Return whether `layer` of an implicit network of that many affine layers takes the encoded point in once more."""
    return layer == SKIP_LAYER and layer < num_layers - 1


def renderer_inputs(net: Network) -> dict:
    """Return {name: columns} of the renderer's inputs, in their order."""
    columns = dict(zip(OPTIONAL_INPUTS, (encoded_columns(net.view_bands), 3, net.feature)))
    return {"point": 3, **{name: columns[name] for name in OPTIONAL_INPUTS if name not in net.without}}


def used_columns(without: Sequence[str], implicit: Sequence, rendering: Sequence) -> Tuple[int, int, int]:
    """Return how many of a renderer's input columns are of each of OPTIONAL_INPUTS, 0 of those that it is without.

    implicit, rendering: (in, out) of each layer of both networks.
    """
    normal = 3 * ("normal" not in without)
    feature = (int(implicit[-1][1]) - 1) * ("feature" not in without)
    return int(rendering[0][0]) - 3 - normal - feature, normal, feature


def layer_sizes(net: Network) -> dict:
    """Return {parameter scope: (in, out)} of every affine layer: implicit/0, ..., rendering/4."""
    encoded, sizes = encoded_columns(net.position_bands), {}
    for layer in range(net.layers):
        inputs = encoded if layer == 0 else net.width
        outputs = 1 + net.feature if layer == net.layers - 1 else net.width
        sizes[f"implicit/{layer}"] = (inputs, outputs - encoded if has_skip(layer + 1, net.layers) else outputs)
    for layer in range(RENDERING_LAYERS):
        inputs = sum(renderer_inputs(net).values()) if layer == 0 else net.width
        sizes[f"rendering/{layer}"] = (inputs, 3 if layer == RENDERING_LAYERS - 1 else net.width)
    return sizes


def parameter_shapes(net: Network) -> dict:
    """Return {name: shape} of all parameters; a layer has v (in, out), its scale g (out,) and its bias b (out,)."""
    shapes = {}
    for scope, (inputs, outputs) in layer_sizes(net).items():
        shapes.update({f"{scope}/v": (inputs, outputs), f"{scope}/g": (outputs,), f"{scope}/b": (outputs,)})
    return shapes


def array_sizes(layers: Sequence[tuple]) -> np.ndarray:
    """Return (in, out) of each of some layers (v, g, b), as an int array (L, 2)."""
    return np.array([v.shape for v, _, _ in layers])


def inverse_slope(slope: Values, least: float, maximum: Callable = np.maximum) -> Values:
    """Return 1 / slope for a ray's slope n . v, without a division by zero; an array or a Variable of any shape.

    Where |slope| is less than `least`, the inverse falls linearly to 0, with the slope's sign. maximum(values, number):
    the larger one of each; nnabla's for a Variable.
    """
    return slope / maximum(slope * slope, least ** 2)
