"""IDR's networks and losses, as nnabla graphs (Yariv et al., NeurIPS 2020).

cpu.py and gpu.py compute the networks and the differentiable hit, by nnabla's context. The sdf
reaches the tracer and the extraction as a plain callable, by sdf_evaluator().
As a script: the zero contour of the initial sdf as a picture, `python network.py -Ds 512 -R 0.75`.
"""
import nnabla as nn
import nnabla.functions as F
import numpy as np

from backends import cpu
from backends import gpu
from backends.cpu_kernels import has_skip
from backends.gpu import POSITION_BANDS, constant, positional_encoding, row_sums

VIEW_BANDS = 4          # of the view direction's: 27 values
RENDERING_LAYERS = 5
OPTIONAL_INPUTS = ("view", "normal", "feature")     # of the renderer: what network.without may name, in their order


# --- parameters -------------------------------------------------------------------------------------------------------

def layer_sizes(width, feature, layers, without=()):
    """Return {parameter scope: (in, out)} of every affine layer: implicit/0, ..., rendering/4 (section 5.1).

    without: of the OPTIONAL_INPUTS, those that the renderer is not given.
    """
    encoded, sizes = 3 + 6 * POSITION_BANDS, {}
    for layer in range(layers):
        inputs = encoded if layer == 0 else width
        outputs = 1 + feature if layer == layers - 1 else width
        sizes[f"implicit/{layer}"] = (inputs, outputs - encoded if has_skip(layer + 1, layers) else outputs)
    given = dict(zip(OPTIONAL_INPUTS, (3 + 6 * VIEW_BANDS, 3, feature)))
    for layer in range(RENDERING_LAYERS):
        inputs = 3 + sum(given[name] for name in given if name not in without) if layer == 0 else width
        sizes[f"rendering/{layer}"] = (inputs, 3 if layer == RENDERING_LAYERS - 1 else width)
    return sizes


def parameter_shapes(width, feature, layers, without=()):
    """Return {name: shape} of all parameters; a layer has v (in, out), its scale g (out,) and bias b (out,)."""
    shapes = {}
    for scope, (inputs, outputs) in layer_sizes(width, feature, layers, without).items():
        shapes.update({f"{scope}/v": (inputs, outputs), f"{scope}/g": (outputs,), f"{scope}/b": (outputs,)})
    return shapes


def initialize(width, feature, layers, radius, rng, without=()):
    """Set nnabla's parameters to fresh networks, the implicit one by the geometric initialisation (SAL, theorem 1).

    The sdf starts close to that of the sphere of `radius`; rng is a numpy Generator; without as in layer_sizes. Earlier
    parameters are dropped.
    """
    nn.clear_parameters()
    encoded = 3 + 6 * POSITION_BANDS
    for scope, (inputs, outputs) in layer_sizes(width, feature, layers, without).items():
        network, layer = scope.split("/")
        if network == "rendering":
            bound = inputs ** -0.5
            v, b = rng.uniform(-bound, bound, (inputs, outputs)), rng.uniform(-bound, bound, outputs)
        elif int(layer) == layers - 1:
            v, b = rng.normal(np.sqrt(np.pi / inputs), 1e-4, (inputs, outputs)), np.full(outputs, -radius)
        else:
            v, b = rng.normal(0.0, np.sqrt(2.0 / outputs), (inputs, outputs)), np.zeros(outputs)
            if int(layer) == 0:
                v[3:] = 0.0                     # only the raw coordinates count at first
            elif has_skip(int(layer), layers):
                v[3 - encoded:] = 0.0           # likewise for the encoding that joins here
        for name, value in (("v", v), ("g", np.linalg.norm(v, axis=0)), ("b", b)):
            variable = nn.Variable.from_numpy_array(value.astype(np.float32), need_grad=True)
            nn.parameter.set_parameter(f"{scope}/{name}", variable)


def layer_parameters(network):
    """Return [(v, g, b)] of "implicit" or "rendering", nnabla's parameters as they are."""
    parameters, layers = nn.get_parameters(grad_only=False), []
    while f"{network}/{len(layers)}/v" in parameters:
        layers.append(tuple(parameters[f"{network}/{len(layers)}/{name}"] for name in "vgb"))
    return layers


def folded_weights(network):
    """Return the weights of "implicit" or "rendering" for a graph, normalised: W = g v / |v|, per output.

    On the CPU as a PackedWeights, else as [(W, b, transposed W)] of Variables.
    """
    return backend().folded_weights(layer_parameters(network))


