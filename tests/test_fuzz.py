"""Damaged files: a short run of tests/fuzz.py (a long one is `python tests/fuzz.py 100000`), and
the faults that it once found."""

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

import fid
import fuzz
import models
from common import files, published
from common.files import UserError, is_intact_zip, read_weights
from common.runs import resumable_array
from common.weights import load_sit, load_vae

# --------------------------------------------------------------------------------------------------
# The fuzzer


def test_two_thousand_mutations(inside):
    """Without `diffusers` and `vfm`, whose networks take 0.1 s and more to build."""
    targets = [name for name in fuzz.TARGETS if name not in ("diffusers", "vfm")]
    totals, findings = fuzz.fuzz(2000, seed=1, folder="runs/fuzz", only=targets)
    assert not findings, json.dumps(findings[:3], indent=1)
    assert sum(totals.values()) == 2000
    for name in ("checkpoint", "latents", "awa2", "png", "pictures"):
        # These readers neither refuse everything nor let everything pass.
        assert totals[f"{name} refused"] > 0
        assert totals[f"{name} same"] > 0
    assert totals["latents other"] == 0
    assert totals["parts other"] == 0


def test_the_fuzzer_finds_a_reader_that_believes_damaged_values(inside, monkeypatch):
    monkeypatch.setattr(files, "is_intact_zip", lambda path: True)
    _, findings = fuzz.fuzz(150, only=["ldm"], folder="runs/fuzz")
    assert "wrong values" in {finding["outcome"] for finding in findings}


def read_badly():
    """Depending on the file: hangs, dies, asks for memory, or raises."""
    with open("fid.pt", "rb") as file:
        kind = zlib.crc32(file.read()) % 4
    while kind == 0:
        pass
    if kind == 1:
        os._exit(7)
    if kind == 2:
        return np.zeros(2**31, np.uint8)
    return 1 / 0


class BadReader(fuzz.Reader):
    def __init__(self, root, name):
        super().__init__(root, name)
        self.read = read_badly


def test_the_fuzzer_finds_readers_that_raise_hang_die_and_ask_for_memory(inside, monkeypatch):
    monkeypatch.setattr(fuzz, "PATIENCE", 0.5)
    monkeypatch.setattr(fuzz, "Reader", BadReader)
    _, findings = fuzz.fuzz(20, only=["statistics"], folder="runs/fuzz")
    outcomes = {finding["outcome"] for finding in findings}
    assert len(findings) == 20
    assert outcomes >= {"raised ZeroDivisionError", "crash or hang, exit code 7", "hang"}
    assert any("MemoryError" in outcome for outcome in outcomes)


# --------------------------------------------------------------------------------------------------
# Weight files of ours


@pytest.fixture
def vae(inside):
    """A vae.safetensors -> (its state dict, its metadata)."""
    fuzz.make_vae()
    with safe_open("vae.safetensors", "pt") as file:
        state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118, it has no iterator
        return state, file.metadata()


