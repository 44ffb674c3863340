"""Pictures in zip, tar and Parquet files: the same pictures are the same data set in any container,
and what is damaged or of another kind is refused by name."""

import gzip
import io
import json
import os
import pickle
import shutil
import tarfile
import zipfile

import numpy as np
import pytest
import torch

import common.pictures as pictures_module
import fid
import probe
import train_vae
from common.archives import Place, open_container
from common.files import UserError
from common.pictures import ImageSet, load_image
from common.weights import load_vae
from conftest import PLAIN_VAE, read_metrics, refused, same_state, script
from probing.benchmarks import read_benchmarks


def files_in(folder):
    """-> {name with / between folders: content} of the files below a folder, in a mixed order."""
    found = {}
    for place, _, names in os.walk(folder):
        for name in names:
            path = os.path.join(place, name)
            with open(path, "rb") as file:
                found[os.path.relpath(path, folder)] = file.read()
    names = sorted(found)
    np.random.default_rng(0).shuffle(names)
    return {name: found[name] for name in names}


def write_zip(path, files, method=zipfile.ZIP_STORED):
    """files: {name: content}."""
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in files.items():
            archive.writestr(name, data)


def write_tar(target, files):
    """target: a path, or an open file."""
    where = {"fileobj": target} if hasattr(target, "write") else {"name": target}
    with tarfile.open(mode="w", **where) as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))


def tar_bytes(files):
    buffer = io.BytesIO()
    write_tar(buffer, files)
    return buffer.getvalue()


def by_class(files):
    """{class/picture: content} -> {class: {picture: content}}."""
    classes = {}
    for name, data in files.items():
        label, picture = name.split("/")
        classes.setdefault(label, {})[picture] = data
    return classes


# --------------------------------------------------------------------------------------------------
# Each kind of container, made of {<class>/<picture>: content}


def make_tree_zip(files):
    write_zip("c.zip", files)
    return "c.zip"


def make_deflated_zip(files):
    """With the folder that is packed, as `zip -r` makes it, and what a Mac adds."""
    packed = {f"my/train/{name}": data for name, data in files.items()}
    packed["__MACOSX/my/train/._1.png"] = b"?"
    write_zip("d.zip", packed, zipfile.ZIP_DEFLATED)
    return "d.zip"


def make_edm_zip(files):
    """As EDM2's dataset_tool.py writes it: folders say nothing, dataset.json has the labels."""
    packed = {}
    labels = []
    for name, data in files.items():
        label, picture = name.split("/")
        packed[picture] = data
        labels.append([picture, int(label)])
    packed["dataset.json"] = json.dumps({"labels": labels})
    write_zip("edm.zip", packed)
    return "edm.zip"


def make_edm_folder(files):
    """The same, unpacked."""
    make_edm_zip(files)
    with zipfile.ZipFile("edm.zip") as archive:
        archive.extractall("edm")
    return "edm"


def make_edm_tar(files):
    packed = make_edm_folder(files)
    with tarfile.open("edm.tar", "w") as archive:
        archive.add(packed, ".")
    return "edm.tar"


def make_tree_tar(files):
    write_tar("c.tar", {f"./{name}": data for name, data in files.items()})
    return "c.tar"


def make_folder_in_tar(files):
    """One of several folders in an archive, given by its path there."""
    packed = {f"set/train/{name}": data for name, data in files.items()}
    write_tar("both.tar", packed | {"set/val/3/x.png": next(iter(files.values()))})
    return "both.tar/set/train"


def make_tar_of_tars(files):
    """As ILSVRC2012_img_train.tar is."""
    write_tar("t.tar", {f"{name}.tar": tar_bytes(part) for name, part in by_class(files).items()})
    return "t.tar"


def make_class_tars(files):
    """The same after `tar xf`. Numbers are names of shards, and so not classes."""
    os.makedirs("tars")
    for name, part in by_class(files).items():
        write_tar(f"tars/{name}.tar", part)
    return "tars"


def make_webdataset(files):
    os.makedirs("wds")
    shards = [{}, {}, {}]
    for i, (name, data) in enumerate(files.items()):
        label, picture = name.split("/")
        key = picture.removesuffix(".png")
        shards[i % 3].update(
            {f"{key}.cls": label.encode(), f"{key}.png": data, f"{key}.json": b"{}"}
        )
    for i, shard in enumerate(shards):
        write_tar(f"wds/train-{i:04d}.tar", shard)
    return "wds"


