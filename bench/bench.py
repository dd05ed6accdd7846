"""Measure where time goes: the parts of a training step, a render and an extraction, each with its lower bound.

    python bench/bench.py                                   the embedded scene, from the initial sphere
    python bench/bench.py --scene DTU/scan65 --model-load-path model.h5 --settings dtu
    mpirun -n 2 --bind-to none python bench/bench.py --settings dtu        a step on two GPUs: rays per second of both
    python bench/bench.py --settings small --views 4 500 --megapixels 12   steps on scenes too large for the memory

The floor of a part is the time of its matrix products at the rate of one large product on this machine, measured first.
The yardstick is NumPy's float32 product (20000 x 512) @ (512 x 512) on all cores; step times in yardsticks compare
across machines.
"""
import sys
import tempfile
import time
from collections import defaultdict
from contextlib import contextmanager
from pathlib import Path
from typing import Callable, Dict, Iterator, List, NamedTuple, Optional, Tuple, Union

import cv2
import nnabla as nn
import nnabla.functions as F
import nnabla.solvers as S
import numpy as np
from threadpoolctl import threadpool_limits

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import datasets  # noqa: E402
import extract  # noqa: E402
import helper  # noqa: E402
import make_scene  # noqa: E402
import network  # noqa: E402
import ray_tracer  # noqa: E402
from backends import architecture, cpu_kernels  # noqa: E402
from config.settings import Network, Tracer, load_config  # noqa: E402
from files import picture_store  # noqa: E402
from rendering import pixels  # noqa: E402
from train import remembered  # noqa: E402
from training import checkpoints, parallel  # noqa: E402
from training.step import LossSettings, PointSearch, TrainingStep, at_once, beside_the_update, place_points  # noqa: E402

# The networks and the rays per step.
SETTINGS = {"dtu": (Network(512, 256, 9), 2048), "small": (Network(128, 64, 9), 512), "demo": (Network(96, 32, 6), 128)}
ALPHA = 50.0    # of the mask loss, as at the start of training
LEARNING_RATE = 1e-4
GRADIENTS = "gradients"     # of the losses: the networks, the losses, and the way back
COMPILED = "trace, gradients"       # on a CPU, where one compiled function does both
WHOLE = "step"      # as in a training, which waits for a GPU only where it needs a result
# The functions of the tracer that evaluate, and their titles.
STAGES = {(ray_tracer, "_coarse_to_fine"): "samples", (ray_tracer, "_refine"): "refinement"}


class Machine(NamedTuple):
    """The speed of this machine."""
    rate: float         # FLOP/s of a large matrix product on the networks' device
    yardstick: float    # seconds


def main():
    parser = helper.argument_parser("Measure where the time of a step, a render and an extraction goes.", config=False)
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS),
                        help="sizes of the networks; by default all")
    parser.add_argument("--scene", help="a scene's folder, instead of the embedded scene")
    parser.add_argument("--model-load-path", help="a trained model of the setting, instead of the initial sphere")
    parser.add_argument("--views", type=int, nargs="+", default=[],
                        help="measure steps on made-up scenes of so many views, kept in a file as large scenes are")
    parser.add_argument("--megapixels", type=float, default=2.0, help="size of each of these views")
    parser.add_argument("--steps", type=int, default=10,
                        help="steps to measure in parts, and as many as a whole, after as many for warming up")
    parser.add_argument("--resolution", type=int, default=128, help="of the extraction, in cells")
    args = parser.parse_args()
    world = parallel.connect(args.context, args.device_id)
    scene = datasets.load_scene(args.scene) if args.scene else embedded_scene()
    yardstick, rate = measure_yardstick(), measure_rate()
    print(f"yardstick {yardstick * 1e3:.1f} ms; matrix products at {rate / 1e9:.0f} GFLOP/s")
    conf = load_config(Path(__file__).resolve().parent.parent / "config" / "default.yaml")
    if args.views:
        bench_views(args, conf.tracer, Machine(rate, yardstick), world)
        return
    for setting in args.settings:
        net, num_rays = SETTINGS[setting]
        network.initialize(net, np.random.default_rng(0))
        if args.model_load_path:
            checkpoints.load_model(args.model_load_path, architecture.parameter_shapes(net))
        state = "trained" if args.model_load_path else "initial sphere"
        print(f"\n{setting} (width {net.width}, feature {net.feature}, {net.layers} layers, {num_rays} rays), {state}")
        draw = datasets.Draw(num_rays)
        seconds, evaluations, num_surface = measure_steps(scene, conf.tracer, draw, args.steps, world)
        print_steps(seconds, evaluations, num_surface, world.size * num_rays, Machine(rate, yardstick))
        if world.size == 1:     # only training uses several processes
            bench_render(scene, net, conf.tracer, rate)
            bench_extraction(args.resolution, rate)


