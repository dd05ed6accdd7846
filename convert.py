"""Convert models between the PyTorch checkpoints of IDR's authors (.pth) and ours (.h5), without PyTorch.

    python convert.py ModelParameters/latest.pth --output scan65.h5
    python convert.py ModelParameters/latest.pth CamParameters/latest.pth --output scan65.h5
    python convert.py results_scan65/model_01999.h5 --output latest.pth

Parameters, with l the number of the layer; inputs and encodings have the same order in both:

    authors                                             shape       ours                        shape
    {implicit,rendering}_network.lin{l}.weight_v        (out, in)   {implicit,rendering}/{l}/v  (in, out)
    {implicit,rendering}_network.lin{l}.weight_g        (out, 1)    {implicit,rendering}/{l}/g  (out,)
    {implicit,rendering}_network.lin{l}.bias            (out,)      {implicit,rendering}/{l}/b  (out,)
    [pose_vecs.]weight (trained cameras)                (n, 7)      cameras/pose                (n, 7)

Ours are float32. training/cameras.py explains the rows of cameras.

A PyTorch checkpoint contains a pickle, which can run any code when it is loaded. Here no pickle is loaded. Its opcodes
are interpreted one by one; those that build dicts and tensors are supported, and files with any other are refused.
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

MOST_BYTES = 3 << 27    # per checkpoint, which is read into memory; the paper's networks have 12 MB
MOST_FILES = 10000      # per zip
# Per pickle: bytes, instructions and nesting depth. The paper's networks have 10,000, 1,500 and 3.
MOST_PICKLED, MOST_INSTRUCTIONS, MOST_NESTED = 1 << 18, 100000, 8
OLD_MAGIC = 0x1950A86A20F9469CFC6C      # at the start of the format before PyTorch 1.6
OLD_VERSION = 1001
THEIR_PARTS = {"b": "bias", "g": "weight_g", "v": "weight_v"}      # in the authors' order


def main():
    parser = argparse.ArgumentParser(description="Convert PyTorch checkpoints of IDR's authors to .h5, or back.")
    parser.add_argument("files", nargs="+", metavar="FILE",
                        help="a .pth of ModelParameters or CamParameters, one of each, or a model_*.h5")
    parser.add_argument("--output", required=True, help="file to write, .h5 or .pth; with .pth, trained cameras go to "
                                                        "a second file, {name}_cameras.pth")
    parser.add_argument("--old-form", action="store_true", help="write the .pth for PyTorch before 1.6")
    args = parser.parse_args()
    suffix = Path(args.output).suffix
    logger.setLevel("WARNING")      # nnabla logs the temporary files that it saves
    if suffix == ".h5" and args.old_form:
        raise UserError(f"--output {args.output}: --old-form applies to .pth only; leave it out")
    if suffix == ".h5":
        to_ours(args.files, args.output)
    elif suffix == ".pth" and len(args.files) == 1:
        to_theirs(args.files[0], args.output, args.old_form)
    elif suffix == ".pth":
        raise UserError(f"--output {args.output}: a .pth is made from one model, not {len(args.files)} files; name one")
    else:
        raise UserError(f"--output {args.output}: must end in .h5 (from their .pth) or in .pth (from our .h5)")


def to_ours(paths, output):
    """Convert the authors' checkpoints at `paths` (networks, cameras or both) to our model `output` (.h5)."""
    ours = {}
    for path in paths:
        found = our_parameters(path, *read_checkpoint(path))
        if not ours.keys().isdisjoint(found):
            raise UserError(f"{path}: the file before has the same parameters; name the ModelParameters and the "
                            "CamParameters of one run")
        ours.update(found)
    nn.clear_parameters()
    for name, array in ours.items():
        nn.parameter.set_parameter(name, nn.Variable.from_numpy_array(array, need_grad=True))
    checkpoints.save_model(output)
    print(f"{output}: {in_words(ours)}")


