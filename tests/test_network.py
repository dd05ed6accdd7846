"""The networks, the differentiable hit and the losses: against the authors' numbers and against each other."""
import threading
import time

import nnabla as nn
import nnabla.functions as F
import nnabla.solvers as S
import numpy as np
import pytest

import datasets
import network
from backends import architecture, cpu_kernels, gpu
from config.settings import Network
from conftest import Given
from training.step import LOSSES, LossSettings, Placed, TrainingStep


def relative_error(found, wanted):
    """The norm of the difference over the norm of what is wanted."""
    found, wanted = np.asarray(found, np.float64), np.asarray(wanted, np.float64)
    return np.linalg.norm(found - wanted) / np.linalg.norm(wanted)


def single(values):
    """Return values in float32, as a training's are. Numba would compile all kernels anew for others."""
    return np.asarray(values, np.float32)


BACKENDS = pytest.mark.parametrize("numpy", [True, False], ids=["numpy", "graph"])


@BACKENDS
def test_sdf_feature_and_gradient_equal_the_original(reference_network, monkeypatch, numpy):
    monkeypatch.setattr(network, "on_cpu", lambda: numpy)
    x = nn.Variable.from_numpy_array(reference_network["probe_points"])
    sdf, feature, normal = network.implicit(x, network.folded_weights("implicit"))
    F.sink(sdf, feature, normal).forward()
    wanted = reference_network["probe_output"]
    assert relative_error(sdf.d, wanted[:, :1]) <= 1e-4
    assert relative_error(feature.d, wanted[:, 1:]) <= 1e-4
    assert relative_error(normal.d, reference_network["probe_gradient"]) <= 1e-4


def test_series_are_exact_to_the_last_digits_of_float32():
    rng = np.random.default_rng(0)
    x = rng.uniform(-2, 2, (1000, 3)).astype(np.float32)
    angles = [2.0 ** k * x.astype(np.float64) for k in range(6)]
    wanted = np.concatenate([x, *(part for a in angles for part in (np.sin(a), np.cos(a)))], axis=1)
    assert np.abs(cpu_kernels.encode(x, 6) - wanted).max() < 2e-7

    z = np.concatenate([rng.normal(0, 0.02, 5000), rng.normal(0, 2, 4900), np.linspace(-1e-4, 1e-4, 100)])
    z = z.reshape(100, 100).astype(np.float32)
    b, h, slope = rng.normal(0, 0.02, 100).astype(np.float32), np.empty((100, 103), np.float32), np.empty_like(z)
    cpu_kernels.softplus(z, b, np.float32(0.5), h, slope)
    v = 100.0 * (z + b).astype(np.float64)
    assert h[:, :100] == pytest.approx(0.005 * np.logaddexp(0, v), rel=3e-7, abs=1e-8)
    assert slope == pytest.approx(1 / (1 + np.exp(-np.maximum(v, -600))), rel=2e-6, abs=1e-8)
    z[0, :4] = np.nan, np.inf, -1e30, 1e30
    cpu_kernels.softplus(z, b, np.float32(1.0), h, None)
    assert np.isnan(h[0, 0]) and h[0, 1] == np.inf and abs(h[0, 2]) < 1e-10 and h[0, 3] == pytest.approx(1e30)


def test_evaluator_without_gradient_equals_the_original(reference_network):
    found = network.sdf_evaluator()(reference_network["probe_points"])
    assert relative_error(found, reference_network["probe_output"][:, 0]) <= 1e-4


def test_colors_equal_the_original(reference_network):
    hit = reference_network["hit"] & reference_network["object_mask"]
    rgb, _ = network.shade(reference_network["points"][hit], reference_network["ray_directions"][hit], chunk=100)
    assert relative_error(rgb * 2 - 1, reference_network["rgb"][hit]) <= 1e-4


