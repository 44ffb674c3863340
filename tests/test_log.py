"""What shows a run's numbers: progress bars, TensorBoard's event files, and the drawing of curves.

python -m pytest tests/test_log.py
"""

import argparse
import json
import os
import sys

import numpy as np
import torch
from PIL import Image

import train_vae
from common import processes
from common.processes import progress
from common.runs import RunLog
from conftest import PLAIN_VAE, refused, script
from tools import curves


def log_of(start, tensorboard=True):
    args = argparse.Namespace(out="run", batch_size=4, accum=1, tensorboard=tensorboard)
    return RunLog(args, None, start, total=9, steps_per_epoch=2.0)


def log_step(log, step, flow):
    log.add({"flow": torch.tensor(flow)}, torch.tensor(True))
    log.line(step)


def read_events(folder):
    """What TensorBoard shows: {name: [(step, value)]}, and the steps of the pictures."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(folder).Reload()
    scalars = {}
    for name in events.Tags()["scalars"]:
        scalars[name] = [(event.step, event.value) for event in events.Scalars(name)]
    pictures = {name: events.Images(name) for name in events.Tags()["images"]}
    return scalars, pictures


def test_event_files_hold_what_the_log_holds(inside):
    log = log_of(start=0)
    log_step(log, 1, 0.5)
    log.note(1, {"val_psnr": 20.0})
    log.pictures(1, [torch.zeros(2, 3, 8, 8, dtype=torch.uint8)])
    scalars, pictures = read_events("run/tensorboard")
    assert scalars["flow"] == [(1, 0.5)]
    assert scalars["val_psnr"] == [(1, 20.0)]
    with open("run/metrics.jsonl") as file:
        names = {name for line in file for name in json.loads(line)}
    assert set(scalars) == names - {"step"}
    [picture] = pictures["pictures"]
    assert picture.step == 1
    with Image.open("run/samples/0000001.png") as image:
        assert (picture.width, picture.height) == image.size


def test_a_resumed_run_drops_the_events_of_lost_steps(inside):
    """A run was killed at step 3, and resumes from its checkpoint of step 1."""
    log = log_of(start=0)
    for step in (1, 2, 3):
        log_step(log, step, 0.5)
    log = log_of(start=1)
    log_step(log, 2, 0.25)
    scalars, _ = read_events("run/tensorboard")
    assert scalars["flow"] == [(1, 0.5), (2, 0.25)]


def test_without_the_flag_there_are_no_event_files(inside):
    log_step(log_of(start=0, tensorboard=False), 1, 0.5)
    assert not os.path.exists("run/tensorboard")


def test_without_the_package_it_is_a_sentence(pictures, inside, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    message = refused(capsys, train_vae, *PLAIN_VAE, "--data", pictures, "--tensorboard")
    assert "pip install tensorboard" in message


# --------------------------------------------------------------------------------------------------
# tools/curves.py


def write_run(name, *lines):
    os.makedirs(name)
    with open(f"{name}/metrics.jsonl", "w") as file:
        for line in lines:
            file.write(json.dumps(line) + "\n")
        # A run in progress may be writing a line.
        file.write('{"step": 4, "flo')


def test_curves_of_runs(inside, capsys):
    write_run(
        "a", {"step": 1, "epoch": 0.5, "flow": 2.0, "images_per_s": 9}, {"step": 2, "flow": 1.5}
    )
    write_run("b", {"step": 2, "flow": 1.0}, {"step": 2, "fid": 30.0})
    assert curves.read_curves("a") == {"flow": ([1, 2], [2.0, 1.5]), "images_per_s": ([1], [9])}
    script(curves, "a", "b", "--out", "new/curves.png")
    assert "3 numbers of 2 runs" in capsys.readouterr().out
    pixels = np.asarray(Image.open("new/curves.png").convert("RGB"))
    # A line of each run, in matplotlib's first two colours.
    for colour in ((31, 119, 180), (255, 127, 14)):
        assert (pixels == colour).all(2).any()


def test_the_panels_of_curves(inside):
    runs = {
        "a": {"flow": ([1, 2], [2.0, 1.5]), "fid": ([2], [30.0])},
        "b": {"flow": ([1, 3], [2.0, 1.0]), "images_per_s": ([3], [9])},
    }
    names = curves.choose_names(runs.values(), None)
    assert names == ["flow", "fid", "images_per_s"]
    figure = curves.draw_curves(runs, names, columns=2)
    drawn = {}
    for panel in figure.axes:
        drawn[panel.get_title()] = [line.get_xydata().tolist() for line in panel.get_lines()]
    assert drawn == {
        "flow": [[[1, 2], [2, 1.5]], [[1, 2], [3, 1]]],
        "fid": [[[2, 30]]],
        "images_per_s": [[[3, 9]]],
    }


def test_runs_without_curves_are_refused(inside, capsys, monkeypatch):
    write_run("a", {"step": 1, "flow": 2.0})
    write_run("empty")
    os.makedirs("other")
    assert "other holds no run" in refused(capsys, curves, "a", "other")
    assert "no numbers yet" in refused(capsys, curves, "empty")
    assert "--only fid: the runs logged flow" in refused(capsys, curves, "a", "--only", "fid")
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "pip install matplotlib" in refused(capsys, curves, "a")


# --------------------------------------------------------------------------------------------------
# Progress bars


def drawn(capsys, **settings):
    """The states of a bar over 10,000 items that a file of stderr gets, without blank ones."""
    assert list(progress(range(10_000), "items", **settings)) == list(range(10_000))
    states = capsys.readouterr().err.replace("\n", "\r").split("\r")
    return [state for state in states if state.strip()]


def test_a_file_does_not_get_every_state_of_a_bar(capsys, monkeypatch):
    """pytest's stderr is no terminal. All this takes far less than 20 seconds."""
    (first,) = drawn(capsys)
    assert first.startswith("items:   0%")
    first, last = drawn(capsys, leave=True)
    assert "10000/10000" in last
    assert drawn(capsys, disable=True) == []
    monkeypatch.setattr(processes, "rank", lambda: 1)
    assert drawn(capsys, leave=True) == []
