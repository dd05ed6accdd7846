"""Test convert.py: files written by PyTorch, the authors' numbers after conversion, round trips, and hostile files."""
import base64
import os
import pickle
import struct
import subprocess
import sys
import tracemalloc
import warnings
import zipfile
import zlib

import h5py
import nnabla as nn
import numpy as np
import pytest

import convert
import datasets
import helper
import network
from backends import architecture
from commands import refused, run
from config import settings
from config.settings import Network
from conftest import ROOT, SHARED, link_scan65
from metrics import images
from rendering import pixels
from training import checkpoints

# {"epoch": 1999, "pose_vecs_state_dict": {"weight": columns 1 to 7 of 0, 1/8, 2/8, ..., 26/8 as (3, 9)}}
BY_PYTORCH = {
    "1.6 old form": (
        "c-n2yKX21O7zXh3pT>=$B|t%-E*Z@dK@?T#QZk?l=>(Lr+=33*KE+oVUtZt2RVzixR6(bH00u@zK0?0%d<0fDRwM=<r|N)&rJp6g_ujpaZ{e"
        "TE<)2Txzx#(@_8txv{)?Xh-g9D!=rP7-wQ(jhr94u#)utj34Pp%|rFO1VQdPN5EAl^x7)5t7Q_|{FWht0bn1~e=ZDDFhE8G_WzI5fN!$T3aX"
        "P9bA5f7W@dS=_NW+p2z=vyQ<+6cxfjL)pJE_F)gI&<V_2vw@gA(M??)w!xw{tPQI1&{VA6dmk5R(e`sa^_5(6$9BgUD{aI>Y&kOE}g2ZspZi"
        "yrcRQGsEvxwbgC%2+7j=UCUtMFiZQK<b@XhHwua-a?a}bbXgnHIcllS@tf821zI1fsHTQVHqcgh6yWBgYwU0#`Y2DGSed^gc-4<Q!knfdC^V"
        "FquXSse?pvY)rPWP5kt}pyP_pG%C?G3#p_P+#PI@o0YJUfgn;1bwV#`-XUcd&p9_zYj+628L^_yugj*edkk0rVk($1sKoJcqr>Uv2=Cx&"),
    "1.6 zip form": (
        "c-noE(TdYR6ox0sHff`_wY#oDQFiYtXt%mmx*%GL6lD<OiW2rFW|N@}#!XLV+Py0DYQa140mMh}5%yy5)i>}F#3%4f5=xVG9r!rR%=yop^D`"
        "FJ)(9z=$+=Z04dTY$IGC{=-xY3q@;)36s^lQI7U~>G%PygSO(Jg$%8T!Yy@A_F#F;Z=9(TBK1#|qs6QFut6o$+bL3G5;m$A=c=0C+76SUj=u"
        "x9J1JZ8aYETH6x2;XlzQxSyRbYgZm4MN`$?1)FPGrMns-fGzfDmZ4kBL+q)F^6H~ir49(31z#AIeXpC!`{7Kx3~LXuhWH!t>K|JnSx210xrF"
        "x3e~7_0+(rpDkpH|<5+f76;RuUI-kQ;yMhAe0~4;a0~*Qwx-GqejX7LPI+?MU<7}`=70&tLv~5wNTs`}9b6X)qVqIu>lWgV;-^q7895f2v%a"
        "v&#6S6=~5%PqPEu@dULl(#<<SX(GIYoXTzmVSu>0>)c9l3#QAuXhX^pHOC46*uhl;_*WB1Dno;!$ek`f`-ak>OzdAMGFPnzHK8FQYdq>eQsF"
        "BEz!os(JNuFBN}iQN7x4Gp7WF{Lk)Uq16^^xk8UrQXJNzx_&3SzNOt=rfP+Fmc`F%8c`=d5qX;>D9Kq#Pc>SSpXUAr67{-d"),
    "2.13 zip form": (
        "c-ozmJ#W)M7{|{^nisb~=^L#;s7MS(DrwxjOF*N5EGi2TiVzlyaqVkj;l?@p(w0J{N{C8qOpJ&Rz`%ys`VFAW3`k5&u(0!-9g6Lw1@)v~PLA"
        "*YJkLG%KR4uf0-<yo^^IY42CZ(+8yeNJokx~bA4d=R$4+dUAVC=d0q)p(i*UC-rj!YI?AR_=*Rk%ZF4ZVj4O6Eirt7w4VV#<G+vRUN26nJ<1"
        "K#i?ercH`lq4uOu-R-;GNe=6(OX%yOHIq=RR^zhP0LUzZo9Ult}pN;DF{jm6fUgPnwX?~2`^c;M(_H6@+7TruqH<`N*rdr(<QuomXhH+GAGC"
        "7)Gis3GcvbJPP}NbB2H3rYMG3>+vK#80fD-Psm9ts#=Q6A3TqFU*d~)+@^$REupKfbbFS;Ibh8aPmHzc)YiR<~G8%{Wcnr<49%ol=XHBDOFO"
        "pOj2DN(N5LvSKKfXL;TVx!bY!Y4ZlJ%OUYL?k-ui-Y8>XrY_7agSnD`0Vhe2+nj*pUT{pad&m<uS!JJ9(*&kY!S8VHV^0)o(NG^pi)%$e`<g"
        "TsfbU>WjxNyf=DbuOYMp>;Y&Ip;@2?JOp-tm%tm~9k2&{0=@!20aSxZfl*)@m<0qN2ULI>a1&_M*e;hYY)}hC){(p9(K)uu13ye3y3IV#qVB"
        "(L-urj|XHeNQfY&@1J0>__OJi42H4UkrKTa>jVtJt=R;xu(tP~5SLO!=p%6Y$KQ7l#p)m*t$$``7v$`4cX_XVg!@T%lku?KYq@5^vs<$>=|R"
        "2cOBSV&}WXu#!)>Vwvu4C(iK`o8-T4H0ziNGQZ|422vYRR-OV2`OL2&|jZNWx?a-L$arF6fjOy7d(KOknXdu8*Gh+oJ`L37M_n^J`klM^IOi"
        "JHxvF0I`7rRr2p)Ho`#aXCgrX7*Zv0VwN$1"),
}


