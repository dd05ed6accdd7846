"""IDR's two networks (Yariv et al., NeurIPS 2020): parameters, initialisation, evaluation. The backends compute them.

The sdf reaches the tracer and the extraction as a plain callable, from sdf_evaluator(), and the colours from shader().
As a script, it draws the zero contour of the initial sdf: `python network.py -Ds 512 -R 0.75`.
"""
import math
import time
from functools import partial
from types import ModuleType
from typing import Callable, List, Optional, Sequence, Tuple, Union

import nnabla as nn
import nnabla.functions as F
import numpy as np

import helper
from backends import architecture, context, cpu, gpu
from backends.architecture import OPTIONAL_INPUTS, array_sizes, encoded_bands, has_skip, used_columns
from backends.gpu import positional_encoding, row_sums
from config import settings
from config.settings import Network
from files import writing

Weights = Union[cpu.PackedWeights, gpu.FoldedWeights]

NETWORKS = ("implicit", "rendering")
SHADED_ON_CPU, SHADED_ON_GPU = 1 << 12, 1 << 14     # points that the networks shade at once
FEWEST_ROWS = 64        # of a shading on a GPU

# --- parameters -------------------------------------------------------------------------------------------------------

parameter_shapes = architecture.parameter_shapes    # offered here, so that the scripts need no backend


def initialize(net: Network, rng: np.random.Generator) -> None:
    """Set nnabla's parameters to fresh networks, the implicit one by the geometric initialisation (SAL, theorem 1).

    net: a configuration's network section. The sdf starts close to that of the sphere of net.radius. Earlier parameters
    are dropped.
    """
    nn.clear_parameters()
    encoded = architecture.encoded_columns(net.position_bands)
    for scope, (inputs, outputs) in architecture.layer_sizes(net).items():
        network, layer = scope.split("/")
        if network == "rendering":
            bound = inputs ** -0.5
            v, b = rng.uniform(-bound, bound, (inputs, outputs)), rng.uniform(-bound, bound, outputs)
        elif int(layer) == net.layers - 1:
            v, b = rng.normal(np.sqrt(np.pi / inputs), 1e-4, (inputs, outputs)), np.full(outputs, -net.radius)
        else:
            v, b = rng.normal(0.0, np.sqrt(2.0 / outputs), (inputs, outputs)), np.zeros(outputs)
            if int(layer) == 0:
                v[3:] = 0.0                     # at first only the raw coordinates count
            elif has_skip(int(layer), net.layers):
                v[3 - encoded:] = 0.0           # and the same for the encoding that joins here
        for name, value in (("v", v), ("g", np.linalg.norm(v, axis=0)), ("b", b)):
            variable = nn.Variable.from_numpy_array(value.astype(np.float32), need_grad=True)
            nn.parameter.set_parameter(f"{scope}/{name}", variable)


def layer_parameters(network: str) -> List[Tuple[nn.Variable, nn.Variable, nn.Variable]]:
    """Return [(v, g, b)] of "implicit" or "rendering": nnabla's parameters as they are."""
    parameters, layers = nn.get_parameters(grad_only=False), []
    while f"{network}/{len(layers)}/v" in parameters:
        layers.append(tuple(parameters[f"{network}/{len(layers)}/{name}"] for name in "vgb"))
    return layers


def folded_weights(network: str) -> Weights:
    """Return the weights of "implicit" or "rendering" for a graph, normalised: W = g v / |v|, per output.

    On the CPU a PackedWeights, on a GPU [(W, b, transposed W)] of Variables, or with CuPy the layers as they are.
    """
    return backend().folded_weights(layer_parameters(network))


# --- the networks in a graph ------------------------------------------------------------------------------------------

def on_cpu() -> bool:
    """Return whether nnabla computes on the CPU, where compiled functions do the heavy work."""
    return nn.get_current_context().backend[0].startswith("cpu")


def renders_at_once() -> int:
    """Return how many views to render at a time. On a GPU three: it works on one while the host works on the others."""
    return 1 if on_cpu() else 3


def backend() -> ModuleType:
    """Return the module whose functions serve nnabla's current context."""
    return cpu if on_cpu() else context.cuda or gpu


def implicit(x: nn.Variable, weights: Weights) -> Tuple[nn.Variable, nn.Variable, nn.Variable]:
    """The implicit network and the gradient of its sdf, the normal, without a backward pass.

    x: (N, 3); weights: folded_weights("implicit").
    Returns sdf (N, 1), positive outside, feature (N, F) and normal (N, 3), which is not normalised.
    """
    return backend().implicit(x, weights)


