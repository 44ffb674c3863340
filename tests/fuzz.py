"""Feeds damaged files to every reader: checkpoints, weights, caches, .npz, attribute lists,
pictures.

    python tests/fuzz.py 100000 --seed 0              # findings go to runs/fuzz
    python tests/fuzz.py 1 --seed 0 --start 4711      # one mutation again

Mutation k is a function of the seed and k. A reader may refuse a file (UserError), or return what
it returned before. Formats without checksums (JPEG, text, PyTorch's old pickles, raw arrays,
diffusers' folders), and files whose checksums were made to fit the damage, may give other values of
the right kind. Anything else is a finding: another exception, a crash, a hang (10 s), more than
1 GiB of memory."""

import argparse
import contextlib
import io
import json
import multiprocessing
import os
import re
import resource
import shutil
import signal
import struct
import sys
import tarfile
import tempfile
import time
import traceback
import types
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple
from unittest import mock

import numpy as np
import timm
import torch
import torchvision
from PIL import Image
from safetensors.torch import save_file

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import fid
import models
import probe
import sample
import train_sit
from common.archives import Place, list_archive
from common.files import UserError, write_json, write_weights
from common.pictures import ImageSet, TrainingBatches, examine_picture, load_image
from common.runs import load_checkpoint, mark_done, resumable_array, save_checkpoint
from common.weights import load_sit, load_vae
from probing.benchmarks import read_benchmarks
from tools import weights

# Bytes of address space that the readers may take.
MEMORY_LIMIT = 2**30
# Seconds of processor time that a reader may take. Another program's load must not look like a
# hang, so it is no wall-clock time.
PATIENCE = 10
# Seconds of wall-clock time after which a process counts as stuck where no signal reaches it.
STUCK = 90

# --------------------------------------------------------------------------------------------------
# Edits of bytes. Each is a function of (rng, data, at, length), `at` an offset and `length` a
# number of bytes, and returns the new bytes.

# Numbers at which readers may overflow, or take too much memory.
NUMBERS = [0, 1, -1, 2, 7, 127, 128, 255, 256, 65535, 65536, 10**6]
NUMBERS += [2**31 - 1, 2**31, 2**32 - 1, 2**32, 10**12, 2**63 - 1, 2**63, 2**64 - 1]


def random_offset(rng, data):
    """Anywhere, or, since headers are there, near the start or the end."""
    reach = int(rng.choice([len(data), 64, 512]))
    at = int(rng.integers(min(reach, len(data)))) if data else 0
    from_end = rng.random() < 0.25
    if from_end and data:
        return len(data) - 1 - at
    return at


def flip_bit(rng, data, at, length):
    if not data:
        return data
    changed = data[at] ^ (1 << int(rng.integers(8)))
    return data[:at] + bytes([changed]) + data[at + 1 :]


def fill_block(rng, data, at, length):
    block = data[at : at + length]
    value = int(rng.choice([0, 255, 32]))
    return data[:at] + bytes([value]) * len(block) + data[at + len(block) :]


def randomize_block(rng, data, at, length):
    block = data[at : at + length]
    return data[:at] + rng.bytes(len(block)) + data[at + len(block) :]


def cut_end(rng, data, at, length):
    return data[:at]


def delete_block(rng, data, at, length):
    return data[:at] + data[at + length :]


def repeat_block(rng, data, at, length):
    return data[:at] + data[at : at + length] + data[at:]


def insert_bytes(rng, data, at, length):
    return data[:at] + rng.bytes(length % 64) + data[at:]


def copy_block(rng, data, at, length):
    """Overwrites with a block from elsewhere."""
    block = data[at : at + length]
    start = random_offset(rng, data)
    other = data[start : start + len(block)]
    return data[:at] + other + data[at + len(other) :]


def write_binary_number(rng, data, at, length):
    form = str(rng.choice(["<I", ">I", "<Q", ">Q", "<H", ">H"]))
    if rng.random() < 0.2:
        number = int(rng.integers(len(NUMBERS)))
    else:
        number = NUMBERS[rng.integers(len(NUMBERS))]
    packed = struct.pack(form, number % 2 ** (8 * struct.calcsize(form)))
    return data[:at] + packed + data[at + len(packed) :]


def replace_written_number(rng, data, at, length):
    """Replaces a number in text: JSON, headers of .npy, lists."""
    return rewrite_number(rng, data, lambda old: NUMBERS[rng.integers(len(NUMBERS))])


