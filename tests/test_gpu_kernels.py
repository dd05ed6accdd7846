"""The networks' kernels on a GPU against nnabla's functions: values, gradients, graphs that are kept."""
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import ModuleType

import nnabla as nn
import numpy as np
import pytest

import helper
import network
from backends import context, gpu
from config.settings import Network, Tracer
from ray_tracer import Limits, hit_or_least_sdf
from rendering import pixels
from tracing.sdf_grid import SdfGrid
from training.step import LOSSES, LossSettings, TrainingGraph


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
    return np.linalg.norm(found - wanted) / max(np.linalg.norm(wanted), 1e-12)


def new_network(net, rng):
    """Set nnabla's parameters to a network that is no sphere."""
    network.initialize(net, rng)
    move_parameters(rng)


def move_parameters(rng):
    for parameter in nn.get_parameters().values():
        parameter.d = parameter.d + 0.02 * rng.normal(size=parameter.shape)


def zero_gradients():
    for parameter in nn.get_parameters().values():
        parameter.grad.zero()


def set_inputs(graph, rng):
    num_hits, num_rays = graph.directions.shape[0], graph.num_rays
    graph.alpha.d = 50.0
    graph.points.d = rng.uniform(-0.7, 0.7, graph.points.shape)
    graph.object_mask.d = rng.integers(0, 2, (num_rays, 1))
    graph.mask_weights.d = rng.uniform(0.3, 3.0, (1, num_rays))
    if num_hits:
        directions = rng.normal(size=(num_hits, 3))
        graph.directions.d = directions / np.linalg.norm(directions, axis=1, keepdims=True)
        graph.rgb.d = rng.uniform(-1, 1, (num_hits, 3))
        graph.color_weights.d = rng.uniform(0.3, 3.0, (1, num_hits))


def results(graph):
    """Return copies of a step's losses, of all gradients, and of the rays' if they are wanted."""
    found = {name: graph.losses[name].d.copy() for name in LOSSES}
    found.update({name: parameter.g.copy() for name, parameter in nn.get_parameters().items()
                  if graph.directions.shape[0] or name.startswith("implicit")})
    if graph.directions.need_grad:
        found.update(zip(("points", "directions"), map(np.copy, graph.grad_rays())))
    return found


def take_step(graph):
    zero_gradients()
    graph.forward()
    graph.backward()
    return results(graph)


def assert_equal(found, wanted, tolerance=1e-5):
    assert found.keys() == wanted.keys()
    assert {name: error for name in wanted
            if not (error := relative_error(found[name], wanted[name])) <= tolerance} == {}


SHAPES = [(Network(512, 256, 9), 512, 200, False), (Network(512, 256, 9), 200, 200, True),
          (Network(64, 32, 9), 51, 0, True), (Network(67, 5, 6), 21, 21, True), (Network(70, 90, 5), 33, 3, True),
          (Network(64, 1, 2), 30, 7, False), (Network(65, 1, 3), 5, 1, True)]


@pytest.mark.parametrize("net, num_rays, num_hits, want_grad_rays", SHAPES)
def test_steps_with_changing_parameters_equal_those_of_nnabla(on_gpu, monkeypatch, net, num_rays, num_hits,
                                                             want_grad_rays):
    def steps():
        rng = np.random.default_rng(0)
        new_network(net, rng)
        settings = LossSettings(100.0, 0.1, least_slope=0.3 if num_hits == 3 else 1e-6)
        graph = TrainingGraph((), settings, num_rays, num_hits, want_grad_rays)
        sdf = network.sdf_evaluator()
        for _ in range(3):
            move_parameters(rng)
            set_inputs(graph, rng)
            sdf.refresh()
            yield {**take_step(graph), "sdf": sdf(rng.uniform(-1, 1, (rng.integers(1, 3000), 3)).astype(np.float32))}

    found = list(steps())
    assert type(network.sdf_evaluator()) is context.cuda.Sdf
    monkeypatch.setattr(context, "cuda", None)
    assert type(network.sdf_evaluator()) is gpu.Sdf
    for ours, theirs in zip(found, steps()):
        assert_equal(ours, theirs)


def test_gradients_are_added_to_those_that_are_there(on_gpu):
    rng = np.random.default_rng(0)
    new_network(Network(64, 5, 4), rng)
    graph = TrainingGraph((), LossSettings(100.0, 0.1), 20, 9)
    set_inputs(graph, rng)
    once = take_step(graph)
    graph.forward()
    graph.backward()
    assert_equal(results(graph), {name: value if name in LOSSES else 2 * value for name, value in once.items()})


def test_two_evaluations_at_once_keep_apart(on_gpu):
    rng = np.random.default_rng(0)
    new_network(Network(64, 5, 7), rng)
    graphs = [TrainingGraph((), LossSettings(100.0, 0.1), 20, num_hits, True) for num_hits in (9, 9, 4)]
    for graph in graphs:
        set_inputs(graph, rng)
    apart = [take_step(graph) for graph in graphs]
    for graph in graphs:
        graph.forward()
    for graph, wanted in zip(graphs, apart):
        zero_gradients()
        graph.backward()
        assert_equal(results(graph), wanted)


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


def test_half_precision_is_near(on_gpu):
    rng = np.random.default_rng(0)
    new_network(Network(128, 5, 6), rng)
    sdf = network.sdf_evaluator()
    for count in (1, 300, 40000):
        x = rng.uniform(-1, 1, (count, 3)).astype(np.float32)
        assert 0 < np.abs(sdf.in_precision(x, half=True) - sdf(x)).max() <= 4e-3


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
    assert abs(first - wanted_first) <= 0.02 * wanted_first and last < 0.8 * first and last < 1.2 * wanted_last
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
