"""Make a scene for train.py from photographs, or check an existing scene.

    python prepare.py FOLDER --output data/mine     from photographs, with a COLMAP model or others' cameras if there
    python prepare.py shoe.mp4 --output data/mine   from a video
    python prepare.py data/mine --check             says what is wrong, in which view, and what to do
    python prepare.py data/mine --scale-by "..."    puts the scene into a unit; see scenes/scale.py

They find the object's region from cameras and masks, the visual hull, and draw prepare_{scene}.png in the current
folder: the cameras around the unit sphere, and the hull's outline over the photographs. The outlines fit the masks only
if cameras, masks and their order are right.

They judge alike. A line that begins with `wrong` means that the scene is of no use: it is not written, and the exit
status is 2. A line with `look` names views to look at; the scene is written, and the status is 0. A `notice` is worth
knowing.
"""
import argparse
import os
import re
import shlex
import shutil
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

import datasets
import helper
from files import folders, pictures, writing
from helper import UserError
from scenes import auto_masks, camera_files, checks, mask_files, overview, photographs, scale, scale_page
from scenes.views import read_view
from scenes.visual_hull import Ball, Hull, enclosing_sphere, make_look, normalised

FOUND_MASK_WEIGHT = 20      # train.mask_weight for masks that were found; 100 holds the surface to their mistakes
KEPT = {"PNG": ".png", "JPEG": ".jpg", "MPO": ".jpg"}   # the formats that a scene holds, by Pillow's names


def main():
    parser = argparse.ArgumentParser(description="Make a scene from photographs or a video, or check one.",
                                     formatter_class=argparse.RawDescriptionHelpFormatter,
                                     epilog=f"Cameras are {camera_files.FORMATS}.")
    parser.add_argument("input", help="a folder of photographs, a video, or a camera file; with --check a scene")
    parser.add_argument("--output", help="the scene's folder, new or empty")
    parser.add_argument("--check", action="store_true", help="check the scene `input`; writes nothing but the picture")
    parser.add_argument("--images", metavar="FOLDER", help="the photographs, if not where the format has them")
    parser.add_argument("--masks", metavar="FOLDER|auto|rembg|alpha|background",
                        help="where the masks come from; by default masks/ or mask/, else the alpha channel, "
                             "else auto: the object that the cameras look at; rembg: by that package; background: what "
                             "differs from the border")
    parser.add_argument("--subject", metavar="VIEW:X0,Y0,X1,Y1", help="of --masks auto: a box around the object in one "
                        "photograph, by name or number, in pixels: left, top, right, bottom")
    parser.add_argument("--threshold", type=float, help="of --masks background, in grey levels; found by default")
    parser.add_argument("--frames", type=int, default=60, help="how many frames to take of a video")
    parser.add_argument("--downscale", type=int, default=1, help="shrink the images by this whole factor")
    parser.add_argument("--scale-by", nargs="?", const="", metavar="MARKS", help="put the scene into the unit in which "
                        f"two clicked points have a distance, as {scale.EXAMPLE}; without a value, write the page on "
                        "which to click them")
    args = parser.parse_args()
    args.marks = scale.read_marks(args.scale_by) if args.scale_by else None
    if args.check:
        return check(args.input)
    if args.output is None and args.scale_by is not None:
        return give_unit(Path(args.input), args.marks)
    if args.output is None:
        raise UserError("--output is missing: the folder for the scene, such as data/mine (or --check a scene)")
    if not 10 <= args.frames <= 1000:
        raise UserError(f"--frames must be 10 to 1000, not {args.frames}")
    if args.downscale < 1:
        raise UserError(f"--downscale must be 1 or more, not {args.downscale}")
    if args.threshold is not None and not 0 < args.threshold < 255:
        raise UserError(f"--threshold must be between 0 and 255, not {args.threshold}")
    prepare(args)


# --- the two commands -------------------------------------------------------------------------------------------------

