"""Every recipe of docs/forking.md is applied to a copy of the repository and run there, so that the
page stays true."""

import ast
import csv
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.models import resnet18

from conftest import ROOT, SIT, VAE

PAGE = pathlib.Path(ROOT, "docs", "forking.md")
FILES = ["models.py", "train_vae.py", "train_sit.py", "sample.py", "fid.py", "probe.py"]
# The tiny VAE of the tests without a vision model and a discriminator, and without its spec.
PLAIN_VAE = [*VAE, "--align", "none", "--gan", 0, "--steps", 3]


def recipes():
    """{title: diff} of the page."""
    found = {}
    for section in PAGE.read_text().split("\n## ")[1:]:
        title = section.split("\n", 1)[0]
        found[title] = "".join(
            re.findall(r"^```diff\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)
        )
    return found


@pytest.fixture
def fork(tmp_path):
    """A function that applies a recipe to a fresh copy of the stages and returns its folder."""

    def apply(title):
        folder = tmp_path / "fork"
        folder.mkdir()
        for name in FILES:
            shutil.copy(os.path.join(ROOT, name), folder)
        for name in ("common", "probing"):
            shutil.copytree(os.path.join(ROOT, name), folder / name)
        done = subprocess.run(
            ["git", "apply", "-"],
            cwd=folder,
            input=recipes()[title],
            text=True,
            capture_output=True,
        )
        assert done.returncode == 0, done.stderr
        return folder

    return apply


def run(folder, stage, *words):
    done = subprocess.run(
        [sys.executable, f"{stage}.py", *map(str, words)],
        cwd=folder,
        capture_output=True,
        text=True,
        env=dict(os.environ, OMP_NUM_THREADS="1"),
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def metrics(folder, run_folder):
    """The lines of losses in a run's metrics.jsonl."""
    lines = pathlib.Path(folder, run_folder, "metrics.jsonl").read_text().splitlines()
    return [line for line in map(json.loads, lines) if "epoch" in line]


def test_the_page_has_a_recipe_for_each_of_these():
    assert set(recipes()) == {
        "A loss term",
        "Another data source",
        "Another vision model, not in timm",
        "Another VAE spec",
        "Another sampler",
        "A second dataset's attributes for the probe",
    }


def test_a_loss_term_is_trained_and_logged_by_its_name(fork, pictures):
    folder = fork("A loss term")
    run(folder, "train_vae", *PLAIN_VAE, "--data", pictures, "--edges", 1, "--out", "with")
    run(folder, "train_vae", *PLAIN_VAE, "--data", pictures, "--out", "without")
    with_term = metrics(folder, "with")
    without = metrics(folder, "without")
    assert len(with_term) == len(without) == 3
    assert all(line["edges"] > 0 for line in with_term)
    assert not any("edges" in line for line in without)
    # The first losses are of the same weights; the gradient is not.
    for term in ("recon", "kl"):
        assert with_term[0][term] == pytest.approx(without[0][term], rel=1e-5)
    assert with_term[0]["grad_norm"] != pytest.approx(without[0]["grad_norm"], rel=1e-3)


def test_a_loss_term_touches_its_stage_in_two_places():
    diff = recipes()["A loss term"]
    assert diff.count("\n@@") == 2
    assert re.findall(r"^\+\+\+ (.*)$", diff, re.MULTILINE) == ["b/train_vae.py"]


def test_a_loss_term_that_is_not_finite_stops_the_run_and_is_named(fork, pictures):
    folder = fork("A loss term")
    words = [*PLAIN_VAE, "--data", pictures, "--edges", 1, "--max-bad-steps", 1]
    stage = folder / "train_vae.py"
    stage.write_text(
        stage.read_text().replace("across = F.l1_loss", "across = torch.nan * F.l1_loss")
    )
    done = subprocess.run(
        [sys.executable, "train_vae.py", *map(str, words)],
        cwd=folder,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert "(edges, grad_norm)" in done.stderr
    assert "Traceback" not in done.stderr


def test_another_data_source_trains_both_stages(fork, pictures):
    folder = fork("Another data source")
    files = sorted(pictures.rglob("*.png"))
    np.savez(
        folder / "pictures.npz",
        images=np.stack([np.asarray(Image.open(file)) for file in files]),
        labels=np.array([ord(file.parent.name) - ord("a") for file in files]),
        classes=np.array(["a", "b"]),
    )
    said = run(folder, "train_vae", *PLAIN_VAE, "--data", "pictures.npz")
    assert "24 pictures in 2 classes, pictures.npz" in said
    run(folder, "train_sit", *SIT, "--data", "pictures.npz", "--repa", 0, "--steps", 3)
    # The same pictures from their folder give the same losses.
    shutil.copy(os.path.join(ROOT, "train_vae.py"), folder)
    run(folder, "train_vae", *PLAIN_VAE, "--data", pictures, "--out", "from_folder")
    for array, files in zip(
        metrics(folder, "runs/vae"), metrics(folder, "from_folder"), strict=True
    ):
        assert array["recon"] == files["recon"]


def test_another_vision_model_is_aligned_to(fork, pictures):
    folder = fork("Another vision model, not in timm")
    torch.manual_seed(0)
    torch.save(resnet18().state_dict(), folder / "resnet18.pth")
    words = [*VAE, "--data", pictures, "--gan", 0, "--steps", 3]
    run(folder, "train_vae", *words, "--vfm-weights", "resnet18.pth")
    losses = metrics(folder, "runs/vae")
    assert len(losses) == 3
    assert all(0 < line["align"] < 2 for line in losses)


def test_another_vae_spec_trains(fork, pictures):
    folder = fork("Another VAE spec")
    words = ["--resolution", 64, "--spec", "f64d8", "--ch", 8, "--num-res-blocks", 1]
    common_words = ["--align", "none", "--lpips", 0, "--gan", 0, "--batch-size", 4, "--workers", 0]
    said = run(folder, "train_vae", "--data", pictures, "--steps", 2, *words, *common_words)
    assert "latents 8x1x1" in said


def test_another_sampler_draws(fork, pictures, tmp_path):
    folder = fork("Another sampler")
    run(folder, "train_vae", *PLAIN_VAE, "--data", pictures)
    run(folder, "train_sit", *SIT, "--data", pictures, "--repa", 0, "--steps", 3)
    words = ["--num", 4, "--steps", 4, "--cfg", 1, "--precision", "fp32"]
    run(folder, "sample", *words, "--sampler", "midpoint", "--out", "midpoint.npz")
    # Many Euler steps approach the same solution as the midpoint rule.
    words[3] = 200
    run(folder, "sample", *words, "--sampler", "ode", "--out", "euler.npz")
    with np.load(folder / "midpoint.npz") as midpoint, np.load(folder / "euler.npz") as euler:
        difference = np.abs(midpoint["arr_0"].astype(int) - euler["arr_0"].astype(int))
    assert difference.mean() < 2


def write_birds(root):
    """Writes 40 pictures in the form of CUB-200-2011, red ones and blue ones, light and dark, of
    which the last ten are the test split. That the last one is light is "not visible"."""
    lists = {"images": [], "train_test_split": [], "attributes/image_attribute_labels": []}
    for i in range(40):
        is_red = i % 2
        is_light = i // 2 % 2
        name = f"{i % 4 + 1:03d}.Bird/Bird_{i:04d}.jpg"
        level = 100 + 120 * is_light + i % 10
        colour = (level, 0, 0) if is_red else (0, 0, level)
        path = root / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 36), colour).save(path)
        lists["images"].append(f"{i + 1} {name}")
        lists["train_test_split"].append(f"{i + 1} {int(i < 30)}")
        certainty = 1 if i == 39 else 4
        lists["attributes/image_attribute_labels"] += [
            f"{i + 1} 1 {is_red} 3 1.5",
            f"{i + 1} 2 {is_light} {certainty} 2.25",
        ]
    (root / "attributes").mkdir()
    for name, lines in lists.items():
        (root / f"{name}.txt").write_text("\n".join(lines) + "\n")
    # The archive has this file beside the folder.
    (root.parent / "attributes.txt").write_text("1 has_colour::red\n2 has_shade::light\n")


def test_a_second_dataset_s_attributes_are_probed(fork, pictures):
    folder = fork("A second dataset's attributes for the probe")
    write_birds(folder / "cub")
    run(folder, "train_vae", *PLAIN_VAE, "--data", pictures)
    run(folder, "probe", "--data", "cub", "--pictures", 0, "--workers", 0)
    result = json.loads((folder / "runs" / "probe" / "result.json").read_text())
    assert result["benchmarks"]["cub"]["pictures"] == [27, 3, 10]
    assert result["benchmarks"]["cub"]["attributes"] == 2
    # The colours are planted, so a line finds them; what is most frequent tells little.
    scores = result["results"]["cub"]["F1 macro"]
    assert scores["runs/vae"][0] > 0.9
    assert scores["majority"][0] < 0.8
    with open(folder / "runs" / "probe" / "cub-runs-vae.csv", newline="") as file:
        attributes = {line["attribute"]: line for line in csv.DictReader(file)}
    assert set(attributes) == {"has_colour::red", "has_shade::light"}
    assert attributes["has_colour::red"]["test_positives"] == "5"
    # Six are light, of which one is not visible, so unknown.
    assert attributes["has_shade::light"]["test_positives"] == "5"


def count_lines(path, names):
    """Lines of the functions `names` (with a class before a dot) in a file, decorators included."""
    lengths = {}

    def visit(parent, prefix):
        for node in parent.body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
                lengths[prefix + node.name] = node.end_lineno - first + 1
            if isinstance(node, ast.ClassDef):
                visit(node, f"{node.name}.")

    visit(ast.parse(pathlib.Path(ROOT, path).read_text()), "")
    return sum(lengths[name] for name in names)


def test_a_step_is_read_in_the_lines_that_the_design_page_states():
    """docs/design.md lists the functions of one training step: at most 150 lines in two files."""
    page = pathlib.Path(ROOT, "docs", "design.md").read_text()
    rows = re.findall(r"^\| \d, `(\w+\.py)` \| (.*?) \| (.*?) \| (\d+) \|$", page, re.MULTILINE)
    assert [stage for stage, *_ in rows] == ["train_vae.py", "train_sit.py"]
    shared = re.findall(r"`([\w.]+)`", rows[0][2])
    for stage, own, _, stated in rows:
        lines = count_lines(stage, re.findall(r"`([\w.]+)`", own))
        lines += count_lines("common/training.py", shared)
        assert lines == int(stated) <= 150, (stage, lines)
