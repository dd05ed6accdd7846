"""Test what the scripts share: configuration checks, cameras and rays, atomic writing, and the choice of the GPU."""
import copy
import ctypes
import dataclasses
import os
import shutil
import stat
import subprocess
import sys
import time
from types import SimpleNamespace
from typing import List

import numpy as np
import pytest
import yaml

import helper
from backends import context
from config import old_form, settings
from conftest import ROOT
from files import writing
from training import schedule

DEFAULT = ROOT / "config" / "default.yaml"
SECTIONS = {section.name: {item.name: item for item in dataclasses.fields(section.type)}
            for section in dataclasses.fields(settings.Configuration)}
KEYS = [(section, key) for section, keys in SECTIONS.items() for key in keys]


# --- configuration ----------------------------------------------------------------------------------------

@pytest.fixture
def tree():
    """Return the default configuration as plain dicts, for tests to change."""
    return copy.deepcopy(yaml.load(DEFAULT.read_text(encoding="utf-8"), Loader=settings.ConfigLoader))


@pytest.mark.parametrize("path", sorted(DEFAULT.parent.glob("*.yaml")), ids=lambda path: path.stem)
def test_each_configuration_here_is_a_right_one(path):
    conf = settings.load_config(path)
    assert max(conf.train.learning_rate_halved_at + conf.train.alpha_doubled_at) < 1 < conf.train.models


def test_the_default_configuration_is_written_from_the_keys():
    assert DEFAULT.read_text(encoding="utf-8") == settings.as_yaml()


def test_a_key_of_another_name_is_still_read(tmp_path, tree, capsys):
    tree["train"]["outline_rays"] = tree["train"].pop("outline_fraction") + 0.25
    (tmp_path / "old.yaml").write_text(yaml.safe_dump(tree))
    assert settings.load_config(tmp_path / "old.yaml").train.outline_fraction == 0.25
    assert "train.outline_rays is called train.outline_fraction now" in capsys.readouterr().out
    tree["train"]["outline_fraction"] = 0.5
    assert "unknown key train.outline_rays" in refusal(tmp_path, tree)


def test_a_configuration_that_counts_in_epochs_is_told_its_numbers_in_steps(tmp_path, tree):
    for name in old_form.NEW_KEYS.values():
        del tree["train"][name]
    old = dict(epochs=440, learning_rate_halved_after=[157, 251, 440], alpha_doubled_after=[57, 220], save_every=40,
               validate_every=50)
    tree["train"].update(old)
    tree["data"].update(path=str(tmp_path / "scene"), held_out_views=[1, 7])
    says = "learning_rate_halved_at: {}, alpha_doubled_at: {}, models: 11, validations: 9"
    assert "write steps: (440 times the number of training views), " + says.format(
        "[0.357, 0.57]", "[0.13, 0.5]") in refusal(tmp_path, tree)
    (tmp_path / "scene" / "image").mkdir(parents=True)
    for view in range(51):
        (tmp_path / "scene" / "image" / f"{view:03d}.png").touch()
    said = refusal(tmp_path, tree)
    assert "write steps: 21560, " + says.format("[0.35682, 0.57045]", "[0.12955, 0.5]") in said
    for old in old_form.NEW_KEYS:       # and these numbers are accepted
        del tree["train"][old]
    tree["train"].update(yaml.safe_load("{" + said.split(" write ")[1] + "}"))
    (tmp_path / "new.yaml").write_text(yaml.safe_dump(tree))
    conf = settings.load_config(tmp_path / "new.yaml").train
    halved = [step for step in range(conf.steps) if schedule.learning_rate_factor(conf, step) in (1, 0.5)]
    assert halved[-1] == 251 * 49 - 1 and schedule.alpha(conf, 57 * 49) == 2 * schedule.alpha(conf, 57 * 49 - 1)
    for spoilt in ("many", None, [3], -1, 1e3, True):
        tree["train"]["epochs"] = spoilt
        assert "in place of epochs write steps, as in config/default.yaml" in refusal(tmp_path, tree)


