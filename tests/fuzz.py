"""Feeds damaged files to every reader: checkpoints, weights, caches, .npz, attribute lists, pictures.

    python tests/fuzz.py 100000 --seed 0                    # mutation k is a function of (seed, k); findings go to runs/fuzz
    python tests/fuzz.py 1 --seed 0 --start 4711           # one mutation again

A reader may refuse a file (UserError), or give what it gave before. Formats that hold no checksum (JPEG, text, PyTorch's
old pickles, raw arrays, diffusers' folders), and files whose checksums were made to fit the damage, may give other
numbers, but of the right kind. Anything else is a finding: another exception, a crash, a hang (10 s), more than 1 GiB."""

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
import tempfile
import time
import traceback
import types
import zipfile
import zlib

import numpy as np
import torch
import torchvision
from PIL import Image
from safetensors.torch import save_file

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from common.files import UserError, write_json, write_weights
from common.pictures import ImageSet, TrainingBatches, check_picture, load_image
from common.runs import load_checkpoint, mark_done, resumable_array, save_checkpoint
from common.weights import load_sit, load_vae
import fid  # noqa: E402
import models  # noqa: E402
import probe  # noqa: E402
import sample  # noqa: E402
import train_sit  # noqa: E402
from tools import weights  # noqa: E402

LIMIT = 2**30  # bytes of address space that a reader may take
PATIENCE = 10  # seconds of CPU time: other load must not look like a hang
NUMBERS = [
    0,
    1,
    -1,
    2,
    7,
    127,
    128,
    255,
    256,
    65535,
    65536,
    10**6,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**32,
    10**12,
    2**63 - 1,
    2**63,
    2**64 - 1,
]


# ---- mutations -------------------------------------------------------------------------------------------------------


def place(rng, data):
    """An offset: anywhere, or, as headers stand there, near the start or the end."""
    reach = int(rng.choice([len(data), 64, 512]))
    at = int(rng.integers(min(reach, len(data)))) if data else 0
    return len(data) - 1 - at if rng.random() < 0.25 and data else at


def once(rng, data):
    """One edit of bytes -> bytes."""
    kind, at, length = rng.integers(11), place(rng, data), int(2 ** rng.uniform(0, 10))
    block = data[at : at + length]
    if kind == 0 and data:
        return data[:at] + bytes([data[at] ^ 1 << int(rng.integers(8))]) + data[at + 1 :]
    if kind == 1:
        return (
            data[:at]
            + bytes([int(rng.choice([0, 255, 32]))]) * len(block)
            + data[at + len(block) :]
        )
    if kind == 2:
        return data[:at] + rng.bytes(len(block)) + data[at + len(block) :]
    if kind == 3:
        return data[:at]
    if kind == 4:
        return data[:at] + data[at + length :]
    if kind == 5:
        return data[:at] + block + data[at:]
    if kind == 6:
        return data[:at] + rng.bytes(length % 64) + data[at:]
    if kind == 7:  # a block from elsewhere
        other = data[(start := place(rng, data)) : start + len(block)]
        return data[:at] + other + data[at + len(other) :]
    if kind == 8:  # a binary number
        form = rng.choice(["<I", ">I", "<Q", ">Q", "<H", ">H"])
        number = (
            int(rng.choice(len(NUMBERS)))
            if rng.random() < 0.2
            else NUMBERS[rng.integers(len(NUMBERS))]
        )
        number = struct.pack(form, number % 2 ** (8 * struct.calcsize(form)))
        return data[:at] + number + data[at + len(number) :]
    digits = list(re.finditer(rb"-?\d+", data[:20000] if rng.random() < 0.9 else data))
    if not digits:
        return data
    found = digits[rng.integers(len(digits))]  # a number in text: JSON, .npy headers, lists
    old = int(found[0][:18])
    number = NUMBERS[rng.integers(len(NUMBERS))] if kind == 9 else old + int(rng.integers(-3, 4))
    text = (
        str(number).encode()
        if rng.random() < 0.9
        else rng.choice([b"nan", b"1e99", b"9" * 5000, b"null", b'"x"', b"[]"])
    )
    return data[: found.start()] + text + data[found.end() :]