def make_kaggle_zip(files):
    packed = {f"ILSVRC/Data/CLS-LOC/train/{name}": data for name, data in files.items()}
    packed["ILSVRC/Data/CLS-LOC/val/x.png"] = next(iter(files.values()))
    write_zip("k.zip", packed | {"LOC_val_solution.csv": b"?"})
    return "k.zip"


def make_kaggle_folder(files):
    for name, data in files.items():
        path = f"kaggle/ILSVRC/Data/CLS-LOC/train/{name}"
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb") as file:
            file.write(data)
    return "kaggle"


def make_parquet(files):
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    from pyarrow import parquet

    os.makedirs("parquet")
    rows = list(files.items())
    for i in range(2):
        part = rows[i::2]
        pictures = [{"bytes": data, "path": name.split("/")[1]} for name, data in part]
        labels = [int(name.split("/")[0]) for name, _ in part]
        table = pyarrow.table({"image": pictures, "label": labels})
        parquet.write_table(table, f"parquet/train-{i}.parquet", row_group_size=5)
    return "parquet"


@pytest.fixture
def numbers(inside, pictures):
    """n/{2,10}/*.png below the current folder. 2 is the first class, and its names are the last."""
    for label, name in (("2", "a"), ("10", "b")):
        os.makedirs(f"n/{label}")
        for file in os.listdir(pictures / name):
            shutil.copy(pictures / name / file, f"n/{label}/{name}{file}")
    return "n"


MAKERS = [
    make_tree_zip,
    make_deflated_zip,
    make_edm_zip,
    make_edm_folder,
    make_edm_tar,
    make_tree_tar,
    make_folder_in_tar,
    make_tar_of_tars,
    make_webdataset,
    make_kaggle_zip,
    make_kaggle_folder,
    make_parquet,
]


@pytest.mark.parametrize("make", MAKERS, ids=lambda make: make.__name__.removeprefix("make_"))
def test_the_same_pictures_are_the_same_data_in_any_container(make, numbers):
    folder = ImageSet(numbers)
    path = make(files_in(numbers))
    for data in (ImageSet(path), ImageSet(path)):  # The second reads what the first has kept.
        assert data.classes == folder.classes == ["2", "10"]
        assert data.names.tolist() == folder.names.tolist()
        assert np.array_equal(data.labels, folder.labels)
        assert data.fingerprint == folder.fingerprint
        assert data.smallest == folder.smallest
        assert torch.equal(data.stack(range(24), 16), folder.stack(range(24), 16))


def test_a_tar_file_for_each_class(inside, pictures, capsys):
    data = ImageSet(make_class_tars(files_in(pictures)))
    assert data.classes == ["a", "b"]
    assert data.fingerprint == ImageSet(pictures).fingerprint
    assert "tars: each .tar file in it is a class" in capsys.readouterr().out


def test_shards_without_labels_are_one_class(numbers):
    assert ImageSet(make_class_tars(files_in(numbers))).classes == ["."]


def test_an_edm_zip_without_labels_is_one_class(inside, pictures):
    files = {f"0000{name}": data for name, data in files_in(pictures).items()}
    write_zip("u.zip", files | {"dataset.json": '{"labels": null}'})
    assert ImageSet("u.zip").classes == ["all"]
    with zipfile.ZipFile("u.zip") as archive:
        archive.extractall("u")
    assert ImageSet("u").classes == ["all"]
    assert ImageSet("u").fingerprint == ImageSet("u.zip").fingerprint


@pytest.mark.parametrize("content", ['{"name": "birds"}', '{"labels": ["a", "b"]}', "[1]"])
def test_another_projects_dataset_json_says_nothing_about_labels(content, inside, pictures, capsys):
    shutil.copytree(pictures, "p")
    write_zip("p.zip", files_in(pictures) | {"dataset.json": content})
    with open("p/dataset.json", "w") as file:
        file.write(content)
    for path in ("p", "p.zip"):
        assert ImageSet(path).classes == ["a", "b"]
        assert f"{path}: left out: 1 .json" in capsys.readouterr().out


def test_a_picture_of_an_edm_folder_is_named_by_its_path(numbers):
    folder = make_edm_folder(files_in(numbers))
    data = ImageSet(folder)
    for i in (0, 23):
        assert os.path.isfile(data.path(i))
    assert str(ImageSet("edm.zip").source(0)) == os.path.abspath(f"edm.zip/{data.name_there(0)}")
    overwrite(f"{folder}/a00.png", 0, b"no picture")
    write_zip("edm.zip", files_in(folder))
    for path in ("edm", "edm.zip"):
        with pytest.raises(UserError, match=f"{path}/a00.png': it is no picture"):
            ImageSet(path)