def change_written_number(rng, data, at, length):
    return rewrite_number(rng, data, lambda old: old + int(rng.integers(-3, 4)))


def rewrite_number(rng, data, new_number):
    """Puts new_number(old number) in the place of one written in digits, or at times text that is
    no such number."""
    searched = data[:20000] if rng.random() < 0.9 else data
    matches = list(re.finditer(rb"-?\d+", searched))
    if not matches:
        return data
    match = matches[rng.integers(len(matches))]
    text = str(new_number(int(match[0][:18]))).encode()
    if rng.random() >= 0.9:
        text = rng.choice([b"nan", b"1e99", b"9" * 5000, b"null", b'"x"', b"[]"])
    return data[: match.start()] + text + data[match.end() :]


EDITS = [
    flip_bit,
    fill_block,
    randomize_block,
    cut_end,
    delete_block,
    repeat_block,
    insert_bytes,
    copy_block,
    write_binary_number,
    replace_written_number,
    change_written_number,
]


def edit_once(rng, data):
    edit = EDITS[rng.integers(len(EDITS))]
    at = random_offset(rng, data)
    length = int(2 ** rng.uniform(0, 10))
    return edit(rng, data, at, length)


def edit(rng, data):
    """One edit or several -> bytes."""
    for _ in range(int(rng.choice([1, 1, 1, 2, 3, 5]))):
        data = edit_once(rng, data)
    return data


# --------------------------------------------------------------------------------------------------
# Edits that keep a file's checksums and lengths right