def several(rng, data):
    for _ in range(int(rng.choice([1, 1, 1, 2, 3, 5]))):
        data = once(rng, data)
    return data


def reseal_zip(rng, data):
    """One member changed, all checksums right again."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, "w") as new:
        members = old.infolist()
        chosen = (
            rng.integers(len(members))
            if rng.random() < 0.4
            else next(
                (
                    i
                    for i, m in enumerate(members)
                    if m.filename.endswith(("data.pkl", "header.npy"))
                ),
                0,
            )
        )
        for i, member in enumerate(members):
            content = old.read(member)
            new.writestr(member.filename, several(rng, content) if i == chosen else content)
    return out.getvalue()


def reseal_png(rng, data):
    """Changes inside chunks, or chunks lost, doubled or in another order; each with a right checksum."""
    chunks, at = [], 8
    while at < len(data):
        length = struct.unpack(">I", data[at : at + 4])[0]
        chunks.append(data[at + 4 : at + 8 + length])
        at += 12 + length
    i = int(rng.integers(len(chunks)))
    kind = rng.integers(5)
    if kind < 2:
        chunks[i] = chunks[i][:4] + several(rng, chunks[i][4:])
    elif kind == 2:
        del chunks[i]
    else:
        chunks.insert(int(rng.integers(len(chunks))), chunks[i])
    return data[:8] + b"".join(
        struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in chunks
    )


def rehead_safetensors(rng, data):
    """Changes in the JSON header, its length right again."""
    length = struct.unpack("<Q", data[:8])[0]
    header = several(rng, data[8 : 8 + length])
    return struct.pack("<Q", len(header)) + header + data[8 + length :]


def mutate(rng, data, name):
    """-> damaged bytes, whether their checksums were made to fit."""
    if rng.random() < 0.3:
        with contextlib.suppress(Exception):  # the archive's own writer refuses some sizes
            if data[:2] == b"PK":
                return reseal_zip(rng, data), True
            if data[:4] == b"\x89PNG":
                return reseal_png(rng, data), True
            if name.endswith(".safetensors"):
                return rehead_safetensors(rng, data), False
    return several(rng, data), False


# ---- readers: for each, files that are made once and a function that reads them ----------------------------------------

TINY = dict(spec="f2d2", resolution=8, ch=4, ch_mult=(1, 1), num_res_blocks=1)


def flat(value, name=""):
    """Nested dicts and lists of tensors, arrays and plain values -> {name: bytes or plain value}."""
    if isinstance(value, dict):
        return {k: v for key in value for k, v in flat(value[key], f"{name}.{key}").items()}
    if isinstance(value, (list, tuple)):
        return flat(dict(enumerate(value)), name)
    if torch.is_tensor(value) or isinstance(value, np.ndarray):
        value = np.asarray(value.detach() if torch.is_tensor(value) else value)
        return {name: (str(value.dtype), value.shape, value.tobytes())}
    return {name: value}


def network(net):
    return dict(net.state_dict(), config=net.config, hash=net.info["hash"])


def make_checkpoint():
    net = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(net.parameters())
    net(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    save_checkpoint(
        ".",
        3,
        dict(
            step=3,
            arguments=dict(lr=0.1, data="x"),
            net=net.state_dict(),
            running=torch.ones(3),
            optimizer=optimizer.state_dict(),
        ),
    )


def make_vae():
    net = models.VAE(**TINY)
    write_weights(
        "vae.safetensors", "vae", net.state_dict(), net.config, dict(step=3, arguments=dict(lr=0.1))
    )


def make_sit():
    net = models.SiT("S", 2, 2, 4, 3, depth=1, width=8, heads=1)
    write_weights(
        "sit.safetensors",
        "sit",
        net.state_dict(),
        net.config,
        dict(step=3, classes=["a"], vae_hash="0", vae_path="x"),
    )


def make_ldm():
    weights.export_vae(models.VAE(**dict(TINY, ch=32, groups=32)), "ldm", "vae.ckpt")
    torch.save(
        dict(mean=torch.randn(1, 2, 1, 1), std=torch.rand(1, 2, 1, 1) + 0.5), "latents_stats.pt"
    )


def make_diffusers():
    weights.export_vae(models.VAE(**dict(TINY, ch=32, groups=32)), "diffusers", "vae")


def make_published_sit():
    state = models.SiT("S", 2, 4, 4, 3, depth=1, width=64, heads=1).state_dict()
    torch.save(dict(ema=state, args=argparse.Namespace(a=1)), "sit.pt")


def thin_vgg16():
    features = torchvision.models.vgg.make_layers(
        [2, 2, "M", 3, 3, "M", 4, 4, 4, "M", 2, 2, 2, "M", 2, 2, 2, "M"]
    )
    return types.SimpleNamespace(features=features)


def make_lpips():
    state = {f"features.{k}": v for k, v in thin_vgg16().features.state_dict().items()}
    state |= {
        f"lin{i}.model.1.weight": torch.rand(1, width, 1, 1)
        for i, width in enumerate((2, 3, 4, 2, 2))
    }
    torch.save(state, "new.pth")
    torch.save(state, "old.pth", _use_new_zipfile_serialization=False)
    save_file(state, "plain.safetensors")


def read_lpips(path):
    before, torchvision.models.vgg16 = torchvision.models.vgg16, thin_vgg16
    try:
        return models.LPIPS([path]).state_dict()
    finally:
        torchvision.models.vgg16 = before


def make_vfm():
    import timm

    save_file(timm.create_model("test_vit").state_dict(), "vfm.safetensors")


def paint(path, number, **options):
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    x = np.random.default_rng(number).integers(0, 256, (3, 4, 3), dtype=np.uint8)
    Image.fromarray(x).resize((20, 16), Image.BICUBIC).save(path, **options)


def make_file_list():
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


ROWS = (10, 2, 2, 1, 2, 2)


def make_latents():
    array, done, _ = resumable_array(".", "latents.npy", np.float16, ROWS, 4)
    array[:] = np.random.default_rng(0).normal(size=ROWS)
    for k in range(2):
        mark_done(array, done, k)


def read_latents():
    """The values have no checksum; their number, type and shape are the caller's, and no file is ever enlarged."""
    sizes = [os.path.getsize(f) for f in ("latents.npy", "done.npy")]
    array, done, todo = resumable_array(".", "latents.npy", np.float16, ROWS, 4)
    assert (array.shape, array.dtype, done.shape) == (ROWS, np.float16, (3,)) and set(todo) <= {
        0,
        1,
        2,
    }
    latent = train_sit.LatentCache(".").read(np.arange(10), np.arange(10) % 2 == 0)["latent"]
    assert latent.shape == (10, 2, 1, 2, 2) and sizes == [
        os.path.getsize(f) for f in ("latents.npy", "done.npy")
    ]
    return {}


