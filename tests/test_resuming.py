"""On which data and with which flags a run may be resumed: what has changed is refused or said."""

import functools
import glob
import os
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

import sample
import train_sit
import train_vae
from common import runs
from common.files import UserError, load_strictly, read_weights, write_weights
from common.pictures import ImageSet
from common.runs import resume, save_checkpoint, training_state
from common.weights import load_sit
from conftest import PLAIN_VAE, SIT, VAE as VAE_FLAGS, refused, script
from fid import Pictures
from models import VAE, PatchDiscriminator
from probing.benchmarks import read_folder
from tools import caches
from tools.pictures import draw_pictures

NO_SUMS = SimpleNamespace(sums=lambda: dict(bad_steps=0, sums={}, counts={}))


@pytest.fixture
def folder(inside, pictures):
    """p/{a,b}/ below the current folder, a copy that a test may change."""
    shutil.copytree(pictures, "p")
    return "p"


def flags(stage=train_sit, *words):
    data = [] if "--data" in words else ["--data", "p"]
    return stage.parse_arguments([*data, "--out", "run", *words])


def save_run(args, data, old=False):
    """Leaves a checkpoint of step 3. old: as versions did that recorded no pictures."""
    state = training_state(dict(net=torch.nn.Linear(1, 1)), 3, args, NO_SUMS, data)
    if old:
        del state["data"]
    save_checkpoint(args.out, 3, state)


def resume_run(args, data, labelled=True):
    parts = dict(net=torch.nn.Linear(1, 1))
    free = train_vae.FREE | train_sit.FREE
    return resume(args, free, parts, 10, torch.device("cpu"), data, labelled)


def test_the_same_pictures_under_another_spelling(folder, capsys):
    save_run(flags(), ImageSet("p"))
    shutil.move("p", "elsewhere")
    os.symlink("elsewhere", "link")
    for spelling in ("elsewhere", "./elsewhere/", os.path.abspath("elsewhere"), "link"):
        args = flags(train_sit, "--data", spelling)
        assert resume_run(args, ImageSet(spelling))[0] == 3
    assert "note" not in capsys.readouterr().out


def test_other_pictures_are_refused_unless_they_are_wanted(folder, capsys):
    save_run(flags(), ImageSet("p"))
    shutil.copy("p/a/00.png", "p/b/new.png")
    for labelled in (False, True):
        with pytest.raises(
            UserError, match=r"the pictures were 24 with .* now 25 with .* --change"
        ):
            resume_run(flags(), ImageSet("p"), labelled)
    args = flags(train_sit, "--change", "data")
    assert resume_run(args, ImageSet("p"))[0] == 3
    assert "changed   the pictures were 24 with" in capsys.readouterr().out


def test_other_classes_are_refused_by_name(folder):
    """Their labels would mean something else."""
    save_run(flags(), ImageSet("p"))
    os.rename("p/a", "p/z")
    args = flags(train_sit, "--change", "data")
    with pytest.raises(UserError, match="other classes: 'a' of its 2 are gone, 'z' of the 2 in p"):
        resume_run(args, ImageSet("p"))
    # Stage 1 has no labels.
    assert resume_run(args, ImageSet("p"), labelled=False)[0] == 3


def number_the_classes():
    """Gives p/ the classes 0, 10 and 9, and returns the order that older versions gave them."""
    shutil.move("p/a", "p/10")
    shutil.move("p/b", "p/9")
    shutil.copytree("p/9", "p/0")
    return ["0", "10", "9"]


@pytest.mark.parametrize("recorded", ["checkpoint", "weights"])
def test_classes_keep_their_labels(folder, capsys, recorded):
    """Versions that sorted numbers as text recorded the classes in sit.safetensors alone."""
    old_order = number_the_classes()
    data = ImageSet("p")
    labels = data.labels
    assert data.classes == ["0", "9", "10"]
    data.classes = old_order
    if recorded == "checkpoint":
        save_run(flags(), data)
    else:
        save_run(flags(), data, old=True)
        info = dict(classes=old_order)
        write_weights("run/sit.safetensors", "sit", {"x": torch.zeros(1)}, {}, info)

    data = ImageSet("p")
    assert resume_run(flags(), data)[0] == 3
    assert data.classes == old_order
    assert data.labels.tolist() == [{0: 0, 1: 2, 2: 1}[label] for label in labels.tolist()]
    output = capsys.readouterr().out
    assert "note: the labels are those of before, in the order 0, 10, 9" in output
    assert ("is of an older version" in output) == (recorded == "weights")


