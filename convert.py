"""Turn models of IDR's authors (PyTorch checkpoints) into ours, and ours into theirs, without PyTorch.

    python convert.py ModelParameters/latest.pth --output scan65.h5
    python convert.py ModelParameters/latest.pth CamParameters/latest.pth --output scan65.h5
    python convert.py results_scan65/model_01999.h5 --output latest.pth

Their `{implicit,rendering}_network.lin{layer}.{weight_v,weight_g,bias}`, (out, in), (out, 1) and (out,), are our
`{implicit,rendering}/{layer}/{v,g,b}`, (in, out), (out,) and (out,); inputs and encodings have the same order.
Their trained cameras become `cameras/pose`, (n, 7) float32, one row per view by sorted name: a quaternion w, x, y, z,
of any length, whose rotation takes the camera's axes (x right, y down, z forward) to those of the unit sphere's
coordinates, and the camera's centre there.

A checkpoint of PyTorch is a pickle, a program that may do anything to whoever loads it. Here none is run: its few
instructions that build dicts and tensors are read one by one, and a file with any other is refused.
"""
import argparse
import contextlib
import io
import itertools
import math
import pickletools
import re
import struct
import zipfile
import zlib
from pathlib import Path
from typing import NamedTuple, Tuple

import nnabla as nn
import numpy as np
from nnabla.logger import logger

import helper
from backends import architecture
from config import settings
from files import writing
from helper import UserError
from training import checkpoints
from training.checkpoints import POSE, check_parameters, check_pose

MOST_BYTES = 3 << 27    # of a checkpoint, which is read whole; the paper's networks take 12 MB
MOST_FILES = 10000      # in a zip
# Of a pickle; the paper's networks take 10,000 bytes in 1,500 instructions that nest three deep.
MOST_PICKLED, MOST_INSTRUCTIONS, MOST_NESTED = 1 << 18, 100000, 8
OLD_MAGIC = 0x1950A86A20F9469CFC6C      # the first thing in the form that PyTorch wrote before 1.6
OLD_VERSION = 1001
THEIR_PARTS = {"b": "bias", "g": "weight_g", "v": "weight_v"}      # in their order


def main():
    parser = argparse.ArgumentParser(description="Turn PyTorch checkpoints of IDR's authors into our .h5, or back.")
    parser.add_argument("files", nargs="+", metavar="FILE",
                        help="their ModelParameters, CamParameters or one of each, or a model_*.h5 of ours")
    parser.add_argument("--output", required=True, help="what to write: a name in .h5, or in .pth for theirs; trained "
                                                        "cameras go to a second file then, {name}_cameras.pth")
    parser.add_argument("--old-form", action="store_true", help="write the .pth for PyTorch before 1.6")
    args = parser.parse_args()
    suffix = Path(args.output).suffix
    logger.setLevel("WARNING")      # nnabla would tell of a temporary file that it saves
    if suffix == ".h5" and args.old_form:
        raise UserError(f"--old-form is for writing a .pth; leave it out for --output {args.output}")
    if suffix == ".h5":
        to_ours(args.files, args.output)
    elif suffix == ".pth" and len(args.files) == 1:
        to_theirs(args.files[0], args.output, args.old_form)
    elif suffix == ".pth":
        raise UserError(f"--output {args.output}: only one model can become a .pth, not {len(args.files)} files")
    else:
        raise UserError(f"--output {args.output}: must end in .h5 (from their .pth) or in .pth (from our .h5)")


def to_ours(paths, output):
    """Write the networks or cameras, or both, that their checkpoints at `paths` hold as our `output` (.h5)."""
    ours = {}
    for path in paths:
        found = our_parameters(path, *read_checkpoint(path))
        if not ours.keys().isdisjoint(found):
            raise UserError(f"{path}: the file before held the same; give ModelParameters and CamParameters of a run")
        ours.update(found)
    nn.clear_parameters()
    for name, array in ours.items():
        nn.parameter.set_parameter(name, nn.Variable.from_numpy_array(array, need_grad=True))
    checkpoints.save_model(output)
    print(f"{output}: {in_words(ours)}")


