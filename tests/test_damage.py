"""Test damaged and hostile input files, with seeded random damage to everything that the scripts read.

A script must print one line, exit with status 2 and write nothing, or compute if the file is still valid.
"""
import json
import os
import subprocess
import sys
import warnings
import zipfile
import zlib

import h5py
import nnabla as nn
import nnabla.solvers as S
import numpy as np
import pytest
import yaml
from PIL import EpsImagePlugin, Image

import helper
import make_scene
import network
import train
from backends import architecture, context
from config.settings import Network
from conftest import ROOT
from training import checkpoints


class Accepted(Exception):
    """Raised when a script has accepted its input and begins to compute."""


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Return a folder with a tiny scene and its configuration."""
    folder = tmp_path_factory.mktemp("damage")
    sys.argv = ["make_scene.py", "--output", str(folder / "tiny"), "--views", "2", "--held-out", "0", "--size", "16"]
    make_scene.main()
    for kind in ("image", "mask"):      # one PNG, one JPEG
        path = folder / "tiny" / kind / "001.png"
        Image.open(path).convert("RGB").save(path.with_suffix(".jpg"), quality=95)
        path.unlink()
    tree = yaml.safe_load((ROOT / "config" / "demo.yaml").read_text())
    tree["data"].update(path=str(folder / "tiny"), held_out_views=[])
    tree["train"].update(validation_view=0)
    (folder / "tiny.yaml").write_text(yaml.safe_dump(tree))
    return folder


def outcome(home, capfd, monkeypatch):
    """Run train.py on the scene. Return its line if it refuses the input, None if it begins to compute."""
    def compute(*_):
        raise Accepted

    monkeypatch.setattr(context, "set_context", compute)
    monkeypatch.setattr(sys, "argv", ["train.py", "--config", str(home / "tiny.yaml"), "--monitor-path",
                                      str(home / "results")])
    before = sorted(home.rglob("*"))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")      # a warning would be printed as a second line
            helper.run(train.main)
    except Accepted:
        return None
    except SystemExit as ended:
        assert ended.code == 2
    finally:
        said = capfd.readouterr().err.splitlines()
        assert sorted(home.rglob("*")) == before
    assert len(said) == 1 and said[0].startswith("error: "), said
    return said[0]


def damaged(whole, rng):
    """Return a copy of `whole` that is truncated, or has a bit or a stretch changed, doubled or removed."""
    content, kind = bytearray(whole), rng.integers(5)
    place, length = int(rng.integers(len(whole))), int(rng.integers(1, 40))
    if kind == 0:
        return bytes(content[:place])
    if kind == 1:
        content[place] ^= 1 << int(rng.integers(8))
    elif kind == 2:
        content[place:place + length] = rng.integers(0, 256, length, dtype=np.uint8).tobytes()
    elif kind == 3:
        content[place:place] = content[place:place + length]
    else:
        del content[place:place + length]
    return bytes(content)


@pytest.mark.parametrize("name, tries, at_least", [
    ("tiny.yaml", 150, 60),
    ("tiny/cameras.npz", 100, 60),
    ("tiny/image/000.png", 60, 40),
    ("tiny/image/001.jpg", 60, 20),
    ("tiny/mask/000.png", 60, 40),
    ("tiny/mask/001.jpg", 60, 20),
])
def test_random_damage(home, capfd, monkeypatch, name, tries, at_least):
    path, rng = home / name, np.random.default_rng(len(name))
    whole = path.read_bytes()
    assert outcome(home, capfd, monkeypatch) is None
    refused = 0
    try:
        for _ in range(tries):
            path.write_bytes(damaged(whole, rng))
            refused += outcome(home, capfd, monkeypatch) is not None
    finally:
        path.write_bytes(whole)
    assert refused >= at_least      # the damage does matter


H5 = """
import sys, warnings
sys.path[:0] = [sys.argv[1], sys.argv[1] + "/tests"]
import numpy as np
import helper, network
from backends import architecture
from config.settings import Network
from training import checkpoints
from pathlib import Path
from test_damage import damaged
path, rng, counts = Path(sys.argv[2]), np.random.default_rng(0), {True: 0, False: 0}
whole, shapes = path.read_bytes(), architecture.parameter_shapes(Network(64, 8, 4))


def load(path, shapes):
    if path.name == "state.h5":
        checkpoints.load_state(path.parent, shapes)
    else:
        checkpoints.load_model(path, shapes)


load(path, shapes)
for _ in range(int(sys.argv[3])):
    content = damaged(whole, rng) if rng.integers(2) else damaged(whole[:3000], rng) + whole[3000:]
    path.write_bytes(content)
    try:
        load(path, shapes)
        counts[False] += 1
    except helper.UserError as error:
        assert "\\n" not in str(error)
        counts[True] += 1