def reseal_zip(rng, data):
    """One member edited, and all checksums right again."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, "w") as new:
        members = old.infolist()
        chosen = choose_member(rng, members)
        for i, member in enumerate(members):
            content = old.read(member)
            if i == chosen:
                content = edit(rng, content)
            new.writestr(member.filename, content)
    return out.getvalue()


def choose_member(rng, members):
    """The number of any member, or of the first that describes the others."""
    if rng.random() < 0.4:
        return rng.integers(len(members))
    for i, member in enumerate(members):
        if member.filename.endswith(("data.pkl", "header.npy")):
            return i
    return 0


def reseal_png(rng, data):
    """A chunk edited inside, lost, doubled or moved; each with a right checksum."""
    chunks = []
    at = 8
    while at < len(data):
        length = struct.unpack(">I", data[at : at + 4])[0]
        chunks.append(data[at + 4 : at + 8 + length])
        at += 12 + length
    i = int(rng.integers(len(chunks)))
    kind = rng.integers(5)
    if kind < 2:
        chunks[i] = chunks[i][:4] + edit(rng, chunks[i][4:])
    elif kind == 2:
        del chunks[i]
    else:
        chunks.insert(int(rng.integers(len(chunks))), chunks[i])
    resealed = data[:8]
    for chunk in chunks:
        length = struct.pack(">I", len(chunk) - 4)
        resealed += length + chunk + struct.pack(">I", zlib.crc32(chunk))
    return resealed


def rehead_safetensors(rng, data):
    """The JSON header edited, and its length right again."""
    length = struct.unpack("<Q", data[:8])[0]
    header = edit(rng, data[8 : 8 + length])
    return struct.pack("<Q", len(header)) + header + data[8 + length :]


def mutate(rng, data, name):
    """The bytes of a file of this name -> (damaged bytes, whether checksums were made to fit)."""
    if rng.random() < 0.3:
        # The writer of archives refuses some sizes. Such a file is edited as any other.
        with contextlib.suppress(Exception):
            if data[:2] == b"PK":
                return reseal_zip(rng, data), True
            if data[:4] == b"\x89PNG":
                return reseal_png(rng, data), True
            if name.endswith(".safetensors"):
                return rehead_safetensors(rng, data), False
    return edit(rng, data), False


# --------------------------------------------------------------------------------------------------
# Weights and checkpoints: make_* writes the files of a target into the current folder, read_* reads
# them. All others below are alike.

TINY_VAE = dict(spec="f2d2", resolution=8, ch=4, ch_mult=(1, 1), num_res_blocks=1)
# Groups of one channel, since the formats of others have 32 groups.
TINY_PUBLISHED_VAE = dict(TINY_VAE, ch=32, groups=32)


def content_of(net):
    """What load_vae and load_sit return, for comparison."""
    return dict(net.state_dict(), config=net.config, hash=net.info["hash"])


def make_checkpoint():
    net = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(net.parameters())
    net(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    state = dict(
        step=3,
        arguments=dict(lr=0.1, data="x"),
        net=net.state_dict(),
        running=torch.ones(3),
        optimizer=optimizer.state_dict(),
    )
    save_checkpoint(".", 3, state)


def read_checkpoint():
    return load_checkpoint(".", "cpu")


def make_vae():
    net = models.VAE(**TINY_VAE)
    info = dict(step=3, arguments=dict(lr=0.1))
    write_weights("vae.safetensors", "vae", net.state_dict(), net.config, info)


def read_vae():
    return content_of(load_vae("."))


def make_sit():
    net = models.SiT("S", 2, 2, 4, 3, depth=1, width=8, heads=1)
    info = dict(step=3, classes=["a"], vae_hash="0", vae_path="x")
    write_weights("sit.safetensors", "sit", net.state_dict(), net.config, info)


def read_sit():
    return content_of(load_sit("."))


class Callback(dict):
    """Stands for a class of another package, such as those that Lightning leaves in checkpoints."""


def make_ldm():
    vae = models.VAE(**TINY_PUBLISHED_VAE)
    state = {key: value for key, value in vae.state_dict().items() if "latent_" not in key}
    extras = dict(callbacks={Callback: Callback(a=1)}, monitor=np.float64(0.5))
    torch.save(dict(state_dict=state, **extras), "vae.ckpt")
    statistics = dict(mean=torch.randn(1, 2, 1, 1), std=torch.rand(1, 2, 1, 1) + 0.5)
    torch.save(statistics, "latents_stats.pt")


def read_ldm():
    return content_of(load_vae("vae.ckpt"))


def make_diffusers():
    weights.export_vae(models.VAE(**TINY_PUBLISHED_VAE), "diffusers", "vae")


def read_diffusers():
    load_vae("vae")
    return {}


def make_published_sit():
    state = models.SiT("S", 2, 4, 4, 3, depth=1, width=64, heads=1).state_dict()
    torch.save(dict(ema=state, args=argparse.Namespace(a=1)), "sit.pt")


def read_published_sit():
    return content_of(load_sit("sit.pt"))


def thin_vgg16():
    """VGG16 with 2 to 4 channels."""
    widths = [2, 2, "M", 3, 3, "M", 4, 4, 4, "M", 2, 2, 2, "M", 2, 2, 2, "M"]
    return types.SimpleNamespace(features=torchvision.models.vgg.make_layers(widths))


def make_lpips():
    state = {}
    for key, value in thin_vgg16().features.state_dict().items():
        state[f"features.{key}"] = value
    for i, width in enumerate((2, 3, 4, 2, 2)):
        state[f"lin{i}.model.1.weight"] = torch.rand(1, width, 1, 1)
    torch.save(state, "new.pth")
    # This format holds memory addresses, which differ between two runs of this program.
    torch.save(state, "old.pth", _use_new_zipfile_serialization=False)
    save_file(state, "plain.safetensors")


def read_lpips(path):
    with mock.patch.object(torchvision.models, "vgg16", thin_vgg16):
        return models.LPIPS([path]).state_dict()


def make_vfm():
    save_file(timm.create_model("test_vit").state_dict(), "vfm.safetensors")


def read_vfm():
    models.VFM("test_vit", "vfm.safetensors", 32, 2)
    return {}


# --------------------------------------------------------------------------------------------------
# Caches and sets of pictures


def paint(path, number):
    """Writes a smooth picture of 20 x 16 pixels, another one for each number."""
    smooth_picture(number).save(path)


def smooth_picture(number):
    x = np.random.default_rng(number).integers(0, 256, (3, 4, 3), dtype=np.uint8)
    return Image.fromarray(x).resize((20, 16), Image.BICUBIC)


def make_file_list():
    """The list of files that ImageSet keeps of a folder."""
    os.makedirs("pictures/a")
    os.makedirs("pictures/b")
    for i in range(6):
        paint(f"pictures/{'ab'[i % 2]}/{i:02d}.png", i)
    ImageSet("pictures")
    [name] = os.listdir("runs/cache")
    return [f"runs/cache/{name}"]


def read_file_list():
    data = ImageSet("pictures")
    item = TrainingBatches(data, 3, 0, 8)[1]
    return dict(
        names=data.names,
        labels=data.labels,
        classes=data.classes,
        fingerprint=data.fingerprint,
        smallest=data.smallest,
        image=item["image"],
        label=item["label"],
    )


LATENTS_SHAPE = (10, 2, 2, 1, 2, 2)


def make_latents():
    """A cache of latents with two of its three blocks done."""
    array, done, _ = resumable_array(".", "latents.npy", np.float16, LATENTS_SHAPE, 4)
    array[:] = np.random.default_rng(0).normal(size=LATENTS_SHAPE)
    for k in range(2):
        mark_done(array, done, k)


def read_latents():
    """The values have no checksum. Their number, type and shape must be right, and no file may ever
    be enlarged."""
    sizes = [os.path.getsize(path) for path in ("latents.npy", "done.npy")]
    array, done, todo = resumable_array(".", "latents.npy", np.float16, LATENTS_SHAPE, 4)
    assert array.shape == LATENTS_SHAPE
    assert array.dtype == np.float16
    assert done.shape == (3,)
    assert set(todo) <= {0, 1, 2}
    index = np.arange(10)
    latent = train_sit.LatentCache(".").read(index, index % 2 == 0)["latent"]
    assert latent.shape == (10, 2, 1, 2, 2)
    assert sizes == [os.path.getsize(path) for path in ("latents.npy", "done.npy")]
    return {}


# The arguments of sample.py and the settings that it records.
SET_ARGUMENTS = types.SimpleNamespace(
    out="set.npz",
    overwrite=False,
    num=10,
    batch_size=4,
    labels="equal",
    seed=0,
    sampler="ode",
    steps=2,
    cfg=1.0,
    interval=(0, 1),
    compile=False,
)
SET_SETTINGS = dict(seed=0, cfg=1.5, sit_hash="abc")


def draw_pattern(sit, vae, ids, *more):
    """Stands in for sample.draw -> uint8 (B,3,8,8), a function of ids (B,)."""
    x = ids[:, None, None, None] * 37 + torch.arange(192).view(3, 8, 8)
    return (x % 256).to(torch.uint8)


def make_parts():
    """An interrupted set of sample.py: two of its three blocks are done."""
    folder = "set.npz.parts"
    write_json(f"{folder}/settings.json", SET_SETTINGS)
    array, done, _ = resumable_array(folder, "pictures.npy", np.uint8, (10, 8, 8, 3), 4)
    array[:8] = draw_pattern(None, None, torch.arange(8)).permute(0, 2, 3, 1).numpy()
    for k in range(2):
        mark_done(array, done, k)


def read_parts():
    """Finishes the set, and puts the parts back."""
    shutil.copytree("set.npz.parts", "kept.parts")
    try:
        with (
            mock.patch.object(sample, "draw", draw_pattern),
            contextlib.redirect_stderr(io.StringIO()),  # the progress bar
        ):
            sample.draw_set(
                types.SimpleNamespace(num_classes=3, info={}),
                types.SimpleNamespace(resolution=8),
                SET_ARGUMENTS,
                torch.device("cpu"),
                "fp32",
                SET_SETTINGS,
            )
        with np.load("set.npz") as file:
            assert file["arr_0"].shape == (10, 8, 8, 3)
            assert file["labels"].tolist() == [i % 3 for i in range(10)]
            return dict(settings=str(file["settings"]))
    finally:
        shutil.rmtree("set.npz.parts", ignore_errors=True)
        os.rename("kept.parts", "set.npz.parts")
        with contextlib.suppress(FileNotFoundError):
            os.remove("set.npz")


def make_npz():
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 256, (7, 8, 8, 3), dtype=np.uint8)
    arrays = dict(arr_0=pictures, labels=np.arange(7) % 3)
    np.savez("plain.npz", **arrays, settings=np.array(json.dumps(dict(seed=0, cfg=1.5))))
    mu = rng.normal(size=5)
    sigma = rng.normal(size=(5, 5))
    np.savez_compressed("adm.npz", **arrays, mu=mu, sigma=sigma)


def read_npz(path):
    pictures = fid.Pictures(path, batch_size=3)
    return dict(
        items=list(pictures.batches(torch.device("cpu"), 0)),
        record={key: value for key, value in pictures.record.items() if key != "hash"},
        count=pictures.count,
        **pictures.set.statistics,
    )


def make_statistics():
    """The cache of a reference's statistics, and a copy that stays undamaged."""
    mu = torch.randn(5).double()
    sigma = torch.randn(5, 5).double()
    splits = torch.rand(2, 3).double()
    torch.save(dict(mu=mu, sigma=sigma, splits=splits), "fid.pt")
    shutil.copy("fid.pt", "undamaged.pt")
    return ["fid.pt"]