def test_a_configuration_is_written_and_read_again(tmp_path, tree):
    tree["data"].update(path="my: 'scene' # 1", cameras="[\u00e4]", held_out_views=[3, 5])
    tree["train"].update(learning_rate=1.23456789e-5, learning_rate_halved_at=[1 / 3, 1e-7, 1][1::-1], alpha=1e5 + 0.1)
    (tmp_path / "first.yaml").write_text(yaml.safe_dump(tree))
    conf = settings.load_config(tmp_path / "first.yaml")
    (tmp_path / "second.yaml").write_text(settings.as_yaml(conf), encoding="utf-8")
    assert settings.load_config(tmp_path / "second.yaml") == conf


def test_learning_rate_and_alpha_over_a_run():
    train = settings.Train(steps=1000)
    factors = [schedule.learning_rate_factor(train, step) for step in (0, 499, 500, 749, 750, 999)]
    assert factors == [1, 1, 0.5, 0.5, 0.25, 0.25]
    assert [schedule.alpha(train, step) for step in (0, 124, 125, 624, 625)] == [50, 50, 100, 800, 1600]
    for kind, middle in (("cosine", 0.505), ("exponential", 0.1)):
        smooth = dataclasses.replace(train, learning_rate_halved_at=[], learning_rate_annealing=kind,
                                     learning_rate_end=0.01)
        factors = [schedule.learning_rate_factor(smooth, step) for step in range(1001)]
        assert factors[0] == 1 and factors[500] == pytest.approx(middle) and factors[1000] == pytest.approx(0.01)
        assert all(a > b for a, b in zip(factors, factors[1:]))


@pytest.mark.parametrize("steps, length, times", [(20, 4, 3), (22, 4, 50), (3, 7, 2), (1000, 3, 1), (98000, 49, 20)])
def test_what_is_due_evenly_over_a_run(steps, length, times):
    epochs = schedule.Epochs(steps, length)
    ends = [epochs.end(epoch) for epoch in range(epochs.last + 1)]
    assert ends[-1] == steps and epochs.end(-1) == 0
    due = [end for epoch, end in enumerate(ends) if epochs.is_due(epoch, times)]
    assert due[-1] == steps and len(due) == min(times, len(ends))
    for number in range(1, times + 1):      # the first end at or after each point
        assert min(end for end in ends if end * times >= number * steps) in due


def refusal_of_text(tmp_path, text):
    """Load `text` as a configuration, which must be refused. Return the one-line message without the file's name."""
    path = tmp_path / "spoilt.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8"))
    with pytest.raises(helper.UserError) as raised:
        settings.load_config(path)
    message = str(raised.value)
    assert message.startswith(str(path)) and "\n" not in message
    return message[len(str(path)):]


def refusal(tmp_path, tree):
    return refusal_of_text(tmp_path, yaml.safe_dump(tree))


@pytest.mark.parametrize("path", sorted((ROOT / "config").glob("*.yaml")), ids=lambda path: path.name)
def test_our_configurations_are_accepted(path):
    conf = settings.load_config(path)
    assert type(conf.train.rays) is int and type(conf.train.alpha) is float


def test_values_arrive_as_written(tmp_path, tree):
    tree["train"].update(alpha=7, learning_rate_halved_at=[], seed=12)
    tree["data"]["path"] = "a scene"
    path = tmp_path / "fine.yaml"
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    conf = settings.load_config(path)
    assert conf.train.alpha == 7.0 and type(conf.train.alpha) is float
    assert conf.train.learning_rate_halved_at == [] and conf.train.seed == 12
    assert conf.data.path == "a scene"


@pytest.mark.parametrize("written, value",
                         [("1e-4", 1e-4), ("5E-3", 5e-3), ("2.5e+1", 25.0), (".5", 0.5), ("3", 3.0)])
def test_every_way_to_write_a_number(tmp_path, tree, written, value):
    tree["train"]["learning_rate"] = "NUMBER"
    path = tmp_path / "fine.yaml"
    path.write_text(yaml.safe_dump(tree).replace("NUMBER", written), encoding="utf-8")
    assert settings.load_config(path).train.learning_rate == value


@pytest.mark.parametrize("section", SECTIONS)
def test_refuses_unknown_keys(tmp_path, tree, section):
    tree[section]["lerning_rate"] = 1
    assert f"unknown key {section}.lerning_rate" in refusal(tmp_path, tree)


