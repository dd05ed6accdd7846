"""Every key of a configuration, one line each: type, default, allowed values and meaning.

load_config checks files against these lines, and config/default.yaml is generated from them. To add a key, add its
line, run `python -m config.settings > config/default.yaml`, and explain the key in docs/configuration.md.
"""
import math
import re
from collections.abc import Hashable
from dataclasses import MISSING, asdict, dataclass, field, fields
from typing import List

import yaml

from config import old_form
from helper import SHORT, UserError, check_is_file

MOST_TEXT = 1 << 16     # bytes per configuration file; default.yaml has 3,000
MOST_STEPS = 10 ** 8
MOST_VIEWS = 100000
MOST_BANDS = 10         # of an encoding: with more, a hidden layer of 64 units has no room for an encoded point
OLD_NAMES = {"train.outline_rays": "train.outline_fraction"}    # {old: new}; old names still work, with a notice


# --- allowed values: pairs of a predicate and its description for messages --------------------------------------------

def between(least, most):
    return lambda v: least <= v <= most, f"between {least} and {most}"


def above_zero(most):
    return lambda v: 0 < v <= most, f"more than 0 and at most {most}"


def one_of(*names):
    return lambda v: v in names, " or ".join(names)


def any_of(*names):
    return lambda v: set(v) <= set(names), "any of " + " and ".join((", ".join(names[:-1]), names[-1]))


def path_of(what):
    """Allow paths whose parts have at most 200 bytes: file systems allow 255, and suffixes are added to some."""
    return (lambda v: v.strip() != "" and v.isprintable() and len(v) <= 1000
            and all(len(part.encode()) <= 200 for part in v.split("/")), what)


VIEWS = (lambda v: all(0 <= i < MOST_VIEWS for i in v), "indices of views, from 0")
MILESTONES = (lambda v: len(v) <= 64 and all(0 <= f <= 1 for f in v) and v == sorted(v),
              "at most 64 fractions of the run in ascending order, from 0 to 1")
FRACTION = (lambda v: 0 <= v < 1, "0 or more and less than 1")
INSIDE = (lambda v: 0 < v < 1, "between 0 and 1")


def key(default, allowed, says, optional=False):
    """Return the dataclass field of a key. A file may leave out an optional key, which then has its default."""
    value = {"default_factory": lambda: list(default)} if isinstance(default, list) else {"default": default}
    return field(**value, metadata={"allowed": allowed, "says": says, "optional": optional})


# --- the keys ---------------------------------------------------------------------------------------------------------
# Upper bounds lie far above useful values, and below those that no computer can handle.

@dataclass(frozen=True)
class Data:
    path: str = key("DTU/scan118", path_of("a folder"), "folder with image/, mask/, cameras.npz; names the run")
    downscale: int = key(1, between(1, 1000), "integer factor by which images are shrunk; cameras are adapted")
    cameras: str = key("cameras.npz", path_of("a file in the scene's folder"), "camera file in that folder", True)
    held_out_views: List[int] = key([], VIEWS, "indices of views to evaluate on, not to train on")


@dataclass(frozen=True)
class Network:
    width: int = key(512, between(64, 4096), "units per hidden layer, in both networks")
    feature: int = key(256, between(1, 1024), "length of the feature vector from the implicit network to the renderer")
    layers: int = key(9, between(2, 64), "affine layers of the implicit network")
    radius: float = key(0.6, INSIDE, "radius of the initial surface, a sphere; cameras must be outside it")
    position_bands: int = key(6, between(1, MOST_BANDS), "frequencies of the encoded point; fewer: smoother", True)
    view_bands: int = key(4, between(1, MOST_BANDS), "frequencies of the encoded view direction; fewer: calmer", True)
    without: List[str] = key([], any_of("normal", "view", "feature"), "inputs to withhold from the renderer", True)


@dataclass(frozen=True)
class Tracer:
    sphere_tracing_steps: int = key(10, between(0, 1000), "per ray and end, in renders; training samples instead")
    tolerance: float = key(5e-5, above_zero(1), "a point is on the surface if |sdf| is at most this")
    samples: int = key(100, between(2, 1000), "sdf samples per ray, if sphere tracing fails, and for the mask loss")
    refinement: str = key("secant", one_of("secant", "bisection"), "root finding in a bracket: secant or bisection")
    refinement_steps: int = key(8, between(0, 100), "maximum number of refinement steps")


