"""Captioned pictures for the tiny model: a drawing, tinted and turned, on a drawn place.

Deterministic in the seed.

A picture is drawn at 128x128 and halved to 64x64. The caption names the colour where the drawing was tinted,
the class, and in most pictures the place; a rare word in front of the class teaches that such a word means
nothing yet.
"""

import zlib
from functools import cache

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

SIZE = 128
COLOURS = {
    "red": (217, 31, 31), "orange": (255, 140, 26), "yellow": (255, 222, 38), "green": (51, 173, 64),
    "blue": (38, 107, 230), "purple": (140, 64, 191), "pink": (255, 128, 184), "brown": (128, 77, 41),
    "black": (41, 41, 46), "white": (247, 247, 247),
}  # fmt: skip
PLACES = {
    "grass": ("on the grass", "on a green hill"),
    "snow": ("in the snow", "on a snowy hill"),
    "beach": ("on the beach", "at the beach"),
    "water": ("in the water", "in the sea"),
    "night": ("at night", "under the night sky"),
    "brick": ("in front of a brick wall", "by a brick wall"),
    "wood": ("on a wooden floor", "on the wooden floor"),
    "forest": ("in the forest", "in front of the forest"),
    "desert": ("in the desert", "on a sand dune"),
    "street": ("on the street", "in the city street"),
    "plain": ("on a {} background", "in front of a {} wall"),
}
RARE_WORDS = "sks zwx qvk xjy olis fpg ktn vxd ucz pbw jrg lqm hzt wgn ydk mxb".split()
YY, XX = np.mgrid[0:SIZE, 0:SIZE].astype(np.float32)


def jitter(rng, colour, amount=14):
    return np.asarray(colour, np.float32) + rng.uniform(-amount, amount, 3).astype(np.float32)


def gradient(top, bottom):
    t = (YY / SIZE)[..., None]
    return (1 - t) * np.asarray(top, np.float32) + t * np.asarray(bottom, np.float32)


def grain(rng, cells, amplitude):
    coarse = Image.fromarray(rng.normal(0, amplitude, (cells, cells)).astype(np.float32))
    return np.asarray(coarse.resize((SIZE, SIZE), Image.BICUBIC))[..., None]


def ridge(rng, height, amplitude):
    x = np.arange(SIZE) / SIZE * 2 * np.pi
    waves = [
        amplitude / k * rng.uniform(0.3, 1) * np.sin(x * k * rng.uniform(0.3, 0.8) + rng.uniform(0, 7))
        for k in (1, 2, 3)
    ]
    return height + np.sum(waves, axis=0)


def below(image, line, paint):
    return np.where((YY >= line[None])[..., None], paint, image)


def sky(rng):
    return gradient(jitter(rng, (110, 175, 235)), jitter(rng, (205, 228, 245)))


def ink(colour):
    return tuple(int(v) for v in np.clip(colour, 0, 255))


def draw_on(image, paint):
    picture = Image.fromarray(np.clip(image, 0, 255).astype(np.uint8))
    paint(ImageDraw.Draw(picture))
    return np.asarray(picture, np.float32)


def dots(rng, count, bottom, radius, colour):
    def paint(pen):
        for x, y, r in zip(
            rng.uniform(0, SIZE, count), rng.uniform(0, bottom, count), rng.uniform(*radius, count)
        ):
            pen.ellipse([x - r, y - r, x + r, y + r], fill=colour)

    return paint


def grass(rng):
    horizon = rng.uniform(0.25, 0.5) * SIZE
    lawn = gradient(jitter(rng, (120, 200, 80)), jitter(rng, (50, 130, 40))) + grain(rng, 64, 9)
    return below(sky(rng), ridge(rng, horizon, 8), lawn)


def snow(rng):
    air = gradient(jitter(rng, (165, 190, 215)), jitter(rng, (215, 226, 238)))
    ground = gradient((250, 252, 255), jitter(rng, (215, 226, 242))) + grain(rng, 10, 3)
    image = below(air, ridge(rng, rng.uniform(0.25, 0.5) * SIZE, 7), ground)
    return draw_on(image, dots(rng, 40, SIZE, (0.8, 2.0), (255, 255, 255)))


def beach(rng):
    horizon = rng.uniform(0.2, 0.38) * SIZE
    sea = gradient(jitter(rng, (40, 130, 190)), jitter(rng, (90, 190, 210)))
    sand = gradient(jitter(rng, (245, 222, 165)), jitter(rng, (225, 190, 125))) + grain(rng, 96, 6)
    shore = ridge(rng, horizon + 16, 4)
    image = below(sky(rng), np.full(SIZE, horizon), sea)
    return below(below(image, shore - 3, np.float32((245, 250, 250))), shore, sand)