def to_theirs(path, output, old_form):
    """Write our model at `path` (.h5) as their checkpoint `output` (.pth), and trained cameras to one beside it."""
    ours = checkpoints.read_arrays(path)[0]
    models, cameras = their_parameters(path, ours)
    number = re.fullmatch(r"model_(\d{1,9})\.h5", Path(path).name)
    beside = Path(output).with_name(Path(output).stem + "_cameras.pth") if models else output
    with contextlib.ExitStack() as both:
        for target, key, state in ((output, "model_state_dict", models), (beside, "pose_vecs_state_dict", cameras)):
            if state:
                tree = {"epoch": int(number.group(1)) if number else 0, key: state}
                write_checkpoint(both.enter_context(writing.replacing(target)), tree, old_form)
    print(f"{output}: {in_words(ours)}" + (f"; the cameras are in {beside}" if models and cameras else ""))


def in_words(ours):
    """Return the words for what parameters of ours hold: the sizes as a configuration has them, and the cameras."""
    shapes, words = {name: array.shape for name, array in ours.items() if name != POSE}, []
    if shapes:
        said = ", ".join(f"{key}: {value}" for key, value in sizes(shapes).items()).replace("'", "")
        words.append(f"network: {{{said}}}")
    return ", ".join(words + ([f"{len(ours[POSE])} cameras"] if POSE in ours else []))


# --- names and shapes -------------------------------------------------------------------------------------------------

def sizes(shapes):
    """Return {"width", "feature", "layers"} of the network whose parameters have these shapes, {our name: shape}, and
    where its renderer is not given all inputs, "without".

    Whether all shapes fit is for the caller. Raises ValueError, KeyError or IndexError where a bias is not there.
    """
    layers = min(max(int(name.split("/")[1]) for name in shapes if name.startswith("implicit/")) + 1, len(shapes))
    found = {"width": int(shapes["implicit/0/b"][0]), "feature": int(shapes[f"implicit/{layers - 1}/b"][0]) - 1,
             "layers": layers}
    without = left_out(found["feature"], shapes.get("rendering/0/v", ()))
    return {**found, "without": without} if without else found


def left_out(feature, shape):
    """Return which inputs a renderer whose first layer has this shape is not given, as a list; [] where none or several
    choices would explain the shape."""
    inputs = architecture.renderer_inputs(settings.Network(feature=feature))
    subsets = [names for count in range(4) for names in itertools.combinations(architecture.OPTIONAL_INPUTS, count)
               if len(shape) == 2 and sum(inputs.values()) - sum(inputs[name] for name in names) == shape[0]]
    return list(subsets[0]) if len(subsets) == 1 else []


def their_name(name):
    """Return the authors' name of our network parameter `name`, such as implicit/0/v."""
    scope, layer, part = name.split("/")
    return f"{scope}_network.lin{layer}.{THEIR_PARTS[part]}"


def our_name(name):
    """Return our name of the authors' network parameter `name`, or None for another."""
    fits = re.fullmatch(r"(implicit|rendering)_network\.lin(\d{1,4})\.(bias|weight_g|weight_v)", name)
    return f"{fits.group(1)}/{int(fits.group(2))}/{fits.group(3)[-1].replace('s', 'b')}" if fits else None


def their_shape(name, shape):
    """Return the shape that our network parameter `name` of `shape` has with the authors."""
    return {"v": shape[::-1], "g": shape + (1,), "b": shape}[name[-1]]


def wanted_shapes(path, shapes):
    """Return {our name: shape} of all parameters of the network that has these shapes, {our name: shape}.

    Raises UserError where its sizes are none that a configuration may have.
    """
    try:
        found = sizes(shapes)
    except (ValueError, KeyError, IndexError) as error:
        raise UserError(f"{path}: holds no networks of IDR's, or not all of their layers") from error
    return architecture.parameter_shapes(settings.check_network(path, found))


def check_shapes(path, found, wanted):
    """Raise UserError unless `found` has just the names and shapes of `wanted`, both {name: shape}."""
    for name in wanted:
        if name not in found:
            raise UserError(f"{path}: {name} is missing; another architecture than IDR's with weight normalisation")
        if tuple(found[name]) != tuple(wanted[name]):
            raise UserError(f"{path}: {name} is {tuple(found[name])}, in IDR with these layers it is "
                            f"{tuple(wanted[name])}" + why_inputs_differ(name, found[name], wanted[name]))
    for name in found:
        if name not in wanted:
            raise UserError(f"{path}: {shown(name)} has no place in IDR's networks; another architecture")


