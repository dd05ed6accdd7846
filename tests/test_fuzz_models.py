"""Property tests of the readers of configurations, cameras, models, states and PyTorch checkpoints.

For any bytes, a reader must return or raise a one-line UserError, in bounded time and memory.
"""
import functools
import io
import json
import random
import struct
import subprocess
import sys
import warnings
import zipfile
from pathlib import Path

import h5py
import hypothesis.strategies as st
import nnabla as nn
import nnabla.solvers as S
import numpy as np
import pytest
import yaml
from hypothesis import given

import convert
import datasets
import helper
import train
from backends import architecture
from config import settings
from conftest import ROOT
from fuzzing import TELLING_BYTES, damaged, keeps_its_promise
from training import checkpoints, log, schedule

SIZES = (64, 2, 3)      # width, feature and layers of the damaged models
SHAPES = architecture.parameter_shapes(settings.Network(*SIZES))
NUMBERS = st.one_of(st.integers(-2, 300), st.integers(), st.floats(), st.sampled_from(
    [0, 1, 10 ** 9, 2 ** 31, 2 ** 32, 2 ** 63, 2 ** 64, 10 ** 400, 1e308, float("nan"), float("inf"), True, None]))
CHILD = """
import sys
sys.path[:0] = sys.argv[1:]
import test_fuzz_models
test_fuzz_models.serve()
"""


def one_of(*choices):
    return st.sampled_from(choices)


def random_bytes(seed, size):
    return random.Random(seed).getrandbits(8 * size).to_bytes(size, "little")


def small_model():
    rng = np.random.default_rng(0)
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


def read_file(path, content, read):
    """Write `content` to `path` and check the promise of the reader. Return its result or its UserError."""
    path.write_bytes(content)
    with warnings.catch_warnings():
        warnings.simplefilter("error")      # a warning would be printed as a second line
        return keeps_its_promise(lambda: read(path))


# --- configurations ---------------------------------------------------------------------------------------------------

DEFAULT = (ROOT / "config" / "default.yaml").read_bytes()
KEYS = [tuple(name.split(".")) for name in settings.flat(settings.load_config(ROOT / "config" / "default.yaml"))]
YAML_WORDS = one_of(
    "!!bool x", "!!timestamp x", "!!int x", "!!int ''", "!!float ''", "!!binary \xe9", "!!set {a, b}", "!!omap [a]",
    "!!pairs [{a: b}]", "!!map x", "!!seq x", "!!python/object/apply:os.abort []", "9999-12-31 23:59:59 -23:59",
    "2001-13-45", "&a [x, *a]", "&a x", "*a", "<<: {a: 1}", "{<<: [{a: 1}]}", "? {a: b}\n: c", "0x" + 9000 * "f",
    9000 * "9", "1" + 20000 * ":1", "1" + 3000 * ":1" + ":1.5", ".inf", "-.nan", "~", "", "-", "\"\\ud800\"", "\"\\0\"",
    "'" + 300 * "x" + "'", "[" * 400, "{" * 400, "- " * 400, "? " * 400, "|\n  x", "%TAG ! x", "---", "...", "\t",
    "# x",     "!<x> y", "!!null x", "=", "1_000", "0b" + 5000 * "1", 3000 * "/x", "[[[[1]]]]")
VALUES = st.one_of(YAML_WORDS, NUMBERS, st.lists(NUMBERS, max_size=80), st.text(max_size=20))


@given(damaged(DEFAULT))
def test_damaged_configurations(folder, content):
    read_file(folder / "a.yaml", content, settings.load_config)


@given(st.text(max_size=300), st.binary(max_size=300))
def test_texts_and_bytes_as_configurations(folder, text, content):
    read_file(folder / "a.yaml", text.encode("utf-8", "surrogatepass"), settings.load_config)
    read_file(folder / "a.yaml", content, settings.load_config)