@dataclass(frozen=True)
class Train:
    steps: int = key(98000, between(1, MOST_STEPS), "steps of the run; the paper's 2,000 epochs of 49 views")
    rays: int = key(2048, between(2, 65536), "pixels per step, divided evenly among its views")
    views_per_step: int = key(1, between(1, 1024), "views that a step takes its pixels from; 1 is the paper's", True)
    outline_fraction: float = key(0.0, FRACTION, "fraction of rays near outlines; weights keep the loss unbiased", True)
    learning_rate: float = key(1e-4, above_zero(100), "learning rate of Adam")
    adam_beta2: float = key(0.999, FRACTION, "Adam's memory of squared gradients; 0.999 is the paper's", True)
    learning_rate_halved_at: List[float] = key([0.5, 0.75], MILESTONES, "fractions of the run at which it is halved")
    learning_rate_annealing: str = key("none", one_of("none", "cosine", "exponential"),
                                       "smooth fall over the run: none, cosine or exponential", True)
    learning_rate_end: float = key(0.05, above_zero(1), "fraction of the learning rate that annealing ends at", True)
    camera_learning_rate: float = key(0.0, between(0, 100), "learning rate of the cameras; 0: they are exact", True)
    alpha: float = key(50.0, above_zero(1000000), "sharpness of the soft mask, sigmoid(-alpha * sdf)")
    alpha_doubled_at: List[float] = key([0.125, 0.25, 0.375, 0.5, 0.625], MILESTONES,
                                        "fractions of the run at which it is doubled")
    mask_weight: float = key(100.0, between(0, 1000000), "weight of the mask loss")
    missed_weight: float = key(1.0, between(0.001, 1000), "in it, of masked rays that miss; outside ones have 1", True)
    eikonal_weight: float = key(0.1, between(0, 1000000), "weight of the eikonal loss")
    least_slope: float = key(1e-6, between(1e-6, 1), "|n . v| of a hit, below which its derivative is held back", True)
    seed: int = key(0, between(0, 2 ** 32 - 1), "seed of the initial weights, the order of views and the pixels")
    models: int = key(20, between(1, 100000), "models to save, evenly over the run; the last after the last step")
    validations: int = key(40, between(1, 100000), "renders of a view to make, evenly over the run, to judge it by")
    validation_view: int = key(0, between(0, MOST_VIEWS - 1), "index of the view to render")
    validation_downscale: int = key(4, between(1, 1000), "integer factor by which the render is shrunk, to save time")


@dataclass(frozen=True)
class Extract:
    coarse_resolution: int = key(100, between(16, 512), "grid cells along the longest side, first pass")
    resolution: int = key(512, between(16, 1024), "grid cells along the longest side, second pass, for the mesh")


@dataclass(frozen=True)
class Configuration:
    data: Data
    network: Network
    tracer: Tracer
    train: Train
    extract: Extract


# Upper bounds of products of keys, which are about the numbers of weights, samples and activations.
MOST_TOGETHER = ((("network.width", "network.width", "network.layers"), 64 * 10 ** 6),
                 (("train.rays", "tracer.samples"), 16 * 10 ** 6),
                 (("train.rays", "network.width", "network.layers"), 500 * 10 ** 6))


def flat(conf) -> dict:
    """Return a Configuration as {"section.key": value}."""
    return {f"{section}.{name}": value for section, keys in asdict(conf).items() for name, value in keys.items()}


def default_of(item):
    """Return the default of a dataclass field."""
    return item.default if item.default is not MISSING else item.default_factory()


def keys_of(section) -> dict:
    """Return {name: dataclass field} of a section's keys."""
    return {item.name: item for item in fields(section)}


def optional_defaults() -> dict:
    """Return {"section.key": default} of all optional keys."""
    return {f"{section.name}.{item.name}": default_of(item) for section in fields(Configuration)
            for item in fields(section.type) if item.metadata["optional"]}


