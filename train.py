"""Train IDR on a scene: posed photographs and masks in, a model (.h5) with the surface and its renderer out.

    python train.py --config config/default.yaml --monitor-path results
    python train.py --config config/default.yaml --monitor-path results --resume
    mpirun -n 4 --bind-to none python train.py --config config/default.yaml --monitor-path results

Writes to {monitor_path}_{scan}: the configuration, a series per loss, validation renders, model_{epoch:05d}.h5, and
state.h5, from which the second command goes on. The third trains on four GPUs; see parallel.py.
"""
import contextlib
import re
import signal
import sys
import time
import warnings
from pathlib import Path

import nnabla.solvers as S
import numpy as np
from nnabla.monitor import MonitorSeries, MonitorTimeElapsed
from tqdm import tqdm

import cameras
import checkpoints
import datasets
import evaluate
import helper
import network
import parallel
import ray_tracer
import report
import synthesize

STATE_EVERY = 120       # seconds: what a run that is killed may lose; it changes no result
NO_LOSS = 17.0          # sigmoid(-17), the mask loss of a ray outside the mask with alpha * sdf = 17, is lost beside 1


def main():
    parser = helper.argument_parser("Train IDR on a scene.")
    parser.add_argument("--resume", nargs="?", const="", metavar="FOLDER",
                        help="go on with an interrupted run: that in {monitor_path}_{scan}, or in another FOLDER")
    args = parser.parse_args()
    conf = helper.load_config(args.config)
    scene = datasets.load_scene(conf.data.path, conf.data.downscale, conf.data.cameras)
    views = datasets.training_views(conf.data.held_out_views, len(scene.images), f"{args.config}: data.held_out_views")
    datasets.check_views([conf.train.validation_view], len(scene.images), f"{args.config}: train.validation_view")
    datasets.check_downscale(scene.masks.shape[1:], conf.train.validation_downscale,
                             f"{args.config}: train.validation_downscale")
    ranks, state = parallel.launched().size, None
    if ranks > 1 and conf.train.camera_learning_rate:
        raise helper.UserError(f"{args.config}: train.camera_learning_rate is {conf.train.camera_learning_rate}, but "
                               f"cameras are trained by one process, not {ranks}; start without mpirun, or set it to 0")
    folder = Path(args.resume or helper.run_folder(conf, args.monitor_path))
    if args.resume is not None:
        state = checkpoints.load_state(folder, network.parameter_shapes(
            conf.network.width, conf.network.feature, conf.network.layers, conf.network.without))
        check_cameras(state, conf.train.camera_learning_rate, len(scene.images))
        if is_complete(state, conf.train.epochs, len(views), ranks):
            print(f"{folder} is trained: {state.progress['step'] // state.progress['steps']} epochs, where "
                  f"{args.config} wants {conf.train.epochs}; raise train.epochs there to train on")
            helper.remove_unfinished(folder)
            return
    world = parallel.connect(args.context, args.device_id)
    writes = world.rank == 0        # the first process, or the only one; the others wait for it where they meet next
    warnings.simplefilter("ignore", RuntimeWarning)     # of NumPy's, on overflow: the losses are looked at instead
    if not writes:
        held = contextlib.nullcontext(folder)
    elif state is None:
        held = helper.new_run_folder(conf, args.monitor_path)
    else:
        held = helper.held(folder)
    with held as folder, helper.stop_signals() as stop:
        if writes:
            if state is not None:
                tell_resumed(state, conf)
                helper.remove_unfinished(folder)
            helper.copy_config(args.config, folder)
        with report.last_page(folder) if writes else contextlib.nullcontext():
            finished = train(conf, scene, views, folder, state, stop, world)
        if finished:
            print(f"trained: {folder / model_name(conf.train.epochs - 1)}")
        else:
            print(f"stopped; the same command with --resume{' ' + str(folder) if args.resume else ''} goes on",
                  flush=True)
        world.wait()        # for the first to have written: mpirun ends all with any that ends otherwise than with 0
    if not finished:
        sys.exit(128 + (stop or [signal.SIGTERM])[0])     # as a shell has it for a program that a signal ended