@given(st.lists(st.tuples(st.sampled_from(KEYS), VALUES), max_size=4), st.booleans())
def test_configurations_with_other_values(folder, changes, spelt):
    tree = yaml.safe_load(DEFAULT)
    for number, ((section, key), value) in enumerate(changes):
        tree[section][key] = f"CHANGE{number}" if spelt or isinstance(value, str) else value
    text = yaml.safe_dump(tree)
    for number, (_, value) in enumerate(changes):
        text = text.replace(f"CHANGE{number}", value if isinstance(value, str) else str(value).replace("None", "~"))
    conf = read_file(folder / "a.yaml", text.encode("utf-8", "surrogatepass"), settings.load_config)
    if not isinstance(conf, helper.UserError):
        net = conf.network
        shapes = architecture.parameter_shapes(net)
        assert sum(map(np.prod, shapes.values())) < 10 ** 8 and conf.train.rays * conf.tracer.samples < 10 ** 8
        assert np.isfinite(np.float32(schedule.alpha(conf.train, conf.train.steps - 1)))
        assert 0 < schedule.learning_rate_factor(conf.train, conf.train.steps - 1) <= 1


@given(YAML_WORDS, st.one_of(st.integers(1, 100), st.integers(1, 5000)), one_of(" ", "\n", ", ", "\n- ", ": ", "\n? "))
def test_words_of_yaml_many_times(folder, word, times, between):
    read_file(folder / "a.yaml", between.join(times * [word]).encode("utf-8", "surrogatepass"), settings.load_config)
    lines = "\n".join(f"{number}: {word}" for number in range(times))
    read_file(folder / "a.yaml", lines.encode("utf-8", "surrogatepass"), settings.load_config)


# --- zips -------------------------------------------------------------------------------------------------------------

# {signature of a zip header: [(offset, size) of each number in it]}
IN_DIRECTORY = {b"PK\1\2": [(6, 2), (8, 2), (10, 2), (16, 4), (20, 4), (24, 4), (28, 2), (30, 2), (32, 2), (42, 4)],
                b"PK\3\4": [(4, 2), (6, 2), (8, 2), (14, 4), (18, 4), (22, 4), (26, 2), (28, 2)],
                b"PK\5\6": [(8, 2), (10, 2), (12, 4), (16, 4), (20, 2)]}