def test_refuses_an_unknown_section(tmp_path, tree):
    tree["trian"] = {}
    assert "unknown key trian" in refusal(tmp_path, tree)


@pytest.mark.parametrize("section, key", KEYS)
def test_refuses_missing_keys_that_are_not_optional(tmp_path, tree, section, key):
    del tree[section][key]
    default = settings.optional_defaults().get(f"{section}.{key}")
    if default is not None:
        (tmp_path / "some.yaml").write_text(yaml.safe_dump(tree))
        conf = settings.load_config(tmp_path / "some.yaml")
        assert getattr(getattr(conf, section), key) == default
    else:
        assert f"{section}.{key} is missing" in refusal(tmp_path, tree)


@pytest.mark.parametrize("section", SECTIONS)
def test_refuses_missing_or_misshapen_sections(tmp_path, tree, section):
    for value in (None, 3, [1], "text"):
        assert f"{section} must be a mapping" in refusal(tmp_path, {**tree, section: value})
    del tree[section]
    assert f"the key {section} is missing" in refusal(tmp_path, tree)


@pytest.mark.parametrize("section, key", KEYS)
def test_refuses_wrong_types(tmp_path, tree, section, key):
    kind = SECTIONS[section][key].type
    wrong = [None, True, {"a": 1}]
    if kind is str:
        wrong += [5, ["text"]]
    elif kind in (List[int], List[float], List[str]):
        wrong += [3, ["1"], [float("nan") if kind == List[float] else 1.5], [True], "1, 2"]
    else:
        wrong += ["text", "3", [3]] + ([2.5, 1e3] if kind is int else [float("nan"), float("inf")])
    for value in wrong:
        tree[section][key] = value
        assert f"{section}.{key} must be" in refusal(tmp_path, tree)


@pytest.mark.parametrize("name, values", [
    ("data.path", ["", "  "]),
    ("data.downscale", [0, -1]),
    ("data.held_out_views", [[-1], [3, -2]]),
    ("network.width", [0, 63]),
    ("network.feature", [0]),
    ("network.layers", [0, 1]),
    ("network.radius", [0, 1.0, -0.5]),
    ("network.position_bands", [0, 11]),
    ("network.view_bands", [0, 11]),
    ("tracer.sphere_tracing_steps", [-1]),
    ("tracer.tolerance", [0, -1e-5]),
    ("tracer.samples", [1]),
    ("tracer.refinement", ["Secant", "newton"]),
    ("tracer.refinement_steps", [-1]),
    ("train.steps", [0]),
    ("train.rays", [1]),
    ("train.learning_rate", [0, -1e-4]),
    ("train.learning_rate_halved_at", [[0.5, 0.25], [-1, 0.5], [0.5, 1.5]]),
    ("train.learning_rate_annealing", ["linear"]),
    ("train.learning_rate_end", [0, 2]),
    ("train.alpha", [0]),
    ("train.alpha_doubled_at", [[0.5, 0.25]]),
    ("train.mask_weight", [-1]),
    ("train.eikonal_weight", [-0.1]),
    ("train.seed", [-1]),
    ("train.models", [0]),
    ("train.validations", [0]),
    ("train.validation_view", [-1]),
    ("train.validation_downscale", [0]),
    ("extract.coarse_resolution", [8]),
    ("extract.resolution", [8]),
])
def test_refuses_values_out_of_range(tmp_path, tree, name, values):
    section, key = name.split(".")
    for value in values:
        tree[section][key] = value
        message = refusal(tmp_path, tree)
        assert f"{name} must be" in message and str(value) in message


def test_refuses_broken_yaml(tmp_path):
    assert "line 2" in refusal_of_text(tmp_path, "data:\n  path: [1, 2}\n")
    assert "line 3" in refusal_of_text(tmp_path, "data:\n  path: a\n path: b\n")
    for text in ("", "- 1\n- 2\n", "just text", "3"):
        assert "must be a mapping" in refusal_of_text(tmp_path, text)
    for text in ("a: b: c", "&a [*b]", "? [1]\n: 2", "!!python/object/apply:os.abort []", "[" * 5000, "a\0b"):
        assert "not valid YAML" in refusal_of_text(tmp_path, text)
    assert "not a text file" in refusal_of_text(tmp_path, b"\xff\xfe\xfa")


