"""Photographs alone -> cameras, by structure from motion (pycolmap): features, matches, mapping, refinement.

Everything lies in a working folder: `images/`, the features and matches in `database.db`, and the result `sparse/0`, a
COLMAP model that other programs open, too. An interrupted search goes on from the features and matches found so far.
"""
import contextlib
import copy
import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from itertools import combinations
from pathlib import Path
from typing import List, NamedTuple, Tuple

import cv2
import numpy as np
from tqdm import tqdm

from files import pictures, writing
from helper import UserError

MOST_FEATURES = 4000        # per photograph, those of most contrast; 3,000 are a little less exact
LARGEST = 1600              # pixels: the longest side on which features are sought; SIFT doubles it
FAINTEST = 0.006            # SIFT's threshold of contrast, a sixth of the usual one
LEAST_SEEN = 20             # points that a photograph must show to be placed; COLMAP's 30 lose many of few photographs
TRIALS = 3000               # of RANSAC at most: enough where 4 of 10 matches are right, which pairs of use have
FEW_FEATURES = 150          # a photograph with fewer has no texture to speak of
ALL_PAIRS = 80              # photographs, up to which each is matched with every other
NEIGHBOURS = 10             # of more photographs, each is matched with so many that follow, and some farther ones
HUBS = 40                   # photographs of a large set that are all matched with one another, which closes loops
TILE = 10                   # photographs: pairs are matched in blocks of TILE x TILE
FOCAL = 1.2                 # of the longer side: the focal length to start from, where EXIF has none
FILM_DIAGONAL = 43.27       # mm, of 35 mm film
LEAST_VIEWS = 3
STILL = 0.002               # of the diagonal: a match that moves less stands still
FINE = 0.75                 # share of a photograph's features, the smallest, that the last adjustment takes
FEWEST_FINE = 60            # of a photograph, which keeps as many at least
SETTLED = 1e-6              # the last adjustment ends when a step lowers its cost by a smaller share
SETTLED_ON_THE_WAY = 1e-5   # and an earlier one of all photographs
SURE_CENTRE = 0.0015        # of the longer side: the principal point is refined if it is known better than that
SURE_BEND = 5.0             # standard deviations that the second coefficient of distortion must differ from 0
BETTER = ("take 30 to 60 sharp pictures in even light, all around and from two heights, each overlapping the next by "
          "two thirds; lay newspaper or other texture under an object that has none of its own")


class Found(NamedTuple):
    """Cameras that were found."""
    folder: Path                            # the working folder
    left_out: List[Tuple[str, str]]         # (name, reason) of each photograph without a camera


class Progress(NamedTuple):
    """What find_cameras knows while it works."""
    database: object            # pycolmap.Database
    path: Path                  # its file
    paths: List[Path]           # the photographs
    numbers: List[int]          # of their images in the database


def library():
    """Return pycolmap, with its log quiet. Raise UserError if it is missing or too old."""
    try:
        import pycolmap
    except ImportError as error:
        raise UserError("cameras of photographs alone are found by pycolmap: pip install -r requirements-photos.txt "
                        "(Python 3.10); or make them with COLMAP's own programs and give the folder with its "
                        "model") from error
    if int(pycolmap.__version__.split(".")[0]) < 4:
        raise UserError(f"pycolmap {pycolmap.__version__} is too old; version 4 is needed, which has wheels for Python "
                        "3.10 and later; or make the cameras with COLMAP's own programs")
    pycolmap.logging.minloglevel = 3    # fatal errors only
    return pycolmap