def prepare(args):
    """Make the scene args.output. Raise UserError, and write no scene, if something is wrong."""
    folders.check_new(args.output)
    rembg = mask_files.rembg_masks() if args.masks == "rembg" else None     # before the cameras take their time
    alone, root = photographs.without_cameras(args.input, args.images), Path(args.input)
    root = root if root.is_dir() else root.parent
    source = photographs.find_cameras(alone, args.output, args.frames) if alone else args.input
    views, what = camera_files.read_views(source, None if alone else args.images)
    check_photographs(views)
    sources = mask_files.mask_sources(views, args.masks, root)
    print(f"read {what}; masks: {sources[0] if isinstance(sources[0], str) else sources[0].parent}")
    drawn = sources[0]
    if rembg:
        sources = [rembg] * len(views)
    with folders.new_folder(args.output) as folder:     # it refuses a full one before the masks take their time
        sources = mask_makers(views, sources, args.subject, source)
        looks, intrinsics = write_pictures(folder, views, sources, args.threshold, args.downscale)
        hint = {"background": partial(mask_files.background_hint, views, args.threshold),
                "auto": auto_hint}.get(drawn, no_hint)
        poses, growth = [view.pose for view in views], 1.0
        if args.marks:
            growth = scale.factor(args.marks, written_cameras(folder, intrinsics, poses))
        sphere, hull, findings = judge_and_draw(looks, args.output, mask_hint=hint)
        picture = picture_path(args.output)
        wrong = [finding for finding in findings if finding.level == checks.WRONG]
        if wrong:
            where = f"view {wrong[0].view} ({looks[wrong[0].view].name}): " if wrong[0].view >= 0 else ""
            raise UserError(f"{args.output}: not written; {where}{wrong[0].text}; see {picture}")
        sphere, poses = Ball(growth * sphere.centre, growth * sphere.radius), [grown(pose, growth) for pose in poses]
        write_cameras(folder / "cameras.npz", poses, intrinsics, sphere)
    print(f"{args.output}: {len(views)} views; the unit sphere lies at {np.array2string(sphere.centre, precision=4)}, "
          f"radius {sphere.radius:.4g}; {size_in_words(hull, sphere.radius)}; look at "
          f"{lines_to_look_at(findings)}{picture}")
    if drawn in ("auto", "rembg"):
        print(f"these masks were found: train with train.mask_weight: {FOUND_MASK_WEIGHT}, which lets the colours "
              f"correct them, or mend them by hand in {args.output}/mask and keep the configuration's weight")
    if args.scale_by == "" or alone and not args.marks:
        write_scale_page(Path(args.output))


def grown(pose, growth):
    """Return a pose (4, 4) in a world that has grown by a factor."""
    pose = pose.copy()
    pose[:3, 3] *= growth
    return pose


def written_cameras(folder, intrinsics, poses):
    """Return the helper.Cameras of a scene's images with these intrinsics (N, 3, 3) and poses (N, 4, 4)."""
    images = datasets.picture_files(folder / "image")[0]
    return [helper.Camera(k, pose, scale.image_shape(image)) for k, pose, image in zip(intrinsics, poses, images)]


def size_in_words(hull, radius):
    """Return what the object measures, by its normalised Hull and the unit sphere's radius, in words."""
    if len(hull.points) < 10:
        return "the object's size is unknown"
    sides = radius * scale.extents(hull.points)
    return f"the object measures about {' x '.join(f'{side:.3g}' for side in sides)} in the cameras' unit"


def give_unit(scene, marks):
    """Put an existing scene into the unit of scale.Marks, or write the page to make them if marks is None."""
    if marks is None:
        return write_scale_page(scene)
    growth = scale.scale_scene(scene, marks)
    print(f"{scene}: grown by {growth:.6g}; its earlier cameras are kept in {scale.KEPT}")
    return check(scene)


def write_scale_page(scene):
    """Write the page on which to click the points of --scale-by for the scene in a folder."""
    path = Path(f"prepare_{scene_name(scene)}_scale.html")
    scale_page.write_page(path, scene, f"python prepare.py {shlex.quote(str(scene))}")
    print(f"to give the scene a unit, open {path} in a browser")


def mask_makers(views, sources, subject, cameras):
    """Return the sources of mask_files.mask_sources, with functions that make the masks in place of auto.

    subject: the value of --subject, or None. cameras: the folder or file from which the views were read. Raises
    UserError if a subject is given for other masks.
    """
    if subject is not None and sources[0] != "auto":
        raise UserError("--subject is of --masks auto; add that, or leave it out")
    if sources[0] == "auto":
        box = auto_masks.read_subject(subject, views) if subject is not None else None
        return auto_masks.mask_makers(views, box, camera_files.sparse_points_of(cameras))
    return sources


