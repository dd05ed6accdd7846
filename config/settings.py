"""Every key of a configuration, one line each: its type, its default, the values it may take, and what it means.

From these lines come the checks of load_config, the file config/default.yaml (`python -m config.settings >
config/default.yaml` writes it) and the keys that the documentation explains. To add a key, add its line, write the file
anew, and use it.
"""
import math
import re
from collections.abc import Hashable
from dataclasses import MISSING, asdict, dataclass, field, fields
from typing import List

import yaml

from helper import SHORT, UserError, check_is_file

MOST_TEXT = 1 << 16     # bytes of a configuration; ours have 3,000
MOST_EPOCHS = 100000    # the names of models have five digits
MOST_VIEWS = 100000
OLD_NAMES = {"train.outline_rays": "train.outline_fraction"}    # still read, with a notice


# --- the values that a key may take: a function that allows them, and the words for it --------------------------------

def between(least, most):
    return lambda v: least <= v <= most, f"between {least} and {most}"


def above_zero(most):
    return lambda v: 0 < v <= most, f"more than 0 and at most {most}"


def one_of(*names):
    return lambda v: v in names, " or ".join(names)


def any_of(*names):
    return lambda v: set(v) <= set(names), "any of " + " and ".join((", ".join(names[:-1]), names[-1]))


def path_of(what):
    """A name of files and folders, which systems hold to 255 bytes between two slashes."""
    return (lambda v: v.strip() != "" and v.isprintable() and len(v) <= 1000
            and all(len(part.encode()) <= 200 for part in v.split("/")), what)


VIEWS = (lambda v: all(0 <= i < MOST_VIEWS for i in v), "indices of views, from 0")
MILESTONES = (lambda v: len(v) <= 64 and all(0 <= e <= MOST_EPOCHS for e in v) and v == sorted(v),
              f"at most 64 epochs in ascending order, from 0 to {MOST_EPOCHS}")
FRACTION = (lambda v: 0 <= v < 1, "0 or more and less than 1")
INSIDE = (lambda v: 0 < v < 1, "between 0 and 1")


def key(default, allowed, says, optional=False):
    """A key of a section. An optional one may be missing in a file, and then has its default."""
    value = {"default_factory": lambda: list(default)} if isinstance(default, list) else {"default": default}
    return field(**value, metadata={"allowed": allowed, "says": says, "optional": optional})


# --- the keys ---------------------------------------------------------------------------------------------------------
# The upper bounds lie far beyond what is of use, and below what a computer cannot do at all.

@dataclass(frozen=True)
class Data:
    path: str = key("DTU/scan118", path_of("a folder"), "folder with image/, mask/, cameras.npz; names the run")
    downscale: int = key(1, between(1, 1000), "shrink the images by this whole factor; the cameras follow")
    cameras: str = key("cameras.npz", path_of("a file in the scene's folder"), "the cameras' file in that folder", True)
    held_out_views: List[int] = key([], VIEWS, "indices of the views to measure on and not to train on")


@dataclass(frozen=True)
class Network:
    width: int = key(512, between(64, 4096), "units per hidden layer, of both networks")
    feature: int = key(256, between(1, 1024), "length of the vector that the implicit network gives the renderer")
    layers: int = key(9, between(2, 64), "affine layers of the implicit network")
    radius: float = key(0.6, INSIDE, "of the initial surface, a sphere; the cameras must be outside it")
    without: List[str] = key([], any_of("normal", "view", "feature"), "inputs that the renderer does not get", True)


@dataclass(frozen=True)
class Tracer:
    sphere_tracing_steps: int = key(10, between(0, 1000), "of a render, from each end; training samples instead")
    tolerance: float = key(5e-5, above_zero(1), "|sdf| at which a point counts as on the surface")
    samples: int = key(100, between(2, 1000), "per ray, where sphere tracing leaves it open, and for the mask loss")
    refinement: str = key("secant", one_of("secant", "bisection"), "of a bracket: secant or bisection")
    refinement_steps: int = key(8, between(0, 100), "at most this many")


