"""Judge whether a picture shows a scene, by classical vision in numpy.

Objects are the connected components of the pixels that differ from the background. An object's colour is the palette
entry nearest to its core; its shape is the one with the best overlap over position and scale.
"""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np

from .scenes import BACKGROUND, COLOURS, IMAGE_SIZE, PALETTE, RELATIONS, SHAPES, Scene, shape_coverage

_PALETTE = np.array([PALETTE[name] for name in COLOURS], dtype=np.float32)
_BACKGROUND = np.array(BACKGROUND, dtype=np.float32)
# In 8-bit RGB distance. The dimmest colour lies 228 from the background and the closest two 100 apart.
_FOREGROUND_DISTANCE = 80.0
_COLOUR_DISTANCE = 50.0
# Specks below this many pixels are neither objects nor errors; the smallest shape covers about 30.
_SPECK_AREA = 6
_SHAPE_OVERLAP = 0.7
_SCALES = (0.92, 1.0, 1.08)
_SHIFTS = (-0.5, 0.0, 0.5)


@dataclasses.dataclass(frozen=True)
class Finding:
    """One object found in a picture.

    The nearest palette colour, or None if the object is not of one; the best matching shape, or None if none overlaps
    well; the centroid (x, y) in pixels; and the best overlap, in [0, 1].
    """

    colour: str | None
    shape: str | None
    centre: tuple[float, float]
    overlap: float


@dataclasses.dataclass(frozen=True)
class Verdict:
    """The correct parts of a picture, under the best assignment of found to wanted objects.

    `relation`, the arrangement, is True for a scene without one. If the number of objects is wrong, all are False.
    """

    colours: bool
    shapes: bool
    relation: bool
    count: bool

    @property
    def correct(self) -> bool:
        """Whether everything is right."""
        return self.colours and self.shapes and self.relation and self.count


def judge(image: np.ndarray, scene: Scene) -> Verdict:
    """Compare a picture, float [3, 32, 32] in [-1, 1], with the scene it should show; ValueError for other shapes.

    Example:
        >>> from .scenes import Scene, SceneObject, render
        >>> scene = Scene((SceneObject("star", "red", "large"),))
        >>> judge(render(scene, np.random.default_rng(0)), scene).correct
        True
    """
    found, wanted = find_objects(image), scene.objects
    if len(found) != len(wanted):
        return Verdict(colours=False, shapes=False, relation=False, count=False)
    verdicts = []
    for order in itertools.permutations(found):
        colours = all(f.colour == w.colour for f, w in zip(order, wanted, strict=True))
        shapes = all(f.shape == w.shape for f, w in zip(order, wanted, strict=True))
        verdicts.append(Verdict(colours, shapes, _relation_holds(order, scene.relation), count=True))
    return max(verdicts, key=lambda v: (v.correct, v.colours + v.shapes, v.relation))


def find_objects(image: np.ndarray) -> list[Finding]:
    """List the objects of a picture, largest first, without specks; argument and error as for `judge`."""
    if image.shape != (3, IMAGE_SIZE, IMAGE_SIZE):
        raise ValueError(f"image: got shape {tuple(image.shape)}, expected (3, {IMAGE_SIZE}, {IMAGE_SIZE})")
    rgb = (np.clip(np.asarray(image, dtype=np.float32), -1, 1).transpose(1, 2, 0) + 1) * 127.5
    distance = np.linalg.norm(rgb - _BACKGROUND, axis=2)
    labels, count = connected_components(distance > _FOREGROUND_DISTANCE)
    areas = np.bincount(labels.ravel(), minlength=count + 1)[1:]
    order = [int(label) + 1 for label in np.argsort(-areas, kind="stable") if areas[label] >= _SPECK_AREA]
    return [_describe(rgb, labels, label) for label in order]