def water(rng):
    deep = gradient(jitter(rng, (70, 165, 215)), jitter(rng, (20, 80, 150)))
    bend = 2 * np.sin(XX / rng.uniform(9, 16) + rng.uniform(0, 7))
    return deep + 18 * np.sin(YY / (2.4 + YY / 30) + bend)[..., None]


def night(rng):
    dark = gradient(jitter(rng, (8, 10, 38), 6), jitter(rng, (38, 45, 95), 8))
    stars = draw_on(dark, dots(rng, 40, SIZE * 0.7, (0.6, 1.4), (255, 255, 220)))
    x, y, r = rng.uniform(14, SIZE - 14), rng.uniform(12, 28), rng.uniform(7, 11)
    moon = draw_on(stars, lambda pen: pen.ellipse([x - r, y - r, x + r, y + r], fill=(250, 240, 190)))
    return below(moon, ridge(rng, SIZE * 0.82, 5), jitter(rng, (22, 28, 45), 6))


def brick(rng):
    clay, high = jitter(rng, (168, 74, 56), 18), int(rng.integers(12, 16))

    def paint(pen):
        for row, y in enumerate(range(-2, SIZE, high)):
            for x in range(-2 * high + (row % 2) * high, SIZE, 2 * high):
                pen.rectangle([x, y, x + 2 * high - 3, y + high - 3], fill=ink(clay + rng.uniform(-14, 14)))

    mortar = np.broadcast_to(jitter(rng, (205, 195, 185), 10), (SIZE, SIZE, 3))
    return draw_on(mortar, paint) + grain(rng, 96, 4)


def wood(rng):
    tone, boards = jitter(rng, (176, 122, 70), 16), int(rng.integers(5, 8))
    index = (XX * boards / SIZE).astype(int)
    shade = rng.uniform(-14, 14, boards).astype(np.float32)[index]
    image = tone + (shade + 4 * np.sin(XX / 2.2 + YY / 40))[..., None] + grain(rng, 64, 3)
    seam = (XX * boards / SIZE) % 1 < 2.2 * boards / SIZE
    return np.where(seam[..., None], tone * 0.55, image)


def forest(rng):
    image = gradient(jitter(rng, (150, 190, 150)), jitter(rng, (90, 140, 90)))
    for layer in range(3):
        leaf = jitter(rng, (85 - 22 * layer, 135 - 28 * layer, 80 - 20 * layer), 8)

        def paint(pen, layer=layer, leaf=leaf):
            for x in rng.uniform(-5, SIZE + 5, 6):
                foot, half, tall = (
                    SIZE * (0.6 + 0.1 * layer) + rng.uniform(-5, 5),
                    rng.uniform(14, 22),
                    rng.uniform(45, 80),
                )
                for step in range(3):
                    width, base = half * (1 - 0.22 * step), foot - step * tall * 0.25
                    pen.polygon(
                        [(x - width, base), (x + width, base), (x, base - tall * 0.5)], fill=ink(leaf)
                    )

        image = draw_on(image, paint)
    floor = gradient(jitter(rng, (80, 110, 50)), jitter(rng, (45, 70, 32))) + grain(rng, 64, 6)
    return below(image, ridge(rng, SIZE * 0.76, 4), floor)


def desert(rng):
    image = gradient(jitter(rng, (250, 180, 110)), jitter(rng, (255, 226, 170)))
    x, y, r = rng.uniform(14, SIZE - 14), rng.uniform(12, 26), rng.uniform(8, 12)
    image = draw_on(image, lambda pen: pen.ellipse([x - r, y - r, x + r, y + r], fill=(255, 246, 205)))
    first = rng.uniform(0.3, 0.5) * SIZE
    for dune in range(3):
        tone = jitter(rng, (228 - 14 * dune, 152 - 14 * dune, 82 - 12 * dune), 7)
        image = below(image, ridge(rng, first + 18 * dune, 10), tone)
    return image + grain(rng, 96, 3)


def street(rng):
    kerb = rng.uniform(70, 82)

    def paint(pen):
        x = -4
        while x < SIZE:
            wide, top = int(rng.integers(20, 34)), rng.uniform(6, 40)
            pen.rectangle([x, top, x + wide - 2, kerb], fill=ink(jitter(rng, (140, 135, 145), 35)))
            for wy in np.arange(top + 6, kerb - 6, 11):
                for wx in range(x + 4, x + wide - 6, 9):
                    pen.rectangle(
                        [wx, wy, wx + 4, wy + 5],
                        fill=(250, 230, 150) if rng.random() < 0.45 else (70, 85, 110),
                    )
            x += wide
        pen.rectangle([0, kerb, SIZE, SIZE], fill=ink(jitter(rng, (88, 88, 94), 8)))
        pen.rectangle([0, kerb, SIZE, kerb + 5], fill=(190, 188, 180))
        line, start = kerb + 0.6 * (SIZE - kerb), int(rng.integers(0, 20))
        for wx in range(-start, SIZE, 28):
            pen.rectangle([wx, line, wx + 14, line + 3], fill=(240, 235, 215))

    return draw_on(sky(rng), paint)