def check(scene):
    """Judge the scene in a folder as `prepare` does. Raise UserError if something is wrong."""
    looks, matrices = read_scene(Path(scene))
    findings = checks.judge_scale([matrices[f"scale_mat_{index}"] for index in range(len(looks))])
    _, hull, findings = judge_and_draw(looks, scene, findings, sphere=Ball(np.zeros(3), 1.0))
    count = checks.num_lines(findings, checks.WRONG)
    if count:
        raise UserError(f"{scene}: {count} thing{'s' * (count > 1)} to mend, in the lines above; see "
                        f"{picture_path(scene)}")
    size = size_in_words(hull, np.cbrt(np.linalg.det(matrices["scale_mat_0"][:3, :3])))
    print(f"{scene}: {len(looks)} views, nothing wrong; {size}; look at "
          f"{lines_to_look_at(findings)}{picture_path(scene)}")


# --- judging ----------------------------------------------------------------------------------------------------------

def no_hint():
    """Return the hint for masks of which there is nothing to say."""
    return ""


def auto_hint():
    """Return the hint for masks that were found by auto_masks.py."""
    return " (of --masks auto; a box around the object, --subject VIEW:X0,Y0,X1,Y1, helps where it took another thing)"


def judge_and_draw(looks, scene, findings=(), sphere=None, mask_hint=no_hint):
    """Judge Looks, print the findings and draw the picture.

    scene: its folder, for messages. findings: earlier ones. sphere: the unit sphere as a Ball, None to find it.
    mask_hint: returns words to append to findings of masks. Returns the sphere, the normalised Hull and all findings.
    Raises UserError if fewer than two masks show something.
    """
    findings = [*findings, *checks.judge_masks(looks)]
    usable = checks.usable_views(looks)
    shown = [looks[index] for index in usable]
    if len(shown) < 2:
        checks.print_findings(checks.with_mask_hint(findings, mask_hint), looks)
        raise UserError(f"{scene}: a scene needs at least two views with masks of the object, better dozens"
                        + mask_hint())
    hull, more = checks.judge_agreement(shown, sphere)
    more = [finding if finding.view < 0 else finding._replace(view=usable[finding.view]) for finding in more]
    findings += more
    odd = {finding.view for finding in more}
    if sphere is None:
        sphere = enclosing_sphere(hull, [looks[index] for index in usable if index not in odd] or shown)
        if hull.ball is not None and -1 not in odd:
            findings.append(checks.GUESSED_SPHERE)
    hull = Hull((hull.points - sphere.centre) / sphere.radius, hull.spacing / sphere.radius)
    looks = normalised(looks, sphere)
    findings = checks.with_mask_hint([*findings, *checks.judge_sphere(hull, looks, odd)], mask_hint)
    checks.print_findings(findings, looks)
    overview.draw(picture_path(scene), picture_title(scene, len(looks), findings), looks, hull, findings)
    return sphere, hull, findings


def picture_path(scene):
    """Return the path of a scene's overview picture."""
    return Path(f"prepare_{scene_name(scene)}.png")


def picture_title(scene, num_views, findings):
    """Return the title of a scene's overview picture, with its legend."""
    counts = [f"{checks.num_lines(findings, checks.WRONG) or 'nothing'} wrong"]
    counts += [f"{checks.num_lines(findings, checks.LOOK)} to look at"] * bool(checks.num_lines(findings, checks.LOOK))
    return (f"{scene_name(scene)}: {num_views} views, {', '.join(counts)}.   White: mask.   Orange: visual hull; it "
            "hides the white where they agree.   Blue: unit sphere.   %: agreement of mask and hull, worst first.")


def scene_name(scene):
    """Return the name of a scene's folder."""
    return Path(scene).absolute().name


def lines_to_look_at(findings):
    """Return the words, to stand before the picture's path, for the findings to look at; "" for none."""
    count = checks.num_lines(findings, checks.LOOK)
    return f"the {'line that begins' if count == 1 else 'lines that begin'} with `look`, and at " if count else ""