print(counts[True], counts[False])
"""


@pytest.mark.parametrize("name, tries, at_least", [("model_00000.h5", 300, 100), ("state.h5", 150, 120)])
def test_random_damage_to_checkpoints(tmp_path, name, tries, at_least):
    """Run in a separate process, as the HDF5 library is written in C and may crash."""
    network.initialize(Network(64, 8, 4), np.random.default_rng(0))
    checkpoints.save_model(tmp_path / "model_00000.h5")
    solver = S.Adam()
    solver.set_parameters(nn.get_parameters())
    progress = {"step": 7, "steps": 2, "loss": 0.5, "elapsed": 1.0, "lap": 1.0, "config": {}}
    checkpoints.save_state(tmp_path, {"solver": solver}, progress, {"loss": [1.0]})
    done = subprocess.run([sys.executable, "-c", H5, str(ROOT), str(tmp_path / name), str(tries)],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    refused, accepted = map(int, done.stdout.split()[-2:])
    assert refused >= at_least and refused + accepted == tries


@pytest.mark.parametrize("content", [b"", b"\x89HDF\r\n\x1a\n", b"PK\x03\x04", b"\x80\x04K\x01.", b"text"])
def test_checkpoints_that_are_none(tmp_path, content):
    path = tmp_path / "model_00000.h5"
    path.write_bytes(content)
    with pytest.raises(helper.UserError, match="not a readable .h5 checkpoint"):
        checkpoints.load_model(path, {"implicit/0/v": (39, 64)})


def test_a_model_that_reads_another_file(tmp_path):
    secret = tmp_path / "secret"
    secret.write_bytes(bytes(39 * 64 * 4))
    path, shapes = tmp_path / "model_00000.h5", {"implicit/0/v": (39, 64)}
    with h5py.File(str(path), "w") as file:
        file.create_dataset("implicit/0/v", (39, 64), "f4", external=[(str(secret), 0, h5py.h5f.UNLIMITED)])
        file["large"] = np.zeros(20000)     # makes the file larger than its datasets claim
    with pytest.raises(helper.UserError, match="not a readable"):
        checkpoints.load_model(path, shapes)
    with h5py.File(str(tmp_path / "other.h5"), "w") as file:
        file["x"] = np.zeros((39, 64), np.float32)
    with h5py.File(str(path), "w") as file:
        file["implicit/0/v"] = h5py.ExternalLink("other.h5", "x")
    with pytest.raises(helper.UserError, match="has no parameter implicit/0/v"):
        checkpoints.load_model(path, shapes)


def test_a_model_that_unpacks_to_more_than_its_size(tmp_path):
    path = tmp_path / "model_00000.h5"
    with h5py.File(str(path), "w") as file:
        file["implicit/0/v"] = np.zeros((39, 64), np.float32)
        file.create_dataset("large", (2000, 2000), "f4", compression="gzip")
    with pytest.raises(helper.UserError, match="not a readable"):
        checkpoints.load_model(path, {"implicit/0/v": (39, 64)})


def many(file):
    for number in range(300):       # each is smaller than the file, but has no storage in it
        file.create_dataset(str(number), (10000,), "f4")


def in_one_chunk(file):
    """Add a number that decompresses to 40 MB."""
    file.create_dataset("implicit/0/v", (1,), "f4", maxshape=(None,), chunks=(10 ** 7,), compression="gzip")[0] = 1.0


def deep(file):
    for _ in range(3000):       # HDF5 visits them recursively
        file = file.create_group("g")


def more_than_any_model_has(file):
    for number in range(checkpoints.MOST_ARRAYS + 1):
        file.create_dataset(str(number), (), "f4")


@pytest.mark.parametrize("fill", [many, in_one_chunk, deep, more_than_any_model_has], ids=lambda fill: fill.__name__)
def test_a_model_that_claims_more_than_it_holds(tmp_path, monkeypatch, fill):
    path = tmp_path / "model_00000.h5"
    monkeypatch.setattr(checkpoints, "MOST_ARRAYS", 400)
    with h5py.File(str(path), "w") as file:
        fill(file)
        file["large"] = np.zeros(20000)     # makes the file larger than any single dataset
    with pytest.raises(helper.UserError, match="model_00000.h5: not a readable .h5 checkpoint"):
        checkpoints.read_arrays(path)


@pytest.mark.parametrize("about", [np.array(5 * ["x" * 10 ** 6], dtype=object), "x" * 2 ** 19, np.zeros(3),
                                   np.bytes_(b"\xff")], ids=["texts", "long", "numbers", "bytes"])
def test_a_model_with_another_attribute_than_ours(tmp_path, about):
    with h5py.File(str(tmp_path / "model.h5"), "w") as file:
        file["x"], file.attrs["about"] = np.zeros(3), about
    with pytest.raises(helper.UserError, match="not a readable"):
        checkpoints.read_arrays(tmp_path / "model.h5")


def test_a_model_that_is_a_pipe_or_too_large(tmp_path):
    os.mkfifo(str(tmp_path / "model_00000.h5"))
    for read in (checkpoints.model_file, checkpoints.read_arrays):
        with pytest.raises(helper.UserError, match="not a regular file"):
            read(tmp_path / "model_00000.h5")
    with open(str(tmp_path / "large.h5"), "wb") as file:
        file.truncate(checkpoints.MOST_BYTES + 1)
    with pytest.raises(helper.UserError, match="more than 1073741824 bytes"):
        checkpoints.read_arrays(tmp_path / "large.h5")


def test_a_model_beyond_single_precision(tmp_path):
    with h5py.File(str(tmp_path / "model.h5"), "w") as file:
        file["implicit/0/v"] = np.full((39, 64), 1e300)
    with pytest.raises(helper.UserError, match="implicit/0/v has values that are not finite"):
        checkpoints.load_model(tmp_path / "model.h5", {"implicit/0/v": (39, 64)})


def resumed(folder, progress=None, arrays=None):
    """Write a state with changed progress and arrays and a valid checksum, and restore it as train.py does."""
    shapes = architecture.parameter_shapes(Network(64, 8, 4))
    network.initialize(Network(64, 8, 4), np.random.default_rng(0))
    solver = S.Adam()
    solver.set_parameters(nn.get_parameters())
    whole = {"step": 7, "steps": 2, "views": 2, "ranks": 1, "loss": 0.5, "elapsed": 1.0, "lap": -1.0,
             "config": {"train.rays": 8}}
    checkpoints.save_state(folder, {"solver": solver}, whole, {"loss": [1.0]})
    kept = {**checkpoints.read_arrays(folder / "state.h5")[0], **(arrays or {})}
    about = {**whole, "format": checkpoints.STATE_FORMAT, "checksum": checkpoints.checksum(kept), **(progress or {})}
    with h5py.File(str(folder / "state.h5"), "w") as file:
        for name, array in kept.items():
            file[name] = array
        file.attrs["about"] = json.dumps({name: value for name, value in about.items() if value is not None})
    state = checkpoints.load_state(folder, shapes)
    checkpoints.restore_state(state, {"solver": solver})
    return state


def test_the_state_that_the_next_tests_spoil_is_fine(tmp_path):
    assert resumed(tmp_path).progress["step"] == 7
    assert resumed(tmp_path, {"views": None, "ranks": None}).progress["steps"] == 2     # as in early versions
    more = {"parameters/implicit/9/v": np.zeros(3), "parameters/new/x": np.full(3, np.nan)}
    assert set(resumed(tmp_path, arrays=more).parameters) == set(architecture.parameter_shapes(Network(64, 8, 4)))


@pytest.mark.parametrize("name, values", [
    ("step", [-1, 1.0, "7", None, 2 ** 63, True]), ("steps", [0, -2, 3, 2.0, 10 ** 9]),
    ("views", [0, "2", [2], 5, 2.0]), ("ranks", [0, -1, 2, "1", 10 ** 30]), ("loss", ["x", np.nan, np.inf, 1]),
    ("elapsed", [np.nan, -np.inf, "1", 1e300]), ("lap", [np.nan, {}]),
    ("config", [None, [], "x", {"train.rays": {}}, {"train.rays": [[1]]}, {"a": None}]),
])
def test_states_with_impossible_progress(tmp_path, name, values):
    for value in values:
        with pytest.raises(helper.UserError, match="state.h5: its [a-z]+ cannot be .*; the file is damaged"):
            resumed(tmp_path, {name: value})


@pytest.mark.parametrize("name, array", [
    ("solver/implicit/0/v/t", np.array(np.nan)), ("solver/implicit/0/v/t", np.array(-1)),
    ("solver/implicit/0/v/t", np.array(2 ** 31)), ("solver/implicit/0/v/t", np.array(1.5)),
    ("solver/implicit/0/v/t", np.zeros(1, int)), ("solver/implicit/0/v/var", np.full((39, 64), 1e300)),
    ("solver/implicit/0/v/mean", np.full((39, 64), np.inf, np.float32)),
    ("series/loss", np.zeros((2, 2))), ("series/loss", np.array([np.nan])), ("series/other", np.array(1.0)),
    ("parameters/implicit/0/v", np.zeros((39, 63))), ("parameters/cameras/pose", np.zeros((2, 7))),
    ("parameters/cameras/pose", np.full((2, 7), 1e300)), ("parameters/cameras/pose", np.full((2, 7), 1e-300)),
])
def test_states_with_impossible_numbers(tmp_path, name, array):
    warnings.simplefilter("error")
    with pytest.raises(helper.UserError, match="state.h5: "):
        resumed(tmp_path, arrays={name: array})


@pytest.mark.parametrize("about", ["[" * 50000, "9" * 50000, "NaN", "{}", "null", '{"format": []}'],
                         ids=lambda about: about[:9])
def test_states_whose_progress_is_none(tmp_path, about):
    with h5py.File(str(tmp_path / "state.h5"), "w") as file:
        file["x"], file.attrs["about"] = np.zeros(3), about
    with pytest.raises(helper.UserError, match="no training state of this program"):
        checkpoints.load_state(tmp_path, {})


def test_a_model_with_values_that_are_not_finite(tmp_path):
    path = tmp_path / "model_00000.h5"
    with h5py.File(str(path), "w") as file:
        file["implicit/0/v"] = np.full((39, 64), np.nan, np.float32)
    with pytest.raises(helper.UserError, match="implicit/0/v has values that are not finite"):
        checkpoints.load_model(path, {"implicit/0/v": (39, 64)})


# --- hostile files ----------------------------------------------------------------------------------------------

def test_yaml_that_spells_out_a_text_without_end(home, capfd, monkeypatch):
    text = "&a [x, x, x, x, x, x, x, x, x]"
    for level in range(9):
        text = f"&{chr(98 + level)} [{text}, {', '.join(8 * ['*' + chr(97 + level)])}]"
    path = home / "tiny.yaml"
    whole = path.read_text()
    try:
        path.write_text(whole.replace(f"path: {home / 'tiny'}", f"path: {text}"))
        said = outcome(home, capfd, monkeypatch)
        assert "line 4: not valid YAML (a configuration has no aliases" in said and len(said) < 1000
        path.write_text(whole.replace(f"path: {home / 'tiny'}", 'path: "a\\nb\\u001b"'))
        assert "data.path must be a folder" in outcome(home, capfd, monkeypatch)
    finally:
        path.write_text(whole)


def test_a_picture_that_is_a_program(home, capfd, monkeypatch):
    """Pillow runs Ghostscript to draw an EPS, whatever the file's suffix; we must not."""
    path = home / "tiny" / "image" / "000.png"
    whole, ran = path.read_bytes(), []
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_, **__: ran.append("Ghostscript"))
    try:
        Image.new("RGB", (16, 16)).save(path, format="EPS")
        assert "000.png: cannot be read as an image" in outcome(home, capfd, monkeypatch) and ran == []
    finally:
        path.write_bytes(whole)