def small_network(seed=0, width=64, feature=2, layers=3):
    """Return random parameters, {our name: array}."""
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=shape).astype(np.float32)
            for name, shape in architecture.parameter_shapes(Network(width, feature, layers)).items()}


def their_state(ours):
    """Return the authors' state dict of our parameters, independently of convert.py."""
    theirs = {}
    for name, array in ours.items():
        scope, layer, part = name.split("/")
        scope = {"implicit": "implicit_network", "rendering": "rendering_network"}[scope]
        part, array = {"v": ("weight_v", array.T), "g": ("weight_g", array[:, None]), "b": ("bias", array)}[part]
        theirs[f"{scope}.lin{layer}.{part}"] = np.ascontiguousarray(array)
    return theirs


def write_model(path, state, old_form=False, key="model_state_dict"):
    convert.write_checkpoint(path, {"epoch": 7, key: state}, old_form)
    return path


def converted(path):
    return convert.our_parameters(path, *convert.read_checkpoint(path))


def refusal(path, read=converted):
    """Return the one-line message of the UserError that `read` must raise, without the file's name."""
    with pytest.raises(helper.UserError) as raised:
        read(path)
    message = str(raised.value)
    assert message.startswith(f"{path}: ") and message.isprintable() and len(message) < 300 + len(str(path))
    return message[len(str(path)) + 2:]


FORMS = pytest.mark.parametrize("old_form", [False, True], ids=["zip", "old"])


# --- valid files ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", BY_PYTORCH)
def test_cameras_that_pytorch_wrote(tmp_path, kind):
    path = tmp_path / "latest.pth"
    path.write_bytes(zlib.decompress(base64.b85decode(BY_PYTORCH[kind])))
    ours = converted(path)
    assert list(ours) == ["cameras/pose"] and ours["cameras/pose"].dtype == np.float32
    assert np.array_equal(ours["cameras/pose"], np.arange(27).reshape(3, 9)[:, 1:8] / 8)


@FORMS
def test_the_reference_network_computes_the_authors_numbers(reference, tmp_path, old_form):
    parts = {"weight_v": "v", "weight_g": "g", "bias": "b"}
    state = {f"{scope}_network.lin{layer}.{part}": reference[f"{scope}_network/{layer}/{short}"]
             for scope, layers in (("implicit", 9), ("rendering", 5)) for layer in range(layers)
             for part, short in parts.items()}
    write_model(tmp_path / "latest.pth", state, old_form)
    said = run("convert.py", "latest.pth", "--output", "out/model.h5", cwd=tmp_path, anew=True)
    width, feature = int(reference["width"]), int(reference["feature"])
    layers = sum(name.endswith("/v") for name in reference if name.startswith("implicit_network/"))
    assert f"out/model.h5: network: {{width: {width}, feature: {feature}, layers: {layers}}}" in said
    shapes = architecture.parameter_shapes(Network(width, feature, layers))
    checkpoints.load_model(tmp_path / "out" / "model.h5", shapes)
    found = network.sdf_evaluator()(reference["probe_points"])
    assert np.abs(found - reference["probe_output"][:, 0]).max() < 1e-4
    hit = reference["hit"] & reference["object_mask"]
    rgb, normals = network.shade(reference["points"][hit], reference["ray_directions"][hit])
    assert np.abs(rgb * 2 - 1 - reference["rgb"][hit]).max() < 1e-3
    nn.clear_parameters()