def read_statistics():
    """A damaged cache is computed again, which gives what it held."""
    statistics = fid.read_statistics("fid.pt", "cpu")
    return statistics or torch.load("undamaged.pt", weights_only=True)


# --------------------------------------------------------------------------------------------------
# Attribute lists, each below the folder data


def write_texts(texts):
    """{path below data: text} -> the paths."""
    for path, text in texts.items():
        os.makedirs(os.path.dirname(f"data/{path}"), exist_ok=True)
        with open(f"data/{path}", "w") as file:
            file.write(text)
    return [f"data/{path}" for path in texts]


def make_celeba_lists(ending, gap, attribute_head, partition_head):
    rng = np.random.default_rng(0)
    names = [f"{i:06d}.jpg" for i in range(1, 7)]
    os.makedirs("data")
    for i, name in enumerate(names):
        paint(f"data/{name}", i)
    attributes = attribute_head
    for name in names:
        values = [str(value) for value in rng.choice([-1, 1], 3)]
        attributes += gap.join([name, *values]) + "\n"
    partition = partition_head
    for name, part in zip(names, (0, 0, 0, 1, 2, 2), strict=True):
        partition += f"{name}{gap}{part}\n"
    return write_texts(
        {f"list_attr_celeba.{ending}": attributes, f"list_eval_partition.{ending}": partition}
    )