def why_inputs_differ(name, found, wanted):
    """Return a guess at the option behind a first layer's wrong number of inputs, or ""."""
    if len(found) != 2 or found[0] != wanted[0]:
        return ""
    encoded = 6 * (architecture.POSITION_BANDS if name.startswith("implicit") else architecture.VIEW_BANDS)
    return " (no positional encoding)" if wanted[1] - found[1] == encoded else ""


def our_parameters(path, tree, buffers):
    """Return {our name: array float32} of a checkpoint of theirs, as read_checkpoint gives it.

    Raises UserError for another architecture, and for anything else that is no model or cameras of IDR's.
    """
    tree = tree if isinstance(tree, dict) else {}
    state = tree.get("model_state_dict", tree.get("pose_vecs_state_dict", tree))
    state = state if isinstance(state, dict) else {}
    tensors = {name: tensor for name, tensor in state.items() if type(name) is str and type(tensor) is Tensor}
    if not tensors:
        raise UserError(f"{path}: holds no model_state_dict (ModelParameters) or pose_vecs_state_dict (CamParameters)")
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    if set(shapes) in ({"weight"}, {"pose_vecs.weight"}):
        names = {POSE: next(iter(shapes))}
        check_pose(f"{path}: {names[POSE]}", shapes[names[POSE]])
    else:
        wanted = wanted_shapes(path, {our_name(name): shape[::-1] for name, shape in shapes.items() if our_name(name)})
        check_shapes(path, shapes, {their_name(name): their_shape(name, shape) for name, shape in wanted.items()})
        names = {name: their_name(name) for name in wanted}
    claimed = sum(np.dtype(tensor.storage.dtype).itemsize * math.prod(tensor.shape) for tensor in tensors.values())
    if claimed > sum(len(buffer) for buffer in buffers.values()):   # strides of 0, or many tensors of one storage
        raise UserError(f"{path}: has tensors of more numbers than it holds; the file is damaged")
    ours = {}
    for name, theirs in names.items():
        array = as_array(tensors[theirs], buffers)
        array = array.T if name.endswith("/v") else array[:, 0] if name.endswith("/g") else array
        with np.errstate(over="ignore"):
            ours[name] = np.ascontiguousarray(array, np.float32)
        if not np.isfinite(ours[name]).all():
            raise UserError(f"{path}: {theirs} has values that are not finite; take an earlier checkpoint")
    return ours


def their_parameters(path, ours):
    """Return their two state dicts, {their name: array float32}, of our parameters: the networks' and the cameras'.

    Either may be empty. Raises UserError where `ours`, from `path`, is no model of ours.
    """
    shapes = {name: array.shape for name, array in ours.items() if name != POSE}
    if shapes or POSE not in ours:
        check_shapes(path, shapes, wanted_shapes(path, shapes))
    check_parameters(path, ours, shapes)
    ours = {name: array.astype(np.float32, copy=False) for name, array in ours.items()}
    cameras, models = {"weight": ours[POSE]} if POSE in ours else {}, {}
    for name in sorted(shapes, key=lambda name: (name.split("/")[0], int(name.split("/")[1]), name)):
        array = ours[name].T if name.endswith("/v") else ours[name]
        models[their_name(name)] = np.ascontiguousarray(array).reshape(their_shape(name, ours[name].shape))
    return models, cameras


# --- reading what torch.save wrote ------------------------------------------------------------------------------------

class Storage(NamedTuple):
    key: str
    dtype: str      # NumPy's name
    count: int      # numbers in it


class Tensor(NamedTuple):
    storage: Storage
    offset: int     # in numbers
    shape: Tuple[int, ...]
    stride: Tuple[int, ...]


class Called(str):
    """A function or type that a pickle names, as "module name"; a mere text is none."""


def rebuilt_tensor(storage, offset, shape, stride, *_):
    """What torch._utils._rebuild_tensor_v2 makes, as a Tensor; what follows the stride says how to train it."""
    if type(storage) is not Storage or type(shape) is not tuple or type(stride) is not tuple \
            or len(shape) != len(stride) or len(shape) > 8 or not all(map(is_count, (offset,) + shape + stride)):
        raise UserError("has a tensor that is none; the file is damaged")
    last = offset + sum((n - 1) * step for n, step in zip(shape, stride))
    if 0 not in shape and last >= storage.count:
        raise UserError(f"has a tensor of shape {shown(shape)} that reaches beyond its {storage.count} numbers")
    return Tensor(storage, offset, shape, stride)


def is_count(value):
    """Whether a value is a whole number from 0 that a computer counts with."""
    return type(value) is int and 0 <= value < 2 ** 63