@pytest.mark.parametrize("text, says", [
    ("data: !!bool x", "cannot be parsed"), ("data: !!timestamp x", "cannot be parsed"),
    ("data: !!int ''", "cannot be parsed"), ("data: 2001-13-45", "cannot be parsed"),
    ("a: &a [x]\nb: *a", "no aliases"), ("&a {b: *a}", "no aliases"),
    ("a: {b: 1, b: 2}", "the key 'b' is given twice"), ("{1: a, 1: b}", "the key 1 is given twice"),
    ("? [1]\n: 2\n? [1]\n: 2", "unhashable"), ("<<: {a: 1}", "merge"), ("!!" + 9999 * "x" + " y", "!" + 99 * "x"),
], ids=lambda text: text[:20])
def test_yaml_that_is_none_of_a_configuration(tmp_path, text, says):
    said = refusal_of_text(tmp_path, text)
    assert "line " in said or says == "cannot be parsed"
    assert "not valid YAML (" in said and says.replace("!x", "tag:yaml.org,2002:x") in said and len(said) < 300


@pytest.mark.parametrize("key", [9999 * "k", "0x" + 9999 * "f", "[1, 2]", "{a: b}", "~", '"a\\nb"'],
                         ids=lambda key: key[:9])
def test_keys_that_are_none(tmp_path, key):
    assert len(refusal_of_text(tmp_path, f"? {key}\n: 1\n")) < 300


def test_a_configuration_of_any_length_is_refused_at_once(tmp_path):
    start = time.monotonic()
    for text in ("".join(f"key{number}: 1\n" for number in range(50000)), "# \n" * 2 ** 24):
        assert "more than 65536 bytes" in refusal_of_text(tmp_path, text)
    assert "unknown key key0" in refusal_of_text(tmp_path, "".join(f"key{number}: 1\n" for number in range(4000)))
    assert time.monotonic() - start < 5


@pytest.mark.parametrize("number", ["10_000_000_000", "0x" + 9999 * "f", 5000 * "9", "1" + 5000 * ":1", "-5", "1e300",
                                    ".inf"], ids=lambda number: number[:9])
def test_numbers_beyond_any_use(tmp_path, tree, number):
    """Check that every number of a configuration is bounded."""
    for section, key in KEYS:
        kind = SECTIONS[section][key].type
        if kind in (int, float, List[int], List[float]):
            spoilt = copy.deepcopy(tree)
            spoilt[section][key] = ["NUMBER"] if kind in (List[int], List[float]) else "NUMBER"
            said = refusal_of_text(tmp_path, yaml.safe_dump(spoilt).replace("NUMBER", number))
            assert f"{section}.{key} must be" in said or "not valid YAML" in said and len(number) > 4300
            assert len(said) < 300


@pytest.mark.parametrize("section, key", [(section, key) for section, key in KEYS
                                          if SECTIONS[section][key].type in (int, float)])
def test_bounds_are_told_and_allowed(tmp_path, tree, section, key):
    kind, (allowed, says) = SECTIONS[section][key].type, SECTIONS[section][key].metadata["allowed"]
    bounds = [float(word) for word in says.split() if word[0].isdigit()]
    most = bounds[-1] if key not in ("radius", "outline_fraction", "adam_beta2") else 0.99
    assert allowed(kind(most)) and not allowed(kind(most * 1.02 + 1))
    tree[section][key] = int(most * 2 + 1)
    assert f"{section}.{key} must be {says}, not {tree[section][key]}" in refusal(tmp_path, tree)


@pytest.mark.parametrize("name", ["alpha_doubled_at", "learning_rate_halved_at"])
def test_schedules_without_end(tmp_path, tree, name):
    for fractions in (65 * [1], [1.01]):
        tree["train"][name] = fractions
        assert f"train.{name} must be at most 64 fractions of the run in ascending order" in refusal(tmp_path, tree)