def make_celeba():
    return make_celeba_lists("txt", " ", "6\nBald Eyeglasses Smiling\n", "")


def make_celeba_csv():
    head = "image_id,Bald,Eyeglasses,Smiling\n"
    return make_celeba_lists("csv", ",", head, "image_id,partition\n")


def make_awa2():
    classes = ["ox", "bat", "cow"]
    for name in classes:
        os.makedirs(f"data/JPEGImages/{name}")
    for i in range(24):
        paint(f"data/JPEGImages/{classes[i % 3]}/{i:02d}.jpg", i)
    return write_texts(
        {
            "classes.txt": "0 ox\n1 bat\n2 cow\n",
            "predicates.txt": "1 furry\n2 big\n",
            "testclasses.txt": "cow\n",
            "predicate-matrix-binary.txt": "1 0\n0 1\n1 1\n",
        }
    )


def make_deepfashion():
    parts = ["train", "train", "train", "train", "val", "val", "test", "test"]
    os.makedirs("data/img/a")
    os.makedirs("data/img/b")
    images = "8\nimage_name attribute_labels\n"
    partition = "8\nimage_name evaluation_status\n"
    for i, part in enumerate(parts):
        name = f"img/{'ab'[i % 2]}/{i}.jpg"
        paint(f"data/{name}", i)
        images += f"{name}  1 -1\n"
        partition += f"{name} {part}\n"
    attributes = "2\nattribute_name  attribute_type\na-line skirt  3\nstriped 1\n"
    return write_texts(
        {
            "Anno_coarse/list_attr_cloth.txt": attributes,
            "Anno_coarse/list_attr_img.txt": images,
            "Eval/list_eval_partition.txt": partition,
        }
    )


def read_attributes(*words):
    args = probe.parse_arguments(["--task", "attributes", "--data", "data", *words])
    [benchmark] = read_benchmarks(args)
    assert benchmark.targets.shape == (len(benchmark.names), len(benchmark.attributes))
    assert set(np.unique(benchmark.targets)) <= {-1, 0, 1}
    assert benchmark.parts[-1].stop == len(benchmark.names)
    assert all(part.stop > part.start for part in benchmark.parts)
    for name in benchmark.names:
        assert os.path.isfile(os.path.join(benchmark.folder, name))
    return {}


def read_zero_shot_attributes():
    return read_attributes("--zero-shot")


# --------------------------------------------------------------------------------------------------
# Pictures


def make_png():
    image = smooth_picture(0)
    image.save("rgb.png")
    image.convert("RGBA").save("rgba.png", dpi=(72, 72))
    image.quantize(16).save("palette.png", transparency=1)
    grey = np.asarray(image.convert("L")).astype(np.uint16)
    Image.fromarray(grey * 257).save("grey16.png")
    image.convert("1").save("bits.png")
    image.save("animated.png", save_all=True, append_images=[image.rotate(180)])