def drawing(ids):
    return ((ids[:, None, None, None] * 37 + torch.arange(192).view(3, 8, 8)) % 256).to(torch.uint8)


SET = types.SimpleNamespace(
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
)


def make_parts():
    """An interrupted set: two of its three blocks are done."""
    write_json("set.npz.parts/settings.json", dict(seed=0, cfg=1.5, sit_hash="abc"))
    array, done, _ = resumable_array("set.npz.parts", "pictures.npy", np.uint8, (10, 8, 8, 3), 4)
    array[:8] = drawing(torch.arange(8)).permute(0, 2, 3, 1).numpy()
    for k in range(2):
        mark_done(array, done, k)


def read_parts():
    before, sample.draw = sample.draw, lambda sit, vae, ids, *more: drawing(ids)
    shutil.copytree("set.npz.parts", "kept.parts")
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            sample.draw_set(
                types.SimpleNamespace(num_classes=3),
                types.SimpleNamespace(resolution=8),
                SET,
                torch.device("cpu"),
                "fp32",
                dict(seed=0, cfg=1.5, sit_hash="abc"),
            )
        with np.load("set.npz") as file:
            assert file["arr_0"].shape == (10, 8, 8, 3) and file["labels"].tolist() == [
                i % 3 for i in range(10)
            ]
            return dict(settings=str(file["settings"]))
    finally:
        sample.draw = before
        shutil.rmtree("set.npz.parts", ignore_errors=True)
        os.rename("kept.parts", "set.npz.parts")
        with contextlib.suppress(FileNotFoundError):
            os.remove("set.npz")


