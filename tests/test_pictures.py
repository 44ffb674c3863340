"""Pictures as they come: damaged, huge, animated, rotated, oddly named, behind links, gone. What is refused is named before
training, --check-data finds what only decoding finds, --skip-bad puts another picture of the class in its place."""

import os
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import common.pictures as pictures_module
from common.files import UserError
from common.pictures import ImageSet, TrainingBatches, check_picture, load_image
from common.processes import say
from common.runs import list_checkpoints
from common.weights import load_sit, load_vae
import train_sit
import train_vae
from conftest import SIT, VAE, refused, script

FEW = [*VAE, "--align", "none", "--gan", 0, "--steps", 2]


@pytest.fixture
def folder(inside, pictures):
    shutil.copytree(pictures, "p")
    return "p"


def paint(path, number=0, size=(40, 40), **options):
    x = np.random.default_rng(number).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    Image.fromarray(x).resize(size, Image.BICUBIC).save(path, **options)


def damage(path):
    """Makes a BMP whose end is missing: it has no mark there, so only decoding tells. (A JPEG has a mark; one that is damaged
    inside is decoded without an error, as libjpeg goes on with grey.)"""
    paint(path, 1)
    data = open(path, "rb").read()
    open(path, "wb").write(data[: len(data) // 2])


# ---- the check, and --check-data ---------------------------------------------------------------------------------------


def test_a_jpeg_may_have_other_data_behind_its_end_but_not_be_cut(tmp_path):
    """Some cameras and editors append a preview or metadata; such files open everywhere."""
    pixels = np.random.default_rng(0).integers(0, 256, (40, 48, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "whole.jpg")
    whole = (tmp_path / "whole.jpg").read_bytes()
    (tmp_path / "longer.jpg").write_bytes(whole + b"x" * 5000)
    (tmp_path / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    assert (
        check_picture(tmp_path / "whole.jpg") == check_picture(tmp_path / "longer.jpg") == (48, 40)
    )
    assert "truncated" in check_picture(tmp_path / "cut.jpg")


def test_check_data_finds_what_only_decoding_finds_and_is_kept(folder, capsys, monkeypatch):
    damage("p/a/bad.bmp")
    ImageSet(folder)  # heads and ends are whole
    assert "p/a/bad.bmp': image file is truncated" in refused(
        capsys, train_vae, *FEW, "--data", folder, "--check-data"
    )
    shutil.rmtree("runs")
    script(train_vae, *FEW, "--data", folder, "--check-data", "--skip-bad")
    monkeypatch.setattr(
        pictures_module, "check_picture", lambda *a, **k: pytest.fail("checked again")
    )
    assert len(ImageSet(folder, check_data=True, skip_bad=True).bad) == 1
    assert len(ImageSet(folder, skip_bad=True).bad) == 1


def test_a_cheap_check_is_not_taken_for_a_full_one(folder):
    ImageSet(folder)
    data = bytearray(open("p/a/03.png", "rb").read())
    data[100:-20] = b"\xff" * (len(data) - 120)
    open("p/a/03.png", "wb").write(data)  # written over: no folder's time changes
    with pytest.raises(UserError, match="03.png"):
        ImageSet(folder, check_data=True)


@pytest.mark.parametrize("kind", ["zero", "bomb", "strip", "postscript", "link", "pipe", "text"])
def test_bad_pictures_are_named_before_training(kind, folder, capsys):
    path, says = "p/b/bad.png", "cannot identify"
    if kind in ("bomb", "strip"):
        Image.new("1", (30000, 3000) if kind == "bomb" else (5, 501)).save(path)
        says = "pixels: more than"
    elif kind == "link":
        os.symlink("nowhere.png", path)
        says = "it is a broken link"
    elif kind == "pipe":  # opening it would wait for ever
        os.mkfifo(path)
        says = "it is no file"
    else:
        text = {
            "zero": b"",
            "text": b"hello",
            "postscript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EOF\n",
        }[kind]
        open(path, "wb").write(text)
    message = refused(capsys, train_vae, *FEW, "--data", folder)
    assert (
        f"1 picture cannot be read, the first is {os.path.abspath(path)!r}: " in message
        and says in message
    )
    with pytest.raises(UserError, match="bad.png"):
        load_image("p/b/bad.png", 32) if kind != "pipe" else ImageSet(folder)
    script(train_vae, *FEW, "--data", folder, "--skip-bad")
    assert "1 of 25 pictures cannot be read" in capsys.readouterr().out


def test_largest_and_narrowest_that_are_read(inside):
    Image.new("1", (400, 4)).save("a.png")
    assert check_picture("a.png") == (400, 4) and load_image("a.png", 32).shape == (32, 32, 3)
    Image.new("1", (404, 4)).save("a.png")
    assert "a side 100 times the other" in check_picture("a.png")


# ---- --skip-bad --------------------------------------------------------------------------------------------------------


def test_another_picture_of_the_class_stands_in(folder, capsys):
    for name in ("03", "04"):
        open(f"p/a/{name}.png", "wb").close()
    data = ImageSet(folder, skip_bad=True)
    assert (
        "2 of 24 pictures cannot be read" in capsys.readouterr().out
        and data.bad == {3, 4}
        and data.smallest == 40
    )
    assert np.array_equal(data.load(3, 32), data.load(5, 32)) and np.array_equal(
        data.load(4, 32), data.load(5, 32)
    )
    assert not np.array_equal(data.load(2, 32), data.load(5, 32))
    open("p/a/11.png", "wb").close()  # while training: the last of a class is followed by its first
    assert (
        np.array_equal(data.load(11, 32), data.load(0, 32))
        and data.labels[0] == data.labels[11] == 0
    )
    with pytest.raises(UserError, match="2 pictures cannot be read|3 pictures cannot be read"):
        ImageSet(folder)  # the kept list must not hide them


def test_stand_ins_are_the_same_on_any_number_of_processes(folder, monkeypatch):
    for name in ("a/03", "b/07"):
        open(f"p/{name}.png", "wb").close()
    data = ImageSet(folder, skip_bad=True)
    whole = TrainingBatches(data, 8, 0, 32)[2]
    monkeypatch.setattr(pictures_module, "world", lambda: 2)
    parts = []
    for rank in range(2):
        monkeypatch.setattr(pictures_module, "rank", lambda: rank)
        parts.append(TrainingBatches(data, 8, 0, 32)[2])
    for key in ("image", "label", "index"):
        assert torch.equal(whole[key], torch.cat([part[key] for part in parts]))


def test_a_class_without_any_good_picture_is_an_error(folder, capsys):
    for name in os.listdir("p/a"):
        open(f"p/a/{name}", "wb").close()
    assert "12 pictures cannot be read" in (
        message := refused(capsys, train_vae, *FEW, "--data", folder, "--skip-bad")
    )
    assert message.endswith("mend or remove it, 'a' has no other")


@pytest.mark.parametrize("workers", [0, 1])
def test_files_that_vanish_while_training(folder, capfd, monkeypatch, workers):
    """Stops the run with its name and keeps the checkpoint; with --skip-bad it goes on, and every process that loads pictures
    counts, and says each file once: the loader if there is one, and the process that draws samples/."""
    words = [*VAE, "--align", "none", "--gan", 0, "--data", folder, "--workers", workers]
    script(train_vae, *words, "--steps", 1)
    data = ImageSet(folder)
    monkeypatch.setattr(
        ImageSet,
        "read_cache",
        lambda self: (
            self.__dict__.update(
                {k: v for k, v in vars(data).items() if k not in ("skip_bad", "check_data")}
            )
            or True
        ),
    )
    for name in ("03", "04"):
        os.remove(f"p/a/{name}.png")
    message = refused(capfd, train_vae, *words, "--steps", 7)
    assert (
        "cannot read the picture" in message
        and "p/a/0" in message
        and len(list_checkpoints("runs/vae")) == 1
    )
    script(train_vae, *words, "--steps", 7, "--skip-bad")
    lines = [
        line
        for line in capfd.readouterr().err.replace("\r", "\n").splitlines()
        if "takes its place" in line
    ]
    assert (
        len(lines) == 2 * (1 + workers)
        and sum("(1 so far)" in line for line in lines) == 1 + workers
    )
    assert all(
        sum(f"p/a/{name}.png" in line for line in lines) == 1 + workers for name in ("03", "04")
    )
    assert load_vae("runs/vae").info["step"] == 7


def test_second_stage_skips_too(folder, capsys):
    open("p/a/03.png", "wb").close()
    script(train_vae, *FEW, "--data", folder, "--skip-bad")
    words = [*SIT, "--repa", 0, "--data", folder, "--steps", 1]
    assert "03.png" in refused(capsys, train_sit, *words)
    script(train_sit, *words, "--skip-bad", "--check-data")
    [cache] = [f for f in os.listdir("runs/vae") if f.startswith("latents-")]
    latents = np.load(f"runs/vae/{cache}/latents.npy")
    assert np.array_equal(latents[3], latents[4]) and not np.array_equal(latents[3], latents[5])


# ---- animations, rotation, names, folders ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name,form", [("a.png", "PNG"), ("a.webp", "WEBP"), ("a.tif", "TIFF"), ("a.jpg", "GIF")]
)
def test_of_animations_the_first_frame_counts(name, form, inside):
    frames = [Image.new("RGB", (32, 32), colour) for colour in ("red", "blue", "green")]
    options = dict(lossless=True) if form == "WEBP" else {}
    frames[0].save(name, form, save_all=True, append_images=frames[1:], **options)
    assert Image.open(name).n_frames == 3 and check_picture(name, decode=True) == (32, 32)
    assert np.array_equal(load_image(name, 32), np.asarray(frames[0]))


def test_exif_rotation_is_ignored(inside):
    """As ADM's loader does, so that numbers compare."""
    exif = Image.Exif()
    exif[0x0112] = 6  # "rotate by 90 degrees to show"
    paint("a.png")
    paint("b.png", exif=exif)
    assert Image.open("b.png").getexif()[0x0112] == 6
    assert np.array_equal(load_image("a.png", 32), load_image("b.png", 32))


ODD = [
    b"two words.png",
    b"new\nline.png",
    b"\xff\xfe.png",
    "ünï — 图.png".encode(),
    b"-rf.png",
    b"a'b\"c$(d).png",
    b"tab\t.png",
]


def test_odd_names(inside, capsys):
    for k, name in enumerate(ODD):
        for side in (b"c \xe9\n1", "ç 2".encode()):
            os.makedirs(b"p/" + side, exist_ok=True)
            with open(b"p/" + side + b"/" + name, "wb") as file:
                paint(file, k, format="PNG")
    words = [*VAE, "--align", "none", "--gan", 0, "--data", "p", "--workers", 1]
    script(train_vae, *words, "--steps", 1)
    script(train_vae, *words, "--steps", 2)  # from the kept list
    script(train_sit, *SIT, "--repa", 0, "--data", "p", "--steps", 1)
    data = ImageSet("p")
    assert sorted(data.names.tolist()) == sorted(
        s + b"/" + n for s in (b"c \xe9\n1", "ç 2".encode()) for n in ODD
    )
    assert load_sit("runs/sit").info["classes"] == data.classes == ["c \udce9\n1", "ç 2"]
    say("classes", *data.classes)
    assert "\\udce9" in capsys.readouterr().out
    with open(b"p/c \xe9\n1/\xff\n.png", "wb"):
        pass
    assert r"c \udce9\n1/\udcff\n.png': cannot identify" in refused(
        capsys, train_vae, *words, "--steps", 3
    )


def test_links(folder, capsys):
    shutil.move("p/a/00.png", "elsewhere.png")
    os.symlink(os.path.abspath("elsewhere.png"), "p/a/00.png")
    os.makedirs("other")
    shutil.copy("elsewhere.png", "other/x.png")
    os.symlink(os.path.abspath("other"), "p/c")  # a linked class
    data = ImageSet(folder)
    assert (
        len(data) == 25
        and data.classes == ["a", "b", "c"]
        and data.load(0, 32).shape == (32, 32, 3)
    )
    os.symlink("..", "p/b/up")
    assert "p/b/up' is a link to a folder that it is in itself" in refused(
        capsys, train_vae, *FEW, "--data", folder
    )


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_folders_and_files_without_permission(folder, capsys):
    os.chmod("p/a/00.png", 0)
    assert "00.png': [Errno 13] Permission denied" in refused(
        capsys, train_vae, *FEW, "--data", folder
    )
    os.chmod("p/a/00.png", 0o600)
    os.chmod("p/b", 0)
    try:
        assert "cannot list" in refused(capsys, train_vae, *FEW, "--data", folder)
    finally:
        os.chmod("p/b", 0o700)


def test_a_folder_that_cannot_be_listed_is_named(folder, capsys, monkeypatch):
    """What the test above checks, for root: the operating system's refusal is made up."""
    scandir = os.scandir

    def refuse(path):
        if os.fspath(path).endswith("/b"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert f"cannot list {os.path.abspath('p/b')!r}: Permission denied" in refused(
        capsys, train_vae, *FEW, "--data", folder
    )