# --- the networks -----------------------------------------------------------------------------------------------------

def on_cpu():
    """Whether nnabla computes on the CPU, where compiled functions take over the heavy work."""
    return nn.get_current_context().backend[0].startswith("cpu")


def backend():
    """The module whose functions nnabla's current context takes."""
    return cpu if on_cpu() else gpu


def implicit(x, weights):
    """The implicit network with the gradient of its sdf; training_graph carries a loss's derivatives back.

    x: (N, 3) Variable; weights: folded_weights("implicit").
    Returns sdf (N, 1), positive outside, feature (N, F) and gradient (N, 3).
    """
    return backend().implicit(x, weights)


def rendering(x, normal, view, feature, weights, without=()):
    """The renderer: rgb (N, 3) in [-1, 1] of surface points.

    x, normal, view: (N, 3) Variables; view is the unit vector from the surface to the camera, the normal is the
    gradient of the sdf as it is; feature (N, F); weights: folded_weights("rendering"); without: of the OPTIONAL_INPUTS,
    those that it was not built for.
    """
    encoded_view = None if "view" in without else positional_encoding(view, VIEW_BANDS)[0]
    given = [part for name, part in zip(OPTIONAL_INPUTS, (encoded_view, normal, feature)) if name not in without]
    h = F.concatenate(x, *given, axis=1) if given else x
    return backend().rendering(h, weights)


# --- the losses -------------------------------------------------------------------------------------------------------

def total(x):
    """The sum of all of x (N, C), as a scalar."""
    return F.reshape(F.affine(F.reshape(x, (1, -1)), constant(np.ones((x.size, 1)))), ())


def color_loss(rgb, rgb_true, weights, rays):
    """(1 / rays) sum of |rgb - rgb_true|_1 over the rows, weighted by weights (N, 1) (equation 6)."""
    return total(F.absolute_error(rgb, rgb_true) * weights) * (1.0 / rays)


def mask_loss(sdf, object_mask, weights, alpha, rays):
    """(1 / (alpha rays)) sum of CE(object_mask, sigmoid(-alpha sdf)) over the rows, weighted (equation 7).

    sdf, object_mask, weights: (N, 1); alpha: (1, 1) Variable.
    """
    return total(F.sigmoid_cross_entropy(sdf * alpha * -1.0, object_mask) * weights / alpha) * (1.0 / rays)


def eikonal_loss(gradient):
    """Mean of (|gradient| - 1)^2 over the rows of gradient (N, 3) (equation 8)."""
    norm = (row_sums(gradient * gradient) + 1e-12) ** 0.5       # the derivative of a root ends where its value is 0
    return total((norm - 1.0) ** 2.0) * (1.0 / gradient.shape[0])


