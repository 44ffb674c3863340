"""The demo's own parts: its judge, its picture, its bar. The commands that it prints are tested
with their stages."""

import json
import os
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import demo
import sample
from common.files import UserError
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


def test_the_judge_learns_the_classes_and_the_stand_in_gives_tokens(tmp_path):
    draw_pictures(str(tmp_path), per_class=60)
    train = ImageSet(str(tmp_path / "train"))
    val = ImageSet(str(tmp_path / "val"))
    path = str(tmp_path / "judge.safetensors")
    reports = []

    def report(share, words):
        reports.append((share, words))

    share = stand_in.fit_judge(train, val, 32, path, report, steps=100)
    pictures = val.stack(range(len(val)), 32)
    labels = torch.from_numpy(val.labels)
    assert share == stand_in.accuracy(path, pictures, labels, 6)
    assert share > 0.5
    assert stand_in.accuracy(path, pictures, (labels + 1) % 6, 6) < 0.3
    assert reports[0][0] == 0.01
    assert re.fullmatch(r"step 1 of 100: loss \d\.\d{3}", reports[0][1])

    from models import VFM

    weights = str(tmp_path / "stand_in.safetensors")
    stand_in.fit(train, 32, weights, report, steps=2)
    vfm = VFM(stand_in.NAME, weights, 32, grid=4, stride=stand_in.STRIDE)
    assert vfm(torch.zeros(2, 3, 32, 32)).shape == (2, 16, vfm.dim)


@pytest.fixture
def two_sets(tmp_path):
    """Two ImageSets of two classes, with the same names and sizes of files but other pictures."""
    sets = []
    for folder, value in (("a", 0), ("b", 100)):
        for c in range(2):
            (tmp_path / folder / f"c{c}").mkdir(parents=True)
            path = tmp_path / folder / f"c{c}" / "0.png"
            Image.new("RGB", (32, 32), (c * 50, value, 9)).save(path)
        sets.append(ImageSet(str(tmp_path / folder)))
    return sets


def test_networks_that_were_trained_on_other_pictures_are_not_used_again(
    two_sets, tmp_path, monkeypatch
):
    ours, others = two_sets
    monkeypatch.chdir(tmp_path)
    assert not demo.is_fitted(demo.JUDGE, ours)
    progress = demo.Progress()
    args = SimpleNamespace(vfm=None)
    monkeypatch.setattr(stand_in, "train", lambda *args, **kwargs: None)
    demo.fit_judge(ours, ours, progress)
    demo.prepare_vision_model(args, ours, progress)
    written = [os.stat(path).st_mtime_ns for path in (demo.JUDGE, demo.STAND_IN)]

    # The same pictures: nothing is trained again.
    demo.fit_judge(ours, ours, progress)
    demo.prepare_vision_model(args, ours, progress)
    assert [os.stat(path).st_mtime_ns for path in (demo.JUDGE, demo.STAND_IN)] == written

    with pytest.raises(
        UserError, match=r"judge.* was trained on other pictures .* delete runs/demo"
    ):
        demo.fit_judge(others, others, progress)
    with pytest.raises(UserError, match=r"stand_in.* was trained on other pictures"):
        demo.prepare_vision_model(args, others, progress)


def test_networks_of_a_demo_that_did_not_note_its_pictures_are_refused(two_sets, tmp_path):
    path = tmp_path / "judge.safetensors"
    save_file({"weight": torch.zeros(2)}, path)
    with pytest.raises(UserError, match="other pictures"):
        demo.is_fitted(str(path), two_sets[0])
    path.write_bytes(b"no weights")
    with pytest.raises(UserError, match="cannot be read"):
        demo.is_fitted(str(path), two_sets[0])


def test_pictures_of_an_earlier_version_are_not_taken_for_those_of_this_one(tmp_path):
    draw_pictures(str(tmp_path), per_class=2)
    marker = tmp_path / "demo.json"
    settings = json.loads(marker.read_text())
    draw_pictures(str(tmp_path), per_class=2)
    del settings["drawing"]
    marker.write_text(json.dumps(settings))
    with pytest.raises(UserError, match="delete this one"):
        draw_pictures(str(tmp_path), per_class=2)


