import os
import signal
import sys

import hypothesis
import numpy as np
import pytest
import yaml

from commands import ROOT

sys.path.insert(0, str(ROOT))

SHARED = ROOT.parent / "shared"

# A job in a shell's background ignores interrupts, and one under nohup hang-ups. Its children, which tests interrupt,
# would inherit that.
for number, usual in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, usual)

# Profiles of the property tests: "few" tries the same few cases in every run; `make fuzz` takes "many".
hypothesis.settings.register_profile("few", max_examples=25, derandomize=True, deadline=None, database=None,
                                     suppress_health_check=list(hypothesis.HealthCheck))
hypothesis.settings.register_profile("many", max_examples=int(os.environ.get("FUZZ", 2000)), deadline=None,
                                     database=None, print_blob=True,
                                     suppress_health_check=list(hypothesis.HealthCheck))
hypothesis.settings.load_profile("few")


@pytest.hookimpl(tryfirst=True)     # before xdist reads the marks
def pytest_collection_modifyitems(items):
    """Keep the tests that share a module's fixture, and so its runs and scenes, in one worker; others run anywhere."""
    for item in items:
        fixtures = [fixture for found in item._fixtureinfo.name2fixturedefs.values() for fixture in found]
        if any(fixture.scope == "module" for fixture in fixtures):
            item.add_marker(pytest.mark.xdist_group(item.path.stem))


@pytest.fixture(scope="session", autouse=True)
def one_thread_of_blas():
    """Limit BLAS to one thread, as every script does: the kernels call it from a thread of their own on each core."""
    from backends import cpu_kernels
    cpu_kernels.limit_blas_threads()


@pytest.fixture(scope="session", params=sorted(path.stem for path in (ROOT / "tests" / "data").glob("*.npz")))
def reference(request):
    """Return the authors' results for a small trained network; in the second file, one ray grazes the surface."""
    with np.load(ROOT / "tests" / "data" / f"{request.param}.npz") as numbers:
        return dict(numbers)


class Given:
    """A random generator that returns these numbers."""

    def __init__(self, numbers):
        self.numbers = numbers

    def uniform(self, low, high, shape):
        assert self.numbers.shape == shape
        return self.numbers


def write_demo_config(path, changes, **sections):
    """Write config/demo.yaml with changed keys to `path`, and return the path.

    The tests' runs take the rays of one view per step, whatever the demo takes.
    sections: {section: {key: value}}; changes: {section__key: value}, applied last, None removes the key.
    """
    tree = yaml.safe_load((ROOT / "config" / "demo.yaml").read_text())
    tree["train"].update(views_per_step=1, rays=128, learning_rate=2.0e-3)
    for section, keys in sections.items():
        tree[section].update(keys)
    for name, value in changes.items():
        section, key = name.split("__")
        if value is None:
            del tree[section][key]
        else:
            tree[section][key] = value
    path.write_text(yaml.safe_dump(tree))
    return path


def link_scan65(folder, views, kinds):
    """Create a scene of some views of DTU's scan 65 in `folder`, with links to its pictures. Skip if it is missing.

    kinds: the matrices to keep in cameras.npz, "world" and "scale".
    """
    source = SHARED / "data" / "dtu_scan65"
    if not source.is_dir():
        pytest.skip("DTU's scan 65 (shared/data/dtu_scan65) is not there")
    arrays = {}
    with np.load(source / "cameras.npz") as stored:
        for new, view in enumerate(views):
            arrays.update({f"{kind}_mat_{new}": stored[f"{kind}_mat_{view}"] for kind in kinds})
    for name in ("image", "mask"):
        (folder / name).mkdir(parents=True)
        files = sorted((source / name).iterdir())
        for view in views:
            (folder / name / files[view].name).symlink_to(files[view])
    np.savez(folder / "cameras.npz", **arrays)


@pytest.fixture
def reference_network(reference):
    """Set nnabla's parameters to the reference network, and yield the authors' results."""
    import nnabla as nn
    nn.clear_parameters()
    for name in ("implicit", "rendering"):
        layer = 0
        while f"{name}_network/{layer}/v" in reference:
            v, g, b = (reference[f"{name}_network/{layer}/{part}"] for part in "vgb")
            for part, value in (("v", v.T), ("g", g[:, 0]), ("b", b)):
                variable = nn.Variable.from_numpy_array(np.ascontiguousarray(value), need_grad=True)
                nn.parameter.set_parameter(f"{name}/{layer}/{part}", variable)
            layer += 1
    yield reference
    nn.clear_parameters()
