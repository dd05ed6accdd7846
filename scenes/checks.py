"""What is wrong with a scene: judges its masks, its cameras against its masks, its scale matrices and its unit sphere.

Each judge_* function returns Findings. Of cameras and masks that contradict one another it tries the usual mistakes and
names the one that explains them.
"""
import sys
from typing import NamedTuple

import numpy as np

from scenes.visual_hull import (
    COARSE,
    agreements,
    any_cut_off,
    coarse_agreement,
    find_hull,
    ray_distances,
    touches_border,
)

AGREE, SURE = 0.92, 0.97    # intersection over union of mask and hull: a view agrees; all views surely do
FULL = 0.99                 # share of white pixels from which a mask counts as white everywhere
RENEW = "make the scene anew with prepare.py, which finds the sphere, or mend scale_mat"

# The levels of a Finding: the scene is of no use; views may spoil it; worth knowing.
WRONG, LOOK, NOTICE = "wrong", "look", "notice"


class Finding(NamedTuple):
    text: str
    view: int = -1          # -1: the whole scene
    level: str = WRONG
    of_masks: bool = False  # the masks may be the cause


GUESSED_SPHERE = Finding("the masks are cut off at so many borders that the object's extent is unknown; the unit "
                         "sphere is a guess, around what they show", level=NOTICE)


# --- findings ---------------------------------------------------------------------------------------------------------

def print_findings(findings, looks):
    """Print the findings to stderr, one line each. A text that several views share is printed once."""
    for text, level in dict.fromkeys((finding.text, finding.level) for finding in findings):
        which = [finding.view for finding in findings if finding.text == text]
        names = ", ".join(str(i) for i in which[:12]) + (f" and {len(which) - 12} more" if len(which) > 12 else "")
        where = "" if which[0] < 0 else (f"view {names} ({looks[which[0]].name}): " if len(which) == 1 else
                                         f"views {names}: ")
        print(f"{level}: {where}{text}", file=sys.stderr)


def num_lines(findings, level):
    """Return the number of lines that print_findings prints of a level."""
    return len({finding.text for finding in findings if finding.level == level})


def with_mask_hint(findings, mask_hint):
    """Return the findings with mask_hint(), a string, appended to those of masks; not called if there are none."""
    hint = mask_hint() if any(finding.of_masks for finding in findings) else ""
    return [finding._replace(text=finding.text + hint) if finding.of_masks else finding for finding in findings]


