"""Draws the demo's data set: pictures of objects, with their attributes in CelebA's format.

python -m tools.pictures data/objects
"""

import json
import math
import os
import sys

import numpy as np
from PIL import Image, ImageDraw

from common.files import UserError
from common.processes import run_main

# --------------------------------------------------------------------------------------------------
# What a picture shows

# Counts the versions of this file that draw other pictures with the same settings, so that those of
# an earlier one are not taken for this one's.
DRAWING = 3


def circle(radius):
    """-> (49,2), corners of a polygon that passes for a circle."""
    angle = np.linspace(0, 2 * math.pi, 49)
    return radius * np.stack([np.cos(angle), np.sin(angle)], 1)


# Corners (N,2) of each upright shape: x to the right, y down, reaching about 1 from the centre. The
# ring's hole is cut out in draw_mask.
ARROW = [(-1, -0.4), (0, -0.4), (0, -1), (1, 0), (0, 1), (0, 0.4), (-1, 0.4)]
CROSS_RIGHT = [(0.4, -1), (0.4, -0.4), (1, -0.4), (1, 0.4), (0.4, 0.4), (0.4, 1)]
CROSS_LEFT = [(-0.4, 1), (-0.4, 0.4), (-1, 0.4), (-1, -0.4), (-0.4, -0.4), (-0.4, -1)]
SHAPES = {
    "arrow": np.array(ARROW),
    "cross": np.array(CROSS_RIGHT + CROSS_LEFT),
    "disc": circle(0.95),
    "ring": circle(1),
    "square": np.array([(-0.82, -0.82), (0.82, -0.82), (0.82, 0.82), (-0.82, 0.82)]),
    "triangle": np.array([(0, -1), (1.05, 0.8), (-1.05, 0.8)]),
}
COLOURS = {
    "Red": (215, 35, 35),
    "Yellow": (240, 200, 20),
    "Green": (35, 165, 60),
    "Cyan": (40, 200, 220),
    "Blue": (45, 70, 220),
    "Magenta": (205, 50, 185),
}
TEXTURES = ["Solid", "Striped"]
BACKGROUNDS = ["Dark_Background", "Light_Background"]
POSES = ["Large", "Left", "Top"]
ATTRIBUTES = [
    *(shape.capitalize() for shape in SHAPES),
    *COLOURS,
    *TEXTURES,
    *BACKGROUNDS,
    *POSES,
]

# --------------------------------------------------------------------------------------------------
# Drawing one. Lengths are in pixels of a 32 x 32 picture, whatever the size drawn.

# Masks are drawn this many times too large; averaging their pixels smooths the edges.
OVERSAMPLING = 4


def choose(names, rng):
    return list(names)[rng.integers(len(names))]


def pixel_centres(count):
    """-> (count,), where the centres of `count` pixels lie along a side of length 32."""
    return (np.arange(count) + 0.5) * 32 / count


def draw_mask(shape, size, radius, centre):
    """-> PIL image in mode L, four times `size` a side: 255 inside the object, 0 outside."""
    scale = OVERSAMPLING * size / 32
    parts = [(SHAPES[shape], 255)]
    if shape == "ring":
        parts.append((SHAPES["disc"] / 2, 0))
    mask = Image.new("L", (OVERSAMPLING * size, OVERSAMPLING * size))
    for corners, value in parts:
        corners = (corners * radius + centre) * scale
        ImageDraw.Draw(mask).polygon(corners.ravel().tolist(), fill=value)
    return mask


def coverage(mask):
    """Mask, (4n,4n) -> (n,n,1) in 0..1, the share of each pixel that it covers."""
    return np.asarray(mask.reduce(OVERSAMPLING))[..., None] / 255


def stripes(size):
    """-> bool (4*size,1): every other band, 4 wide, of those that cross the picture."""
    return pixel_centres(OVERSAMPLING * size)[:, None] % 8 < 4


