"""The image of one note: a few things of one shape and one colour on a background without meaning.

Shape and colour are the style. Number, position, size, rotation, shade, background, light and noise vary freely: two
images of a style share hardly a pixel, yet a pretrained encoder distinguishes the styles.
"""

import numpy as np
from PIL import Image, ImageDraw

SIZE = 160  # pixels, both sides
_SUPERSAMPLING = 2  # things are drawn larger and then reduced, for smooth edges

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (205, 35, 40), "yellow": (240, 205, 40), "green": (45, 140, 60), "blue": (35, 80, 200),
    "purple": (130, 50, 165),
}  # fmt: skip


def _circle(radius: float, num_corners: int = 40) -> np.ndarray:
    """Corners of a regular polygon `[K, 2]`."""
    return _spokes(np.full(num_corners, radius))


def _spokes(radii: np.ndarray) -> np.ndarray:
    """Points at equal angles, the k-th at distance `radii[k]` from the centre `[K, 2]`."""
    angles = np.arange(len(radii)) * (2 * np.pi / len(radii))
    return np.stack([radii * np.cos(angles), radii * np.sin(angles)], axis=1)


def _arc(radius: float, x: float, start: float, end: float) -> np.ndarray:
    """20 points of a circle around (x, 0), between two angles in degrees `[20, 2]`."""
    angles = np.deg2rad(np.linspace(start, end, 20))
    return np.stack([x + radius * np.cos(angles), radius * np.sin(angles)], axis=1)


_CROSS = [(3, 1), (1, 1), (1, 3), (-1, 3), (-1, 1), (-3, 1), (-3, -1), (-1, -1), (-1, -3), (1, -3), (1, -1), (3, -1)]
_ZIGZAG = [(-8, -1), (-4, 4), (0, -1), (4, 4), (8, -1), (8, -4), (4, 1), (0, -4), (-4, 1), (-8, -4)]

# Closed outlines `[K, 2]` of about unit radius, to be rotated, scaled and filled.
SHAPES: dict[str, np.ndarray] = {
    "discs": _circle(0.8),
    "triangles": _circle(1.0, 3),
    "bars": np.array([(1.5, 0.14), (-1.5, 0.14), (-1.5, -0.14), (1.5, -0.14)]),
    "stars": _spokes(np.tile([1.15, 0.45], 5)),
    "rings": np.concatenate([_circle(1.0), _circle(1.0)[:1], _circle(0.68)[:1], _circle(0.68)[::-1]]),
    "crosses": np.array(_CROSS) * 0.31,
    "crescents": np.concatenate([_arc(1.0, 0.0, 50, 310), _arc(0.79, 0.45, 284, 76)]),
    "zigzags": np.array(_ZIGZAG) * 0.16,
}

# (colour, shape). Neighbours differ in both. 5 and 8 are coprime, so every combination occurs once.
STYLES: tuple[tuple[str, str], ...] = tuple(
    (list(COLOURS)[i % len(COLOURS)], list(SHAPES)[i % len(SHAPES)]) for i in range(len(COLOURS) * len(SHAPES))
)


def draw_image(rng: np.random.Generator, colour: str, shape: str) -> Image.Image:
    """An RGB image of SIZE x SIZE pixels."""
    side = SIZE * _SUPERSAMPLING
    image = _background(rng).resize((side, side), Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(image)
    num_things = int(rng.integers(3, 8))
    radius = side * rng.uniform(0.19, 0.26) / np.sqrt(num_things / 3)
    base = np.array(COLOURS[colour]) + rng.normal(0, 8, 3)
    turn = rng.uniform(0, 2 * np.pi)
    for middle in rng.uniform(0.1, 0.9, (num_things, 2)) * side:
        a = turn + rng.normal(0, 0.5)
        rotation = np.array([[np.cos(a), np.sin(a)], [-np.sin(a), np.cos(a)]])
        outline = middle + radius * rng.uniform(0.7, 1.3) * SHAPES[shape] @ rotation
        red, green, blue = np.clip(base + rng.normal(0, 7, 3), 0, 255).astype(int).tolist()
        draw.polygon([(x, y) for x, y in outline.tolist()], fill=(red, green, blue))
    return _light(rng, image.reduce(_SUPERSAMPLING))


def _background(rng: np.random.Generator) -> Image.Image:
    """Pale clouds of a random tint, coarse or fine, at low resolution."""
    cells = int(rng.choice([2, 3, 5, 12]))
    tint = rng.uniform(150, 235) + rng.normal(0, 12, 3)
    clouds = tint + rng.normal(0, 16, (cells, cells, 1)) + rng.normal(0, 6, (cells, cells, 3))
    return Image.fromarray(np.clip(clouds, 0, 255).astype(np.uint8))


def _light(rng: np.random.Generator, image: Image.Image) -> Image.Image:
    """The image with light that falls off to one side, and with camera noise."""
    pixels = np.asarray(image, dtype=np.float32)  # [H, W, 3]
    ramp = np.linspace(-0.5, 0.5, SIZE, dtype=np.float32)
    slope_y, slope_x = rng.uniform(-0.35, 0.35, 2).astype(np.float32)
    light = np.float32(rng.uniform(0.85, 1.08)) + slope_y * ramp[:, None, None] + slope_x * ramp[None, :, None]
    noise = rng.integers(-8, 9, (SIZE, SIZE, 1), dtype=np.int8)
    return Image.fromarray(np.clip(pixels * light + noise, 0, 255).astype(np.uint8))
