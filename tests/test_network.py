"""The networks, the differentiable hit and the losses: against the authors' numbers and against each other."""
import nnabla as nn
import nnabla.functions as F
import numpy as np
import pytest

import network


def relative_error(found, wanted):
    """The norm of the difference over the norm of what is wanted."""
    found, wanted = np.asarray(found, np.float64), np.asarray(wanted, np.float64)
    return np.linalg.norm(found - wanted) / np.linalg.norm(wanted)


BACKENDS = pytest.mark.parametrize("implicit", [network.implicit, network.implicit_graph], ids=["numpy", "graph"])


@BACKENDS
def test_sdf_feature_and_gradient_equal_the_original(reference_network, monkeypatch, implicit):
    monkeypatch.setattr(network, "on_cpu", lambda: implicit is network.implicit)
    x = nn.Variable.from_numpy_array(reference_network["probe_points"])
    sdf, feature, gradient = implicit(x, network.folded_weights("implicit"))
    F.sink(sdf, feature, gradient).forward()
    wanted = reference_network["probe_output"]
    assert relative_error(sdf.d, wanted[:, :1]) <= 1e-4
    assert relative_error(feature.d, wanted[:, 1:]) <= 1e-4
    assert relative_error(gradient.d, reference_network["probe_gradient"]) <= 1e-4


def test_evaluator_without_gradient_equals_the_original(reference_network):
    found = network.sdf_evaluator()(reference_network["probe_points"])
    assert relative_error(found, reference_network["probe_output"][:, 0]) <= 1e-4


def test_colors_equal_the_original(reference_network):
    hit = reference_network["hit"] & reference_network["object_mask"]
    rgb, _ = network.shade(reference_network["points"][hit], reference_network["ray_directions"][hit], chunk=100)
    assert relative_error(rgb * 2 - 1, reference_network["rgb"][hit]) <= 1e-4


def reference_step(reference, rows):
    """The training graph of the reference's step, `rows` of it for the surface, with its inputs set."""
    inside = reference["hit"] & reference["object_mask"]
    order = np.argsort(~inside, kind="stable")
    g = network.training_graph(len(order), rows, float(reference["mask_weight"]), float(reference["eikonal_weight"]))
    g["points"].d = np.concatenate([reference["points"][order], reference["eikonal_points"]])
    g["directions"].d = reference["ray_directions"][order][:rows]
    g["rgb"].d = reference["rgb_gt"][order][:rows]
    g["colored"].d = inside[order][:rows, None].astype(np.float32)
    g["object_mask"].d = reference["object_mask"][order][:, None].astype(np.float32)
    g["masked"].d = 1 - inside[order][:, None].astype(np.float32)
    g["alpha"].d = reference["alpha"]
    return g


@pytest.mark.parametrize("graph", [False, True], ids=["numpy", "graph"])
@pytest.mark.parametrize("padding", [0, 37])
def test_losses_and_their_gradient_equal_the_original(reference_network, monkeypatch, graph, padding):
    if graph:
        monkeypatch.setattr(network, "on_cpu", lambda: False)
    inside = reference_network["hit"] & reference_network["object_mask"]
    g = reference_step(reference_network, inside.sum() + padding)
    for parameter in nn.get_parameters().values():
        parameter.g = 0
    g["loss"].forward()
    g["loss"].backward()
    for ours, theirs in (("loss", "loss"), ("color", "rgb_loss"), ("mask", "mask_loss"), ("eikonal", "eikonal_loss")):
        assert float(g[ours].d) == pytest.approx(float(reference_network[theirs]), rel=1e-4)
    for name, parameter in nn.get_parameters().items():
        scope, layer, part = name.split("/")
        wanted = reference_network[f"grad/{scope}_network/{layer}/{part}"]
        assert relative_error(parameter.g, wanted.T.reshape(parameter.shape)) <= 1e-3, name
