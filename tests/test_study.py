"""tools/study.py: every command it would give parses, and the report says of runs what stands in their files."""
import json
import os
import shlex
import sys

import numpy as np
import pytest

import fid
import probe
import sample
import train_sit
import train_vae
from tools import judge, study
from tools.benchmarks import read_awa2

PARSERS = {"train_vae.py": train_vae, "train_sit.py": train_sit, "sample.py": sample, "probe.py": probe, "fid.py": fid}


def words_of(command):
    words = shlex.split(command)
    words = words[1:] if words[0] == "python" else words
    return words[2:] if words[0] == "torchrun" else words


def test_every_command_parses():
    args = study.parse_arguments(["--vfm-weights", "w.safetensors", "--repa"])
    jobs = study.plan(args, "runs/study", study.SIZES["full"])
    for name, (after, commands) in jobs.items():
        assert all(list(jobs).index(a) < list(jobs).index(name) for a in after if a in jobs) and set(after) <= set(jobs), name
        for command, _ in commands:
            words = words_of(command)
            if words[0] in PARSERS:
                PARSERS[words[0]].parse_arguments(words[1:])
            else:
                assert words[:2] in (["-m", "tools.judge"], ["-m", "tools.study"])
    assert len([name for name in jobs if name.startswith("vae ")]) >= 20


@pytest.mark.parametrize("table", study.PAPER)
def test_the_papers_commands_parse_and_their_flags_fit(table):
    for _, expected, commands in study.paper_commands(table):
        assert float(expected.split(" / ")[0]) > 1
        for command in commands:
            words = words_of(command)
            args = PARSERS[words[0]].parse_arguments(words[1:])
            assert words[0] != "train_sit.py" or args.size in ("B", "XL") and args.repa == 0.5


def test_attributes_are_in_awa2s_form(tmp_path):
    for name in study.CLASSES:
        os.makedirs(tmp_path / "train" / name)
        for i in range(10):
            (tmp_path / "train" / name / f"{i}.png").write_bytes(b"x")
    study.write_attributes(str(tmp_path), str(tmp_path / "out"))
    args = probe.parse_arguments([])
    bench = read_awa2(str(tmp_path / "out" / "attributes"), args)
    horse = bench.targets[[n.startswith("horse/") for n in bench.names]][0]
    assert bench.attributes == list(study.ATTRIBUTES) and {a for a, v in zip(bench.attributes, horse) if v} == {
        "animal", "four_legs", "hooves", "fur", "carries_people", "larger_than_a_man"}


def test_report_has_means_intervals_and_speed_up(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.makedirs("out/samples")
    for vae, shift in (("plain", 1.0), ("send", 0.0)):
        for seed in range(3):
            for n in (100, 200, 300):
                value = 5 - n / 100 + shift + 0.1 * seed
                with open(f"out/samples/{vae}_{seed}_{n}.json", "w") as file:
                    json.dump(dict(classifier=value, target=value, settings=dict(sit_step=n)), file)
    with open("out/samples/send_0_300.json") as file:
        wrong = dict(json.load(file), settings=dict(sit_step=100))
    with open("out/samples/send_3_300.json", "w") as file:  # drawn from another step: must not count
        json.dump(wrong, file)
    args = study.parse_arguments([])
    study.report(args, "out", dict(base=1, tune=1, points=(100, 200, 300)), "out/R.md")
    text = open("out/R.md").read()
    assert "| plain | 3.1 ± 0.25 (3) |" in text             # t(0.975, 2) 4.303 * std 0.1 / sqrt(3)
    assert "difference 1 [0.773, 1.23]; the direction agrees" in text
    assert "of step 300 at step 200: 1.50 times faster" in text
    assert "## 2. Noise injection\n\nNot measured yet" in text


def test_classifier_and_distances(tmp_path, monkeypatch):
    """Two classes that differ in brightness are learned, and a set's distance from itself is nothing, from another much."""
    from PIL import Image
    rng = np.random.default_rng(0)
    for part in ("train", "test"):
        for label, name in enumerate("ab"):
            os.makedirs(tmp_path / part / name)
            for i in range(200):
                pixels = rng.integers(128 * label, 128 + 128 * label, (16, 16, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / part / name / f"{i}.png")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["judge", "classifier", "--data", ".", "--out", "c.pt", "--size", "16", "--workers", "0"])
    judge.main()
    net = judge.load_classifier("c.pt")
    assert judge.read_weights("c.pt")[0]["accuracy"] > 0.9
    x = np.stack([np.asarray(Image.open(f"test/a/{i}.png")) for i in range(200)])
    np.savez("a.npz", arr_0=x, labels=np.zeros(200, np.int64))
    pictures = judge.fid.Pictures("a.npz")
    found = [net(images)[1] for _, images in pictures.batches(judge.torch.device("cpu"), 0)]
    a = judge.torch.cat(found).detach()
    stub = judge.Judge.__new__(judge.Judge)
    stub.real = dict(classifier=a, target=a)
    assert stub.distances(dict(classifier=a, target=a))["classifier"] < 1e-6
    assert stub.distances(dict(classifier=a + 1, target=a))["classifier"] == pytest.approx(128, rel=1e-4)