class FakeTime:
    """Stands for the module `time` in demo.py; its clock goes only when told."""

    def __init__(self):
        self.now = 1000.0

    def time(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds


@pytest.fixture
def clock(monkeypatch):
    clock = FakeTime()
    monkeypatch.setattr(demo, "time", clock)
    monkeypatch.setattr(demo, "SECONDS", {"First": 100, "Second": 200, "Third": 20})
    return clock


def test_the_time_left_follows_the_speed_of_this_run(clock, capsys):
    progress = demo.Progress()
    progress.chapter("First")
    assert "1. First; about 320 s are left" in capsys.readouterr().out
    # The first chapter was done before, which says nothing about speed.
    clock.now += 1
    progress.report(1.0, "")
    progress.chapter("Second")
    assert "2. Second; about 220 s are left" in capsys.readouterr().out
    # The second was half done, and the next quarter takes 100 s instead of 50.
    progress.report(0.5, "")
    clock.now += 100
    progress.report(0.75, "")
    slowness = (20 + 100) / (20 + 50)
    assert progress.seconds_left() == pytest.approx(slowness * (50 + 20))
    # A bar that ends shows nothing left but the last chapter.
    progress.report(1.0, "")
    clock.now += 10
    capsys.readouterr()
    progress.chapter("Third")
    slowness = (20 + 110) / (20 + 100)
    assert f"3. Third; about {slowness * 20:.0f} s are left" in capsys.readouterr().out


def test_a_file_gets_a_line_every_20_seconds_and_a_terminal_one_bar(clock, capsys, monkeypatch):
    progress = demo.Progress()
    progress.chapter("First")
    progress.report(0.0, "")
    capsys.readouterr()
    for _ in range(90):
        clock.now += 0.5
        progress.report((clock.now - progress.begun) / 100, "loss 0.5")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert re.fullmatch(r" *6% done, 5:00 left in all; loss 0\.5", lines[0])

    progress.is_terminal = True
    size = os.terminal_size((60, 24))
    monkeypatch.setattr(demo.shutil, "get_terminal_size", lambda: size)
    progress.report(0.5, "a long word " * 9)
    progress.report(0.6, "short")
    progress.print("heading")
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    bars = out.split("\r")
    assert bars[0] == ""
    assert max(map(len, bars)) < 60
    # A shorter bar wipes out what a longer one has left behind, and so does a heading.
    assert len(bars[2]) == len(bars[1])
    assert bars[3].strip() == ""
    assert bars[4] == "heading\n"


def stage(tmp_path, name, body):
    """Writes a script that stands for a stage; its first argument is --out's value."""
    (tmp_path / name).write_text(f"import sys\nout = sys.argv[2]\n{body}\n")


def test_the_bar_follows_the_slower_of_two_stages_and_shows_the_losses(tmp_path, clock):
    for name, steps in (("send", [50, 100]), ("plain", [50])):
        (tmp_path / name).mkdir()
        with open(tmp_path / name / "metrics.jsonl", "w") as file:
            for step in steps:
                losses = {"recon": step / 1000, "kl": 9.0}
                file.write(json.dumps(dict(step=step, **losses, images_per_s=80.4)) + "\n")
            file.write('{"step": 400, "images_per_s": 7')  # being written
    runs = [f"train_vae.py --out {tmp_path}/{name} --steps 200".split() for name in demo.VAES]
    reports = []
    progress = SimpleNamespace(report=lambda *report: reports.append(report))
    demo.report_steps(progress, runs)
    assert reports == [(0.25, "step 100 of 200: recon 0.100, 80 pictures/s")]
    # Nothing is written yet.
    runs = [f"train_sit.py --out {tmp_path}/none --steps 200".split()]
    demo.report_steps(progress, runs)
    assert reports[1][0] == 0


def test_a_stage_that_fails_ends_the_demo_with_its_last_words(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, "__file__", str(tmp_path / "demo.py"))
    stage(tmp_path, "good.py", "import time\ntime.sleep(60)")
    stage(tmp_path, "bad.py", 'print("first")\nsys.exit("bad.py: error: no such folder")')
    monkeypatch.setattr(demo, "report_steps", lambda progress, runs: None)
    with pytest.raises(UserError, match=r"b\.log ends with: bad.py: error: no such folder"):
        demo.run_side_by_side(demo.Progress(), "good.py --out a", "bad.py --out b")
    assert "$ python bad.py --out b      # its output is in b.log" in capsys.readouterr().out
    assert (tmp_path / "b.log").read_text().splitlines()[0] == "first"

    stage(tmp_path, "bad.py", "")
    stage(tmp_path, "good.py", "")
    demo.run_side_by_side(demo.Progress(), "good.py --out a", "bad.py --out b")


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