def make_npz():
    rng = np.random.default_rng(0)
    x = dict(arr_0=rng.integers(0, 256, (7, 8, 8, 3), dtype=np.uint8), labels=np.arange(7) % 3)
    np.savez("plain.npz", **x, settings=np.array(json.dumps(dict(seed=0, cfg=1.5))))
    np.savez_compressed("adm.npz", **x, mu=rng.normal(size=5), sigma=rng.normal(size=(5, 5)))


def read_npz(path):
    pictures = fid.Pictures(path, batch_size=3)
    items = list(pictures.batches(torch.device("cpu"), 0))
    return dict(
        items=items,
        record={k: v for k, v in pictures.record.items() if k != "hash"},
        count=pictures.count,
        **pictures.set.statistics,
    )


def make_statistics():
    torch.save(
        dict(
            mu=torch.randn(5).double(),
            sigma=torch.randn(5, 5).double(),
            splits=torch.rand(2, 3).double(),
        ),
        "fid.pt",
    )


def read_statistics():
    """A damaged cache is computed again, which gives what it held."""
    return fid.read_statistics("fid.pt", "cpu") or torch.load(
        "../statistics/fid.pt.good", weights_only=True
    )


CELEBA = [f"{i:06d}.jpg" for i in range(1, 7)]


def make_celeba(form):
    rng = np.random.default_rng(0)
    for i, name in enumerate(CELEBA):
        paint(f"data/{name}", i)
    gap = "," if form == "csv" else " "
    rows = "".join(gap.join([n, *(str(v) for v in rng.choice([-1, 1], 3))]) + "\n" for n in CELEBA)
    parts = "".join(f"{n}{gap}{k}\n" for n, k in zip(CELEBA, (0, 0, 0, 1, 2, 2)))
    heads = dict(
        txt=("6\nBald Eyeglasses Smiling\n", ""),
        csv=("image_id,Bald,Eyeglasses,Smiling\n", "image_id,partition\n"),
    )[form]
    for name, text in (("attr_celeba", heads[0] + rows), ("eval_partition", heads[1] + parts)):
        with open(f"data/list_{name}.{form}", "w") as file:
            file.write(text)
    return [f"data/list_{name}.{form}" for name in ("attr_celeba", "eval_partition")]


def make_awa2():
    classes = ["ox", "bat", "cow"]
    texts = dict(
        classes="".join(f"{i} {c}\n" for i, c in enumerate(classes)),
        predicates="1 furry\n2 big\n",
        testclasses="cow\n",
    )
    texts["predicate-matrix-binary"] = "1 0\n0 1\n1 1\n"
    for i in range(24):
        paint(f"data/JPEGImages/{classes[i % 3]}/{i:02d}.jpg", i)
    for name, text in texts.items():
        with open(f"data/{name}.txt", "w") as file:
            file.write(text)
    return [f"data/{name}.txt" for name in texts]