def earlier(values, num_views) -> dict:
    """Return {"section.key": value} of an earlier run, as flat gives it, in today's keys.

    num_views: the steps per epoch of a run that counted in epochs.
    """
    train = {name.split(".")[1]: value for name, value in values.items() if name.startswith("train.")}
    new = {f"train.{name}": value for name, value in old_form.converted(train, num_views).items()}
    kept = {OLD_NAMES.get(name, name): value for name, value in values.items()}
    return {**optional_defaults(), **new, **kept}


# --- reading ----------------------------------------------------------------------------------------------------------

class ConfigLoader(yaml.SafeLoader):
    """A loader of safe YAML that reads 1e-4 as a number (as YAML 1.2 does, and 1.1 does not) and refuses aliases and
    duplicate keys."""

    def compose_node(self, parent, index):
        if self.check_event(yaml.AliasEvent):       # a few nested aliases can expand to gigabytes
            raise yaml.composer.ComposerError(problem="a configuration has no aliases; write out what * stands for",
                                              problem_mark=self.peek_event().start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key_node, _ in node.value:
            name = self.construct_object(key_node, deep=True)
            hashable = isinstance(name, Hashable)       # SafeLoader refuses other keys below
            if hashable and name in seen:
                raise yaml.constructor.ConstructorError(problem=f"the key {SHORT.repr(name)} is given twice",
                                                        problem_mark=key_node.start_mark)
            if hashable:
                seen.add(name)
        return super().construct_mapping(node, deep)


ConfigLoader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"^[-+]?\d+(\.\d*)?[eE][-+]?\d+$"),
                                   list("-+0123456789"))


def load_config(path, changes=()) -> Configuration:
    """Read and check a configuration file.

    changes: words of the command line's --set, such as "train.steps=4000", which replace what the file says.
    Raises UserError if the file cannot be read, or if a key is unknown, missing, of the wrong type or out of range.
    """
    changed = read_changes(changes)
    tree = read_yaml(path)
    check_keys(path, "", tree, {section.name: None for section in fields(Configuration)})
    old_form.check(path, tree)
    sections = {}
    for section in fields(Configuration):
        found = renamed(path, section.name, tree[section.name])
        new = {name.split(".")[1]: value for name, value in changed.items() if name.startswith(f"{section.name}.")}
        items = keys_of(section.type)
        check_keys(path, section.name, {**found, **new} if isinstance(found, dict) else found, items)
        sections[section.name] = section.type(**{
            name: check_value(f"{'--set' if name in new else f'{path}:'} {section.name}.{name}", value, items[name])
            for name, value in {**found, **new}.items()})
    conf = Configuration(**sections)
    check_products(path, flat(conf))
    return conf


def read_changes(changes) -> dict:
    """Return the words of --set, such as "train.steps=4000", as {"section.key": value as YAML}; the last one counts.

    The value of a key that is a text is taken as it is. Raises UserError for an unknown key, and if YAML fails.
    """
    items = {f"{section.name}.{name}": item for section in fields(Configuration)
             for name, item in keys_of(section.type).items()}
    found = {}
    for word in changes:
        name, equals, text = word.partition("=")
        name = OLD_NAMES.get(name.strip(), name.strip())
        if not equals or name not in items:
            raise UserError(f"--set {SHORT.repr(word)}: write section.key=value, such as train.steps=4000; "
                            "config/default.yaml has the keys")
        try:
            found[name] = text.strip() if items[name].type is str else yaml.load(text, Loader=ConfigLoader)
        except Exception as error:
            raise UserError(f"--set {name}: {SHORT.repr(text)} is not valid YAML; write it as in a configuration, "
                            "lists as [0.5, 0.75]") from error
    return found


def read_yaml(path):
    """Return the parsed content of a YAML file. Raises UserError if it cannot be read or parsed, or is too large."""
    check_is_file(path)
    try:
        with open(str(path), "rb") as file:
            content = file.read(MOST_TEXT + 1)
        if len(content) > MOST_TEXT:
            raise UserError(f"{path}: has more than {MOST_TEXT} bytes, so it is not a configuration")
        text = content.decode()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not a text file"
        raise UserError(f"{path}: cannot read the configuration ({reason})") from error
    try:
        return yaml.load(text, Loader=ConfigLoader)
    except Exception as error:      # PyYAML may raise any exception if a tag and its value do not match
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        problem = (getattr(error, "problem", None) or "cannot be parsed")[:200]
        raise UserError(f"{path}{where}: not valid YAML ({problem})") from error


