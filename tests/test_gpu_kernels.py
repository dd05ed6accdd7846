"""The networks' kernels on a GPU against nnabla's functions: values, gradients, graphs that are kept."""
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import ModuleType, SimpleNamespace

import nnabla as nn
import nnabla.solvers as S
import numpy as np
import pytest

import datasets
import helper
import network
from backends import context, gpu
from config.settings import Network, Tracer
from ray_tracer import Limits, hit_or_least_sdf
from rendering import pixels
from tracing.sdf_grid import SdfGrid
from training.step import LOSSES, LossSettings, Placed, TrainingStep


@pytest.fixture
def on_gpu():
    """Compute on the first GPU, with CuPy. Skip where that is not possible."""
    before, (chosen, why) = nn.get_current_context(), context.gpu_or_reason("0")
    if chosen == "cpu":
        pytest.skip(f"no GPU: {why}")
    context.set_context("cudnn", "0")
    try:
        if not context.cuda:
            pytest.skip(f"computing {context.cuda_or_reason('0')}")
        yield
    finally:
        nn.set_default_context(before)
        nn.clear_parameters()
        context.cuda = None


def relative_error(found, wanted):
    found, wanted = np.asarray(found, np.float64), np.asarray(wanted, np.float64)
    return np.linalg.norm(found - wanted) / max(np.linalg.norm(wanted), 1e-12 if wanted.ndim else 1e-2)


def new_network(net, rng):
    """Set nnabla's parameters to a network that is no sphere."""
    network.initialize(net, rng)
    move_parameters(rng)


def move_parameters(rng):
    for parameter in nn.get_parameters().values():
        parameter.d = parameter.d + 0.02 * rng.normal(size=parameter.shape)


def new_batch(num_rays, share, rng):
    """Return a batch and Placed, in which that share of the rays hits."""
    directions = rng.normal(size=(num_rays, 3)).astype(np.float32)
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    hit = rng.random(num_rays) < share
    batch = datasets.Batch(np.zeros(1), np.zeros((num_rays, 3), np.float32), directions,
                           rng.uniform(-1, 1, (num_rays, 3)).astype(np.float32), hit | (rng.random(num_rays) < 0.3),
                           rng.uniform(0.3, 3.0, num_rays).astype(np.float32))
    return batch, Placed(rng.uniform(-0.7, 0.7, (num_rays, 3)).astype(np.float32), hit)


def new_solver():
    solver = S.Adam()
    solver.set_parameters(nn.get_parameters())
    return solver


def take_step(step, given, rng=0):
    """Take a step on a batch and Placed; return copies of its losses, of all gradients, and of the rays' if wanted."""
    losses = step.compute_gradients(new_solver(), *given, 50.0, np.random.default_rng(rng))
    found = {name: np.array(float(losses[name].d)) for name in LOSSES}
    found.update({name: parameter.g.copy() for name, parameter in nn.get_parameters().items()
                  if given[1].hit_in_mask.any() or name.startswith("implicit")})
    if step.want_grad_rays:
        found.update(zip(("points", "directions"), map(np.copy, step.grad_rays())))
    return found


def assert_equal(found, wanted, tolerance=1e-5):
    assert found.keys() == wanted.keys()
    assert {name: error for name in wanted
            if not (error := relative_error(found[name], wanted[name])) <= tolerance} == {}


SHAPES = [(Network(512, 256, 9), 512, False), (Network(512, 256, 9), 200, True), (Network(64, 32, 9), 51, True),
          (Network(67, 5, 6), 21, True), (Network(70, 90, 5, without=["view"]), 33, True),
          (Network(64, 5, 4, without=["normal"]), 40, True), (Network(64, 1, 2), 30, False),
          (Network(66, 7, 6, view_bands=2), 26, True), (Network(66, 7, 6, position_bands=4), 31, True),
          (Network(65, 1, 3, without=["feature", "view"]), 5, True)]


