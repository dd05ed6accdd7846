"""What a training keeps: models, which nn.load_parameters reads, and the state from which it goes on."""
import io
import json
import math
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np

import helper
from backends import architecture
from config import settings
from files import folders, writing

POSE = "cameras/pose"       # cameras.py says what it holds
STATE_FILE = "state.h5"
STATE_FORMAT = "IDR training state 1"
MOST_BYTES = 1 << 30        # of a file; the state of the paper's networks takes 36 MB
MOST_ARRAYS = 10000         # in a file
MOST_ABOUT = 1 << 18        # letters of a state's progress
MOST_STEPS = 1 << 40


def save_model(path):
    """Write nnabla's current parameters to `path` (.h5), replacing it whole."""
    import nnabla as nn
    file = io.BytesIO()     # and not to the disk: HDF5 is at a loss when that is full
    nn.save_parameters(file, extension=".h5")
    writing.write_bytes(path, file.getvalue())


def model_file(path):
    """Return the checkpoint that --model-load-path names: the file itself, or the newest model of a run's folder."""
    path = Path(path)
    if path.is_dir():
        models = sorted(path.glob("model_*.h5"))
        if not models:
            raise helper.UserError(f"{path}: no model_*.h5 in this folder; train first, or name the model's file")
        return models[-1]
    helper.check_is_file(path, "name a model_*.h5 of a training run, or the run's folder")
    return path


def load_model(path, shapes):
    """Load the parameters of the checkpoint at `path` into nnabla's parameter scope, in place of those there.

    shapes: {parameter name: shape} of the configured network; trained cameras may be there beside. Raises UserError
    where the file is no checkpoint, or one of another network.
    """
    import nnabla as nn
    arrays, _ = read_arrays(path)
    check_parameters(path, arrays, shapes)
    nn.clear_parameters()
    set_parameters({name: array for name, array in arrays.items() if name in (*shapes, POSE)})


def open_run(args):
    """Load the configuration and the model that a script's `args` name; returns (conf, the folder for its results).

    Sets the context. Raises UserError as the functions that it calls do.
    """
    from backends import context  # here: report.py and prepare.py do without nnabla
    conf = settings.load_config(args.config)
    model = model_file(args.model_load_path)
    context.set_context(args.context, args.device_id)
    load_model(model, architecture.parameter_shapes(conf.network))
    folder = folders.run_folder(conf, args.monitor_path) if args.monitor_path else model.parent
    folders.remove_unfinished(folder)
    return conf, folder


def set_parameters(arrays):
    """Make {name: array} nnabla's parameters, beside those of other names."""
    import nnabla as nn
    for name, array in arrays.items():
        variable = nn.Variable.from_numpy_array(array.astype(np.float32, copy=False), need_grad=name != POSE)
        nn.parameter.set_parameter(name, variable)


def solver_parameters(solver_name):
    """Return nnabla's parameters that a solver of that name works on: "cameras" on the poses, "solver" on the rest."""
    import nnabla as nn
    # The poses want no gradient of nnabla's: cameras.py computes it.
    return {POSE: nn.get_parameters(grad_only=False)[POSE]} if solver_name == "cameras" else nn.get_parameters()


def check_pose(where, shape):
    """Raise UserError where trained cameras do not have the shape (views, 7), or are none."""
    if len(shape) != 2 or shape[0] == 0 or shape[1] != 7:
        raise helper.UserError(f"{where} is {tuple(shape)}; cameras are (views, 7), a quaternion and a centre each")


def check_parameters(path, arrays, shapes):
    """Raise UserError unless the `arrays` of the checkpoint at `path` are finite and have these {name: shape}, and any
    trained cameras beside are such."""
    if POSE in arrays:
        check_pose(f"{path}: {POSE}", arrays[POSE].shape)
        shapes = {**shapes, POSE: arrays[POSE].shape}
    for name, shape in shapes.items():
        if name not in arrays:
            raise helper.UserError(f"{path}: has no parameter {name}; it was saved by another program or with other layers")
        if arrays[name].shape != tuple(shape):
            raise helper.UserError(f"{path}: {name} is {arrays[name].shape}, the configuration wants {tuple(shape)}; "
                            "use the configuration that lies beside the model")
        if not is_finite(arrays[name]):
            raise helper.UserError(f"{path}: {name} has values that are not finite; the file is damaged, or its training "
                            "failed; use an earlier one")
    if POSE in arrays and np.linalg.norm(arrays[POSE][:, :4].astype(np.float64), axis=1).min() < 1e-10:
        raise helper.UserError(f"{path}: {POSE} has a quaternion of length 0; the file is damaged")