@st.composite
def lying(draw, whole):
    """Draw the bytes of a zip with one to three numbers of its headers changed."""
    content = bytearray(whole)
    for _ in range(draw(st.integers(1, 3))):
        header = draw(st.sampled_from(sorted(IN_DIRECTORY)))
        starts = [i for i in range(len(whole)) if whole.startswith(header, i)]
        if starts:
            place, size = draw(st.sampled_from(IN_DIRECTORY[header]))
            place += draw(st.sampled_from(starts))
            before = int.from_bytes(content[place:place + size], "little")
            others = one_of(0, 1, 8, 12, 14, 99, before + 1, before // 2, 2 ** 31)
            value = draw(st.one_of(st.integers(0, 2 ** (8 * size) - 1), others))
            content[place:place + size] = (value % 2 ** (8 * size)).to_bytes(size, "little")
    return bytes(content)


def zipped(entries, compression=zipfile.ZIP_STORED):
    """Return the bytes of a zip with `entries`, [(name, bytes)]."""
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")     # about duplicate names
        with zipfile.ZipFile(file, "w", compression) as archive:
            for name, content in entries:
                archive.writestr(name, content)
    return file.getvalue()


COMPRESSIONS = one_of(zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)


# --- cameras ----------------------------------------------------------------------------------------------------------

def saved(**arrays):
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


WORLD = np.array([[9.0, 0, 5, 9], [0, 9, 5, 9], [0, 0, 1, 3], [0, 0, 0, 1]])
CAMERAS = saved(world_mat_0=WORLD, scale_mat_0=np.eye(4), world_mat_1=WORLD, scale_mat_1=np.eye(4))
DESCRIPTIONS = one_of("'<f8'", "'<f4'", "'<i8'", "'|O'", "'|V2000000000'", "'<U99999999'", "[('a', '<f8')]", "'>f8'",
                      "'<m8[s]'", "'|b1'", "'<c16'", "'<f16'", "'x'")
ARRAY_SHAPES = one_of("(4, 4)", "(10**9,)", "(1000000000, 4)", "(4, 4, 1)", "()", "(-4, -4)", "(0, 4)", "(True, 4)",
                      "4", "((((4))))", "(4, 4.0)", "x", "(" * 300 + ")" * 300, "-" * 3000 + "4")


@st.composite
def npy_files(draw):
    """Draw the bytes of an .npy file with an arbitrary header."""
    header = "{{'descr': {}, 'fortran_order': {}, 'shape': {}, }}".format(
        draw(DESCRIPTIONS), draw(one_of("False", "True", "None", "2")), draw(ARRAY_SHAPES))
    version = draw(one_of((1, 0), (2, 0), (3, 0), (9, 9)))
    length = struct.pack("<H" if version[0] == 1 else "<I", len(header))
    return b"\x93NUMPY" + bytes(version) + length + header.encode() + draw(one_of(bytes(128), b"", bytes(10 ** 6)))


def load_cameras(path):
    intrinsics, poses, scale = datasets.load_cameras(path, 2)
    assert intrinsics.shape == (2, 3, 3) and poses.shape == (2, 4, 4) and scale.shape == (4, 4)


def test_the_cameras_that_are_damaged_are_fine(folder):
    assert read_file(folder / "cameras.npz", CAMERAS, load_cameras) is None


@given(st.one_of(damaged(CAMERAS), lying(CAMERAS), st.binary(max_size=100)))
def test_damaged_cameras(folder, content):
    read_file(folder / "cameras.npz", content, load_cameras)


@given(st.dictionaries(one_of("world_mat_0", "scale_mat_0", "world_mat_1", "scale_mat_1"),
                       st.one_of(npy_files(), st.binary(max_size=50)), min_size=1),
       one_of("", ".npy", ".x"), COMPRESSIONS, st.data())
def test_cameras_of_strange_arrays(folder, entries, suffix, compression, data):
    with np.load(io.BytesIO(CAMERAS)) as whole:
        files = {f"{key}.npy": whole.zip.read(f"{key}.npy") for key in whole.files}
    for key, content in entries.items():
        del files[f"{key}.npy"]
        files[key + suffix] = content
    content = zipped(files.items(), compression)
    read_file(folder / "cameras.npz", content if data.draw(st.booleans()) else data.draw(lying(content)), load_cameras)


@given(NUMBERS, st.integers(0, 15), one_of("world_mat_0", "scale_mat_1"))
def test_cameras_of_strange_numbers(folder, number, place, name):
    with np.load(io.BytesIO(CAMERAS)) as whole:
        arrays = dict(whole)
    try:
        arrays[name].flat[place] = number
    except (TypeError, ValueError, OverflowError):
        arrays[name].flat[place] = np.inf
    read_file(folder / "cameras.npz", saved(**arrays), load_cameras)


# --- models and states, read in a separate process, as the HDF5 library may crash -------------------------------------

def serve():
    """Read the files named on standard input, and print one line about each. Runs in a separate process."""
    logger = sys.modules["nnabla.logger"].logger
    logger.setLevel("ERROR")
    for line in sys.stdin:
        kind, path = line.rstrip("\n").split(" ", 1)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                said = keeps_its_promise(functools.partial(READERS[kind], Path(path)))
        except BaseException as error:
            said = f"broken: {error!r}"
        print(f"answer: {str(said)[:3000]!r}", flush=True)


def read_model(path):
    checkpoints.load_model(path, SHAPES)


def read_any_model(path):
    ours = checkpoints.read_arrays(path)[0]
    convert.their_parameters(path, ours)


def read_state(path):
    """Read a state as train.py --resume does before it computes."""
    state = checkpoints.load_state(path.parent, SHAPES)
    train.check_cameras(state, 0.0, 2)
    progress = state.progress
    train.is_complete(state, settings.Train(steps=5, views_per_step=progress["views_per_step"]), progress["views"],
                      progress["ranks"])
    train.tell_resumed(state, settings.load_config(ROOT / "config" / "default.yaml"))
    checkpoints.restore_state(state, {"solver": S.Adam(1e-3)})
    first, steps = state.progress["step"], state.progress["steps"]
    series = log.EpochLog(None, schedule.Epochs(1 << 40, steps), state, first, max(first - 1, 0) // steps)
    series.add(first, **dict.fromkeys(log.STEP_SERIES, 1.0))
    json.dumps(series.times())


READERS = {"model": read_model, "any": read_any_model, "state": read_state}


class Child:
    """A process that reads files. If a file makes it crash, a new one is started for the next file."""

    def __init__(self):
        self.process = None

    def read(self, kind, path, content):
        """Write `content` to `path`, and have the process read or refuse it. Return its answer."""
        path.write_bytes(content)
        if self.process is None:
            self.process = subprocess.Popen([sys.executable, "-c", CHILD, str(ROOT), str(ROOT / "tests")],
                                            stdin=subprocess.PIPE, stdout=subprocess.PIPE, universal_newlines=True)
        self.process.stdin.write(f"{kind} {path}\n")
        self.process.stdin.flush()
        said = "begun"
        while said and not said.startswith("answer: "):
            said = self.process.stdout.readline()
        if not said:
            status, self.process = self.process.wait(), None
            raise AssertionError(f"the process ended with status {status}")
        assert "broken: " not in said, said
        return said

    def end(self):
        if self.process:
            self.process.stdin.close()
            self.process.wait()
            self.process.stdout.close()


@pytest.fixture(scope="module")
def child():
    reader = Child()
    yield reader
    reader.end()


class Whole:
    """The parts of the fixture `whole`; a class without a repr, as Hypothesis prints the arguments of failed tests."""

    def __init__(self, **parts):
        vars(self).update(parts)

    def file(self, kind):
        return self.state if kind == "state" else self.model


@pytest.fixture(scope="module")
def whole(folder):
    """Return the bytes of a valid model and state, and the progress and arrays of the state."""
    nn.clear_parameters()
    checkpoints.set_parameters(small_model())
    checkpoints.save_model(folder / "whole.h5")
    solver = S.Adam()
    solver.set_parameters(nn.get_parameters())
    progress = {"step": 7, "steps": 2, "views": 2, "ranks": 1, "loss": 0.5, "elapsed": 1.0, "lap": 1.0,
                "config": {"train.seed": 1}}
    checkpoints.save_state(folder, {"solver": solver}, progress, {"loss": [1.0]})
    nn.clear_parameters()
    return Whole(model=(folder / "whole.h5").read_bytes(), state=(folder / "state.h5").read_bytes(),
                 progress=progress, arrays=checkpoints.read_arrays(folder / "state.h5")[0])


def test_what_is_damaged_is_fine(child, folder, whole):
    for kind in ("model", "any", "state"):
        name = "state.h5" if kind == "state" else "model.h5"
        assert child.read(kind, folder / name, whole.file(kind)) == "answer: 'None'\n"


@given(st.data(), one_of("model", "any", "state"), one_of(False, True))
def test_damaged_models_and_states(child, folder, whole, data, kind, only_head):
    content = whole.file(kind)
    head = 4000 if only_head else len(content)
    content = data.draw(damaged(content[:head])) + content[head:]
    child.read(kind, folder / ("state.h5" if kind == "state" else "model.h5"), content)


DTYPES = one_of("f4", "f8", ">f4", "f2", "i8", "u1", "S4", "c8", "?", h5py.string_dtype(), h5py.enum_dtype({"a": 1}),
                h5py.ref_dtype)
ABOUTS = one_of(None, "", "[" * 30000, "9" * 50000, np.zeros(3), "x" * 30000, b"\xff", np.array(["a", "b"], object))
DATASETS = st.sampled_from([*list(SHAPES)[:4], "cameras/pose", "x/y", "series/loss"])


@st.composite
def strange_datasets(draw):
    """Draw arguments for h5py's create_dataset."""
    shape = draw(one_of((39, 64), (), (0,), (2 ** 31,), (2 ** 20, 2 ** 20), (2 ** 32, 2 ** 32), (7,), None))
    made = {"shape": shape, "dtype": draw(DTYPES)}
    if shape:
        kind = draw(one_of("plain", "plain", "chunked", "external"))
        if kind == "chunked":
            made.update(maxshape=(None,) * len(shape), chunks=draw(one_of((1,), (99,), (10 ** 7,))) * len(shape),
                        compression=draw(one_of(None, "gzip", "lzf")))
        if kind == "external":
            made.update(external=[("/etc/hostname", 0, h5py.h5f.UNLIMITED)])
    return made


@given(one_of("model", "any", "state"), st.data(),
       st.lists(st.tuples(DATASETS, strange_datasets(), st.integers(1, 50)), max_size=4))
def test_models_of_strange_datasets(child, folder, whole, kind, data, changes):
    file = io.BytesIO(whole.file(kind))
    with h5py.File(file, "r+") as h5:
        for name, made, times in changes:
            for number in range(times):
                place = f"{name}{number or ''}"
                if place in h5:
                    del h5[place]
                try:
                    h5.create_dataset(place, **made)
                except (ValueError, TypeError, OSError, OverflowError, RuntimeError, MemoryError):
                    pass    # HDF5 cannot create such a dataset
        if data.draw(st.booleans()):
            h5["link"], h5["other"] = h5py.SoftLink("/link"), h5py.ExternalLink("whole.h5", "/implicit")
            h5["again"] = h5["/"]
        about = data.draw(ABOUTS)
        if about is not None:
            h5.attrs["about"] = about
    child.read(kind, folder / ("state.h5" if kind == "state" else "model.h5"), file.getvalue())


JSON = st.recursive(st.one_of(NUMBERS, st.text(max_size=9)), lambda inner: st.one_of(
    st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=9), inner, max_size=3)), max_leaves=5)