@FORMS
def test_there_and_back_and_there_again(tmp_path, old_form):
    ours = dict(small_network(), **{"cameras/pose": np.random.default_rng(1).normal(size=(5, 7)).astype(np.float32)})
    nn.clear_parameters()
    for name, array in ours.items():
        nn.parameter.set_parameter(name, nn.Variable.from_numpy_array(array, need_grad=True))
    checkpoints.save_model(tmp_path / "model_01999.h5")
    nn.clear_parameters()
    said = run("convert.py", "model_01999.h5", "--output", "theirs.pth", *["--old-form"] * old_form, cwd=tmp_path)
    assert "theirs.pth: network: {width: 64, feature: 2, layers: 3}, 5 cameras" in said and "theirs_cameras.pth" in said
    for name, key in (("theirs.pth", "model_state_dict"), ("theirs_cameras.pth", "pose_vecs_state_dict")):
        assert zipfile.is_zipfile(tmp_path / name) is not old_form
        assert (b"NtQ" in (tmp_path / name).read_bytes()) is old_form   # None: not a view of a storage
        tree, buffers = convert.read_checkpoint(tmp_path / name)
        assert tree["epoch"] == 1999 and list(tree) == ["epoch", key]
    tree, buffers = convert.read_checkpoint(tmp_path / "theirs.pth")
    wanted = their_state({name: array for name, array in ours.items() if name != "cameras/pose"})
    assert tree["model_state_dict"].keys() == wanted.keys()
    for name, tensor in tree["model_state_dict"].items():
        assert np.array_equal(convert.as_array(tensor, buffers), wanted[name])
    run("convert.py", "theirs_cameras.pth", "theirs.pth", "--output", "again.h5", cwd=tmp_path)
    again = checkpoints.read_arrays(tmp_path / "again.h5")[0]
    assert again.keys() == ours.keys()
    assert all(np.array_equal(again[name], ours[name]) for name in ours)
    run("convert.py", "theirs_cameras.pth", "--output", "cameras.h5", cwd=tmp_path)
    run("convert.py", "cameras.h5", "--output", "only.pth", *["--old-form"] * old_form, cwd=tmp_path)
    assert np.array_equal(converted(tmp_path / "only.pth")["cameras/pose"], ours["cameras/pose"])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["again.h5", "cameras.h5", "model_01999.h5", "only.pth",
                                                          "theirs.pth", "theirs_cameras.pth"]


@pytest.mark.parametrize("net, keys", [
    (Network(64, 2, 3, view_bands=2), {"view_bands": 2}), (Network(64, 2, 3, without=["view"]), {"without": ["view"]}),
    (Network(64, 2, 3, position_bands=4), {"position_bands": 4}),
    (Network(64, 2, 6, position_bands=10, view_bands=1), {"position_bands": 10, "view_bands": 1}),
    (Network(64, 2, 3, view_bands=6, without=["normal"]), {"view_bands": 6, "without": ["normal"]}),
    (Network(64, 12, 3, without=["feature"]), {"without": ["feature"]}),
    (Network(64, 33, 3, view_bands=2), {"view_bands": 2})])
def test_models_with_other_inputs_there_and_back(tmp_path, net, keys):
    """The last two have as many inputs as one with 2 bands and the feature, and one with 8 and neither normal nor
    feature."""
    rng, shapes = np.random.default_rng(0), architecture.parameter_shapes(net)
    ours = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    assert convert.sizes({name: array.shape for name, array in ours.items()}) == {
        "width": 64, "feature": net.feature, "layers": net.layers, **keys}
    theirs, _ = convert.their_parameters("model.h5", ours)
    back = converted(write_model(tmp_path / "theirs.pth", theirs))
    assert back.keys() == ours.keys() and all(np.array_equal(back[name], ours[name]) for name in ours)


def test_numbers_of_another_width_and_order_in_memory(tmp_path):
    program = (b"\x80\x02}(X\x06\0\0\0weightctorch._utils\n_rebuild_tensor_v2\n((X\x07\0\0\0storagectorch\n"
               b"DoubleStorage\nX\x01\0\0\0aX\x03\0\0\0cpuK\x0ftQK\x01K\x02K\x07\x86K\x01K\x02\x86\x89}tRu.")
    path = write_zip(tmp_path, program, {"a": np.arange(15.0).tobytes()})
    assert np.array_equal(converted(path)["cameras/pose"], 1 + np.arange(14).reshape(7, 2).T)


def test_the_zip_form_is_laid_out_as_pytorch_does(tmp_path):
    path = write_model(tmp_path / "latest.pth", their_state(small_network()))
    with zipfile.ZipFile(path) as archive:
        files = archive.infolist()
        for info in files:
            assert info.compress_type == zipfile.ZIP_STORED
            name, extra = struct.unpack_from("<HH", path.read_bytes(), info.header_offset + 26)
            assert (info.header_offset + 30 + name + extra) % 64 == 0, info.filename
        names = [info.filename for info in files]
        assert {"archive/data.pkl", "archive/version", "archive/byteorder", "archive/data/0"} <= set(names)
        assert archive.read("archive/version") == b"3\n" and archive.read("archive/byteorder") == b"little"