# --- reading and writing ----------------------------------------------------------------------------------------------

def check_photographs(views):
    """Raise UserError unless the photographs of all camera_files.Views exist."""
    missing = [view.image for view in views if not os.path.exists(str(view.image))]
    if missing:
        mend = "say with --images where they are" if 2 * len(missing) > len(views) else \
            "restore what is missing, or remove its camera"
        raise UserError(f"{missing[0]}: no such photograph ({len(missing)} of {len(views)} "
                        f"{'is' if len(missing) == 1 else 'are'} missing); {mend}")


def read_scene(path):
    """Return the Looks of the scene in the folder `path`, and its matrices as datasets.read_matrices does.

    Unlike datasets.load_scene it takes empty masks, and cameras that look away from the unit sphere.
    """
    image_paths, mask_paths = datasets.scene_files(path)
    matrices = datasets.read_matrices(path / "cameras.npz", len(image_paths))
    looks, shape, doubtful = [], None, []
    progress = tqdm(image_paths, unit="view", dynamic_ncols=True)
    for index, (image_path, mask_path) in enumerate(zip(progress, mask_paths)):
        intrinsics, pose = datasets.view_camera(path / "cameras.npz", matrices, index)
        image, mask, doubts = pictures.read_pair(image_path, mask_path)
        doubtful += doubts
        datasets.check_mask_size(mask_path, mask.shape, image_path, image.shape[:2])
        shape = shape or image.shape[:2]
        datasets.check_one_size(image_path, image.shape[:2], image_paths[0], shape)
        looks.append(make_look(image_path.name, image, mask, intrinsics, pose))
    pictures.say_doubtful(doubtful)
    return looks, matrices


def write_pictures(folder, views, mask_sources, threshold, downscale):
    """Write image/ and mask/ of camera_files.Views to an empty folder. Return their Looks and intrinsics (N, 3, 3).

    A photograph is copied as it is, unless its pixels change, its format is another, or it carries an orientation by
    which other programs would turn it: then its pixels become a PNG.
    """
    (folder / "image").mkdir()
    (folder / "mask").mkdir()
    looks, matrices, shape, doubtful, digits = [], [], None, [], max(3, len(str(len(views) - 1)))
    for index, (view, source) in enumerate(zip(tqdm(views, unit="view", dynamic_ncols=True), mask_sources)):
        image, mask, intrinsics, photograph, doubts = read_view(view, source, threshold)
        doubtful += doubts
        name = f"{index:0{digits}d}_" + re.sub(r"[^A-Za-z0-9.-]", "_", view.image.stem)[:100]  # sorts as the views do
        datasets.check_downscale(image.shape, downscale, view.image)
        shape = shape or image.shape[:2]
        datasets.check_one_size(view.image, image.shape[:2], views[0].image, shape)
        image, mask = datasets.shrink_image(image, downscale), datasets.shrink_mask(mask, downscale)
        if downscale == 1 and not view.distortion and photograph.orientation == 1 and photograph.kind in KEPT:
            shutil.copyfile(str(view.image), str(folder / "image" / (name + KEPT[photograph.kind])))
        else:
            writing.write_image(folder / "image" / (name + ".png"), image)
        writing.write_image(folder / "mask" / (name + ".png"), mask.astype(np.uint8) * 255)
        matrices.append(datasets.shrink_intrinsics(intrinsics, downscale))
        looks.append(make_look(view.image.name, image, mask, matrices[-1], view.pose))
    pictures.say_doubtful(doubtful)
    return looks, matrices


def write_cameras(path, poses, intrinsics, sphere):
    """Write a cameras.npz: world_mat_i from the poses (N, 4, 4) and intrinsics (N, 3, 3), scale_mat_i from the Ball."""
    cameras, scale_mat = {}, np.diag((sphere.radius, sphere.radius, sphere.radius, 1.0))
    scale_mat[:3, 3] = sphere.centre
    for index, pose in enumerate(poses):
        world_mat = np.linalg.inv(pose)
        world_mat[:3] = intrinsics[index] @ world_mat[:3]
        cameras[f"world_mat_{index}"], cameras[f"scale_mat_{index}"] = world_mat, scale_mat
    np.savez(str(path), **cameras)


if __name__ == "__main__":
    helper.run(main)
