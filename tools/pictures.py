"""Draws the demo's data set: pictures of objects whose attributes can be seen, with a list of them in CelebA's format.

python -m tools.pictures data/objects
"""

import json
import math
import os
import sys

import numpy as np
from PIL import Image, ImageDraw

from common.files import UserError

# ----------------------------------------------------------------------------------------------------------------------
# Pictures: what can be seen in one, and how it is drawn


def circle(radius):
    angle = np.linspace(0, 2 * math.pi, 49)
    return radius * np.stack([np.cos(angle), np.sin(angle)], 1)


def outlines():
    """Name -> (N,2) corners of the shape when upright: x right, y down, reaching about 1 from the centre."""
    b = 0.33  # half the width of the cross's bars
    return {
        "arrow": np.array(
            [
                (-1, -0.3),
                (0.05, -0.3),
                (0.05, -0.85),
                (1.05, 0),
                (0.05, 0.85),
                (0.05, 0.3),
                (-1, 0.3),
            ]
        ),
        "cross": np.array(
            [
                (-b, -1),
                (b, -1),
                (b, -b),
                (1, -b),
                (1, b),
                (b, b),
                (b, 1),
                (-b, 1),
                (-b, b),
                (-1, b),
                (-1, -b),
                (-b, -b),
            ]
        ),
        "disc": circle(0.95),
        "ring": circle(1),  # draw_picture makes the hole
        "square": np.array([(-0.82, -0.82), (0.82, -0.82), (0.82, 0.82), (-0.82, 0.82)]),
        "triangle": np.array([(0, -1), (1, 0.75), (-1, 0.75)]),
    }


SHAPES = outlines()
COLOURS = {
    "Red": (215, 35, 35),
    "Yellow": (240, 200, 20),
    "Green": (35, 165, 60),
    "Cyan": (40, 200, 220),
    "Blue": (45, 70, 220),
    "Magenta": (205, 50, 185),
}
TEXTURES = ["Solid", "Striped"]
BACKGROUNDS = ["Plain_Background", "Gradient_Background"]
ATTRIBUTES = (
    [s.capitalize() for s in SHAPES]
    + list(COLOURS)
    + TEXTURES
    + BACKGROUNDS
    + ["Large", "Left", "Top", "Tilted"]
)


def muted(rng, low, high):
    """A greyish colour, (3,) in 0..255, whose brightest channel is between low and high."""
    grey = rng.uniform(low, high)
    return grey * (1 - rng.uniform(0, 0.3) * rng.permutation([0, rng.random(), 1]))


def shrink(mask):
    """(4n,4n) picture of 0 and 255 -> (n,n,1) in 0..1, the share of each pixel that is covered."""
    return np.asarray(mask.reduce(4))[..., None] / 255


