"""Walking figures: who somebody is (`Person`), how they stand just now (`Pose`), and drawing the two."""

from __future__ import annotations

from dataclasses import dataclass, replace

from nformer_edge.data.drawing import SINE, Canvas, Color, Draw, Stripes

SKINS: tuple[Color, ...] = ((240, 205, 180), (222, 178, 145), (178, 128, 92), (122, 82, 58))
HAIRS: tuple[Color, ...] = ((28, 24, 22), (84, 54, 32), (150, 104, 52), (206, 176, 108), (150, 150, 150))
CLOTHES: tuple[Color, ...] = (
    (32, 32, 38),
    (232, 232, 226),
    (128, 130, 134),
    (176, 40, 46),
    (36, 66, 148),
    (44, 116, 70),
    (226, 188, 58),
    (120, 62, 132),
    (220, 124, 50),
    (110, 168, 206),
    (132, 92, 58),
    (224, 150, 172),
)
LOWERS: tuple[Color, ...] = (
    (34, 34, 40),
    (52, 68, 112),
    (92, 120, 168),
    (150, 138, 110),
    (106, 108, 110),
    (214, 210, 200),
    (96, 54, 44),
)
SHOES: tuple[Color, ...] = ((26, 26, 28), (226, 226, 222), (150, 60, 50), (110, 78, 50))

PATTERNS = ("plain", "rows", "columns", "checks", "lower half", "badge", "open")
LEGS = ("trousers", "shorts", "skirt", "dress")
BAGS = ("none", "backpack", "handbag", "shoulder")
VIEWS = ("front", "back", "left", "right")


@dataclass(frozen=True)
class Person:
    """What stays the same from camera to camera. Lengths are thousandths of the body's height."""

    skin: Color
    hair: Color
    long_hair: bool
    upper: Color
    second: Color
    pattern: str
    long_sleeves: bool
    legs: str
    lower: Color
    shoes: Color
    bag: str
    bag_color: Color
    bag_on_right: bool
    hat: Color | None
    girth: int
    stature: int


@dataclass(frozen=True)
class Pose:
    """What changes from image to image. `phase` is a sixteenth of a walking cycle, `height` the figure's in pixels."""

    view: str
    phase: int
    x: int
    foot: int
    height: int
    aspect: int


def draw_person(draw: Draw, upper: Color, lower: Color) -> Person:
    """Somebody new, in clothes of these main colors."""
    return Person(
        skin=draw.pick(SKINS),
        hair=draw.pick(HAIRS),
        long_hair=draw.chance(45),
        upper=upper,
        second=draw.pick([c for c in CLOTHES if c != upper]),
        pattern=draw.pick(PATTERNS),
        long_sleeves=draw.chance(50),
        legs=draw.pick(LEGS),
        lower=lower,
        shoes=draw.pick(SHOES),
        bag=draw.pick(BAGS),
        bag_color=draw.pick(CLOTHES),
        bag_on_right=draw.chance(50),
        hat=draw.pick(CLOTHES) if draw.chance(25) else None,
        girth=draw.between(840, 1200),
        stature=draw.between(900, 1030),
    )


def look_alikes(draw: Draw, count: int) -> list[Person]:
    """People in the same main colors, and often alike in one thing more."""
    upper, lower = draw.pick(CLOTHES), draw.pick(LOWERS)
    people = [draw_person(draw, upper, lower) for _ in range(count)]
    shared = draw.pick(("pattern", "legs", "bag", "hair"))
    return [replace(person, **{shared: getattr(people[0], shared)}) for person in people]