def to_theirs(path, output, old_form):
    """Convert our model at `path` (.h5) to the authors' checkpoint `output` (.pth), with cameras in a second file."""
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
    """Describe our parameters for a message: the network's keys in a configuration, and the number of cameras."""
    shapes, words = {name: array.shape for name, array in ours.items() if name != POSE}, []
    if shapes:
        said = ", ".join(f"{key}: {value}" for key, value in sizes(shapes).items()).replace("'", "")
        words.append(f"network: {{{said}}}")
    return ", ".join(words + ([f"{len(ours[POSE])} cameras"] if POSE in ours else []))


# --- names and shapes -------------------------------------------------------------------------------------------------

def sizes(shapes):
    """Return the network's sizes {"width", "feature", "layers"} from its parameters' shapes, {our name: shape}.

    Includes "position_bands", "view_bands" and "without" where they are not the paper's. The shapes are not checked for
    consistency. Raises ValueError, KeyError or IndexError if parameters are missing.
    """
    layers = min(max(int(name.split("/")[1]) for name in shapes if name.startswith("implicit/")) + 1, len(shapes))
    found = {"width": int(shapes["implicit/0/b"][0]), "feature": int(shapes[f"implicit/{layers - 1}/b"][0]) - 1,
             "layers": layers}
    bands = architecture.encoded_bands(int(shapes["implicit/0/v"][0]))
    if bands in range(1, settings.MOST_BANDS + 1) and bands != architecture.POSITION_BANDS:
        found["position_bands"] = bands
    return {**found, **other_inputs(found["feature"], int(shapes["rendering/0/v"][0]))}


def other_inputs(feature, columns):
    """Return {"view_bands", "without"}, those that are not the paper's, of a renderer with so many columns of input.

    Returns {} unless exactly one choice explains them. One with the paper's view_bands comes first, then one with all
    inputs.
    """
    subsets = [{"without": list(names)} for count in range(len(architecture.OPTIONAL_INPUTS) + 1)
               for names in itertools.combinations(architecture.OPTIONAL_INPUTS, count)]
    others = [{"view_bands": bands} for bands in range(1, settings.MOST_BANDS + 1) if bands != architecture.VIEW_BANDS]
    both = [{**bands, **subset} for bands in others for subset in subsets if "view" not in subset["without"]]
    for choices in (subsets, others, both):
        fits = [keys for keys in choices if columns == sum(
            architecture.renderer_inputs(settings.Network(feature=feature, **keys)).values())]
        if fits:
            return {key: value for key, value in fits[0].items() if value} if len(fits) == 1 else {}
    return {}


def their_name(name):
    """Return the authors' name of our parameter `name`, such as implicit/0/v."""
    scope, layer, part = name.split("/")
    return f"{scope}_network.lin{layer}.{THEIR_PARTS[part]}"


def our_name(name):
    """Return our name of the authors' parameter `name`, or None if it is not a parameter of IDR's networks."""
    fits = re.fullmatch(r"(implicit|rendering)_network\.lin(\d{1,4})\.(bias|weight_g|weight_v)", name)
    return f"{fits.group(1)}/{int(fits.group(2))}/{fits.group(3)[-1].replace('s', 'b')}" if fits else None


def their_shape(name, shape):
    """Return the shape in the authors' checkpoints of our parameter `name` with `shape`."""
    return {"v": shape[::-1], "g": shape + (1,), "b": shape}[name[-1]]


def wanted_shapes(path, shapes):
    """Return {our name: shape} of a complete network with the sizes that `shapes`, {our name: shape}, imply.

    Raises UserError if parameters are missing, or if no configuration can have these sizes.
    """
    try:
        found = sizes(shapes)
    except (ValueError, KeyError, IndexError) as error:
        raise UserError(f"{path}: holds no networks of IDR, or not all of their layers; use another file") from error
    return architecture.parameter_shapes(settings.check_network(path, found))