def rendering(x: nn.Variable, normal: nn.Variable, view: nn.Variable, feature: nn.Variable, weights: Weights,
              without: Sequence[str] = ()) -> nn.Variable:
    """The renderer: rgb (N, 3) in [-1, 1] of surface points.

    x, normal, view: (N, 3) Variables; view is the unit vector from the surface to the camera, and the normal is the
    sdf's gradient as it is; feature: (N, F); weights: folded_weights("rendering"); without: which of OPTIONAL_INPUTS
    the renderer was built without.
    """
    columns = used_columns(without, *(array_sizes(layer_parameters(name)) for name in NETWORKS))[0]
    encoded_view = positional_encoding(view, encoded_bands(columns))[0] if columns else None
    given = [part for name, part in zip(OPTIONAL_INPUTS, (encoded_view, normal, feature)) if name not in without]
    h = F.concatenate(x, *given, axis=1) if given else x
    return backend().rendering(h, weights)


def surface_evaluation(points: nn.Variable, directions: nn.Variable, want_grad_points: bool,
                       least_slope: float) -> gpu.SurfaceEvaluation:
    """Return a GPU's SurfaceEvaluation of the current parameters; see backends/gpu.py."""
    return backend().SurfaceEvaluation(layer_parameters("implicit"), points, directions, want_grad_points, least_slope)


# --- evaluation without gradient --------------------------------------------------------------------------------------

def sdf_evaluator() -> Union[cpu.Sdf, gpu.Sdf]:
    """Return the sdf of the current parameters as a callable, points (N, 3) float32 -> (N,) float32.

    Its refresh() takes over parameters that have changed since. Its half_precision is None, or a faster and less exact
    callable for choosing among samples. Its search is None, or does all of ray_tracer.hit_or_least_sdf's search.
    """
    return backend().Sdf(layer_parameters("implicit"))


def shader(net: Network) -> Callable:
    """Return `shade` for networks of this configuration section: points and directions to rgb and normals."""
    return partial(shade, without=net.without)


def shade(points: np.ndarray, directions: Optional[np.ndarray] = None, without: Sequence[str] = (),
          chunk: Optional[int] = None) -> Tuple[np.ndarray, np.ndarray]:
    """Return the colours and the normals of surface points with the current parameters.

    points, directions: (N, 3) float32, the latter the unit ray directions. Without directions each point is seen along
    its normal. without: as in `rendering`. chunk: how many points at once, None for the usual number.
    Returns rgb (N, 3) in [0, 1] and the sdf's gradient (N, 3), float32.
    """
    rows = min(len(points), chunk or SHADED_ON_CPU)
    if not on_cpu():        # a GPU's kernels are prepared for each number of rows, so these are few
        rows = min(2 ** math.ceil(math.log2(max(len(points), FEWEST_ROWS))), chunk or SHADED_ON_GPU)
    rgb, normals = np.empty((len(points), 3), np.float32), np.empty((len(points), 3), np.float32)
    if not len(points):
        return rgb, normals
    x, view = nn.Variable((rows, 3)), nn.Variable((rows, 3))
    with nn.no_grad():
        _, feature, normal = implicit(x, folded_weights("implicit"))
        if directions is None:
            view = normal / (row_sums(normal * normal) + 1e-12) ** 0.5
        color = rendering(x, normal, view, feature, folded_weights("rendering"), without)
    both = F.sink(color, normal)
    for start in range(0, len(points), rows):
        part = slice(start, min(start + rows, len(points)))
        count = part.stop - start
        x.d[:count] = points[part]
        if directions is not None:
            view.d[:count] = -directions[part]
        both.forward(clear_no_need_grad=False)
        rgb[part], normals[part] = color.d[:count] * 0.5 + 0.5, normal.d[:count]
    return rgb, normals


# --- pictures of the initial networks ---------------------------------------------------------------------------------

def network_of(width: int, layers: int, radius: float) -> Network:
    """Return the network of these sizes. Raise UserError if a configuration may not have them."""
    return settings.check_network("the command line", {"width": width, "layers": layers, "radius": radius})


