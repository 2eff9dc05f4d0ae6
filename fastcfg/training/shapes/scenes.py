"""Captioned pictures of coloured shapes: the data set of the embedded checkpoint.

Scenes, pictures and captions depend only on the random generators passed in. Pictures are drawn from signed distances:
edges are anti-aliased by pixel coverage at sub-pixel positions. A picture is float32 [3, 32, 32] in [-1, 1].
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from ...utils.checks import check_one_of

IMAGE_SIZE = 32
BACKGROUND = (22, 24, 34)
PALETTE: dict[str, tuple[int, int, int]] = {
    "red": (230, 45, 50),
    "orange": (250, 140, 30),
    "yellow": (250, 230, 70),
    "green": (50, 190, 80),
    "blue": (50, 100, 245),
    "purple": (165, 60, 215),
    "white": (240, 240, 245),
}
RADII: dict[str, float] = {"small": 4.2, "large": 6.0}
"""Radius in pixels of a circle of each size; the other shapes are scaled to look equally large."""

RELATIONS: dict[str, tuple[int, int]] = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}
"""Direction of the first object from the second, in image coordinates (x to the right, y down)."""

_OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
_RELATION_PHRASES: dict[str | None, tuple[str, ...]] = {
    "left of": ("left of", "to the left of"),
    "right of": ("right of", "to the right of"),
    "above": ("above", "over", "on top of"),
    "below": ("below", "under"),
    None: ("and", "with"),
}
_OPENINGS = ("", "", "there is", "a picture of")
SIZE_WORDS = {"small": ("small", "little"), "large": ("large", "big")}

_MARGIN, _GAP, _CROSS_AXIS_JITTER = 1.0, 2.0, 3.0  # in pixels


_ANGLES = -np.pi / 2 + np.arange(10) * np.pi / 5
_STAR = np.stack([np.cos(_ANGLES), np.sin(_ANGLES)], axis=1) * np.tile([[1.22], [0.5]], (5, 1))
_ARM, _QUARTER_TURN = np.array([(0.38, -1.08), (0.38, -0.38), (1.08, -0.38)]), np.array([[0.0, 1.0], [-1.0, 0.0]])
_CROSS = np.concatenate([_ARM @ np.linalg.matrix_power(_QUARTER_TURN, k) for k in range(4)])
# Polygons of a shape of radius 1, centred on their bounding box; the circle has none.
_POLYGONS: dict[str, np.ndarray | None] = {
    "circle": None,
    "square": np.array([(-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)]),
    "triangle": np.array([(0.0, -1.0), (1.12, 1.0), (-1.12, 1.0)]),
    "star": _STAR,
    "cross": _CROSS,
}
SHAPES: tuple[str, ...] = tuple(_POLYGONS)
COLOURS: tuple[str, ...] = tuple(PALETTE)
SIZES: tuple[str, ...] = tuple(RADII)
_HALF_EXTENTS = {name: (1.0, 1.0) if v is None else tuple(np.abs(v).max(axis=0)) for name, v in _POLYGONS.items()}

_PHRASES = "a an there is picture of and with to the on top left right above over below under"
_SIZE_NAMES = " ".join(word for words in SIZE_WORDS.values() for word in words)
VOCABULARY: tuple[str, ...] = tuple(dict.fromkeys([*_PHRASES.split(), *_SIZE_NAMES.split(), *COLOURS, *SHAPES]))
"""Every word a caption can hold, in a fixed order: the vocabulary of the word-level tokenizer."""

MAX_CAPTION_WORDS = 16


@dataclasses.dataclass(frozen=True)
class SceneObject:
    """A coloured shape: one of `SHAPES`, one of `COLOURS` and one of `SIZES`."""

    shape: str
    colour: str
    size: str

    def __post_init__(self) -> None:
        for argument, known in (("shape", SHAPES), ("colour", COLOURS), ("size", SIZES)):
            check_one_of(argument, getattr(self, argument), known)


@dataclasses.dataclass(frozen=True)
class Scene:
    """The contents of a picture: one object, or two and the position of the first relative to the second.

    `relation` is one of `RELATIONS` for two objects; None for one object or any arrangement of two.

    Example:
        >>> scene = Scene((SceneObject("circle", "red", "large"), SceneObject("square", "blue", "small")), "above")
        >>> render(scene, np.random.default_rng(0)).shape
        (3, 32, 32)
    """

    objects: tuple[SceneObject, ...]
    relation: str | None = None

    def __post_init__(self) -> None:
        if len(self.objects) not in (1, 2):
            raise ValueError(f"objects: got {len(self.objects)}, expected 1 or 2")
        allowed = (None, *RELATIONS) if len(self.objects) == 2 else (None,)
        if self.relation not in allowed:
            got, expected = f"{self.relation!r} with {len(self.objects)} object(s)", ", ".join(map(repr, allowed))
            raise ValueError(f"relation: got {got}, expected one of {expected}")


def sample_scene(rng: np.random.Generator, two_objects: float = 0.75, related: float = 0.92) -> Scene:
    """Draw a scene of two objects with probability `two_objects`, which have a relation with probability `related`.

    Two objects never share both shape and colour: a caption could not distinguish them.
    """
    count = 2 if rng.random() < two_objects else 1
    objects: list[SceneObject] = []
    while len(objects) < count:
        shape, colour, size = rng.integers(len(SHAPES)), rng.integers(len(COLOURS)), rng.integers(len(SIZES))
        candidate = SceneObject(SHAPES[shape], COLOURS[colour], SIZES[size])
        if all((candidate.shape, candidate.colour) != (o.shape, o.colour) for o in objects):
            objects.append(candidate)
    names = tuple(RELATIONS)
    relation = names[rng.integers(len(names))] if count == 2 and rng.random() < related else None
    return Scene(tuple(objects), relation)


def caption(scene: Scene, rng: np.random.Generator, name_sizes: float = 0.5) -> str:
    """Describe a scene in one of many phrasings, in lower-case words of `VOCABULARY`, at most `MAX_CAPTION_WORDS`.

    Colours, shapes and the relation are always named, each object's size with probability `name_sizes`. The two objects
    come in either order ("a red circle above a blue square", "a blue square below a red circle").
    """
    objects, relation = scene.objects, scene.relation
    if len(objects) == 2 and rng.random() < 0.5:
        objects = objects[::-1]
        relation = _OPPOSITE[relation] if relation else None
    nouns = []
    for item in objects:
        words = f"{item.colour} {item.shape}"
        if rng.random() < name_sizes:
            synonyms = SIZE_WORDS[item.size]
            words = f"{synonyms[rng.integers(len(synonyms))]} {words}"
        nouns.append(f"{'an' if words[0] in 'aeiou' else 'a'} {words}")
    opening, phrases = _OPENINGS[rng.integers(len(_OPENINGS))], _RELATION_PHRASES[relation]
    joint = f" {phrases[rng.integers(len(phrases))]} "
    return f"{opening} {joint.join(nouns)}".strip()


def render(scene: Scene, rng: np.random.Generator) -> np.ndarray:
    """Draw a scene at random positions that satisfy its relation, float32 [3, 32, 32]."""
    return render_batch([scene], rng)[0]


def render_batch(scenes: Sequence[Scene], rng: np.random.Generator) -> np.ndarray:
    """Draw one or more scenes at once, float32 [len(scenes), 3, 32, 32]."""
    return render_named(scenes, rng)[0]


def render_named(scenes: Sequence[Scene], rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The pictures of `render_batch`, and the names of the colour and the shape of every pixel, int64 [B, 32, 32].

    A name is the index in `COLOURS` or `SHAPES` plus 1, or 0 where no object covers half of the pixel.
    """
    owners = [index for index, scene in enumerate(scenes) for _ in scene.objects]
    items = [item for scene in scenes for item in scene.objects]
    centres = np.array([centre for scene in scenes for centre in _place(scene, rng)])
    radii = np.array([RADII[item.size] for item in items])
    coverage = np.empty((len(items), IMAGE_SIZE, IMAGE_SIZE), dtype=np.float32)
    for shape in {item.shape for item in items}:
        rows = [row for row, item in enumerate(items) if item.shape == shape]
        coverage[rows] = shape_coverage(shape, centres[rows], radii[rows])
    colours = np.array([PALETTE[item.colour] for item in items], dtype=np.float32)
    background = np.array(BACKGROUND, dtype=np.float32)
    layers = coverage[:, None] * (colours - background)[:, :, None, None]
    pictures = np.tile(background[:, None, None], (len(scenes), 1, IMAGE_SIZE, IMAGE_SIZE))
    np.add.at(pictures, np.array(owners), layers)
    colour_names = np.zeros((len(scenes), IMAGE_SIZE, IMAGE_SIZE), dtype=np.int64)
    shape_names = np.zeros_like(colour_names)
    for owner, item, cover in zip(owners, items, coverage, strict=True):
        covered = cover >= 0.5
        colour_names[owner][covered] = COLOURS.index(item.colour) + 1
        shape_names[owner][covered] = SHAPES.index(item.shape) + 1
    return pictures / np.float32(127.5) - np.float32(1.0), colour_names, shape_names


