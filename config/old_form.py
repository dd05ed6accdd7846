"""Configurations of the earlier form, which counted in epochs: refused with the new keys and their own numbers."""
from pathlib import Path

from helper import UserError

# {old key of the section "train": the one in its place}
NEW_KEYS = {"epochs": "steps", "learning_rate_halved_after": "learning_rate_halved_at",
            "alpha_doubled_after": "alpha_doubled_at", "save_every": "models", "validate_every": "validations"}


def check(path, tree):
    """Raise UserError, with the keys to write instead, if a configuration `tree` {section: {key: value}} is old."""
    train = tree["train"]
    old = [name for name in NEW_KEYS if name in train] if isinstance(train, dict) else []
    if old:
        views = count_views(tree["data"])
        new = converted(train, views)
        if "steps" in new and views is None:
            new["steps"] = f"({new['steps']} times the number of training views)"
        says = ", ".join(f"{name}: {value}" for name, value in new.items()) or (
            f"{', '.join(NEW_KEYS[name] for name in old)}, as in config/default.yaml")
        raise UserError(f"{path}: a training counts in steps and in fractions of the run now, not in epochs; in place "
                        f"of {', '.join(old)} write {says}")


def converted(train, num_views):
    """Return the new keys {name: value} for the old ones in `train` {name: value}, without those of wrong values.

    num_views: of the training; None if unknown, and then "steps" has the number of epochs.
    """
    epochs = train.get("epochs")
    if not is_whole(epochs):
        return {}
    found = {"steps": epochs * (num_views or 1)}
    for old in ("learning_rate_halved_after", "alpha_doubled_after"):
        listed = train.get(old)
        if isinstance(listed, list) and all(is_whole(epoch, 0) for epoch in listed):
            found[NEW_KEYS[old]] = fractions([epoch for epoch in listed if epoch < epochs], epochs, found["steps"])
    for old in ("save_every", "validate_every"):
        if is_whole(train.get(old)):
            found[NEW_KEYS[old]] = max(round(epochs / train[old]), 1)
    return found


def fractions(milestones, epochs, steps):
    """Return the milestones, in epochs, as fractions of the run, with as few digits as lead to the same steps."""
    for digits in range(3, 12):
        found = [round(epoch / epochs, digits) for epoch in milestones]
        if all(int(f * steps + 0.5) == epoch * steps // epochs for f, epoch in zip(found, milestones)):
            break
    return found


def is_whole(value, least=1):
    """Return whether a value is a whole number of reasonable size."""
    return type(value) is int and least <= value <= 10 ** 9


def count_views(data):
    """Return the number of training views of the configuration's section `data`; None if the scene cannot be read."""
    import datasets  # imported here, as a configuration of today needs no scene
    try:
        count = len(datasets.picture_files(Path(data["path"]) / "image")[0])
        return len(set(range(count)) - set(data.get("held_out_views", []))) or None
    except (UserError, OSError, TypeError, KeyError, AttributeError, ValueError):
        return None