def cast(shape, value, dtype):
    with np.errstate(all="ignore"):
        return np.full(shape, value).astype(dtype)


PROGRESS = one_of("step", "steps", "views", "ranks", "loss", "elapsed", "lap", "config")
PROGRESS_VALUES = st.one_of(st.integers(-2, 3), st.floats(), one_of(2 ** 31, 2 ** 63, float("nan"), "x", None), JSON)
PLACES = one_of("solver/implicit/0/v/t", "solver/implicit/1/g/t", "solver/implicit/0/v/mean", "solver/implicit/0/b/var",
                "series/loss", "series/hits", "series/x", "parameters/implicit/0/v", "parameters/cameras/pose",
                "parameters/implicit/0/v/x", "parameters/new")
ARRAYS = st.builds(cast, one_of((), (0,), (3,), (2, 7), (39, 64), (64,)),
                   one_of(0.0, 1.0, -1.0, np.nan, np.inf, 2.0 ** 31, 1e300), one_of("f4", "f8", "i4", "i8", "u8"))


@given(st.dictionaries(PROGRESS, PROGRESS_VALUES, max_size=2),
       st.dictionaries(PLACES, ARRAYS, max_size=3))
def test_states_with_a_right_checksum(child, folder, whole, progress, arrays):
    arrays = {**whole.arrays, **arrays}
    about = {**whole.progress, "format": checkpoints.STATE_FORMAT, "checksum": checkpoints.checksum(arrays),
             **progress}
    file = io.BytesIO()
    with h5py.File(file, "w") as h5:
        for name in sorted(arrays, key=len, reverse=True):
            try:
                h5[name] = arrays[name]
            except (ValueError, OSError):
                pass        # the name would lie within a dataset
        h5.attrs["about"] = json.dumps(about)
    child.read("state", folder / "state.h5", file.getvalue())


