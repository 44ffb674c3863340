"""Damaged files: a short run of tests/fuzz.py (a long one is `python tests/fuzz.py 100000`), and the faults that it found."""

import io
import json
import os
import struct
import zipfile
import zlib

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from common.files import UserError, is_intact_zip, read_weights
from common.runs import resumable_array
from common.weights import load_sit, load_vae
import fid
import fuzz
import models
from common import files, published


def test_two_thousand_mutations(inside):
    """Without `diffusers` and `vfm`, whose networks take 0.1 s and more to build."""
    totals, findings = fuzz.fuzz(
        2000,
        seed=1,
        folder="runs/fuzz",
        only=[n for n in fuzz.TARGETS if n not in ("diffusers", "vfm")],
    )
    assert not findings, json.dumps(findings[:3], indent=1)
    assert sum(totals.values()) == 2000
    for name in (
        "checkpoint",
        "latents",
        "awa2",
        "png",
        "pictures",
    ):  # neither refuses everything nor lets everything pass
        assert totals.get(f"{name} refused", 0) > 0 and totals.get(f"{name} same", 0) > 0
    assert not any("other" in key and key.split()[0] in ("latents", "parts") for key in totals)


def test_the_fuzzer_finds_what_is_there_to_find(inside, monkeypatch):
    """Readers without their checks: one that believes damaged values, one that raises, one that asks for memory, one that hangs
    and one that dies."""
    monkeypatch.setattr(files, "is_intact_zip", lambda path: True)
    totals, findings = fuzz.fuzz(150, only=["ldm"], folder="runs/fuzz")
    assert {f["outcome"] for f in findings} >= {"wrong values"}

    def broken():
        kind = zlib.crc32(open("fid.pt", "rb").read()) % 4
        while kind == 0:
            pass
        if kind == 1:
            os._exit(7)
        return np.zeros(2**31, np.uint8) if kind == 2 else 1 / 0

    monkeypatch.setattr(fuzz, "PATIENCE", 0.5)
    reader = fuzz.Reader
    monkeypatch.setattr(
        fuzz, "Reader", lambda root, name: vars(r := reader(root, name)).update(read=broken) or r
    )
    totals, findings = fuzz.fuzz(20, only=["statistics"], folder="runs/fuzz")
    outcomes = {f["outcome"] for f in findings}
    assert len(findings) == 20 and outcomes >= {
        "raised ZeroDivisionError",
        "crash or hang, exit code 7",
        "hang",
    }
    assert any("MemoryError" in outcome for outcome in outcomes)


# ---- the faults, one by one -------------------------------------------------------------------------------------------


@pytest.fixture
def vae(inside):
    fuzz.make_vae()
    with safe_open("vae.safetensors", "pt") as file:
        return {k: file.get_tensor(k) for k in file.keys()}, file.metadata()


