"""Pictures as people have them: damaged, huge, animated, rotated, oddly named, linked, deleted.

What cannot be used is refused before training, by name. --check-data finds the faults that only
decoding finds. --skip-bad puts another picture of the class in the place of a bad one.
"""

import io
import os
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import common.pictures as pictures_module
import train_sit
import train_vae
from common.contents import edge_checksum, fingerprint_of, read_edges
from common.files import UserError
from common.pictures import (
    FORMATS,
    ImageSet,
    TrainingBatches,
    decode_all,
    examine_picture,
    load_image,
)
from common.processes import say
from common.runs import list_checkpoints
from common.weights import load_sit, load_vae
from conftest import SIT, VAE, refused, script

TWO_STEPS = [*VAE, "--align", "none", "--gan", 0, "--steps", 2]


@pytest.fixture
def folder(inside, pictures):
    """p/{a,b}/00.png to 11.png below the current folder, a copy that a test may change."""
    shutil.copytree(pictures, "p")
    return "p"


def paint(path, number=0, size=(40, 40), **options):
    """Writes a picture of smooth random colours. `options` are Pillow's."""
    x = np.random.default_rng(number).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    Image.fromarray(x).resize(size, Image.BICUBIC).save(path, **options)


def read_bytes(path):
    with open(path, "rb") as file:
        return file.read()


def write_bytes(path, data):
    with open(path, "wb") as file:
        file.write(data)


def empty(path):
    """Makes a file of no bytes, as a full disk leaves it."""
    write_bytes(path, b"")