def test_training_is_the_same_from_a_folder_and_from_an_archive(inside, pictures):
    words = [*PLAIN_VAE, "--steps", 2]
    script(train_vae, *words, "--data", pictures, "--out", "runs/folder")
    archive = make_deflated_zip(files_in(pictures))
    script(train_vae, *words, "--data", archive, "--out", "runs/zip", "--workers", 1)
    lines = [read_metrics(f"runs/{name}/metrics.jsonl") for name in ("folder", "zip")]
    assert lines[0] == lines[1]
    first, second = (load_vae(f"runs/{name}").state_dict() for name in ("folder", "zip"))
    assert same_state(first, second)


@pytest.mark.parametrize("form", ["folder", "tar", "shards"])
def test_flat_names_of_imagenet_have_their_class(form, inside, pictures, capsys):
    """As Hugging Face packs it: n01440764_10026.JPEG, in no folder."""
    source = files_in(pictures)
    flat = {f"n0000000{'ab'.index(name[0])}_{name[2:]}": data for name, data in source.items()}
    os.makedirs("flat")
    if form == "folder":
        for name, data in flat.items():
            with open(f"flat/{name}", "wb") as file:
                file.write(data)
    if form == "tar":
        write_tar("flat/all.tar", flat)
    if form == "shards":
        for i in range(2):
            part = list(flat.items())[i::2]
            write_tar(f"flat/train_images_{i}.tar", dict(part))
    data = ImageSet("flat")
    assert data.classes == ["n00000000", "n00000001"]
    assert torch.equal(data.stack([0, 23], 16), ImageSet(pictures).stack([0, 23], 16))
    assert np.array_equal(data.labels, np.repeat([0, 1], 12))
    assert "the classes are what the names of the pictures begin with" in capsys.readouterr().out


def test_fid_and_probe_take_an_archive(inside, pictures):
    archive = make_deflated_zip(files_in(pictures))
    sets = [fid.Pictures(str(path), size=16) for path in (pictures, archive)]
    assert sets[0].record["hash"] == sets[1].record["hash"]
    assert torch.equal(*(s.stack(np.arange(24), 16) for s in sets))
    np.savez("set.npz", arr_0=np.zeros((3, 16, 16, 3), np.uint8))
    assert fid.Pictures("set.npz").count == 3

    benchmarks = []
    for path in (str(pictures), archive):
        words = ["--data", path, "--task", "classes", "--train-images", "10"]
        benchmarks += read_benchmarks(probe.parse_arguments(words))
    for benchmark in benchmarks:
        assert benchmark.attributes == ["a", "b"]
    assert np.array_equal(benchmarks[0].targets, benchmarks[1].targets)
    assert benchmarks[0].fingerprint == benchmarks[1].fingerprint
    assert torch.equal(*(benchmark.load(range(15), 16) for benchmark in benchmarks))


# --------------------------------------------------------------------------------------------------
# The list that is kept, and reading


def test_an_archive_is_listed_once_until_it_changes(inside, pictures, monkeypatch):
    files = files_in(pictures)
    write_tar("c.tar", files)
    before = ImageSet("c.tar")

    def list_again(*arguments):
        pytest.fail("the archive was listed again")

    with monkeypatch.context() as patch:
        patch.setattr(pictures_module, "list_archive", list_again)
        patch.setattr(pictures_module, "examine_picture", list_again)
        ImageSet("c.tar")
    # The same names and sizes, but two pictures have changed places.
    swapped = dict(files, **{"a/00.png": files["b/11.png"], "b/11.png": files["a/00.png"]})
    write_tar("c.tar", swapped)
    after = ImageSet("c.tar")
    assert after.fingerprint != before.fingerprint
    assert np.array_equal(after.load(0, 16), load_image(pictures / "b/11.png", 16))
    write_zip("copy.zip", swapped)
    assert ImageSet("copy.zip").fingerprint == after.fingerprint