# All that a checkpoint may name; each is a function of ours, or the type of a storage's numbers.
FUNCTIONS = {"collections OrderedDict": lambda: {}, "torch._utils _rebuild_tensor_v2": rebuilt_tensor,
             "torch._utils _rebuild_parameter": lambda tensor, *_: tensor}
STORAGES = {"torch FloatStorage": "<f4", "torch DoubleStorage": "<f8", "torch HalfStorage": "<f2"}

# The instructions that PyTorch writes into a pickle, where more than one does the same to our stack.
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
WITH_VALUE = ("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE")
EMPTY = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple}
TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


class Nesting:
    """How deep the dicts, lists and tuples of a pickle nest, which stays below MOST_NESTED.

    Python goes into values that nest by recursion, as to hash or to compare them, and at some depth crashes.
    """

    def __init__(self):
        self.known, self.within = {}, set()     # id of a value: (the value, which so keeps its id, its depth)

    def put(self, holder, values):
        """Note that `values` are now in `holder`, and return it; UserError where that nests too deep.

        What is in another value may not change any more, or the depth of that would; torch.save fills it before.
        """
        depth = self.known.get(id(holder), (None, 1))[1]
        for value in values:
            if type(value) in (dict, list, tuple):
                depth = max(depth, 1 + self.known.setdefault(id(value), (value, 1))[1])
                self.within.add(id(value))
        if values and id(holder) in self.within:
            raise UserError("changes a dict or list that is in another already; it is no checkpoint of a model")
        if depth > MOST_NESTED:
            raise UserError(f"nests values more than {MOST_NESTED} deep; it is no checkpoint of a model")
        self.known[id(holder)] = holder, depth
        return holder


def read_pickle(file):
    """Read the pickle at the position of a binary file: what it holds and {key: Storage} of all its storages.

    Only the instructions here are known, and they can only fill dicts, lists and tuples and call FUNCTIONS. Raises
    UserError, without the file's name, at any other and at too many; any exception where the pickle is damaged.
    """
    stack, marks, memo, storages, nesting = [], [], {}, {}, Nesting()

    def take_off(start):
        taken = stack[start:]
        del stack[start:]
        return taken

    for number, (instruction, value, _) in enumerate(pickletools.genops(file)):
        name = instruction.name
        if number == MOST_INSTRUCTIONS:
            raise UserError(f"has more than {MOST_INSTRUCTIONS} instructions; it is no checkpoint of a model")
        if name in WITH_VALUE:
            stack.append(value)
        elif name in CONSTANTS:
            stack.append(CONSTANTS[name])
        elif name in EMPTY:
            stack.append(EMPTY[name]())
        elif name in TUPLES:
            items = take_off(len(stack) - TUPLES[name])
            stack.append(nesting.put(tuple(items), items))
        elif name == "MARK":
            marks.append(len(stack))
        elif name == "TUPLE":
            items = take_off(marks.pop())
            stack.append(nesting.put(tuple(items), items))
        elif name in ("BINPUT", "LONG_BINPUT"):
            memo[value] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[value])
        elif name in ("SETITEM", "SETITEMS"):
            items = take_off(marks.pop() if name == "SETITEMS" else len(stack) - 2)
            if not all(type(key) is str or is_count(key) for key in items[::2]):
                raise UserError("has a dict whose keys are neither texts nor small numbers; it is no model's")
            dict.update(nesting.put(stack[-1], items[1::2]), zip(items[::2], items[1::2]))
        elif name in ("APPEND", "APPENDS"):
            items = take_off(marks.pop() if name == "APPENDS" else len(stack) - 1)
            list.extend(nesting.put(stack[-1], items), items)
        elif name == "GLOBAL":
            if value not in FUNCTIONS and value not in STORAGES:
                raise UserError(f"asks for {shown(value.replace(' ', '.'))}, which no model needs; it was not run")
            stack.append(Called(value))
        elif name == "REDUCE":
            function, arguments = take_off(len(stack) - 2)
            if type(function) is not Called or type(arguments) is not tuple:
                raise UserError("calls what is no function; the file is damaged")
            stack.append(FUNCTIONS[function](*arguments))
        elif name == "BUILD":
            stack.pop()     # what it would set are attributes, such as a state dict's _metadata
        elif name == "BINPERSID":
            storage = named_storage(stack.pop())
            if storages.setdefault(storage.key, storage) != storage:
                raise UserError("describes one storage in two ways; the file is damaged")
            stack.append(storage)
        elif name not in ("PROTO", "STOP"):
            raise UserError(f"has the instruction {name}, which torch.save does not write; it was not run")
    result, = stack
    return result, storages