def connected_components(mask: np.ndarray) -> tuple[np.ndarray, int]:
    """Label the 4-connected components of a mask, bool [H, W]: int64, 0 outside and 1 to n inside; also returns n."""
    spread, labels = np.where(mask, np.arange(1, mask.size + 1).reshape(mask.shape), 0), None
    while labels is None or not np.array_equal(spread, labels):
        # Every pixel takes the largest label among itself and its neighbours until nothing changes.
        labels, padded = spread, np.pad(spread, 1)
        around = (padded[:-2, 1:-1], padded[2:, 1:-1], padded[1:-1, :-2], padded[1:-1, 2:])
        spread = np.where(mask, np.maximum.reduce([labels, *around]), 0)
    # A 0 before all others, which is there even if the mask has no pixel outside.
    values, compact = np.unique(np.append(0, labels), return_inverse=True)
    return compact.ravel()[1:].reshape(mask.shape), len(values) - 1


def _describe(rgb: np.ndarray, labels: np.ndarray, label: int) -> Finding:
    """The object of one component."""
    member = labels == label
    inner = ~_dilate(~member)
    core = rgb[inner if inner.any() else member]
    typical = np.median(core, axis=0)
    gaps = np.linalg.norm(core[:, None] - _PALETTE, axis=2)
    nearest = int(np.linalg.norm(typical - _PALETTE, axis=1).argmin())
    uniform = np.mean(gaps[:, nearest] < _COLOUR_DISTANCE) > 0.8
    # Anti-aliased edges: the position of each pixel between background and object colour. The rim just outside the
    # component belongs to it; other objects do not.
    span = typical - _BACKGROUND
    alpha = np.clip((rgb - _BACKGROUND) @ span / (span @ span), 0, 1)
    alpha *= _dilate(member) & ((labels == 0) | member)
    shape, overlap, centre = _match_shape(alpha)
    colour = COLOURS[nearest] if uniform else None
    return Finding(colour, shape if overlap >= _SHAPE_OVERLAP else None, centre, overlap)


def _dilate(mask: np.ndarray) -> np.ndarray:
    """The mask and its 8-neighbours; the picture's rim has none outside."""
    padded, (height, width) = np.pad(mask, 1), mask.shape
    return np.logical_or.reduce([padded[i : i + height, j : j + width] for i in range(3) for j in range(3)])


def _match_shape(alpha: np.ndarray) -> tuple[str, float, tuple[float, float]]:
    """Best shape of a coverage map, its overlap, and the map's centroid."""
    grid, total = np.arange(IMAGE_SIZE) + 0.5, float(alpha.sum())
    x, y = float((alpha.sum(axis=0) @ grid) / total), float((alpha.sum(axis=1) @ grid) / total)
    best, best_overlap = SHAPES[0], 0.0
    for shape in SHAPES:
        area, offset = _MOMENTS[shape]
        radius = np.sqrt(total / area)
        tries = list(itertools.product(_SCALES, _SHIFTS, _SHIFTS))
        radii = np.array([radius * scale for scale, _, _ in tries])
        centres = np.array([(x + dx, y + dy - offset * radius * scale) for scale, dx, dy in tries])
        template = shape_coverage(shape, centres, radii)
        overlaps = np.minimum(template, alpha).sum(axis=(1, 2)) / np.maximum(template, alpha).sum(axis=(1, 2))
        if overlaps.max() > best_overlap:
            best, best_overlap = shape, float(overlaps.max())
    return best, best_overlap, (x, y)


def _relation_holds(order: tuple[Finding, ...], relation: str | None) -> bool:
    """Whether the first object is on the right side of the second, more along the relation's axis than across it."""
    if relation is None:
        return True
    dx, dy = RELATIONS[relation]
    x, y = (a - b for a, b in zip(order[0].centre, order[1].centre, strict=True))
    return x * dx + y * dy > abs(y if dx else x)


def _moments(shape: str) -> tuple[float, float]:
    """Area of a shape of radius 1 and the y of its centroid relative to its centre."""
    radius, middle = 10.0, IMAGE_SIZE / 2
    cover = shape_coverage(shape, np.array([[middle, middle]]), np.array([radius]))[0]
    rows = cover.sum(axis=1) @ (np.arange(IMAGE_SIZE) + 0.5)
    return float(cover.sum()) / radius**2, (float(rows / cover.sum()) - middle) / radius


_MOMENTS = {shape: _moments(shape) for shape in SHAPES}
