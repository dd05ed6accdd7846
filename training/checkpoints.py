"""Files of a training: models, which nn.load_parameters can read, and the state for --resume."""
import io
import json
import math
import zlib
from pathlib import Path
from typing import Dict, NamedTuple

import numpy as np

import helper
from backends import architecture
from config import settings
from files import folders, writing

GRID, MARGINS = "search/values", "search/margins"      # in a state: the SdfGrid
POSE = "cameras/pose"       # parameter of trained cameras, (views, 7); see cameras.py
STATE_FILE = "state.h5"
STATE_FORMAT = "IDR training state 1"
MOST_BYTES = 1 << 30        # per file; a state of the paper's networks has 36 MB
MOST_ARRAYS = 10000         # per file
MOST_ABOUT = 1 << 18        # characters of a state's progress
MOST_STEPS = 1 << 40


class State(NamedTuple):
    """A training state that was read and checked, but not applied; see load_state and restore_state."""
    path: Path
    progress: dict                      # as in save_state
    parameters: Dict[str, np.ndarray]   # nnabla's parameters, in the order of models
    series: Dict[str, np.ndarray]       # values of the unfinished epoch, (N,) each
    arrays: Dict[str, np.ndarray]       # all arrays of the file, those of the solvers included


def save_model(path):
    """Write nnabla's current parameters to `path` (.h5) atomically."""
    import nnabla as nn
    file = io.BytesIO()     # in memory first, as HDF5 does not recover from a full disk
    nn.save_parameters(file, extension=".h5")
    writing.write_bytes(path, file.getvalue())


def model_file(path):
    """Return the model that --model-load-path names: the file itself, or the newest model in a run's folder."""
    path = Path(path)
    if path.is_dir():
        models = sorted(path.glob("model_*.h5"), key=lambda model: (len(model.name), model.name))  # by number
        if not models:
            raise helper.UserError(f"{path}: no model_*.h5 in this folder; train first, or name a model file")
        return models[-1]
    helper.check_is_file(path, "name a model_*.h5 of a training run, or the run's folder")
    return path


def load_model(path, shapes):
    """Replace nnabla's parameters by those of the model at `path`.

    shapes: {parameter name: shape} of the configured network. Trained cameras (POSE) are loaded, too, if the file has
    them; other arrays are ignored. Raises UserError if the file is not a model, or belongs to another network.
    """
    import nnabla as nn
    arrays, _ = read_arrays(path)
    check_parameters(path, arrays, shapes)
    nn.clear_parameters()
    set_parameters({name: array for name, array in arrays.items() if name in (*shapes, POSE)})


def open_run(args):
    """Set up a script from its `args`: load the configuration, set nnabla's context, load the model.

    Returns (conf, folder for the results). Raises UserError if an argument or file is refused.
    """
    from backends import context  # imported here, as report.py and prepare.py run without nnabla
    conf = settings.load_config(args.config, args.changes)
    model = model_file(args.model_load_path)
    context.set_context(args.context, args.device_id)
    load_model(model, architecture.parameter_shapes(conf.network))
    folder = folders.run_folder(conf, args.monitor_path) if args.monitor_path else model.parent
    folders.remove_unfinished(folder)
    return conf, folder


def set_parameters(arrays):
    """Set nnabla's parameters from {name: array}; parameters of other names stay."""
    import nnabla as nn
    for name, array in arrays.items():
        variable = nn.Variable.from_numpy_array(array.astype(np.float32, copy=False), need_grad=name != POSE)
        nn.parameter.set_parameter(name, variable)


def solver_parameters(solver_name):
    """Return the nnabla parameters that a solver updates. "cameras" updates the poses, "solver" all others."""
    import nnabla as nn
    # Poses have need_grad=False, as cameras.py computes their gradients.
    return {POSE: nn.get_parameters(grad_only=False)[POSE]} if solver_name == "cameras" else nn.get_parameters()


def check_pose(where, shape):
    """Raise UserError unless the shape of trained cameras is (views, 7) with at least one view."""
    if len(shape) != 2 or shape[0] == 0 or shape[1] != 7:
        raise helper.UserError(f"{where} is {tuple(shape)}; cameras are (views, 7): a quaternion and a centre each")


def check_parameters(path, arrays, shapes):
    """Raise UserError unless `arrays`, read from `path`, contain finite parameters of the given {name: shape}.

    Trained cameras (POSE), if any, must be finite, of shape (views, 7), and without quaternions of length 0.
    """
    if POSE in arrays:
        check_pose(f"{path}: {POSE}", arrays[POSE].shape)
        shapes = {**shapes, POSE: arrays[POSE].shape}
    for name, shape in shapes.items():
        if name not in arrays:
            raise helper.UserError(f"{path}: has no parameter {name}; it was saved by another program or with other "
                                   "layers; use the configuration that lies beside the model")
        if arrays[name].shape != tuple(shape):
            raise helper.UserError(f"{path}: {name} is {arrays[name].shape}, but the configuration requires "
                                   f"{tuple(shape)}; use the configuration that lies beside the model")
        if not is_finite(arrays[name]):
            raise helper.UserError(f"{path}: {name} has values that are not finite; the file is damaged, or its "
                                   "training failed; use an earlier one")
    if POSE in arrays and np.linalg.norm(arrays[POSE][:, :4].astype(np.float64), axis=1).min() < 1e-10:
        raise helper.UserError(f"{path}: {POSE} has a quaternion of length 0; the file is damaged; use an earlier one")