def renamed(path, section, found):
    """Return the mapping of a section with OLD_NAMES replaced; print a notice for each."""
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
    """Raise UserError unless `found` is a mapping with the keys of `items`, {name: field or None}, and no others.

    Keys with an optional field may be missing.
    """
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
    """Return `value` in the type of the dataclass field `item`. Raises UserError for a wrong type or value."""
    kinds = {int: "a whole number", float: "a number", str: "a text", List[int]: "a list of whole numbers",
             List[float]: "a list of numbers", List[str]: "a list of texts"}
    if item.type in (List[int], List[str]):
        fits = isinstance(value, list) and all(type(v) is item.type.__args__[0] for v in value)
    elif item.type is List[float]:
        fits = isinstance(value, list) and all(type(v) in (int, float) and abs(v) < 1e300 for v in value)
    elif item.type is float:
        fits = type(value) in (int, float) and abs(value) < 1e300       # neither infinite nor NaN
    else:
        fits = type(value) is item.type
    if not fits:
        raise UserError(f"{where} must be {kinds[item.type]}, not {SHORT.repr(value)}")
    allowed, says = item.metadata["allowed"]
    if not allowed(value):
        raise UserError(f"{where} must be {says}, not {SHORT.repr(value)}")
    if item.type is float:
        return float(value)
    return [float(v) for v in value] if item.type is List[float] else value


def check_network(where, sizes) -> Network:
    """Return the Network with `sizes` {key: value}. Raises UserError if a configuration could not have them."""
    items = keys_of(Network)
    net = Network(**{name: check_value(f"{where}: the network's {name}", value, items[name])
                     for name, value in sizes.items()})
    check_products(where, {f"network.{name}": value for name, value in asdict(net).items()})
    return net


def check_products(where, values):
    """Raise UserError if a product of `values`, {"section.key": number}, exceeds MOST_TOGETHER, or views lack rays.

    Products with a key that is missing in `values` are not checked.
    """
    for keys, most in MOST_TOGETHER:
        product = math.prod(values[name] for name in keys) if values.keys() >= set(keys) else 0
        if product > most:
            raise UserError(f"{where}: {' * '.join(keys)} must be at most {most:,}, not {product:,}; lower one of them")
    if values.get("train.views_per_step", 0) > values.get("train.rays", 0):
        raise UserError(f"{where}: train.views_per_step is {values['train.views_per_step']}, but a step has "
                        f"{values['train.rays']} rays (train.rays); lower it to that number or less")


# --- writing ----------------------------------------------------------------------------------------------------------

INTRODUCTION = """\
# IDR on a DTU scan, with the paper's settings. Copy this file and change what you need. Every key is required, except
# those marked as optional. config/settings.py generates this file, and lists the allowed values of each key.
"""


def as_yaml(conf=None, introduction=INTRODUCTION) -> str:
    """Return a Configuration as a file with the meaning of every key; without one, the text of config/default.yaml."""
    text = introduction
    for section in fields(Configuration):
        text += f"\n{section.name}:\n"
        for item in fields(section.type):
            value = default_of(item) if conf is None else getattr(getattr(conf, section.name), item.name)
            optional = " (optional)" if item.metadata["optional"] else ""
            text += f"  {item.name + ': ' + shown(value):<24}  # {item.metadata['says']}{optional}\n"
    return text


def shown(value) -> str:
    """Return a value of a configuration as YAML on one line, which load_config reads as the same value."""
    if isinstance(value, list):
        return f"[{', '.join(map(shown, value))}]"
    if isinstance(value, float):    # YAML 1.1 requires the decimal point in 5.0e-05
        short = f"{value:g}" if value == 0 or 0.01 <= value < 1e6 else f"{value:.1e}"
        return short if float(short) == value else repr(value)
    if isinstance(value, str):
        plain = yaml.safe_dump([value], default_flow_style=True, allow_unicode=True, width=1 << 16).strip()
        return plain[1:-1]
    return str(value)


if __name__ == "__main__":
    print(as_yaml(), end="")