def paint_cut_bmp(path):
    """Writes a BMP whose second half is missing. It has no mark at its end, so only decoding finds
    that out. (A JPEG has such a mark, and libjpeg decodes one that is damaged inside without an
    error, filling with grey.)"""
    paint(path, 1)
    data = read_bytes(path)
    write_bytes(path, data[: len(data) // 2])


def record_examined(monkeypatch):
    """-> the list that gets the name, class/picture, of each file that is examined from now on."""
    examined = []
    examine = pictures_module.examine_picture

    def record(path, decode=False):
        examined.append("/".join(path.split(os.sep)[-2:]))
        return examine(path, decode)

    monkeypatch.setattr(pictures_module, "examine_picture", record)
    return examined


# --------------------------------------------------------------------------------------------------
# The check, and --check-data


def test_a_jpeg_may_have_other_data_behind_its_end_but_not_be_cut(tmp_path):
    """Some cameras and editors append a preview or metadata; such files open everywhere."""
    pixels = np.random.default_rng(0).integers(0, 256, (40, 48, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "whole.jpg")
    whole = read_bytes(tmp_path / "whole.jpg")
    write_bytes(tmp_path / "longer.jpg", whole + b"x" * 5000)
    write_bytes(tmp_path / "cut.jpg", whole[: len(whole) // 2])
    assert examine_picture(tmp_path / "whole.jpg")[1] == (48, 40)
    assert examine_picture(tmp_path / "longer.jpg")[1] == (48, 40)
    assert "truncated" in examine_picture(tmp_path / "cut.jpg")[1]


def test_check_data_finds_what_only_decoding_finds_and_is_kept(folder, capsys, monkeypatch):
    paint_cut_bmp("p/a/bad.bmp")
    ImageSet(folder)  # The headers and ends of all files are whole.
    message = refused(capsys, train_vae, *TWO_STEPS, "--data", folder, "--check-data")
    assert "p/a/bad.bmp': image file is truncated" in message
    shutil.rmtree("runs")
    script(train_vae, *TWO_STEPS, "--data", folder, "--check-data", "--skip-bad")

    examined = record_examined(monkeypatch)
    # Only the bad one is looked at again, since it may have been unreadable for a moment only.
    assert len(ImageSet(folder, check_data=True, skip_bad=True).bad) == 1
    assert len(ImageSet(folder, skip_bad=True).bad) == 1
    assert examined == ["a/bad.bmp", "a/bad.bmp"]


def test_a_cheap_check_is_not_taken_for_a_full_one(folder):
    ImageSet(folder)
    data = bytearray(read_bytes("p/a/03.png"))
    data[100:-20] = b"\xff" * (len(data) - 120)
    # The file is overwritten in place, so that no folder's modification time changes.
    write_bytes("p/a/03.png", data)
    with pytest.raises(UserError, match=r"03\.png"):
        ImageSet(folder, check_data=True)


def test_decoding_may_come_later(folder):
    paint_cut_bmp("p/a/bad.bmp")
    data = ImageSet(folder, skip_bad=True)
    assert not data.bad
    decode_all(data, wanted=True)
    assert [data.path(i) for i in data.bad] == [os.path.abspath("p/a/bad.bmp")]
    paint("p/a/new.png")
    with pytest.raises(UserError, match="has changed since the command began"):
        decode_all(data, wanted=True)


def make_bad_picture(kind, path):
    """Makes one kind of file that is no picture to use. -> words of the message that refuses it."""
    if kind == "bomb":
        Image.new("1", (30000, 3000)).save(path)
        return "its size is 30000x3000: more than"
    if kind == "strip":
        Image.new("1", (5, 501)).save(path)
        return "its size is 5x501: one side is more than 100 times the other"
    if kind == "link":
        os.symlink("nowhere.png", path)
        return "it is a broken link"
    if kind == "pipe":
        os.mkfifo(path)
        return "it is not a regular file"
    contents = {
        "zero": b"",
        "text": b"hello",
        "postscript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EOF\n",
    }
    write_bytes(path, contents[kind])
    if kind == "zero":
        return "it is empty;"
    return "it is no picture in a format that is read (JPEG, PNG, "


@pytest.mark.parametrize("kind", ["zero", "bomb", "strip", "postscript", "link", "pipe", "text"])
def test_bad_pictures_are_named_before_training(kind, folder, capsys):
    path = "p/b/bad.png"
    reason = make_bad_picture(kind, path)
    message = refused(capsys, train_vae, *TWO_STEPS, "--data", folder)
    assert f"1 picture cannot be read, the first is {os.path.abspath(path)!r}: " in message
    assert reason in message
    if kind != "pipe":  # Opening a pipe would wait for ever; the check does not open it.
        with pytest.raises(UserError, match=r"bad\.png"):
            load_image(path, 32)
    with pytest.raises(UserError, match=r"bad\.png"):
        ImageSet(folder)
    script(train_vae, *TWO_STEPS, "--data", folder, "--skip-bad")
    assert "1 of 25 pictures cannot be read" in capsys.readouterr().out


def test_largest_and_narrowest_that_are_read(inside):
    Image.new("1", (400, 4)).save("a.png")
    assert examine_picture("a.png")[1] == (400, 4)
    assert load_image("a.png", 32).shape == (32, 32, 3)
    Image.new("1", (404, 4)).save("a.png")
    assert "one side is more than 100 times the other" in examine_picture("a.png")[1]


# --------------------------------------------------------------------------------------------------
# --skip-bad


def test_another_picture_of_the_class_stands_in(folder, capsys):
    empty("p/a/03.png")
    empty("p/a/04.png")
    data = ImageSet(folder, skip_bad=True)
    assert "2 of 24 pictures cannot be read" in capsys.readouterr().out
    assert data.bad == {3, 4}
    assert data.smallest == 40
    assert np.array_equal(data.load(3, 32), data.load(5, 32))
    assert np.array_equal(data.load(4, 32), data.load(5, 32))
    assert not np.array_equal(data.load(2, 32), data.load(5, 32))
    # This one breaks during training. After the last picture of a class comes its first.
    empty("p/a/11.png")
    assert np.array_equal(data.load(11, 32), data.load(0, 32))
    assert data.labels[0] == data.labels[11] == 0
    # The list that was kept must not hide them from a set without skip_bad.
    with pytest.raises(UserError, match=r"[23] pictures cannot be read"):
        ImageSet(folder)


def test_stand_ins_are_the_same_on_any_number_of_processes(folder, monkeypatch):
    empty("p/a/03.png")
    empty("p/b/07.png")
    data = ImageSet(folder, skip_bad=True)
    whole = TrainingBatches(data, 8, 0, 32)[2]
    parts = []
    for rank in range(2):
        batches = TrainingBatches(data, 8, 0, 32)
        batches.world = 2
        batches.rank = rank
        parts.append(batches[2])
    for key in ("image", "label", "index"):
        # The processes take turns.
        taken = torch.stack([part[key] for part in parts], dim=1)
        assert torch.equal(whole[key], taken.flatten(0, 1))


def test_a_class_without_any_good_picture_is_an_error(folder, capsys):
    for name in os.listdir("p/a"):
        empty(f"p/a/{name}")
    message = refused(capsys, train_vae, *TWO_STEPS, "--data", folder, "--skip-bad")
    assert "12 pictures cannot be read" in message
    assert message.endswith("repair or remove it; class 'a' has no picture that can be read")


@pytest.mark.parametrize("workers", [0, 1])
def test_files_that_vanish_while_training(folder, capfd, monkeypatch, workers):
    """Such a file ends the run, by name, and the checkpoint stays. With --skip-bad the run
    continues, and every process that loads pictures warns of each file once, with a count: the
    loader, if there is one, and the process that draws samples/."""
    words = [*VAE, "--align", "none", "--gan", 0, "--data", folder, "--workers", workers]
    script(train_vae, *words, "--steps", 1)
    data = ImageSet(folder)

    def list_from_before(self):
        """Takes the list of files from before any vanished, as a run that has begun would have."""
        self.left_out = {}
        self.names = data.names
        self.labels = data.labels
        self.bad = set()
        self.classes = data.classes
        self.fingerprint = data.fingerprint
        self.smallest = data.smallest

    monkeypatch.setattr(ImageSet, "examine", list_from_before)
    os.remove("p/a/03.png")
    os.remove("p/a/04.png")
    message = refused(capfd, train_vae, *words, "--steps", 7)
    assert "cannot read the picture" in message
    assert "p/a/0" in message
    assert len(list_checkpoints("runs/vae")) == 1

    script(train_vae, *words, "--steps", 7, "--skip-bad")
    output = capfd.readouterr().err.replace("\r", "\n").splitlines()
    warnings = [line for line in output if "takes its place" in line]
    loading_processes = 1 + workers
    assert len(warnings) == 2 * loading_processes
    assert sum("(1 so far)" in line for line in warnings) == loading_processes
    assert sum("p/a/03.png" in line for line in warnings) == loading_processes
    assert sum("p/a/04.png" in line for line in warnings) == loading_processes
    assert load_vae("runs/vae").info["step"] == 7


def test_second_stage_skips_too(folder, capsys):
    empty("p/a/03.png")
    script(train_vae, *TWO_STEPS, "--data", folder, "--skip-bad")
    words = [*SIT, "--repa", 0, "--data", folder, "--steps", 1]
    assert "03.png" in refused(capsys, train_sit, *words)
    script(train_sit, *words, "--skip-bad", "--check-data")
    [cache] = [f for f in os.listdir("runs/vae") if f.startswith("latents-")]
    latents = np.load(f"runs/vae/{cache}/latents.npy")
    assert np.array_equal(latents[3], latents[4])
    assert not np.array_equal(latents[3], latents[5])


# --------------------------------------------------------------------------------------------------
# What is data: names, sizes and the ends of files


def test_a_copy_is_the_same_data_and_a_file_written_over_is_not(folder, monkeypatch):
    paint("p/a/03.bmp")
    first = ImageSet(folder)
    # tar and rsync keep times; a copy in another place has no list yet.
    shutil.copytree("p", "copy")
    assert ImageSet("copy").fingerprint == first.fingerprint
    assert ImageSet(os.path.abspath("p") + "/").fingerprint == first.fingerprint
    shutil.rmtree("runs")
    assert ImageSet("p").fingerprint == first.fingerprint

    # Name, size and time of modification stay, and so does the folder's.
    examined = record_examined(monkeypatch)
    status = os.stat("p/a/03.bmp")
    data = bytearray(read_bytes("p/a/03.bmp"))
    data[-1] ^= 1
    write_bytes("p/a/03.bmp", data)
    os.utime("p/a/03.bmp", ns=(status.st_atime_ns, status.st_mtime_ns))
    changed = ImageSet("p")
    assert examined == ["a/03.bmp"]
    assert changed.fingerprint != first.fingerprint
    # The same content under a new time is the same data.
    os.utime("copy/a/03.bmp")
    assert ImageSet("copy").fingerprint == first.fingerprint
    os.rename("p/b", "p/c")
    assert ImageSet("p").fingerprint != changed.fingerprint


def test_a_fingerprint_needs_no_folder():
    """An archive gives the names, sizes and ends of its members."""
    contents = {"a/1": b"x" * 9000, "a/2": b"short", "b/1": b""}
    files = []
    for data in contents.values():
        head, tail = read_edges(io.BytesIO(data), len(data))
        assert head == data[:4096]
        assert tail == data[max(0, len(data) - 4096) :]
        files.append((len(data), edge_checksum(head, tail)))
    sizes, checksums = zip(*files, strict=True)
    found = fingerprint_of(list(contents), sizes, checksums)
    assert found == fingerprint_of([b"a/1", b"a/2", b"b/1"], sizes, np.array(checksums, np.uint64))
    assert len(found) == 16
    others = [
        fingerprint_of(["a/1", "a/2", "b/2"], sizes, checksums),
        fingerprint_of(list(contents), (9000, 6, 0), checksums),
        fingerprint_of(list(contents), sizes, checksums[::-1]),
    ]
    assert len({found, *others}) == 4


def test_new_pictures_alone_are_examined(folder, monkeypatch):
    ImageSet(folder)
    examined = record_examined(monkeypatch)
    paint("p/a/0new.png")
    os.remove("p/b/05.png")
    data = ImageSet(folder)
    assert examined == ["a/0new.png"]
    assert len(data) == 24
    assert data.fingerprint == ImageSet(shutil.copytree("p", "copy")).fingerprint
    assert data.smallest == 40


# --------------------------------------------------------------------------------------------------
# What is a class, and what is a picture


def test_hidden_files_and_folders_are_left_out(folder, capsys):
    expected = ImageSet(folder).fingerprint
    os.makedirs("p/.ipynb_checkpoints")
    os.makedirs("p/a/@eaDir/0.png")
    shutil.copy("p/a/00.png", "p/.ipynb_checkpoints/0-checkpoint.png")
    shutil.copy("p/a/00.png", "p/a/@eaDir/0.png/THUMB.png")
    shutil.copy("p/a/00.png", "p/a/._00.png")
    write_bytes("p/classes.txt", b"a b")
    write_bytes("p/b/README", b"c")
    capsys.readouterr()
    data = ImageSet(folder)
    assert data.classes == ["a", "b"]
    assert data.fingerprint == expected
    note = f"note: {os.path.abspath('p')}: left out: 3 hidden, 1 .txt, 1 no ending"
    assert note in capsys.readouterr().out


def test_a_picture_beside_class_folders_is_refused(folder):
    shutil.copy("p/a/00.png", "p/preview.png")
    with pytest.raises(UserError, match=r"beside them, 1 picture, the first is '.*p/preview\.png'"):
        ImageSet(folder)
    shutil.rmtree("p/a")
    shutil.rmtree("p/b")
    assert ImageSet(folder).classes == ["."]


@pytest.mark.parametrize(
    "files,classes",
    [
        ("car/0.png plane/0.png train/0.png", ["car", "plane", "train"]),
        ("car/0.png train/0.png train/steam/0.png", ["car", "train"]),
        ("train/a/0.png train/b/0.png val/a/0.png", None),
        ("train/a/0.png val/0.png", None),
        ("Train/0.png Test/0.png", None),
        ("car/0.png plane/0.png ship/0.png train/a/0.png", None),
    ],
)
def test_splits_in_place_of_classes_are_refused(files, classes, inside):
    for file in files.split():
        os.makedirs(os.path.dirname(f"p/{file}"), exist_ok=True)
        paint(f"p/{file}")
    if classes is None:
        with pytest.raises(UserError, match=r"give one of them, such as .*p/[Tt]rain; if they are"):
            ImageSet("p")
        # The way round that the sentence names.
        os.makedirs("links")
        for name in os.listdir("p"):
            os.symlink(os.path.abspath(f"p/{name}"), f"links/{name}s")
        assert ImageSet("links").classes == sorted(f"{name}s" for name in os.listdir("p"))
    else:
        assert ImageSet("p").classes == classes


def test_a_folder_around_the_class_folders_is_named(folder, capsys):
    shutil.move("p", "wrapped/p")
    assert ImageSet("wrapped").classes == ["p"]
    assert "if the folders in it are the classes, give " in capsys.readouterr().out


def test_numbers_are_sorted_as_numbers(inside):
    for name in ("10", "9", "1", "0", "2"):
        os.makedirs(f"p/{name}")
        paint(f"p/{name}/0.png")
    data = ImageSet("p")
    assert data.classes == ["0", "1", "2", "9", "10"]
    labels = {
        os.fsdecode(name).split(os.sep)[0]: label
        for name, label in zip(data.names, data.labels, strict=True)
    }
    assert labels == {"0": 0, "1": 1, "2": 2, "9": 3, "10": 4}
    os.rename("p/9", "p/9b")
    assert ImageSet("p").classes == ["0", "1", "10", "2", "9b"]


KINDS = {
    "jpe": "JPEG",
    "jfif": "JPEG",
    "gif": "GIF",
    "pgm": "PPM",
    "avif": "AVIF",
    "jp2": "JPEG2000",
}


@pytest.mark.parametrize("ending", KINDS)
def test_all_that_pillow_reads(ending, folder, capsys):
    grey = np.full((40, 40, 3), 90, np.uint8)
    picture = Image.fromarray(grey).convert("L" if ending == "pgm" else "RGB")
    if KINDS[ending] not in FORMATS:
        write_bytes(f"p/a/0.{ending}", b"anything")
        assert len(ImageSet(folder)) == 24
        assert f"1 .{ending} (the installed Pillow does not" in capsys.readouterr().out
        return
    picture.save(f"p/a/0.{ending}", KINDS[ending])
    data = ImageSet(folder, check_data=True)
    assert len(data) == 25
    assert np.abs(data.load(0, 32).astype(int) - 90).max() <= 3


# --------------------------------------------------------------------------------------------------
# Animations, rotation, names, folders


@pytest.mark.parametrize(
    "name,form", [("a.png", "PNG"), ("a.webp", "WEBP"), ("a.tif", "TIFF"), ("a.jpg", "GIF")]
)
def test_of_animations_the_first_frame_counts(name, form, inside):
    frames = [Image.new("RGB", (32, 32), colour) for colour in ("red", "blue", "green")]
    options = {"lossless": True} if form == "WEBP" else {}
    frames[0].save(name, form, save_all=True, append_images=frames[1:], **options)
    with Image.open(name) as image:
        assert image.n_frames == 3
    assert examine_picture(name, decode=True)[1] == (32, 32)
    assert np.array_equal(load_image(name, 32), np.asarray(frames[0]))


def test_exif_rotation_is_ignored(inside):
    """As ADM's loader does, so that numbers compare."""
    exif = Image.Exif()
    exif[0x0112] = 6  # "Rotate by 90 degrees to show."
    paint("a.png")
    paint("b.png", exif=exif)
    with Image.open("b.png") as image:
        assert image.getexif()[0x0112] == 6
    assert np.array_equal(load_image("a.png", 32), load_image("b.png", 32))


ODD_NAMES = [
    b"two words.png",
    b"new\nline.png",
    b"\xff\xfe.png",
    "ünï — 图.png".encode(),
    b"-rf.png",
    b"a'b\"c$(d).png",
    b"tab\t.png",
]
ODD_CLASSES = [b"c \xe9\n1", "ç 2".encode()]


def test_odd_names(inside, capsys):
    for odd_class in ODD_CLASSES:
        os.makedirs(b"p/" + odd_class)
        for number, name in enumerate(ODD_NAMES):
            with open(b"p/" + odd_class + b"/" + name, "wb") as file:
                paint(file, number, format="PNG")
    words = [*VAE, "--align", "none", "--gan", 0, "--data", "p", "--workers", 1]
    script(train_vae, *words, "--steps", 1)
    # The second run reads the list that the first has kept.
    script(train_vae, *words, "--steps", 2)
    script(train_sit, *SIT, "--repa", 0, "--data", "p", "--steps", 1)
    data = ImageSet("p")
    expected = [c + b"/" + name for c in ODD_CLASSES for name in ODD_NAMES]
    assert sorted(data.names.tolist()) == sorted(expected)
    assert data.classes == ["c \udce9\n1", "ç 2"]
    assert load_sit("runs/sit").info["classes"] == data.classes
    say("classes", *data.classes)
    assert "\\udce9" in capsys.readouterr().out
    empty(b"p/c \xe9\n1/\xff\n.png")
    message = refused(capsys, train_vae, *words, "--steps", 3)
    assert r"c \udce9\n1/\udcff\n.png': it is empty" in message


def test_links(folder, capsys):
    shutil.move("p/a/00.png", "elsewhere.png")
    os.symlink(os.path.abspath("elsewhere.png"), "p/a/00.png")
    os.makedirs("other")
    shutil.copy("elsewhere.png", "other/x.png")
    os.symlink(os.path.abspath("other"), "p/c")  # A class may be a link, too.
    data = ImageSet(folder)
    assert len(data) == 25
    assert data.classes == ["a", "b", "c"]
    assert data.load(0, 32).shape == (32, 32, 3)
    os.symlink("..", "p/b/up")
    message = refused(capsys, train_vae, *TWO_STEPS, "--data", folder)
    assert "p/b/up' is a link to a folder that contains it" in message


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_folders_and_files_without_permission(folder, capsys):
    os.chmod("p/a/00.png", 0)
    message = refused(capsys, train_vae, *TWO_STEPS, "--data", folder)
    assert "00.png': [Errno 13] Permission denied" in message
    os.chmod("p/a/00.png", 0o600)
    os.chmod("p/b", 0)
    try:
        assert "cannot list" in refused(capsys, train_vae, *TWO_STEPS, "--data", folder)
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
    message = refused(capsys, train_vae, *TWO_STEPS, "--data", folder)
    assert f"cannot list {os.path.abspath('p/b')!r}: Permission denied" in message