def num_tolerated(looks):
    """Return how many of the Looks may be odd before all are in doubt."""
    return max(1, len(looks) // 8)


# --- each mask by itself ----------------------------------------------------------------------------------------------

def judge_masks(looks):
    """Return the Findings on each view's mask by itself."""
    findings = []
    for index, look in enumerate(looks):
        if not look.mask.any():
            findings.append(Finding("the mask is empty; the object must be white, more than half of 255, else leave "
                                    "the view out", index, of_masks=True))
        elif look.mask.mean() > FULL:
            findings.append(Finding("the mask is white everywhere; the object must be white and the background black",
                                    index, of_masks=True) if mostly_white(looks) else
                            Finding("the mask is white everywhere, which is right only where the object fills the "
                                    "image", index, NOTICE, of_masks=True))
        elif touches_border(look.mask):
            findings.append(Finding("the mask touches the image's border: the object is cut off there, and what lies "
                                    "beyond is unknown; better frame it whole", index, NOTICE, of_masks=True))
    return findings


def mostly_white(looks):
    """Tell whether more than half of the masks are white everywhere: the scene then has no masks."""
    return np.mean([look.mask.mean() > FULL for look in looks]) > 0.5


def usable_views(looks):
    """Return the indices of the Looks whose masks show an object: not empty, nor white in a scene without masks."""
    most_white = FULL if mostly_white(looks) else 1
    return [index for index, look in enumerate(looks) if look.mask.any() and look.mask.mean() <= most_white]


# --- masks against the hull -------------------------------------------------------------------------------------------

def judge_agreement(looks, sphere=None):
    """Return the Hull of Looks whose masks are not empty, and the Findings on its agreement with the masks.

    sphere: the unit sphere as a Ball, None if it is not known yet. Cut-off masks do not show where the hull ends, so it
    is carved within the sphere. If it agrees with the masks only when carved without, the sphere is wrong.
    """
    if sphere is None or not any_cut_off(looks):
        return judge_hull(looks)
    if coarse_agreement(looks, np.median, sphere) >= AGREE:
        hull, findings = judge_hull(looks, sphere)
        if not num_lines(findings, WRONG):
            return hull, findings
    hull, findings = judge_hull(looks)
    if num_lines(findings, WRONG):
        return hull, findings
    odd = {finding.view for finding in findings}
    kept = [look for index, look in enumerate(looks) if index not in odd]
    inside = find_hull(kept, ball=sphere)
    if len(inside.points) and np.median(agreements(inside, kept)) >= AGREE:
        return inside, findings
    return hull, [*findings, Finding("cameras and masks agree, but not on an object inside the unit sphere; " + RENEW)]


def judge_hull(looks, ball=None):
    """Return the Hull of Looks, carved within `ball` if given, and the Findings on its agreement with the masks.

    A few views that contradict the others are left out of the hull.
    """
    hull = find_hull(looks, ball=ball)
    shares = agreements(hull, looks) if len(hull.points) else np.zeros(1)
    agreed, doubtful = np.median(shares), np.median(shares) < SURE or shares.min() < AGREE
    odd = odd_views(looks, ball) if doubtful else []
    if odd:
        kept = [look for index, look in enumerate(looks) if index not in odd]
        hull = find_hull(kept, ball=ball)
        agreed = np.median(agreements(hull, kept))
    reason = usual_mistake(looks, agreed) if doubtful else ""
    if agreed < AGREE or reason:
        text = (f"hull and mask share only {agreed:.0%} of their union in the median view, so cameras and masks "
                "contradict one another; " if agreed > 0 else "no point of space lies in all masks; ")
        return hull, [Finding(text + (reason or "look in the picture for a wrong order of images, masks and cameras, "
                                      "for other axes, and for intrinsics of another image size"), of_masks=True)]
    return hull, judge_views(hull, looks, odd)


def judge_views(hull, looks, odd):
    """Return the Findings on single views that disagree with the Hull. odd: the views that were left out of it, which
    must agree better."""
    findings = []
    for index, share in enumerate(agreements(hull, looks)):
        if share < (AGREE if index in odd else AGREE - 0.1):
            inverted = agreements(hull, [looks[index]._replace(mask=~looks[index].mask)])[0] > AGREE
            findings.append(Finding(
                f"its mask and the hull of the other views share only {share:.0%} of their union: " +
                ("with black and white of its mask exchanged they agree" if inverted else "its mask, its camera or "
                 "its place in the order is wrong; mend it or leave the view out"), index, LOOK, of_masks=True))
    return findings


def odd_views(looks, ball=None):
    """Return the sorted indices of the views without which the others agree; none if they must be many.

    Greedy: each round leaves out the view whose absence raises the mean agreement most.
    """
    odd = []
    if len(looks) > 12:     # a hull that tolerates a few misses shows the views that are far off, or that many are
        hull = find_hull(looks, COARSE, num_tolerated(looks), ball)
        shares = agreements(hull, looks) if len(hull.points) else np.zeros(1)
        if np.median(shares) < 0.8:
            return []
        odd = [index for index in np.argsort(shares)[:num_tolerated(looks)] if shares[index] < 0.5]
    kept = [index for index in range(len(looks)) if index not in odd]
    agreed = coarse_agreement([looks[index] for index in kept], np.mean, ball)
    while len(odd) < num_tolerated(looks) and len(kept) > 3:
        suspects = kept
        if len(kept) > 12:  # try only the four that agree least with that hull
            others = [looks[index] for index in kept]
            shares = agreements(find_hull(others, COARSE, num_tolerated(looks), ball), others)
            suspects = [kept[index] for index in np.argsort(shares)[:4]]
        without = [coarse_agreement([looks[index] for index in kept if index != suspect], np.mean, ball)
                   for suspect in suspects]
        if max(without) < agreed + 0.01:
            break
        odd.append(suspects[int(np.argmax(without))])
        kept, agreed = [index for index in kept if index != odd[-1]], max(without)
    return sorted(odd) if agreed >= AGREE else []


def usual_mistake(looks, agreed):
    """Return the words for the usual mistake that explains the disagreement, "" for none.

    agreed: the median agreement as it is. Undoing the mistake must halve the disagreement, at least.
    """
    for reason, corrected in corrections(looks):
        corrected = corrected[::-(-len(corrected) // 24)]
        wanted = max(SURE - 0.02, (1 + agreed) / 2)
        if all(look.mask.any() for look in corrected) and coarse_agreement(corrected, np.median) > wanted:
            return reason
    return ""


def corrections(looks):
    """Yield for each usual mistake the words for it, and the Looks with it undone."""
    for reason, turn in (("with y and z of the cameras turned round they agree: the poses have OpenGL's axes (y up, z "
                          "backwards), wanted are y down, z into the scene", (1, -1, -1)),
                         ("with x and y of the cameras turned round they agree: the images or the cameras are upside "
                          "down", (-1, -1, 1)),
                         ("with x and z of the cameras turned round they agree: z must point into the scene",
                          (-1, 1, -1))):
        yield reason, [look._replace(pose=look.pose @ np.diag(turn + (1.0,))) for look in looks]
    yield ("with the poses inverted they agree: world to camera was taken for camera to world, or the reverse",
           [look._replace(pose=np.linalg.inv(look.pose)) for look in looks])
    yield ("with black and white of the masks exchanged they agree; the object must be white and the background black",
           [look._replace(mask=~look.mask) for look in looks])
    for factor in (0.5, 2, 0.25, 4):
        k = np.diag((factor, factor, 1.0))
        yield (f"with the intrinsics times {factor} they agree: they are for images of another size",
               [look._replace(intrinsics=k @ look.intrinsics) for look in looks])
    count = len(looks)
    order = sorted(range(count), key=str)  # 0, 1, 10, 11, 2 ...
    for reason, places in (("with the cameras one place later they agree", np.arange(-1, count - 1)),
                           ("with the cameras one place earlier they agree", np.arange(1, count + 1) % count),
                           ("with the cameras sorted as 0, 1, 10, 11, 2 ... they agree: number the images with leading "
                            "zeros", order),
                           ("with the images sorted as 0, 1, 10, 11, 2 ... they agree: number the images with leading "
                            "zeros", np.argsort(order))):
        yield reason, [look._replace(pose=looks[place].pose, intrinsics=looks[place].intrinsics)
                       for look, place in zip(looks, places)]


# --- the unit sphere --------------------------------------------------------------------------------------------------

def judge_scale(matrices):
    """Return the Findings on a scene's scale_mat_i, each (4, 4)."""
    linear, findings = matrices[0][:3, :3], []
    if any(not np.allclose(m / m[3, 3], matrices[0] / matrices[0][3, 3], rtol=1e-4, atol=1e-9) for m in matrices):
        findings.append(Finding("the scale_mat of the views differ; one sphere holds the object, so give all the same"))
    if not np.allclose(linear @ linear.T, np.eye(3) * (linear[0] @ linear[0]), rtol=1e-3,
                       atol=1e-3 * (linear[0] @ linear[0])):
        findings.append(Finding("scale_mat_0 is more than a scale, rotation and shift, so it does not keep the sphere "
                                "round; write diag(r, r, r, 1) with the centre as its last column"))
    return findings


def judge_sphere(hull, looks, odd):
    """Return the Findings on the unit sphere: it must hold the object and no camera.

    hull, looks: normalised. odd: the views whose masks are not trusted; -1 among them: neither hull nor masks are.
    """
    trusted = -1 not in odd
    findings, inside, missing = [], [], {}
    for index, look in enumerate(looks):
        centre, axis = look.pose[:3, 3], look.pose[:3, 2]
        missed = ray_distances(look, np.argwhere(look.mask)[:, ::-1]) > 1 if look.mask.any() else np.zeros(1, bool)
        if axis @ centre > 1:
            findings.append(Finding("the unit sphere is behind the camera; z must point into the scene", index))
        elif np.linalg.norm(centre) < 1:
            inside.append(index)
        elif trusted and index not in odd and missed.mean() > 0.01:
            missing[index] = missed.mean()
        elif trusted and index not in odd and len(look.corners) and ray_distances(look, look.corners).max() > 1:
            findings.append(Finding("some masked pixels' rays miss the unit sphere", index, NOTICE))
    text = "the camera is inside the unit sphere; tracing starts outside it: " + RENEW
    findings += [Finding(text, index, LOOK if len(inside) <= num_tolerated(looks) else WRONG) for index in inside]
    if missing:
        most = max(missing.values())
        text = (f"{'up to ' * (len(missing) > 1)}{most:.0%} of the masked pixels' rays miss the unit sphere; clean the "
                "mask of specks, or " + RENEW)
        level = LOOK if len(missing) <= num_tolerated(looks) else WRONG
        findings += [Finding(text, index, level, of_masks=True) for index in missing]
    if trusted and len(hull.points):
        findings += judge_reach(np.linalg.norm(hull.points, axis=1).max(), any_cut_off(looks))
    return findings


def judge_reach(reach, cut_off):
    """Return the Findings on the hull's farthest distance from the unit sphere's centre.

    It may exceed the radius if masks are cut off, since the hull's end is then unknown.
    """
    if reach > 1.05 and not cut_off:
        return [Finding(f"the visual hull reaches {reach:.2f} from the centre of the unit sphere; " + RENEW)]
    if reach < 0.25:
        return [Finding(f"the visual hull reaches only {reach:.2f} from the centre of the unit sphere, so training "
                        "starts far from it; " + RENEW)]
    return []
