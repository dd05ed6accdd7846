"""A video -> its best frames: sharp ones, at equal steps of what moves.

The video is read twice by imageio-ffmpeg: once small and grey, to measure sharpness and motion, once to take frames.
"""
import json
import os
from typing import NamedTuple

import cv2
import numpy as np
from tqdm import tqdm

from files import writing
from helper import UserError, check_is_file

SUFFIXES = (".mp4", ".mov", ".m4v", ".avi", ".mkv", ".webm", ".mpg", ".mpeg", ".mts", ".3gp")
SMALL = 480             # pixels of the longer side on which motion and sharpness are measured
CORNERS = 200           # points that are followed from frame to frame
LEAST_MOTION = 0.5      # of the shorter side: the motion in a whole video that is worth a search
MOST_FRAMES = 20000     # of a video; 11 minutes of 30 per second
LEAST_FRAMES = 10       # of a video that ends early
LAST = 4                # frames that are left out: where a video ends early, they may be damaged


class Measures(NamedTuple):
    """What is measured of each frame."""
    sharpness: np.ndarray   # (N,), the mean square of the Laplacian, relative to the contrast
    motion: np.ndarray      # (N,), pixels of the small frames that what moves has moved since the first frame
    side: int               # pixels: their shorter side


def take(video, folder, count):
    """Write about `count` frames of a video to a folder as PNG files. Return their paths, in order.

    Frames that are there already stay. Raises UserError for a video that cannot be read, is too short, or stands still.
    """
    check_is_file(video)
    status = os.stat(str(video))
    wanted = {"video": os.path.abspath(str(video)), "bytes": status.st_size, "date": status.st_mtime_ns, "count": count}
    note = folder.parent / "frames.json"
    try:
        known = json.loads(note.read_text())
        paths = [folder / name for name in known["names"]]
        if known["wanted"] == wanted and all(path.is_file() for path in paths):
            return paths
    except (OSError, ValueError, KeyError, TypeError):
        pass
    measures = measure(video)
    chosen = choose(measures, count)
    for file in folder.glob("frame_*.png"):
        file.unlink()
    paths = write_frames(video, chosen, folder)
    check_enough(video, len(paths))
    writing.write_bytes(note, json.dumps({"wanted": wanted, "names": [path.name for path in paths]}).encode())
    return paths


def measure(video):
    """Return the Measures of a video's frames. Raises UserError if there are too few, or if they do not move."""
    sharpness, steps, before = [], [0.0], None
    for frame in tqdm(small_frames(video), desc="video", unit="frame", dynamic_ncols=True):
        sharpness.append(cv2.Laplacian(frame, cv2.CV_32F).var() / (frame.var() + 1))
        if before is not None:
            steps.append(moved(before, frame))
        before = frame
        if len(sharpness) == MOST_FRAMES:
            print(f"notice: {video}: only its first {MOST_FRAMES} frames are used")
            break
    check_enough(video, len(sharpness))
    if len(sharpness) >= 30:
        del sharpness[-LAST:], steps[-LAST:]
    measures = Measures(np.array(sharpness), np.cumsum(steps), min(before.shape))
    if measures.motion[-1] < LEAST_MOTION * measures.side:
        raise UserError(f"{video}: next to nothing moves in it; walk around the object, or turn it, while you film")
    return measures


def check_enough(video, count):
    """Raise UserError if only so few frames of a video can be read that no search is worth it."""
    if count < LEAST_FRAMES:
        raise UserError(f"{video}: only {count} frames can be read; give a whole video, of a slow walk around the "
                        "object")


def moved(before, frame):
    """Return how far what moves has moved between two grey frames, in pixels: the upper decile of followed corners.

    Of an object that turns before a background that stands still, the median would be 0.
    """
    points = cv2.goodFeaturesToTrack(before, CORNERS, 0.01, 8)
    if points is None:
        return 0.0
    followed, found, _ = cv2.calcOpticalFlowPyrLK(before, frame, points, None)
    offsets = np.linalg.norm(followed - points, axis=2)[found > 0]
    return float(np.percentile(offsets, 90)) if len(offsets) else 0.0


def choose(measures, count):
    """Return the indices of frames to take: of `count` equal parts of the motion, the sharpest frame of each."""
    part = np.minimum((measures.motion / measures.motion[-1] * count).astype(int), count - 1)
    return [max(np.flatnonzero(part == index), key=lambda frame: measures.sharpness[frame])
            for index in np.unique(part)]


# --- reading ----------------------------------------------------------------------------------------------------------

def read_frames(video, **options):
    """Yield a video's description, then its frames as bytes. Raise UserError if it is no video.

    A video that ends early yields the frames that are there. options: of imageio_ffmpeg.read_frames.
    """
    import imageio_ffmpeg
    frames = imageio_ffmpeg.read_frames(str(video), **options)
    try:
        yield next(frames)
    except (OSError, RuntimeError, StopIteration, ValueError, KeyError, IndexError) as error:
        raise UserError(f"{video}: cannot be read as a video (it ends too early, is damaged, or of an unknown kind); "
                        "export it as MP4") \
            from error
    try:
        yield from frames
    except (OSError, RuntimeError):     # it ends early
        return
    finally:
        frames.close()


def small_frames(video):
    """Yield a video's frames, grey and shrunk to SMALL on the longer side, (h, w) uint8."""
    width, height = size_of(video)
    factor = min(1.0, SMALL / max(width, height))
    width, height = (max(2, int(round(side * factor / 2)) * 2) for side in (width, height))
    frames = read_frames(video, pix_fmt="gray", bits_per_pixel=8, output_params=["-s", f"{width}x{height}"])
    next(frames)
    for content in frames:
        if len(content) == width * height:
            yield np.frombuffer(content, np.uint8).reshape(height, width)


def size_of(video):
    """Return the width and height of a video's frames, as they are shown. Raises UserError if it cannot be read."""
    frames = read_frames(video)
    meta = next(frames)
    content = next(frames, None)
    frames.close()
    if content is None:
        raise UserError(f"{video}: no frame of it can be read; export it as MP4")
    width, height = meta["size"]
    if width * height > 80 * 10 ** 6 or min(width, height) < 16:
        raise UserError(f"{video}: frames of {width}x{height} pixels; give a video of 16 pixels to 80 million")
    return width, height


def write_frames(video, chosen, folder):
    """Write the frames with the indices `chosen` to a folder. Return their paths; fewer if the video ends early."""
    width, height = size_of(video)
    frames, paths, wanted = read_frames(video), [], set(chosen)
    next(frames)
    with tqdm(total=len(wanted), desc="frames", unit="frame", dynamic_ncols=True) as bar:
        for index, content in enumerate(frames):
            if index in wanted and len(content) == 3 * width * height:
                path = folder / f"frame_{index:05d}.png"
                writing.write_image(path, np.frombuffer(content, np.uint8).reshape(height, width, 3))
                paths.append(path)
                bar.update()
            if index >= chosen[-1]:
                break
    frames.close()
    return paths
