"""COCO's protocol written down plainly, to check the fast evaluator against; nothing is shared."""

import numpy as np

THRESHOLDS = [0.5 + 0.05 * step for step in range(10)]
AREAS = {"all": (0, 1e10), "s": (0, 32**2), "m": (32**2, 96**2), "l": (96**2, 1e10)}


def overlap(found, truth, is_crowd):
    """Intersection over union of (x, y, w, h), over the area of the detection for a crowd."""
    width = min(found[0] + found[2], truth[0] + truth[2]) - max(found[0], truth[0])
    height = min(found[1] + found[3], truth[1] + truth[3]) - max(found[1], truth[1])
    inside = max(width, 0) * max(height, 0)
    area = found[2] * found[3]
    return inside / (area if is_crowd else area + truth[2] * truth[3] - inside)


def mask_overlap(found, truth, is_crowd):
    """The same of two masks."""
    inside = (found & truth).sum()
    return inside / (found.sum() if is_crowd else (found | truth).sum())


def matches(found, truth, ious, threshold, area, area_of):
    """Match the detections of an image and category, best first; None is to be left out."""
    low, high = area
    ignored = [t["iscrowd"] or not low <= t["area"] <= high for t in truth]
    order = sorted(range(len(truth)), key=lambda place: ignored[place])
    taken, result = set(), []
    for row, detection in enumerate(found):
        best, chosen = min(threshold, 1 - 1e-10), None
        for place in order:
            if place in taken and not truth[place]["iscrowd"]:
                continue
            if chosen is not None and not ignored[chosen] and ignored[place]:
                break
            if ious[row][place] >= best:
                best, chosen = ious[row][place], place
        if chosen is None:
            result.append(False if low <= area_of(detection) <= high else None)
        else:
            taken.add(chosen)
            result.append(None if ignored[chosen] else True)
    return result, sum(not flag for flag in ignored)


def prepared(truth, results, measure, class_agnostic):
    """Return, category by category, for each image detections, objects and their overlaps."""
    categories = [None] if class_agnostic else sorted(c["id"] for c in truth["categories"])
    images = sorted(image["id"] for image in truth["images"])

    def select(entries, image, category):
        own = [entry for entry in entries if entry["image_id"] == image]
        if category is None:  # category by category, which decides among equal scores
            return sorted(own, key=lambda entry: entry["category_id"])
        return [entry for entry in own if entry["category_id"] == category]

    groups = []
    for category in categories:
        groups.append([])
        for image in images:
            found = select(results, image, category)
            found = sorted(found, key=lambda entry: -entry["score"])[:100]
            wanted = select(truth["annotations"], image, category)
            ious = [[measure(f, t) for t in wanted] for f in found]
            groups[-1].append((found, wanted, ious))
    return groups


def ranked(group, threshold, limit, area, area_of):
    """Return precision and recall after each detection of a category; None without objects."""
    scores, hits, positives = [], [], 0
    for found, wanted, ious in group:
        own, count = matches(found[:limit], wanted, ious, threshold, AREAS[area], area_of)
        positives += count
        for detection, hit in zip(found[:limit], own, strict=True):
            if hit is not None:
                scores.append(detection["score"])
                hits.append(hit)
    if positives == 0:
        return None
    right = np.array(hits, dtype=float)[np.argsort(-np.array(scores), kind="stable")].cumsum()
    return right / np.arange(1, len(right) + 1), right / positives


def average(precision, recall):
    """Return the mean of the envelope of precision at 101 recalls."""
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    places = np.searchsorted(recall, np.linspace(0, 1, 101), side="left")
    return np.mean([envelope[p] if p < len(envelope) else 0.0 for p in places])


def numbers(truth, results, *, measure, area_of, class_agnostic=False):
    """Return the twelve numbers."""
    groups = prepared(truth, results, measure, class_agnostic)

    def summary(kind, limit, area, thresholds):
        curves = [ranked(g, t, limit, area, area_of) for t in thresholds for g in groups]
        known = [curve for curve in curves if curve is not None]
        if not known:
            return -1.0
        if kind == "AR":
            return float(np.mean([recall[-1] if len(recall) else 0.0 for _, recall in known]))
        return float(np.mean([average(precision, recall) for precision, recall in known]))

    return [
        summary("AP", 100, "all", THRESHOLDS),
        summary("AP", 100, "all", THRESHOLDS[:1]),
        summary("AP", 100, "all", THRESHOLDS[5:6]),
        *(summary("AP", 100, area, THRESHOLDS) for area in "sml"),
        *(summary("AR", limit, "all", THRESHOLDS) for limit in (1, 10, 100)),
        *(summary("AR", 100, area, THRESHOLDS) for area in "sml"),
    ]
