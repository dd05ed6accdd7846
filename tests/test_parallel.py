"""Test training by several processes: the mean gradient is that of one step, and all start, stop and fail together.

nnabla connects processes on GPUs only. Here, a communicator that sums through sockets replaces NCCL, and environment
variables replace mpirun.
"""
import os
import signal
import sys

import nnabla as nn
import nnabla.solvers as S
import numpy as np
import pytest
from test_resume import EPOCHS, VIEWS, call, contents, same_as_straight, write_config

import datasets
import helper
import make_scene
import network
import train
from backends import context
from commands import run_copies
from config.settings import Network
from conftest import ROOT, Given
from training import checkpoints, parallel, step

RANKS = 3       # processes; does not divide the 4 views
STEPS = 2       # per epoch

PROCESS = """
import os, signal, sys
from multiprocessing.connection import Client, Listener
import numpy as np
import helper, report, train
from backends import context
from files import writing
from training import parallel, step

address, at, what = sys.argv.pop(1), int(sys.argv.pop(1)), sys.argv.pop(1)


class Sockets:
    def __init__(self, rank, size):
        if rank:
            self.first = self.connected()
            self.first.send(rank)
        else:
            listener = Listener(address)
            others = [listener.accept() for _ in range(size - 1)]
            self.others = [other for _, other in sorted((other.recv(), other) for other in others)]
        self.rank, self.size = rank, size

    def connected(self):
        while True:
            try:
                return Client(address)
            except OSError:
                pass

    def all_reduce(self, arrays, division, inplace):
        arrays = arrays if isinstance(arrays, list) else [arrays]
        if self.rank:
            self.first.send([a.data for a in arrays])
            means = self.first.recv()
        else:
            found = [other.recv() for other in self.others]
            means = [sum(parts, a.data) / self.size for a, *parts in zip(arrays, *found)]
            for other in self.others:
                other.send(means)
        for array, mean in zip(arrays, means):
            array.data = mean


take, count, set_context = step.TrainingStep.take, [0], context.set_context


def failing(self, *inputs):
    count[0] += 1
    placed, losses = take(self, *inputs)
    if count[0] == at and what == "nan":
        losses["mask"].d = np.nan
    elif count[0] == at and what:
        os.kill(os.getpid(), int(what))
    return placed, losses


def written(path):
    raise RuntimeError(f"{path} is written by process {parallel.launched().rank}")


def trained(self, stop, run=train.Training.run):
    finished = run(self, stop)
    self.world.check_same([], "the processes have drifted apart")
    return finished


step.TrainingStep.take, train.Training.run = failing, trained
report.page = lambda run, running: ""       # to save time
if parallel.launched().rank:
    writing.replacing = written
parallel.nccl_communicator = lambda here: Sockets(here.rank, here.size)
context.gpu_or_reason = lambda device_id: ("cudnn", "")
context.set_context = lambda context, device_id: set_context("cpu", "0")
parallel.PATIENCE = 0.2      # there is no mpirun that would kill them
parallel.run(train.main)
"""


def environment(rank, ranks, **others):
    says = {"RANK": rank, "SIZE": ranks, "LOCAL_RANK": rank, "LOCAL_SIZE": ranks}
    return {**os.environ, **{f"OMPI_COMM_WORLD_{name}": str(value) for name, value in says.items()}, **others}