def training_graph(rays, surface, mask_weight, eikonal_weight, without=(), by_rays=False):
    """The losses of one step over `rays` rays, of which the first `surface` may show the surface.

    without: as rendering. Returns a dict of Variables and two functions. To be set: points (rays + rays // 2, 3), the
    rays' points followed by the uniform ones; directions and rgb (surface, 3); colored (surface, 1), the weight of a
    ray that hits in the object mask, else 0; object_mask and masked (rays, 1), the latter the weight of the other rays,
    else 0; alpha (1, 1).
    forward() computes the losses, to be read: loss, color, mask, eikonal; backward() then adds the loss's derivatives
    to the parameters' gradients.

    With `by_rays` a third function, by_rays(), then gives those by the rays' points (rays, 3) and by the directions
    (surface, 3) as the renderer is given them, NumPy arrays; the eikonal loss has no part in them, and the distance
    along a ray is held constant.
    """
    g = {"points": nn.Variable((rays + rays // 2, 3)), "directions": nn.Variable((surface, 3)),
         "rgb": nn.Variable((surface, 3)), "colored": nn.Variable((surface, 1)),
         "object_mask": nn.Variable((rays, 1)), "masked": nn.Variable((rays, 1)), "alpha": nn.Variable((1, 1))}
    g["directions"].need_grad = by_rays
    sdf, gradient, at_hits, evaluation, carry_back, by_points = backend().evaluate(
        layer_parameters("implicit"), g["points"], g["directions"], by_rays)
    g["mask"] = mask_loss(sdf[:rays], g["object_mask"], g["masked"], g["alpha"], rays)
    g["eikonal"] = eikonal_loss(gradient)
    g["color"] = constant(0.0)
    if surface:
        hits, normal, feature = at_hits
        rgb = rendering(hits, normal, g["directions"] * -1.0, feature, folded_weights("rendering"), without)
        g["color"] = color_loss(rgb, g["rgb"], g["colored"], rays)
    g["loss"] = g["color"] + g["mask"] * mask_weight + g["eikonal"] * eikonal_weight
    for name in ("color", "mask", "eikonal"):
        g[name].persistent = True

    def forward():
        evaluation()
        g["loss"].forward(clear_no_need_grad=True)

    def backward():
        if by_rays:
            g["directions"].grad.zero()     # an input's is added to
        g["loss"].backward(clear_buffer=True)
        carry_back()

    g["forward"], g["backward"] = forward, backward
    if by_rays:
        g["by_rays"] = lambda: (by_points()[:rays], g["directions"].g.copy())
    return g


# --- evaluation without gradient --------------------------------------------------------------------------------------

def sdf_evaluator():
    """Return the sdf of the current parameters as a callable, points (N, 3) float32 -> (N,) float32.

    Its refresh() takes over parameters that have changed since. Its `roughly` is None or a faster callable that is less
    exact, for a choice among samples.
    """
    return backend().Sdf(layer_parameters("implicit"))


def shade(points, directions=None, without=(), chunk=4096):
    """Colour and normal of surface points with the current parameters.

    points, directions: (N, 3) float32, the latter the unit ray directions; without them each point is seen along its
    normal; without: as rendering. Returns rgb (N, 3) in [0, 1] and the gradient of the sdf (N, 3), float32.
    """
    rows = min(chunk, len(points))
    rgb, normals = np.empty((len(points), 3), np.float32), np.empty((len(points), 3), np.float32)
    if rows == 0:
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


# --- the initial sdf as a picture -------------------------------------------------------------------------------------

def check_sizes(width, layers, radius):
    """Raise UserError for sizes on the command line that make no network."""
    import helper
    if width < 64 or layers < 2 or not 0 < radius < 1:
        raise helper.UserError(f"the width must be 64 or more (not {width}), -L 2 or more (not {layers}) and -R between "
                               f"0 and 1 (not {radius})")


def main():
    import helper
    parser = helper.argument_parser("Draw the zero contour of the initial sdf and measure it against the exact sphere; "
                                    "with several widths, plot the error over the width.", config=False)
    parser.add_argument("-Ds", type=int, nargs="+", default=[512], metavar="D", help="layer widths")
    parser.add_argument("-L", type=int, default=9, help="affine layers")
    parser.add_argument("-R", type=float, default=0.6, help="radius of the sphere")
    args = parser.parse_args()
    for width in args.Ds:
        check_sizes(width, args.L, args.R)
    helper.set_context(args.context, args.device_id)
    errors = []
    for width in args.Ds:
        initialize(width, 256, args.L, args.R, np.random.default_rng(0))
        sdf = sdf_evaluator()
        points = np.random.default_rng(1).uniform(-1, 1, (100000, 3)).astype(np.float32)
        errors.append(np.abs(sdf(points) - (np.linalg.norm(points, axis=1) - args.R)).mean())
        path = f"sdf_contour_D{width:03d}_L{args.L:03d}.png"
        draw_contour(sdf, args.R, f"initial sdf, width {width}, {args.L} layers", path)
        print(f"width {width}: mean absolute error {errors[-1]:.4f} against the sphere of radius {args.R} in [-1, 1]^3, "
              f"{path}")
    if len(args.Ds) > 1:
        path = f"sdf_error_L{args.L:03d}.png"
        draw_errors(args.Ds, errors, path)
        print(f"error over width: {path}")


def draw_contour(sdf, radius, title, path):
    """Draw the sdf on the plane z = 0 with its zero contour, and the exact circle of `radius`, to `path`."""
    import helper
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
    with helper.replacing(path) as temporary:
        figure.savefig(temporary)


def draw_errors(widths, errors, path):
    """Plot the mean absolute error over the layer width to `path`."""
    import helper
    from matplotlib.figure import Figure
    figure = Figure(figsize=(5, 3.6), dpi=120, layout="constrained")
    axes = figure.add_subplot(title="initial sdf against the exact sphere", xlabel="layer width",
                              ylabel="mean absolute error", xscale="log")
    axes.plot(widths, errors, "o-")
    axes.set_xticks(widths, [str(width) for width in widths])
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    with helper.replacing(path) as temporary:
        figure.savefig(temporary)


if __name__ == "__main__":
    import helper
    helper.run(main)