def train(conf, scene, views, folder, state, stop, world):
    """Train on `views` of the scene, from the start or from `state`, until `stop` is not empty or the end.

    world: the processes that take part; where one is to stop, all do. Returns whether it came to its end.
    """
    steps, first, loss = datasets.epoch_steps(len(views), world.size), 0, 0.0      # steps: of an epoch
    solver, camera_solver = S.Adam(conf.train.learning_rate), None
    solvers = {"solver": solver}
    if conf.train.camera_learning_rate:
        camera_solver = solvers["cameras"] = cameras.SparseAdam(conf.train.camera_learning_rate)
    if state is None:
        network.initialize(**vars(conf.network), rng=np.random.default_rng(conf.train.seed))
        if camera_solver:
            checkpoints.set_parameters({checkpoints.POSE: cameras.pose_vectors(scene.poses)})
        for name in solvers:
            solvers[name].set_parameters(checkpoints.solver_parameters(name))
    else:
        checkpoints.restore_state(state, solvers)
        first, loss = state.progress["step"], state.progress["loss"]
        scene = scene._replace(poses=cameras.trained_poses(scene.poses, state.path))
    world.check_same([first, helper.settings(conf)], "the processes do not begin alike: each needs the same "
                     "configuration and, with --resume, the same run's folder; let the machines share their files")
    sdf = network.sdf_evaluator()
    compute = TrainingStep(conf.train.rays, conf.train.mask_weight, conf.train.eikonal_weight, conf.network.without,
                           by_rays=camera_solver is not None)
    pose, truth = cameras.parameter(), cameras.true_cameras(conf.data.path, conf.data.cameras, len(scene.images))
    # An epoch whose last step is done may still lack its render and its model: it is taken up once more.
    start = max(first - 1, 0) // steps
    due = is_due(start, conf.train.validate_every, conf.train.epochs)
    log = EpochLog(None if world.rank else folder, steps, first, validated_until=start if due else start + 1,
                   state=state)

    def save(step):
        if world.rank:
            return np.inf       # it is not for this process to save, however late it gets
        now = {"step": step, "steps": steps, "views": len(views), "ranks": world.size, "loss": loss,
               "config": helper.settings(conf), **log.times()}
        checkpoints.save_state(folder, solvers, now, log.buffers())
        return time.monotonic()

    saved = save(first) if state is None else time.monotonic()
    # With trained cameras a ray's direction in the world is known only when its step begins.
    source = scene._replace(poses=np.tile(np.eye(4), (len(scene.poses), 1, 1))) if camera_solver else scene
    batches = datasets.training_batches(source, views, conf.train.rays, conf.train.seed, first, world.rank, world.size,
                                        conf.train.outline_rays)
    batch = next(batches)
    with tqdm(initial=first, total=conf.train.epochs * steps, unit="step", dynamic_ncols=True,
              smoothing=0.05, disable=world.rank > 0) as progress:
        for epoch in range(start, conf.train.epochs):
            slower = scheduled(1.0, 0.5, conf.train.learning_rate_halved_after, epoch)
            solver.set_learning_rate(conf.train.learning_rate * slower)
            if camera_solver:
                camera_solver.learning_rate = conf.train.camera_learning_rate * slower
            alpha = scheduled(conf.train.alpha, 2.0, conf.train.alpha_doubled_after, epoch)
            for step in range(max(first, epoch * steps), (epoch + 1) * steps):
                rng = helper.random_numbers(conf.train.seed, helper.SAMPLES, step * world.size + world.rank)
                view, origin, directions, rgb, mask, weights = batch
                if camera_solver:
                    in_camera = directions
                    origin, directions = cameras.rays(pose.d[view], in_camera)
                sdf.refresh()
                points, colored = place_points(sdf, origin, directions, mask, alpha, conf.tracer, rng)
                losses = compute(solver, points, colored, directions, rgb, mask, weights, alpha, rng)
                world.mean_gradients()
                batch = next(batches)       # while the GPU is still at work on the step
                losses = {name: float(value.d) for name, value in losses.items()}
                losses = world.mean({**losses, "hits": colored.sum(), "stop": len(stop)})
                hits, stopping = losses.pop("hits"), losses.pop("stop") > 0
                check_losses(losses, step, epoch, folder)
                solver.update()
                if camera_solver:
                    camera_solver.update(view, cameras.by_step(pose.d[view], in_camera, points, *compute.by_rays()))
                loss = losses["loss"]
                log.add(step, losses, hits=hits, learning_rate=solver.learning_rate(), alpha=alpha)
                progress.set_postfix(epoch=epoch, loss=f"{loss:.4f}", refresh=False)
                progress.update()
                if stopping or time.monotonic() - saved > STATE_EVERY:
                    saved = save(step + 1)
                if stopping:
                    return False
            if world.rank:
                continue        # the first process writes
            if log.collapsed():
                progress.write(f"epoch {epoch}: " + COLLAPSED)
            validation_is_due = is_due(epoch, conf.train.validate_every, conf.train.epochs)
            model_is_due = is_due(epoch, conf.train.save_every, conf.train.epochs)
            if validation_is_due or model_is_due:
                saved = save((epoch + 1) * steps)
            if validation_is_due:
                sdf.refresh()
                path = folder / "validation" / f"epoch_{epoch:05d}.png"
                scene = scene._replace(poses=cameras.trained_poses(scene.poses, folder))
                psnr = validate(path, sdf, scene, conf.train.validation_view, conf.train.validation_downscale,
                                conf.tracer, conf.network.without)
                log.add_validation(epoch, psnr=psnr)
                progress.write(f"epoch {epoch}: loss {loss:.4f}, view {conf.train.validation_view} at "
                               f"{psnr:.2f} dB, {path}")
                if camera_solver and truth:
                    off = cameras.errors(scene.poses[views], truth.poses[views])
                    if off:
                        log.add_validation(epoch, camera_rotation=off.rotation.mean(),
                                           camera_translation=off.translation.mean())
                    progress.write(f"epoch {epoch}: cameras {cameras.in_words(off, truth.scale)}")
            if model_is_due:
                checkpoints.save_model(folder / model_name(epoch))
            report.keep(folder, due=validation_is_due, tell=progress.write)
    return True