def check_shapes(path, found, wanted):
    """Raise UserError unless `found` and `wanted`, both {name: shape}, are the same."""
    for name in wanted:
        if name not in found:
            raise UserError(f"{path}: {name} is missing; another architecture than IDR's with weight normalisation")
        if tuple(found[name]) != tuple(wanted[name]):
            raise UserError(f"{path}: {name} is {tuple(found[name])}, but with these layers IDR's is "
                            f"{tuple(wanted[name])}" + why_inputs_differ(name, found[name], wanted[name]))
    for name in found:
        if name not in wanted:
            raise UserError(f"{path}: {shown(name)} does not exist in IDR's networks; another architecture")


def why_inputs_differ(name, found, wanted):
    """Return a likely reason for the wrong number of inputs of a first layer, or "". found, wanted: (out, in)."""
    if len(found) != 2 or found[0] != wanted[0]:
        return ""
    encoded = 6 * (architecture.POSITION_BANDS if name.startswith("implicit") else architecture.VIEW_BANDS)
    return " (no positional encoding)" if wanted[1] - found[1] == encoded else ""


def our_parameters(path, tree, buffers):
    """Convert an authors' checkpoint, as returned by read_checkpoint, to {our name: array float32}.

    Raises UserError for other architectures, values that are not finite, and anything but IDR's models and cameras.
    """
    tree = tree if isinstance(tree, dict) else {}
    state = tree.get("model_state_dict", tree.get("pose_vecs_state_dict", tree))
    state = state if isinstance(state, dict) else {}
    tensors = {name: tensor for name, tensor in state.items() if type(name) is str and type(tensor) is Tensor}
    if not tensors:
        raise UserError(f"{path}: holds no model_state_dict (ModelParameters) or pose_vecs_state_dict (CamParameters); "
                        "name one of these files")
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    if set(shapes) in ({"weight"}, {"pose_vecs.weight"}):
        names = {POSE: next(iter(shapes))}
        check_pose(f"{path}: {names[POSE]}", shapes[names[POSE]])
    else:
        wanted = wanted_shapes(path, {our_name(name): shape[::-1] for name, shape in shapes.items() if our_name(name)})
        check_shapes(path, shapes, {their_name(name): their_shape(name, shape) for name, shape in wanted.items()})
        names = {name: their_name(name) for name in wanted}
    claimed = sum(np.dtype(tensor.storage.dtype).itemsize * math.prod(tensor.shape) for tensor in tensors.values())
    if claimed > sum(len(buffer) for buffer in buffers.values()):   # strides of 0, or tensors that share a storage
        raise UserError(f"{path}: has tensors of more numbers than it holds; the file is damaged, use another")
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
    """Convert our parameters, {our name: array} from `path`, to the authors' two state dicts: networks and cameras.

    Both are {their name: array float32}, and either may be empty. Raises UserError if `ours` is not a model.
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
    """An array of numbers in a checkpoint, which tensors refer to."""
    key: str
    dtype: str      # of NumPy, such as "<f4"
    count: int      # of numbers


class Tensor(NamedTuple):
    """A view of a storage; offset and stride in numbers."""
    storage: Storage
    offset: int
    shape: Tuple[int, ...]
    stride: Tuple[int, ...]


class Called(str):
    """A function or type that a pickle refers to, "module name"; a class of its own, as strings are not callable."""


def rebuilt_tensor(storage, offset, shape, stride, *_):
    """Return the Tensor that torch._utils._rebuild_tensor_v2 would build; further arguments concern training.

    Raises UserError if an argument is invalid, or if the tensor exceeds its storage.
    """
    if type(storage) is not Storage or type(shape) is not tuple or type(stride) is not tuple \
            or len(shape) != len(stride) or len(shape) > 8 or not all(map(is_count, (offset,) + shape + stride)):
        raise UserError("has an invalid tensor; the file is damaged, use another")
    last = offset + sum((n - 1) * step for n, step in zip(shape, stride))
    if 0 not in shape and last >= storage.count:
        raise UserError(f"has a tensor of shape {shown(shape)} that exceeds its {storage.count} numbers; the file "
                        "is damaged, use another")
    return Tensor(storage, offset, shape, stride)


def is_count(value):
    """Return whether a value is an int in [0, 2^63)."""
    return type(value) is int and 0 <= value < 2 ** 63


# All names that a checkpoint may refer to: functions, replaced by ours, and types of storages, as NumPy dtypes.
FUNCTIONS = {"collections OrderedDict": lambda: {}, "torch._utils _rebuild_tensor_v2": rebuilt_tensor,
             "torch._utils _rebuild_parameter": lambda tensor, *_: tensor}
STORAGES = {"torch FloatStorage": "<f4", "torch DoubleStorage": "<f8", "torch HalfStorage": "<f2"}

# Groups of pickle opcodes that have the same effect on our stack.
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
WITH_VALUE = ("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE")
EMPTY = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple}
TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
FILLS = (*TUPLES, "TUPLE", "SETITEM", "SETITEMS", "APPEND", "APPENDS")
CALLS = ("GLOBAL", "REDUCE", "BINPERSID")


class Nesting:
    """Bounds the nesting depth of the dicts, lists and tuples of a pickle by MOST_NESTED.

    Python hashes, compares and prints nested values recursively, and crashes at some depth.
    """

    def __init__(self):
        self.known = {}         # {id of a value: (value, its depth)}; holding the value keeps its id unique
        self.within = set()     # ids of the values that are in another one

    def put(self, holder, values):
        """Record that `values` are now in `holder`, and return `holder`.

        Raises UserError if the nesting is too deep, or if `holder` is already in another value, whose depth would
        change unnoticed. torch.save fills values before it puts them into others.
        """
        depth = self.known.get(id(holder), (None, 1))[1]
        for value in values:
            if type(value) in (dict, list, tuple):
                depth = max(depth, 1 + self.known.setdefault(id(value), (value, 1))[1])
                self.within.add(id(value))
        if values and id(holder) in self.within:
            raise UserError("changes a dict or list that is already in another; it is not a checkpoint of a model")
        if depth > MOST_NESTED:
            raise UserError(f"nests values more than {MOST_NESTED} deep; it is not a checkpoint of a model")
        self.known[id(holder)] = holder, depth
        return holder


class Interpreter:
    """Interprets the opcodes of a pickle. They can only fill dicts, lists and tuples, and call FUNCTIONS."""

    def __init__(self):
        self.stack, self.marks, self.memo, self.nesting = [], [], {}, Nesting()
        self.storages = {}      # {key: Storage} of all storages that the pickle refers to

    def take_off(self, start):
        """Remove and return the top of the stack, from the index `start`."""
        taken = self.stack[start:]
        del self.stack[start:]
        return taken

    def run(self, name, argument):
        """Execute the opcode `name`. Raises UserError for unsupported ones; other exceptions for damaged pickles."""
        stack = self.stack
        if name in WITH_VALUE:
            stack.append(argument)
        elif name in CONSTANTS:
            stack.append(CONSTANTS[name])
        elif name in EMPTY:
            stack.append(EMPTY[name]())
        elif name == "MARK":
            self.marks.append(len(stack))
        elif name in ("BINPUT", "LONG_BINPUT"):
            self.memo[argument] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(self.memo[argument])
        elif name == "BUILD":
            stack.pop()     # attributes to set, such as the _metadata of a state dict
        elif name in CALLS:
            self.refer_or_call(name, argument)
        elif name in FILLS:
            self.fill_container(name)
        elif name not in ("PROTO", "STOP"):
            raise UserError(f"has the instruction {name}, which torch.save does not write; it was not run")

    def fill_container(self, name):
        """Execute an opcode of FILLS, which builds a tuple or fills a dict or list."""
        stack = self.stack
        if name in TUPLES or name == "TUPLE":
            items = self.take_off(self.marks.pop() if name == "TUPLE" else len(stack) - TUPLES[name])
            stack.append(self.nesting.put(tuple(items), items))
        elif name in ("SETITEM", "SETITEMS"):
            items = self.take_off(self.marks.pop() if name == "SETITEMS" else len(stack) - 2)
            if not all(type(key) is str or is_count(key) for key in items[::2]):
                raise UserError("has a dict whose keys are neither strings nor small integers; it is not a model's")
            dict.update(self.nesting.put(stack[-1], items[1::2]), zip(items[::2], items[1::2]))
        else:
            items = self.take_off(self.marks.pop() if name == "APPENDS" else len(stack) - 1)
            list.extend(self.nesting.put(stack[-1], items), items)

    def refer_or_call(self, name, argument):
        """Execute an opcode of CALLS, which refers to a function, type or storage, or calls a function."""
        stack = self.stack
        if name == "GLOBAL":
            if argument not in FUNCTIONS and argument not in STORAGES:
                raise UserError(f"asks for {shown(argument.replace(' ', '.'))}, which no model needs; it was not run")
            stack.append(Called(argument))
        elif name == "REDUCE":
            function, arguments = self.take_off(len(stack) - 2)
            if type(function) is not Called or type(arguments) is not tuple:
                raise UserError("calls something that is not a function; the file is damaged")
            stack.append(FUNCTIONS[function](*arguments))
        else:
            storage = named_storage(stack.pop())
            if self.storages.setdefault(storage.key, storage) != storage:
                raise UserError("describes one storage in two ways; the file is damaged")
            stack.append(storage)


def read_pickle(file):
    """Read the pickle at the position of a binary file. Return its value and {key: Storage} of all its storages.

    Raises UserError, without the file's name, for unsupported or too many instructions. Damaged pickles may raise any
    exception.
    """
    interpreter = Interpreter()
    for number, (instruction, argument, _) in enumerate(pickletools.genops(file)):
        if number == MOST_INSTRUCTIONS:
            raise UserError(f"has more than {MOST_INSTRUCTIONS} instructions; it is not a checkpoint of a model")
        interpreter.run(instruction.name, argument)
    result, = interpreter.stack
    return result, interpreter.storages


def named_storage(described):
    """Return the Storage that a persistent id of a pickle describes, whatever its device. Raises UserError."""
    if type(described) is tuple and len(described) == 6 and described[5] is None:
        described = described[:5]       # None, in the old format: not a view of another storage
    if type(described) is not tuple or len(described) != 5:
        raise UserError("has an invalid storage, or a view of another; the file is damaged or very old")
    kind, dtype, key, _, count = described
    if not (type(kind) is str and kind == "storage" and type(dtype) is Called and dtype in STORAGES
            and type(key) is str and is_count(count) and count <= MOST_BYTES):
        raise UserError("has an invalid storage; the file is damaged")
    return Storage(key, STORAGES[dtype], count)


def read_checkpoint(path):
    """Read a file of torch.save, in its zip format or the old one, without running any of its code.

    Returns its content, with a Tensor for each tensor, and {key: bytes of a storage}; see as_array.
    Raises UserError for other and damaged files, and for anything but dicts and tensors.
    """
    helper.check_is_file(path)
    try:
        size = Path(path).stat().st_size
        if size > MOST_BYTES:
            raise UserError(f"has {size} bytes; models of IDR have at most {MOST_BYTES}")
        data = Path(path).read_bytes()
        if data.startswith(b"PK\3\4"):
            return read_zip_form(data)
        if data.startswith(b"\x80\x02\x8a\x0a" + OLD_MAGIC.to_bytes(10, "little") + b"."):
            return read_old_form(data)
        raise UserError("is not what torch.save writes; name a .pth of ModelParameters or CamParameters")
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error
    except Exception as error:  # damaged bytes may raise any exception
        raise UserError(f"{path}: is damaged or truncated; copy it again") from error


def read_zip_form(data):
    """Read the format of PyTorch 1.6 and later: an uncompressed zip of data.pkl and one file per storage.

    Returns and raises as read_checkpoint does.
    """
    if data.count(b"PK\1\2") > MOST_FILES:     # one per file; checked before zipfile reads them all
        raise UserError(f"holds more than {MOST_FILES} files; models of IDR have fewer")
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        files = {info.filename: info for info in archive.infolist()}
    if sum(info.file_size for info in files.values()) > len(data):
        raise UserError("unpacks to more than it holds; torch.save does not compress")
    folder, = [name[:-len("data.pkl")] for name in files if name.endswith("/data.pkl")]
    if folder + "byteorder" in files and stored(data, files[folder + "byteorder"]) != b"little":
        raise UserError("was written on a big-endian machine; save it again on a little-endian one")
    program = stored(data, files[folder + "data.pkl"])
    tree, storages = read_pickle(io.BytesIO(program[:MOST_PICKLED]))
    buffers = {key: stored(data, files[f"{folder}data/{key}"]) for key in storages}
    for key, storage in storages.items():
        if len(buffers[key]) != storage.count * np.dtype(storage.dtype).itemsize:
            raise UserError(f"has {len(buffers[key])} bytes for {storage.count} numbers; the file is damaged")
    return tree, buffers


def stored(data, info):
    """Return a view of a file's bytes in the zip `data`; info: its ZipInfo. Raises UserError or ValueError."""
    if info.compress_type != zipfile.ZIP_STORED:
        raise UserError("is compressed, which torch.save does not do; save it again")
    name, extra = struct.unpack_from("<HH", data, info.header_offset + 26)
    start = info.header_offset + 30 + name + extra
    content = memoryview(data)[start:start + info.file_size]
    if zlib.crc32(content) != info.CRC:
        raise ValueError
    return content


