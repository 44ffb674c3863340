"""The demo's own parts: its judge, its picture, its clock. The commands that it prints are tested
with their stages."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import demo
import sample
from common.pictures import ImageSet
from tools import stand_in
from tools.pictures import draw_pictures


@pytest.mark.parametrize("classes", [1, 2, 5, 6, 7, 40, 300])
def test_the_samples_shown_are_48_different_ones_in_the_order_of_their_classes(classes):
    labels = torch.arange(240) % classes
    shown = demo.choose_samples(labels, classes)
    assert len(shown) == len(set(shown)) == 48
    shown_labels = labels[shown].tolist()
    assert shown_labels == sorted(shown_labels)
    if classes == 6:
        assert shown_labels == [label for label in range(6) for _ in range(8)]


def test_the_picture_of_a_data_set_of_forty_classes(tmp_path, monkeypatch, capsys):
    """A set of 240 samples holds six of each of 40 classes, fewer than the eight of a column."""
    monkeypatch.chdir(tmp_path)
    for c in range(40):
        folder = tmp_path / "pictures" / f"c{c:02d}"
        folder.mkdir(parents=True)
        Image.new("RGB", (32, 32), (c * 6, 0, 100)).save(folder / "0.png")
    labels = np.arange(240) % 40
    # A sample's red tells its class.
    samples = np.zeros((240, 32, 32, 3), np.uint8)
    samples[..., 0] = labels[:, None, None]
    (tmp_path / demo.OUT).mkdir(parents=True)
    for name in demo.VAES:
        np.savez(f"{demo.OUT}/samples_{name}.npz", arr_0=samples, labels=labels)
    monkeypatch.setattr(demo, "reconstruct", lambda folder, pictures: pictures)
    val_set = ImageSet("pictures")
    demo.save_picture(val_set, val_set.classes)

    with Image.open(f"{demo.OUT}/demo.png") as file:
        pixels = np.asarray(file)
    rows = 3 + 2 * 4
    height, width = pixels.shape[0] // rows, pixels.shape[1] // 12
    centres = pixels[height // 2 :: height, width // 2 :: width, 0][:rows, :12]
    # Columns 0 and 1 of the first four rows of samples, row by row, then columns 2 and 3.
    first = np.concatenate([centres[3:7, 2 * i : 2 * i + 2].ravel() for i in range(6)])
    assert first.tolist() == [label for label in range(8) for _ in range(6)]
    assert "c00, c01, c02, c03, c04, c05, c06, c07" in capsys.readouterr().out


def test_the_judge_learns_the_classes_and_the_stand_in_gives_tokens(tmp_path, capsys):
    draw_pictures(str(tmp_path), per_class=60)
    train = ImageSet(str(tmp_path / "train"))
    val = ImageSet(str(tmp_path / "val"))
    path = str(tmp_path / "judge.safetensors")
    stand_in.fit_judge(train, val, 32, path, steps=100)
    pictures = val.stack(range(len(val)), 32)
    labels = torch.from_numpy(val.labels)
    share = stand_in.accuracy(path, pictures, labels, 6)
    assert share > 0.5
    assert f"{share:.1%}" in capsys.readouterr().out
    assert stand_in.accuracy(path, pictures, (labels + 1) % 6, 6) < 0.3

    from models import VFM

    weights = str(tmp_path / "stand_in.safetensors")
    stand_in.fit(train, 32, weights, steps=2)
    vfm = VFM(stand_in.NAME, weights, 32, grid=4, stride=stand_in.STRIDE)
    assert vfm(torch.zeros(2, 3, 32, 32)).shape == (2, 16, vfm.dim)


def test_the_clock_scales_what_is_left_by_what_the_last_chapter_took(monkeypatch, capsys):
    times = iter([0.0, 0.0, 2 * demo.SECONDS["Pictures"], 2 * demo.SECONDS["Pictures"] + 0.1])
    monkeypatch.setattr(demo, "time", SimpleNamespace(time=lambda: next(times)))
    clock = demo.Clock()
    whole = sum(demo.SECONDS.values())
    clock.chapter("Pictures")
    assert f"1. Pictures; about {whole:.0f} s are left" in capsys.readouterr().out
    # It took twice its time. The next chapter was done before, which says nothing about speed.
    left = 2 * (whole - demo.SECONDS["Pictures"])
    clock.chapter("Vision model and judge")
    assert f"about {left:.0f} s are left" in capsys.readouterr().out
    left -= 2 * demo.SECONDS["Vision model and judge"]
    clock.chapter("Stage 1, the VAEs")
    assert f"3. Stage 1, the VAEs; about {left:.0f} s are left" in capsys.readouterr().out


def test_the_bar_of_a_grid_has_a_total(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        sample,
        "draw_batch",
        lambda sit, vae, ids, *rest: torch.zeros(len(ids), 3, 8, 8, dtype=torch.uint8),
    )
    sit = SimpleNamespace(num_classes=3, info={})
    args = SimpleNamespace(classes=None, n=4, batch_size=5, out=str(tmp_path / "grid.png"))
    sample.draw_grid(sit, None, args, "cpu", "fp32")
    assert "3/3" in capsys.readouterr().err