def find_cameras(paths, work, in_sequence=False):
    """Find the cameras of photographs. Return a Found.

    paths: the photographs, in the folder `work`/images, all with distinct names. work: the working folder. in_sequence:
    neighbours in the order of their names overlap, as in a video. Raises UserError if most have no camera.
    """
    library()
    if len(paths) < LEAST_VIEWS:
        raise UserError(f"only {len(paths)} photograph{'s' * (len(paths) != 1)}; cameras are found from at least "
                        f"{LEAST_VIEWS}, better dozens: " + BETTER)
    state = signature(paths, in_sequence)
    done = read_state(work)
    if done.get("photographs") == state and "left_out" in done and (work / "sparse" / "0").is_dir():
        return Found(work, [tuple(entry) for entry in done["left_out"]])
    path = start(work, state, done)
    try:
        with library().Database.open(str(path)) as database:
            progress = Progress(database, path, paths, find_features(database, paths))
            match(progress, in_sequence)
            turning = leave_still(progress)
            models = map_views(progress, work)
            model, left_out = judged(models, progress)
            drop_coarse(model, database)
    except (RuntimeError, ValueError, IndexError) as error:     # as pycolmap raises for a damaged database
        raise UserError(f"{path}: cannot be used ({str(error).splitlines()[0][-200:]}); remove {work} and start "
                        "again") from error
    if turning:
        print("notice: the camera stood still and the object turned; the cameras are found from what moves")
    write_model(refined(model), work)
    writing.write_bytes(work / "state.json", json.dumps({"photographs": state, "left_out": left_out}).encode())
    path.with_name("pairs.txt").unlink(missing_ok=True)
    return Found(work, left_out)


# --- the working folder -----------------------------------------------------------------------------------------------

def signature(paths, in_sequence):
    """Return what must stay the same for earlier work to count: per photograph its name, size in bytes and date."""
    files = [[path.name, os.stat(str(path)).st_size, os.stat(str(path)).st_mtime_ns] for path in paths]
    return {"files": files, "in_sequence": in_sequence, "features": [MOST_FEATURES, LARGEST]}


def read_state(work):
    """Return what an earlier search wrote of itself, {} if there is nothing of use."""
    try:
        state = json.loads((work / "state.json").read_text())
    except (OSError, ValueError):
        return {}
    return state if isinstance(state, dict) else {}


def start(work, state, done):
    """Return the path of the database to go on with. An earlier one of other photographs is removed."""
    path = work / "database.db"
    if done.get("photographs") != state:
        if path.exists() and done:
            print(f"notice: {work}: of other photographs or settings; starting again")
        for file in work.glob("database.db*"):
            file.unlink()
        writing.write_bytes(work / "state.json", json.dumps({"photographs": state}).encode())
    return path


def write_model(model, work):
    """Write a pycolmap.Reconstruction to `work`/sparse/0, whole or not at all."""
    target, unfinished = work / "sparse" / "0", work / "sparse.unfinished"
    shutil.rmtree(str(unfinished), ignore_errors=True)
    with writing.writing(target):
        unfinished.mkdir(parents=True)
        model.write_binary(str(unfinished))
        shutil.rmtree(str(work / "sparse"), ignore_errors=True)
        target.parent.mkdir()
        unfinished.rename(target)


# --- features ---------------------------------------------------------------------------------------------------------

def find_features(database, paths):
    """Find the features of photographs and store them. Return the numbers of their images in the database."""
    headers = [pictures.read_header(path) for path in paths]
    cameras, stored = {}, {image.name: image.image_id for image in database.read_all_images()}
    for camera in database.read_all_cameras():
        cameras[camera.camera_id] = camera
    groups, numbers = {}, [stored.get(stored_name(index, path)) for index, path in enumerate(paths)]
    missing = [index for index, number in enumerate(numbers) if number is None]
    for index, number in enumerate(numbers):
        if number is not None:
            groups[headers[index].size, headers[index].lens] = database.read_image(number).camera_id
    threads = max(1, min(4, os.cpu_count() or 1))
    with ThreadPoolExecutor(threads) as pool, progress_bar("features", len(paths), len(paths) - len(missing)) as bar:
        for start in range(0, len(missing), 2 * threads):   # not all at once: results wait in memory
            block = missing[start:start + 2 * threads]
            for index, found in zip(block, pool.map(features, [paths[index] for index in block])):
                key = headers[index].size, headers[index].lens
                if key not in groups:
                    groups[key] = new_camera(database, headers[index])
                numbers[index] = store(database, stored_name(index, paths[index]), groups[key], found)
                bar.update()
    return numbers