@pytest.mark.parametrize("changes, says", [
    ({"network": {"width": 4096}},
     "network.width * network.width * network.layers must be at most 64,000,000, not 150,994,944"),
    ({"train": {"rays": 65536}, "tracer": {"samples": 1000}},
     "train.rays * tracer.samples must be at most 16,000,000, not 65,536,000"),
    ({"train": {"rays": 65536}, "network": {"width": 1024}},
     "train.rays * network.width * network.layers must be at most 500,000,000"),
])
def test_numbers_that_are_together_beyond_any_use(tmp_path, tree, changes, says):
    for section, keys in changes.items():
        tree[section].update(keys)
    assert says in refusal(tmp_path, tree)


def test_large_numbers_that_a_machine_of_today_can_do(tmp_path, tree):
    tree["network"].update(width=2048, feature=1024)
    tree["train"].update(steps=10 ** 8, rays=16384, seed=2 ** 32 - 1, models=100000)
    tree["tracer"].update(samples=512)
    tree["extract"].update(resolution=1024)
    (tmp_path / "large.yaml").write_text(yaml.safe_dump(tree))
    assert settings.load_config(tmp_path / "large.yaml").network.width == 2048


def test_names_that_no_system_has(tmp_path, tree):
    for name in (300 * "x", "a/" + 201 * "x", 400 * "xx/", 101 * "\xe9"):
        tree["data"]["path"] = name
        assert "data.path must be a folder, not " in refusal(tmp_path, tree)
    tree["data"]["path"] = "/srv/" + 200 * "x"
    (tmp_path / "long.yaml").write_text(yaml.safe_dump(tree))
    assert settings.load_config(tmp_path / "long.yaml").data.path == tree["data"]["path"]


def test_files_that_are_none(tmp_path):
    os.mkfifo(str(tmp_path / "pipe"))
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to("file")
    (tmp_path / "loop").symlink_to("loop")
    helper.check_is_file(tmp_path / "file")
    helper.check_is_file(str(tmp_path / "link"))
    for name, says in (("pipe", "not a regular file"), (".", "not a regular file"), ("none", "no such file; make it"),
                       ("file/none", "no such file"), ("loop", "cannot be read (Too many"),
                       (300 * "x", "cannot be read (File name"), ("a\0b", "cannot be read")):
        with pytest.raises(helper.UserError) as raised:
            helper.check_is_file(tmp_path / name, "make it")
        assert str(raised.value).startswith(f"{tmp_path / name}: {says}")
    with pytest.raises(helper.UserError, match="not a regular file"):
        helper.check_is_file("/dev/zero")
    with pytest.raises(helper.UserError, match="pipe: not a regular file"):
        settings.load_config(tmp_path / "pipe")


def test_refuses_a_configuration_that_is_not_there(tmp_path):
    for path in (tmp_path / "none.yaml", tmp_path):
        with pytest.raises(helper.UserError) as raised:
            settings.load_config(path)
        assert str(path) in str(raised.value)


# --- cameras and rays -------------------------------------------------------------------------------------

def random_camera(rng):
    """Return intrinsics (3, 3), a rotation (3, 3), world to camera, and a centre (3,)."""
    rotation = np.linalg.qr(rng.normal(size=(3, 3)))[0]
    rotation *= np.sign(np.linalg.det(rotation))
    u, v = rng.uniform(-500, 1500, 2)
    intrinsics = np.array([[rng.uniform(5, 3000), rng.normal(), u], [0, rng.uniform(5, 3000), v], [0, 0, 1]])
    return intrinsics, rotation, rng.uniform(-5, 5, 3)


def test_decompose_projection_inverts_composition():
    rng = np.random.default_rng(0)
    for _ in range(100):
        intrinsics, rotation, centre = random_camera(rng)
        projection = rng.uniform(0.01, 300) * intrinsics @ np.column_stack([rotation, -rotation @ centre])
        for matrix in (projection, np.vstack([projection, [0, 0, 0, 1]])):
            found, pose = helper.decompose_projection(matrix)
            assert found.dtype == pose.dtype == np.float64
            np.testing.assert_allclose(found, intrinsics, rtol=1e-6, atol=1e-6)
            np.testing.assert_allclose(pose[:3, :3], rotation.T, atol=1e-7)
            np.testing.assert_allclose(pose[:3, 3], centre, atol=1e-6)
            np.testing.assert_array_equal(pose[3], [0, 0, 0, 1])