def test_the_full_model_of_scan_65_renders_it(tmp_path):
    path = SHARED / "reference" / "original_scan65.pth"
    if not path.exists():
        pytest.skip("the original's model (shared/reference/original_scan65.pth) is not there")
    link_scan65(tmp_path / "scene", [24], ("world", "scale"))
    run("convert.py", path, "--output", tmp_path / "scan65.h5", cwd=tmp_path)
    conf = settings.load_config(ROOT / "config" / "default.yaml")
    checkpoints.load_model(tmp_path / "scan65.h5", architecture.parameter_shapes(Network(512, 256, 9)))
    scene = datasets.load_scene(tmp_path / "scene", 4)
    inside = np.flatnonzero(scene.masks[0])
    wanted = np.zeros(scene.masks[0].size, bool)
    wanted[np.random.default_rng(0).choice(inside, 500, replace=False)] = True
    wanted = wanted.reshape(scene.masks[0].shape)
    camera = helper.Camera(scene.intrinsics[0], scene.poses[0], wanted.shape)
    render = pixels.render_view(network.sdf_evaluator(), network.shader(conf.network), camera, conf.tracer, wanted)
    error = images.squared_error(render.rgb, scene.images[0] / 255.0, wanted)
    assert images.psnr(error) == pytest.approx(17.74, abs=0.2)    # 18.26 over all pixels of the view
    nn.clear_parameters()


# --- other architectures ----------------------------------------------------------------------------------------------

def spoilt(name, change, **sizes):
    """Return an authors' state dict with one array changed, or removed if `change` returns None."""
    state = their_state(small_network(**sizes))
    state[name] = change(state[name])
    return {name: array for name, array in state.items() if array is not None}


@pytest.mark.parametrize("state, words", [
    (spoilt("rendering_network.lin0.weight_v", lambda v: v[:, :-4].copy()), ["lin0.weight_v", "(64, 31)", "(64, 35)"]),
    (spoilt("rendering_network.lin0.weight_v", lambda v: v[:, 3:].copy(), feature=3), ["(64, 33)", "(64, 36)"]),
    (spoilt("rendering_network.lin0.weight_v", lambda v: v[:, :-24].copy()), ["(64, 11)", "no positional encoding"]),
    (spoilt("implicit_network.lin0.weight_v", lambda v: v[:, :3].copy()), ["implicit_network.lin0", "no positional"]),
    (spoilt("implicit_network.lin3.weight_v", lambda v: np.zeros((64, 64), "f4"), layers=9), ["lin3", "(25, 64)"]),
    (spoilt("implicit_network.lin2.weight_g", lambda g: None), ["implicit_network.lin2.weight_g is missing"]),
    (spoilt("implicit_network.lin2.bias", lambda b: None), ["not all of their layers"]),
    (spoilt("rendering_network.lin4.bias", lambda b: b * np.nan), ["rendering_network.lin4.bias", "not finite"]),
    (their_state(small_network(width=40)), ["width must be between 64 and 4096, not 40"]),
    (dict(their_state(small_network()), **{"nerf.lin0.weight": np.zeros((2, 2), "f4")}), ["nerf.lin0.weight"]),
    (dict(their_state(small_network()), **{"implicit_network.lin07.bias": np.zeros(9, "f4")}), ["lin"]),
    ({"implicit_network.lin9999.bias": np.zeros(9, "f4")}, ["not all of their layers"]),
    ({"weight": np.zeros((3, 6), "f4")}, ["weight is (3, 6)", "(views, 7)"]),
    ({"exp_avg": np.zeros((3, 6), "f4")}, ["no networks"]),
    ({}, ["model_state_dict"]),
])
def test_another_architecture_is_refused_by_what_differs(tmp_path, state, words):
    said = refusal(write_model(tmp_path / "latest.pth", state))
    assert all(word in said for word in words), said


def test_what_the_command_line_refuses(tmp_path):
    write_model(tmp_path / "a.pth", their_state(small_network()))
    write_model(tmp_path / "nan.pth", {"weight": np.full((2, 7), np.nan, "f4")}, key="pose_vecs_state_dict")
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["implicit/0/v"] = np.zeros((39, 64))
    assert "nowhere.pth: no such file" in refused("convert.py", "nowhere.pth", "--output", "b.h5", cwd=tmp_path)
    assert "must end in .h5" in refused("convert.py", "a.pth", "--output", "b.npz", cwd=tmp_path)
    assert "a.pth: not a readable .h5" in refused("convert.py", "a.pth", "--output", "b.pth", cwd=tmp_path)
    assert "--old-form" in refused("convert.py", "a.pth", "--output", "b.h5", "--old-form", cwd=tmp_path)
    assert "not 2 files" in refused("convert.py", "other.h5", "other.h5", "--output", "b.pth", cwd=tmp_path)
    assert "other.h5: " in refused("convert.py", "other.h5", "--output", "b.pth", cwd=tmp_path)
    assert "the file before" in refused("convert.py", "a.pth", "a.pth", "--output", "b.h5", cwd=tmp_path)
    assert "not finite" in refused("convert.py", "a.pth", "nan.pth", "--output", "b.h5", cwd=tmp_path)
    assert "other.h5: is not what torch.save" in refused("convert.py", "other.h5", "--output", "b.h5", cwd=tmp_path)