# --- checkpoints of PyTorch -------------------------------------------------------------------------------------------

def their_bytes(old_form):
    """Return the bytes of a model as a PyTorch checkpoint."""
    state, arrays = {"epoch": 7, "model_state_dict": convert.their_parameters("a", small_model())[0]}, []
    if old_form:
        machine = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"short": 2, "int": 4, "long": 4}}
        pickles = [b"\x80\x02" + convert.pickled(value, arrays, True) + b"."
                   for value in (convert.OLD_MAGIC, 1001, machine, state)]
        pickles.append(b"\x80\x02" + convert.pickled([str(n) for n in range(len(arrays))], [], True) + b".")
        return b"".join(pickles + [struct.pack("<q", array.size) + array.tobytes() for array in arrays])
    file, program = io.BytesIO(), b"\x80\x02" + convert.pickled(state, arrays, False) + b"."
    convert.write_zip_form(file, program, arrays)
    return file.getvalue()


NEW, OLD = their_bytes(False), their_bytes(True)
with zipfile.ZipFile(io.BytesIO(NEW)) as archive:
    NEW_FILES = {name: archive.read(name) for name in archive.namelist()}
OLD_PICKLES = len(OLD) - 4 * sum(int(np.prod(shape)) for shape in SHAPES.values())     # roughly where the numbers begin


def read_theirs(path):
    ours = convert.our_parameters(path, *convert.read_checkpoint(path))
    assert all(array.dtype == np.float32 and np.isfinite(array).all() for array in ours.values())