def main():
    parser = helper.argument_parser("Draw the zero contour of the initial sdf and measure it against the exact sphere; "
                                    "with several widths, plot the error over the width.", config=False)
    parser.add_argument("-Ds", type=int, nargs="+", default=[512], metavar="D", help="layer widths")
    parser.add_argument("-L", type=int, default=9, help="affine layers")
    parser.add_argument("-R", type=float, default=0.6, help="radius of the sphere")
    args = parser.parse_args()
    nets = [network_of(width, args.L, args.R) for width in args.Ds]
    context.set_context(args.context, args.device_id)
    errors = []
    for net in nets:
        initialize(net, np.random.default_rng(0))
        sdf = sdf_evaluator()
        points = np.random.default_rng(1).uniform(-1, 1, (100000, 3)).astype(np.float32)
        errors.append(np.abs(sdf(points) - (np.linalg.norm(points, axis=1) - args.R)).mean())
        path = f"sdf_contour_D{net.width:03d}_L{args.L:03d}.png"
        draw_contour(sdf, args.R, f"initial sdf, width {net.width}, {args.L} layers", path)
        print(f"width {net.width}: mean absolute error {errors[-1]:.4f} against the sphere of radius {args.R} in "
              f"[-1, 1]^3, {path}")
    if len(args.Ds) > 1:
        path = f"sdf_error_L{args.L:03d}.png"
        draw_errors(args.Ds, errors, path)
        print(f"error over width: {path}")


def draw_contour(sdf: Callable, radius: float, title: str, path: str) -> None:
    """Draw the sdf on the plane z = 0 with its zero contour, and the exact circle of `radius`, to `path`."""
    from matplotlib.figure import Figure
    line = np.linspace(-1, 1, 201, dtype=np.float32)
    grid = np.stack(np.broadcast_arrays(line[None], line[:, None], np.float32(0)), axis=-1)
    values = sdf(grid.reshape(-1, 3)).reshape(201, 201)
    figure = Figure(figsize=(5.4, 4.6), dpi=120, layout="constrained")
    axes = figure.add_subplot(aspect="equal", title=title, xlabel="x", ylabel="y")
    levels = np.linspace(-1, 1, 21)
    filled = axes.contourf(line, line, values, levels, cmap="RdBu", extend="both")
    axes.contour(line, line, values, [0.0], colors="black", linewidths=2)
    angle = np.linspace(0, 2 * np.pi, 200)
    axes.plot(radius * np.cos(angle), radius * np.sin(angle), "--", color="orange", label=f"circle of radius {radius}")
    axes.plot([], [], color="black", linewidth=2, label="sdf = 0")
    figure.legend(loc="outside lower center", ncols=2)
    figure.colorbar(filled, label="sdf")
    with writing.replacing(path) as temporary:
        figure.savefig(temporary)


def draw_errors(widths: List[int], errors: List[float], path: str) -> None:
    """Plot the mean absolute error over the layer width to `path`."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(5, 3.6), dpi=120, layout="constrained")
    axes = figure.add_subplot(title="initial sdf against the exact sphere", xlabel="layer width",
                              ylabel="mean absolute error", xscale="log")
    axes.plot(widths, errors, "o-")
    axes.set_xticks(widths, [str(width) for width in widths])
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    with writing.replacing(path) as temporary:
        figure.savefig(temporary)


def run_initial_surface(trace: Callable) -> None:
    """Run `python ray_tracer.py`: trace and shade the initial surface; trace: ray_tracer.trace."""
    helper.run(lambda: draw_initial_surface(trace))


def draw_initial_surface(trace: Callable) -> None:
    """Trace the initial surface, print the hits and the time, and draw it, lit from the camera's upper left."""
    parser = helper.argument_parser("Trace and shade the initial surface, a sphere; print hits and time.", config=False)
    parser.add_argument("-D", type=int, default=512, help="layer width")
    parser.add_argument("-L", type=int, default=9, help="affine layers of the implicit network")
    parser.add_argument("-R", type=float, default=0.6, help="radius of the sphere")
    args = parser.parse_args()
    net = network_of(args.D, args.L, args.R)
    context.set_context(args.context, args.device_id)
    initialize(net, np.random.default_rng(0))
    size, focal, pose = 256, 300.0, np.eye(4)
    intrinsics = np.array([[focal, 0, (size - 1) / 2], [0, focal, (size - 1) / 2], [0, 0, 1]])
    pose[2, 3] = -1.8
    origin, directions = helper.pixel_rays(helper.pixel_grid(size, size), intrinsics, pose)
    start = time.perf_counter()
    t, hit = trace(sdf_evaluator(), origin, directions)
    seconds = time.perf_counter() - start
    normals = shade(origin + t[hit, None] * directions[hit], directions[hit])[1]
    light = np.array([-0.5, -0.6, -0.62])       # y points down
    image = np.ones((size * size, 3), np.float32)
    image[hit] = 0.15 + 0.85 * np.maximum(normals @ light / np.linalg.norm(normals, axis=1), 0)[:, None]
    path = f"sphere_D{args.D:03d}_L{args.L:03d}.png"
    writing.write_image(path, image.reshape(size, size, 3))
    print(f"{hit.sum()} of {len(hit)} rays hit, in {seconds:.2f} s, {path}")


if __name__ == "__main__":
    helper.run(main)