def shape_coverage(shape: str, centres: np.ndarray, radii: np.ndarray) -> np.ndarray:
    """The part of every pixel that shapes of one kind cover, float32 [N, 32, 32] in [0, 1].

    `centres` [N, 2] are (x, y) in pixels, of which (0, 0) spans 0 to 1; `radii` [N] are in pixels.
    """
    grid = np.arange(IMAGE_SIZE, dtype=np.float32) + np.float32(0.5)
    scale = np.asarray(radii, dtype=np.float32)[:, None, None]
    x = (grid[None, None, :] - centres[:, 0, None, None].astype(np.float32)) / scale
    y = (grid[None, :, None] - centres[:, 1, None, None].astype(np.float32)) / scale
    polygon = _POLYGONS[shape]
    distance = np.sqrt(x * x + y * y) - 1.0 if polygon is None else _polygon_distance(x, y, polygon)
    return np.clip(np.float32(0.5) - distance * scale, 0.0, 1.0)


def _polygon_distance(x: np.ndarray, y: np.ndarray, polygon: np.ndarray) -> np.ndarray:
    """Signed distance to a polygon, negative inside."""
    squared = np.full(np.broadcast_shapes(x.shape, y.shape), np.inf, dtype=np.float32)
    inside = np.zeros(squared.shape, dtype=bool)
    corners = polygon.astype(np.float32)
    for (ax, ay), (bx, by) in zip(corners, np.roll(corners, -1, axis=0), strict=True):
        ex, ey = bx - ax, by - ay
        px, py = x - ax, y - ay
        along = np.clip((px * ex + py * ey) / (ex * ex + ey * ey), 0.0, 1.0)
        dx, dy = px - along * ex, py - along * ey
        np.minimum(squared, dx * dx + dy * dy, out=squared)
        if ay != by:
            inside ^= ((ay > y) != (by > y)) & (px < ex * py / ey)
    return np.where(inside, -1, 1).astype(np.float32) * np.sqrt(squared)


