"""Train IDR on a scene: posed photographs and masks in, a model (.h5) with the surface and its renderer out.

    python train.py --config config/default.yaml --monitor-path results
    python train.py --config config/default.yaml --monitor-path results --resume
    mpirun -n 4 --bind-to none python train.py --config config/default.yaml --monitor-path results

Writes to {monitor_path}_{scan}: the configuration, a series per loss, validation renders, model_{epoch:05d}.h5, and
state.h5, from which the second command goes on. The third command trains on four GPUs; see training/parallel.py.
"""
import contextlib
import signal
import sys
import time
import warnings
from pathlib import Path

import nnabla.solvers as S
import numpy as np
from tqdm import tqdm

import datasets
import helper
import network
import ray_tracer
import report
import synthesize
from config import settings
from files import folders, writing
from metrics import images
from rendering import pixels
from tracing.sdf_grid import SdfGrid
from training import cameras, checkpoints, parallel, schedule
from training.log import EpochLog
from training.step import LOSSES, LossSettings, PointSearch, TrainingStep, beside_the_update

STATE_EVERY = 120       # seconds: what a run that is killed may lose; it changes no result


def main():
    parser = helper.argument_parser("Train IDR on a scene.")
    parser.add_argument("--resume", nargs="?", const="", metavar="FOLDER",
                        help="go on with an interrupted run: that in {monitor_path}_{scan}, or in another FOLDER")
    args = parser.parse_args()
    conf = settings.load_config(args.config, args.changes)
    scene = datasets.load_scene(conf.data.path, conf.data.downscale, conf.data.cameras)
    views = training_views(args.config, conf, scene)
    num_ranks, state = parallel.launched().size, None
    if num_ranks > 1 and conf.train.camera_learning_rate:
        raise helper.UserError(f"{args.config}: train.camera_learning_rate is {conf.train.camera_learning_rate}, but "
                               f"cameras are trained by one process, not {num_ranks}; start without mpirun, or set it "
                               "to 0")
    folder = Path(args.resume or folders.run_folder(conf, args.monitor_path))
    if args.resume is not None:
        state = checkpoints.load_state(folder, network.parameter_shapes(conf.network))
        check_cameras(state, conf.train.camera_learning_rate, len(scene.images))
        if is_complete(state, conf.train, len(views), num_ranks):
            print(f"{folder} is trained: {state.progress['step']} steps, where {args.config} wants {conf.train.steps}; "
                  "raise train.steps there, or by --set, to train on")
            folders.remove_unfinished(folder)
            return
    world = parallel.connect(args.context, args.device_id)
    warnings.simplefilter("ignore", RuntimeWarning)     # NumPy's, on overflow: check_losses looks at the losses instead
    with open_folder(args, conf, folder, state, world) as folder, helper.stop_signals() as stop:
        training = Training(conf, scene, views, folder, world)
        with report.last_page(folder) if world.writes else contextlib.nullcontext():
            training.begin(state)
            finished = training.run(stop)
        if finished:
            print(f"trained: {folder / model_name(training.epochs.last)}")
        else:
            print(f"stopped; the same command with --resume{' ' + str(folder) if args.resume else ''} goes on",
                  flush=True)
        world.wait()        # until the first has written: mpirun kills all ranks if one exits nonzero
    if not finished:
        sys.exit(128 + (stop or [signal.SIGTERM])[0])     # the status that a shell gives a program ended by a signal


def training_views(config, conf, scene):
    """Return the indices of the views to train on; UserError where the configuration does not fit the scene."""
    views = datasets.training_views(conf.data.held_out_views, len(scene.images), f"{config}: data.held_out_views")
    datasets.check_views([conf.train.validation_view], len(scene.images), f"{config}: train.validation_view")
    datasets.check_downscale(scene.masks.shape[1:], conf.train.validation_downscale,
                             f"{config}: train.validation_downscale")
    return views


@contextlib.contextmanager
def open_folder(args, conf, folder, state, world):
    """Yield the run's folder. The process that writes holds it, and puts the configuration into it.

    Without a `state` to go on from, the folder is new.
    """
    if not world.writes:
        yield folder
        return
    with folders.held(folder) if state else folders.new_run_folder(folder) as folder:
        if state:
            tell_resumed(state, conf)
            folders.remove_unfinished(folder)
        if args.changes:
            names = ", ".join(settings.read_changes(args.changes))
            text = settings.as_yaml(conf, f"# Every key as the run used it. Changed by --set: {names}.\n")
            writing.write_bytes(folder / Path(args.config).name, text.encode())
        else:
            writing.copy_config(args.config, folder)
        yield folder