@dataclass(frozen=True)
class Train:
    epochs: int = key(2000, between(1, MOST_EPOCHS), "an epoch takes one step per training view")
    rays: int = key(2048, between(2, 65536), "pixels per step, all of one view")
    outline_fraction: float = key(0.0, FRACTION, "of the rays near the mask's outline, weighted to keep the loss", True)
    learning_rate: float = key(1e-4, above_zero(100), "of Adam")
    learning_rate_halved_after: List[int] = key([1000, 1500], MILESTONES, "epochs")
    camera_learning_rate: float = key(0.0, between(0, 100), "of the cameras' Adam; 0: cameras are exact", True)
    alpha: float = key(50.0, above_zero(1000000), "sharpness of the soft mask, sigmoid(-alpha * sdf)")
    alpha_doubled_after: List[int] = key([250, 500, 750, 1000, 1250], MILESTONES, "epochs")
    mask_weight: float = key(100.0, between(0, 1000000), "of the mask loss")
    eikonal_weight: float = key(0.1, between(0, 1000000), "of the eikonal loss")
    seed: int = key(0, between(0, 2 ** 32 - 1), "of the weights, the views' order and the pixels")
    save_every: int = key(100, between(1, MOST_EPOCHS), "epochs; a model is also saved after the last")
    validate_every: int = key(50, between(1, MOST_EPOCHS), "epochs; a view is also rendered after the last")
    validation_view: int = key(0, between(0, MOST_VIEWS - 1), "the view to render")
    validation_downscale: int = key(4, between(1, 1000), "render it smaller by this whole factor, to save time")


@dataclass(frozen=True)
class Extract:
    coarse_resolution: int = key(100, between(16, 512), "cells along the longest side, in the first pass")
    resolution: int = key(512, between(16, 1024), "the same in the second pass, which gives the mesh")


@dataclass(frozen=True)
class Configuration:
    data: Data
    network: Network
    tracer: Tracer
    train: Train
    extract: Extract


# What products of keys may come to: about as many weights, samples or activations.
MOST_TOGETHER = ((("network.width", "network.width", "network.layers"), 64 * 10 ** 6),
                 (("train.rays", "tracer.samples"), 16 * 10 ** 6),
                 (("train.rays", "network.width", "network.layers"), 500 * 10 ** 6))


def flat(conf) -> dict:
    """Return a Configuration as {"section.key": value}."""
    return {f"{section}.{name}": value for section, keys in asdict(conf).items() for name, value in keys.items()}


def default_of(item):
    """Return the default of a dataclass's field."""
    return item.default if item.default is not MISSING else item.default_factory()


def optional_defaults() -> dict:
    """Return {"section.key": value} of the keys that a file may leave out."""
    return {f"{section.name}.{item.name}": default_of(item) for section in fields(Configuration)
            for item in fields(section.type) if item.metadata["optional"]}


# --- reading ----------------------------------------------------------------------------------------------------------

class ConfigLoader(yaml.SafeLoader):
    """Safe YAML, with 1e-4 as a number (YAML 1.2 has it so, 1.1 calls it a text), and without aliases and double
    keys."""

    def compose_node(self, parent, index):
        if self.check_event(yaml.AliasEvent):       # a few lines of them spell out a text without end
            raise yaml.composer.ComposerError(problem="a configuration has no aliases; write out what * stands for",
                                              problem_mark=self.peek_event().start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key_node, _ in node.value:
            name = self.construct_object(key_node, deep=True)
            if isinstance(name, Hashable) and name in seen:
                raise yaml.constructor.ConstructorError(problem=f"the key {SHORT.repr(name)} is given twice",
                                                        problem_mark=key_node.start_mark)
            if isinstance(name, Hashable):       # SafeLoader refuses others
                seen.add(name)
        return super().construct_mapping(node, deep)


ConfigLoader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"^[-+]?\d+(\.\d*)?[eE][-+]?\d+$"),
                                   list("-+0123456789"))


def load_config(path) -> Configuration:
    """Read a configuration file.

    Raises UserError, naming the file and the key, for a file that cannot be read, and for a key that is unknown,
    missing, of the wrong type or out of range.
    """
    tree = read_yaml(path)
    check_keys(path, "", tree, {section.name: None for section in fields(Configuration)})
    sections = {}
    for section in fields(Configuration):
        found = renamed(path, section.name, tree[section.name])
        items = {item.name: item for item in fields(section.type)}
        check_keys(path, section.name, found, items)
        sections[section.name] = section.type(**{
            name: check_value(f"{path}: {section.name}.{name}", value, items[name]) for name, value in found.items()})
    conf = Configuration(**sections)
    check_products(path, flat(conf))
    return conf