# --- hostile files ----------------------------------------------------------------------------------------------------

def write_zip(folder, program, storages=None, more=()):
    """Write a file in zip format with `program` as data.pkl, and return its path."""
    path = folder / "hostile.pth"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")     # about duplicate names
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", program)
            for key, content in (storages or {}).items():
                archive.writestr(f"archive/data/{key}", content)
            for name, content in more:
                archive.writestr(name, content)
    return path


def write_old(folder, program, place=3):
    """Write a file in the old format with `program` in place of one of its five pickles, and return its path."""
    pickles = [pickle.dumps(part, 2) for part in
               (convert.OLD_MAGIC, convert.OLD_VERSION, {"little_endian": True}, {"model_state_dict": {}}, [])]
    pickles[place] = program
    path = folder / "hostile.pth"
    path.write_bytes(b"".join(pickles))
    return path


class Calls:
    """An object that is pickled as a call of `function`."""

    def __init__(self, function, *arguments):
        self.reduced = function, arguments

    def __reduce__(self):
        return self.reduced


def touching(folder, kind):
    """Return a pickle that creates the file `touched` in `folder` when it is loaded."""
    target = str(folder / "touched")
    return pickle.dumps({"model_state_dict": {
        "os.system": lambda: Calls(os.system, f"touch {target}"),
        "eval": lambda: Calls(eval, f"open({target!r}, 'w')"),
        "exec": lambda: Calls(exec, f"open({target!r}, 'w')"),
        "open": lambda: Calls(open, target, "w"),
        "getattr": lambda: Calls(getattr, Calls(__import__, "os"), "system"),
        "nested": lambda: {"a": [({"b": Calls(os.mkdir, target)},)]},
    }[kind]()}, 2)


@pytest.mark.parametrize("kind", ["os.system", "eval", "exec", "open", "getattr", "nested"])
def test_nothing_that_a_pickle_calls_is_run(tmp_path, kind):
    (tmp_path / "sure").mkdir()
    pickle.loads(touching(tmp_path / "sure", "os.system"))
    assert (tmp_path / "sure" / "touched").exists()     # these pickles do run code when loaded
    program = touching(tmp_path, kind)
    paths = [lambda: write_zip(tmp_path, program), lambda: write_old(tmp_path, program),
             lambda: write_old(tmp_path, program, 1), lambda: write_old(tmp_path, program, 2),
             lambda: write_old(tmp_path, program, 4)]
    for path in paths:
        said = refusal(path())
        assert "asks for " in said and "not run" in said
        assert not (tmp_path / "touched").exists()


def test_a_hostile_file_on_the_command_line(tmp_path):
    write_zip(tmp_path, touching(tmp_path, "os.system"))
    (tmp_path / "model.h5").write_bytes(b"an earlier one")
    said = refused("convert.py", "hostile.pth", "--output", "model.h5", cwd=tmp_path)
    assert "hostile.pth: asks for" in said and "system" in said
    assert (tmp_path / "model.h5").read_bytes() == b"an earlier one" and not (tmp_path / "touched").exists()


@pytest.mark.parametrize("program", [
    pickle.dumps(Calls(os.system, "true"), 0), pickle.dumps(Calls(os.system, "true"), 4),
    b"(S'true'\nios\nsystem\n.", b"(cos\nsystem\nS'true'\no.", b"\x80\x02\x82\x01.",
    b"\x80\x02cos\nsystem\n)\x81.",
    b"\x80\x02ccollections\nOrderedDict\n(X\1\0\0\0aK\1ttR.", b"\x80\x02X\2\0\0\0os)R.", b"\x80\x02N.",
    b"\x80\x02}}b.", b"\x80\x02ctorch\nFloatStorage\n)R.", b"\x80\x02.", b"\x80\x02K\1K\2.", b"\x80\x02h\5.", b"",
    b"\x80\x02}(]K\1u.", b"\x80\x02u.", b"\x80\x02K\1Q.", b"\x80\x02K\1K\1K\1u.", b"garbage",
])
def test_programs_of_other_kinds(tmp_path, program):
    refusal(write_zip(tmp_path, program))
    refusal(write_old(tmp_path, program))


