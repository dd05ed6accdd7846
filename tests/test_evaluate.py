"""PSNR and the Chamfer distance, on cases with a known answer."""
import numpy as np
import pytest
import trimesh

import evaluate
import helper


def test_psnr_counts_the_masked_pixels_alone():
    truth = np.zeros((4, 5, 3))
    image, mask = truth.copy(), np.zeros((4, 5), bool)
    mask[1, 2:4] = True
    image[1, 2] = 0.1           # half of the masked pixels are off by 0.1
    image[0, 0] = 1.0           # outside the mask
    error = evaluate.squared_error(image, truth, mask)
    assert evaluate.psnr(error) == pytest.approx(-10 * np.log10(0.01 / 2))


def test_psnr_over_views_is_over_their_pixels():
    few = np.array([3 * 10 * 0.01, 3 * 10])
    many = np.array([0.0, 3 * 990])
    assert evaluate.psnr(few + many) == pytest.approx(-10 * np.log10(0.01 * 10 / 1000))


def test_chamfer_of_two_concentric_spheres_is_the_difference_of_their_radii(tmp_path):
    for name, radius in (("inner", 0.5), ("outer", 0.53)):
        trimesh.creation.icosphere(subdivisions=5, radius=radius).export(tmp_path / f"{name}.ply")
    found = evaluate.chamfer(*(evaluate.load_points(tmp_path / f"{name}.ply") for name in ("inner", "outer")))
    assert found.accuracy == pytest.approx(0.03, abs=2e-3)
    assert found.completeness == pytest.approx(0.03, abs=2e-3)


def test_chamfer_tells_missing_from_superfluous_surface():
    truth = np.array([[0.0, 0, 0], [1.0, 0, 0]])
    assert evaluate.chamfer(truth[:1], truth)[:3] == (0.0, 0.5, 0.25)
    assert evaluate.chamfer(truth, truth[:1])[:3] == (0.5, 0.0, 0.25)


@pytest.mark.parametrize("content", [b"", b"ply\nnonsense", b"\x00\x01\x02"])
def test_a_file_that_is_no_mesh_is_refused(tmp_path, content):
    path = tmp_path / "mesh.ply"
    path.write_bytes(content)
    with pytest.raises(helper.UserError, match="mesh.ply"):
        evaluate.load_points(path)