def reference_gradients(reference):
    """Take the reference's step. Return its losses and {name: gradient}."""
    r, count = reference, len(reference["points"])
    batch = datasets.Batch(np.zeros(1, np.int64), None, r["ray_directions"], r["rgb_gt"], r["object_mask"],
                           np.ones(count, np.float32))
    step = TrainingStep((), LossSettings(float(r["mask_weight"]), float(r["eikonal_weight"])), count)
    placed, alpha = Placed(r["points"], r["hit"] & r["object_mask"]), float(r["alpha"])
    solver = S.Adam()
    solver.set_parameters(nn.get_parameters())
    losses = step.compute_gradients(solver, batch, placed, alpha, Given(r["eikonal_points"]))
    return ({name: float(losses[name].d) for name in LOSSES},
            {name: parameter.g.copy() for name, parameter in nn.get_parameters().items()})


@BACKENDS
def test_losses_and_their_gradient_equal_the_original(reference_network, monkeypatch, numpy):
    monkeypatch.setattr(network, "on_cpu", lambda: numpy)
    losses, gradients = reference_gradients(reference_network)
    for ours, theirs in (("loss", "loss"), ("color", "rgb_loss"), ("mask", "mask_loss"), ("eikonal", "eikonal_loss")):
        assert losses[ours] == pytest.approx(float(reference_network[theirs]), rel=1e-4)
    for name, gradient in gradients.items():
        scope, layer, part = name.split("/")
        wanted = reference_network[f"grad/{scope}_network/{layer}/{part}"]
        assert relative_error(gradient, wanted.T.reshape(gradient.shape)) <= 1e-4, name


def test_a_weight_of_missed_rays_is_that_of_masked_rays_without_a_hit():
    """Of six rays two are hits in the mask, two miss it although masked, and two are outside."""
    rng, net = np.random.default_rng(0), Network(64, 5, 4)
    network.initialize(net, rng)
    mask, hits = np.array([1, 1, 1, 1, 0, 0], bool), np.array([1, 0, 0, 1, 0, 0], bool)
    directions = np.tile(np.float32([0, 0, 1]), (6, 1))
    points = np.float32([[0, 0, -0.6], [0.7, 0, 0], [0, 0.9, 0], [0.1, 0, -0.59], [0.65, 0, 0], [0, -0.8, 0]])
    batch = datasets.Batch(np.zeros(1, np.int64), points - 3 * directions, directions,
                           np.zeros((6, 3), np.float32), mask, np.float32([1, 2, 1, 1, 3, 0.5]))

    def losses(missed):
        step = TrainingStep((), LossSettings(100.0, 0.1, missed), 6)
        found = step.compute_gradients(S.Adam(), batch, Placed(points, hits), 50.0, np.random.default_rng(1))
        return {name: float(found[name].d) for name in found}

    entropy = np.logaddexp(0, 50.0 * network.sdf_evaluator()(points) * np.where(mask, 1, -1)) * batch.weights / 300
    once, thrice = losses(1.0), losses(3.0)
    assert once["mask"] == pytest.approx(entropy[~hits].sum(), rel=1e-4)
    assert thrice["mask"] - once["mask"] == pytest.approx(2 * entropy[mask & ~hits].sum(), rel=1e-4)
    assert (thrice["color"], thrice["eikonal"]) == (once["color"], once["eikonal"])


def test_a_ray_along_the_surface_keeps_its_slope_and_its_sign():
    slopes, least = np.float32([-0.5, -0.05, 0.05, -1e-3, 1e-3]), architecture.LEAST_SLOPE
    assert architecture.inverse_slope(slopes, least) == pytest.approx(1 / slopes, rel=2e-6)
    tiny = architecture.inverse_slope(np.float32([-1e-6, -1e-9, 0.0, 1e-9, 1e-6]), least)
    assert np.isfinite(tiny).all() and (np.sign(tiny) == [-1, -1, 0, 1, 1]).all() and np.abs(tiny).max() <= 1.0001e6
    for bound in (least, 0.02):
        found = architecture.inverse_slope(gpu.constant(slopes), bound, F.maximum_scalar)
        found.forward()
        assert found.d == pytest.approx(architecture.inverse_slope(slopes, bound), rel=1e-6)
    assert architecture.inverse_slope(slopes, 0.02) == pytest.approx([-2, -20, 20, -2.5, 2.5], rel=1e-5)