def test_an_older_checkpoint_elsewhere_is_not_taken_for_the_same(folder):
    save_run(flags(), ImageSet("p"), old=True)
    assert resume_run(flags(train_sit, "--data", "./p/"), ImageSet("p"))[0] == 3
    shutil.move("p", "other")
    with pytest.raises(UserError, match="the pictures were p, and are now other"):
        resume_run(flags(train_sit, "--data", "other"), ImageSet("other"))


@pytest.mark.parametrize("stage", [train_vae, train_sit])
def test_a_flag_changes_by_leave_only(stage, folder, capsys):
    data = ImageSet("p")
    save_run(flags(stage, "--lr", "0.1", "--clip", "1"), data)
    words = ["--lr", "0.01", "--clip", "2"]
    with pytest.raises(UserError, match=r"--lr was 0\.1 and is now 0\.01; --clip was"):
        resume_run(flags(stage, *words), data, labelled=False)
    with pytest.raises(UserError, match=r"other settings: --lr was"):
        resume_run(flags(stage, *words, "--change", "clip"), data, labelled=False)
    with pytest.raises(UserError, match="--change learning_rate: there is no such flag"):
        resume_run(flags(stage, *words, "--change", "learning-rate"), data, labelled=False)
    capsys.readouterr()
    args = flags(stage, *words, "--change", "lr", "clip")
    assert resume_run(args, data, labelled=False)[0] == 3
    assert "changed   --lr was 0.1 and is now 0.01" in capsys.readouterr().out


def test_the_stages_record_and_compare(folder, capsys, monkeypatch):
    """Both stages, as commands: the second one refuses a renamed class, and trains on with another
    learning rate, which the next checkpoint records."""
    script(train_vae, *PLAIN_VAE, "--data", "p", "--steps", 1)
    words = [*SIT, "--repa", 0, "--data", "p"]
    script(train_sit, *words, "--steps", 1)
    script(train_sit, *words, "--steps", 2, "--lr", 1e-4, "--change", "lr")
    script(train_sit, *words, "--steps", 3, "--lr", 1e-4)
    latents = glob.glob("runs/vae/latents-*")
    os.rename("p/a", "p/z")
    assert "'a' of its 2 are gone" in refused(capsys, train_sit, *words, "--lr", 1e-4)
    # Before hours were spent on their latents, or on decoding them.
    assert glob.glob("runs/vae/latents-*") == latents
    monkeypatch.setattr(train_vae, "decode_all", lambda *_: pytest.fail("decoded"))
    words = [*PLAIN_VAE, "--data", "p", "--steps", 2, "--check-data"]
    assert "runs/vae holds a run on other data" in refused(capsys, train_vae, *words)


# --------------------------------------------------------------------------------------------------
# Flags that name files: what counts is what the files hold


class Distance(torch.nn.Linear):
    """Stands for LPIPS, whose weights are large."""

    def __init__(self, weights, rescale):
        super().__init__(1, 1)
        load_strictly(self, read_weights(*weights)[0], weights)


# {flag of stage 1: a network whose weights it takes}
NETWORKS = {
    "vfm-weights": functools.partial(timm.create_model, "test_vit"),
    "lpips-weights": functools.partial(torch.nn.Linear, 1, 1),
    "init": functools.partial(VAE, "f4d4", 32, 32, [1, 1, 1], 1),
    "init-disc": PatchDiscriminator,
}


def write_network(flag, seed, path):
    torch.manual_seed(seed)
    network = NETWORKS[flag]()
    if flag == "init":
        write_weights(path, "vae", network.state_dict(), network.config, {})
    else:
        torch.save(network.state_dict(), path)
    return path


def built(paths, *words):
    """The flags of stage 1 with files, {flag: path}, after it has built its networks."""
    files = [word for flag, path in paths.items() for word in (f"--{flag}", path)]
    args = flags(train_vae, *map(str, VAE_FLAGS), "--lpips", "1", *files, *words)
    train_vae.build_networks(args, torch.device("cpu"), "fp32")
    return args


def test_another_file_is_refused_and_the_same_one_elsewhere_is_not(folder, monkeypatch, capsys):
    monkeypatch.setattr(train_vae, "LPIPS", Distance)
    data = ImageSet("p")
    own = {flag: write_network(flag, 0, f"{flag}.file") for flag in NETWORKS}
    os.mkdir("elsewhere")
    copies = {flag: shutil.copy(path, "elsewhere") for flag, path in own.items()}
    others = {flag: write_network(flag, 1, f"other-{flag}.file") for flag in NETWORKS}
    save_run(built(own), data)

    assert resume_run(built(copies), data, labelled=False)[0] == 3
    assert "changed" not in capsys.readouterr().out
    with pytest.raises(UserError) as refusal:
        resume_run(built(others), data, labelled=False)
    for flag in NETWORKS:
        before = f"--{flag} was {flag}.file with the hash "
        assert re.search(
            f"{before}.* and is now other-{flag}.file with the hash", str(refusal.value)
        )
    args = built(others, "--change", *NETWORKS)
    assert resume_run(args, data, labelled=False)[0] == 3
    assert capsys.readouterr().out.count("changed   --") == len(NETWORKS)