def is_finite(array):
    """Whether all numbers of an array are finite in float32, in which the networks compute."""
    with np.errstate(over="ignore"):
        return bool(np.isfinite(array.astype(np.float32, copy=False)).all())


def read_arrays(path):
    """Read an .h5 file of numbers: {name: array}, and the text of its attribute "about" ("" where it has none).

    Nothing outside the file is read, and no more than the file's own size. Raises UserError for other files.
    """
    import h5py
    helper.check_is_file(path)
    limit, found = Path(path).stat().st_size, {}
    if limit > MOST_BYTES:
        raise helper.UserError(f"{path}: has more than {MOST_BYTES} bytes; a checkpoint of ours has less")

    def note(name, item):
        # HDF5 goes into groups of groups by recursion, which ends at its stack's end.
        if not isinstance(name, str) or name.count("/") > 8 or len(found) == MOST_ARRAYS:
            raise ValueError
        found[name] = item

    try:
        with h5py.File(str(path), "r") as file:
            file.visititems(note)
            datasets = {name: item for name, item in found.items() if isinstance(item, h5py.Dataset)}
            for item in datasets.values():
                check_is_plain(item)
            # Several may lie in one place, or nowhere: what they are together must have room in the file, too.
            if sum(item.dtype.itemsize * math.prod(item.shape) for item in datasets.values()) > limit:
                raise ValueError
            return {name: item[()] for name, item in datasets.items()}, about_of(file, limit)
    except Exception as error:  # a damaged file makes h5py raise nearly anything
        raise helper.UserError(f"{path}: not a readable .h5 checkpoint (truncated, damaged or another kind of file)") \
            from error


def check_is_plain(dataset):
    """Raise ValueError unless a dataset's numbers lie in its file in one piece, as ours do.

    In chunks, a small dataset may unpack to any size.
    """
    if dataset.dtype.kind not in "fiu" or dataset.external or dataset.is_virtual or dataset.chunks is not None:
        raise ValueError


def about_of(file, limit):
    """Return the text of an open file's attribute "about", "" where there is none; ValueError where it is no text."""
    if "about" not in file.attrs:
        return ""
    place = file.attrs.get_id("about")
    if place.shape != () or place.dtype.kind not in "OSU" or place.get_storage_size() > limit:
        raise ValueError
    about = file.attrs["about"]
    if not isinstance(about, str) or len(about) > MOST_ABOUT:
        raise ValueError
    return about


def save_state(folder, solvers, progress, series):
    """Write what a training needs to go on, nnabla's parameters included, to `folder`/state.h5, replacing it whole.

    solvers: {name: nnabla solver}; progress: the steps done, the steps of an epoch, the
    last loss, seconds since the start and in this epoch, the settings; series: {name: numbers}.
    Raises UserError where it cannot be written, and where a value is not finite: then the earlier state stays.
    """
    import h5py
    import nnabla as nn
    arrays = {f"parameters/{name}": p.d for name, p in nn.get_parameters(grad_only=False).items()}
    for solver_name, solver in solvers.items():
        for name, state in solver.get_states().items():
            arrays[f"{solver_name}/{name}/t"] = np.array(state.t)
            arrays.update({f"{solver_name}/{name}/{part}": value.d for part, value in state.pstate.items()})
    for name, array in arrays.items():
        if not np.isfinite(array).all():
            raise helper.UserError(f"{folder}: after step {progress['step']}, {name} has values that are not finite; "
                            f"{STATE_FILE} there is of an earlier step; lower train.learning_rate")
    arrays.update({f"series/{name}": np.array(values, np.float64) for name, values in series.items()})
    about, file = json.dumps({**progress, "format": STATE_FORMAT, "checksum": checksum(arrays)}), io.BytesIO()
    with h5py.File(file, "w") as h5:
        for name, array in arrays.items():
            h5[name] = array
        h5.attrs["about"] = about
    writing.write_bytes(Path(folder) / STATE_FILE, file.getvalue())


def checksum(arrays):
    """Return a number that changes with any bit of {name: array}."""
    total = 0
    for name in sorted(arrays):
        total = zlib.crc32(np.ascontiguousarray(arrays[name]).tobytes(), zlib.crc32(name.encode(), total))
    return total