def test_our_weights_carry_a_hash_of_their_content(vae):
    state, metadata = vae
    good = load_vae(".").state_dict()
    data = bytearray(open("vae.safetensors", "rb").read())
    for at in (len(data) - 5, len(data) // 2):  # a bit of a tensor: same names, same shapes
        damaged = bytearray(data)
        damaged[at] ^= 4
        open("bad.safetensors", "wb").write(damaged)
        with pytest.raises(
            UserError, match="bad.safetensors is damaged: its content is not what was written"
        ):
            load_vae("bad.safetensors")
    config = metadata["config"].replace('"resolution": 8', '"resolution": 6')
    for wrong in (
        dict(metadata, config=config),
        {k.replace("hash", "hasi"): v for k, v in metadata.items()},
        {k.replace("kind", "kint"): v for k, v in metadata.items()},
    ):
        assert wrong != metadata
        save_file(
            state, "bad.safetensors", wrong
        )  # without its kind it was once taken for a published VAE
        with pytest.raises(UserError):
            load_vae("bad.safetensors")
    save_file(state, "old.safetensors", {k: v for k, v in metadata.items() if k != "hash"})
    old = load_vae("old.safetensors").state_dict()
    assert all(torch.equal(v, old[k]) for k, v in good.items())


def test_a_config_takes_no_memory_before_its_shapes_fit(vae):
    state, metadata = vae
    config = json.loads(metadata["config"])
    for change in (
        dict(ch=10**5, groups=1),
        dict(num_res_blocks=10**9),
        dict(spec="f2d999999999"),
        dict(ch=None),
        dict(x=1),
    ):
        save_file(
            state,
            "bad.safetensors",
            dict(kind="vae", info="{}", config=json.dumps(config | change)),
        )
        with pytest.raises(UserError, match="bad.safetensors"):
            load_vae("bad.safetensors")
    save_file(
        dict(state, latent_std=state["latent_std"] * float("nan")),
        "bad.safetensors",
        dict(metadata, hash=""),
    )
    with pytest.raises(UserError, match="no finite numbers"):
        load_vae("bad.safetensors")


def test_zip_files_are_checked_before_torch_and_numpy_read_them(inside):
    """torch.load checks no CRC; a member marked as a folder it reads as zeros; what is missing nobody misses."""
    torch.save(dict(a=torch.arange(6.0)), "a.pt")
    data = open("a.pt", "rb").read()
    assert is_intact_zip("a.pt") and read_weights("a.pt")[0]["a"].tolist() == list(range(6))
    at = data.index(struct.pack("<f", 5.0))
    entry = (
        data.rindex(b"archive/data/0") if b"archive/data/0" in data else data.rindex(b"a/data/0")
    )
    end = data.rindex(b"PK\5\6")
    for name, damaged in (
        ("value", data[:at] + b"\1" + data[at + 1 :]),
        ("folder", data[: entry - 8] + b"\x10" + data[entry - 7 :]),
        ("count", data[: end + 10] + b"\1" + data[end + 11 :]),
        ("cut", data[:-1]),
    ):
        open("b.pt", "wb").write(damaged)
        assert not is_intact_zip("b.pt"), name
        with pytest.raises(UserError, match="b.pt cannot be read"):
            read_weights("b.pt")


def test_a_checkpoint_that_claims_more_numbers_than_its_file_has(inside):
    """The pickle's count of numbers is believed by torch.load, which then reads past the end of what it loaded."""
    torch.save(dict(a=torch.arange(200.0)), "a.pt")

    def edit(rng, content):
        return content.replace(
            b"K\xc8", b"M\xff\x7f"
        )  # 200 -> 32767, in the storage and the tensor

    several, fuzz.several = fuzz.several, edit
    try:
        data = fuzz.reseal_zip(
            type("", (), dict(random=lambda s: 1.0, integers=lambda s, n: 0))(),
            open("a.pt", "rb").read(),
        )
    finally:
        fuzz.several = several
    open("b.pt", "wb").write(data)
    assert is_intact_zip("b.pt")
    with pytest.raises(UserError, match="b.pt cannot be read"):
        read_weights("b.pt")


@pytest.mark.parametrize(
    "value",
    [[1, 2], 3, torch.zeros(2), {1: torch.zeros(2)}, {"model": 3}, {"state_dict": {"a": 1}}],
)
def test_what_is_no_state_dict(value, inside):
    torch.save(value, "x.pt")
    for load in (
        load_vae,
        load_sit,
        published.load_discriminator,
        lambda path: models.LPIPS([path, path]),
    ):
        if load.__name__ != "<lambda>" or not isinstance(value, dict):
            with pytest.raises(UserError):
                load("x.pt")


def test_npz_headers_must_be_what_their_members_hold(inside):
    """A shortened header once hid a damaged CRC, and a lengthened one asked for all the memory that it named."""
    fuzz.make_npz()
    for old, new in (
        (b"(7, 8, 8, 3)", b"(6, 8, 8, 3)"),
        (b"(7, 8, 8, 3)", b"(9, 8, 8, 3)"),
        (b"(7,)", b"(6,)"),
        (b"(7,), ", b"(2147483648,), "),
    ):
        out = io.BytesIO()
        with zipfile.ZipFile("plain.npz") as a, zipfile.ZipFile(out, "w") as b:
            for member in a.infolist():
                b.writestr(member.filename, a.read(member).replace(old, new, 1))
        open("bad.npz", "wb").write(out.getvalue())
        with pytest.raises(UserError, match="bad.npz cannot be read as .npz"):
            fid.Pictures("bad.npz")


def test_arrays_on_disk_are_those_that_were_made(inside):
    """NumPy fills up with zeros what a cut file lacks when it maps it for writing."""
    fuzz.make_latents()
    size = os.path.getsize("latents.npy")
    good = open("latents.npy", "rb").read()
    for damaged in (
        good[:-7],
        good.replace(b"(10, 2", b"(90, 2"),
        good.replace(b"<f2", b"<i2"),
        good.replace(b"False", b"True "),
        b"",
    ):
        open("latents.npy", "wb").write(damaged)
        with pytest.raises(UserError, match="latents.npy is damaged; remove its folder"):
            resumable_array(".", "latents.npy", np.float16, fuzz.ROWS, 4)
        assert os.path.getsize("latents.npy") == len(damaged)
    open("latents.npy", "wb").write(good)
    assert size == os.path.getsize("latents.npy")
    with pytest.raises(UserError, match="latents.npy is damaged"):
        resumable_array(".", "latents.npy", np.float16, (11, *fuzz.ROWS[1:]), 4)
    marks = np.load("done.npy", mmap_mode="r+")
    marks[0] = 3  # no mark that was ever written
    assert resumable_array(".", "latents.npy", np.float16, fuzz.ROWS, 4)[2].tolist() == [0, 2]


def test_damaged_statistics_are_computed_again(inside, capsys):
    fuzz.make_statistics()
    good = fid.read_statistics("fid.pt", "cpu")
    data = bytearray(open("fid.pt", "rb").read())
    data[data.index(np.float64(good["mu"][2]).tobytes())] ^= 1
    open("fid.pt", "wb").write(data)
    assert (
        fid.read_statistics("fid.pt", "cpu") == {} and "computed again" in capsys.readouterr().out
    )
    assert good["mu"].shape == (5,)