def make_deepfashion():
    os.makedirs("data/Eval")
    os.makedirs("data/Anno_coarse")
    names = [f"img/{'ab'[i % 2]}/{i}.jpg" for i in range(8)]
    for i, name in enumerate(names):
        paint(f"data/{name}", i)
    texts = {
        "Anno_coarse/list_attr_cloth.txt": "2\nattribute_name  attribute_type\na-line skirt  3\nstriped 1\n",
        "Anno_coarse/list_attr_img.txt": "8\nimage_name attribute_labels\n"
        + "".join(f"{n}  1 -1\n" for n in names),
        "Eval/list_eval_partition.txt": "8\nimage_name evaluation_status\n"
        + "".join(
            f"{n} {'train train train train val val test test'.split()[i]}\n"
            for i, n in enumerate(names)
        ),
    }
    for name, text in texts.items():
        with open(f"data/{name}", "w") as file:
            file.write(text)
    return [f"data/{name}" for name in texts]


def read_attributes(*words):
    [bench] = probe.read_benchmarks(
        probe.parse_arguments(["--task", "attributes", "--data", "data", *words])
    )
    assert bench.targets.shape == (len(bench.names), len(bench.attributes)) and set(
        np.unique(bench.targets)
    ) <= {-1, 0, 1}
    assert bench.parts[-1].stop == len(bench.names) and all(p.stop > p.start for p in bench.parts)
    assert all(os.path.isfile(os.path.join(bench.folder, name)) for name in bench.names)
    return {}


def make_png():
    image = Image.fromarray(
        np.random.default_rng(0).integers(0, 256, (3, 4, 3), dtype=np.uint8)
    ).resize((20, 16), Image.BICUBIC)
    image.save("rgb.png")
    image.convert("RGBA").save("rgba.png", dpi=(72, 72))
    image.quantize(16).save("palette.png", transparency=1)
    Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257).save("grey16.png")
    image.convert("1").save("bits.png")
    image.save("animated.png", save_all=True, append_images=[image.rotate(180)])


def make_pictures():
    image = Image.fromarray(
        np.random.default_rng(0).integers(0, 256, (3, 4, 3), dtype=np.uint8)
    ).resize((20, 16), Image.BICUBIC)
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save("baseline.jpg", exif=exif)
    image.save("progressive.jpg", progressive=True, comment=b"hello")
    image.convert("L").save("grey.jpg")
    image.convert("CMYK").save("cmyk.jpg")
    image.save("lossy.webp")
    image.save("plain.bmp")
    image.save("plain.ppm")
    image.convert("P").save("gif.jpg", "GIF")
    for name, option in (("raw", None), ("lzw", "tiff_lzw"), ("deflate", "tiff_adobe_deflate")):
        image.save(f"{name}.tif", compression=option)


def read_picture(path):
    """As a run reads it: the check first, then, if that finds nothing, the pixels."""
    found = check_picture(path)
    if isinstance(found, str):
        raise UserError(found)
    x = load_image(path, 8)
    assert x.shape == (8, 8, 3) and x.dtype == np.uint8 and min(found) > 0
    return dict(pixels=x)