def _place(scene: Scene, rng: np.random.Generator) -> np.ndarray:
    """Centres of a scene's objects, [objects, 2]: apart along the axis of the relation, nearly level across it."""
    half = [np.array(_HALF_EXTENTS[item.shape]) * RADII[item.size] for item in scene.objects]
    low, high = _MARGIN, IMAGE_SIZE - _MARGIN
    first = rng.random(4)
    if len(half) == 1:
        return (low + half[0] + first[:2] * (high - low - 2 * half[0]))[None]
    names = tuple(RELATIONS)
    direction = RELATIONS[scene.relation or names[rng.integers(len(names))]]
    along = 0 if direction[0] else 1
    across = 1 - along
    one, two = (0, 1) if direction[along] < 0 else (1, 0)
    near, far = half[one][along], half[two][along]
    before, after = np.sort(first[:2]) * (high - low - _GAP - 2 * (near + far))
    centres = np.empty((2, 2))
    centres[one, along] = low + before + near
    centres[two, along] = low + after + 2 * near + _GAP + far
    bounds = [(low + h[across], high - h[across]) for h in half]
    level = bounds[0][0] + first[2] * (bounds[0][1] - bounds[0][0])
    centres[0, across] = level
    centres[1, across] = np.clip(level + (2 * first[3] - 1) * _CROSS_AXIS_JITTER, *bounds[1])
    return centres
