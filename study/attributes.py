"""Attributes of CIFAR-10's classes for the attribute probe, and the folder in AwA2's form that
holds them."""

import os

from common.files import UserError, writing

CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]

# As in AwA, an attribute holds for a class if it is true of most of its members. The digits follow
# the order of CLASSES.
ATTRIBUTES = {
    "animal": "0011111100",
    "four_legs": "0001111100",
    "hooves": "0000100100",
    "fur": "0001110100",
    "wings": "1010000000",
    "flies": "1010000000",
    "wheels": "1100000001",
    "metal": "1100000011",
    "on_water": "0000000010",
    "on_roads": "0100000001",
    "carries_people": "1100000111",
    "larger_than_a_man": "1100100111",
    "kept_as_a_pet": "0001010000",
    "lays_eggs": "0010001000",
}


def write_attributes(data, folder):
    """Writes CIFAR-10 with the attributes above to `folder` in AwA2's form, which probe.py reads.

    data: a folder whose train/ has one folder of pictures per class. The pictures are linked,
    not copied. Raises UserError if the classes are not CIFAR-10's.
    """
    found = sorted(os.listdir(f"{data}/train"))
    if found != CLASSES:
        raise UserError(
            f"{data}/train: the study's attribute table describes CIFAR-10's classes, but these "
            f"are {', '.join(found[:5])} ..."
        )
    os.makedirs(f"{folder}/JPEGImages", exist_ok=True)
    for name in CLASSES:
        link_again(f"{data}/train/{name}", f"{folder}/JPEGImages/{name}")
    write_lines(f"{folder}/classes.txt", numbered(CLASSES))
    write_lines(f"{folder}/predicates.txt", numbered(ATTRIBUTES))
    matrix = [" ".join(bits) for bits in zip(*ATTRIBUTES.values(), strict=True)]
    write_lines(f"{folder}/predicate-matrix-binary.txt", matrix)


def link_again(target, link):
    """Links to `target`, replacing a link that leads nowhere because the data have been moved
    since."""
    if os.path.exists(link):
        return
    if os.path.islink(link):
        os.remove(link)
    os.symlink(os.path.abspath(target), link)


def numbered(names):
    return [f"{number}\t{name}" for number, name in enumerate(names, start=1)]


def write_lines(path, lines):
    with writing(path) as file:
        file.write(("\n".join(lines) + "\n").encode())