def load_state(folder, shapes):
    """Read the state of the run in `folder`, as save_state wrote it: a namespace of progress, arrays and path.

    shapes: {parameter name: shape} of the configured network. Nothing of nnabla is touched; restore_state does that.
    Raises UserError where there is none, or none that fits.
    """
    path = Path(folder) / STATE_FILE
    if not Path(folder).is_dir():
        raise helper.UserError(f"{folder}: no such run to resume; name its folder after --resume, or start without --resume")
    if not path.is_file():
        raise helper.UserError(f"{folder}: has no {STATE_FILE} to resume from; start without --resume (a run that is there "
                        "is kept, under a name with a number)")
    arrays, about = read_arrays(path)
    try:
        progress = json.loads(about)
    except (ValueError, RecursionError):
        progress = None
    if not isinstance(progress, dict) or progress.get("format") != STATE_FORMAT:
        raise helper.UserError(f"{path}: no training state of this program or this version; start without --resume")
    if progress.get("checksum") != checksum(arrays):
        raise helper.UserError(f"{path}: damaged (its checksum is another); start without --resume")
    check_progress(path, progress)
    parameters = {name[len("parameters/"):]: array for name, array in arrays.items() if name.startswith("parameters/")}
    check_parameters(path, parameters, shapes)
    # In that order, which models keep; what else is there is no parameter of this network.
    parameters = {name: parameters[name] for name in (*shapes, POSE) if name in parameters}
    series = {name[len("series/"):]: array for name, array in arrays.items() if name.startswith("series/")}
    for name, array in series.items():
        if array.ndim != 1 or not np.isfinite(array).all():
            raise helper.UserError(f"{path}: the series {name} is no list of finite numbers; start without --resume")
    return SimpleNamespace(path=path, progress=progress, parameters=parameters, series=series, arrays=arrays)


def check_progress(path, progress):
    """Raise UserError unless the progress of the state at `path` is one that a training can have had."""
    whole = {"step": (0, MOST_STEPS), "steps": (1, settings.MOST_VIEWS), "views": (1, settings.MOST_VIEWS),
             "ranks": (1, settings.MOST_VIEWS)}
    found = {"views": progress.get("steps"), "ranks": 1, **progress}    # states of one process once lacked these two
    for name, (least, most) in whole.items():
        if type(found.get(name)) is not int or not least <= found[name] <= most:
            raise damaged_progress(path, name, found)
    for name in ("loss", "elapsed", "lap"):     # not a clock's that was set back: times may be negative
        if type(found.get(name)) is not float or not abs(found[name]) < 1e30:
            raise damaged_progress(path, name, found)
    if found["steps"] != -(-found["views"] // found["ranks"]):
        raise damaged_progress(path, "steps", found)
    config = found.get("config")
    if type(config) is not dict or not all(is_setting(value) for value in config.values()):
        raise damaged_progress(path, "config", found)


def is_setting(value):
    """Whether a value read from JSON is of a kind that a configuration's keys have."""
    return type(value) in (int, float, str) or type(value) is list and all(type(v) in (int, str) for v in value)


def damaged_progress(path, name, found):
    """Return the UserError for a state whose progress has an impossible value."""
    return helper.UserError(f"{path}: its {name} cannot be {helper.SHORT.repr(found.get(name))}; the file is damaged, "
                            "so start without --resume")


def restore_state(state, solvers):
    """Set nnabla's parameters to those of a state that load_state read, and the solvers {name: nnabla solver}."""
    import nnabla as nn
    nn.clear_parameters()
    set_parameters(state.parameters)
    for solver_name, solver in solvers.items():
        solver.set_parameters(solver_parameters(solver_name))
        states = solver.get_states()
        for name, kept in states.items():
            found = {part: state.arrays.get(f"{solver_name}/{name}/{part}") for part in ("t", *kept.pstate)}
            if any(array is None or array.shape != (() if part == "t" else state.parameters[name].shape)
                   for part, array in found.items()):
                raise helper.UserError(f"{state.path}: has no state of this {solver_name} for {name}; start without --resume")
            t = found.pop("t")
            if t.dtype.kind not in "iu" or not 0 <= t < 2 ** 31 or not all(map(is_finite, found.values())):
                raise helper.UserError(f"{state.path}: the state of its {solver_name} for {name} has impossible "
                                       "numbers; the file is damaged, so start without --resume")
            kept.t = int(t)
            kept.pstate = {part: nn.Variable.from_numpy_array(array.astype(np.float32, copy=False))
                           for part, array in found.items()}
        solver.set_states(states)