def test_a_checkpoint_without_hashes_of_files_resumes(folder, capsys):
    save_run(flags(train_vae, "--init", "gone.file"), ImageSet("p"))
    args = flags(train_vae, "--init", "other.file")
    args.init_hash = "0123456789abcdef"
    assert resume_run(args, ImageSet("p"), labelled=False)[0] == 3


def test_other_weights_of_the_vision_model_in_stage_2(folder, capsys):
    """As a command: the weights that it began with do not matter to the VAE."""
    own, other = (write_network("vfm-weights", seed, f"{seed}.pth") for seed in (0, 1))
    script(train_vae, *PLAIN_VAE, "--data", "p", "--steps", 1)
    words = [*SIT, "--data", "p", "--vfm-weights"]
    script(train_sit, *words, own, "--steps", 1)
    message = refused(capsys, train_sit, *words, other, "--steps", 2)
    assert "--vfm-weights was 0.pth with the hash" in message
    script(train_sit, *words, shutil.copy(own, "same.pth"), "--steps", 2)
    script(train_sit, *words, other, "--steps", 3, "--change", "vfm-weights")
    assert "changed   --vfm-weights was same.pth" in capsys.readouterr().out


def test_what_is_measured_may_change_but_is_said(folder, capsys):
    data = ImageSet("p")
    before = flags(train_vae, "--val", "p", "--probe-data", "d", "--fid-ref", "f.npz")
    before.val_hash = "0"
    save_run(before, data)
    after = flags(train_vae, "--val", "p2", "--probe-data", "d/", "--fid-ref", "g.npz")
    after.val_hash = "1"
    resume_run(after, data, labelled=False)
    said = re.findall("^changed   (.*)$", capsys.readouterr().out, re.MULTILINE)
    assert sorted(said) == [
        "--fid-ref was f.npz and is now g.npz",
        "--val was p with the hash 0 and is now p2 with the hash 1",
    ]


# --------------------------------------------------------------------------------------------------
# Folders that are given by mistake


def test_a_run_without_its_checkpoints_is_not_written_over(folder):
    """A copy of a run often lacks them, since they are large."""
    data = ImageSet("p")
    save_run(flags(), data)
    write_weights("run/sit.safetensors", "sit", {"x": torch.zeros(1)}, {}, {})
    shutil.rmtree("run/checkpoints")
    with pytest.raises(UserError, match=r"run/sit\.safetensors is there without the folder check"):
        resume_run(flags(), data)
    assert resume_run(flags(train_sit, "--overwrite"), data) == (0, None)
    # What a kill in the first save leaves is no copy.
    os.mkdir("run/checkpoints")
    assert resume_run(flags(), data) == (0, None)


def test_each_stage_has_a_folder_of_its_own(folder):
    """--overwrite removed the checkpoints of the other one."""
    data = ImageSet("p")
    save_run(flags(train_vae), data)
    write_weights("run/vae.safetensors", "vae", {"x": torch.zeros(1)}, {}, {})
    for words in ([], ["--overwrite"]):
        with pytest.raises(UserError, match=r"of the other stage \(vae\.safetensors"):
            resume_run(flags(train_sit, *words), data)
    assert resume_run(flags(train_vae), data, labelled=False)[0] == 3


@pytest.mark.parametrize("out", ["p", "./p/runs/x", "link/runs"])
def test_a_run_in_the_folder_of_its_pictures_is_refused(out, folder):
    """Its grids would be pictures of the data at the next start."""
    os.symlink("p", "link")
    with pytest.raises(UserError, match=f"--out {out} is in the folder of --data p"):
        resume_run(flags(train_sit, "--out", out), ImageSet("p"))
    assert resume_run(flags(train_sit, "--out", "p/.runs/x"), ImageSet("p")) == (0, None)


def test_latents_in_a_folder_that_cannot_be_written_are_used(folder, monkeypatch):
    """Such as those of a VAE that a group shares."""
    script(train_vae, *PLAIN_VAE, "--data", "p", "--steps", 1)
    words = [*SIT, "--repa", 0, "--data", "p", "--steps", 1]
    script(train_sit, *words, "--out", "one")
    lock = runs.lock

    def refuse(folder, wait=False):
        assert "latents" not in folder
        return lock(folder, wait)

    monkeypatch.setattr(runs, "lock", refuse)
    for name in ("latents.npy", "done.npy"):
        os.chmod(glob.glob(f"runs/vae/latents-*/{name}")[0], 0o444)
    script(train_sit, *words, "--out", "two")


