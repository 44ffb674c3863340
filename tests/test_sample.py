"""sample.py: the published sampler's times and guidance, guidance that would mean nothing, and sets
as folders. The networks have random weights.

    python -m pytest tests/test_sample.py
"""

import json
import os
import pathlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import fid
import sample
import train_sit
from common.files import UserError, write_weights
from conftest import SIT, interrupt_drawing, refused, script
from models import VAE, SiT


def write_sit(folder, **info):
    """Writes a random SiT of three classes for the VAE in `folder`/vae to `folder`/sit."""
    torch.manual_seed(1)
    net = SiT("S", 2, 4, 8, 3, depth=1, width=32, heads=1)
    # The last layer of an untrained SiT is zero: all its velocities would be.
    torch.nn.init.normal_(net.final_layer.linear.weight, std=0.1)
    torch.nn.init.normal_(net.y_embedder.embedding_table.weight)
    vae = dict(vae_path=str(folder / "vae"), vae_hash=sample.load_vae(folder / "vae").info["hash"])
    info = dict(step=3, classes=["ant", "bee", "cat"], **vae) | info
    write_weights(folder / "sit" / "sit.safetensors", "sit", net.state_dict(), net.config, info)
    return folder / "sit"


@pytest.fixture
def networks(inside):
    """The current folder, with vae/ and sit/ of 32-pixel pictures."""
    torch.manual_seed(0)
    vae = VAE("f4d4", 32, 32, [1, 1, 1], 1)
    write_weights(inside / "vae" / "vae.safetensors", "vae", vae.state_dict(), vae.config, {})
    write_sit(inside)
    return inside


# --------------------------------------------------------------------------------------------------
# Times and guidance


class CountingNet:
    """Stands for a SiT, and counts the evaluations with and without guidance."""

    num_classes = 2

    def __init__(self):
        self.batch_sizes = []

    def __call__(self, x, t, y):
        self.batch_sizes.append(len(x))
        return x


def evaluations(sampler, steps, interval):
    """For each evaluation of the network in a sampler's run, whether it was guided."""
    net = CountingNet()
    y = torch.tensor([1])

    def velocity(x, t, step_time=None):
        return sample.guided_velocity(net, x, t, y, 2.0, interval, step_time)

    noise = torch.zeros(1, 1, 1, 1)
    sample.integrate(velocity, noise, sampler, steps, lambda i: noise)
    return [size == 2 for size in net.batch_sizes]


# How many steps the published samplers guide. Their times are torch.linspace(1, 0, steps + 1) and,
# for the SDE, torch.linspace(1, 0.04, steps) and 0. 0.3 is no time of 10 steps: there the time is
# 0.30000000000000004. The rows are those on which all processors agree.
PUBLISHED_CHOICES = [
    ("ode", 50, (0.1, 1.0), 46),
    ("ode", 50, (0.2, 1.0), 41),
    ("ode", 50, (0.3, 1.0), 36),
    ("ode", 50, (0.0, 0.3), 15),
    ("ode", 50, (0.1, 0.3), 11),
    ("ode", 10, (0.0, 0.3), 2),
    ("ode", 10, (0.3, 1.0), 8),
    ("ode", 20, (0.1, 0.75), 14),
    ("ode", 40, (0.0, 0.75), 30),
    ("ode", 100, (0.1, 0.9), 81),
    ("ode", 250, (0.0, 0.3), 75),
    ("sde", 250, (0.0, 0.75), 185),
    ("sde", 250, (0.04, 0.75), 185),
    ("sde", 97, (0.0, 0.75), 72),
    ("sde", 49, (0.1, 1.0), 46),
    ("sde", 49, (0.0, 0.1), 4),
]


@pytest.mark.parametrize("sampler,steps,interval,guided", PUBLISHED_CHOICES)
def test_the_guided_steps_are_the_published_ones(sampler, steps, interval, guided):
    assert sum(evaluations(sampler, steps, interval)) == guided
    assert sample.count_guided_steps(sampler, steps, interval) == guided