def named_storage(described):
    """Return the Storage that a pickle's persistent id describes; its device does not matter."""
    if type(described) is tuple and len(described) == 6 and described[5] is None:
        described = described[:5]       # the old form says that it is no view of another
    if type(described) is not tuple or len(described) != 5:
        raise UserError("has a storage that is none, or a view of another; the file is damaged or very old")
    kind, dtype, key, _, count = described
    if not (type(kind) is str and kind == "storage" and type(dtype) is Called and dtype in STORAGES
            and type(key) is str and is_count(count) and count <= MOST_BYTES):
        raise UserError("has a storage that is none; the file is damaged")
    return Storage(key, STORAGES[dtype], count)


def read_checkpoint(path):
    """Read what torch.save wrote to `path`, in its zip form or the old one, and run nothing.

    Returns what it holds, with a Tensor for each tensor, and {key: the bytes of a storage}; as_array joins the two.
    Raises UserError for a file that is neither, is damaged, or asks for anything but dicts and tensors.
    """
    helper.check_is_file(path)
    try:
        size = Path(path).stat().st_size
        if size > MOST_BYTES:
            raise UserError(f"has {size} bytes; a model of IDR's has no more than {MOST_BYTES}")
        data = Path(path).read_bytes()
        if data.startswith(b"PK\3\4"):
            return read_zip_form(data)
        if data.startswith(b"\x80\x02\x8a\x0a" + OLD_MAGIC.to_bytes(10, "little") + b"."):
            return read_old_form(data)
        raise UserError("is not what torch.save writes; give a .pth of ModelParameters or CamParameters")
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error
    except Exception as error:  # zipfile, struct, pickletools and the stack raise whatever the bytes lead them to
        raise UserError(f"{path}: is damaged or truncated; copy it again") from error


def read_zip_form(data):
    """Read the form that PyTorch writes since 1.6: a zip, not compressed, of data.pkl and one file per storage."""
    if data.count(b"PK\1\2") > MOST_FILES:     # one for each; zipfile would take them all in
        raise UserError(f"holds more than {MOST_FILES} files; a model of IDR's has fewer")
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        files = {info.filename: info for info in archive.infolist()}
    if sum(info.file_size for info in files.values()) > len(data):
        raise UserError("unpacks to more than it holds; torch.save does not compress")
    folder, = [name[:-len("data.pkl")] for name in files if name.endswith("/data.pkl")]
    if folder + "byteorder" in files and stored(data, files[folder + "byteorder"]) != b"little":
        raise UserError("was written on a big-endian machine; save it again on another")
    program = stored(data, files[folder + "data.pkl"])
    tree, storages = read_pickle(io.BytesIO(program[:MOST_PICKLED]))
    buffers = {key: stored(data, files[f"{folder}data/{key}"]) for key in storages}
    for key, storage in storages.items():
        if len(buffers[key]) != storage.count * np.dtype(storage.dtype).itemsize:
            raise UserError(f"has {len(buffers[key])} bytes for {storage.count} numbers; the file is damaged")
    return tree, buffers


def stored(data, info):
    """Return a file of a zip that is `data`, as a view of the bytes there; its directory says `info` of it."""
    if info.compress_type != zipfile.ZIP_STORED:
        raise UserError("is compressed; torch.save does not do so")
    name, extra = struct.unpack_from("<HH", data, info.header_offset + 26)
    start = info.header_offset + 30 + name + extra
    content = memoryview(data)[start:start + info.file_size]
    if zlib.crc32(content) != info.CRC:
        raise ValueError
    return content