# --------------------------------------------------------------------------------------------------
# Other things that are kept and used again


def test_stage_2_at_another_resolution_than_the_vae(folder, capsys):
    """The pictures have 40 pixels at their shorter side; the VAE is one for 64."""
    script(train_vae, *PLAIN_VAE, "--data", "p", "--steps", 1, "--resolution", 64)
    note = "note: some pictures are smaller than 64 pixels (the smallest 40) and are enlarged"
    assert note in capsys.readouterr().out
    words = [*SIT, "--repa", 0, "--data", "p", "--steps", 1]
    script(train_sit, *words, "--out", "large")
    assert note in capsys.readouterr().out
    script(train_sit, *words, "--resolution", 32, "--out", "small")
    assert "enlarged" not in capsys.readouterr().out
    assert load_sit("large").latent_size == 16
    assert load_sit("small").latent_size == 8
    for run, size in (("large", 64), ("small", 32)):
        script(sample, "--sit", run, "--num", 4, "--steps", 2, "--precision", "fp32")
        with np.load(f"{run}/samples.npz") as file:
            assert file["arr_0"].shape == (4, size, size, 3)
            assert file["classes"].tolist() == ["a", "b"]
    assert Pictures("small/samples.npz").record["labels"]["names"] == ["a", "b"]
    message = refused(capsys, train_sit, *words, "--resolution", 30, "--out", "odd")
    assert "resolution 30 is not divisible by the VAE's factor 4" in message


def test_features_of_pictures_that_were_written_over_are_not_used_again(inside):
    """Benchmarks and references are found by what their files hold, not by where they are."""
    draw_pictures("d", size=16, per_class=20)
    path = glob.glob("d/train/*/*")[0]
    save_with_text(path, "0")
    size = os.path.getsize(path)
    args = SimpleNamespace(
        data=["d"],
        task=["attributes", "classes"],
        train_images=10**6,
        test_images=10**6,
        seed=0,
        skip_missing=False,
    )
    before = [benchmark.fingerprint for benchmark in read_folder("d", args)]
    reference = Pictures("d/train", size=16).record["hash"]
    shutil.copytree("d", "copy")
    assert [benchmark.fingerprint for benchmark in read_folder("copy", args)] == before
    assert Pictures("copy/train", size=16).record["hash"] == reference

    save_with_text(path, "1")
    assert os.path.getsize(path) == size
    after = [benchmark.fingerprint for benchmark in read_folder("d", args)]
    assert len(after) == len(before) == 2
    assert not set(after) & set(before)
    assert Pictures("d/train", size=16).record["hash"] != reference


def save_with_text(path, text):
    """Writes a PNG anew, with a text in it."""
    info = PngInfo()
    info.add_text("number", text)
    Image.open(path).save(path, pnginfo=info)


def test_old_latents_are_listed_and_removed(folder, capsys):
    script(train_vae, *PLAIN_VAE, "--data", "p", "--steps", 1)
    words = [*SIT, "--repa", 0, "--data", "p", "--steps", 1]
    script(train_sit, *words, "--out", "one")
    [of_before] = glob.glob("runs/vae/latents-*")
    save_with_text("p/a/00.png", "other pictures")
    script(train_sit, *words, "--out", "two")
    [in_use] = set(glob.glob("runs/vae/latents-*")) - {of_before}
    os.makedirs("elsewhere/latents-aaaaaaaa-bbbbbbbb-fp32")
    shutil.copy(f"{in_use}/latents.npy", "elsewhere/latents-aaaaaaaa-bbbbbbbb-fp32")
    capsys.readouterr()

    script(caches, "--cache", "elsewhere")
    lines = {line.split()[3]: line for line in capsys.readouterr().out.splitlines()[:-1]}
    assert lines[of_before].endswith("old: of pictures that runs/cache does not know")
    assert "old" not in lines[in_use]
    assert "older version" in lines["elsewhere/latents-aaaaaaaa-bbbbbbbb-fp32"]

    script(caches, "--remove-old")
    assert glob.glob("runs/vae/latents-*") == [in_use]
    assert f"removed   {of_before}" in capsys.readouterr().out
    assert "no folder of latents" in refused(capsys, caches, "--remove", "p")
    shutil.copy("p/a/00.png", in_use)
    assert "'00.png', which is not ours" in refused(capsys, caches, "--remove", in_use)
    os.remove(f"{in_use}/00.png")
    script(train_vae, *PLAIN_VAE, "--data", "p", "--steps", 1, "--seed", 1, "--overwrite")
    capsys.readouterr()
    script(caches)
    assert "old: of another VAE" in capsys.readouterr().out
    script(caches, "--remove", in_use)
    assert not os.path.exists(in_use)