def test_heun_decides_once_a_step():
    """Of 4 steps, those at 0.75 and 0.5 begin inside. The second evaluation of the step before them
    is at 0.75 too, and that of the last of them is at 0.25, outside; the last step has one
    evaluation."""
    guided = evaluations("heun", 4, (0.5, 0.75))
    assert guided == [False, False, True, True, True, True, False]


def test_guidance_that_means_nothing_is_refused(networks, capsys):
    words = ["--sit", "sit", "--vae", "vae", "--steps", 5, "--n", 1, "--precision", "fp32"]
    for interval in ((0.75, 0), (0, 750), (-0.5, 0.5), ("nan", 1)):
        message = refused(capsys, sample, *words, "--interval", *interval)
        assert f"--interval {interval[0]}" in message
        assert "from 0 (data) to 1 (noise), the smaller one first" in message
    assert "--cfg nan" in refused(capsys, sample, *words, "--cfg", "nan")
    message = refused(capsys, sample, *words, "--interval", 0.001, 0.002)
    assert "none of the 5 steps begins inside --interval 0.001 0.002" in message


@pytest.mark.parametrize(
    "info", [dict(null_label_trained=False), dict(arguments=dict(label_dropout=0.0))]
)
def test_a_sit_without_a_null_label_is_not_guided(info, networks, capsys):
    """The second file is of an older version, which has the flags of its training only."""
    sit = write_sit(networks, **info)
    words = ["--sit", sit, "--vae", "vae", "--steps", 5, "--n", 1, "--precision", "fp32"]
    assert "trained without its null label" in refused(capsys, sample, *words)
    script(sample, *words, "--cfg", 1)
    assert (sit / "grid.png").exists()


def test_training_says_whether_it_trains_the_null_label(networks, pictures, capsys):
    words = [*SIT, "--data", pictures, "--vae", "vae", "--repa", 0, "--steps", 1]
    assert "--preview-cfg 2.5 guides" in refused(capsys, train_sit, *words, "--label-dropout", 0)
    for share in (-0.1, 1, "nan"):
        message = refused(capsys, train_sit, *words, "--label-dropout", share)
        assert f"--label-dropout {share}" in message
    script(train_sit, *words, "--label-dropout", 0, "--preview-cfg", 1, "--out", "without")
    assert sample.load_sit("without").info["null_label_trained"] is False
    script(train_sit, *words, "--out", "with")
    assert sample.load_sit("with").info["null_label_trained"] is True


# --------------------------------------------------------------------------------------------------
# Sets as folders

WORDS = ["--sit", "sit", "--vae", "vae", "--steps", 3, "--cfg", 1, "--precision", "fp32"]
WORDS += ["--num", 10, "--batch-size", 4, "--seed", 2]


def pictures_in(folder):
    """{path below the folder: pixels, uint8 (H,W,3)}."""
    return {
        str(path.relative_to(folder)): np.asarray(Image.open(path))
        for path in pathlib.Path(folder).rglob("*.png")
    }


def test_a_folder_holds_the_pictures_of_the_npz(networks, capsys):
    script(sample, *WORDS, "--out", "set.npz")
    script(sample, *WORDS, "--out", "set")
    found = pictures_in("set")
    names = ["ant", "bee", "cat"]
    assert set(found) == {f"{names[i % 3]}/{i:06d}.png" for i in range(10)}
    with np.load("set.npz") as file:
        for path, pixels in found.items():
            assert np.array_equal(pixels, file["arr_0"][int(path[4:10])])
        settings = json.loads(str(file["settings"]))
    recorded = json.loads(pathlib.Path("set/settings.json").read_text())
    recorded.pop("provenance")
    settings.pop("provenance")
    assert recorded == settings
    # A folder that fid.py reads records where it is from.
    assert fid.Pictures("set").record["settings"]["sit_step"] == 3

    capsys.readouterr()
    script(sample, *WORDS, "--out", "set")
    assert "set already has its 10 pictures" in capsys.readouterr().out