def start(home, name, *more, ranks=RANKS, fails=("0", ""), failing=None, config=None):
    """Train in {name}_tiny by several processes. Return their statuses, outputs and standard errors.

    fails: (step, event) of the process with rank `failing`; event: "nan", or the number of a signal, or "".
    """
    config = config or [write_config(home, train__steps=STEPS * EPOCHS)] * ranks
    (home / "process.py").write_text(PROCESS)
    commands = [[home / "process.py", home / "socket", *(fails if rank == failing else ("0", "")), "--config",
                 config[rank], "--monitor-path", home / name, *more] for rank in range(ranks)]
    ended = run_copies(commands, ROOT, [environment(rank, ranks) for rank in range(ranks)])
    if (home / "socket").exists():
        (home / "socket").unlink()
    statuses, *said = zip(*ended)
    return list(statuses), *said


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Return a folder with a tiny scene and an uninterrupted run on it by three processes, straight_tiny."""
    folder = tmp_path_factory.mktemp("ranks")
    assert call(make_scene.main, "--output", folder / "tiny", "--views", VIEWS, "--held-out", 1, "--size", 24) == 0
    statuses, said, errors = start(folder, "straight")
    assert statuses == [0] * RANKS, errors
    assert "straight_tiny/model_00004.h5" in said[0] and "3 processes" in said[0] and "epoch 4: loss" in said[0]
    assert said[1:] == errors[1:] == ("",) * (RANKS - 1)        # only the first one prints
    return folder


# --- the mean of the gradients --------------------------------------------------------------------------------

class Twice:
    """A communicator of two processes, the other one of which has these gradients."""

    def __init__(self, gradients):
        self.gradients = gradients

    def all_reduce(self, arrays, division, inplace):
        assert division and len(arrays) == len(self.gradients)
        for array, other in zip(arrays, self.gradients):
            array.data = (array.data + other) / 2


def test_the_mean_of_two_gradients_is_that_of_one_step_over_both(monkeypatch):
    nn.set_default_context(nn.Context(["cpu:float"], "CpuCachedArray", "0"))
    rng, rays = np.random.default_rng(1), 64
    network.initialize(Network(64, 16, 4), rng)
    batches = []
    for hits in (50, 11):       # two views, with 50 and 11 rays that hit the object
        directions = rng.normal(size=(rays, 3)).astype(np.float32)
        directions /= np.linalg.norm(directions, axis=1, keepdims=True)
        hit_in_mask = rng.permutation(rays) < hits
        batches.append([rng.uniform(-0.7, 0.7, (rays, 3)).astype(np.float32), hit_in_mask, directions,
                        rng.uniform(-1, 1, (rays, 3)).astype(np.float32), hit_in_mask | (rng.uniform(size=rays) < 0.2),
                        rng.uniform(0.2, 3.0, rays).astype(np.float32)])
    uniform = rng.uniform(-1, 1, (2, rays // 2, 3))
    solver = S.Adam(1e-3)
    solver.set_parameters(nn.get_parameters())

    def gradients(batch, uniform):
        points, hit_in_mask, *rest = batch
        losses = step.TrainingStep((), step.LossSettings(100.0, 0.1), len(points)).compute_gradients(
            solver, datasets.Batch(np.zeros(1), None, *rest), step.Placed(points, hit_in_mask), 50.0, Given(uniform))
        return ([p.g.copy() for _, p in sorted(nn.get_parameters().items())],
                {name: float(value.d) for name, value in losses.items()})

    expected, losses = gradients([np.concatenate(parts) for parts in zip(*batches)], np.concatenate(uniform))
    first, first_losses = gradients(batches[0], uniform[0])
    second, second_losses = gradients(batches[1], uniform[1])
    parallel.World(1, 2, Twice(first)).mean_gradients()
    found = [p.g for _, p in sorted(nn.get_parameters().items())]
    for a, b, alone in zip(found, expected, second):
        assert np.linalg.norm(a - b) < 1e-5 * np.linalg.norm(b)
        assert np.linalg.norm(alone - b) > 0.02 * np.linalg.norm(b)     # a single process does not have it
    for name, value in losses.items():
        assert (first_losses[name] + second_losses[name]) / 2 == pytest.approx(value, rel=1e-5)
    nn.clear_parameters()


DRAW = datasets.Draw(10, seed=3)


def test_every_view_comes_in_every_epoch_and_no_two_processes_see_the_same():
    scene = datasets.Scene(np.zeros((7, 8, 8, 3), np.uint8), np.ones((7, 8, 8), bool), np.tile(np.eye(3), (7, 1, 1)),
                           np.tile(np.eye(4), (7, 1, 1)), np.eye(4), list("abcdefg"))
    views = [0, 1, 2, 4, 6]
    for ranks, steps in ((1, 5), (2, 3), (4, 2), (5, 1), (8, 1)):
        assert datasets.epoch_steps(len(views), ranks) == steps
        rows = [datasets.training_batches(scene, views, DRAW, 0, datasets.Process(rank, ranks))
                for rank in range(ranks)]
        seen = np.concatenate([[next(row).views[0] for row in rows] for _ in range(3 * steps)])
        for end in range(1, len(seen) + 1):
            assert np.ptp(np.bincount(seen[:end], minlength=7)[views]) <= 1
        assert len({tuple(seen[start:start + 5]) for start in (0, 5, 10)}) == 3
    pixels = [next(datasets.training_batches(scene, [0], DRAW, 0, datasets.Process(rank, 2))).directions
              for rank in range(2)]
    assert not np.array_equal(*pixels)
    # A batch depends on the step and the rank only.
    again = next(datasets.training_batches(scene, views, DRAW, 4, datasets.Process(1, 2)))
    row = datasets.training_batches(scene, views, DRAW, 0, datasets.Process(1, 2))
    assert np.array_equal([next(row) for _ in range(5)][4].directions, again.directions)


# --- runs -----------------------------------------------------------------------------------------------------

def test_one_process_writes_and_an_epoch_has_fewer_steps(home):
    folder = home / "straight_tiny"
    assert not (home / "straight_tiny.1").exists() and not list(folder.rglob(".*"))
    assert [p.name for p in sorted(folder.glob("model_*.h5"))] == [f"model_{e:05d}.h5" for e in (1, 3, 4)]
    lines = (folder / "loss.series.txt").read_text().splitlines()
    assert [int(line.split()[0]) for line in lines] == [STEPS * epoch + STEPS - 1 for epoch in range(EPOCHS)]
    progress = checkpoints.load_state(folder, {}).progress
    assert (progress["step"], progress["views"], progress["ranks"]) == (STEPS * EPOCHS, VIEWS, RANKS)


def test_several_views_of_each_process(home):
    """Check that processes of 2 views each go on together; three of them see 6 views per step, so all 4 in each."""
    config = [write_config(home, train__steps=3, train__views_per_step=2, train__outline_fraction=0.5)] * RANKS
    statuses, said, errors = start(home, "views", config=config)
    assert statuses == [0] * RANKS and "views_tiny/model_00002.h5" in said[0], errors
    progress = checkpoints.load_state(home / "views_tiny", {}).progress
    assert (progress["step"], progress["steps"], progress["views_per_step"]) == (3, 1, 2)


@pytest.mark.parametrize("failing, number", [(0, signal.SIGTERM), (2, signal.SIGINT)])
def test_where_one_is_told_to_stop_all_do_and_go_on(home, failing, number):
    name = f"stopped{failing}"
    statuses, said, _ = start(home, name, fails=("5", str(int(number))), failing=failing)
    assert statuses[failing] == 128 + number and set(statuses) <= {128 + number, 128 + signal.SIGTERM}
    assert "--resume goes on" in said[0] and said[1:] == ("",) * (RANKS - 1)
    assert checkpoints.load_state(home / f"{name}_tiny", {}).progress["step"] == 5
    statuses, said, errors = start(home, name, "--resume")
    assert statuses == [0] * RANKS and "after step 5 (epoch 2)" in said[0], errors
    same_as_straight(home, name)


def test_a_loss_that_is_not_finite_in_one_stops_all_with_one_line(home):
    statuses, _, errors = start(home, "spoilt", fails=("5", "nan"), failing=1)
    assert statuses == [2] * RANKS
    said = [line for line in errors[0].splitlines() if line.startswith("error: ")]
    assert len(said) == 1 and "step 4 (epoch 2): the " in said[0] and "loss is nan" in said[0]
    for rank in (1, 2):     # mpirun would kill them before they print this
        assert errors[rank].startswith(f"process {rank} of 3, on ") and errors[rank].count("\n") == 1
    # The state is that of the last render.
    assert checkpoints.load_state(home / "spoilt_tiny", {}).progress["step"] == 2 * STEPS


def test_processes_that_do_not_begin_alike(home):
    (home / "other").mkdir()
    (home / "other" / "tiny").symlink_to(home / "tiny")
    config = [write_config(home), write_config(home / "other", train__seed=5, data__path=str(home / "tiny"))]
    statuses, _, errors = start(home, "unlike", ranks=2, config=config)
    assert statuses == [2, 2] and "the processes do not begin alike" in errors[0]


def test_a_run_of_other_processes_is_not_resumed(home, capfd):
    before = contents(home / "straight_tiny")
    assert call(train.main, "--context", "cpu", "--config", write_config(home), "--monitor-path", home / "straight",
                "--resume") == 2
    assert "is of 3 process(es) at once, and now there would be 1" in capfd.readouterr().err
    assert contents(home / "straight_tiny") == before


# --- what is refused ------------------------------------------------------------------------------------------

@pytest.mark.parametrize("variables, arguments, says", [
    ({}, ["--context", "cpu"], "--context cpu with 4 processes"),
    ({}, ["--device-id", "1"], "--device-id 1 with 4 processes"),
    ({}, [], "mpirun started 4 processes on "),
    ({"OMPI_COMM_WORLD_SIZE": None, "PMI_SIZE": "4"}, [], "PMI_SIZE says that there are 4 processes"),
])
def test_what_several_processes_are_refused(home, monkeypatch, capfd, variables, arguments, says):
    monkeypatch.setattr(context, "driver_complaint", lambda: "there is no NVIDIA driver")
    for name, value in {**environment(1, 4), **variables}.items():
        monkeypatch.setenv(name, value) if value is not None else monkeypatch.delenv(name, raising=False)
    assert call(train.main, "--config", write_config(home), "--monitor-path", home / "refused", *arguments) == 2
    said = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(said) == 1 and says in said[0]
    assert not (home / "refused_tiny").exists()


def test_more_processes_than_gpus(monkeypatch):
    monkeypatch.setattr(context, "gpu_or_reason", lambda device_id: (
        ("cudnn", "") if int(device_id) < 2 else ("cpu", f"there is no CUDA device {device_id} (found 2)")))
    for name, value in environment(0, 3).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(helper.UserError, match=r"started 3 processes on .*there is no CUDA device 2 \(found 2\)"):
        parallel.connect("auto", "0")


@pytest.mark.parametrize("size, says", [(1, "mpirun started 2 processes, but the libmpi.so"), (None, "libnccl.so.2")])
def test_a_communicator_that_is_not_mpiruns_or_not_there(monkeypatch, size, says):
    def communicator(context):
        if size is None:
            raise RuntimeError("value error in query\n\nlibnccl.so library is not found\n")
        return type("Alone", (), {"rank": 0, "size": size, "init": lambda self: None})()

    import nnabla.communicators
    monkeypatch.setattr(nnabla.communicators, "MultiProcessDataParallelCommunicator", communicator)
    with pytest.raises(helper.UserError, match=says):
        parallel.nccl_communicator(parallel.Launched(0, 2, 0, 2))


def test_libraries_are_looked_for_beside_mpirun_and_in_the_package(tmp_path, monkeypatch):
    for file in ("openmpi/bin/mpirun", "openmpi/lib/libmpi.so", "packages/nvidia/nccl/lib/libnccl.so.2"):
        (tmp_path / file).parent.mkdir(parents=True)
        (tmp_path / file).touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "openmpi" / "bin"))
    monkeypatch.setattr(sys, "path", [str(tmp_path / "packages"), *sys.path])
    monkeypatch.setenv("OMPI_HOME", "")
    monkeypatch.delenv("OMPI_HOME")
    monkeypatch.setenv("NCCL_HOME", "/of/the/user")
    parallel.point_to_libraries()
    assert os.environ["OMPI_HOME"] == str(tmp_path / "openmpi") and os.environ["NCCL_HOME"] == "/of/the/user"
    monkeypatch.delenv("NCCL_HOME")
    parallel.point_to_libraries()
    assert os.environ["NCCL_HOME"] == str(tmp_path / "packages" / "nvidia" / "nccl")