def tensor_instructions(offset, shape, stride, count, key="a", kind="FloatStorage"):
    def tuple_of(*values):
        return b"(" + b"".join(convert.pickled(v, [], False) for v in values) + b"t"

    return (b"ctorch._utils\n_rebuild_tensor_v2\n((X\x07\0\0\0storagectorch\n" + kind.encode() + b"\n"
            + tuple_of(key, "cpu", count)[1:] + b"Q" + tuple_of(offset, shape, stride, False)[1:] + b"R")


def tensor_program(offset=0, shape=(2, 7), stride=(7, 1), count=14, key="a", kind="FloatStorage"):
    """Return a pickle of cameras with such a tensor."""
    return (b"\x80\x02}X\x06\0\0\0weight" + tensor_instructions(offset, shape, stride, count, key, kind) + b"s.")


def test_the_tensor_that_the_next_test_spoils_is_fine(tmp_path):
    path = write_zip(tmp_path, tensor_program(), {"a": np.arange(14, dtype="f4").tobytes()})
    assert np.array_equal(converted(path)["cameras/pose"], np.arange(14).reshape(2, 7))


@pytest.mark.parametrize("spoilt", [
    dict(offset=1), dict(offset=-1), dict(stride=(-7, 1)), dict(stride=(7, -1)), dict(stride=(8, 1)),
    dict(shape=(3, 7)), dict(shape=(-2, 7)), dict(shape=(2,)), dict(shape=(2, 7, 1)), dict(shape=(2, "7")),
    dict(stride=(7, True)), dict(offset=2 ** 63), dict(shape=(2 ** 40, 7), stride=(0, 0)),
    dict(shape=(2 ** 1500, 7)), dict(shape=(2 ** 1500, 7), stride=(0, 0)), dict(shape=(0, 7)), dict(count=-14),
    dict(count=15), dict(count="14"), dict(count=2 ** 62), dict(count=2 ** 1500),
    dict(count=2 ** 62, shape=(2 ** 59, 7)),
    dict(key="b"), dict(key=1), dict(key="../data.pkl"), dict(kind="DoubleStorage"), dict(kind="CharStorage"),
    dict(kind="HalfStorage"), dict(shape=(1,) * 9, stride=(1,) * 9),
], ids=str)
def test_tensors_that_reach_beyond_their_numbers(tmp_path, spoilt):
    refusal(write_zip(tmp_path, tensor_program(**spoilt), {"a": np.arange(14, dtype="f4").tobytes()}))


def test_storages_that_do_not_fit_one_another(tmp_path):
    def named(*tensors):
        return b"\x80\x02}(" + b"".join(convert.pickled(name, [], False) + tensor_instructions(*tensor)
                                       for name, tensor in tensors) + b"u."

    other, small, large = (0, (99,), (1,), 99, "b"), (0, (2, 7), (7, 1), 14), (0, (4, 7), (7, 1), 28)
    storages = {"a": bytes(4 * 14), "b": bytes(4 * 99)}
    assert "two ways" in refusal(write_zip(tmp_path, named(("b", other), ("a", small), ("weight", large)), storages))
    assert "lacks" in refusal(write_old(tmp_path, tensor_program()))
    assert "view" in refusal(write_old(tmp_path, tensor_program().replace(b"tQ", b"K\1tQ")))
    memoized = tensor_program()[:-1] + b"\x94."
    assert "MEMOIZE" in refusal(write_zip(tmp_path, memoized, {"a": bytes(4 * 14)}))


@pytest.mark.parametrize("cut", [1, 4, 56, 60])
def test_an_old_form_whose_last_numbers_are_cut_off(tmp_path, cut):
    path, weight = tmp_path / "cut.pth", np.ones((2, 7), np.float32)
    convert.write_checkpoint(path, {"unused": np.tile(weight, 9), "pose_vecs_state_dict": {"weight": weight}}, True)
    path.write_bytes(path.read_bytes()[:-cut])
    refusal(path)


HUGE = struct.pack("<I", 2 ** 32 - 1)
BOMBS = {
    "a memo index": b"\x80\x02Nr" + HUGE + b".",
    "a text": b"\x80\x02X" + HUGE + b"a.",
    "a number": b"\x80\x02\x8b" + struct.pack("<i", 2 ** 31 - 1) + b"a.",
    "bytes": b"\x80\x02\x8e" + struct.pack("<Q", 2 ** 40) + b"a.",
    "a bytearray": b"\x80\x05\x96" + struct.pack("<Q", 2 ** 33) + b"a.",
    "lists of lists": b"\x80\x02]q\0" + b"".join(b"](h%ch%ceq%c" % (k, k, k + 1) for k in range(200)) + b".",
    "copies of a dict": b"\x80\x02}(" + b"".join(b"J" + struct.pack("<i", k) + b"N" for k in range(9999)) + b"uq\0"
                        + b"(ccollections\nOrderedDict\nq\1h\0\x85R" + b"h\1h\0\x85R" * 2000 + b"t.",
}


