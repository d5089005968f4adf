"""Cameras: where they hang, what is behind the people, what stands in front of them, and how colors come out."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from nformer_edge.data.drawing import Canvas, Color, Draw, Stripes, blur, halve
from nformer_edge.data.figures import CLOTHES, Person, Pose, paint

BACKGROUNDS = ("wall", "grass", "road", "tiles", "fence", "shop")

_GROUNDS: tuple[Color, ...] = (
    (150, 142, 130),
    (92, 122, 74),
    (112, 114, 120),
    (176, 168, 150),
    (128, 104, 86),
    (84, 92, 104),
)
_CASTS = (
    (256, 256, 256),
    (300, 250, 196),
    (196, 244, 306),
    (232, 284, 214),
    (286, 226, 268),
    (206, 206, 226),
    (312, 282, 236),
    (176, 216, 236),
)


@dataclass(frozen=True)
class Camera:
    """What all of one camera's images share.

    Args:
        number: as in the file names, from 1.
        background: one of BACKGROUNDS.
        ground, wall: the scene's two colors.
        gains: red, green and blue times this over 256.
        contrast: deviation from mid-gray times this over 256.
        offset: added to every channel, -255..255.
        views: the views that people show it, the commonest several times.
        height_percent: the figure's height in the frame.
        aspect: width of things, thousandths: a high camera sees people broad.
        blurs: passes of smoothing.
        noise: amplitude of the sensor's noise.
        shade: light falls off by this many 256ths from one side to the other.
    """

    number: int
    background: str
    ground: Color
    wall: Color
    gains: tuple[int, int, int]
    contrast: int
    offset: int
    views: tuple[str, ...]
    height_percent: int
    aspect: int
    blurs: int
    noise: int
    shade: int


def make_cameras(seed: int, count: int) -> tuple[Camera, ...]:
    """`count` cameras; neighbors in number differ in cast, background and view."""
    draw = Draw(seed, "cameras")
    casts, grounds, views = (
        draw.shuffle(_CASTS),
        draw.shuffle(_GROUNDS),
        draw.shuffle(("front", "back", "left", "right")),
    )
    cameras = []
    for i in range(count):
        most = views[i % 4]
        cameras.append(
            Camera(
                number=i + 1,
                background=BACKGROUNDS[i % len(BACKGROUNDS)],
                ground=grounds[i % len(grounds)],
                wall=grounds[(i + 2) % len(grounds)],
                gains=casts[i % len(casts)],
                contrast=draw.between(150, 270),
                offset=draw.between(-26, 30),
                views=(most, most, most, draw.pick(("front", "back")), draw.pick(("left", "right"))),
                height_percent=draw.between(76, 94),
                aspect=draw.between(900, 1180),
                blurs=draw.between(0, 2),
                noise=draw.between(6, 22),
                shade=draw.between(-90, 90),
            )
        )
    return tuple(cameras)


@dataclass(frozen=True)
class Framing:
    """How well the detector did: sizes and shifts in percent of the frame."""

    jitter: int = 6
    occlusion_percent: int = 22
    cut: bool = False


def photograph(
    person: Person | None, camera: Camera, draw: Draw, height: int, width: int, framing: Framing | None = None
) -> np.ndarray:
    """One detected box: background, person (if any), occluder, then light, lens and sensor.

    Returns:
        uint8 [height, width, 3], RGB, drawn at twice that size.
    """
    framing = framing or Framing()
    canvas = Canvas(2 * height, 2 * width)
    _background(canvas, camera, draw)
    if person is not None:
        pose = _pose(camera, draw, canvas, framing)
        _shadow(canvas, pose)
        paint(canvas, person, pose)
    if draw.chance(framing.occlusion_percent):
        _occlude(canvas, draw)
    return _develop(canvas.pixels, camera, draw)


def _pose(camera: Camera, draw: Draw, canvas: Canvas, framing: Framing) -> Pose:
    high, wide = canvas.pixels.shape[:2]
    percent = camera.height_percent + draw.between(-framing.jitter, framing.jitter)
    foot = high * (98 + draw.between(-framing.jitter, framing.jitter) // 2) // 100
    x = wide * (50 + draw.between(-framing.jitter, framing.jitter)) // 100
    if framing.cut:  # a bad box: half of the person, or somebody at the rim
        percent = percent * draw.between(120, 170) // 100
        foot, x = (
            foot + high * draw.between(-20, 70) // 100,
            x + wide * draw.pick((-1, 1)) * draw.between(15, 40) // 100,
        )
    return Pose(draw.pick(camera.views), draw.between(0, 15), x, foot, high * percent // 100, camera.aspect)


def _darker(color: Color, by: int) -> Color:
    r, g, b = (max(0, min(255, c + by)) for c in color)
    return r, g, b


def _background(canvas: Canvas, camera: Camera, draw: Draw) -> None:
    high, wide = canvas.pixels.shape[:2]
    horizon = high * draw.between(30, 62) // 100
    shift = draw.between(0, 200)
    patterns = {
        "wall": ("checks", 34),
        "grass": ("rows", 14),
        "road": ("lower half", 2),
        "tiles": ("checks", 20),
        "fence": ("columns", 22),
        "shop": ("columns", 74),
    }
    kind, period = patterns[camera.background]
    light = _darker(camera.wall, draw.between(-14, 14))
    lined = Stripes(kind, _darker(light, -22), shift, horizon // 2 if kind == "lower half" else shift, period)
    canvas.box(0, 0, wide, horizon, light, lined)
    ground = _darker(camera.ground, draw.between(-14, 14))
    paved = camera.background in ("tiles", "grass")
    canvas.box(0, horizon, wide, high, ground, Stripes("rows", _darker(ground, 12), 0, shift, 26) if paved else None)
    for _ in range(draw.between(0, 3)):  # things that stand about
        x, w, top = draw.between(-20, wide), draw.between(8, wide // 2), horizon - draw.between(0, high // 3)
        canvas.box(
            x, top, x + w, horizon + draw.between(0, high // 6), _darker(draw.pick(_GROUNDS), draw.between(-50, 40))
        )


def _shadow(canvas: Canvas, pose: Pose) -> None:
    r = pose.height // 6
    part = canvas.pixels[max(pose.foot - 6, 0) : pose.foot + 6, max(pose.x - r, 0) : pose.x + r]
    part[:] = part // 4 * 3


def _occlude(canvas: Canvas, draw: Draw) -> None:
    """Something between the camera and the person: a post, a low wall, or another passer-by's shoulder."""
    high, wide = canvas.pixels.shape[:2]
    color = _darker(draw.pick(draw.pick((_GROUNDS, CLOTHES))), draw.between(-30, 20))
    kind = draw.pick(("post", "low wall", "passer-by"))
    if kind == "post":
        x = draw.between(0, wide)
        canvas.box(x, 0, x + draw.between(wide // 12, wide // 4), high, color)
    elif kind == "low wall":
        top = high * draw.between(58, 82) // 100
        canvas.box(0, top, wide, high, color, Stripes("columns", _darker(color, -25), draw.between(0, 60), 0, 30))
    else:
        x, y = draw.pick((0, wide)), high * draw.between(25, 55) // 100
        half = wide * draw.between(20, 34) // 100
        canvas.ellipse(x, y, half * 2 // 3, half * 3 // 4, draw.pick(_GROUNDS))
        canvas.ellipse(x, y + half // 2 + high // 3, half, high // 3, color)


def _develop(pixels: np.ndarray, camera: Camera, draw: Draw) -> np.ndarray:
    """Light, color cast, lens and sensor. Integer arithmetic with floor shifts all the way."""
    image = halve(pixels)
    wide = image.shape[1]
    light = 256 + draw.between(-26, 26)
    ramp = light + (np.arange(wide, dtype=np.int32) * 2 - wide) * camera.shade // (2 * wide)
    gains = np.array(camera.gains, dtype=np.int32) + draw.between(-8, 8)
    image = (image * ramp[None, :, None]) >> 8
    image = (image * gains) >> 8
    image = (((image - 118) * camera.contrast) >> 8) + 118 + camera.offset
    image = blur(image, camera.blurs)
    image = image + draw.noise(image.shape, camera.noise)
    return np.clip(image, 0, 255).astype(np.uint8)