def test_decompose_projection_refuses_what_is_no_camera():
    fine = np.column_stack([np.eye(3), [0.0, 0.0, 3.0]])
    helper.decompose_projection(fine)
    flat = fine.copy()
    flat[1] = flat[0]
    for matrix, reason in ((flat, "singular"), (np.zeros((3, 4)), "singular"), (fine * np.nan, "not finite"),
                           (fine + [0, 0, 0, np.inf], "not finite"),
                           (fine + [0, 0, 0, 1e200], "too large or too small")):
        with pytest.raises(ValueError, match=reason):
            helper.decompose_projection(matrix)


def test_pixel_rays_pass_through_what_the_pixels_show():
    rng = np.random.default_rng(1)
    for _ in range(20):
        intrinsics, rotation, centre = random_camera(rng)
        in_camera = rng.uniform([-1, -1, 1], [1, 1, 4], (30, 3))
        points = in_camera @ rotation + centre
        uv = in_camera @ intrinsics.T
        pose = np.eye(4)
        pose[:3, :3], pose[:3, 3] = rotation.T, centre
        origin, directions = helper.pixel_rays(uv[:, :2] / uv[:, 2:], intrinsics, pose)
        assert origin.dtype == directions.dtype == np.float32 and origin.shape == (3,)
        np.testing.assert_allclose(np.linalg.norm(directions, axis=1), 1, atol=1e-6)
        distances = np.linalg.norm(points - centre, axis=1, keepdims=True)
        np.testing.assert_allclose(origin + distances * directions, points, atol=1e-5)


def test_pixel_grid_is_row_by_row():
    grid = helper.pixel_grid(2, 3)
    assert grid.tolist() == [[0, 0], [1, 0], [2, 0], [0, 1], [1, 1], [2, 1]] and grid.dtype == np.float32


# --- files and errors -------------------------------------------------------------------------------------

def test_replacing_writes_beside_and_renames(tmp_path):
    path = tmp_path / "new" / "result.txt"
    with writing.replacing(path) as temporary:
        temporary.write_text("whole")
        assert temporary.parent == path.parent and temporary.suffix == ".txt" and not path.exists()
    assert path.read_text() == "whole"
    assert os.listdir(str(path.parent)) == ["result.txt"]
    umask = os.umask(0o022)
    try:
        with writing.replacing(path) as temporary:
            temporary.write_text("again")
    finally:
        os.umask(umask)
    assert path.read_text() == "again" and stat.S_IMODE(path.stat().st_mode) == 0o644


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_replacing_keeps_the_old_file_when_it_fails(tmp_path, error):
    path = tmp_path / "result.txt"
    path.write_text("old")
    with pytest.raises(error):
        with writing.replacing(path) as temporary:
            temporary.write_text("half")
            raise error()
    assert path.read_text() == "old" and os.listdir(str(tmp_path)) == ["result.txt"]


def test_replacing_refuses_where_nothing_can_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.txt").mkdir()
    for path in (tmp_path / "file" / "result.txt", tmp_path / "folder.txt"):
        with pytest.raises(helper.UserError) as raised:
            with writing.replacing(path) as temporary:
                temporary.write_text("")
        assert str(path) in str(raised.value) and "\n" not in str(raised.value)
    assert sorted(os.listdir(str(tmp_path))) == ["file", "folder.txt"]


@pytest.mark.parametrize("error, status, said", [
    ("helper.UserError('a.yaml: mend it')", 2, "error: a.yaml: mend it\n"),
    ("KeyboardInterrupt()", 130, "interrupted\n"),
])
def test_run_ends_with_one_line(error, status, said):
    script = f"import helper\ndef main():\n    raise {error}\nhelper.run(main)"
    ended = subprocess.run([sys.executable, "-c", script], cwd=str(ROOT), stderr=subprocess.PIPE)
    assert ended.returncode == status and ended.stderr.decode() == said


# --- the GPU ----------------------------------------------------------------------------------------------

needs_gcc = pytest.mark.skipif(not shutil.which("gcc"), reason="no gcc to make libraries with")