# name: make, read, kind: "exact" (checksums: the same values or none), "plain" (no checksum), "file" (read gets the path);
# share of the mutations
TARGETS = {
    "checkpoint": (make_checkpoint, lambda: load_checkpoint(".", "cpu"), "exact", 12),
    "vae": (make_vae, lambda: network(load_vae(".")), "exact", 8),
    "sit": (make_sit, lambda: network(load_sit(".")), "exact", 8),
    "ldm": (make_ldm, lambda: network(load_vae("vae.ckpt")), "exact", 1.5),
    "diffusers": (make_diffusers, lambda: network(load_vae("vae")) and {}, "plain", 0.3),
    "published_sit": (make_published_sit, lambda: network(load_sit("sit.pt")), "exact", 3),
    "lpips": (make_lpips, read_lpips, "file plain", 4),
    "vfm": (
        make_vfm,
        lambda: models.VFM("test_vit", "vfm.safetensors", 32, 2).state_dict() and {},
        "plain",
        0.1,
    ),
    "file_list": (make_file_list, read_file_list, "exact", 8),
    "latents": (make_latents, read_latents, "plain", 8),
    "parts": (make_parts, read_parts, "exact", 4),
    "npz": (make_npz, read_npz, "file exact", 8),
    "statistics": (make_statistics, read_statistics, "exact", 4),
    "celeba": (lambda: make_celeba("txt"), read_attributes, "plain", 4),
    "celeba_csv": (lambda: make_celeba("csv"), read_attributes, "plain", 3),
    "awa2": (make_awa2, lambda: read_attributes("--zero-shot"), "plain", 3),
    "deepfashion": (make_deepfashion, read_attributes, "plain", 3),
    "png": (make_png, read_picture, "file exact", 16),
    "pictures": (make_pictures, read_picture, "file plain", 20),
}


class Reader:
    """One target in its own folder: its files' bytes, and what they give undamaged."""

    def __init__(self, root, name):
        make, self.read, kind, _ = TARGETS[name]
        self.name, self.folder, self.exact, self.by_file = (
            name,
            os.path.join(root, name),
            "exact" in kind,
            "file" in kind,
        )
        os.makedirs(self.folder)
        os.chdir(self.folder)
        torch.manual_seed(0)
        files = make() or [
            os.path.join(d, f) for d, _, names in os.walk(".") for f in sorted(names)
        ]
        self.files = {path: open(path, "rb").read() for path in files}
        if name == "statistics":
            shutil.copy("fid.pt", "fid.pt.good")
        self.good = {path: flat(self.call(path)) for path in files}

    def call(self, path):
        with contextlib.redirect_stdout(io.StringIO()), np.errstate(all="ignore"):
            return self.read(path) if self.by_file else self.read()

    def put(self, path, data):
        with open(path + ".new", "wb") as file:
            file.write(data)
        os.replace(path + ".new", path)

    def try_one(self, rng):
        """-> outcome ("refused", "same", "other" or what is wrong with it), details, (path, damaged bytes)."""
        os.chdir(self.folder)
        path = sorted(self.files)[rng.integers(len(self.files))]
        data, sealed = mutate(rng, self.files[path], path)
        self.put(path, data)
        try:
            try:
                value = flat(self.call(path))
            except UserError as error:
                text = str(error)
                if "\n" in text:
                    return "refused in several lines", text, (path, data)
                return (
                    ("asked for memory" if re.search("memory|alloc", text, re.I) else "refused"),
                    text,
                    (path, data),
                )
            except AlarmError:
                return "hang", traceback.format_exc(), (path, data)
            except BaseException as error:
                return f"raised {type(error).__name__}", traceback.format_exc(), (path, data)
            same = value == self.good[path]
            if not same and self.exact and not sealed:
                names = [
                    k
                    for k in {**value, **self.good[path]}
                    if value.get(k) != self.good[path].get(k)
                ]
                return "wrong values", str(names), (path, data)
            return "same" if same else "other", "", (path, data)
        finally:
            self.put(path, self.files[path])


class AlarmError(BaseException):
    pass


def on_alarm(number, frame):
    raise AlarmError