def test_a_bit_of_a_tensor_is_noticed(vae):
    """It changes neither names nor shapes."""
    with open("vae.safetensors", "rb") as file:
        data = file.read()
    for at in (len(data) - 5, len(data) // 2):
        damaged = bytearray(data)
        damaged[at] ^= 4
        with open("bad.safetensors", "wb") as file:
            file.write(damaged)
        message = r"bad\.safetensors is damaged: its content is not what was written"
        with pytest.raises(UserError, match=message):
            load_vae("bad.safetensors")


def test_damaged_metadata_is_noticed(vae):
    """A file that had lost its kind was once taken for a published VAE."""
    state, metadata = vae
    config = metadata["config"].replace('"resolution": 8', '"resolution": 6')
    other_config = dict(metadata, config=config)
    no_hash = {key.replace("hash", "hasi"): value for key, value in metadata.items()}
    no_kind = {key.replace("kind", "kint"): value for key, value in metadata.items()}
    for damaged in (other_config, no_hash, no_kind):
        assert damaged != metadata
        save_file(state, "bad.safetensors", damaged)
        with pytest.raises(UserError):
            load_vae("bad.safetensors")


def test_files_of_before_the_hash_are_read(vae):
    state, metadata = vae
    del metadata["hash"]
    save_file(state, "old.safetensors", metadata)
    old = load_vae("old.safetensors").state_dict()
    for key, value in load_vae(".").state_dict().items():
        assert torch.equal(value, old[key])


@pytest.mark.parametrize(
    "change",
    [
        dict(ch=10**5, groups=1),
        dict(num_res_blocks=10**9),
        dict(spec="f2d999999999"),
        dict(ch=None),
        dict(x=1),
    ],
)
def test_a_config_takes_no_memory_before_its_shapes_fit(change, vae):
    state, metadata = vae
    config = json.loads(metadata["config"]) | change
    save_file(state, "bad.safetensors", dict(kind="vae", info="{}", config=json.dumps(config)))
    with pytest.raises(UserError, match=r"bad\.safetensors"):
        load_vae("bad.safetensors")


def test_latent_statistics_must_be_finite(vae):
    state, metadata = vae
    state["latent_std"] *= float("nan")
    save_file(state, "bad.safetensors", dict(metadata, hash=""))
    with pytest.raises(UserError, match="no finite numbers"):
        load_vae("bad.safetensors")


# --------------------------------------------------------------------------------------------------
# Files of torch.save


def damaged_zips(data):
    """{damage: bytes} for a file of torch.save's with a tensor whose last value is 5.0."""
    at = data.index(struct.pack("<f", 5.0))
    # The name in the list of members, at the end of the file; 8 bytes before it are the attributes.
    member = b"archive/data/0" if b"archive/data/0" in data else b"a/data/0"
    entry = data.rindex(member)
    # The record at the end, which gives the number of members.
    end = data.rindex(b"PK\5\6")
    return {
        "value": data[:at] + b"\1" + data[at + 1 :],
        "marked as a folder": data[: entry - 8] + b"\x10" + data[entry - 7 :],
        "member count": data[: end + 10] + b"\1" + data[end + 11 :],
        "cut": data[:-1],
    }


def test_zip_files_are_checked_before_torch_and_numpy_read_them(inside):
    """torch.load compares no CRC-32, reads zeros where a member is marked as a folder, and misses
    no member that the list lacks."""
    torch.save(dict(a=torch.arange(6.0)), "a.pt")
    assert is_intact_zip("a.pt")
    assert read_weights("a.pt")[0]["a"].tolist() == list(range(6))
    with open("a.pt", "rb") as file:
        data = file.read()
    for damage, damaged in damaged_zips(data).items():
        with open("b.pt", "wb") as file:
            file.write(damaged)
        assert not is_intact_zip("b.pt"), damage
        with pytest.raises(UserError, match=r"b\.pt cannot be read"):
            read_weights("b.pt")


class FirstMember:
    """Stands in for a random generator: has fuzz.reseal_zip choose the file's description."""

    def random(self):
        return 1.0


def test_a_checkpoint_that_claims_more_numbers_than_its_file_has(inside, monkeypatch):
    """torch.load believes the count of numbers in the pickle, and reads past the end of what it
    loaded."""
    torch.save(dict(a=torch.arange(200.0)), "a.pt")

    def claim_more(rng, content):
        # 200 becomes 32767, for the storage and for the tensor.
        return content.replace(b"K\xc8", b"M\xff\x7f")

    monkeypatch.setattr(fuzz, "edit", claim_more)
    with open("a.pt", "rb") as file:
        data = fuzz.reseal_zip(FirstMember(), file.read())
    with open("b.pt", "wb") as file:
        file.write(data)
    assert is_intact_zip("b.pt")
    with pytest.raises(UserError, match=r"b\.pt cannot be read"):
        read_weights("b.pt")


@pytest.mark.parametrize(
    "value",
    [[1, 2], 3, torch.zeros(2), {1: torch.zeros(2)}, {"model": 3}, {"state_dict": {"a": 1}}],
)
@pytest.mark.parametrize("load", [load_vae, load_sit, published.load_discriminator])
def test_what_is_no_state_dict(load, value, inside):
    torch.save(value, "x.pt")
    with pytest.raises(UserError):
        load("x.pt")


@pytest.mark.parametrize("value", [[1, 2], 3, torch.zeros(2)])
def test_what_is_no_state_dict_for_lpips(value, inside):
    """A dict without its weights is no error: what LPIPS lacks is downloaded."""
    torch.save(value, "x.pt")
    with pytest.raises(UserError):
        models.LPIPS(["x.pt", "x.pt"])


# --------------------------------------------------------------------------------------------------
# Arrays


@pytest.mark.parametrize(
    "old,new",
    [
        (b"(7, 8, 8, 3)", b"(6, 8, 8, 3)"),
        (b"(7, 8, 8, 3)", b"(9, 8, 8, 3)"),
        (b"(7,)", b"(6,)"),
        (b"(7,), ", b"(2147483648,), "),
    ],
)
def test_npz_headers_must_be_what_their_members_hold(old, new, inside):
    """A shortened header once hid a wrong CRC-32, and a lengthened one took all the memory that it
    named."""
    fuzz.make_npz()
    with zipfile.ZipFile("plain.npz") as good, zipfile.ZipFile("bad.npz", "w") as bad:
        for member in good.infolist():
            bad.writestr(member.filename, good.read(member).replace(old, new, 1))
    with pytest.raises(UserError, match=r"bad\.npz cannot be read as \.npz"):
        fid.Pictures("bad.npz")


def open_latents(shape=fuzz.LATENTS_SHAPE):
    return resumable_array(".", "latents.npy", np.float16, shape, 4)


def test_damaged_arrays_on_disk_are_refused_and_left_alone(inside):
    """Where NumPy maps a cut file for writing, it enlarges it with zeros."""
    fuzz.make_latents()
    with open("latents.npy", "rb") as file:
        good = file.read()
    damaged_contents = [
        good[:-7],
        good.replace(b"(10, 2", b"(90, 2"),
        good.replace(b"<f2", b"<i2"),
        good.replace(b"False", b"True "),
        b"",
    ]
    for damaged in damaged_contents:
        with open("latents.npy", "wb") as file:
            file.write(damaged)
        with pytest.raises(UserError, match=r"latents\.npy is damaged; remove its folder"):
            open_latents()
        assert os.path.getsize("latents.npy") == len(damaged)


def test_arrays_on_disk_must_have_the_shape_that_is_asked_for(inside):
    fuzz.make_latents()
    with pytest.raises(UserError, match=r"latents\.npy is damaged"):
        open_latents(shape=(11, *fuzz.LATENTS_SHAPE[1:]))


def test_a_damaged_mark_counts_as_not_done(inside):
    fuzz.make_latents()
    marks = np.load("done.npy", mmap_mode="r+")
    marks[0] = 3  # neither done nor not
    _, _, todo = open_latents()
    assert todo.tolist() == [0, 2]


def test_damaged_statistics_are_computed_again(inside, capsys):
    fuzz.make_statistics()
    good = fid.read_statistics("fid.pt", "cpu")
    assert good["mu"].shape == (5,)
    with open("fid.pt", "rb") as file:
        data = bytearray(file.read())
    data[data.index(np.float64(good["mu"][2]).tobytes())] ^= 1
    with open("fid.pt", "wb") as file:
        file.write(data)
    assert fid.read_statistics("fid.pt", "cpu") == {}
    assert "computed again" in capsys.readouterr().out