def stored_name(index, path):
    """Return the name of a photograph in the database, where lists of pairs forbid blanks."""
    return f"{index:05d}_" + "_".join(path.name.split())


def features(path):
    """Return the features of a photograph: keypoints (N, 4) float32, COLMAP's pixels, and descriptors (N, 128)."""
    image = pictures.read_picture(path, pictures.grey).pixels
    factor = min(1.0, LARGEST / max(image.shape))
    if factor < 1:
        image = cv2.resize(image, None, fx=factor, fy=factor, interpolation=cv2.INTER_AREA)
    keypoints, descriptors = sift(image)
    keypoints[:, :2] *= 1 / factor      # pixel centres are at half-integers
    return keypoints, descriptors


def sift(image):
    """Return the SIFT features of an image (H, W) uint8.

    They are keypoints (N, 4) float32: x and y in COLMAP's pixels, size, angle in radians; and descriptors (N, 128)
    uint8, the square roots that RootSIFT compares (Arandjelovic and Zisserman, 2012). OpenCV's SIFT takes half the time
    of pycolmap's, and works in parallel.
    """
    finder = cv2.SIFT_create(contrastThreshold=FAINTEST, enable_precise_upscale=True)
    keys = sorted(finder.detect(image), key=lambda key: -key.response)[:MOST_FEATURES]
    keys, descriptors = finder.compute(image, keys)
    places = np.array([(key.pt[0] + 0.5, key.pt[1] + 0.5, key.size / 2, np.radians(key.angle)) for key in keys],
                      np.float32).reshape(-1, 4)
    descriptors = np.zeros((0, 128)) if descriptors is None else descriptors
    shares = descriptors / np.maximum(descriptors.sum(axis=1, keepdims=True), 1e-9)
    return places, np.minimum(np.rint(512 * np.sqrt(shares)), 255).astype(np.uint8)


def new_camera(database, header):
    """Store a camera for photographs with this pictures.Header. Return its number."""
    pycolmap = library()
    width, height = header.size
    film, focal = header.lens[2], FOCAL * max(width, height)
    known = 5 <= film <= 2000
    if known:
        focal = film / FILM_DIAGONAL * np.hypot(width, height)
    camera = pycolmap.Camera.create_from_model_name(0, "SIMPLE_RADIAL", float(focal), width, height)
    camera.has_prior_focal_length = known
    camera.camera_id = database.write_camera(camera)
    rig = pycolmap.Rig()
    rig.add_ref_sensor(camera.sensor_id)
    database.write_rig(rig)
    return camera.camera_id


def store(database, name, camera_id, found):
    """Store an image of a camera with its features. Return its number."""
    pycolmap = library()
    keypoints, descriptors = found
    with pycolmap.DatabaseTransaction(database):
        image = pycolmap.Image(name=name, camera_id=camera_id)
        image.image_id = database.write_image(image)
        frame = pycolmap.Frame()
        sensor = database.read_camera(camera_id).sensor_id
        frame.rig_id = database.read_rig_with_sensor(sensor).rig_id
        frame.add_data_id(pycolmap.data_t(sensor, image.image_id))
        database.write_frame(frame)
        database.write_keypoints(image.image_id, keypoints)
        database.write_descriptors(image.image_id, pycolmap.FeatureDescriptors(pycolmap.FeatureExtractorType.SIFT,
                                                                               descriptors))
    return image.image_id


@contextlib.contextmanager
def progress_bar(what, total, done=0):
    """Yield a progress bar for one part of the search."""
    with tqdm(total=total, initial=done, desc=what, unit="pair" if what == "matching" else "photograph",
              dynamic_ncols=True) as bar:
        yield bar


# --- matches ----------------------------------------------------------------------------------------------------------