def make_pictures():
    image = smooth_picture(0)
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: turned by 90 degrees
    image.save("baseline.jpg", exif=exif)
    image.save("progressive.jpg", progressive=True, comment=b"hello")
    image.convert("L").save("grey.jpg")
    image.convert("CMYK").save("cmyk.jpg")
    image.save("lossy.webp")
    image.save("plain.bmp")
    image.save("plain.ppm")
    image.convert("P").save("gif.jpg", "GIF")
    image.save("raw.tif")
    image.save("lzw.tif", compression="tiff_lzw")
    image.save("deflate.tif", compression="tiff_adobe_deflate")


def make_archives():
    """A zip file, stored and deflated, a tar of a tar, and a webdataset's tar with labels."""
    data = []
    for i in range(3):
        buffer = io.BytesIO()
        smooth_picture(i).save(buffer, "PNG")
        data.append(buffer.getvalue())
    with zipfile.ZipFile("tree.zip", "w") as archive:
        archive.writestr("a/0.png", data[0])
        archive.writestr("b/1.png", data[1], zipfile.ZIP_DEFLATED)
        archive.writestr("dataset.json", json.dumps({"labels": [["a/0.png", 3], ["b/1.png", 1]]}))
    write_tar("inner.tar", {"0.png": data[0], "1.png": data[1]})
    with open("inner.tar", "rb") as file:
        write_tar("outer.tar", {"a.tar": file.read(), "b/2.png": data[2]})
    os.remove("inner.tar")
    write_tar("labels.tar", {"0.png": data[0], "0.cls": b"7", "1.png": data[1], "1.cls": b"4"})


def write_tar(path, files):
    with tarfile.open(path, "w") as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))


def read_archive(path):
    archive = list_archive(path, "", (".png",), ())
    pictures = []
    for name, place in zip(archive.names, archive.places.tolist(), strict=True):
        # Each mutation is another file of the same name.
        source = Place(name, path, time.monotonic_ns(), *place[1:])
        pictures.append(load_image(source, 8))
    return dict(names=archive.names, left_out=archive.left_out, pictures=pictures)


def read_picture(path):
    """As a run reads it: the check first and then, if it finds nothing, the pixels."""
    found = examine_picture(path)[1]
    if isinstance(found, str):
        raise UserError(found)
    x = load_image(path, 8)
    assert x.shape == (8, 8, 3)
    assert x.dtype == np.uint8
    assert min(found) > 0
    return dict(pixels=x)


# --------------------------------------------------------------------------------------------------
# Targets: all readers with their files


class Target(NamedTuple):
    """A reader and the files that it is fed with.

    make         writes the files into the current folder -> the paths that are damaged, or None:
                 all of them
    read         reads them -> nested dicts, lists, tensors, arrays and plain values
    share        of all mutations, in parts of their sum
    exact        whether checksums promise the same values or a refusal
    takes_path   whether read is called with the path of the damaged file"""

    make: Callable
    read: Callable
    share: float
    exact: bool = False
    takes_path: bool = False


TARGETS = {
    "checkpoint": Target(make_checkpoint, read_checkpoint, 12, exact=True),
    "vae": Target(make_vae, read_vae, 8, exact=True),
    "sit": Target(make_sit, read_sit, 8, exact=True),
    "ldm": Target(make_ldm, read_ldm, 1.5, exact=True),
    "diffusers": Target(make_diffusers, read_diffusers, 0.3),
    "published_sit": Target(make_published_sit, read_published_sit, 3, exact=True),
    "lpips": Target(make_lpips, read_lpips, 4, takes_path=True),
    "vfm": Target(make_vfm, read_vfm, 0.1),
    "file_list": Target(make_file_list, read_file_list, 8, exact=True),
    "latents": Target(make_latents, read_latents, 8),
    "parts": Target(make_parts, read_parts, 4, exact=True),
    "npz": Target(make_npz, read_npz, 8, exact=True, takes_path=True),
    "statistics": Target(make_statistics, read_statistics, 4, exact=True),
    "celeba": Target(make_celeba, read_attributes, 4),
    "celeba_csv": Target(make_celeba_csv, read_attributes, 3),
    "awa2": Target(make_awa2, read_zero_shot_attributes, 3),
    "deepfashion": Target(make_deepfashion, read_attributes, 3),
    "png": Target(make_png, read_picture, 16, exact=True, takes_path=True),
    "pictures": Target(make_pictures, read_picture, 20, takes_path=True),
    "archives": Target(make_archives, read_archive, 8, takes_path=True),
}


