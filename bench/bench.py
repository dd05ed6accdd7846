"""Where the time goes: a training step in parts, a render and an extraction, each beside its floor.

    python bench/bench.py                                   the embedded scene, from the initial sphere
    python bench/bench.py --scene DTU/scan65 --model-load-path model.h5 --settings dtu
    mpirun -n 2 --bind-to none python bench/bench.py --settings dtu        a step on two GPUs: rays per second of both

The floor of a part is its matrix products at the rate that one large product reaches here (measured first); the
yardstick is NumPy's float32 product (20000 x 512) @ (512 x 512) on all cores, which travels between machines.
"""
import sys
import time
from collections import defaultdict
from contextlib import contextmanager
from pathlib import Path

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
import synthesize  # noqa: E402
from backends import (
    architecture,
    cpu_kernels,  # noqa: E402
)
from config import settings
from training import (
    checkpoints,  # noqa: E402
    parallel,  # noqa: E402
    step,
)

# Width, feature, layers, rays.
SETTINGS = {"dtu": (512, 256, 9, 2048), "small": (128, 64, 9, 512), "demo": (96, 32, 6, 128)}
ALPHA = 50.0    # of the mask loss, at the beginning of a training
STAGES = {"_coarse_to_fine": "samples", "_refine": "refinement"}


def main():
    parser = helper.argument_parser("Measure where the time of a step, a render and an extraction goes.", config=False)
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--scene", help="a scene's folder, instead of the embedded scene")
    parser.add_argument("--model-load-path", help="a trained model of the setting, instead of the initial sphere")
    parser.add_argument("--steps", type=int, default=10, help="steps measured, after as many not counted")
    parser.add_argument("--resolution", type=int, default=128, help="of the extraction")
    args = parser.parse_args()
    world = parallel.connect(args.context, args.device_id)
    scene = datasets.load_scene(args.scene) if args.scene else embedded_scene()
    yardstick, rate = measure_yardstick(), measure_rate()
    print(f"yardstick {yardstick * 1e3:.1f} ms; matrix products at {rate / 1e9:.0f} GFLOP/s")
    conf = settings.load_config(Path(__file__).resolve().parent.parent / "config" / "default.yaml")
    for setting in args.settings:
        width, feature, layers, rays = SETTINGS[setting]
        network.initialize(width, feature, layers, 0.6, np.random.default_rng(0))
        if args.model_load_path:
            checkpoints.load_model(args.model_load_path, architecture.parameter_shapes(width, feature, layers))
        state = "trained" if args.model_load_path else "initial sphere"
        print(f"\n{setting} (width {width}, feature {feature}, {layers} layers, {rays} rays), {state}")
        bench_step(scene, conf.tracer, rays, args.steps, rate, yardstick, world)
        if world.size == 1:     # only training takes several
            bench_render(scene, conf.tracer, rate)
            bench_extraction(args.resolution, rate)


def embedded_scene():
    """The embedded scene, straight from its maker: 8 views of 400x400."""
    views = []
    intrinsics = make_scene.camera_intrinsics(400)
    for direction in make_scene.view_directions(8, 0):
        pose = make_scene.look_at(make_scene.DISTANCE * direction, np.zeros(3), (0, 0, 1))
        views.append((*make_scene.render(intrinsics, pose, 400), intrinsics, pose))
    images, masks, intrinsics, poses = (np.stack(part) for part in zip(*views))
    return datasets.Scene(images, masks > 0, intrinsics, poses, np.eye(4), [str(v) for v in range(8)])


def measure_yardstick():
    """Median seconds of NumPy's (20000 x 512) @ (512 x 512) in float32 on all cores."""
    rng = np.random.default_rng(0)
    a, b = (rng.normal(size=shape).astype(np.float32) for shape in ((20000, 512), (512, 512)))
    with threadpool_limits(cpu_kernels.CORES, user_api="blas"):
        return np.median([timed(lambda: a @ b) for _ in range(9)][2:])


def measure_rate():
    """FLOP/s of a large float32 matrix product where the networks are computed."""
    if network.on_cpu():
        return 2 * 20000 * 512 * 512 / measure_yardstick()
    x, w = nn.Variable((65536, 512)), nn.Variable((512, 512))
    y = F.affine(x, w)

    def products():
        for _ in range(10):
            y.forward()
        synchronize()

    return 10 * 2 * 65536 * 512 * 512 / np.median([timed(products) for _ in range(5)][2:])


def timed(function):
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def synchronize():
    """Wait for the GPU, where there is one: its calls return before they are done."""
    if not network.on_cpu():
        import nnabla_ext.cuda
        nnabla_ext.cuda.synchronize(nn.get_current_context().device_id)


def layer_flops(name):
    """FLOPs of one row through the affine layers of "implicit" or "rendering"."""
    return sum(2 * v.size for v, _, _ in network.layer_parameters(name))


@contextmanager
def counted_stages(counts):
    """Count, in `counts`, the sdf evaluations and calls of each stage of the tracer."""
    def wrapped(function, stage):
        def stage_function(*args, **kwargs):
            counts["stage"] = stage
            return function(*args, **kwargs)
        return stage_function

    kept = {name: getattr(ray_tracer, name) for name in STAGES}
    for name, stage in STAGES.items():
        setattr(ray_tracer, name, wrapped(kept[name], stage))
    try:
        yield
    finally:
        for name, function in kept.items():
            setattr(ray_tracer, name, function)