class Training:
    """A training: networks, solver, log and, if they are trained, cameras.

    begin() sets it to the start or to a state; run() takes the steps.
    """

    def __init__(self, conf, scene, views, folder, world):
        """conf: the configuration; views: the scene's training views; folder: the run's; world: a parallel.World."""
        self.conf, self.scene, self.views, self.folder, self.world = conf, scene, views, folder, world
        self.epochs = schedule.Epochs(conf.train.steps, datasets.epoch_steps(
            len(views), world.size * conf.train.views_per_step))
        self.solver, self.camera_solver = S.Adam(conf.train.learning_rate, beta2=conf.train.adam_beta2), None
        self.solvers = {"solver": self.solver}
        if conf.train.camera_learning_rate:
            self.camera_solver = self.solvers["cameras"] = cameras.SparseAdam(conf.train.camera_learning_rate)
        self.true_cameras = cameras.true_cameras(conf.data.path, conf.data.cameras, len(scene.images))

    def begin(self, state):
        """Set everything to the start of a run, or to a `state` of it."""
        conf, self.first_step, self.loss = self.conf, 0, 0.0
        if state is None:
            network.initialize(conf.network, np.random.default_rng(conf.train.seed))
            if self.camera_solver:
                checkpoints.set_parameters({checkpoints.POSE: cameras.pose_vectors(self.scene.poses)})
            for name in self.solvers:
                self.solvers[name].set_parameters(checkpoints.solver_parameters(name))
        else:
            checkpoints.restore_state(state, self.solvers)
            self.first_step, self.loss = state.progress["step"], state.progress["loss"]
            self.scene = self.scene._replace(poses=cameras.trained_poses(self.scene.poses, state.path))
        self.world.check_same([self.first_step, settings.flat(conf)],
                              "the processes do not begin alike: each needs the same configuration and, with --resume, "
                              "the same run's folder; let the machines share their files")
        self.pose = cameras.parameter()
        self.sdf, self.shade = network.sdf_evaluator(), network.shader(conf.network)
        alone = self.world.size == 1        # of several processes, each would remember what it alone has seen
        self.grid = None
        if alone or not network.on_cpu():
            self.grid = remembered(self.sdf, conf.train.rays, state and alone and checkpoints.grid_of(state))
        self.step = TrainingStep(conf.network.without, LossSettings.of(conf.train), conf.train.rays,
                                 want_grad_rays=self.camera_solver is not None)
        # After an epoch's last step its render and its model may still be missing, so the epoch is finished once more.
        self.first_epoch = max(self.first_step - 1, 0) // self.epochs.length
        due = self.epochs.is_due(self.first_epoch, conf.train.validations)
        self.log = EpochLog(self.folder if self.world.writes else None, self.epochs, state, self.first_step,
                            validated_until=self.first_epoch if due else self.first_epoch + 1)
        self.saved = time.monotonic()
        if state is None:
            self.save(self.first_step)
        self.beside = beside_the_update()
        self.batches = self.draw_batches()
        self.batch = next(self.batches)

    def draw_batches(self):
        """Return the batches from the first step on. Trained cameras take directions in the cameras' axes."""
        scene, train = self.scene, self.conf.train
        if self.camera_solver:      # a camera's pose is known only when its step begins
            scene = scene._replace(poses=np.tile(np.eye(4), (len(scene.poses), 1, 1)))
        draw = datasets.Draw(train.rays, train.seed, train.outline_fraction, train.views_per_step)
        return datasets.training_batches(scene, self.views, draw, self.first_step, self.world)

    def run(self, stop):
        """Train to the end, or until `stop` is not empty; return whether it came to the end."""
        with tqdm(initial=self.first_step, total=self.epochs.steps, unit="step", dynamic_ncols=True, smoothing=0.05,
                  disable=not self.world.writes) as self.progress:
            for epoch in range(self.first_epoch, self.epochs.last + 1):
                for step in range(max(self.first_step, self.epochs.end(epoch - 1)), self.epochs.end(epoch)):
                    self.set_schedules(step)
                    stopping = self.take_step(step, epoch, stop)
                    if stopping or time.monotonic() - self.saved > STATE_EVERY:
                        self.save(step + 1)
                    if stopping:
                        return False
                if self.world.writes:
                    self.end_epoch(epoch)
        return True

    def set_schedules(self, step):
        """Set the learning rates and alpha of a step."""
        conf = self.conf.train
        factor = schedule.learning_rate_factor(conf, step)
        self.solver.set_learning_rate(conf.learning_rate * factor)
        if self.camera_solver:
            self.camera_solver.learning_rate = conf.camera_learning_rate * factor
        self.alpha = schedule.alpha(conf, step)

    def take_step(self, step, epoch, stop):
        """Take one step: draw rays, search their points, compute the gradients, update, log.

        stop: the signals that this process has received. Returns whether any process has received one.
        """
        batch, world = self.batch, self.world
        rng = helper.random_numbers(self.conf.train.seed, helper.SAMPLES, step * world.size + world.rank)
        drawn = batch
        if self.camera_solver:
            batch = cameras.placed_rays(self.pose.d, drawn)
        search = PointSearch(self.sdf, self.conf.tracer, self.grid)
        placed, losses = self.step.take(self.solver, search, batch, self.alpha, rng)
        world.mean_gradients()
        following = self.beside(self.learn_and_draw)
        losses = {name: float(losses[name].d) for name in LOSSES}
        means = world.mean({**losses, "hits": placed.hit_in_mask.sum(), "signals": len(stop)})
        stopping = means.pop("signals") > 0
        check_losses(means, step, epoch, self.folder)
        self.solver.update()
        if self.camera_solver:
            self.camera_solver.update(cameras.grad_steps(self.pose.d, drawn, placed.points, *self.step.grad_rays()))
        self.batch = following.result()
        self.loss = means["loss"]
        self.log.add(step, **means, learning_rate=self.solver.learning_rate(), alpha=self.alpha)
        self.progress.set_postfix(epoch=epoch, loss=f"{self.loss:.4f}", refresh=False)
        self.progress.update()
        return stopping

    def learn_and_draw(self):
        """Let the grid learn what a step has found; return the next batch. Nothing else in the step needs either."""
        if self.grid:
            self.step.teach(self.grid)
        return next(self.batches)

    def end_epoch(self, epoch):
        """Save, render and report what is due after an epoch."""
        conf = self.conf.train
        if self.log.lost_the_surface():
            self.progress.write(f"epoch {epoch}: " + LOST)
        validation_is_due = self.epochs.is_due(epoch, conf.validations)
        model_is_due = self.epochs.is_due(epoch, conf.models)
        if validation_is_due or model_is_due:
            self.save(self.epochs.end(epoch))
        if validation_is_due:
            self.validate(epoch)
        if model_is_due:
            checkpoints.save_model(self.folder / model_name(epoch))
        if epoch < self.epochs.last:        # of the last one, the end of the training writes the page
            report.keep(self.folder, due=validation_is_due, tell=self.progress.write)

    def save(self, step):
        """Write the state after so many steps; other processes than the first have nothing to write."""
        self.saved = time.monotonic()
        if self.world.writes:
            progress = {"step": step, "steps": self.epochs.length, "views": len(self.views), "ranks": self.world.size,
                        "views_per_step": self.conf.train.views_per_step, "loss": self.loss,
                        "config": settings.flat(self.conf), **self.log.times()}
            checkpoints.save_state(self.folder, self.solvers, progress, self.log.buffers(), self.grid)

    def validate(self, epoch):
        """Draw the validation view and the shape, and tell the view's PSNR and the cameras' errors."""
        self.sdf.refresh()
        self.scene = self.scene._replace(poses=cameras.trained_poses(self.scene.poses, self.folder))
        path, view = self.folder / "validation" / f"epoch_{epoch:05d}.png", self.conf.train.validation_view
        psnr = self.draw_view(path, view)
        self.log.add_validation(epoch, psnr=psnr)
        self.progress.write(f"epoch {epoch}: loss {self.loss:.4f}, view {view} at {psnr:.2f} dB, {path}")
        if self.camera_solver and self.true_cameras:
            off = cameras.errors(self.scene.poses[self.views], self.true_cameras.poses[self.views])
            if off:
                self.log.add_validation(epoch, camera_rotation=off.rotation.mean(),
                                        camera_translation=off.translation.mean())
            self.progress.write(f"epoch {epoch}: cameras {cameras.in_words(off, self.true_cameras.scale)}")

    def draw_view(self, path, view):
        """Draw a view to `path`: photograph, render, normals and depth. Draw the shape to a second file.

        Returns the masked PSNR in dB.
        """
        scene, factor, tracer = self.scene, self.conf.train.validation_downscale, self.conf.tracer
        photograph = datasets.shrink_image(scene.images[view], factor) / np.float32(255)
        mask = datasets.shrink_mask(scene.masks[view], factor)
        intrinsics = datasets.shrink_intrinsics(scene.intrinsics[view], factor)
        camera = helper.Camera(intrinsics, scene.poses[view], mask.shape)
        render, centres = pixels.render_areas(self.sdf, self.shade, camera, tracer)
        shown = pixels.on_background(render.rgb, render.alpha, "white")
        depth = np.repeat(pixels.depth_grey(render)[..., None], 3, axis=-1)
        panels = [photograph, shown, pixels.normal_colors(render), depth]
        writing.write_image(path, np.concatenate(panels, axis=1))
        writing.write_image(path.with_name(f"{path.stem}_shape.png"),
                           synthesize.shape_picture(self.sdf, self.shade, scene, view, tracer))
        return images.psnr(images.squared_error(centres.rgb, photograph, mask))