class ByNnabla:
    """What a SurfaceEvaluation is, by the definition (equation 3) and differentiated by nnabla."""

    def __init__(self, layers, points, directions, want_grad_points=False,
                 least_slope=architecture.LEAST_SLOPE):
        weights, num_hits = gpu.folded_weights(layers), directions.shape[0]
        output, self.normal, _ = gpu.implicit_graph(points, weights)
        self.sdf, self.hit, self.num_hits = output[:, :1], None, num_hits
        if num_hits:
            sdf0, normal0 = (F.identity(v[:num_hits]).apply(need_grad=False) for v in (self.sdf, self.normal))
            inverse = architecture.inverse_slope(gpu.row_sums(normal0 * directions), least_slope,
                                                 F.maximum_scalar).apply(need_grad=False)
            self.hit = points[:num_hits] - (self.sdf[:num_hits] - sdf0) * inverse * directions
            output, self.hit_normal, _ = gpu.implicit_graph(self.hit, weights)
            self.hit_feature = output[:, 1:]
        for variable in (self.sdf, self.normal, self.hit) if want_grad_points else ():
            if variable is not None:
                variable.persistent = True

    def forward(self):
        pass        # the graph of the losses goes on into this one

    backward = forward

    def grad_points(self):
        grad = self.sdf.g * self.normal.d
        if self.num_hits:
            grad[:self.num_hits] += self.hit.g
        return grad


@pytest.mark.parametrize("num_hits, without, want_grad_rays, bands", [
    (0, (), False, {}), (53, (), False, {}), (200, (), False, {}), (0, (), True, {}), (53, (), True, {}),
    (200, (), True, {}), (53, ("view",), True, {}), (53, ("normal",), False, {}), (53, ("feature",), False, {}),
    (53, ("view", "normal", "feature"), True, {}),
    (53, (), False, {"view_bands": 2}), (200, (), True, {"view_bands": 1}), (53, ("normal",), True, {"view_bands": 2}),
    (53, (), True, {"position_bands": 4})])
def test_derivatives_written_out_equal_those_that_nnabla_finds(monkeypatch, num_hits, without, want_grad_rays, bands):
    """The GPU's graph and the CPU's functions on a network that is no sphere, with rays that count more than others;
    twice, as the second step finds what the first has left."""
    # With 0.3, a third of the rays are held back; with 0.02 few, but no grazing ray makes up all of a gradient.
    least = 0.3 if without or bands else 0.02
    net = Network(64, 32, 9, without=list(without), **bands)

    def gradients(numpy):
        monkeypatch.setattr(network, "on_cpu", lambda: numpy)
        rng = np.random.default_rng(0)
        network.initialize(net, rng)
        for parameter in nn.get_parameters().values():
            parameter.d = single(parameter.d + 0.02 * rng.normal(size=parameter.shape))
        step = TrainingStep(without, LossSettings(100.0, 0.1, 1.5, least), 200, want_grad_rays)
        solver = S.Adam()
        solver.set_parameters(nn.get_parameters())
        for _ in range(2):
            directions, points = rng.normal(size=(200, 3)), single(rng.uniform(-0.7, 0.7, (200, 3)))
            batch = datasets.Batch(np.zeros(1, np.int64), None,
                                   single(directions / np.linalg.norm(directions, axis=1, keepdims=True)),
                                   single(rng.uniform(-1, 1, (200, 3))), rng.random(200) < 0.5,
                                   single(rng.uniform(0.3, 3.0, 200)))
            placed = Placed(points, rng.permutation(200) < num_hits)
            losses = step.compute_gradients(solver, batch, placed, 50.0, rng)
            losses = [float(losses[name].d) for name in LOSSES]
        found = {name: parameter.g.copy() for name, parameter in nn.get_parameters().items()}
        return losses, {**found, **dict(zip(("points", "directions"), step.grad_rays() if want_grad_rays else ()))}

    written_out = gradients(numpy=False), gradients(numpy=True)
    monkeypatch.setattr(gpu, "SurfaceEvaluation", ByNnabla)
    wanted_losses, wanted = gradients(numpy=False)
    for losses, found in written_out:
        assert losses == pytest.approx(wanted_losses, rel=1e-5)
        for name in wanted:
            if name == "directions" and (not num_hits or "view" in without):
                assert not found[name].any() and not wanted[name].any()
            elif num_hits or not name.startswith("rendering"):
                assert relative_error(found[name], wanted[name]) <= 1e-4, name