def is_finite(array):
    """Return whether all values of an array are finite in float32, the precision of the networks."""
    with np.errstate(over="ignore"):
        return bool(np.isfinite(array.astype(np.float32, copy=False)).all())


def read_arrays(path):
    """Read all arrays of an .h5 file. Return {name: array} and the string of its attribute "about", "" if missing.

    Never reads outside the file (external links), nor returns more bytes than it has. Raises UserError if the file is
    not readable, is too large or has other contents than plain arrays of numbers.
    """
    import h5py
    helper.check_is_file(path)
    limit, found = Path(path).stat().st_size, {}
    if limit > MOST_BYTES:
        raise helper.UserError(f"{path}: has more than {MOST_BYTES} bytes, so it is not a checkpoint of this program")

    def note(name, item):
        # HDF5 visits nested groups recursively, and deep nesting overflows its stack.
        if not isinstance(name, str) or name.count("/") > 8 or len(found) == MOST_ARRAYS:
            raise ValueError
        found[name] = item

    try:
        with h5py.File(str(path), "r") as file:
            file.visititems(note)
            datasets = {name: item for name, item in found.items() if isinstance(item, h5py.Dataset)}
            for item in datasets.values():
                check_is_plain(item)
            # Datasets may share storage or have none, so their total size must fit into the file, too.
            if sum(item.dtype.itemsize * math.prod(item.shape) for item in datasets.values()) > limit:
                raise ValueError
            return {name: item[()] for name, item in datasets.items()}, about_of(file, limit)
    except Exception as error:  # h5py may raise any exception for damaged files
        raise helper.UserError(f"{path}: not a readable .h5 checkpoint (truncated, damaged or another kind of file); "
                               "use another file") from error


def check_is_plain(dataset):
    """Raise ValueError unless a dataset is a contiguous array of numbers in its own file, as save_* write them.

    Chunked datasets may be compressed, so that a small file expands to any size.
    """
    if dataset.dtype.kind not in "fiu" or dataset.external or dataset.is_virtual or dataset.chunks is not None:
        raise ValueError


def about_of(file, limit):
    """Return the string attribute "about" of an open file, "" if missing. Raises ValueError if it is anything else."""
    if "about" not in file.attrs:
        return ""
    place = file.attrs.get_id("about")
    if place.shape != () or place.dtype.kind not in "OSU" or place.get_storage_size() > limit:
        raise ValueError
    about = file.attrs["about"]
    if not isinstance(about, str) or len(about) > MOST_ABOUT:
        raise ValueError
    return about


def save_state(folder, solvers, progress, series, grid=None):
    """Write all that --resume needs, nnabla's parameters included, to `folder`/state.h5 atomically.

    solvers: {name: nnabla solver}
    progress: JSON values: "step" (steps done), "steps" (per epoch), "views", "ranks" (processes), "views_per_step",
        "loss" (the last one), "elapsed" and "lap" (seconds since the start and in this epoch), "config"
        ({"section.key": value})
    series: {name: values of the unfinished epoch}
    grid: the SdfGrid that the search remembers the sdf by, if any

    Raises UserError if the file cannot be written or a value is not finite. The earlier state then stays.
    """
    import h5py
    import nnabla as nn
    arrays = {f"parameters/{name}": p.d for name, p in nn.get_parameters(grad_only=False).items()}
    for solver_name, solver in solvers.items():
        for name, state in solver.get_states().items():
            arrays[f"{solver_name}/{name}/t"] = np.array(state.t)
            arrays.update({f"{solver_name}/{name}/{part}": value.d for part, value in state.pstate.items()})
    if grid:
        arrays.update({GRID: grid.values, MARGINS: grid.margins})
    for name, array in arrays.items():
        if not np.isfinite(array).all():
            raise helper.UserError(f"{folder}: after step {progress['step']}, {name} has values that are not finite; "
                                   f"{STATE_FILE} stays at an earlier step; lower train.learning_rate")
    arrays.update({f"series/{name}": np.array(values, np.float64) for name, values in series.items()})
    about, file = json.dumps({**progress, "format": STATE_FORMAT, "checksum": checksum(arrays)}), io.BytesIO()
    with h5py.File(file, "w") as h5:
        for name, array in arrays.items():
            h5[name] = array
        h5.attrs["about"] = about
    writing.write_bytes(Path(folder) / STATE_FILE, file.getvalue())