class _Figure:
    """One drawing of a person: body coordinates (thousandths, from the feet up) to the canvas."""

    def __init__(self, canvas: Canvas, person: Person, pose: Pose) -> None:
        self.canvas, self.person, self.pose = canvas, person, pose
        self.height = pose.height * person.stature // 1000
        self.mirror = -1 if pose.view in ("left", "back") else 1
        self.side = pose.view in ("left", "right")
        swing = SINE[pose.phase % 16]
        self.stride = swing * (105 if self.side else 22) // 256  # how far the feet are apart
        self.lift = abs(SINE[(pose.phase + 4) % 16]) * 18 // 256

    def length(self, thousandths: int) -> int:
        return max(thousandths * self.height // 1000, 1)

    def wide(self, thousandths: int) -> int:
        """A width of the body: build and the camera's aspect count."""
        return max(thousandths * self.height * self.person.girth // 1000 * self.pose.aspect // 1_000_000, 1)

    def at(self, x: int, up: int) -> tuple[int, int]:
        across = x * self.height * self.pose.aspect // 1_000_000 * self.mirror
        return self.pose.x + across, self.pose.foot - (up + self.lift) * self.height // 1000

    def quad(
        self, up_low: int, half_low: int, up_high: int, half_high: int, color: Color, stripes: Stripes | None = None
    ) -> None:
        """An upright trapezoid around the body's axis, half widths with the build."""
        (x, low), (_, high) = self.at(0, up_low), self.at(0, up_high)
        a, b = self.wide(half_low), self.wide(half_high)
        self.canvas.polygon([(x - a, low), (x + a, low), (x + b, high), (x - b, high)], color, stripes)


def _darker(color: Color, percent: int) -> Color:
    r, g, b = (c * percent // 100 for c in color)
    return r, g, b


def paint(canvas: Canvas, person: Person, pose: Pose) -> None:
    """Draws `person` in `pose`, far side first."""
    figure = _Figure(canvas, person, pose)
    if person.bag == "backpack" and pose.view != "back":
        _backpack(figure)
    _arm(figure, near=False)
    _leg(figure, near=False)
    _leg(figure, near=True)
    _trunk(figure)
    _head(figure)
    _arm(figure, near=True)
    if person.bag == "backpack" and pose.view == "back":
        _backpack(figure)
    _carried(figure)


def _leg(figure: _Figure, near: bool) -> None:
    person, sign = figure.person, 1 if near else -1
    hip_x = 0 if figure.side else 48 * sign
    hip, knee = (
        figure.at(hip_x, 480),
        figure.at(hip_x + figure.stride * sign * 6 // 10 + (10 if figure.side else 0), 265),
    )
    lifted = max(sign * SINE[(figure.pose.phase + 4) % 16], 0) * 40 // 256
    ankle = figure.at(hip_x + figure.stride * sign, 40 + lifted)
    shade = 100 if near else 82
    bare, cloth = _darker(person.skin, shade), _darker(person.lower, shade)
    long = person.legs == "trousers"
    canvas = figure.canvas
    canvas.limb(knee, ankle, figure.wide(72 if long else 58), figure.wide(54 if long else 40), cloth if long else bare)
    canvas.limb(hip, knee, figure.wide(104), figure.wide(76), bare if person.legs in ("skirt", "dress") else cloth)
    toe = figure.at(hip_x + figure.stride * sign + (52 if figure.side else 0), 18 + lifted)
    canvas.limb((ankle[0], toe[1]), toe, figure.length(44), figure.length(36), _darker(person.shoes, shade))


def _trunk(figure: _Figure) -> None:
    person = figure.person
    hips, shoulders = (66, 74) if figure.side else (88, 118)
    if person.legs == "skirt":
        figure.quad(300, hips + 34, 520, hips, person.lower)
    elif person.legs != "dress":
        figure.quad(450, hips, 540, hips, person.lower)
    axis, chest = figure.at(0, 690)
    kinds = {"badge": figure.wide(80), "open": figure.wide(58), "lower half": 2}
    hidden = person.pattern in ("badge", "open") and figure.pose.view != "front"
    stripes = None
    if person.pattern != "plain" and not hidden:
        period = kinds.get(person.pattern, figure.length(84))
        stripes = Stripes(person.pattern, person.second, axis, chest, period)
    bottom = 300 if person.legs == "dress" else 490
    figure.quad(500, hips, 780, shoulders, person.upper, stripes)
    figure.quad(780, shoulders, 822, shoulders // 2, person.upper, stripes)
    if person.legs == "dress":
        figure.quad(bottom, hips + 44, 510, hips, person.upper, stripes)


def _arm(figure: _Figure, near: bool) -> None:
    person, sign = figure.person, 1 if near else -1
    swing = -figure.stride * sign
    shoulder_x = 0 if figure.side else 118 * sign * person.girth // 1000
    elbow_x = shoulder_x + (swing * 4 // 10 if figure.side else 22 * sign)
    hand_x = shoulder_x + (swing * 8 // 10 + 24 if figure.side else 18 * sign)
    shoulder, elbow, hand = figure.at(shoulder_x, 778), figure.at(elbow_x, 625), figure.at(hand_x, 492)
    shade = 94 if near else 76
    sleeve, skin = _darker(person.upper, shade), _darker(person.skin, shade)
    canvas = figure.canvas
    canvas.limb(elbow, hand, figure.wide(50), figure.wide(38), sleeve if person.long_sleeves else skin)
    canvas.limb(shoulder, elbow, figure.wide(62), figure.wide(52), sleeve)
    canvas.ellipse(*hand, figure.wide(22), figure.length(24), skin)


def _head(figure: _Figure) -> None:
    person, canvas, view = figure.person, figure.canvas, figure.pose.view
    x, y = figure.at(12 if figure.side else 0, 905)
    rx, ry = figure.wide(58), figure.length(74)
    neck = figure.at(0, 830)
    canvas.limb((neck[0], neck[1] - ry // 2), neck, figure.wide(52), figure.wide(56), _darker(person.skin, 88))
    back = figure.at(-14, 905)[0]
    if person.long_hair:
        fall = figure.length(150)
        canvas.box(back - rx, y, back + rx, y + fall, person.hair)
    canvas.ellipse(back if figure.side else x, y, rx + 1, ry + 1, person.hair)
    if view == "front":
        canvas.ellipse(x, y + ry // 5, rx * 5 // 6, ry * 5 // 6, person.skin)
        canvas.ellipse(x, y - ry // 3, rx, ry * 2 // 3, person.hair, below=y - ry // 3)
    elif figure.side:
        canvas.ellipse(x + figure.mirror * rx // 4, y + ry // 5, rx * 3 // 4, ry * 5 // 6, person.skin)
    if person.hat is not None:
        canvas.ellipse(x, y - ry // 4, rx + 3, ry * 5 // 6, person.hat, below=y - ry // 4)
        if view != "back":
            brim = figure.mirror * rx * 3 // 2 if figure.side else 0
            left, right = sorted((x - (0 if figure.side else rx + 3), x + (brim or rx + 3)))
            top = y - ry // 4
            canvas.box(left, top, right, top + 4, _darker(person.hat, 75))


def _backpack(figure: _Figure) -> None:
    color, canvas = figure.person.bag_color, figure.canvas
    if figure.side:
        (x0, y1), (x1, y0) = figure.at(-50, 560), figure.at(-160, 800)
    elif figure.pose.view == "back":
        (x0, y1), (x1, y0) = figure.at(-88, 560), figure.at(88, 800)
    else:
        (x0, y1), (x1, y0) = figure.at(-138, 590), figure.at(138, 770)
    canvas.box(x0, y0, x1, y1, color)
    low = y0 + (y1 - y0) * 6 // 10
    canvas.box(x0, low, x1, y1, _darker(color, 78))


def _carried(figure: _Figure) -> None:
    """What hangs on a strap or from a hand, and the backpack's straps seen from the front."""
    person, canvas, view = figure.person, figure.canvas, figure.pose.view
    dark = _darker(person.bag_color, 72)
    if person.bag == "backpack" and view == "front":
        for x in (-62, 62):
            canvas.limb(figure.at(x, 800), figure.at(x, 590), figure.length(30), figure.length(26), person.bag_color)
    if person.bag not in ("handbag", "shoulder"):
        return
    # `at` mirrors for back and left views, so the person's own right stays their right
    hand = 1 if person.bag_on_right else -1
    far = figure.side and (hand > 0) == (view == "left")
    x = 30 if figure.side else 150 * hand * person.girth // 1000
    up = 500 if person.bag == "shoulder" else 420
    if person.bag == "shoulder" and not figure.side:
        canvas.limb(figure.at(-90 * hand, 800), figure.at(x, up), figure.length(26), figure.length(26), dark)
    if far:
        return
    (cx, cy), w, h = figure.at(x, up), figure.length(72), figure.length(62)
    canvas.box(cx - w, cy - h, cx + w, cy + h, person.bag_color)
    canvas.box(cx - w, cy - h, cx + w, cy - h // 3, dark)