@BACKENDS
@pytest.mark.parametrize("without", [(), ("normal",), ("view",), ("feature",), ("view", "feature")])
def test_a_renderer_without_an_input_ignores_it(monkeypatch, numpy, without):
    monkeypatch.setattr(network, "on_cpu", lambda: numpy)
    network.initialize(Network(64, 5, 4, without=list(without)), np.random.default_rng(0))
    given = {"view": 27, "normal": 3, "feature": 5}
    assert nn.get_parameters()["rendering/0/v"].shape == (38 - sum(given[name] for name in without), 64)
    rng = np.random.default_rng(1)
    parts = {name: nn.Variable.from_numpy_array(rng.normal(size=(9, columns)).astype(np.float32))
             for name, columns in (("x", 3), ("normal", 3), ("view", 3), ("feature", 5))}
    rgb = network.rendering(weights=network.folded_weights("rendering"), without=without, **parts)
    rgb.forward()
    before = rgb.d.copy()
    for name, part in parts.items():
        kept = part.d.copy()
        part.d = kept + 0.3
        rgb.forward()
        assert np.array_equal(rgb.d, before) is (name in without), name
        part.d = kept


@pytest.mark.parametrize("num_rows, num_others, cores", [(0, 0, 2), (1, 0, 2), (128, 64, 2), (300, 0, 3), (70, 35, 16),
                                                         (6000, 3000, 2)])
def test_blocks_hold_each_row_once(monkeypatch, num_rows, num_others, cores):
    monkeypatch.setattr(cpu_kernels, "CORES", cores)
    split, first, first_other = cpu_kernels.split_rows(num_rows, 96, num_others), 0, 0
    for number in range(split.blocks):
        block = cpu_kernels.block_of(split, number)
        assert (block.first, block.first_other) == (first, first_other)
        assert block.rows + block.others <= 1 << 17
        first, first_other = first + block.rows, first_other + block.others
    assert (first, first_other) == (num_rows, num_others)


def test_any_number_of_cores_gives_the_same(reference_network, monkeypatch):
    """Up to rounding; and for one number of cores, the same bits whichever thread takes a block."""
    monkeypatch.setattr(network, "on_cpu", lambda: True)
    monkeypatch.setattr(cpu_kernels, "MIN_PER_CORE", 1)
    points = reference_network["probe_points"]

    def gradients(cores):
        monkeypatch.setattr(cpu_kernels, "CORES", cores)
        return [*reference_gradients(reference_network)[1].values(), network.sdf_evaluator()(points)]

    alone = gradients(1)
    for cores in (2, 7, 16):
        first, *others = (gradients(cores) for _ in range(4))
        for other in others:
            assert all(map(np.array_equal, first, other))
        for found, wanted in zip(first, alone):
            assert relative_error(found, wanted) <= 1e-5


def test_an_error_in_another_thread_reaches_the_caller():
    begun = []

    def block(number, split):
        begun.append(number)
        while len(begun) < 2:       # each thread has one
            time.sleep(0.001)
        if threading.current_thread() is not threading.main_thread():
            raise MemoryError("no room")

    if len(cpu_kernels.helpers()):
        with pytest.raises(MemoryError, match="no room"):
            cpu_kernels.on_all_cores(block, cpu_kernels.Split(2, 0, 2))
    begun[:] = [0, 0]
    cpu_kernels.on_all_cores(lambda number, split: begun.append(number), cpu_kernels.Split(9, 0, 9))
    assert sorted(begun[2:]) == list(range(9))


def test_no_points_have_no_sdf(reference_network):
    assert network.sdf_evaluator()(np.empty((0, 3), np.float32)).shape == (0,)