def test_of_a_name_that_a_tar_holds_twice_the_last_counts(inside, pictures):
    """So is it when `tar -r` has added a new version."""
    files = files_in(pictures)
    write_tar("c.tar", dict(files, **{"a/00.png": files["b/11.png"]}))
    with tarfile.open("c.tar", "a") as archive:
        archive.add(pictures / "a/00.png", "a/00.png")
    assert ImageSet("c.tar").fingerprint == ImageSet(pictures).fingerprint


def test_the_same_key_in_several_shards_is_not_lost(inside, pictures):
    files = files_in(pictures)
    os.makedirs("w")
    for i, name in enumerate(["a/00.png", "a/01.png", "b/00.png"]):
        write_tar(f"w/{i:04d}.tar", {"000.png": files[name], "000.cls": name[0].encode()})
    data = ImageSet("w")
    assert data.names.tolist() == [b"a/0000-000.png", b"a/0001-000.png", b"b/0002-000.png"]
    assert np.array_equal(data.load(2, 16), load_image(pictures / "b/00.png", 16))


def test_more_containers_than_may_be_open(inside, pictures):
    files = files_in(pictures)
    os.makedirs("w")
    for i, (name, data) in enumerate(files.items()):
        write_tar(f"w/{i:04d}.tar", {name: data})
    for i in range(100):
        write_tar(f"w/x{i:04d}.tar", {f"a/x{i:03d}.png": files["a/00.png"]})
    data = ImageSet("w")
    assert len(data) == 124
    assert data.stack(range(124), 8).shape == (124, 3, 8, 8)
    assert open_container.cache_info().currsize <= 64


def test_a_set_goes_to_loaders_that_are_started_anew(inside, pictures):
    """As on macOS, where a loader gets the set as bytes."""
    write_zip("c.zip", files_in(pictures))
    data = ImageSet("c.zip")
    copy = pickle.loads(pickle.dumps(data))
    assert np.array_equal(copy.load(3, 16), data.load(3, 16))


@pytest.mark.parametrize("form", ["folder", "zip"])
def test_a_check_that_was_killed_goes_on(form, inside, pictures, monkeypatch):
    """What is finished is kept now and then, here after every picture."""
    monkeypatch.setattr(pictures_module, "KEEP_EVERY", 0)
    path = pictures
    if form == "zip":
        write_zip("c.zip", files_in(pictures))
        path = "c.zip"
    examine = pictures_module.examine_picture
    seen = []

    def note(source, decode):
        seen.append(str(source))
        return examine(source, decode)

    def note_or_die(source, decode):
        if str(source).endswith("b/03.png"):
            raise KeyboardInterrupt
        return note(source, decode)

    monkeypatch.setattr(pictures_module, "examine_picture", note_or_die)
    with pytest.raises(KeyboardInterrupt):
        ImageSet(path)
    seen.clear()
    monkeypatch.setattr(pictures_module, "examine_picture", note)
    fingerprint = ImageSet(path).fingerprint
    assert len(seen) == 9  # b/03.png to b/11.png
    shutil.rmtree("runs")
    assert ImageSet(path).fingerprint == fingerprint
    assert len(seen) == 9 + 24


def test_a_bad_picture_does_not_cost_the_check_of_the_others(inside, pictures, monkeypatch):
    shutil.copytree(pictures, "p")
    os.truncate("p/b/11.png", 0)
    with pytest.raises(UserError, match="1 picture cannot be read"):
        ImageSet("p")
    os.remove("p/b/11.png")

    def check_again(*arguments):
        pytest.fail("a picture was checked again")

    monkeypatch.setattr(pictures_module, "examine_picture", check_again)
    assert len(ImageSet("p")) == 23


# --------------------------------------------------------------------------------------------------
# What is refused


def overwrite(path, at, data):
    with open(path, "r+b") as file:
        file.seek(at)
        file.write(data)


def make_refused(kind, files):
    """Writes a file that cannot be used -> (its path, words of the message)."""
    if kind == "missing":
        return "x.zip", "x.zip: no such folder or file; give with --data a folder of"
    if kind == "gzip":
        with gzip.open("c.tar.gz", "wb") as file:
            file.write(tar_bytes(files))
        return "c.tar.gz", "is compressed by gzip, .* decompress it .gzip -dk"
    if kind == "text":
        with open("notes.txt", "w") as file:
            file.write("hello")
        return "notes.txt", "holds no pictures in a form that is read; what is taken: a folder of"
    if kind == "bzip2 in zip":
        write_zip("b.zip", files, zipfile.ZIP_BZIP2)
        return "b.zip", "packed by a method other than stored and deflated; pack it anew"
    if kind == "no pictures":
        write_zip("t.zip", {"a/b.txt": b"?"})
        return "t.zip", "has no pictures .*; left out: 1 .txt"
    if kind == "in a folder":
        os.mkdir("folder")
        write_zip("folder/b.zip", files)
        return "folder", r"left out: 1 .zip \(an archive is read where it is given itself\)"
    return make_refused_classes(kind, files)


