"""Train IDR on a scene: posed photographs and masks in, a model (.h5) with the surface and its renderer out.

    python train.py --config config/default.yaml --monitor-path results

Writes to {monitor_path}_{scan}: the configuration, a series per loss, validation renders and model_{epoch:05d}.h5.
"""
import nnabla as nn
import nnabla.solvers as S
import numpy as np
from nnabla.monitor import Monitor, MonitorSeries, MonitorTimeElapsed
from tqdm import tqdm

import datasets
import evaluate
import helper
import network
import ray_tracer
import synthesize

NO_LOSS = 17.0      # sigmoid(-17), the mask loss of a ray outside the mask with alpha * sdf = 17, is lost beside 1


def main():
    args = helper.argument_parser("Train IDR on a scene.").parse_args()
    conf = helper.load_config(args.config)
    scene = datasets.load_scene(conf.data.path, conf.data.downscale)
    views = datasets.training_views(conf.data.held_out_views, len(scene.images), f"{args.config}: data.held_out_views")
    datasets.check_views([conf.train.validation_view], len(scene.images), f"{args.config}: train.validation_view")
    datasets.check_downscale(scene.masks.shape[1:], conf.train.validation_downscale,
                             f"{args.config}: train.validation_downscale")
    helper.set_context(args.context, args.device_id)
    folder = helper.new_run_folder(conf, args.monitor_path)
    helper.copy_config(args.config, folder)

    rng = np.random.default_rng(conf.train.seed)
    network.initialize(**vars(conf.network), rng=rng)
    solver = S.Adam(conf.train.learning_rate)
    solver.set_parameters(nn.get_parameters())
    sdf = network.sdf_evaluator()
    step = TrainingStep(conf.train.rays, conf.train.mask_weight, conf.train.eikonal_weight)

    batches = datasets.training_batches(scene, views, conf.train.rays, conf.train.seed)
    batch = next(batches)
    log = EpochLog(folder, len(views))
    with tqdm(total=conf.train.epochs * len(views), unit="step", dynamic_ncols=True, smoothing=0.05) as progress:
        for epoch in range(conf.train.epochs):
            solver.set_learning_rate(
                scheduled(conf.train.learning_rate, 0.5, conf.train.learning_rate_halved_after, epoch))
            alpha = scheduled(conf.train.alpha, 2.0, conf.train.alpha_doubled_after, epoch)
            for _ in views:
                _, origin, directions, rgb, mask = batch
                sdf.refresh()
                points, colored = place_points(sdf, origin, directions, mask, alpha, conf.tracer, rng)
                losses = step(solver, points, colored, directions, rgb, mask, alpha, rng)
                batch = next(batches)       # while the GPU is still at work on the step
                losses = {name: float(loss.d) for name, loss in losses.items()}
                log.add(losses, hits=colored.sum(), learning_rate=solver.learning_rate(), alpha=alpha)
                progress.set_postfix(epoch=epoch, loss=f"{losses['loss']:.4f}", refresh=False)
                progress.update()
            if is_due(epoch, conf.train.validate_every, conf.train.epochs):
                sdf.refresh()
                path = folder / "validation" / f"epoch_{epoch:05d}.png"
                psnr = validate(path, sdf, scene, conf.train.validation_view, conf.train.validation_downscale,
                                conf.tracer)
                log.psnr.add(epoch, psnr)
                progress.write(f"epoch {epoch}: loss {losses['loss']:.4f}, view {conf.train.validation_view} at "
                               f"{psnr:.2f} dB, {path}")
            if is_due(epoch, conf.train.save_every, conf.train.epochs):
                helper.save_model(folder / f"model_{epoch:05d}.h5")
    batches.close()
    print(f"trained: {folder / f'model_{epoch:05d}.h5'}")


def scheduled(start, factor, milestones, epoch):
    """The value of a schedule that multiplies `start` by `factor` after each of the milestone epochs."""
    return start * factor ** sum(epoch >= milestone for milestone in milestones)


def is_due(epoch, every, epochs):
    """Whether something that happens every so many epochs, and after the last, happens after this one."""
    return (epoch + 1) % every == 0 or epoch + 1 == epochs