def refused_in_little_memory(path, read=converted):
    tracemalloc.start()
    try:
        said = refusal(path, read)
        assert tracemalloc.get_traced_memory()[1] < 3e6 + 40 * path.stat().st_size
    finally:
        tracemalloc.stop()
    return said


@pytest.mark.parametrize("name", BOMBS)
def test_instructions_that_ask_for_much_memory(tmp_path, name):
    refused_in_little_memory(write_zip(tmp_path, BOMBS[name]))
    refused_in_little_memory(write_old(tmp_path, BOMBS[name]))


def test_storages_that_unpack_to_more_than_the_file(tmp_path):
    path = tmp_path / "compressed.pth"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", tensor_program(count=2 ** 24))
        archive.writestr("archive/data/a", bytes(2 ** 26))
    assert "more than it holds" in refused_in_little_memory(path)


def changed_directory(content, place, value):
    """Return the bytes of a zip with four bytes replaced by `value`, at an offset in each entry of its directory."""
    content, start = bytearray(content), content.find(b"PK\1\2")
    while start >= 0:
        content[start + place:start + place + 4] = struct.pack("<I", value)
        start = content.find(b"PK\1\2", start + 4)
    return bytes(content)


def test_storages_whose_size_is_a_lie(tmp_path):
    path = tmp_path / "compressed.pth"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", tensor_program())
        archive.writestr("archive/data/a", bytes(2 ** 26))
    path.write_bytes(changed_directory(path.read_bytes(), 24, 56))
    assert "is compressed" in refused_in_little_memory(path)
    path = write_zip(tmp_path, tensor_program(), {"a": bytes(56)})
    for size in (0, 55, 57, 2 ** 31):
        path.write_bytes(changed_directory(path.read_bytes(), 24, size))
        refused_in_little_memory(path)


def test_a_zip_of_many_files(tmp_path):
    path = write_zip(tmp_path, tensor_program(), {"a": bytes(56)}, [(str(number), b"") for number in range(10 ** 4)])
    assert "more than 10000 files" in refusal(path)


def test_a_zip_whose_numbers_have_changed(tmp_path):
    path = write_zip(tmp_path, tensor_program(), {"a": b"\1" * 56})
    path.write_bytes(path.read_bytes().replace(b"\1" * 9, b"\1" * 8 + b"\2"))
    assert "is damaged" in refusal(path)


PAIRS = b"".join(b"h%ch%c\x86q%c" % (k, k, k + 1) for k in range(50))      # each tuple contains the previous one twice
NESTED = {
    "a key that holds itself doubled": b"\x80\x02)q\0" + PAIRS + b"}h\x32Ns.",
    "a key of tuples": b"\x80\x02})Ns.",
    "keys of one hash": b"\x80\x02}(" + b"".join(convert.pickled(k * (2 ** 61 - 1), [], False) + b"N"
                                                 for k in range(8, 20000)) + b"u.",
    "a function": b"\x80\x02)q\0" + PAIRS + b")R.",
    "a text for a function": b"\x80\x02X\x17\0\0\0collections OrderedDict)R.",
    "a storage's key": b"\x80\x02)q\0(X\7\0\0\0storagectorch\nFloatStorage\n" + PAIRS + b"X\3\0\0\0cpuK\1tQ.",
    "a storage's type": b"\x80\x02)q\0(X\7\0\0\0storage" + PAIRS + b"X\1\0\0\0aX\3\0\0\0cpuK\1tQ.",
    "a tensor's shape": b"\x80\x02)q\0ctorch._utils\n_rebuild_tensor_v2\n(K\1K\0" + PAIRS + b"h\x32tR.",
    "tuples in tuples": b"\x80\x02)" + b"\x85" * 99990 + b".",
    "tuples in tuples, more": b"\x80\x02)" + b"\x85" * 2000000 + b".",
    "lists in lists": b"\x80\x02]" + b"q\0]h\0a" * 20000 + b".",
    "lists in lists, from without": b"\x80\x02]q\0" + b"h\0]q\0a0" * 9 + b".",
    "dicts in dicts": b"\x80\x02" + b"}K\1" * 9 + b"N" + b"s" * 9 + b".",
    "a list that holds itself": b"\x80\x02]q\0h\0a.",
    "instructions without end": b"\x80\x02" + b"N" * 2 ** 17 + b".",
}


READ_NESTED = """
import sys
sys.path[:0] = sys.argv[1:3]
from pathlib import Path
from test_convert import NESTED, refusal, write_old, write_zip
folder = Path(sys.argv[3])
for name, program in NESTED.items():
    print(name, refusal(write_zip(folder, program)), refusal(write_old(folder, program)), flush=True)
"""