def read_old_form(data):
    """Read the form of PyTorch before 1.6: five pickles, then for each storage its count (int64) and its numbers."""
    pickles, start = [], 0
    for _ in range(5):
        file = io.BytesIO(data[start:start + MOST_PICKLED])
        pickles.append(read_pickle(file))
        start += file.tell()
    (_, version, machine, tree, keys), storages = (found for found, _ in pickles), pickles[3][1]
    if type(keys) is not list or not all(type(key) is str for key in keys):
        raise UserError("does not say where its numbers are; the file is damaged")
    if version != OLD_VERSION or machine["little_endian"] is not True:
        raise UserError("is of another version, or of a big-endian machine; save it again with a newer PyTorch")
    buffers = {}
    for key in keys:
        count, = struct.unpack_from("<q", data, start)
        size = count * np.dtype(storages[key].dtype).itemsize
        if count != storages[key].count or start + 8 + size > len(data):
            raise UserError(f"has no {storages[key].count} numbers where it says so; the file is damaged or truncated")
        buffers[key] = memoryview(data)[start + 8:start + 8 + size]
        start += 8 + size
    if buffers.keys() != storages.keys():
        raise UserError("lacks numbers of some tensors; the file is damaged or truncated")
    return tree, buffers


def as_array(tensor, buffers):
    """Return the numbers of a Tensor as an array that shares the storage's memory."""
    dtype = np.dtype(tensor.storage.dtype)
    numbers = np.frombuffer(buffers[tensor.storage.key], dtype)
    return np.lib.stride_tricks.as_strided(numbers[tensor.offset:], tensor.shape,
                                           [step * dtype.itemsize for step in tensor.stride], writeable=False)


def shown(value):
    """Return something of a file's for an error's one line, cut where it is long."""
    text = value if isinstance(value, str) and value.isprintable() else repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


# --- writing what torch.load reads ------------------------------------------------------------------------------------

def pickled(value, arrays, old_form):
    """Return the instructions that make `value` of dicts, lists, str, bool, int and float32 arrays, as PyTorch's do.

    arrays: a list that each array is appended to; its number there is its storage's key.
    """
    def all_of(values):
        return b"".join(pickled(v, arrays, old_form) for v in values)

    if isinstance(value, bool):
        return b"\x88" if value else b"\x89"
    if isinstance(value, int):
        size = value.bit_length() // 8 + 1
        return struct.pack("<ci", b"J", value) if size <= 4 else bytes([0x8A, size]) + value.to_bytes(size, "little")
    if isinstance(value, str):
        return struct.pack("<cI", b"X", len(value.encode())) + value.encode()
    if isinstance(value, tuple):
        return b"(" + all_of(value) + b"t"
    if isinstance(value, list):
        return b"](" + all_of(value) + b"e"
    if isinstance(value, dict):
        return b"}(" + all_of(part for item in value.items() for part in item) + b"u"
    arrays.append(value)
    strides = tuple(step // value.itemsize for step in value.strides)
    return (b"ctorch._utils\n_rebuild_tensor_v2\n((" + pickled("storage", arrays, old_form) + b"ctorch\nFloatStorage\n"
            + all_of((str(len(arrays) - 1), "cpu", value.size)) + (b"NtQ" if old_form else b"tQ")
            + all_of((0, value.shape, strides, False)) + b"ccollections\nOrderedDict\n)RtR")


def write_checkpoint(path, tree, old_form):
    """Write a tree of dicts, int and float32 arrays to `path` as torch.save does, in the zip form or the old one."""
    arrays = []
    with open(path, "wb") as file:
        if not old_form:
            write_zip_form(file, b"\x80\x02" + pickled(tree, arrays, old_form) + b".", arrays)
            return
        machine = {"protocol_version": OLD_VERSION, "little_endian": True,
                   "type_sizes": {"short": 2, "int": 4, "long": 4}}
        for value in (OLD_MAGIC, OLD_VERSION, machine, tree):
            file.write(b"\x80\x02" + pickled(value, arrays, old_form) + b".")
        file.write(b"\x80\x02" + pickled([str(number) for number in range(len(arrays))], [], old_form) + b".")
        for array in arrays:
            file.write(struct.pack("<q", array.size) + array.tobytes())


def write_zip_form(file, program, arrays):
    """Write the zip form to an open file: data.pkl, which is `program`, and the storages."""
    with zipfile.ZipFile(file, "w") as archive:
        files = [("data.pkl", program), ("byteorder", b"little")]
        files += [(f"data/{number}", array.tobytes()) for number, array in enumerate(arrays)]
        for name, content in files + [("version", b"3\n")]:
            info = zipfile.ZipInfo("archive/" + name)
            # PyTorch maps a file into memory, so it puts each storage at a multiple of 64 bytes, by an extra field.
            padding = -(file.tell() + 30 + len(info.filename) + 4) % 64
            info.extra = struct.pack("<2sH", b"FB", padding) + b"Z" * padding
            archive.writestr(info, content)


if __name__ == "__main__":
    helper.run(main)