def test_the_checkpoints_that_are_damaged_are_fine(folder):
    assert read_file(folder / "new.pth", NEW, read_theirs) is None
    assert read_file(folder / "old.pth", OLD, read_theirs) is None


@given(st.one_of(damaged(NEW), lying(NEW), damaged(OLD),
                 damaged(OLD[:OLD_PICKLES]).map(lambda head: head + OLD[OLD_PICKLES:])))
def test_damaged_checkpoints(folder, content):
    read_file(folder / "a.pth", content, read_theirs)


@given(damaged(NEW_FILES["archive/data.pkl"]), COMPRESSIONS)
def test_checkpoints_of_damaged_instructions(folder, program, compression):
    read_file(folder / "a.pth", zipped({**NEW_FILES, "archive/data.pkl": program}.items(), compression), read_theirs)


def tensor(shape=(2, 7), stride=(7, 1), key="a", count=14, offset=0):
    """Return the pickle opcodes of a tensor."""
    key, count, *rest = (convert.pickled(value, [], False) for value in (key, count, offset, shape, stride, False))
    return (b"ctorch._utils\n_rebuild_tensor_v2\n((X\x07\0\0\0storagectorch\nFloatStorage\n" + key
            + b"X\x03\0\0\0cpu" + count + b"tQ" + b"".join(rest) + b"tR")


INSTRUCTION = one_of(
    *(bytes([byte]) for byte in b"}])(t\x85\x86\x87N\x88\x89usaeRbQ"), b"q\0", b"q\1", b"q\2", b"h\0", b"h\1", b"h\2",
    b"r\xff\xff\xff\xff", b"K\1", b"J\xff\xff\xff\xff", b"M\1\2", b"\x8a\xff" + b"\x7f" * 255, b"G" + TELLING_BYTES[5],
    b"X\1\0\0\0a", b"X\6\0\0\0weight", b"X\7\0\0\0storage", b"X\xff\xff\xff\x7fa", b"ccollections\nOrderedDict\n",
    b"ctorch._utils\n_rebuild_tensor_v2\n", b"ctorch._utils\n_rebuild_parameter\n", b"ctorch\nFloatStorage\n",
    b"cos\nsystem\n", tensor(), b"X\6\0\0\0weight" + tensor() + b"s", tensor(shape=(0, 2 ** 62), stride=(0, 0)),
    tensor(count=2 ** 62), tensor(key="b"), b"0", b"2", b"\x94", b"h\0h\0\x86q\0", b"h\0\x85q\0", b"](h\0h\0eq\0",
    b"}K\1h\0sq\0", b"h\0h\0\x86q\0" * 40, b"}h\0Ns", b"h\0)R", b"h\0Q")
PROGRAMS = st.lists(st.tuples(INSTRUCTION, st.one_of(st.integers(1, 3), st.integers(1, 60000))), max_size=12)


@given(PROGRAMS, one_of(b"\x80\x02", b"\x80\x02}q\0", b"\x80\x02)q\0"), st.booleans())
def test_checkpoints_of_any_instructions(folder, instructions, start, fits):
    program = start + b"".join(instruction * times for instruction, times in instructions) + (b"u." if fits else b".")
    read_file(folder / "a.pth", zipped([("archive/data.pkl", program), ("archive/data/a", bytes(56))]), read_theirs)
    for place in range(5):
        pickles = [b"\x80\x02" + convert.pickled(value, [], True) + b"." for value in
                   (convert.OLD_MAGIC, 1001, {"little_endian": True}, {"model_state_dict": {}}, [])]
        pickles[place] = program
        read_file(folder / "a.pth", b"".join(pickles), read_theirs)


FILES = one_of("archive/data.pkl", "other/data.pkl", "archive/byteorder", "archive/data/0", "archive/data/1", "x")


@given(st.dictionaries(FILES, st.builds(random_bytes, st.integers(), st.integers(1, 10 ** 5)), max_size=4),
       COMPRESSIONS, st.data())
def test_zips_of_other_files(folder, files, compression, data):
    content = zipped({**NEW_FILES, **files}.items(), compression)
    read_file(folder / "a.pth", data.draw(lying(content)) if data.draw(st.booleans()) else content, read_theirs)