@pytest.mark.parametrize("net, num_rays, want_grad_rays", SHAPES)
def test_steps_with_changing_parameters_equal_those_of_nnabla(on_gpu, monkeypatch, net, num_rays, want_grad_rays):
    def steps():
        rng = np.random.default_rng(0)
        new_network(net, rng)
        # Rays that graze would be all of the gradient, with all of their rounding.
        settings = LossSettings(100.0, 0.1, 4.0, least_slope=1e-6 if num_rays == 5 else 0.1)
        step, sdf = TrainingStep(net.without, settings, num_rays, want_grad_rays), network.sdf_evaluator()
        for share in (0.5, 0.2, 0.0, 0.9):
            move_parameters(rng)
            found = take_step(step, new_batch(num_rays, share, rng))
            sdf.refresh()
            yield {**found, "sdf": sdf(rng.uniform(-1, 1, (rng.integers(1, 3000), 3)).astype(np.float32))}

    found = list(steps())
    assert type(network.sdf_evaluator()) is context.cuda.Sdf
    monkeypatch.setattr(context, "cuda", None)
    assert type(network.sdf_evaluator()) is gpu.Sdf
    for ours, theirs in zip(found, steps()):
        assert_equal(ours, theirs)


def test_gradients_are_added_to_those_that_are_there(on_gpu):
    rng = np.random.default_rng(0)
    new_network(Network(64, 5, 4), rng)
    step, given = TrainingStep((), LossSettings(100.0, 0.1), 20), new_batch(20, 0.5, rng)
    once = take_step(step, given)
    step.compute_gradients(SimpleNamespace(zero_grad=lambda: None), *given, 50.0, np.random.default_rng(0))
    for name, parameter in nn.get_parameters().items():
        assert relative_error(parameter.g, 2 * once[name]) <= 1e-5


def test_the_sdf_at_the_uniform_points_is_told(on_gpu):
    rng = np.random.default_rng(0)
    new_network(Network(64, 5, 7), rng)
    step, sdf = TrainingStep((), LossSettings(100.0, 0.1), 20), network.sdf_evaluator()
    for _ in range(2):
        take_step(step, new_batch(20, 0.5, rng), rng=1)
        points, values = (array.get() for array in step.uniform_points())
        assert points.shape == (10, 3) and np.abs(values - sdf(points)).max() < 1e-5


def test_two_threads_ask_for_the_sdf_at_once(on_gpu):
    rng = np.random.default_rng(0)
    new_network(Network(128, 5, 6), rng)
    sdf = network.sdf_evaluator()
    points = [rng.uniform(-1, 1, (count, 3)).astype(np.float32) for count in rng.integers(1, 9000, 60)] + [
        rng.uniform(-1, 1, (50000, 3)).astype(np.float32), np.zeros((0, 3), np.float32)]
    wanted = [sdf(x) for x in points]
    sdf = network.sdf_evaluator()       # its graphs are recorded by both threads
    with ThreadPoolExecutor(2) as pool:
        for found, exact in zip(pool.map(sdf, points), wanted):
            assert np.array_equal(found, exact)


@pytest.mark.parametrize("net", [Network(128, 5, 6), Network(96, 32, 8), Network(512, 256, 9)])
@pytest.mark.parametrize("shared_origin", [True, False])
def test_the_search_on_the_gpu_finds_what_the_hosts_search_finds(on_gpu, net, shared_origin):
    """Both have a grid of another sdf than the one that is searched, and learn. A full search tells the truth."""
    rng = np.random.default_rng(0)
    network.initialize(net, rng)
    for parameter in nn.get_parameters().values():
        parameter.d = parameter.d * (1 + 0.05 * rng.normal(size=parameter.shape))
    sdf = network.sdf_evaluator()
    directions = rng.normal(size=(3000, 3)).astype(np.float32)
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    origins = -2 * directions + 0.5 * rng.normal(size=(3000, 3)).astype(np.float32)
    if shared_origin:
        origins, directions = np.float32([0, 0, -2.5]), directions * np.float32([0.4, 0.4, 0]) + np.float32([0, 0, 1])
        directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    rays = origins, directions, rng.random(3000) < 0.6
    host = SdfGrid.of(sdf, 48)
    host.values += 0.004 * rng.normal(size=host.values.shape).astype(np.float32)
    grid, differ, numbers = sdf.search.remember(host, Limits()), [], []
    for number in range(4):
        before = sum(sdf.search.evaluations.values())
        t, hit = hit_or_least_sdf(sdf, *rays, search=partial(sdf.search, grid=grid), rng=np.random.default_rng(number))
        hit_or_least_sdf(host.listening(sdf), *rays, grid=host, rng=np.random.default_rng(number))
        wanted_t, wanted_hit = hit_or_least_sdf(sdf, *rays, rng=np.random.default_rng(number))
        numbers.append((sum(sdf.search.evaluations.values()) - before, sum(len(points) for points, _ in host.heard)))
        both, neither = hit & wanted_hit, ~hit & ~wanted_hit
        assert 100 < hit.sum() < rays[2].sum()
        # Another number of points is rounded otherwise.
        assert (np.abs(sdf((origins + t[:, None] * directions)[hit])) <= 5.1e-5).all()
        assert np.abs(t - wanted_t)[both].max() <= 5e-3 and np.median(np.abs(t - wanted_t)[both]) <= 5e-5
        differ.append((np.mean(hit != wanted_hit), np.mean((t != wanted_t)[neither])))
        points = rng.uniform(-1, 1, (1500, 3)).astype(np.float32)
        for known in (grid, host):
            known.learn_heard()
            known.learn(points, sdf(points))
    assert (np.mean(differ, axis=0) <= (1e-3, 1e-2)).all()
    (first, wanted_first), (last, wanted_last) = numbers[0], numbers[-1]
    assert first < 1.5 * wanted_first and last < 0.8 * first and last < 1.5 * wanted_last
    assert np.abs(grid.values - host.values).mean() < 2e-3
    assert np.allclose(sdf.search.remember(host, Limits()).margins, host.margins)