def make_refused_classes(kind, files):
    if kind == "splits":
        write_zip("s.zip", {f"{part}/{name}": b"" for part in ("train", "val") for name in files})
        return "s.zip", "parts of a data set .train, val.* such as .*s.zip/train"
    if kind == "label missing":
        write_tar("w.tar", {"1.png": files["a/00.png"], "1.cls": b"0", "2.png": files["b/00.png"]})
        return "w.tar", r"1 of 2 pictures have no label .*, the first is '2\.png'"
    if kind == "label of a folder missing":
        folder = make_edm_folder({"0/a.png": files["a/00.png"], "1/b.png": files["b/00.png"]})
        shutil.copy(f"{folder}/a.png", f"{folder}/c.png")
        return folder, r"1 of 3 pictures have no label in dataset.json, the first is 'c\.png'"
    if kind == "damaged labels":
        folder = make_edm_folder({"0/a.png": files["a/00.png"]})
        overwrite(f"{folder}/dataset.json", 0, b"[")
        return folder, "edm/dataset.json cannot be read as EDM's labels"
    if kind == "empty label":
        write_tar("w.tar", {"1.png": files["a/00.png"], "1.cls": b""})
        return "w.tar", "w.tar: the label in '1.cls' is empty"
    raise ValueError(kind)


KINDS = [
    "missing",
    "gzip",
    "text",
    "bzip2 in zip",
    "no pictures",
    "in a folder",
    "label missing",
    "label of a folder missing",
    "damaged labels",
    "empty label",
    "splits",
]


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_archive_of_pictures_is_refused(kind, inside, pictures):
    path, words = make_refused(kind, files_in(pictures))
    with pytest.raises(UserError, match=words):
        ImageSet(path)


def test_a_stage_refuses_in_one_sentence(inside, capsys):
    make_refused("text", {})
    message = refused(capsys, train_vae, *PLAIN_VAE, "--data", "notes.txt", "--steps", 1)
    assert message.startswith(
        f"train_vae.py: error: {os.path.abspath('notes.txt')} holds no pictures"
    )


@pytest.mark.parametrize("make", [make_tree_zip, make_tree_tar, make_tar_of_tars])
@pytest.mark.parametrize("share", [0.3, 0.7])
def test_a_cut_archive_is_refused(make, share, inside, pictures):
    path = make(files_in(pictures))
    os.truncate(path, int(os.path.getsize(path) * share))
    with pytest.raises(UserError, match=r"cannot be read as a (zip|tar) file"):
        ImageSet(path)


def test_damage_in_the_middle_of_a_tar_is_no_end(inside, pictures):
    """Python's reader takes it for the end of the file."""
    write_tar("c.tar", files_in(pictures))
    with tarfile.open("c.tar") as archive:
        offset = archive.getmembers()[12].offset
    overwrite("c.tar", offset, b"\xff" * 512)
    with pytest.raises(UserError, match=f"cut or damaged at byte {offset}"):
        ImageSet("c.tar")


def test_a_damaged_member_is_named_and_can_be_skipped(inside, pictures):
    write_zip("c.zip", files_in(pictures))
    with zipfile.ZipFile("c.zip") as archive:
        member = archive.getinfo("a/03.png")
    overwrite("c.zip", member.header_offset, b"????")
    with pytest.raises(UserError, match=r"c\.zip/a/03\.png': .*damaged at byte"):
        ImageSet("c.zip")
    data = ImageSet("c.zip", skip_bad=True)
    assert data.bad == {3}
    assert np.array_equal(data.load(3, 16), load_image(pictures / "a/04.png", 16))


def test_an_archive_that_shrinks_while_training_is_an_error_of_the_picture(inside, pictures):
    write_tar("c.tar", files_in(pictures))
    data = ImageSet("c.tar")
    os.truncate("c.tar", 600)
    place = data.source(5)
    assert isinstance(place, Place)
    with pytest.raises(UserError, match=r"cannot read the picture .*c\.tar is cut or damaged"):
        load_image(place, 16)