def test_a_picture_that_is_too_large(home, capfd, monkeypatch):
    path = home / "tiny" / "image" / "000.png"
    whole = path.read_bytes()
    try:
        for width in (9000, 50000):     # the second one exceeds Pillow's own bound
            header = bytearray(whole)
            header[16:24] = np.array([width, 9000], ">u4").tobytes()
            header[29:33] = np.array([zlib.crc32(header[12:29])], ">u4").tobytes()
            path.write_bytes(bytes(header))
            assert "000.png: has more than 80 million pixels; shrink it" in outcome(home, capfd, monkeypatch)
    finally:
        path.write_bytes(whole)


def test_cameras_that_unpack_to_a_large_array_or_to_none(home, capfd, monkeypatch):
    path = home / "tiny" / "cameras.npz"
    whole, unpacked = path.read_bytes(), []
    try:
        np.savez_compressed(path, world_mat_0=np.zeros((2000, 2000)))
        assert path.stat().st_size < 10 ** 5
        with monkeypatch.context() as patch:
            patch.setattr(np.lib.format, "read_array", lambda *_, **__: unpacked.append("matrix"))
            assert "world_mat_0 is float64 of shape (2000, 2000)" in outcome(home, capfd, patch) and unpacked == []
        with zipfile.ZipFile(str(path), "w") as file:
            for name in ("world_mat_0", "scale_mat_0", "world_mat_1", "scale_mat_1"):
                file.writestr(name + ".npy", b"no array")
        assert "world_mat_0 is " in outcome(home, capfd, monkeypatch)
        np.savez(path, **{f"{kind}_mat_{view}": 1e300 * np.eye(4) for kind in ("world", "scale") for view in (0, 1)})
        assert "cannot be used" in outcome(home, capfd, monkeypatch)
    finally:
        path.write_bytes(whole)


def test_a_name_with_the_end_of_a_line(home, capfd, monkeypatch):
    path = home / "tiny" / "image" / "000.png"
    strange = path.with_name("00\n0\x1b[2J.png")
    path.rename(strange)
    whole = strange.read_bytes()
    try:
        strange.write_bytes(whole[:50])
        assert "00 0 [2J.png: cannot be read" in outcome(home, capfd, monkeypatch)
    finally:
        strange.write_bytes(whole)
        strange.rename(path)