def test_instructions_that_nest_or_hash_without_end(tmp_path):
    """Run in a separate process, as recursion into such values may crash Python or never end."""
    done = subprocess.run([sys.executable, "-c", READ_NESTED, str(ROOT), str(ROOT / "tests"), str(tmp_path)],
                          capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout[-200:] + done.stderr[-2000:]
    said = [line for line in done.stdout.splitlines() if "[nnabla][INFO]" not in line]
    assert [name for name, line in zip(NESTED, said) if line.startswith(name)] == list(NESTED)


def test_a_pipe_is_not_waited_for(tmp_path):
    for name in ("pipe.pth", "pipe.h5"):
        os.mkfifo(tmp_path / name)
    assert "pipe.pth: not a regular file" in refused("convert.py", "pipe.pth", "--output", "a.h5", cwd=tmp_path)
    assert "pipe.h5: not a regular file" in refused("convert.py", "pipe.h5", "--output", "a.pth", cwd=tmp_path)


def test_networks_of_more_numbers_than_a_configuration_may_have():
    with pytest.raises(helper.UserError, match=r"network.width \* network.layers must be at most 64,000,000"):
        convert.wanted_shapes("a.pth", architecture.parameter_shapes(Network(4096, 8, 9)))
    assert convert.wanted_shapes("a.pth", architecture.parameter_shapes(Network(512, 256, 9)))


def test_a_model_of_ours_that_is_not_finite_is_not_turned(tmp_path):
    ours = dict(small_network(), **{"cameras/pose": np.ones((2, 7))})
    assert len(convert.their_parameters("a.h5", ours)[0]) == len(ours) - 1
    for name in ("implicit/0/v", "cameras/pose"):
        with pytest.raises(helper.UserError, match=f"a.h5: {name} has values that are not finite"):
            convert.their_parameters("a.h5", {**ours, name: ours[name] * np.nan})


def test_a_model_of_ours_that_claims_more_than_it_holds(tmp_path):
    with h5py.File(tmp_path / "hollow.h5", "w") as file:
        file.create_dataset("implicit/0/v", (4000, 4000), "f4", chunks=(1000, 1000))
    assert "not a readable .h5" in refused_in_little_memory(tmp_path / "hollow.h5", checkpoints.read_arrays)


def test_many_tensors_of_one_storage(tmp_path):
    program = b"\x80\x02}("
    for name, shape in architecture.parameter_shapes(Network(64, 64, 60)).items():
        shape = convert.their_shape(name, shape)
        stride = (shape[1], 1) if len(shape) == 2 else (1,)
        program += convert.pickled(convert.their_name(name), [], False) + tensor_instructions(0, shape, stride, 2 ** 14)
    path = write_zip(tmp_path, program + b"u.", {"a": bytes(2 ** 16)})
    assert "more numbers than it holds" in refused_in_little_memory(path)


@FORMS
def test_damaged_files_are_refused_or_read(tmp_path, old_form):
    """Check that damaged files raise UserError or give the parameters of a network, by seeded damage."""
    whole = write_model(tmp_path / "whole.pth", their_state(small_network()), old_form).read_bytes()
    start = len(whole) - 4 * sum(array.size for array in small_network().values())     # roughly where the numbers begin
    path, rng, read = tmp_path / "damaged.pth", np.random.default_rng(5), 0
    for trial in range(250):
        data = bytearray(whole)
        reach = len(data) if trial % 2 else min(start, len(data))
        place = int(rng.integers(reach))
        if trial % 5 == 0:
            del data[place:]
        elif trial % 5 == 1:
            data[place:place + int(rng.integers(1, 40))] = b""
        elif trial % 5 == 2:
            data[place:place] = rng.bytes(int(rng.integers(1, 40)))
        else:
            for _ in range(1 + trial % 4):
                data[int(rng.integers(reach))] = int(rng.integers(256))
        path.write_bytes(bytes(data))
        try:
            ours = converted(path)
        except helper.UserError as error:
            assert str(error).startswith(f"{path}: ") and str(error).isprintable()
        else:
            read += 1
            shapes = {name: array.shape for name, array in ours.items()}
            assert shapes == architecture.parameter_shapes(Network(64, 2, 3))
    assert read < 125


def test_damaged_instructions_are_refused_or_read(tmp_path):
    """The same for data.pkl alone, with a valid checksum."""
    model = their_state(small_network())
    with zipfile.ZipFile(write_model(tmp_path / "whole.pth", model)) as archive:
        program = archive.read("archive/data.pkl")
        storages = {name[len("archive/data/"):]: archive.read(name) for name in archive.namelist() if "/data/" in name}
    rng = np.random.default_rng(6)
    for _ in range(250):
        data = bytearray(program)
        for _ in range(int(rng.integers(1, 4))):
            data[int(rng.integers(len(data)))] = int(rng.choice(list(b"\x00\xff.(}]tuseQRqrhjKMJNbcX\x85\x8a")))
        try:
            converted(write_zip(tmp_path, bytes(data), storages))
        except helper.UserError as error:
            assert str(error).isprintable()