LOST = ("no ray has met the surface within its mask; the surface has shrunk to nothing or grown beyond the unit "
        "sphere. The usual causes: cameras that are not normalised to the unit sphere or masks that are missing "
        "(prepare.py SCENE --check tells), or a train.learning_rate that is too high")


def remembered(sdf, num_rays, known=None):
    """Return what a training of so many rays per step begins with: `known` or a new SdfGrid, on a GPU its own form.

    A step's evaluations renew it within some 50 steps. nnabla's functions alone, on a GPU without CuPy, take none:
    there evaluations cost less than the choice among them.
    """
    if not network.on_cpu() and not sdf.search:
        return None
    side = int(np.clip(round((256 * num_rays) ** (1 / 3)), 16, 128))
    known = known or SdfGrid.of(sdf, side)
    return known if network.on_cpu() else sdf.search.remember(known, ray_tracer.Limits())


def model_name(epoch):
    return f"model_{epoch:05d}.h5"


# --- going on with a run ----------------------------------------------------------------------------------------------

def is_complete(state, conf, num_views, num_ranks):
    """Return whether a state's run has nothing left to do; UserError where it had other numbers of views or ranks.

    conf: the section "train" of the configuration
    """
    trained = state.progress
    if trained["views"] != num_views:
        raise helper.UserError(f"{state.path}: was trained on {trained['views']} views, and now there are {num_views}; "
                               "restore the scene and data.held_out_views, or start without --resume")
    if trained["ranks"] != num_ranks:
        raise helper.UserError(f"{state.path}: is of {trained['ranks']} process(es) at once, and now there would be "
                               f"{num_ranks}, with which an epoch has other steps; start as many (mpirun -n "
                               f"{trained['ranks']}), or start without --resume")
    if trained["views_per_step"] != conf.views_per_step:
        raise helper.UserError(f"{state.path}: was begun with train.views_per_step {trained['views_per_step']}, and "
                               f"now it is {conf.views_per_step}, with which an epoch has other steps; restore it, or "
                               "start without --resume")
    more, last = trained["step"] - conf.steps, schedule.Epochs(conf.steps, trained["steps"]).last
    return more > 0 or more == 0 and (state.path.parent / model_name(last)).exists()