COLLAPSED = ("no ray has met the surface within its mask; the surface has shrunk to nothing or grown beyond the unit "
             "sphere. The usual causes: cameras that are not normalised to the unit sphere or masks that are missing "
             "(prepare.py SCENE --check tells), or a train.learning_rate that is too high")


def scheduled(start, factor, milestones, epoch):
    """The value of a schedule that multiplies `start` by `factor` after each of the milestone epochs."""
    return start * factor ** sum(epoch >= milestone for milestone in milestones)


def is_due(epoch, every, epochs):
    """Whether something that happens every so many epochs, and after the last, happens after this one."""
    return (epoch + 1) % every == 0 or epoch + 1 == epochs


def model_name(epoch):
    return f"model_{epoch:05d}.h5"


def is_complete(state, epochs, views, ranks):
    """Whether a state is that of a run with nothing left to do; UserError where it had other `views` or `ranks`."""
    steps = state.progress["steps"]
    trained = {"views": state.progress.get("views", steps), "ranks": state.progress.get("ranks", 1)}
    if trained["views"] != views:
        raise helper.UserError(f"{state.path}: was trained on {trained['views']} views, and now there are {views}; "
                               "restore the scene and data.held_out_views, or start without --resume")
    if trained["ranks"] != ranks:
        raise helper.UserError(f"{state.path}: is of {trained['ranks']} process(es) at once, and now there would be "
                               f"{ranks}, with which an epoch has other steps; start as many (mpirun -n "
                               f"{trained['ranks']}), or start without --resume")
    more = state.progress["step"] - epochs * steps
    return more > 0 or more == 0 and (state.path.parent / model_name(epochs - 1)).exists()


def check_cameras(state, learning_rate, count):
    """Raise UserError where a state has no cameras to train on, or those of another number of views."""
    pose = state.parameters.get(checkpoints.POSE)
    if learning_rate and pose is None:
        raise helper.UserError(f"{state.path}: was begun without trained cameras; set train.camera_learning_rate to 0, "
                               "or start without --resume")
    if pose is not None and len(pose) != count:
        raise helper.UserError(f"{state.path}: has {len(pose)} trained cameras, and now there are {count} views; "
                               "restore the scene, or start without --resume")