def pairs_to_match(count, in_sequence):
    """Return the pairs (i, j), i < j, of photographs to match, in blocks: a list of lists.

    Of a video, and of more than ALL_PAIRS photographs, these are neighbours, at distances up to NEIGHBOURS and then of
    16, 32, 64, ..., and all pairs among every n-th, HUBS in number.
    """
    if count <= ALL_PAIRS and not in_sequence:
        pairs = set(combinations(range(count), 2))
    else:
        steps = [*range(1, NEIGHBOURS + 1)] + [1 << power for power in range(4, count.bit_length())]
        pairs = {(i, i + step) for step in steps for i in range(count - step)}
        pairs |= set(combinations(sorted({round(i) for i in np.linspace(0, count - 1, min(count, HUBS))}), 2))
    blocks = {}
    for i, j in sorted(pairs):
        blocks.setdefault((i // TILE, j // TILE), []).append((i, j))
    return list(blocks.values())


def match(progress, in_sequence):
    """Match the features of photographs and store what fits one motion of the camera."""
    blocks = pairs_to_match(len(progress.paths), in_sequence)
    exists = progress.database.exists_two_view_geometry
    missing = [[(i, j) for i, j in block if not exists(progress.numbers[i], progress.numbers[j])] for block in blocks]
    total = sum(map(len, blocks))
    with progress_bar("matching", total, total - sum(map(len, missing))) as bar:
        for block in filter(None, missing):
            run_on_pairs(progress, block, library().match_image_pairs)
            bar.update(len(block))


def run_on_pairs(progress, pairs, call, still=False):
    """Let pycolmap's `call` match pairs of photographs, or verify matches. still: without matches that stand still."""
    pycolmap = library()
    names = [stored_name(index, path) for index, path in enumerate(progress.paths)]
    verification = pycolmap.TwoViewGeometryOptions()
    verification.ransac.random_seed, verification.filter_stationary_matches = 0, still
    verification.ransac.max_num_trials = TRIALS
    with writing.replacing(progress.path.with_name("pairs.txt")) as listing:
        listing.write_text("".join(f"{names[i]} {names[j]}\n" for i, j in pairs), encoding="utf-8")
        if call is pycolmap.verify_matches:
            call(str(progress.path), str(listing), verification)
            return
        options, pairing = pycolmap.FeatureMatchingOptions(), pycolmap.ImportedPairingOptions()
        options.use_gpu, pairing.match_list_path = False, str(listing)
        call(str(progress.path), options, pairing, verification, pycolmap.Device.cpu)


# --- a camera that stands still ---------------------------------------------------------------------------------------

def leave_still(progress):
    """If the camera stood still before an object that turned, drop the matches that do not move. Return whether it did.

    The background stands still in such pictures. It would hold all cameras at one place.
    """
    moves = {}
    pycolmap, database = library(), progress.database
    points = {number: np.asarray(database.read_keypoints(number))[:, :2] for number in progress.numbers}
    numbers, stored = database.read_all_matches()
    for number, matches in zip(numbers, stored):
        first, second = pycolmap.pair_id_to_image_pair(number)
        if len(matches):
            offsets = points[first][matches[:, 0]] - points[second][matches[:, 1]]
            moves[first, second] = matches, np.hypot(*offsets.T)
    camera = database.read_camera(database.read_image(progress.numbers[0]).camera_id)
    reach = STILL * np.hypot(camera.width, camera.height)
    shares = [(move < reach).mean() for matches, move in moves.values() if len(matches) >= 30]
    if not shares or np.median(shares) < 0.2:
        return False
    still = {number: np.zeros(len(places), bool) for number, places in points.items()}
    for (first, second), (matches, move) in moves.items():
        still[first][matches[move < reach, 0]] = True
        still[second][matches[move < reach, 1]] = True
    keep_moving(progress, moves, still)
    return True


def keep_moving(progress, moves, still):
    """Store the matches `moves` {(image, image): (matches, lengths)} anew without keypoints that are `still`."""
    database, index_of = progress.database, {number: index for index, number in enumerate(progress.numbers)}
    database.clear_two_view_geometries()
    database.clear_matches()
    pairs = []
    for (first, second), (matches, _) in moves.items():
        kept = matches[~still[first][matches[:, 0]] & ~still[second][matches[:, 1]]]
        database.write_matches(first, second, kept)
        pairs.append((index_of[first], index_of[second]))
    run_on_pairs(progress, pairs, library().verify_matches, still=True)


# --- mapping ----------------------------------------------------------------------------------------------------------

def map_views(progress, work):
    """Return the pycolmap.Reconstructions of the matched photographs, the largest first."""
    pycolmap = library()
    options = pycolmap.IncrementalPipelineOptions()
    options.min_model_size, options.random_seed, options.extract_colors = LEAST_VIEWS, 0, False
    options.mapper.abs_pose_min_num_inliers = LEAST_SEEN
    options.ba_global_function_tolerance = SETTLED_ON_THE_WAY
    scratch = work / "mapping.unfinished"
    shutil.rmtree(str(scratch), ignore_errors=True)
    scratch.mkdir(parents=True)
    try:
        with progress_bar("cameras", len(progress.paths)) as bar:
            def begin():
                bar.reset()
                bar.update(2)

            models = pycolmap.incremental_mapping(str(progress.path), str(work / "images"), str(scratch), options,
                                                  initial_image_pair_callback=begin, next_image_callback=bar.update)
    finally:
        shutil.rmtree(str(scratch), ignore_errors=True)
    return sorted(models.values(), key=lambda model: -model.num_reg_images())


def judged(models, progress):
    """Return the largest pycolmap.Reconstruction, its images under the photographs' names, and Found's `left_out`.

    Raises UserError if it holds fewer than half of the photographs, or others form a second group.
    """
    count = len(progress.paths)
    groups = [{image.image_id for image in model.images.values() if image.has_pose} for model in models] or [set()]
    reasons = {index: reason(progress, index, groups[0]) for index, number in enumerate(progress.numbers)
               if number not in groups[0]}
    second = max((group - groups[0] for group in groups[1:]), key=len, default=set())
    places = {number: index for index, number in enumerate(progress.numbers)}
    if len(second) >= max(LEAST_VIEWS, count // 5):
        names = [progress.paths[min(places[number] for number in group)].name for group in (groups[0], second)]
        raise UserError(f"the photographs fall into two groups that do not connect, {len(groups[0])} with {names[0]} "
                        f"and {len(second)} with {names[1]}; take pictures in between, or give one group alone")
    if len(groups[0]) < LEAST_VIEWS or 2 * len(groups[0]) < count:
        texts, some = list(reasons.values()), f"only {len(groups[0])}" if groups[0] else "none"
        raise UserError(f"{some} of {count} photographs could be placed; most often: "
                        f"{max(texts, key=texts.count)}; {BETTER}")
    for image in models[0].images.values():
        image.name = progress.paths[places[image.image_id]].name
    return models[0], [(progress.paths[index].name, text) for index, text in reasons.items()]


def reason(progress, index, placed):
    """Return why a photograph has no camera, in words. placed: the numbers of the images that have one."""
    database, number = progress.database, progress.numbers[index]
    if database.num_keypoints_for_image(number) < FEW_FEATURES:
        return "it shows too little texture, or is blurred or dark"
    pairs, found = database.read_two_view_geometries()
    pycolmap = library()
    partners = {(set(pycolmap.pair_id_to_image_pair(pair)) - {number}).pop() for pair, geometry in zip(pairs, found)
                if number in pycolmap.pair_id_to_image_pair(pair) and len(geometry.inlier_matches)}
    if not partners:
        return "it matches no other photograph (another place, too far from the next one, or blurred)"
    return "its matches fit no position of the camera (something that repeats, moves, shines, or is too flat)"


# --- refinement -------------------------------------------------------------------------------------------------------

def drop_coarse(model, database):
    """Remove from a pycolmap.Reconstruction what each photograph shows by its largest features.

    The place of a feature is uncertain in proportion to its size: on DTU's scans those of the largest quarter miss
    their points three times as far as those of the smallest.
    """
    for number in model.reg_image_ids():
        sizes, points = np.asarray(database.read_keypoints(number))[:, 2], model.images[number].points2D
        used = np.array([index for index in range(len(points)) if points[index].has_point3D()], int)
        kept = max(FEWEST_FINE, int(FINE * len(used)))
        for index in used[np.argsort(sizes[used], kind="stable")][kept:]:
            if points[index].has_point3D():     # a point that only two views show goes from both at once
                model.delete_observation(number, int(index))


def refined(model):
    """Return a pycolmap.Reconstruction whose cameras and points are adjusted once more, as free as the data allow.

    First with free principal points. COLMAP holds these at the image's centre, which turns all cameras by a common
    angle. If the data do not tell the principal point, as where the camera never rolls or comes nearer, it stays at the
    centre. Otherwise a second coefficient of radial distortion is tried, too, and kept if the data tell it.
    """
    centred = adjusted(model, "SIMPLE_RADIAL")
    if not all(known_centre(camera, spread) for camera, spread in zip(*spreads(*centred))):
        return adjusted(model, "SIMPLE_RADIAL", free_centre=False)[0]
    bent = adjusted(centred[0], "RADIAL")
    cameras, deviations = spreads(*bent)
    known = all(known_centre(camera, spread) and abs(camera.params[4]) > SURE_BEND * spread[4]
                for camera, spread in zip(cameras, deviations))
    return bent[0] if known else centred[0]


def adjusted(model, lens, free_centre=True):
    """Return a copy of a pycolmap.Reconstruction after a bundle adjustment of everything, and its adjuster.

    lens: the cameras' model, "SIMPLE_RADIAL" or "RADIAL", which has one coefficient more. free_centre: adjust the
    principal points, too.
    """
    pycolmap, trial = library(), copy.deepcopy(model)
    for camera in trial.cameras.values():
        params = [*camera.params, 0.0]
        camera.model = getattr(pycolmap.CameraModelId, lens)
        camera.params = params[:4 + (lens == "RADIAL")]
    options = pycolmap.BundleAdjustmentOptions()
    options.refine_principal_point, options.print_summary = free_centre, False
    options.ceres.loss_function_type = pycolmap.LossFunctionType.CAUCHY     # of 1 pixel: wrong matches count less
    options.ceres.solver_options.function_tolerance = SETTLED
    config = pycolmap.BundleAdjustmentConfig()
    for number in trial.reg_image_ids():
        config.add_image(number)
    config.fix_gauge(pycolmap.BundleAdjustmentGauge.TWO_CAMS_FROM_WORLD)
    adjuster = pycolmap.create_default_ceres_bundle_adjuster(options, config, trial)
    adjuster.solve()
    trial.update_point_3d_errors()
    return trial, adjuster


def spreads(model, adjuster):
    """Return the pycolmap.Cameras in use, and for each the standard deviations of its parameters, inf if unknown."""
    pycolmap = library()
    options = pycolmap.BACovarianceOptions()
    options.params = pycolmap.BACovarianceOptionsParams.ALL
    covariance = pycolmap.estimate_ba_covariance(options, model, adjuster)
    noise = model.compute_mean_reprojection_error()
    cameras = [model.cameras[number] for number in {model.images[image].camera_id for image in model.reg_image_ids()}]
    blocks = [covariance and covariance.get_other_params_cov(camera.params) for camera in cameras]
    return cameras, [np.full(len(camera.params), np.inf) if block is None else noise * np.sqrt(np.diag(block))
                     for camera, block in zip(cameras, blocks)]


def known_centre(camera, spread):
    """Return whether a camera's principal point is known within SURE_CENTRE, and near the image's centre.

    spread: standard deviations of the camera's parameters.
    """
    places, side = list(camera.principal_point_idxs()), max(camera.width, camera.height)
    offset = np.abs(np.array(camera.params)[places] - (camera.width / 2, camera.height / 2)).max()
    return bool(spread[places].max() < SURE_CENTRE * side and offset < 0.1 * side)