def flatten(value, name=""):
    """Nested dicts and lists of tensors, arrays and plain values -> {name: comparable value}."""
    if isinstance(value, dict):
        flat = {}
        for key in value:
            flat |= flatten(value[key], f"{name}.{key}")
        return flat
    if isinstance(value, (list, tuple)):
        return flatten(dict(enumerate(value)), name)
    if torch.is_tensor(value):
        value = value.detach().numpy()
    if isinstance(value, np.ndarray):
        return {name: (str(value.dtype), value.shape, value.tobytes())}
    return {name: value}


# --------------------------------------------------------------------------------------------------
# Trying one mutation

# Outcomes that are no findings: an error for the user, the same values as without damage, and
# others, where that is allowed.
HARMLESS = ["refused", "same", "other"]


class Trial(NamedTuple):
    outcome: str  # one of HARMLESS, or what went wrong
    details: str
    path: str
    data: bytes  # the damaged content


class PatienceError(BaseException):
    """Raised where a reader takes longer than PATIENCE. No reader's `except Exception` stops it."""


class Reader:
    """A target in a folder of its own: the content of its files, and what is read from them
    undamaged."""

    def __init__(self, root, name):
        target = TARGETS[name]
        self.name = name
        self.read = target.read
        self.exact = target.exact
        self.takes_path = target.takes_path
        self.folder = os.path.join(root, name)
        os.makedirs(self.folder)
        os.chdir(self.folder)
        torch.manual_seed(0)
        paths = target.make() or files_below(".")
        self.files = {}
        for path in paths:
            with open(path, "rb") as file:
                self.files[path] = file.read()
        self.expected = {path: flatten(self.call(path)) for path in paths}

    def call(self, path):
        with contextlib.redirect_stdout(io.StringIO()), np.errstate(all="ignore"):
            return self.read(path) if self.takes_path else self.read()

    def put(self, path, data):
        with open(path + ".new", "wb") as file:
            file.write(data)
        os.replace(path + ".new", path)

    def try_one(self, rng):
        """Damages a file, reads it, and puts it right again -> Trial."""
        os.chdir(self.folder)
        path = sorted(self.files)[rng.integers(len(self.files))]
        data, has_right_checksums = mutate(rng, self.files[path], path)
        self.put(path, data)
        try:
            outcome, details = self.judge(path, has_right_checksums)
        finally:
            self.put(path, self.files[path])
        return Trial(outcome, details, path, data)

    def judge(self, path, has_right_checksums):
        """-> (outcome, details) of reading the file at `path`."""
        try:
            values = flatten(self.call(path))
        except UserError as error:
            return judge_message(str(error))
        except PatienceError:
            return "hang", traceback.format_exc()
        except BaseException as error:
            return f"raised {type(error).__name__}", traceback.format_exc()
        expected = self.expected[path]
        if values == expected:
            return "same", ""
        if self.exact and not has_right_checksums:
            names = set(values) | set(expected)
            changed = [name for name in names if values.get(name) != expected.get(name)]
            return "wrong values", str(changed)
        return "other", ""


def files_below(folder):
    paths = []
    for directory, _, names in os.walk(folder):
        paths += [os.path.join(directory, name) for name in sorted(names)]
    return paths


def judge_message(text):
    """-> (outcome, details) of a UserError: one sentence, and not from memory that ran out."""
    if "\n" in text:
        return "refused in several lines", text
    if re.search("memory|alloc", text, re.IGNORECASE):
        return "asked for memory", text
    return "refused", text


# --------------------------------------------------------------------------------------------------
# Many mutations, in a child process: a crash ends it, and the next one starts behind the mutation
# that made it crash


def write_line(log, **values):
    log.write(json.dumps(values) + "\n")
    log.flush()


def run_out_of_patience(number, frame):
    raise PatienceError


def try_mutations(readers, seed, numbers, current, log):
    """Tries the mutations of these numbers, and writes findings and counts of outcomes to the log.
    current: shared with the parent, the number of the mutation at work."""
    names = list(readers)
    shares = np.array([TARGETS[name].share for name in names])
    signal.signal(signal.SIGPROF, run_out_of_patience)
    counts = Counter()
    for k in numbers:
        current.value = k
        rng = np.random.default_rng([seed, k])
        reader = readers[names[rng.choice(len(names), p=shares / shares.sum())]]
        signal.setitimer(signal.ITIMER_PROF, PATIENCE)
        trial = reader.try_one(rng)
        signal.setitimer(signal.ITIMER_PROF, 0)
        key = f"{reader.name} {trial.outcome}"
        counts[key] += 1
        if trial.outcome not in HARMLESS:
            write_finding(log, k, reader.name, trial, keep_file=counts[key] <= 3)
        if k % 500 == 499 or k == numbers[-1]:
            write_line(log, counts=counts)
            counts = Counter()


