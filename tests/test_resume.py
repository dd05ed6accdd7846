"""Test --resume: an interrupted run gives bit for bit the same results, and failures never damage saved files."""
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import h5py
import nnabla as nn
import numpy as np
import pytest

import datasets
import evaluate
import extract
import helper
import make_scene
import report
import train
from commands import run_copies
from config import old_form, settings
from conftest import ROOT, write_demo_config
from files import folders, writing
from training import checkpoints, log, schedule
from training import step as training_step

VIEWS, EPOCHS = 4, 5


@pytest.fixture(scope="module", autouse=True)
def empty_pages():
    """Write empty pages, to save time; test_report.py tests them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "page", lambda run, running: "")
        yield


def call(main, *arguments):
    """Call a script's main with command line arguments, and return the exit status."""
    before, sys.argv = sys.argv, ["script.py", *map(str, arguments)]
    try:
        helper.run(main)
    except SystemExit as ended:
        return ended.code
    finally:
        sys.argv = before
    return 0


def write_config(folder, **changes):
    """Write the configuration of runs of 20 steps, with section__key=value changed, and return its path."""
    return write_demo_config(
        folder / "tiny.yaml", changes, data=dict(path=str(folder / "tiny"), held_out_views=[VIEWS]),
        network=dict(width=64, feature=8, layers=4), tracer=dict(samples=20),
        train=dict(steps=EPOCHS * VIEWS, rays=64, mask_weight=400.0, learning_rate_halved_at=[0.6],
                   alpha_doubled_at=[0.4], models=3, validations=3, validation_view=VIEWS, validation_downscale=2))


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Return a folder with a tiny scene and an uninterrupted run on it, straight_tiny."""
    folder = tmp_path_factory.mktemp("runs")
    assert call(make_scene.main, "--output", folder / "tiny", "--views", VIEWS, "--held-out", 1, "--size", 24) == 0
    assert start(folder, "straight") == 0
    return folder


def start(folder, name, *more, **changes):
    """Train in the folder {name}_tiny, and return the exit status."""
    return call(train.main, "--context", "cpu", "--config", write_config(folder, **changes), "--monitor-path",
                folder / name, *more)


def at_step(monkeypatch, step, action):
    """Call `action()` during the `step`-th training step from now, counted from 1."""
    take, count = training_step.TrainingStep.take, [0]

    def counted(*arguments):
        count[0] += 1
        if count[0] == step:
            action()
        return take(*arguments)

    monkeypatch.setattr(training_step.TrainingStep, "take", counted)


def contents(folder):
    """Return all files of a run without times: {file: bytes}; for models and states, {name: bytes of an array}."""
    files = {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    for name in ("time.timer.txt", "report.html"):
        files.pop(Path(name), None)
    for name in files:
        if name.suffix == ".h5":
            files[name] = numbers(folder / name)
    return files


def numbers(path):
    """Return the arrays of a model or state, {name: bytes}; old versions of h5py also write the time to a file."""
    return {name: array.tobytes() for name, array in checkpoints.read_arrays(path)[0].items()}


def same_as_straight(home, name):
    found, expected = contents(home / f"{name}_tiny"), contents(home / "straight_tiny")
    assert sorted(map(str, found)) == sorted(map(str, expected))
    assert [str(file) for file in expected if found[file] != expected[file]] == []


# --- interruptions --------------------------------------------------------------------------------------------

@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_an_interrupted_run_is_the_one_that_was_not(home, monkeypatch, capfd, number, status):
    cuts = np.random.default_rng(status).permutation(8)[:3] + 1
    for index, cut in enumerate(cuts):      # within an epoch, or after its last step
        with monkeypatch.context() as patch:
            at_step(patch, cut, lambda: os.kill(os.getpid(), number))
            assert start(home, f"cut{status}", *(["--resume"] if index else [])) == status
        assert "--resume goes on" in capfd.readouterr().out
    assert start(home, f"cut{status}", "--resume") == 0
    assert f"after step {cuts.sum()} " in capfd.readouterr().out
    same_as_straight(home, f"cut{status}")
    assert signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler)     # handlers are restored


def test_an_interruption_in_the_very_last_step(home, monkeypatch):
    with monkeypatch.context() as patch:
        at_step(patch, EPOCHS * VIEWS, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert start(home, "last") == 143
    assert not (home / "last_tiny" / f"model_{EPOCHS - 1:05d}.h5").exists()
    assert start(home, "last", "--resume") == 0
    same_as_straight(home, "last")


def test_an_interruption_while_rendering(home, monkeypatch):
    validate = train.Training.validate

    def interrupted(*arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        return validate(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(train.Training, "validate", interrupted)
        assert start(home, "rendering") == 143
    state = checkpoints.load_state(home / "rendering_tiny", {})
    assert state.progress["step"] == 2 * VIEWS + 1      # the epoch's last step and the next one are kept
    assert start(home, "rendering", "--resume") == 0
    same_as_straight(home, "rendering")


KILLED = """
import os, signal, sys, helper, report, train
sync, count = os.fsync, [int(sys.argv.pop(1))]
def fsync(handle):
    count[0] -= 1
    if count[0] == 0:
        os.ftruncate(handle, os.fstat(handle).st_size // 2)
        os.kill(os.getpid(), signal.SIGKILL)
    sync(handle)
os.fsync = fsync
report.page = lambda run, running: "a page"     # to save time
helper.run(train.main)
"""


def run_killed(home, write, config, name):
    """Train in {name}_tiny until the file of number `write` is half written. Return the exit status."""
    (home / "killed.py").write_text(KILLED)
    command = [home / "killed.py", write, "--context", "cpu", "--config", config, "--monitor-path", home / name]
    return run_copies([command], ROOT)[0].status


@pytest.mark.parametrize("write, step, models", [
    (2, None, 0),       # the first state
    (8, 2 * VIEWS, 1),  # the second epoch's page, after configuration, state, page, state, render, shape and model
    (9, 2 * VIEWS, 1),  # the fourth epoch's state
    (12, 4 * VIEWS, 1),     # its model, after its render and shape
])
def test_a_run_that_is_killed_while_it_writes(home, capfd, write, step, models):
    name = f"killed{write}"
    status = run_killed(home, write, write_config(home), name)
    folder = home / f"{name}_tiny"
    assert status == -signal.SIGKILL and list(folder.glob(folders.UNFINISHED + "*"))
    assert len(list(folder.glob("model_*.h5"))) == models
    for model in folder.glob("model_*.h5"):
        nn.load_parameters(str(model))
    if step is None:
        assert start(home, name, "--resume") == 2 and "no state.h5 to resume" in capfd.readouterr().err
        assert start(home, name) == 0
    else:
        assert checkpoints.load_state(folder, {}).progress["step"] == step
        assert start(home, name, "--resume") == 0
    same_as_straight(home, name)


def test_a_complete_run_that_is_killed_in_its_last_page(home, capfd):
    config, folder = write_config(home, train__steps=VIEWS), home / "page_tiny"
    assert run_killed(home, 7, config, "page") == -signal.SIGKILL and (folder / "model_00000.h5").exists()
    assert [path.suffix for path in folder.glob(folders.UNFINISHED + "*")] == [".html"]
    assert start(home, "page", "--resume", train__steps=VIEWS) == 0 and "is trained" in capfd.readouterr().out
    assert not list(folder.glob(".*"))


def test_what_a_killed_process_leaves_goes_and_nothing_else(tmp_path):
    """Check that files of killed processes are removed, and that a file being written stays."""
    names = ["psnr.series.txt", "model_00001.h5", "renders/view_000_depth.npy", "validation/epoch_00001.png",
             "a b.mp4", "n" * 240 + ".ply", "no_suffix"]
    for name in names:
        child = os.fork()
        if child == 0:
            with writing.replacing(tmp_path / name):
                os.kill(os.getpid(), signal.SIGKILL)
        os.waitpid(child, 0)
    left = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(left) == len(names) and {path.suffix for path in left} >= {".txt", ".h5", ".npy", ".png", ".mp4", ".ply"}
    others = [".hidden-12345678.h5", ".state-12345678.h5", *(folders.UNFINISHED + end for end in ("a.txt", "12345678"))]
    for name in others[:-1]:
        (tmp_path / name).write_text("a user's")
    (tmp_path / others[-1]).mkdir()
    with writing.replacing(tmp_path / "mesh.ply") as temporary:
        script = "import sys\nfrom files import folders\nfolders.remove_unfinished(sys.argv[1])"
        subprocess.run([sys.executable, "-c", script, str(tmp_path)], cwd=str(ROOT), check=True)
        temporary.write_text("whole")
    assert (tmp_path / "mesh.ply").read_text() == "whole"
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*others, "mesh.ply", "renders", "validation"])
    assert not list(tmp_path.glob("*/*"))


def test_the_scripts_that_write_to_a_run_remove_what_is_left_there(home, capfd):
    assert start(home, "left", train__steps=VIEWS) == 0
    folder = home / "left_tiny"
    for script in (extract, evaluate, report):
        left = [folder / f"{folders.UNFINISHED}abcdefg{digit}.ply" for digit in range(3)]
        for path in left:
            path.write_text("half")
        words = [folder] if script is report else ["--context", "cpu", "--config", folder / "tiny.yaml",
                                                   "--model-load-path", folder]
        call(script.main, *words, *(["--views", "none"] if script is evaluate else []))
        assert not any(path.exists() for path in left)


def test_a_second_ctrl_c_ends_at_once():
    script = ("import helper, os, signal\nwith helper.stop_signals() as stop:\n    os.kill(os.getpid(), 2)\n"
              "    print(stop, flush=True)\n    os.kill(os.getpid(), 2)\n    print('not here')")
    done = subprocess.run([sys.executable, "-c", script], cwd=str(ROOT), capture_output=True)
    assert done.returncode == -2 and b"not here" not in done.stdout and b"]" in done.stdout
    assert b"stopping after this step" in done.stderr


def test_an_ignored_signal_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with helper.stop_signals() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
        assert stop == []
    finally:
        signal.signal(signal.SIGHUP, before)


# --- failures -------------------------------------------------------------------------------------------------

def test_a_disk_that_is_full(home, monkeypatch, capfd):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with monkeypatch.context() as patch:
        at_step(patch, 2 * VIEWS + 3, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard)))
        try:
            assert start(home, "full") == 2
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    said = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(said) == 1 and "state.h5: cannot be written" in said[0] and "free some space" in said[0]
    folder = home / "full_tiny"
    assert not list(folder.rglob(".*")) and checkpoints.load_state(folder, {}).progress["step"] == 2 * VIEWS
    assert numbers(folder / "model_00001.h5") == numbers(home / "straight_tiny" / "model_00001.h5")
    assert start(home, "full", "--resume") == 0
    same_as_straight(home, "full")


def rename(folder):
    folder.rename(folder.with_name("elsewhere_tiny"))


def replace(folder):
    rename(folder)
    folder.mkdir()
    (folder / "notes.txt").write_text("a user's")


@pytest.mark.parametrize("move", [rename, replace, shutil.rmtree])
@pytest.mark.parametrize("moment", ["step", "write"])
def test_a_folder_that_is_moved_during_the_run(home, monkeypatch, capfd, move, moment):
    folder, elsewhere = home / "roaming_tiny", home / "elsewhere_tiny"
    shutil.rmtree(elsewhere, ignore_errors=True)
    shutil.rmtree(folder, ignore_errors=True)
    with monkeypatch.context() as patch:
        if moment == "step":
            at_step(patch, 2 * VIEWS + 2, lambda: move(folder))
        else:       # while the second epoch's render is written
            validate, sync, render = train.Training.validate, os.fsync, []

            def fsync(handle):
                if render and folder.exists():
                    move(folder)
                    render.clear()
                sync(handle)

            patch.setattr(train.Training, "validate", lambda *a: render.append(1) or validate(*a))
            patch.setattr(os, "fsync", fsync)
        assert start(home, "roaming") == 2
    said = [line for line in capfd.readouterr().err.splitlines() if "tiny" in line and "block/s" not in line]
    assert len(said) == 1 and said[0].startswith(f"error: {folder}: was "), said
    assert "trained: " not in capfd.readouterr().out
    assert [p.name for p in folder.glob("*")] == (["notes.txt"] if move is replace else [])
    assert folder.exists() == (move is replace)
    if move is shutil.rmtree:
        assert "removed" in said[0]
        return
    assert f"was renamed to {elsewhere}" in said[0] and f"--resume {elsewhere}" in said[0]
    assert start(home, "roaming", "--resume", elsewhere) == 0
    shutil.rmtree(folder, ignore_errors=True)
    elsewhere.rename(folder)
    same_as_straight(home, "roaming")


# Start runs in one folder. Each writes its own file there; print the names of those that got the folder.
STARTS = """
import contextlib, os, sys, time
import helper
from files import folders
from pathlib import Path
name, path = sys.argv[1:]
for number in range(60):
    try:
        with contextlib.redirect_stdout(sys.stderr), folders.new_run_folder(Path(path + "_tiny")) as folder:
            with open(folder / f"{name}-{number}", "x"):
                time.sleep(0.001)
            assert os.listdir(folder) == [f"{name}-{number}"]
            folders.check_held(folder)
        print(f"{name}-{number}")
    except helper.UserError as error:
        assert "another training writes there" in str(error), error
"""


def test_starts_at_the_same_moment(tmp_path):
    started = [subprocess.Popen([sys.executable, "-c", STARTS, name, str(tmp_path / "run")], cwd=str(ROOT),
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE, universal_newlines=True)
               for name in "abc"]
    said = [process.communicate(timeout=60) for process in started]
    assert [process.returncode for process in started] == [0, 0, 0], said
    runs = sorted(line for out, _ in said for line in out.splitlines())
    assert sorted(path.name for path in tmp_path.glob("run_tiny*/*")) == runs and len(runs) > 20
    assert len(list(tmp_path.iterdir())) == len(runs)       # one folder per run, and no others


def test_a_folder_that_cannot_be_a_runs(home, capfd, tmp_path):
    (tmp_path / "file_tiny").write_text("a user's")
    (tmp_path / "link_tiny").symlink_to(tmp_path / "nowhere")
    os.mkfifo(str(tmp_path / "pipe_tiny"))
    config = write_config(home, train__steps=VIEWS)

    def begin(name):
        return call(train.main, "--context", "cpu", "--config", config, "--monitor-path", tmp_path / name)

    for name in ("file", "link", "pipe", "n" * 255):
        assert begin(name) == 2
        said = [line for line in capfd.readouterr().err.splitlines() if "[INFO]" not in line]
        assert len(said) == 1 and f"{name}_tiny: cannot be made" in said[0] and "--monitor-path" in said[0]
    assert (tmp_path / "file_tiny").read_text() == "a user's"
    (tmp_path / "empty_tiny").mkdir()       # an empty folder is used
    assert begin("empty") == 0
    assert not (tmp_path / "empty_tiny.1").exists() and (tmp_path / "empty_tiny" / "model_00000.h5").exists()


def test_a_series_that_cannot_be_written(tmp_path):
    series = log.EpochLog(tmp_path, schedule.Epochs(100, 1))
    (tmp_path / "mask.series.txt").mkdir()
    with pytest.raises(helper.UserError, match="series.txt: cannot be written"):
        series.add(0, loss=1.0, mask=2.0, hits=1)


@pytest.mark.parametrize("spoilt, named", [("rgb", "color"), ("points", "mask")])
def test_a_loss_that_is_not_finite(home, monkeypatch, capfd, spoilt, named):
    take, count = training_step.TrainingStep.take, [0]

    def spoil(self, solver, search, batch, *others):
        count[0] += 1
        if count[0] < 2 * VIEWS + 2:
            return take(self, solver, search, batch, *others)
        placed = training_step.place_points(search.sdf, batch, search.tracer, np.random.default_rng(0), search.grid)
        placed.hit_in_mask[[0, -1]] = True, False   # first ray: colour loss; last ray: mask loss
        batch.rgb[0], placed.points[-1] = (np.inf, 0) if spoilt == "rgb" else (0, np.nan)
        return placed, self.compute_gradients(solver, batch, placed, *others)

    with monkeypatch.context() as patch:
        at_step(patch, 2 * VIEWS + 1, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert start(home, "before") == 143     # to keep the parameters before the failing step
    before = checkpoints.load_state(home / "before_tiny", {}).arrays
    with monkeypatch.context() as patch:
        patch.setattr(training_step.TrainingStep, "take", spoil)
        assert start(home, f"spoilt_{spoilt}") == 2
    said = capfd.readouterr().err.splitlines()[-1]
    assert f"step {2 * VIEWS + 1} (epoch 2)" in said and f"the {named} loss is " in said
    for name, parameter in nn.get_parameters().items():
        np.testing.assert_array_equal(parameter.d, before[f"parameters/{name}"])
    assert checkpoints.load_state(home / f"spoilt_{spoilt}_tiny", {}).progress["step"] == 2 * VIEWS
    assert start(home, f"spoilt_{spoilt}", "--resume") == 0
    same_as_straight(home, f"spoilt_{spoilt}")


def test_a_state_that_is_not_finite_is_not_saved(tmp_path):
    progress = {"step": 7, "steps": 2, "loss": 0.0, "elapsed": 0.0, "lap": 0.0, "config": {}}
    nn.clear_parameters()
    parameter = nn.parameter.get_parameter_or_create("implicit/0/v", (2, 3))
    checkpoints.save_state(tmp_path, {}, progress, {})
    whole = (tmp_path / "state.h5").read_bytes()
    parameter.d = np.array([[0, 0, 0], [0, 0, np.inf]])
    with pytest.raises(helper.UserError, match="after step 7, parameters/implicit/0/v has values that are not finite"):
        checkpoints.save_state(tmp_path, {}, progress, {})
    assert (tmp_path / "state.h5").read_bytes() == whole
    nn.clear_parameters()


def test_a_surface_that_is_gone_is_told_once(home, monkeypatch, capfd):
    take = training_step.TrainingStep.take

    def without_hits(*arguments):
        placed, losses = take(*arguments)
        return placed._replace(hit_in_mask=np.zeros(64, bool)), losses

    monkeypatch.setattr(training_step.TrainingStep, "take", without_hits)
    assert start(home, "gone") == 0
    said = capfd.readouterr()
    assert (said.out + said.err).count("no ray has met the surface") == 1


# --- states that --resume accepts or refuses -----------------------------------------------------------------

def refused(home, capfd, *arguments, **changes):
    """Run train.py, which must exit with status 2 and write nothing. Return the one line that it prints."""
    write_config(home, **changes)
    before = {path: path.stat().st_mtime_ns for path in home.rglob("*")}
    capfd.readouterr()
    assert call(train.main, "--context", "cpu", "--config", home / "tiny.yaml", *arguments) == 2
    assert {path: path.stat().st_mtime_ns for path in home.rglob("*")} == before
    said = capfd.readouterr().err.splitlines()
    assert len(said) == 1 and said[0].startswith("error: ")
    return said[0]


def test_nothing_to_resume(home, capfd):
    assert "nowhere_tiny: no such run" in refused(home, capfd, "--monitor-path", home / "nowhere", "--resume")
    assert "tiny: has no state.h5" in refused(home, capfd, "--resume", home / "tiny")
    assert "no such run" in refused(home, capfd, "--resume", home / "straight_tiny" / "state.h5")


def test_what_is_no_state_of_this_run(home, capfd):
    folder = home / "other_tiny"
    folder.mkdir()
    state, resume = folder / "state.h5", ("--resume", folder)
    whole = (home / "straight_tiny" / "state.h5").read_bytes()
    for size in (0, 7, 5000, len(whole) // 2, len(whole) - 1):
        state.write_bytes(whole[:size])
        assert "truncated" in refused(home, capfd, *resume)
    state.write_bytes((home / "straight_tiny" / "model_00004.h5").read_bytes())
    assert "no training state of this program" in refused(home, capfd, *resume)
    with h5py.File(str(state), "w") as file:
        file["weights"], file.attrs["about"] = np.zeros(3), '{"format": "of another program"}'
    assert "no training state of this program" in refused(home, capfd, *resume)
    state.write_bytes(whole)
    with h5py.File(str(state), "r+") as file:
        file["solver/implicit/1/v/mean"][0, 0] += 1
    assert "damaged (its checksum" in refused(home, capfd, *resume)
    state.write_bytes(whole)
    said = refused(home, capfd, *resume, network__width=128)
    assert "state.h5" in said and "(33, 64)" in said and "(33, 128)" in said
    assert "implicit/3/v is (64, 9)" in refused(home, capfd, *resume, network__layers=5)
    assert "was trained on 4 views, and now there are 3" in refused(home, capfd, *resume, data__held_out_views=[3, 4])


def test_a_state_without_its_solver(home):
    shapes = {"implicit/0/v": (33, 64)}
    state = checkpoints.load_state(home / "straight_tiny", shapes)
    for spoil in (lambda arrays: arrays.pop("solver/implicit/0/v/var"),
                  lambda arrays: arrays.update({"solver/implicit/0/v/mean": np.zeros((2, 2), np.float32)})):
        arrays = dict(state.arrays)
        spoil(arrays)
        with pytest.raises(helper.UserError, match="no state of this solver for implicit/0/v"):
            checkpoints.restore_state(state._replace(arrays=arrays), {"solver": train.S.Adam(1e-3)})


def test_what_a_state_remembers_of_the_sdf(home):
    state = checkpoints.load_state(home / "straight_tiny", {"implicit/0/v": (33, 64)})
    values, margins = (state.arrays[name] for name in (checkpoints.GRID, checkpoints.MARGINS))
    grid = checkpoints.grid_of(state)
    assert (grid.values == values).all() and (grid.margins == margins).all() and values.dtype == np.float32
    early = {name: array for name, array in state.arrays.items() if name != checkpoints.GRID}
    assert checkpoints.grid_of(state._replace(arrays=early)) is None
    earlier = checkpoints.grid_of(state._replace(arrays={**state.arrays, checkpoints.MARGINS: margins[0]}))
    assert (earlier.values == values).all() and earlier.margins.shape == margins.shape    # its margins are made anew
    for name, spoilt in ((checkpoints.GRID, values[1:]), (checkpoints.GRID, values[0]),
                         (checkpoints.GRID, values[:1, :1, :1]), (checkpoints.MARGINS, margins[1:]),
                         (checkpoints.MARGINS, margins * np.nan)):
        with pytest.raises(helper.UserError, match="remembers of the sdf"):
            checkpoints.grid_of(state._replace(arrays={**state.arrays, name: spoilt}))


def test_a_run_that_is_complete_and_one_that_is_to_be_longer(home, capfd):
    whole = contents(home / "straight_tiny")
    for steps in (EPOCHS * VIEWS, 3 * VIEWS):
        assert start(home, "straight", "--resume", train__steps=steps) == 0
        assert f"straight_tiny is trained: {EPOCHS * VIEWS} steps" in capfd.readouterr().out
        assert contents(home / "straight_tiny") == whole
    assert start(home, "longer") == start(home, "longer", "--resume", train__steps=28, train__mask_weight=300.0) == 0
    said = capfd.readouterr().out
    assert "notice: train.steps was 20, is now 28" in said and "train.mask_weight was 400.0, is now 300.0" in said
    assert "from here on the learning rate is 0.001 and alpha 100" in said      # of the new run, 5/7 are done
    assert said.count("notice:") == 3
    assert "steps: 28" in (home / "longer_tiny" / "tiny.yaml").read_text()
    for name in ("loss.series.txt", "time.timer.txt"):
        lines = (home / "longer_tiny" / name).read_text().splitlines()
        assert [int(line.split()[0]) for line in lines] == [VIEWS * epoch + VIEWS - 1 for epoch in range(7)]
    same = {"train__steps": 28, "train__learning_rate_halved_at": [3 / 7], "train__alpha_doubled_at": [2 / 7]}
    assert start(home, "longer") == start(home, "longer", "--resume", **same) == 0
    assert start(home, "seven", **same) == 0
    seven, longer = (numbers(home / f"{name}_tiny" / "model_00006.h5") for name in ("seven", "longer"))
    assert seven == longer


def test_a_run_that_ends_within_an_epoch(home):
    """Check the last files of 22 steps, of which 2 are of a sixth epoch, and that the run can become longer."""
    often = {"train__models": 50, "train__validations": 1}
    assert start(home, "part", train__steps=22, **often) == 0
    folder = home / "part_tiny"
    assert [path.name for path in sorted(folder.glob("model_*"))] == [f"model_{e:05d}.h5" for e in range(6)]
    assert [path.name for path in folder.glob("validation/*[0-9].png")] == ["epoch_00005.png"]
    lines = {name: (folder / name).read_text().splitlines() for name in ("loss.series.txt", "time.timer.txt")}
    for found in lines.values():
        assert [int(line.split()[0]) for line in found] == [3, 7, 11, 15, 19, 21]
    assert start(home, "part", "--resume", train__steps=25, **often) == 0
    assert (folder / "model_00006.h5").exists()
    kept = (folder / "loss.series.txt").read_text().splitlines()
    assert kept[:6] == lines["loss.series.txt"] and [line.split()[0] for line in kept[6:]] == ["23", "24"]


def test_a_state_of_a_run_that_counted_in_epochs(home, capfd):
    """Check that such a run goes on bit for bit, without a notice where the schedule is the same."""
    assert start(home, "early") == 0
    state = home / "early_tiny" / "state.h5"
    arrays, about = checkpoints.read_arrays(state)
    progress, names = json.loads(about), {new: old for old, new in old_form.NEW_KEYS.items()}
    for new, old in (("steps", EPOCHS), ("learning_rate_halved_at", [3]), ("alpha_doubled_at", [2]),
                     ("models", 2), ("validations", 2)):
        del progress["config"][f"train.{new}"]
        progress["config"][f"train.{names[new]}"] = old
    with h5py.File(str(state), "r+") as file:
        file.attrs["about"] = json.dumps(progress)
    (home / "early_tiny" / "model_00004.h5").unlink()
    capfd.readouterr()
    assert start(home, "early", "--resume") == 0
    said = capfd.readouterr().out
    assert "after step 20" in said and "train.steps was" not in said and "halved_at was" not in said
    same_as_straight(home, "early")


def test_a_change_for_one_run(home, capfd):
    """Check that --set is used, is in the run's copy, and stays there when the run goes on from that copy."""
    words = ["--set", "train.steps=4", "--set", "train.rays=32", "--set", "train.rays=48"]
    assert start(home, "changed", *words) == 0
    folder = home / "changed_tiny"
    copy, given = settings.load_config(folder / "tiny.yaml"), settings.load_config(write_config(home))
    assert settings.flat(copy) == {**settings.flat(given), "train.steps": 4, "train.rays": 48}
    assert "Changed by --set: train.steps, train.rays" in (folder / "tiny.yaml").read_text()
    assert (folder / "model_00000.h5").exists()
    assert call(train.main, "--context", "cpu", "--config", folder / "tiny.yaml", "--resume", folder, "--set",
                "train.steps=8") == 0
    assert settings.load_config(folder / "tiny.yaml").train.steps == 8 and (folder / "model_00001.h5").exists()
    for word, says in (("train.steps=0", "error: --set train.steps must be between 1 and"),
                       ("train.stepps=5", "error: --set 'train.stepps=5': write section.key=value"),
                       ("train.steps", "write section.key=value"), ("train.steps=[", "is not valid YAML")):
        assert start(home, "refused", "--set", word) == 2
        assert says in capfd.readouterr().err and not (home / "refused_tiny").exists()


def test_a_run_on_a_scene_that_is_too_large_for_the_memory(home, monkeypatch):
    monkeypatch.setattr(datasets, "IN_MEMORY", 0)
    assert start(home, "large") == 0
    (home / "tiny" / "pictures_1.cache").unlink()
    same_as_straight(home, "large")


def test_a_run_of_several_views_per_step(home, monkeypatch, capfd):
    """Check that it goes on bit for bit after a stop within an epoch, and not with another number."""
    several = {"train__views_per_step": 3, "train__outline_fraction": 0.5}
    assert start(home, "several", **several) == 0
    with monkeypatch.context() as patch:
        at_step(patch, 7, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert start(home, "views", **several) == 143
    capfd.readouterr()
    assert start(home, "views", "--resume", **{**several, "train__views_per_step": 2}) == 2
    assert "was begun with train.views_per_step 3, and now it is 2" in capfd.readouterr().err
    assert start(home, "views", "--resume", **several) == 0
    found, wanted = contents(home / "views_tiny"), contents(home / "several_tiny")
    assert found == wanted and Path("model_00009.h5") in found      # epochs of 2 steps
    assert start(home, "refused", train__views_per_step=65) == 2
    assert "train.views_per_step is 65, but a step has 64 rays" in capfd.readouterr().err


def test_a_run_that_a_newer_one_has_moved(home, monkeypatch):
    with monkeypatch.context() as patch:
        at_step(patch, 6, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert start(home, "moved") == 143
    assert start(home, "moved", train__steps=VIEWS) == 0
    assert start(home, "moved", "--resume", home / "moved_tiny.1") == 0
    (home / "moved_tiny").rename(home / "newer")
    (home / "moved_tiny.1").rename(home / "moved_tiny")
    same_as_straight(home, "moved")


def test_a_folder_in_which_another_training_writes(home, capfd):
    with folders.held(home / "straight_tiny"):
        for more in ([], ["--resume"]):
            assert start(home, "straight", *more, train__steps=36) == 2
            assert "straight_tiny: another training writes there" in capfd.readouterr().err
    assert not (home / "straight_tiny.1").exists()


def test_a_line_that_was_half_written_is_cut_off(tmp_path):
    path = tmp_path / "loss.series.txt"
    path.write_text("3 0.5\n7 0.25\n11 0.125\n15 0.0")
    log.keep_lines(path, 16)
    assert path.read_text() == "3 0.5\n7 0.25\n11 0.125\n"
    log.keep_lines(path, 8)
    assert path.read_text() == "3 0.5\n7 0.25\n"
    log.keep_lines(tmp_path / "none.txt", 8)
    assert not (tmp_path / "none.txt").exists()