def make_library(path, source, *needed):
    """Compile C source into a shared library that links to the libraries `needed`, without their paths."""
    path.parent.mkdir(parents=True, exist_ok=True)
    subprocess.run(["gcc", "-shared", "-fPIC", f"-Wl,-soname,{path.name},--no-as-needed", "-x", "c", "-",
                    "-x", "none", *map(str, needed), "-o", str(path)], input=source.encode(), check=True)


def python(script, *arguments, **environment):
    """Run `script` in a new Python process. Return its exit status, standard output and standard error."""
    done = subprocess.run([sys.executable, "-c", script, *map(str, arguments)], cwd=str(ROOT), capture_output=True,
                          env={**os.environ, **environment}, text=True)
    return done.returncode, done.stdout, done.stderr


@needs_gcc
def test_cuda_is_found_in_the_packages(tmp_path):
    """As in NVIDIA's packages, each library has its own folder, and does not know the paths of those it needs."""
    needs = {"libcublas.so.12": ["libcublasLt.so.12"], "libcusparse.so.12": ["libnvJitLink.so.12"],
             "libcusolver.so.11": ["libcublas.so.12", "libcublasLt.so.12", "libcusparse.so.12", "libnvJitLink.so.12"]}
    packages, code, driver = tmp_path / "packages", tmp_path / "code" / "nnabla_ext" / "cudnn", tmp_path / "driver"
    path = {name: packages / "nvidia" / str(i) / "lib" / name for i, name in enumerate(context.CUDA_LIBRARIES)}
    for name in context.CUDA_LIBRARIES:      # fails if a library comes before one that it needs
        make_library(path[name], "int x;", *[path[other] for other in needs.get(name, [])])
    make_library(code / "libnnabla_cuda.so", "int x;", *path.values())
    (code / "__init__.py").write_text(f"import ctypes\nctypes.CDLL({str(code / 'libnnabla_cuda.so')!r})\n"
                                      "get_device_count = lambda: 1\ncontext = str\n")
    make_library(driver / "libcuda.so.1", "int cuInit(unsigned flags) { return 0; }")

    script = "import sys; from backends import context; sys.path[:0] = sys.argv[1:]; print(context.gpu_or_reason('0'))"
    driver = {"LD_LIBRARY_PATH": str(driver)}
    assert python(script, code.parents[1], packages, **driver)[:2] == (0, "('cudnn', '')\n")
    load = "import ctypes; from backends import context; context.load_cuda_libraries(); ctypes.CDLL('libcudart.so.12')"
    if python(load)[0] != 0:
        status, said, _ = python(script, code.parents[1], **driver)     # no CUDA installed, except for this test's
        assert status == 0 and "does not load: libcudart.so.12: cannot open" in said


def test_cuda_libraries_that_are_not_in_packages_are_left_alone(tmp_path, monkeypatch):
    """Check that the first library on the path is tried, and that one that fails does not stop the others."""
    first, second = tmp_path / "first", tmp_path / "second"
    there = [first / "nvidia/cudnn/lib/libcudnn.so.8", second / "nvidia/cudnn/lib/libcudnn.so.8",
             first / "nvidia/cuda_runtime/lib/libcudart.so.12", second / "nvidia/cufft/lib/libcufft.so.11",
             first / "nvidia/cudnn/lib/libcudnn.so.9", first / "nvidia/cublas/lib/libnvblas.so.12"]
    for path in there:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    tried = []

    def load(name, mode):
        assert mode == ctypes.RTLD_GLOBAL
        tried.append(name)
        raise OSError(f"{name}: file too short")

    monkeypatch.setattr(ctypes, "CDLL", load)
    monkeypatch.setattr(sys, "path", [str(tmp_path / "none"), str(first), str(second)])
    context.load_cuda_libraries()
    assert tried == [str(there[2]), str(there[3]), str(there[0])]
    tried.clear()
    sys.path[:] = [str(tmp_path / "none"), str(tmp_path)]
    context.load_cuda_libraries()
    assert tried == []