def write_finding(log, k, target, trial, keep_file):
    write_line(
        log,
        k=k,
        target=target,
        file=trial.path,
        outcome=trial.outcome,
        details=trial.details[-700:],
    )
    if keep_file:
        with open(f"{log.name}-{k}-{os.path.basename(trial.path)}", "wb") as file:
            file.write(trial.data)


def child(readers, seed, numbers, current, log):
    """The child process: limited in memory, and silent."""
    with open("/proc/self/statm") as file:
        address_space = int(file.read().split()[0]) * resource.getpagesize()
    limit = address_space + MEMORY_LIMIT
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # decoders print warnings
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    try:
        try_mutations(readers, seed, numbers, current, log)
    except BaseException:
        # Between two mutations: a fault of this program, or memory that it lacked.
        details = traceback.format_exc()
        write_line(log, k=current.value, outcome="outside of a reader", details=details)
        os._exit(1)
    log.flush()
    os._exit(0)


def run_children(readers, seed, start, end, log):
    """Tries mutations start to end - 1, in as many child processes as it takes."""
    processes = multiprocessing.get_context("fork")
    current = processes.Value("q", start, lock=False)
    k = start
    while k < end:
        current.value = k
        arguments = (readers, seed, range(k, end), current, log)
        process = processes.Process(target=child, args=arguments)
        process.start()
        wait_for(process, current)
        if process.exitcode == 0:
            return
        outcome = f"crash or hang, exit code {process.exitcode}"
        write_line(log, k=current.value, outcome=outcome)
        k = current.value + 1


def wait_for(process, current):
    """Waits for a child process to end, and kills it if it stays at one mutation."""
    last = current.value
    last_change = time.time()
    while process.is_alive():
        process.join(0.2)
        if current.value != last:
            last = current.value
            last_change = time.time()
        if time.time() - last_change > STUCK:
            process.kill()
            process.join()


def read_log(path):
    """-> ({"target outcome": count}, findings as dicts)."""
    totals = Counter()
    findings = []
    with open(path) as file:
        for text in file:
            line = json.loads(text)
            if "counts" in line:
                totals.update(line["counts"])
            else:
                findings.append(line)
    return totals, findings


def fuzz(count, seed=0, start=0, folder="runs/fuzz", only=None):
    """Tries mutations start to start + count - 1 on the targets in `only` (default: all) -> (counts
    of "target outcome", findings as dicts). The folder keeps the log and files of findings."""
    torch.set_num_threads(1)
    folder = os.path.abspath(folder)
    os.makedirs(folder, exist_ok=True)
    path = os.path.join(folder, f"{seed}-{start}.jsonl")
    folder_before = os.getcwd()
    # Files in memory, where there is such a folder, are damaged faster.
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    root = tempfile.mkdtemp(dir=memory)
    try:
        readers = {name: Reader(root, name) for name in only or TARGETS}
        with open(path, "w") as log:
            run_children(readers, seed, start, start + count, log)
    finally:
        os.chdir(folder_before)
        shutil.rmtree(root)
    return read_log(path)


def print_table(totals, targets):
    print("reader".ljust(14) + "".join(kind.rjust(9) for kind in HARMLESS))
    for target in targets:
        counts = [totals[f"{target} {kind}"] for kind in HARMLESS]
        print(target.ljust(14) + "".join(str(count).rjust(9) for count in counts))


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("count", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--start", type=int, default=0, help="number of the first mutation")
    parser.add_argument("--only", nargs="+", choices=list(TARGETS), help="targets")
    args = parser.parse_args()
    begin = time.time()
    totals, findings = fuzz(args.count, args.seed, args.start, only=args.only)
    seconds = time.time() - begin
    print_table(totals, args.only or TARGETS)
    print(f"{sum(totals.values())} mutations in {seconds:.0f} s, {len(findings)} findings")
    for finding in findings[:20]:
        print(json.dumps(finding))
    sys.exit(len(findings) > 0)


if __name__ == "__main__":
    main()