def tell_resumed(state, conf):
    """Print where a run goes on, and each setting that is not the one it was begun with."""
    step, steps = state.progress["step"], state.progress["steps"]
    print(f"going on with {state.path.parent} after step {step} (epoch {step // steps})")
    before = {**helper.flat(helper.OPTIONAL), **state.progress["config"]}
    for name, value in helper.settings(conf).items():
        if before.get(name) != value:
            print(f"notice: {name} was {before.get(name)!r}, is now {value!r}")


def check_losses(losses, step, epoch, folder):
    """Raise UserError, before the parameters are touched, where a loss is not a finite number."""
    for name in ("color", "mask", "eikonal", "loss"):
        if not np.isfinite(losses[name]):
            raise helper.UserError(
                f"step {step} (epoch {epoch}): the {name if name != 'loss' else 'total'} loss is {losses[name]}; the "
                f"training ends before it touches the parameters, and {folder} keeps its last state and models. "
                "Lower train.learning_rate and start again, or go on from that state with --resume")


def place_points(sdf, origin, directions, mask, alpha, tracer, rng):
    """Find the point of each ray that carries its loss.

    sdf: what network.sdf_evaluator gives; origin (3,), directions (R, 3), mask (R,) bool; alpha: of the mask loss;
    tracer: the configuration's section, whose sphere tracing is for renders. Returns points (R, 3): the hit, where
    there is one in the object mask, else the sample of least sdf, except that outside the mask any sample serves a ray
    whose mask loss is nothing; and colored (R,) bool, whether it is a hit.
    """
    settings = {name: value for name, value in vars(tracer).items() if name != "sphere_tracing_steps"}
    t, colored = ray_tracer.hit_or_least_sdf(sdf, origin, directions, mask, rough_sdf=sdf.roughly, rng=rng,
                                             matters_below=NO_LOSS / alpha, **settings)
    return origin + t[:, None] * directions, colored