def test_a_machine_without_the_driver(monkeypatch):
    def load(name):
        raise OSError(f"{name}: cannot open shared object file: No such file or directory")

    monkeypatch.setattr(ctypes, "CDLL", load)
    chosen, why = context.gpu_or_reason("0")
    assert chosen == "cpu" and "no NVIDIA driver, libcuda.so.1 (install it" in why and "\n" not in why


NO_DEVICE = """
int cuInit(unsigned flags) { return 100; }
int cuGetErrorString(int status, const char **said)
{ *said = status == 100 ? "no CUDA-capable device is detected" : 0; return 0; }
"""


@needs_gcc
def test_a_driver_without_a_device(tmp_path):
    make_library(tmp_path / "libcuda.so.1", NO_DEVICE)
    script = ("import sys, helper; from backends import context; "
              "helper.run(lambda: context.set_context(sys.argv[1], '0'))")
    pytest.importorskip("nnabla")
    status, output, errors = python(script, "cudnn", LD_LIBRARY_PATH=str(tmp_path))
    said = [line for line in (output + errors).splitlines() if "[nnabla][INFO]" not in line]
    assert status == 2 and len(said) == 1
    assert said[0].startswith("error: --context cudnn: the NVIDIA driver offers no GPU: no CUDA-capable device is")
    status, output, _ = python(script, "auto", LD_LIBRARY_PATH=str(tmp_path))
    assert status == 0 and output.startswith("computing on the CPU: the NVIDIA driver offers no GPU: no CUDA-capable")
    assert output.count("\n") == 1


@pytest.fixture
def extension(tmp_path, monkeypatch):
    """Return a function that replaces the code of nnabla_ext.cudnn; the driver is replaced by one with a GPU."""
    def names():
        return [name for name in sys.modules if name.split(".")[0] == "nnabla_ext"]

    def write(text):
        folder = tmp_path / "nnabla_ext" / "cudnn"
        folder.mkdir(parents=True)
        (tmp_path / "nnabla_ext" / "__init__.py").write_text("")
        (folder / "__init__.py").write_text(text)

    kept = {name: sys.modules.pop(name) for name in names()}
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(ctypes, "CDLL", lambda *_: SimpleNamespace(cuInit=lambda flags: 0))
    yield write
    for name in names():
        del sys.modules[name]
    sys.modules.update(kept)


TWO_DEVICES = "get_device_count = lambda: 2\n"


@pytest.mark.parametrize("text, device, said", [
    ("import not_there", "0", "extension is not installed (requirements-gpu.txt"),
    ("raise ImportError('libcudnn.so.8: cannot open shared object file')", "0", "does not load: libcudnn.so.8: cannot"),
    ("raise ValueError('does not support your old GPU.\\nSet ...')", "0", "does not load: does not support your old"),
    ("def get_device_count():\n    raise RuntimeError('error in x\\nfailed with \"driver too old\".\\n')", "0",
     "no usable CUDA device: failed with \"driver too old\""),
    (TWO_DEVICES, "2", "there is no CUDA device 2 (found 2)"),
    (TWO_DEVICES, "one", "there is no CUDA device one (found 2)"),
    (TWO_DEVICES + "def context(device_id):\n    raise OSError('NVML Shared Library Not Found')", "1",
     "no usable CUDA device: NVML Shared Library Not Found"),
])
def test_why_the_gpu_is_not_used(extension, text, device, said):
    extension(text)
    chosen, why = context.gpu_or_reason(device)
    assert chosen == "cpu" and said in why and "\n" not in why


def test_the_gpu_is_used_where_it_is_there(extension):
    extension(TWO_DEVICES + "def context(device_id):\n    assert device_id == '1'")
    assert context.gpu_or_reason(1) == ("cudnn", "")


def test_work_side_by_side_keeps_its_order_and_ends_with_the_first_error():
    assert list(helper.side_by_side(lambda x: x * x, range(20), 3)) == [x * x for x in range(20)]
    done = []

    def fails_at_two(x):
        done.append(x)
        if x == 2:
            raise helper.UserError("two")
        if x > 2:
            time.sleep(0.02)    # so that the error is seen long before the last item
        return x

    with pytest.raises(helper.UserError, match="two"):
        list(helper.side_by_side(fails_at_two, range(1000), 1))
    assert len(done) < 1000