def bench_step(scene, tracer, rays, steps, rate, yardstick, world):
    """Print the parts of a training step, their floors and the evaluations of the tracer's stages.

    Of several processes, each measures its own step; what one waits for the others is in the all-reduce.
    """
    rng = np.random.default_rng(world.rank)
    solver = S.Adam(1e-30)      # the state that is measured stays as it is
    solver.set_parameters(nn.get_parameters())
    sdf, step = network.sdf_evaluator(), step.TrainingStep(rays, 100.0, 0.1)
    batches = datasets.training_batches(scene, list(range(len(scene.images))), rays, 0, 0, world.rank, world.size)
    seconds, counts, evaluations, surface = defaultdict(list), {}, defaultdict(int), []

    def part(name, function, *args):
        start = time.perf_counter()
        result = function(*args)
        synchronize()
        seconds[name].append(time.perf_counter() - start)
        return result

    def counting(points, evaluate=sdf):
        evaluations[counts["stage"]] += len(points)
        evaluations[counts["stage"] + " calls"] += 1
        return evaluate(points)

    counting.roughly = sdf.roughly and (lambda points: counting(points, sdf.roughly))

    for number in range(2 * steps):
        if number == steps:
            seconds.clear()
            evaluations.clear()
            surface.clear()
        batch = part("batch", next, batches)
        part("refresh", sdf.refresh)
        with counted_stages(counts):
            points, colored = part("trace", step.place_points, counting, batch.origin, batch.directions, batch.mask,
                                   tracer, rng)
        g = part("inputs", step.filled, points, colored, batch.directions, batch.rgb, batch.mask,
                 batch.weights, ALPHA, rng)
        solver.zero_grad()
        part("forward", g["forward"])
        part("backward", g["backward"])
        if world.size > 1:
            part("all-reduce", world.mean_gradients)
        part("update", solver.update)
        surface.append(step.graph(colored.sum())[0])
    sdf_flops, rendering_flops = layer_flops("implicit"), layer_flops("rendering")
    rows, seen = 1.5 * rays + np.mean(surface), np.mean(surface)
    traced = sum(evaluations[stage] for stage in STAGES.values()) / steps
    floors = {"trace": traced * sdf_flops, "forward": 2 * rows * sdf_flops + seen * rendering_flops,
              "backward": 4 * rows * sdf_flops + 2 * seen * rendering_flops}
    print_row("part", "ms", "floor ms", "ratio")
    for name, values in seconds.items():
        print_row(name, 1e3 * np.median(values), *floor(floors.get(name), np.median(values), rate))
    whole = np.median(np.sum(list(seconds.values()), axis=0))
    print_row("step", 1e3 * whole, *floor(sum(floors.values()), whole, rate))
    print(f"step: {whole / yardstick:.2f} yardsticks; surface rows {seen:.0f}; {world.size * rays / whole:.0f} rays per "
          "second")
    print("evaluations per step: " + ", ".join(
        f"{stage} {evaluations[stage] / steps:.0f} in {evaluations[stage + ' calls'] / steps:.0f} calls"
        for stage in STAGES.values()))


def floor(flops, seconds, rate):
    return ("", "") if flops is None else (1e3 * flops / rate, seconds * rate / flops)


def print_row(name, *values):
    print(f"{name:<12}" + "".join(f"{v:>10.2f}" if not isinstance(v, str) else f"{v:>10}" for v in values))


def counting_sdf():
    """The evaluator of the current parameters and a list of the number of points in each of its calls."""
    sdf, calls = network.sdf_evaluator(), []
    return (lambda points: (calls.append(len(points)), sdf(points))[1]), calls


def bench_render(scene, tracer, rate):
    """Print the time of the masked pixels of a 100 pixel high render, per image and per ray."""
    factor = max(scene.masks.shape[1] // 100, 1)
    sdf, calls = counting_sdf()
    mask = datasets.shrink_mask(scene.masks[0], factor)
    arguments = (datasets.shrink_intrinsics(scene.intrinsics[0], factor), scene.poses[0], mask.shape, tracer, mask)
    synthesize.render_view(sdf, *arguments)
    calls.clear()
    seconds = timed(lambda: synthesize.render_view(sdf, *arguments))
    flops = sum(calls) * layer_flops("implicit") + mask.sum() * (2 * layer_flops("implicit") + layer_flops("rendering"))
    print(f"render of {mask.sum()} masked pixels: {seconds:.2f} s, {flops / rate:.2f} s at the floor, {sum(calls)} "
          "evaluations")


def bench_extraction(resolution, rate):
    """Print the time of an extraction and its evaluations, beside those of a dense grid."""
    sdf, calls = counting_sdf()
    seconds = timed(lambda: extract.extract(sdf, 64, resolution))
    print(f"extraction at {resolution}: {seconds:.2f} s, {sum(calls) * layer_flops('implicit') / rate:.2f} s at the "
          f"floor, {sum(calls)} evaluations, 1/{resolution ** 3 / sum(calls):.0f} of {resolution} cubed")


if __name__ == "__main__":
    parallel.run(main)