def draw_picture(shape, size, rng):
    """-> uint8 (size,size,3), one object on a background; and the set of its attributes' names.

    The calls of `rng` and their order make the data set what it is."""
    colour_name = choose(COLOURS, rng)
    texture = choose(TEXTURES, rng)
    # The background is dark or light, but always dark behind the bright colours.
    dark = colour_name in ("Yellow", "Cyan") or rng.random() < 0.5
    background = "Dark_Background" if dark else "Light_Background"
    large, left, top = rng.random(3) < 0.5
    names = {shape.capitalize(), colour_name, texture, background}
    for name, present in zip(POSES, (large, left, top), strict=True):
        if present:
            names.add(name)

    # Two sizes and four places: a SiT learns these in minutes, but not an object anywhere, of any
    # size, turned by any angle.
    radius = 13 if large else 10
    centre = (14 if left else 18, 14 if top else 18)  # x, y

    grey = rng.uniform(45, 65) if dark else rng.uniform(200, 220)
    picture = np.full((size, size, 3), grey)
    # Stripes are in a paler or a darker tone of the object's colour, away from the background's.
    colour = np.array(COLOURS[colour_name], float)
    mask = draw_mask(shape, size, radius, centre)
    picture += coverage(mask) * (colour - picture)
    if texture == "Striped":
        tone = colour * 0.3 + 255 * 0.7 if dark else colour * 0.35
        striped = Image.fromarray(np.asarray(mask) * stripes(size))
        picture += coverage(striped) * (tone - colour)
    return picture.round().clip(0, 255).astype(np.uint8), names


# --------------------------------------------------------------------------------------------------
# Drawing them all


def is_complete(folder, settings):
    """Whether a folder holds a complete data set drawn with these settings. Raises a UserError if
    it holds something else."""
    marker = os.path.join(folder, "demo.json")
    if not os.path.exists(marker):
        if os.path.exists(os.path.join(folder, "train")):
            raise UserError(f"{folder}/train was not drawn by this code: give another folder")
        return False
    with open(marker) as file:
        found = json.load(file)
    complete = found.pop("complete")
    if found != settings:
        raise UserError(
            f"{folder} holds pictures drawn with {found}, but {settings} are wanted: "
            "give another folder or delete this one"
        )
    return complete


def mark(folder, settings, complete):
    """Notes in folder/demo.json how its pictures are drawn, and whether all of them are."""
    os.makedirs(folder, exist_ok=True)
    with open(os.path.join(folder, "demo.json"), "w") as file:
        json.dump({**settings, "complete": complete}, file)


def write_lines(path, lines):
    with open(path, "w") as file:
        file.write("\n".join(lines) + "\n")


def draw_pictures(folder, size=32, per_class=1000, seed=0):
    """A data set of drawn objects: pictures in ImageNet's layout and, beside them, CelebA's two
    text files. Returns at once if the folder holds it already.

    folder/train/<shape>/<shape>_00000.png (per_class each) and folder/val/... (100 each), RGB of
    size x size; list_attr_celeba.txt, 1 or -1 for each of ATTRIBUTES; list_eval_partition.txt,
    0 for training, 1 for the last tenth of each training class, 2 for val. A picture depends on
    (seed, split, shape, number) alone, not on per_class."""
    settings = {"drawing": DRAWING, "size": size, "per_class": per_class, "seed": seed}
    if is_complete(folder, settings):
        print(f"pictures: {folder} is complete")
        return
    mark(folder, settings, complete=False)

    attributes = []
    partition = []
    for split_number, (split, count) in enumerate([("train", per_class), ("val", 100)]):
        for shape_number, shape in enumerate(SHAPES):
            os.makedirs(os.path.join(folder, split, shape), exist_ok=True)
            for i in range(count):
                name = f"{split}/{shape}/{shape}_{i:05d}.png"
                rng = np.random.default_rng([seed, split_number, shape_number, i])
                picture, present = draw_picture(shape, size, rng)
                Image.fromarray(picture).save(os.path.join(folder, name))
                values = ["1" if attribute in present else "-1" for attribute in ATTRIBUTES]
                attributes.append(name + "".join(f"{value:>3}" for value in values))
                part = 2 if split == "val" else int(i >= 0.9 * count)
                partition.append(f"{name} {part}")

    header = [str(len(attributes)), " ".join(ATTRIBUTES)]
    write_lines(os.path.join(folder, "list_attr_celeba.txt"), header + attributes)
    write_lines(os.path.join(folder, "list_eval_partition.txt"), partition)
    mark(folder, settings, complete=True)
    print(f"pictures: {len(attributes)} drawn in {folder}")


def main():
    if len(sys.argv) != 2:
        raise UserError("usage: python -m tools.pictures FOLDER")
    draw_pictures(sys.argv[1])


if __name__ == "__main__":
    run_main(main)