def plain(rng, colour):
    tone = np.asarray(COLOURS[colour], np.float32)
    return gradient(jitter(rng, tone * 0.96 + 8, 10), jitter(rng, tone * 0.88, 10))


DRAWN = {f.__name__: f for f in (grass, snow, beach, water, night, brick, wood, forest, desert, street)}


@cache
def backgrounds(place: str, count: int = 200) -> np.ndarray:
    """A pool of drawn places: drawing each one anew would take most of the time."""
    rng = np.random.default_rng(zlib.crc32(place.encode()))
    return np.stack([np.clip(DRAWN[place](rng), 0, 255) for _ in range(count)]).astype(np.uint8)


def tint(drawing: np.ndarray, colour: str) -> np.ndarray:
    """The drawing (H, W, 4) in shades of one colour; its darkest lines stay."""
    rgb = drawing[..., :3].astype(np.float32) / 255
    light = 0.6 * rgb.max(-1, keepdims=True) + 0.4 * rgb.mean(-1, keepdims=True)
    tone = np.asarray(COLOURS[colour], np.float32) / 255
    shaded = np.where(light < 0.6, tone * (0.25 + 1.25 * light), tone + (1 - tone) * (light - 0.6) * 1.3)
    if colour in ("black", "white"):
        shaded = tone * (0.5 + 0.5 * light) if colour == "white" else tone * (0.4 + 1.2 * light)
    rgb = np.where(light < 0.22, rgb, 0.9 * shaded + 0.1 * rgb)
    return np.concatenate([np.clip(rgb * 255, 0, 255).astype(np.uint8), drawing[..., 3:]], axis=-1)


def compose(rng, drawing: np.ndarray, place: str, colour_of_wall: str = "white") -> np.ndarray:
    """One picture (64, 64, 3) uint8: the drawing (H, W, 4), turned and scaled at random, with its shadow in a
    place.
    """
    if place == "plain":
        ground = plain(rng, colour_of_wall)
    else:
        pool = backgrounds(place)
        ground = pool[rng.integers(len(pool))].astype(np.float32) * rng.uniform(0.93, 1.06)
        ground = ground[:, ::-1] if rng.random() < 0.5 else ground
    canvas = Image.fromarray(np.clip(ground, 0, 255).astype(np.uint8))
    picture = Image.fromarray(drawing)
    if rng.random() < 0.5:
        picture = picture.transpose(Image.FLIP_LEFT_RIGHT)
    side = int(SIZE * rng.uniform(0.55, 0.82))
    picture = picture.rotate(rng.uniform(-10, 10), Image.BICUBIC).resize((side, side), Image.LANCZOS)
    x = int((SIZE - side) * rng.uniform(0.08, 0.92))
    y = int((SIZE - side) * rng.uniform(0.45, 1.0))
    shadow, foot = Image.new("L", (SIZE, SIZE)), y + 0.93 * side
    ImageDraw.Draw(shadow).ellipse(
        [x + 0.12 * side, foot - 0.06 * side, x + 0.88 * side, foot + 0.06 * side], fill=80
    )
    canvas.paste((10, 10, 20), (0, 0), shadow.filter(ImageFilter.GaussianBlur(3)))
    canvas.paste(picture, (x, y), picture)
    return np.asarray(canvas.reduce(2))


def sample(rng, drawings: dict[str, list[np.ndarray]]) -> tuple[np.ndarray, dict]:
    """A random picture (64, 64, 3) uint8 and what it shows: class, colour, place, caption."""
    word = list(drawings)[rng.integers(len(drawings))]
    drawing = drawings[word][rng.integers(len(drawings[word]))]
    colour = list(COLOURS)[rng.integers(len(COLOURS))] if rng.random() < 0.35 else ""
    place = list(PLACES)[rng.integers(len(PLACES))]
    wall = list(COLOURS)[rng.integers(len(COLOURS))]
    picture = compose(rng, tint(drawing, colour) if colour else drawing, place, wall)
    rare = RARE_WORDS[1 + rng.integers(len(RARE_WORDS) - 1)] if rng.random() < 0.08 else ""
    noun = " ".join(part for part in (colour, rare, word) if part)
    caption = ("an " if noun[0] in "aeiou" else "a ") + noun
    caption = "a photo of " + caption if rng.random() < 0.25 else caption
    if rng.random() > 0.15:
        caption += " " + PLACES[place][int(rng.random() < 0.3)].format(wall)
    return picture, {"class": word, "colour": colour, "place": place, "caption": caption}