def embedded_scene() -> datasets.Scene:
    """Return make_scene.py's scene, without files: 8 views of 400x400 pixels."""
    views = []
    intrinsics = make_scene.camera_intrinsics(400)
    for direction in make_scene.view_directions(8, 0):
        pose = make_scene.look_at(make_scene.DISTANCE * direction, np.zeros(3), (0, 0, 1))
        views.append((*make_scene.render(intrinsics, pose, 400), intrinsics, pose))
    images, masks, intrinsics, poses = (np.stack(part) for part in zip(*views))
    return datasets.Scene(images, masks > 0, intrinsics, poses, np.eye(4), [str(v) for v in range(8)])


@contextmanager
def stored_scene(num_views: int, megapixels: float) -> Iterator[datasets.Scene]:
    """Yield the embedded scene's 8 views again and again, enlarged, in a file in this folder, which is removed then."""
    scene = embedded_scene()
    side, count = int((megapixels * 1e6) ** 0.5), len(scene.images)
    factor = scene.masks.shape[1] / side

    def read(view):
        image, mask = (cv2.resize(array[view % count].astype(np.uint8), (side, side), interpolation=cv2.INTER_NEAREST)
                       for array in (scene.images, scene.masks))
        return picture_store.View(image, mask > 0, datasets.mask_regions(mask > 0))

    with tempfile.TemporaryDirectory(prefix=".bench-", dir=".") as folder:
        store = picture_store.build(Path(folder) / "pictures.cache", "bench", (num_views, side, side), read,
                                    picture_store.num_workers(side * side))
        again = np.arange(num_views) % count
        yield datasets.Scene(store.images, store.masks, datasets.shrink_intrinsics(scene.intrinsics[again], factor),
                             scene.poses[again], np.eye(4), [str(view) for view in range(num_views)], store)


def bench_views(args, tracer: Tracer, machine: Machine, world: parallel.World) -> None:
    """Print the time of a step, with half of the rays at outlines, on large scenes of args.views views each."""
    for setting in args.settings:
        net, num_rays = SETTINGS[setting]
        for num_views in args.views:
            network.initialize(net, np.random.default_rng(0))
            with stored_scene(num_views, args.megapixels) as scene:
                pixels = f"{scene.masks.shape[2]}x{scene.masks.shape[1]} pixels, {scene.masks.size * 4e-9:.1f} GB"
                print(f"\n{setting}, {num_rays} rays, {num_views} views of {pixels}")
                draw = datasets.Draw(num_rays, outline_fraction=0.5)
                seconds, evaluations, num_surface = measure_steps(scene, tracer, draw, args.steps, world)
                print_steps(seconds, evaluations, num_surface, world.size * num_rays, machine)


def measure_yardstick() -> float:
    """Return the median seconds of NumPy's (20000 x 512) @ (512 x 512) in float32 on all cores."""
    rng = np.random.default_rng(0)
    a, b = (rng.normal(size=shape).astype(np.float32) for shape in ((20000, 512), (512, 512)))
    with threadpool_limits(cpu_kernels.CORES, user_api="blas"):
        return np.median([timed(lambda: a @ b) for _ in range(9)][2:])


def measure_rate() -> float:
    """Return the FLOP/s of a large float32 matrix product on the networks' device."""
    if network.on_cpu():
        return 2 * 20000 * 512 * 512 / measure_yardstick()
    x, w = nn.Variable((65536, 512)), nn.Variable((512, 512))
    y = F.affine(x, w)

    def products():
        for _ in range(10):
            y.forward()
        synchronize()

    return 10 * 2 * 65536 * 512 * 512 / np.median([timed(products) for _ in range(5)][2:])