@pytest.mark.parametrize("net", [Network(128, 5, 6), Network(512, 256, 9)])
def test_a_render_by_the_search_on_the_gpu_is_the_same(on_gpu, net):
    rng = np.random.default_rng(0)
    network.initialize(net, rng)
    for parameter in nn.get_parameters().values():
        parameter.d = parameter.d * (1 + 0.05 * rng.normal(size=parameter.shape))
    sdf, shade = network.sdf_evaluator(), network.shader(net)
    pose = np.eye(4)
    pose[2, 3] = -3
    camera = helper.Camera(np.array([[300.0, 0, 100], [0, 300, 100], [0, 0, 1]]), pose, (200, 200))
    areas, centres = pixels.render_areas(sdf, shade, camera, Tracer())
    exact_areas, exact_centres = pixels.render_areas(lambda x: sdf(x), shade, camera, Tracer())
    both = centres.hit & exact_centres.hit
    assert 0.1 < both.mean() < 0.9 and (centres.hit != exact_centres.hit).mean() < 1e-3
    apart = np.abs(centres.depth - exact_centres.depth)[both]
    assert np.median(apart) <= 1e-4 and apart.max() <= 5e-3      # where rays graze, the tolerance is far along them
    assert (areas.alpha != exact_areas.alpha).mean() < 2e-3
    for ours, exact in ((areas.rgb, exact_areas.rgb), (areas.normals, exact_areas.normals)):
        assert np.abs(ours - exact)[both].mean() < 1e-3


@pytest.mark.parametrize("count", [1, 70, 5000])
def test_colours_and_normals_are_those_of_nnablas_functions(on_gpu, monkeypatch, count):
    net, rng = Network(128, 5, 6), np.random.default_rng(0)
    new_network(net, rng)
    points, directions = rng.normal(size=(2, count, 3)).astype(np.float32)
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    found = [network.shade(points, directions), network.shade(points), network.shade(points, directions)]
    assert all(np.array_equal(*pair) for pair in zip(found[0], found[2]))
    monkeypatch.setattr(context, "cuda", None)
    for (rgb, normals), given in zip(found, ((points, directions), (points,))):
        wanted_rgb, wanted_normals = network.shade(*given)
        assert np.abs(rgb - wanted_rgb).max() < 1e-4 and np.abs(normals - wanted_normals).max() < 1e-4


# --- where CuPy cannot be used ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("cupy, said", [
    (None, "which CuPy would speed up: cupy is not installed (requirements-gpu.txt lists it)"),
    (ImportError("\n=====\nCuPy is damaged.\n\nOriginal error:\n  libnvrtc.so.12: cannot open\n=====\n"),
     "which CuPy would speed up, but: libnvrtc.so.12: cannot open"),
    (RuntimeError(), "which CuPy would speed up, but: RuntimeError")])
def test_why_cupy_is_not_used(monkeypatch, cupy, said):
    class Finder:
        @staticmethod
        def find_spec(name, *_):
            if name == "cupy":
                raise cupy or ModuleNotFoundError("No module named 'cupy'", name="cupy")

    for name in ("cupy", "backends.cuda", "backends.gpu_kernels"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.delattr("backends.cuda", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Finder, *sys.meta_path])
    monkeypatch.setattr(context, "cuda", ModuleType("cuda"))
    found = context.cuda_or_reason("0")
    assert found == f"in nnabla's functions, {said}" and context.cuda is None