def place_points(sdf, origin, directions, mask, alpha, tracer, rng):
    """Find the point of each ray that carries its loss.

    sdf: what network.sdf_evaluator gives; origin (3,), directions (R, 3), mask (R,) bool; alpha: of the mask loss;
    tracer: the configuration's section, whose sphere tracing is for renders. Returns points (R, 3): the hit, where there
    is one in the object mask, else the sample of least sdf, except that outside the mask any sample serves a ray whose
    mask loss is nothing; and colored (R,) bool, whether it is a hit.
    """
    settings = {name: value for name, value in vars(tracer).items() if name != "sphere_tracing_steps"}
    t, colored = ray_tracer.hit_or_least_sdf(sdf, origin, directions, mask, rough_sdf=sdf.roughly, rng=rng,
                                             matters_below=NO_LOSS / alpha, **settings)
    return origin + t[:, None] * directions, colored


class TrainingStep:
    """One step of the optimisation, on graphs that are kept: one for each of a few numbers of surface rays."""

    SIZES = 8

    def __init__(self, rays, mask_weight, eikonal_weight):
        self.rays, self.mask_weight, self.eikonal_weight = rays, mask_weight, eikonal_weight
        self.graphs = {}

    def graph(self, hits):
        """The training graph for at least that many surface rays; few sizes, so that few graphs are built."""
        grain = -(-self.rays // self.SIZES)
        surface = min(-(-hits // grain) * grain, self.rays)
        if surface not in self.graphs:
            self.graphs[surface] = network.training_graph(self.rays, surface, self.mask_weight, self.eikonal_weight)
        return surface, self.graphs[surface]

    def filled(self, points, colored, directions, rgb, mask, alpha, rng):
        """The graph of a step with its inputs set.

        points, directions, rgb (R, 3), colored, mask (R,) bool: of the step's rays; alpha: float.
        """
        surface, g = self.graph(colored.sum())
        order = np.argsort(~colored, kind="stable")       # the rays with a colour first
        mask, colored = mask[order].astype(np.float32), colored[order].astype(np.float32)   # nnabla's GPU has no bool
        uniform = rng.uniform(-1.0, 1.0, (self.rays // 2, 3)).astype(np.float32)
        g["points"].d = np.concatenate([points[order], uniform])
        if surface:
            g["directions"].d, g["rgb"].d = directions[order[:surface]], rgb[order[:surface]]
            g["colored"].d = colored[:surface, None]
        g["object_mask"].d, g["masked"].d = mask[:, None], 1 - colored[:, None]
        g["alpha"].d = alpha
        return g

    def __call__(self, solver, *step):
        """Update the parameters; returns the losses before it as {name: Variable}. step: what `filled` takes."""
        g = self.filled(*step)
        solver.zero_grad()
        g["forward"]()
        g["backward"]()
        solver.update()
        return {name: g[name] for name in ("loss", "color", "mask", "eikonal")}


class EpochLog:
    """nnabla's monitors: each series gets its mean over an epoch's steps, and the time the epoch took."""

    def __init__(self, folder, steps):
        monitor = Monitor(str(folder))
        names = ("loss", "color", "mask", "eikonal", "hits", "learning_rate", "alpha")
        self.series = {n: MonitorSeries(n, monitor, interval=steps, verbose=False) for n in names}
        self.time = MonitorTimeElapsed("time", monitor, interval=steps, verbose=False)
        self.psnr = MonitorSeries("psnr", monitor, interval=1, verbose=False)
        self.count = 0

    def add(self, losses, **others):
        for name, value in {**losses, **others}.items():
            self.series[name].add(self.count, value)
        self.time.add(self.count)
        self.count += 1


def validate(path, sdf, scene, view, downscale, tracer):
    """Render a view beside its photograph as a picture; returns the masked PSNR in dB."""
    photograph = datasets.shrink_image(scene.images[view], downscale) / np.float32(255)
    mask = datasets.shrink_mask(scene.masks[view], downscale)
    intrinsics = datasets.shrink_intrinsics(scene.intrinsics[view], downscale)
    render = synthesize.render_view(sdf, intrinsics, scene.poses[view], mask.shape, tracer)
    helper.write_image(path, np.concatenate([photograph, render.rgb], axis=1))
    return evaluate.psnr(evaluate.squared_error(render.rgb, photograph, mask))


if __name__ == "__main__":
    helper.run(main)