def check_cameras(state, learning_rate, num_views):
    """Raise UserError where a state has no cameras to train on, or cameras of another number of views."""
    pose = state.parameters.get(checkpoints.POSE)
    if learning_rate and pose is None:
        raise helper.UserError(f"{state.path}: was begun without trained cameras; set train.camera_learning_rate to 0, "
                               "or start without --resume")
    if pose is not None and len(pose) != num_views:
        raise helper.UserError(f"{state.path}: has {len(pose)} trained cameras, and now there are {num_views} views; "
                               "restore the scene, or start without --resume")


def tell_resumed(state, conf):
    """Print where a run goes on, and every setting that has changed since its start."""
    step, steps = state.progress["step"], state.progress["steps"]
    print(f"going on with {state.path.parent} after step {step} (epoch {step // steps})")
    before, now = settings.earlier(state.progress["config"], steps), settings.flat(conf)
    for name, value in now.items():
        if before.get(name) != value:
            print(f"notice: {name} was {before.get(name)!r}, is now {value!r}")
    if before.get("train.steps") != conf.train.steps:
        print("notice: what is given in fractions of the run moves with train.steps; from here on the learning rate is "
              f"{conf.train.learning_rate * schedule.learning_rate_factor(conf.train, step):.3g} and alpha "
              f"{schedule.alpha(conf.train, step):g}")


def check_losses(losses, step, epoch, folder):
    """Raise UserError, before the parameters are touched, where a loss is not a finite number."""
    for name in (*LOSSES[1:], "loss"):
        if not np.isfinite(losses[name]):
            raise helper.UserError(
                f"step {step} (epoch {epoch}): the {name if name != 'loss' else 'total'} loss is {losses[name]}; the "
                f"training ends before it touches the parameters, and {folder} keeps its last state and models. "
                "Lower train.learning_rate and start again, or go on from that state with --resume")


if __name__ == "__main__":
    parallel.run(main)