class TrainingStep:
    """One step of the optimisation, on graphs that are kept: one for each of a few numbers of surface rays."""

    SIZES = 8

    def __init__(self, rays, *graph_settings, **more):
        """rays: of a step; the rest is network.training_graph's, from its mask_weight on."""
        self.rays, self.graph_settings, self.more = rays, graph_settings, more
        self.graphs, self.latest = {}, None

    def graph(self, hits):
        """The training graph for at least that many surface rays; few sizes, so that few graphs are built."""
        grain = -(-self.rays // self.SIZES)
        surface = min(-(-hits // grain) * grain, self.rays)
        if surface not in self.graphs:
            self.graphs[surface] = network.training_graph(self.rays, surface, *self.graph_settings, **self.more)
        return surface, self.graphs[surface]

    def filled(self, points, colored, directions, rgb, mask, weights, alpha, rng):
        """The graph of a step with its inputs set.

        points, directions, rgb (R, 3), colored, mask (R,) bool, weights (R,): of the step's rays; alpha: float.
        """
        surface, g = self.graph(colored.sum())
        order = np.argsort(~colored, kind="stable")       # the rays with a colour first
        colored = np.where(colored, weights, 0.0)[order].astype(np.float32)
        masked = weights[order].astype(np.float32) - colored
        uniform = rng.uniform(-1.0, 1.0, (self.rays // 2, 3)).astype(np.float32)
        g["points"].d = np.concatenate([points[order], uniform])
        if surface:
            g["directions"].d, g["rgb"].d = directions[order[:surface]], rgb[order[:surface]]
            g["colored"].d = colored[:surface, None]
        g["object_mask"].d = mask[order, None].astype(np.float32)        # nnabla's GPU has no bool
        g["masked"].d = masked[:, None]
        g["alpha"].d = alpha
        self.latest = g, order
        return g

    def __call__(self, solver, *step):
        """Compute the gradients, for solver.update(); returns {name of a loss: Variable}. step: what `filled` takes.

        On a GPU this only hands over the work: to read a loss is to wait for it.
        """
        g = self.filled(*step)
        solver.zero_grad()
        g["forward"]()
        g["backward"]()
        return {name: g[name] for name in ("loss", "color", "mask", "eikonal")}

    def by_rays(self):
        """After a step, its loss's derivatives by the rays' points and by their directions, (R, 3) float32 each, as
        network.training_graph has them."""
        g, order = self.latest
        by_points, by_directions = np.zeros((2, self.rays, 3), np.float32)
        found_points, found_directions = g["by_rays"]()
        by_points[order], by_directions[order[:len(found_directions)]] = found_points, found_directions
        return by_points, by_directions


class EpochLog:
    """nnabla's monitors: each series gets its mean over an epoch's steps, and the time the epoch took."""

    NAMES = ("loss", "color", "mask", "eikonal", "hits", "learning_rate", "alpha")

    VALIDATIONS = ("psnr", "camera_rotation", "camera_translation")

    def __init__(self, folder, steps, first, validated_until, state):
        """Keep what an earlier start wrote of the steps before `first`, and of the validations of epochs before
        `validated_until`.

        Without a monitor nnabla's classes leave an earlier file be; with one they would empty it at once. Without a
        folder nothing is written.
        """
        self.series = {name: MonitorSeries(name, interval=steps, verbose=False) for name in self.NAMES}
        self.time = MonitorTimeElapsed("time", interval=steps, verbose=False)
        self.validations = {name: MonitorSeries(name, interval=1, verbose=False) for name in self.VALIDATIONS}
        for name, monitor in {**self.series, "time": self.time, **self.validations}.items():
            if folder:
                monitor.sp = str(folder / f"{name}.{'timer' if name == 'time' else 'series'}.txt")
                keep_lines(monitor.sp, validated_until if name in self.validations else first)
            monitor.flush_at = -1 if name in self.validations else first - first % steps - 1
        self.folder, self.hits, self.gone = folder, None, False
        if state:
            for name in self.NAMES:
                self.series[name].buf = state.series.get(name, np.empty(0)).tolist()
            now = time.time()
            self.time.start, self.time.lap = now - state.progress["elapsed"], now - state.progress["lap"]

    def add(self, step, losses, **others):
        with helper.writing(f"{self.folder}/*.series.txt"):
            self.hits = sum(self.series["hits"].buf) + others["hits"]
            for name, value in {**losses, **others}.items():
                self.series[name].add(step, value)
            self.time.add(step)

    def add_validation(self, epoch, **values):
        with helper.writing(self.folder / "*.series.txt"):
            for name, value in values.items():
                self.validations[name].add(epoch, value)

    def collapsed(self):
        """Whether no ray has hit in the epoch that has just ended, unless the one before was like that too."""
        before, self.gone = self.gone, self.hits == 0
        return self.gone and not before

    def times(self):
        """Seconds since the start of the run, without those between its starts, and in this epoch."""
        now = time.time()
        return {"elapsed": now - self.time.start, "lap": now - self.time.lap}

    def buffers(self):
        """What the series hold of an epoch that is under way, {name: numbers}."""
        return {name: series.buf for name, series in self.series.items()}


def keep_lines(path, until):
    """Cut a monitor's file down to the whole lines whose first number is below `until`; without the file, nothing."""
    if not Path(path).exists():
        return
    with helper.writing(path):
        lines = Path(path).read_text().splitlines(keepends=True)
        kept = [line for line in lines if re.match(r"\d+ .*\n", line) and int(line.split()[0]) < until]
    if kept != lines:
        helper.write_bytes(path, "".join(kept).encode())


def validate(path, sdf, scene, view, downscale, tracer, without):
    """Draw a view: photograph, render, normals and depth side by side, and the shape (see synthesize.shape_picture) as
    a picture of its own; returns the masked PSNR in dB."""
    photograph = datasets.shrink_image(scene.images[view], downscale) / np.float32(255)
    mask = datasets.shrink_mask(scene.masks[view], downscale)
    intrinsics = datasets.shrink_intrinsics(scene.intrinsics[view], downscale)
    render = synthesize.render_view(sdf, intrinsics, scene.poses[view], mask.shape, tracer, without=without)
    depth = np.repeat(synthesize.depth_grey(render)[..., None], 3, axis=-1)
    helper.write_image(path, np.concatenate([photograph, render.rgb, synthesize.normal_colors(render), depth], axis=1))
    helper.write_image(path.with_name(f"{path.stem}_shape.png"),
                       synthesize.shape_picture(sdf, scene, view, tracer, without))
    return evaluate.psnr(evaluate.squared_error(render.rgb, photograph, mask))


if __name__ == "__main__":
    parallel.run(main)