def read_old_form(data):
    """Read the format before PyTorch 1.6: five pickles, then for each storage its count (int64) and its numbers.

    Returns and raises as read_checkpoint does.
    """
    pickles, start = [], 0
    for _ in range(5):
        file = io.BytesIO(data[start:start + MOST_PICKLED])
        pickles.append(read_pickle(file))
        start += file.tell()
    (_, version, machine, tree, keys), storages = (found for found, _ in pickles), pickles[3][1]
    if type(keys) is not list or not all(type(key) is str for key in keys):
        raise UserError("does not say where its numbers are; the file is damaged")
    if version != OLD_VERSION or machine["little_endian"] is not True:
        raise UserError("has another version, or is from a big-endian machine; save it again with a newer PyTorch")
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
    """Return a Tensor as a read-only array that shares the memory of its storage. buffers: {key: bytes}."""
    dtype = np.dtype(tensor.storage.dtype)
    numbers = np.frombuffer(buffers[tensor.storage.key], dtype)
    return np.lib.stride_tricks.as_strided(numbers[tensor.offset:], tensor.shape,
                                           [step * dtype.itemsize for step in tensor.stride], writeable=False)


def shown(value):
    """Return a value as printable text for a one-line message, cut to 80 characters."""
    text = value if isinstance(value, str) and value.isprintable() else repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


# --- writing what torch.load reads ------------------------------------------------------------------------------------

def pickled(value, arrays, old_form):
    """Return the pickle opcodes, as PyTorch writes them, of `value`: dicts, lists, tuples, str, bool, int and arrays.

    arrays: list to which each array (float32) is appended; its index is the key of its storage.
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
    """Write `tree`, of dicts, ints and float32 arrays, to `path` as torch.save does; old_form: before PyTorch 1.6."""
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
    """Write the zip format to an open binary file: `program` as data.pkl, and `arrays` as storages."""
    with zipfile.ZipFile(file, "w") as archive:
        files = [("data.pkl", program), ("byteorder", b"little")]
        files += [(f"data/{number}", array.tobytes()) for number, array in enumerate(arrays)]
        for name, content in files + [("version", b"3\n")]:
            info = zipfile.ZipInfo("archive/" + name)
            # PyTorch aligns files to 64 bytes by an extra field, so that storages can be mapped into memory.
            padding = -(file.tell() + 30 + len(info.filename) + 4) % 64
            info.extra = struct.pack("<2sH", b"FB", padding) + b"Z" * padding
            archive.writestr(info, content)


if __name__ == "__main__":
    helper.run(main)