def timed(function: Callable) -> float:
    """Return the seconds that a call takes."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def synchronize() -> None:
    """Wait for the GPU, if it is used: its calls return before they finish."""
    if not network.on_cpu():
        import nnabla_ext.cuda
        nnabla_ext.cuda.synchronize(nn.get_current_context().device_id)


def layer_flops(name: str) -> int:
    """Return the FLOPs of one row through the affine layers of "implicit" or "rendering"."""
    return sum(2 * v.size for v, _, _ in network.layer_parameters(name))


@contextmanager
def named_stages(stage: Dict[str, str]) -> Iterator[None]:
    """Keep stage["now"] at the title of the tracer's current stage, within the block."""
    def wrapped(function, name):
        def stage_function(*args, **kwargs):
            stage["now"] = name
            return function(*args, **kwargs)
        return stage_function

    kept = {place: getattr(*place) for place in STAGES}
    for place, title in STAGES.items():
        setattr(*place, wrapped(kept[place], title))
    try:
        yield
    finally:
        for place, function in kept.items():
            setattr(*place, function)


class Stopwatch:
    """Calls functions and, while it runs, notes the seconds that each takes: {name: [seconds]}."""

    def __init__(self):
        self.seconds, self.runs = defaultdict(list), True

    def __call__(self, name: str, function: Callable, *args):
        start = time.perf_counter()
        result = function(*args)
        if self.runs:
            synchronize()
            self.seconds[name].append(time.perf_counter() - start)
        return result


def measure_steps(scene: datasets.Scene, tracer: Tracer, draw: datasets.Draw, num_steps: int,
                  world: parallel.World) -> Tuple[Dict[str, List[float]], Dict[str, float], float]:
    """Take 3 num_steps training steps. Measure the parts of the second third, and the steps of the last one as a whole.

    The networks change, as what the search remembers of the sdf must be as old as in a training. Each of several
    processes measures its own steps; waiting for the others counts as all-reduce.
    Returns {part: seconds of each step; WHOLE: the same}, {stage of the tracer: evaluations per step; "<stage> calls":
    calls per step}, and the mean number of surface rows.
    """
    rng = np.random.default_rng(world.rank)
    solver = S.Adam(LEARNING_RATE)
    solver.set_parameters(nn.get_parameters())
    sdf, step = network.sdf_evaluator(), TrainingStep((), LossSettings(100.0, 0.1), draw.num_rays)
    grid = remembered(sdf, draw.num_rays)
    batches = datasets.training_batches(scene, list(range(len(scene.images))), draw, process=world)
    timed_part, stage, evaluations, num_surface = Stopwatch(), {}, defaultdict(float), []
    seconds = timed_part.seconds

    def learn_and_draw():
        if grid:
            timed_part("learn", step.teach, grid)
        return timed_part("batch", next, batches)

    counted, beside = counting_stages(sdf, stage, evaluations, num_steps), beside_the_update()
    batch = next(batches)
    for number in range(3 * num_steps):
        start = time.perf_counter()
        if number == num_steps:
            for warm in (seconds, evaluations, num_surface):
                warm.clear()
            before = dict(sdf.search.evaluations) if sdf.search else {}
        if number == 2 * num_steps:
            timed_part.runs = False
            count_search(evaluations, sdf.search, before, num_steps)
            measured = dict(evaluations)
        if network.on_cpu():        # one compiled function does it all
            placed, losses = timed_part(COMPILED, step.take, solver, PointSearch(sdf, tracer, grid), batch, ALPHA, rng)
            for place, (points, _) in enumerate(grid.heard):    # of each block, as training/search.py says
                evaluations["refinement" if place % 2 else "samples"] += len(points) / num_steps
        else:
            timed_part("refresh", sdf.refresh)
            with named_stages(stage):
                placed = timed_part("trace", place_points, sdf if grid else counted, batch, tracer, rng, grid)
            losses = timed_part(GRADIENTS, step.compute_gradients, solver, batch, placed, ALPHA, rng)
        num_surface.append(placed.hit_in_mask.sum())
        if world.size > 1:
            timed_part("all-reduce", world.mean_gradients)
        following = (at_once if timed_part.runs else beside)(learn_and_draw)
        float(losses["loss"].d)     # as train.py does, which checks it
        timed_part("update", solver.update)
        batch = following.result()
        if not timed_part.runs:
            seconds[WHOLE].append(time.perf_counter() - start)
    return seconds, measured, np.mean(num_surface)


def counting_stages(sdf, stage: Dict[str, str], evaluations: Dict[str, float], num_steps: int) -> Callable:
    """Return an sdf as network.sdf_evaluator gives it, which counts its points and calls in each stage, per step."""
    def counting(points, counted=sdf):
        evaluations[stage["now"]] += len(points) / num_steps
        evaluations[stage["now"] + " calls"] += 1 / num_steps
        return counted(points)

    counting.half_precision = sdf.half_precision and (lambda points: counting(points, sdf.half_precision))
    counting.search = sdf.search
    return counting