def read_yaml(path):
    """Return what a YAML file holds; UserError where it is none, or too large."""
    check_is_file(path)
    try:
        with open(str(path), "rb") as file:
            content = file.read(MOST_TEXT + 1)
        if len(content) > MOST_TEXT:
            raise UserError(f"{path}: has more than {MOST_TEXT} bytes, so it is no configuration")
        text = content.decode()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not a text file"
        raise UserError(f"{path}: cannot read the configuration ({reason})") from error
    try:
        return yaml.load(text, Loader=ConfigLoader)
    except Exception as error:      # PyYAML raises nearly anything where a tag and its text do not fit
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        problem = (getattr(error, "problem", None) or "cannot be parsed")[:200]
        raise UserError(f"{path}{where}: not valid YAML ({problem})") from error


def renamed(path, section, found):
    """Return a section with OLD_NAMES replaced, and a notice for each."""
    if not isinstance(found, dict):
        return found
    for old, new in OLD_NAMES.items():
        old_section, old_name = old.split(".")
        new_name = new.split(".")[1]
        if old_section == section and old_name in found and new_name not in found:
            print(f"notice: {path}: {old} is called {new} now")
            found = {new_name if name == old_name else name: value for name, value in found.items()}
    return found


def check_keys(path, section, found, items):
    """Raise UserError unless `found` is a mapping with just the keys of items {name: field or None}, but for optional
    ones."""
    prefix = section + "." if section else ""
    if not isinstance(found, dict):
        raise UserError(f"{path}: {section or 'the file'} must be a mapping with the keys {', '.join(items)}")
    for name in found:
        if name not in items:
            plain = isinstance(name, str) and name.isidentifier() and len(name) <= 80
            named = f"{prefix}{name}" if plain else SHORT.repr(name)
            raise UserError(f"{path}: unknown key {named}; the keys here are {', '.join(items)}")
    for name, item in items.items():
        if name not in found and not (item and item.metadata["optional"]):
            raise UserError(f"{path}: the key {prefix}{name} is missing; see config/default.yaml")


def check_value(where, value, item):
    """Return `value` in the type of the dataclass's field `item`; UserError where it is of another, or not allowed."""
    kinds = {int: "a whole number", float: "a number", str: "a text", List[int]: "a list of whole numbers",
             List[str]: "a list of texts"}
    if item.type in (List[int], List[str]):
        fits = isinstance(value, list) and all(type(v) is item.type.__args__[0] for v in value)
    elif item.type is float:
        fits = type(value) in (int, float) and abs(value) < 1e300       # not infinite, not NaN
    else:
        fits = type(value) is item.type
    if not fits:
        raise UserError(f"{where} must be {kinds[item.type]}, not {SHORT.repr(value)}")
    value = float(value) if item.type is float else value
    allowed, says = item.metadata["allowed"]
    if not allowed(value):
        raise UserError(f"{where} must be {says}, not {SHORT.repr(value)}")
    return value


def check_network(where, sizes) -> Network:
    """Return the Network of some sizes {key: value}; UserError where they are none that a configuration may have."""
    items = {item.name: item for item in fields(Network)}
    net = Network(**{name: check_value(f"{where}: the network's {name}", value, items[name])
                     for name, value in sizes.items()})
    check_products(where, {f"network.{name}": value for name, value in asdict(net).items()})
    return net


def check_products(where, values):
    """Raise UserError where numbers of {"section.key": value} are together more than MOST_TOGETHER allows.

    A product of which a key is not in `values` is left out.
    """
    for keys, most in MOST_TOGETHER:
        product = math.prod(values[name] for name in keys) if values.keys() >= set(keys) else 0
        if product > most:
            raise UserError(f"{where}: {' * '.join(keys)} must be at most {most:,}, not {product:,}; lower one of them")


# --- writing ----------------------------------------------------------------------------------------------------------

INTRODUCTION = """\
# IDR on a DTU scan, with the paper's settings. Copy this file and change what you need. Every key must be there, but
# for those marked as optional. config/settings.py writes this file and has the values that each key may take.
"""


def as_yaml() -> str:
    """Return the text of config/default.yaml: every key with its default and what it means."""
    text = INTRODUCTION
    for section in fields(Configuration):
        text += f"\n{section.name}:\n"
        for item in fields(section.type):
            value = default_of(item)
            shown = str(value).replace("'", "")
            if isinstance(value, float):    # YAML 1.1 wants a point in 5.0e-05
                shown = f"{value:g}" if value == 0 or value >= 0.01 else f"{value:.1e}"
            optional = " (optional)" if item.metadata["optional"] else ""
            text += f"  {item.name + ': ' + shown:<24}  # {item.metadata['says']}{optional}\n"
    return text


if __name__ == "__main__":
    print(as_yaml(), end="")