def grid_of(state):
    """Return the SdfGrid of a State, None if it has none, as early ones. Raises UserError if its values are invalid."""
    from tracing.sdf_grid import NUM_MARGINS, SdfGrid  # imported here, as Numba takes half a second
    values, margins = state.arrays.get(GRID), state.arrays.get(MARGINS)
    if values is None or margins is None:
        return None
    early = margins.shape == (NUM_MARGINS,)     # a state of a version that knew no parabolas
    if values.ndim != 3 or len(set(values.shape)) > 1 or len(values) < 2 or not (
            early or margins.shape == (2, NUM_MARGINS)) or not (is_finite(values) and is_finite(margins)):
        raise helper.UserError(f"{state.path}: what it remembers of the sdf cannot be; the file is damaged, so start "
                               "without --resume")
    return SdfGrid(values.astype(np.float32), None if early else margins.astype(np.float32))


def checksum(arrays):
    """Return the CRC-32 of the names and bytes of {name: array}."""
    total = 0
    for name in sorted(arrays):
        total = zlib.crc32(np.ascontiguousarray(arrays[name]).tobytes(), zlib.crc32(name.encode(), total))
    return total


def load_state(folder, shapes):
    """Read the State of the run in `folder`, as written by save_state. nnabla is not changed; see restore_state.

    shapes: {parameter name: shape} of the configured network.
    Raises UserError if there is no state, or if it is damaged or belongs to another network.
    """
    path = Path(folder) / STATE_FILE
    if not Path(folder).is_dir():
        raise helper.UserError(f"{folder}: no such run to resume; name its folder after --resume, or start without "
                               "--resume")
    if not path.is_file():
        raise helper.UserError(f"{folder}: has no {STATE_FILE} to resume from; start without --resume (an earlier run "
                               "is kept: its folder gets a number)")
    arrays, about = read_arrays(path)
    try:
        progress = json.loads(about)
    except (ValueError, RecursionError):
        progress = None
    if not isinstance(progress, dict) or progress.get("format") != STATE_FORMAT:
        raise helper.UserError(f"{path}: no training state of this program and version; start without --resume")
    if progress.get("checksum") != checksum(arrays):
        raise helper.UserError(f"{path}: damaged (its checksum does not match); start without --resume")
    progress = checked_progress(path, progress)
    parameters = {name[len("parameters/"):]: array for name, array in arrays.items() if name.startswith("parameters/")}
    check_parameters(path, parameters, shapes)
    # Models keep this order. Other names are not parameters of this network.
    parameters = {name: parameters[name] for name in (*shapes, POSE) if name in parameters}
    series = {name[len("series/"):]: array for name, array in arrays.items() if name.startswith("series/")}
    for name, array in series.items():
        if array.ndim != 1 or not np.isfinite(array).all():
            raise helper.UserError(f"{path}: the series {name} is not a list of finite numbers; start without --resume")
    return State(path, progress, parameters, series, arrays)


def checked_progress(path, progress):
    """Return the progress of the state at `path` with what early states lack: "views", "ranks", "views_per_step".

    Raises UserError unless all values are valid and consistent.
    """
    whole = {"step": (0, MOST_STEPS), "steps": (1, settings.MOST_VIEWS), "views": (1, settings.MOST_VIEWS),
             "ranks": (1, settings.MOST_VIEWS), "views_per_step": (1, settings.MOST_VIEWS)}
    found = {"views": progress.get("steps"), "ranks": 1, "views_per_step": 1, **progress}
    for name, (least, most) in whole.items():
        if type(found.get(name)) is not int or not least <= found[name] <= most:
            raise damaged_progress(path, name, found)
    for name in ("loss", "elapsed", "lap"):     # times may be negative, if the clock was set back
        if type(found.get(name)) is not float or not abs(found[name]) < 1e30:
            raise damaged_progress(path, name, found)
    if found["steps"] != -(-found["views"] // (found["ranks"] * found["views_per_step"])):
        raise damaged_progress(path, "steps", found)
    config = found.get("config")
    if type(config) is not dict or not all(is_setting(value) for value in config.values()):
        raise damaged_progress(path, "config", found)
    return found


def is_setting(value):
    """Return whether a JSON value has a type that configuration keys have."""
    return type(value) in (int, float, str) or type(value) is list and all(type(v) in (int, float, str) for v in value)


def damaged_progress(path, name, found):
    """Return the UserError for a state whose progress has an invalid value `name`."""
    return helper.UserError(f"{path}: its {name} cannot be {helper.SHORT.repr(found.get(name))}; the file is damaged, "
                            "so start without --resume")


def restore_state(state, solvers):
    """Set nnabla's parameters, and the solvers {name: nnabla solver}, to a State.

    Raises UserError if the state lacks a solver's arrays, or if they are invalid.
    """
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
                raise helper.UserError(f"{state.path}: has no state of this {solver_name} for {name}; start without "
                                       "--resume")
            t = found.pop("t")
            if t.dtype.kind not in "iu" or not 0 <= t < 2 ** 31 or not all(map(is_finite, found.values())):
                raise helper.UserError(f"{state.path}: the state of its {solver_name} for {name} has impossible "
                                       "values; the file is damaged, so start without --resume")
            kept.t = int(t)
            kept.pstate = {part: nn.Variable.from_numpy_array(array.astype(np.float32, copy=False))
                           for part, array in found.items()}
        solver.set_states(states)