def work(readers, seed, ks, current, log):
    """Tries mutations, one line of JSON each that is not "refused", "same" or "other"; in a child process."""
    names, shares = list(readers), np.array([TARGETS[name][3] for name in readers])
    signal.signal(signal.SIGPROF, on_alarm)
    counts = {}
    for k in ks:
        current.value = k
        rng = np.random.default_rng([seed, k])
        reader = readers[names[rng.choice(len(names), p=shares / shares.sum())]]
        signal.setitimer(signal.ITIMER_PROF, PATIENCE)
        outcome, details, (path, data) = reader.try_one(rng)
        signal.setitimer(signal.ITIMER_PROF, 0)
        counts[f"{reader.name} {outcome}"] = counts.get(f"{reader.name} {outcome}", 0) + 1
        if outcome not in ("refused", "same", "other"):
            log.write(
                json.dumps(
                    dict(
                        k=k, target=reader.name, file=path, outcome=outcome, details=details[-700:]
                    )
                )
                + "\n"
            )
            log.flush()
            if counts[f"{reader.name} {outcome}"] <= 3:
                with open(f"{log.name}-{k}-{os.path.basename(path)}", "wb") as file:
                    file.write(data)
        if k % 500 == 499 or k == ks[-1]:
            log.write(json.dumps(dict(counts=counts)) + "\n")
            log.flush()
            counts = {}


def child(readers, seed, ks, current, log):
    with open("/proc/self/statm") as file:
        now = int(file.read().split()[0]) * resource.getpagesize()
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # decoders' warnings
    resource.setrlimit(resource.RLIMIT_AS, (now + LIMIT, now + LIMIT))
    try:
        work(readers, seed, ks, current, log)
    except BaseException:  # between two mutations: a fault of this file, or memory it lacked
        log.write(
            json.dumps(
                dict(k=current.value, outcome="outside of a reader", details=traceback.format_exc())
            )
            + "\n"
        )
        log.flush()
        os._exit(1)
    log.flush()
    os._exit(0)


def fuzz(count, seed=0, start=0, folder="runs/fuzz", only=None):
    """-> {"target outcome": number}, findings as dicts."""
    torch.set_num_threads(1)
    folder = os.path.abspath(folder)
    os.makedirs(folder, exist_ok=True)
    before, findings, totals = os.getcwd(), [], {}
    root = tempfile.mkdtemp(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None)
    try:
        readers = {name: Reader(root, name) for name in only or TARGETS}
        processes = multiprocessing.get_context("fork")
        current, k, end = processes.Value("q", start, lock=False), start, start + count
        path = os.path.join(folder, f"{seed}-{start}.jsonl")
        with open(path, "w") as log:
            while k < end:
                current.value = k
                process = processes.Process(
                    target=child, args=(readers, seed, range(k, end), current, log)
                )
                process.start()
                last, moved = k, time.time()
                while process.is_alive():
                    process.join(0.2)
                    if current.value != last:
                        last, moved = current.value, time.time()
                    if time.time() - moved > 90:  # stuck where no signal reaches it
                        process.kill()
                        process.join()
                if process.exitcode == 0:
                    break
                log.write(
                    json.dumps(
                        dict(
                            k=current.value, outcome=f"crash or hang, exit code {process.exitcode}"
                        )
                    )
                    + "\n"
                )
                log.flush()
                k = current.value + 1
    finally:
        os.chdir(before)
        shutil.rmtree(root)
    with open(path) as file:
        for line in map(json.loads, file):
            if "counts" in line:
                for key, number in line["counts"].items():
                    totals[key] = totals.get(key, 0) + number
            else:
                findings.append(line)
    return totals, findings


def main():
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("count", type=int)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--start", type=int, default=0, help="number of the first mutation")
    p.add_argument("--only", nargs="+", choices=list(TARGETS), help="readers")
    args = p.parse_args()
    begin = time.time()
    totals, findings = fuzz(args.count, args.seed, args.start, only=args.only)
    kinds = ["refused", "same", "other"]
    print(f"{'reader':14}" + "".join(f"{kind:>9}" for kind in kinds))
    for name in args.only or TARGETS:
        print(f"{name:14}" + "".join(f"{totals.get(f'{name} {kind}', 0):9}" for kind in kinds))
    print(
        f"{sum(totals.values())} mutations in {time.time() - begin:.0f} s, {len(findings)} findings"
    )
    for finding in findings[:20]:
        print(json.dumps(finding))
    sys.exit(bool(findings))


if __name__ == "__main__":
    main()