def count_search(evaluations: Dict[str, float], search: Optional[Callable], before: Dict[str, int],
                 num_steps: int) -> None:
    """Add the evaluations per step of a search on a GPU since `before`. It keeps no count of its calls."""
    for kind, so_far in before.items():
        evaluations[kind] += (search.evaluations[kind] - so_far) / num_steps


def print_steps(seconds: Dict[str, List[float]], evaluations: Dict[str, float], num_surface: float, num_rays: int,
                machine: Machine) -> None:
    """Print the results of measure_steps, and the floors of the parts; num_rays: the total of all processes."""
    sdf_flops, rendering_flops = layer_flops("implicit"), layer_flops("rendering")
    rows = 1.5 * num_rays + num_surface
    traced = sum(evaluations[stage] for stage in set(STAGES.values()))
    floors = {"trace": traced * sdf_flops, GRADIENTS: 6 * rows * sdf_flops + 3 * num_surface * rendering_flops}
    floors[COMPILED] = floors[WHOLE] = sum(floors.values())
    print_row("part", "ms", "floor ms", "ratio")
    for name, values in seconds.items():
        print_row(name, 1e3 * np.median(values), *floor(floors.get(name), np.median(values), machine.rate))
    whole = np.median(seconds[WHOLE])
    print(f"step: {whole / machine.yardstick:.2f} yardsticks; surface rows {num_surface:.0f}; {num_rays / whole:.0f} "
          "rays per second")
    print(f"evaluations per step: {traced:.0f}: " + ", ".join(
        f"{stage} {evaluations[stage]:.0f}" + (f" in {calls:.1f} calls" if calls else "")
        for stage in dict.fromkeys(STAGES.values()) for calls in [evaluations.get(f"{stage} calls")]))


def floor(flops: Optional[float], seconds: float, rate: float) -> Tuple[Union[float, str], Union[float, str]]:
    """Return the floor in ms and the ratio of the measured seconds to it; ("", "") for a part without a floor."""
    return ("", "") if flops is None else (1e3 * flops / rate, seconds * rate / flops)


def print_row(name: str, *values: Union[float, str]) -> None:
    """Print one line of the table."""
    print(f"{name:<12}" + "".join(f"{v:>10.2f}" if not isinstance(v, str) else f"{v:>10}" for v in values))


def counting_sdf() -> Tuple[ray_tracer.Sdf, List[int]]:
    """Return the sdf of the current parameters, and a list that each call extends by its number of points."""
    sdf, calls = network.sdf_evaluator(), []
    return (lambda points: (calls.append(len(points)), sdf(points))[1]), calls


def bench_render(scene: datasets.Scene, net: Network, tracer: Tracer, rate: float) -> None:
    """Print the time to render the masked pixels of an image about 100 pixels high, and its floor."""
    factor = max(scene.masks.shape[1] // 100, 1)
    sdf, calls = counting_sdf()
    mask = datasets.shrink_mask(scene.masks[0], factor)
    camera = helper.Camera(datasets.shrink_intrinsics(scene.intrinsics[0], factor), scene.poses[0], mask.shape)
    arguments = sdf, network.shader(net), camera, tracer, mask
    pixels.render_view(*arguments)
    calls.clear()
    seconds = timed(lambda: pixels.render_view(*arguments))
    flops = sum(calls) * layer_flops("implicit") + mask.sum() * (2 * layer_flops("implicit") + layer_flops("rendering"))
    print(f"render of {mask.sum()} masked pixels: {seconds:.2f} s, {flops / rate:.2f} s at the floor, {sum(calls)} "
          "evaluations")


def bench_extraction(resolution: int, rate: float) -> None:
    """Print the time of an extraction, its floor, and its evaluations compared with a dense grid."""
    sdf, calls = counting_sdf()
    seconds = timed(lambda: extract.extract(sdf, 64, resolution))
    print(f"extraction at {resolution}: {seconds:.2f} s, {sum(calls) * layer_flops('implicit') / rate:.2f} s at the "
          f"floor, {sum(calls)} evaluations, 1/{resolution ** 3 / sum(calls):.0f} of {resolution} cubed")


if __name__ == "__main__":
    parallel.run(main)