def test_an_interrupted_folder_is_completed(networks, monkeypatch, capsys):
    script(sample, *WORDS, "--out", "whole")
    drawn = interrupt_drawing(monkeypatch, 2)
    with pytest.raises(SystemExit):
        script(sample, *WORDS, "--out", "set")
    with pytest.raises(UserError, match="set has 4 of the 10 pictures"):
        fid.Pictures("set")
    os.remove("set/bee/000001.png")
    script(sample, *WORDS, "--out", "set")
    assert drawn == [[0, 1, 2, 3], [4, 5, 6, 7], [0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    whole = pictures_in("whole")
    again = pictures_in("set")
    assert whole.keys() == again.keys()
    assert all(np.array_equal(whole[path], again[path]) for path in whole)


def test_folders_are_not_mixed(networks, capsys):
    script(sample, *WORDS, "--out", "set")
    message = refused(capsys, sample, *WORDS, "--out", "set", "--seed", 3)
    assert "seed was 2 and is now 3" in message
    before = pictures_in("set")
    script(sample, *WORDS, "--out", "set", "--seed", 3, "--num", 3, "--overwrite")
    after = pictures_in("set")
    assert set(after) == {"ant/000000.png", "bee/000001.png", "cat/000002.png"}
    assert not np.array_equal(after["ant/000000.png"], before["ant/000000.png"])

    os.mkdir("mine")
    pathlib.Path("mine/000000.png").write_text("not a set of ours")
    for words in ([], ["--overwrite"]):
        message = refused(capsys, sample, *WORDS, "--out", "mine", *words)
        assert "mine holds files that are not a set of ours, such as '000000.png'" in message
    assert pathlib.Path("mine/000000.png").read_text() == "not a set of ours"
    assert "a set (--num) is an .npz file or a folder" in refused(
        capsys, sample, *WORDS, "--out", "set.png"
    )


@pytest.mark.parametrize(
    "classes", [[], ["ant"], ["..", "bee", "cat"], ["a/b", "bee", "cat"], ["ant", "ant", "cat"]]
)
def test_classes_that_are_no_names_of_folders_are_numbers(classes, networks):
    sit = sample.load_sit(write_sit(networks, classes=classes))
    assert sample.class_folders(sit) == ["0", "1", "2"]


def test_preview_grids_are_no_samples(inside):
    os.makedirs("runs/sit/samples")
    pathlib.Path("runs/sit/metrics.jsonl").write_text("")
    for folder in ("runs/sit/samples", "runs/sit"):
        with pytest.raises(UserError, match="grids to look at; draw a set"):
            fid.Pictures(folder)


# --------------------------------------------------------------------------------------------------
# Names that people give


def test_a_place_that_cannot_be_written_is_refused_before_drawing(networks, capsys, monkeypatch):
    monkeypatch.setattr(sample, "draw", lambda *_: pytest.fail("drawn"))
    os.mkdir("folder.png")
    os.mkdir("folder.npz")
    pathlib.Path("file").touch()
    for out, words in (
        ("folder.png", ["--n", 1]),
        ("file/x.png", ["--n", 1]),
        ("folder.npz", ["--num", 2]),
        ("file/x.npz", ["--num", 2]),
        ("file/x", ["--num", 2]),
    ):
        message = refused(capsys, sample, "--sit", "sit", *words, "--out", out)
        assert "cannot write " in message
        assert out in message


def test_endings_in_capitals(networks):
    words = ["--sit", "sit", "--steps", 2, "--cfg", 1, "--precision", "fp32"]
    script(sample, *words, "--num", 2, "--out", "SET.NPZ")
    assert fid.Pictures("SET.NPZ").count == 2
    script(sample, *words, "--n", 1, "--out", "GRID.PNG")
    with Image.open("GRID.PNG") as image:
        assert image.format == "PNG"


def test_an_accent_may_be_a_letter_of_its_own(networks):
    """macOS writes names of folders so, and keyboards do not."""
    sit = SimpleNamespace(info=dict(classes=["e\u0301te\u0301", "hiver"]), num_classes=2)
    assert sample.class_numbers(["\u00e9t\u00e9", "hiver", "0"], sit) == [0, 1, 0]