def draw_picture(shape, size, rng):
    """One object on a background: (size,size,3) uint8, and the set of its attributes' names."""
    colour, texture, background = (
        list(names)[rng.integers(len(names))] for names in (COLOURS, TEXTURES, BACKGROUNDS)
    )
    large, left, top, tilted = rng.random(4) < 0.5
    tilted = tilted and shape not in ("disc", "ring")  # nobody could see it
    names = {shape.capitalize(), colour, texture, background}
    names |= {
        name
        for name, on in zip(("Large", "Left", "Top", "Tilted"), (large, left, top, tilted))
        if on
    }

    # Geometry in pixels of a 32 x 32 picture. About 25 degrees: a square looks upright again at 90. Few poses, each with a
    # little play: a SiT trained for minutes learns these, but not an object anywhere, of any size, turned by any angle.
    radius = rng.uniform(12.5, 13.5) if large else rng.uniform(10, 11)
    x, y = 16 + rng.uniform(1.5, 2, 2) * np.where([left, top], -1, 1)
    angle = math.radians(rng.uniform(22, 28) if tilted else rng.uniform(-3, 3))
    c, s = math.cos(angle), math.sin(angle)
    scale = 4 * size / 32  # drawn four times too large; averaging 4 x 4 pixels smooths the edges
    mask = Image.new("L", (4 * size, 4 * size))
    for corners, fill in [(SHAPES[shape], 255)] + [(SHAPES["disc"] / 2, 0)] * (shape == "ring"):
        corners = (corners @ [(c, s), (-s, c)] * radius + (x, y)) * scale
        ImageDraw.Draw(mask).polygon(corners.ravel().tolist(), fill=fill)

    # Background: dark or light, but always dark behind the bright colours.
    dark = colour in ("Yellow", "Cyan") or rng.random() < 0.5
    low, high = (25, 95) if dark else (175, 245)
    first = second = muted(rng, low, high)
    right = (
        (np.arange(size) + 0.5) * 32 / size
    )  # pixel centres, (size,), and below each other (size,1)
    down = right[:, None]
    if background == "Gradient_Background":
        first, second = muted(rng, low, low + 15), muted(rng, high - 15, high)
        direction = rng.uniform(0, 2 * math.pi)
        mix = 0.5 + ((right - 16) * math.cos(direction) + (down - 16) * math.sin(direction)) / 40
    else:
        mix = np.zeros((size, size))
    mix = mix.clip(0, 1)[..., None]
    picture = first * (1 - mix) + second * mix

    # Object, and its stripes in a paler or darker tone of its colour: away from the background's.
    colour = np.array(COLOURS[colour], float)
    picture += shrink(mask) * (colour - picture)
    if texture != "Solid":
        mask = np.asarray(mask)
        right = (np.arange(4 * size) + 0.5) / scale
        down = right[:, None]
        marks = ((down - y) * c - (right - x) * s) % 6 < 3
        tone = colour * 0.3 + 255 * 0.7 if dark else colour * 0.35
        picture += shrink(Image.fromarray(mask * marks)) * (tone - colour)
    return picture.round().clip(0, 255).astype(np.uint8), names


def draw_pictures(folder, size=32, per_class=1000, seed=0):
    """A data set of drawn objects: pictures in ImageNet's layout and, about them, CelebA's two text files.

    folder/train/<shape>/<shape>_00000.png (per_class each) and folder/val/... (100 each), size x size RGB;
    list_attr_celeba.txt (1 or -1 for each of ATTRIBUTES) and list_eval_partition.txt (0 train, 1 the last tenth of
    each training class, 2 val). A picture depends on (seed, split, shape, number) alone, not on per_class.
    """
    settings = dict(size=size, per_class=per_class, seed=seed)
    marker = os.path.join(
        folder, "demo.json"
    )  # written at the start, and marked as complete at the end
    if os.path.exists(marker):
        with open(marker) as f:
            found = json.load(f)
        if found.pop("complete") and found == settings:
            return print(f"pictures: {folder} is complete")
        if found != settings:
            raise UserError(
                f"{folder} holds pictures drawn with {found}, wanted {settings}: name another folder or delete it"
            )
    elif os.path.exists(os.path.join(folder, "train")):
        raise UserError(f"{folder}/train exists and was not drawn by demo.py: name another folder")
    os.makedirs(folder, exist_ok=True)
    with open(marker, "w") as f:
        json.dump(dict(settings, complete=False), f)

    attributes, partition = [], []
    for split, (part, count) in enumerate({"train": per_class, "val": 100}.items()):
        for k, shape in enumerate(SHAPES):
            os.makedirs(os.path.join(folder, part, shape), exist_ok=True)
            for i in range(count):
                name = f"{part}/{shape}/{shape}_{i:05d}.png"
                picture, names = draw_picture(
                    shape, size, np.random.default_rng([seed, split, k, i])
                )
                Image.fromarray(picture).save(os.path.join(folder, name))
                attributes.append(
                    name + "".join("  1" if a in names else " -1" for a in ATTRIBUTES)
                )
                partition.append(f"{name} {2 if part == 'val' else int(i >= 0.9 * count)}")
    with open(os.path.join(folder, "list_attr_celeba.txt"), "w") as f:
        f.write("\n".join([str(len(attributes)), " ".join(ATTRIBUTES), *attributes]) + "\n")
    with open(os.path.join(folder, "list_eval_partition.txt"), "w") as f:
        f.write("\n".join(partition) + "\n")
    with open(marker, "w") as f:
        json.dump(dict(settings, complete=True), f)
    print(f"pictures: {len(attributes)} drawn in {folder}")


if __name__ == "__main__":
    draw_pictures(sys.argv[1])
