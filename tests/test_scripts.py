"""The scripts themselves: two processes = one, resumed = uninterrupted, any batch size = the same pictures, and each
mistake a user can make = one sentence and exit code 2."""

import glob
import json
import os
import resource
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import common.pictures as pictures_module
from common.draws import normal
from common.pictures import ImageSet, from_uint8, load_image, to_uint8
from common.runs import list_checkpoints, load_checkpoint, save_checkpoint
from common.weights import load_sit, load_vae
import sample
import train_sit
import train_vae
from conftest import (
    ROOT,
    SIT,
    VAE,
    kill_all_in,
    processes_in,
    refused,
    same_state,
    script,
    start,
    torchrun,
    wait_for,
)


def losses(folder, keys):
    with open(os.path.join(folder, "metrics.jsonl")) as file:
        lines = [json.loads(line) for line in file]
    return np.array([[line[k] for k in keys] for line in lines if keys[0] in line])


@pytest.fixture(scope="module")
def trained(pictures, vfm_weights, tmp_path_factory):
    """Folder in which a VAE (with GAN and alignment) and a SiT (with REPA) were trained for a few steps."""
    folder = tmp_path_factory.mktemp("trained")
    before = os.getcwd()
    os.chdir(folder)
    script(
        train_vae,
        *VAE,
        "--data",
        pictures,
        "--vfm-weights",
        vfm_weights,
        "--steps",
        4,
        "--val",
        pictures,
    )
    script(train_sit, *SIT, "--data", pictures, "--vfm-weights", vfm_weights, "--steps", 4)
    os.chdir(before)
    return folder


# ---- invariants ------------------------------------------------------------------------------------------------------


def test_two_processes_give_the_losses_and_pictures_of_one(pictures, vfm_weights, tmp_path):
    """The second stage runs on the first process's VAE both times, since a VAE's hash is of its exact bytes. With the GAN,
    whose kinks and batch norms over few pictures enlarge an error, float32's rounding (1e-7) has become 1e-2 after twenty steps;
    that it is rounding float64 shows, in which twenty steps agree to 1e-10 (to 1e-14, when it was measured)."""
    small = ["--lr", "1e-4"]
    for n in (1, 2):
        words = [*VAE, "--data", pictures, "--vfm-weights", vfm_weights, *small]
        torchrun(
            n, "train_vae", *words, "--steps", 20, "--gan", 0, "--out", f"vae{n}", cwd=tmp_path
        )
        torchrun(n, "train_vae", *words, "--steps", 2, "--out", f"gan{n}", cwd=tmp_path)
        torchrun(n, "tests/in_float64", *words, "--steps", 20, "--out", f"double{n}", cwd=tmp_path)
        shutil.rmtree(tmp_path / "cache", ignore_errors=True)
        torchrun(
            n,
            "train_sit",
            *SIT,
            "--data",
            pictures,
            "--vfm-weights",
            vfm_weights,
            "--steps",
            20,
            *small,
            "--out",
            f"sit{n}",
            "--vae",
            "vae1",
            "--cache",
            "cache",
            cwd=tmp_path,
        )
        torchrun(
            n,
            "sample",
            "--sit",
            "sit1",
            "--num-images",
            7,
            "--steps",
            5,
            "--batch-size",
            2,
            "--precision",
            "fp32",
            "--out",
            f"samples{n}.npz",
            cwd=tmp_path,
        )
    keys = ["align", "recon", "kl", "grad_norm"]
    for name, steps, which in (("vae", 20, keys), ("gan", 2, keys + ["gan", "disc"])):
        one, two = (losses(tmp_path / f"{name}{n}", which) for n in (1, 2))
        assert one.shape == (steps, len(which))
        np.testing.assert_allclose(two, one, rtol=1e-5)
    one, two = (losses(tmp_path / f"double{n}", keys + ["gan", "disc"]) for n in (1, 2))
    assert one.shape == (20, 6)
    np.testing.assert_allclose(two, one, rtol=1e-10)
    one, two = (losses(tmp_path / f"sit{n}", ["flow", "repa", "grad_norm"]) for n in (1, 2))
    assert one.shape == (20, 3)
    np.testing.assert_allclose(two, one, rtol=1e-5)
    one, two = (np.load(tmp_path / f"samples{n}.npz")["arr_0"] for n in (1, 2))
    assert np.array_equal(one, two)


def test_resumed_is_uninterrupted_bit_for_bit(pictures, vfm_weights, inside):
    words = [*VAE, "--data", pictures, "--vfm-weights", vfm_weights, "--log-every", 3]
    script(train_vae, *words, "--steps", 8, "--out", "whole")
    script(train_vae, *words, "--steps", 5, "--out", "parts")
    with open(
        "parts/metrics.jsonl", "a"
    ) as file:  # what a run killed after its checkpoint leaves behind
        file.write('{"step": 6, "align": 0}\n{"step": 7, "ali')
    script(train_vae, *words, "--steps", 8, "--out", "parts")
    whole, parts = (load_checkpoint(f, "cpu") for f in ("whole", "parts"))
    for key in ("net", "ema", "disc"):
        assert all(torch.equal(whole[key][k], parts[key][k]) for k in whole[key])
    for a, b in zip(
        whole["optimizer"]["state"].values(), parts["optimizer"]["state"].values(), strict=True
    ):
        assert all(torch.equal(a[k], b[k]) for k in a)
    steps = [json.loads(line)["step"] for line in open("parts/metrics.jsonl")]
    assert steps == [3, 5, 6, 8] and steps.count(6) == 1

    words = [*SIT, "--data", pictures, "--vfm-weights", vfm_weights, "--vae", "whole"]
    script(train_sit, *words, "--steps", 6, "--out", "sit_whole")
    script(train_sit, *words, "--steps", 3, "--out", "sit_parts")
    script(train_sit, *words, "--steps", 6, "--out", "sit_parts")
    a, b = (load_sit(f).state_dict() for f in ("sit_whole", "sit_parts"))
    assert all(torch.equal(a[k], b[k]) for k in a)
    keys = ["flow", "repa", "grad_norm"]
    assert np.array_equal(losses("sit_whole", keys), losses("sit_parts", keys))


def test_a_cosine_schedule_resumes_too(pictures, inside):
    """What the optimiser keeps must be loadable without unpickling code, the learning rate included."""
    for module, words, load in (
        (train_vae, [*VAE, "--align", "none", "--gan", 0], load_vae),
        (train_sit, [*SIT, "--repa", 0, "--vae", "runs/vae"], load_sit),
    ):
        words = [
            *words,
            "--data",
            pictures,
            "--lr-schedule",
            "cosine",
            "--steps",
            4,
            "--save-every",
            2,
        ]
        script(module, *words)
        folder = "runs/" + module.__name__.removeprefix("train_")
        whole = load(folder).state_dict()
        os.remove(list_checkpoints(folder)[-1])
        assert load_checkpoint(folder, "cpu")["step"] == 2
        script(module, *words)
        assert len(list_checkpoints(folder)) == 2
        assert all(torch.equal(v, whole[k]) for k, v in load(folder).state_dict().items())


def test_pictures_do_not_depend_on_batch_size_or_interruption(trained, monkeypatch):
    monkeypatch.chdir(trained)
    words = ["--num", 10, "--steps", 6, "--precision", "fp32", "--seed", 3]
    script(sample, *words, "--batch-size", 10, "--out", "whole.npz")
    script(sample, *words, "--batch-size", 3, "--out", "small.npz")
    whole = np.load("whole.npz", allow_pickle=False)
    assert whole["arr_0"].shape == (10, 32, 32, 3) and whole["arr_0"].dtype == np.uint8
    assert (
        json.loads(str(whole["settings"]))["seed"] == 3 and whole["labels"].tolist() == [0, 1] * 5
    )
    difference = whole["arr_0"].astype(int) - np.load("small.npz")["arr_0"]
    assert (
        np.abs(difference).max() <= 1 and np.abs(difference).mean() < 0.01
    )  # matrix products round by their shape

    draw, calls = sample.draw, []

    def dies_in_the_third_batch(*arguments):
        calls.append(arguments[2].tolist())
        if len(calls) == 3:
            raise KeyboardInterrupt
        return draw(*arguments)

    monkeypatch.setattr(sample, "draw", dies_in_the_third_batch)
    with pytest.raises(SystemExit):
        script(sample, *words, "--batch-size", 3, "--out", "again.npz")
    script(sample, *words, "--batch-size", 3, "--out", "again.npz")
    assert calls == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [6, 7, 8], [9]]
    assert np.array_equal(np.load("again.npz")["arr_0"], np.load("small.npz")["arr_0"])
    assert not os.path.exists("again.npz.parts")


def test_accumulation_gives_the_same_sit(pictures, trained, inside):
    """SiT has no batch statistics: 1 x 8 and 4 x 2 pictures a step are one run."""
    words = [*SIT, "--data", pictures, "--vae", trained / "runs/vae", "--repa", 0, "--steps", 5]
    script(train_sit, *words, "--out", "a")
    script(train_sit, *words, "--out", "b", "--accum", 4)
    np.testing.assert_allclose(
        losses("a", ["flow", "grad_norm"]), losses("b", ["flow", "grad_norm"]), rtol=1e-5
    )


# ---- results ---------------------------------------------------------------------------------------------------------


def test_what_a_run_leaves_behind(trained, pictures, monkeypatch):
    monkeypatch.chdir(trained)
    vae, sit = load_vae("runs/vae"), load_sit("runs/sit")
    raw = load_sit("runs/sit", ema=False)
    assert (
        vae.info["step"] == 4
        and sit.info["vae_hash"] == vae.info["hash"]
        and sit.info["classes"] == ["a", "b"]
    )
    assert sit.num_classes == 2 and sit.info["weights"] == "ema" and raw.info["weights"] == "raw"
    assert any(
        not torch.equal(a, b) for a, b in zip(sit.state_dict().values(), raw.state_dict().values())
    )
    for path in ("runs/vae/samples/0000004.png", "runs/sit/samples/0000004.png"):
        assert Image.open(path).size[0] > 100
    assert {"commit", "torch", "device"} <= set(
        json.load(open("runs/vae/config.json"))["provenance"]
    )
    val = [json.loads(x) for x in open("runs/vae/metrics.jsonl")][-1]
    x = torch.stack([torch.from_numpy(load_image(p, 32)) for p in sorted(pictures.rglob("*.png"))])
    x = from_uint8(x.permute(0, 3, 1, 2))
    with torch.no_grad():
        mean, logvar = vae.encode(x)
        y = to_uint8(vae.decode(mean))
    mse = (y.double() - to_uint8(x)).square().mean((1, 2, 3))
    assert abs((10 * torch.log10(255**2 / mse)).mean() - val["val_psnr"]) < 1e-3
    z = vae.sample(
        mean.double(),
        logvar.double(),
        normal(0, "z", torch.arange(4000), mean.shape[1:])[:, None].double(),
    )
    assert torch.allclose(z.mean((0, 1, 3, 4)).float(), vae.latent_mean, atol=3e-3)
    assert torch.allclose(z.transpose(0, 2).flatten(1).std(1).float(), vae.latent_std, rtol=3e-3)
    n = vae.normalize(z.float())
    assert (
        torch.allclose(vae.denormalize(n), z.float(), atol=1e-5)
        and abs(n.mean()) < 1e-2
        and abs(n.std() - 1) < 1e-2
    )


def test_latent_cache_holds_posteriors_and_mirror_images(trained, pictures):
    (folder,) = glob.glob(f"{trained}/runs/vae/latents-*")
    cache = np.load(f"{folder}/latents.npy", mmap_mode="r")
    data = ImageSet(pictures)
    assert cache.shape == (24, 2, 2, 4, 8, 8) and cache.dtype == np.float16
    vae = load_vae(trained / "runs/vae")
    x = from_uint8(torch.from_numpy(data.load(5, 32).copy()).permute(2, 0, 1)[None])
    for side in (0, 1):
        with torch.no_grad():
            mean, logvar = vae.encode(x.flip(3) if side else x)
        np.testing.assert_allclose(cache[5, side, 0], mean[0], rtol=2e-3, atol=1e-3)
        np.testing.assert_allclose(cache[5, side, 1], (0.5 * logvar[0]).exp(), rtol=2e-3, atol=1e-3)


def test_latents_of_another_precision_are_another_cache(trained, pictures, inside):
    for precision in ("fp32", "bf16"):
        script(
            train_sit,
            *SIT,
            "--precision",
            precision,
            "--data",
            pictures,
            "--vae",
            trained / "runs/vae",
            "--repa",
            0,
            "--steps",
            1,
            "--cache",
            "cache",
            "--out",
            precision,
        )
    fp32, bf16 = (
        np.load(f"{folder}/latents.npy") for folder in sorted(glob.glob("cache/*"), reverse=True)
    )
    assert (fp32 != bf16).any() and np.abs(fp32 - bf16).max() < 0.1 * np.abs(fp32).max()


def test_repa_0_needs_no_pictures_once_latents_are_cached(trained, pictures, inside, monkeypatch):
    monkeypatch.setattr(pictures_module, "load_image", None)  # any attempt to open a picture fails
    script(
        train_sit,
        *SIT,
        "--data",
        pictures,
        "--vae",
        trained / "runs/vae",
        "--repa",
        0,
        "--steps",
        2,
    )
    assert load_sit("runs/sit").config["vfm_dim"] is None


def test_frozen_vae_stays_as_it_is(trained, pictures, vfm_weights, inside):
    script(
        train_vae,
        *VAE,
        "--data",
        pictures,
        "--vfm-weights",
        vfm_weights,
        "--steps",
        3,
        "--freeze",
        "--init",
        trained / "runs/vae",
        "--mapper-depth",
        0,
        "--no-noise",
    )
    a, b = load_vae(trained / "runs/vae").state_dict(), load_vae("runs/vae").state_dict()
    assert all(torch.equal(a[k], b[k]) for k in a if not k.startswith("latent_"))


def test_file_list_is_read_once_and_follows_changes(pictures, inside, monkeypatch):
    shutil.copytree(pictures, "p")
    first = ImageSet("p")
    monkeypatch.setattr(pictures_module, "check_picture", lambda path: pytest.fail("read again"))
    assert ImageSet("p").fingerprint == first.fingerprint
    monkeypatch.undo()
    os.chdir(inside)
    shutil.copy("p/a/00.png", "p/b/new.png")
    assert len(ImageSet("p")) == len(first) + 1 and ImageSet("p").fingerprint != first.fingerprint


def test_no_steps_at_all_leave_the_initial_weights_and_their_statistics(trained, pictures, inside):
    words = [
        *VAE,
        "--data",
        pictures,
        "--align",
        "none",
        "--gan",
        0,
        "--epochs",
        0,
        "--init",
        trained / "runs/vae",
    ]
    script(train_vae, *words)
    a, b = load_vae(trained / "runs/vae").state_dict(), load_vae("runs/vae").state_dict()
    assert (
        all(torch.equal(a[k], b[k]) for k in a if not k.startswith("latent_"))
        and b["latent_std"].min() > 0
    )
    script(train_sit, *SIT, "--data", pictures, "--vae", "runs/vae", "--repa", 0, "--epochs", 0)
    assert load_sit("runs/sit").info["step"] == 0


# ---- mistakes --------------------------------------------------------------------------------------------------------


def test_nothing_there_yet(inside, capsys):
    assert "data/imagenet/train: no such folder" in refused(capsys, train_vae)
    for module in (train_sit, sample):
        message = refused(capsys, module)
        assert "demo.py" in message and "train_" in message


def test_bad_folders(inside, pictures, capsys):
    os.makedirs("empty")
    assert "has no pictures" in refused(capsys, train_vae, "--data", "empty")
    shutil.copytree(pictures, "p/train")
    assert "name one of them" in refused(capsys, train_vae, "--data", "p")
    os.makedirs("p/train/c")
    assert f"p{os.sep}train{os.sep}c" in refused(capsys, train_vae, "--data", "p/train")


@pytest.mark.parametrize("kind", ["zero", "truncated", "text", "float"])
def test_bad_picture_is_named(kind, inside, pictures, capsys):
    shutil.copytree(pictures, "p")
    path = f"p/b/bad.{'tif' if kind == 'float' else 'png'}"
    whole = open("p/a/00.png", "rb").read()
    if kind == "float":
        Image.fromarray(np.random.rand(40, 40).astype(np.float32)).save(path)
    else:
        open(path, "wb").write(
            {"zero": b"", "truncated": whole[: len(whole) // 2], "text": b"hello"}[kind]
        )
    assert path.replace("/", os.sep) in refused(
        capsys, train_vae, *VAE, "--data", "p", "--align", "none", "--gan", 0
    )


def test_picture_damaged_in_the_middle_stops_the_run_and_keeps_checkpoints(inside, pictures):
    """Its head and tail are whole, so only training finds it; workers must hand the sentence on, and must end."""
    shutil.copytree(pictures, "p")
    words = [*VAE, "--data", "p", "--align", "none", "--gan", 0, "--workers", 1]
    torchrun(
        1, "train_vae", *words, "--steps", 2, cwd=inside
    )  # in a process of its own, as it holds the folder's lock
    data = bytearray(open("p/b/03.png", "rb").read())
    data[100:-20] = b"\xff" * (len(data) - 120)
    open("p/b/03.png", "wb").write(data)
    words = [sys.executable, os.path.join(ROOT, "train_vae.py"), *words, "--steps", 9]
    done = subprocess.run(list(map(str, words)), capture_output=True, text=True, timeout=300)
    assert (
        done.returncode == 2
        and "error: cannot read the picture" in done.stderr
        and "03.png" in done.stderr
    )
    assert "Traceback" not in done.stderr
    assert len(list_checkpoints("runs/vae")) == 1 and load_vae("runs/vae").info["step"] == 2


def test_sizes_and_batches(inside, pictures, capsys, vfm_weights):
    words = [*VAE, "--data", pictures, "--vfm-weights", vfm_weights]
    assert "30 is not divisible by the VAE's factor 4" in refused(
        capsys, train_vae, *words, "--resolution", 30
    )
    assert "--batch-size 8 is not divisible" in refused(capsys, train_vae, *words, "--accum", 3)
    assert "f3d4" in refused(capsys, train_vae, *words, "--spec", "f3d4")
    assert "patches of 3" in refused(capsys, train_vae, *words, "--mapper-patch", 3)


def test_numbers_that_mean_nothing(inside, pictures, capsys):
    for module, flag, value in (
        (train_vae, "--batch-size", 0),
        (train_vae, "--accum", 0),
        (train_vae, "--resolution", 0),
        (train_vae, "--seed", -1),
        (train_sit, "--save-every", 0),
        (train_sit, "--log-every", -2),
        (sample, "--n", 0),
    ):
        assert f"argument {flag}: {value} is less than {0 if flag == '--seed' else 1}" in refused(
            capsys, module, flag, value
        )
    assert "argument --steps: invalid positive value: 'many'" in refused(
        capsys, train_vae, "--steps", "many"
    )


def test_small_pictures_are_allowed_and_said(inside, pictures, capsys):
    script(
        train_vae,
        *VAE,
        "--data",
        pictures,
        "--align",
        "none",
        "--gan",
        0,
        "--steps",
        1,
        "--resolution",
        64,
    )
    assert capsys.readouterr().out.count("smaller than 64") == 1


def test_vision_models(inside, pictures, capsys, vfm_weights, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    words = [*VAE, "--data", pictures]
    assert "vit_base_patch14_dinov2" in refused(
        capsys, train_vae, *words, "--vfm", "vit_bas_patch14_dinov2"
    )
    assert "--vfm-weights" in refused(
        capsys, train_vae, *words, "--vfm", "vit_base_patch14_dinov2.lvd142m"
    )
    assert "no such file" in refused(capsys, train_vae, *words, "--vfm-weights", "nowhere")
    assert "test_resnet" in refused(
        capsys, train_vae, *words, "--vfm", "test_resnet", "--vfm-weights", vfm_weights
    )
    assert "no feature map at stride 3" in refused(capsys, train_vae, *words, "--vfm-stride", 3)
    torch.save({"a": print}, "code.pt")
    assert "code.pt" in refused(capsys, train_vae, *words, "--vfm-weights", "code.pt")


def test_wrong_checkpoints(inside, trained, pictures, capsys):
    words = [*SIT, "--data", pictures, "--repa", 0, "--steps", 1]
    sit = trained / "runs/sit/sit.safetensors"
    assert "is a sit checkpoint" in refused(capsys, train_sit, *words, "--vae", sit)
    open("cut.safetensors", "wb").write(open(sit, "rb").read()[:-100])
    assert "cut.safetensors cannot be read" in refused(
        capsys, train_sit, *words, "--vae", "cut.safetensors"
    )
    script(
        train_vae,
        *VAE,
        "--data",
        pictures,
        "--align",
        "none",
        "--gan",
        0,
        "--steps",
        1,
        "--seed",
        5,
    )
    message = refused(capsys, sample, "--sit", sit, "--vae", "runs/vae")
    assert (
        load_vae("runs/vae").info["hash"] in message and load_sit(sit).info["vae_hash"] in message
    )
    script(train_sit, *words, "--vae", trained / "runs/vae")
    message = refused(capsys, train_sit, *words, "--vae", "runs/vae", "--steps", 2)
    assert (
        f"--vae-hash was {load_sit(sit).info['vae_hash']} and is now {load_vae('runs/vae').info['hash']}"
        in message
    )


def test_sample_arguments(trained, capsys, monkeypatch):
    monkeypatch.chdir(trained)
    assert "0 to 1" in refused(capsys, sample, "--classes", 2)
    assert "0 to 1" in refused(capsys, sample, "--classes", "zebra")
    assert ".npz" in refused(capsys, sample, "--num", 4, "--out", "x.png")
    script(sample, "--classes", "b", 0, "--n", 2, "--steps", 3, "--out", "x.png")
    assert "a row each of b, a" in capsys.readouterr().out


def test_flags_that_contradict_the_checkpoint(inside, pictures, capsys):
    words = [*VAE, "--data", pictures, "--align", "none", "--gan", 0]
    script(train_vae, *words, "--steps", 1)
    message = refused(capsys, train_vae, *words, "--steps", 2, "--kl", 0.5)
    assert "--kl was 1e-06 and is now 0.5" in message
    script(train_vae, *words, "--steps", 2, "--kl", 0.5, "--overwrite")
    assert load_vae("runs/vae").info["arguments"]["kl"] == 0.5
    assert "holds no checkpoint" in refused(capsys, train_vae, *words, "--resume", "--out", "other")


def test_damaged_checkpoint_is_passed_by(inside, pictures, capsys):
    words = [*VAE, "--data", pictures, "--align", "none", "--gan", 0, "--save-every", 1]
    script(train_vae, *words, "--steps", 2)
    old, new = list_checkpoints("runs/vae")
    open(new, "r+b").truncate(os.path.getsize(new) // 2)
    script(train_vae, *words, "--steps", 3)
    out = capsys.readouterr().out
    assert f"{new} is damaged" in out and "resuming  runs/vae at step 1" in out


def test_full_disk_keeps_the_last_good_checkpoint(inside, pictures, capsys):
    """A limit on file size stands for the full disk: both fail a write that has begun."""
    words = [*VAE, "--data", pictures, "--align", "none", "--gan", 0, "--steps"]
    script(train_vae, *words, 1)
    good = {
        p: open(p, "rb").read() for p in [*list_checkpoints("runs/vae"), "runs/vae/vae.safetensors"]
    }
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))
    try:
        message = refused(capsys, train_vae, *words, 3, "--save-every", 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "cannot save step 3 in runs/vae" in message and list(good)[0] in message
    assert all(open(p, "rb").read() == content for p, content in good.items())
    assert not glob.glob("runs/vae/**/*.tmp", recursive=True)
    script(train_vae, *words, 3)
    assert load_vae("runs/vae").info["step"] == 3


def test_nan_stops_the_run_and_is_never_saved(inside, pictures, capsys):
    words = [*VAE, "--data", pictures, "--align", "none", "--gan", 0, "--save-every", 1]
    script(train_vae, *words, "--steps", 1)
    saved = open("runs/vae/vae.safetensors", "rb").read()
    state = load_checkpoint("runs/vae", "cpu")
    state["net"]["vae.encoder.conv_in.bias"][0] = float("nan")
    save_checkpoint("runs/vae", 1, state)
    message = refused(capsys, train_vae, *words, "--steps", 3)
    assert (
        "2 steps in a row, the last one 2, were not finite" in message
        and "recon" in message
        and "000000001.pt" in message
    )
    assert open("runs/vae/vae.safetensors", "rb").read() == saved


@pytest.mark.parametrize(
    "module,loss,words",
    [
        (train_vae, "kl_loss", [*VAE, "--align", "none", "--gan", 0]),
        (train_sit, "interpolate", [*SIT, "--repa", 0]),
    ],
)
def test_a_bad_step_just_before_the_end_does_not_keep_the_run_from_it(
    module, loss, words, trained, pictures, inside, monkeypatch
):
    """One bad step since the last look at the counts, followed by good ones, once ended the run at its last step, unsaved; and
    the same command came to the same end."""
    good, calls = getattr(module, loss), []

    def bad_the_second_time(*inputs):
        calls.append(1)
        return good(*(x * torch.nan if len(calls) == 2 else x for x in inputs))

    monkeypatch.setattr(module, loss, bad_the_second_time)
    vae = ["--vae", trained / "runs/vae"] if module is train_sit else []
    script(
        module, *words, *vae, "--data", pictures, "--steps", 4, "--log-every", 10, "--out", "run"
    )
    last = [json.loads(line) for line in open("run/metrics.jsonl")][-1]
    assert last["step"] == 4 and last["bad_steps"] == 1 and np.isfinite(last["grad_norm"])
    assert load_checkpoint("run", "cpu")["step"] == 4


# ---- survival --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "processes,number", [(1, signal.SIGTERM), (1, signal.SIGUSR1), (2, signal.SIGTERM)]
)
def test_a_scheduler_s_signal_saves_and_the_next_start_goes_on(
    pictures, tmp_path, processes, number
):
    words = [
        *VAE,
        "--data",
        pictures,
        "--align",
        "none",
        "--steps",
        40,
        "--save-every",
        1000,
        "--sample-every",
        1000,
        "--workers",
        1,
    ]
    run = start(processes, "train_vae", *words, cwd=tmp_path)
    log = tmp_path / "runs/vae/metrics.jsonl"
    wait_for(lambda: log.exists() and log.read_text().count("\n") >= 3)
    os.killpg(run.pid, number) if processes == 1 else run.send_signal(
        number
    )  # loaders get it too; torchrun passes it on
    code = run.wait(60)
    text = (tmp_path / "output.txt").read_text()
    saved = [int(os.path.basename(p)[:-3]) for p in list_checkpoints(str(tmp_path / "runs/vae"))]
    assert len(saved) == 1 and 3 <= saved[0] < 40 and "stopped   by a signal" in text, text
    assert code == 0 or processes > 1  # torchrun's own code is 1 after a signal
    torchrun(processes, "train_vae", *words, cwd=tmp_path)
    torchrun(processes, "train_vae", *words, "--out", "whole", cwd=tmp_path)
    a, b = (load_checkpoint(str(tmp_path / f), "cpu") for f in ("runs/vae", "whole"))
    assert a["step"] == 40 and all(same_state(a[k], b[k]) for k in a if k != "arguments")
    keys = ["recon", "kl", "gan", "grad_norm"]
    assert np.array_equal(losses(tmp_path / "runs/vae", keys), losses(tmp_path / "whole", keys))


def test_a_run_may_go_on_with_another_number_of_processes(pictures, vfm_weights, tmp_path):
    words = [*VAE, "--data", pictures, "--vfm-weights", vfm_weights, "--gan", 0, "--lr", "1e-4"]
    sit = [*SIT, "--data", pictures, "--vfm-weights", vfm_weights, "--lr", "1e-4", "--vae", "whole"]
    torchrun(1, "train_vae", *words, "--steps", 40, "--out", "whole", cwd=tmp_path)
    torchrun(1, "train_sit", *sit, "--steps", 40, "--out", "sit_whole", cwd=tmp_path)
    for processes, steps in ((1, 20), (2, 40)):
        torchrun(processes, "train_vae", *words, "--steps", steps, "--out", "parts", cwd=tmp_path)
        torchrun(processes, "train_sit", *sit, "--steps", steps, "--out", "sit_parts", cwd=tmp_path)
    for name, keys in (
        ("", ["align", "recon", "kl", "grad_norm"]),
        ("sit_", ["flow", "repa", "grad_norm"]),
    ):
        whole, parts = (losses(tmp_path / f"{name}{part}", keys) for part in ("whole", "parts"))
        assert whole.shape == (40, len(keys))
        np.testing.assert_allclose(parts, whole, rtol=1e-5)


def test_a_batch_the_processes_do_not_divide_is_refused(pictures, tmp_path):
    run = start(
        2, "train_vae", *VAE, "--data", pictures, "--align", "none", "--batch-size", 7, cwd=tmp_path
    )
    assert run.wait(120) != 0
    text = (tmp_path / "output.txt").read_text()
    assert "error: --batch-size 7 is not divisible by 2 processes x --accum 1" in text


def test_a_process_that_hangs_ends_the_run_and_is_named(pictures, tmp_path):
    """One of two processes is stopped in the middle of the run, as by a driver that hangs."""
    run = start(
        2,
        "train_vae",
        *VAE,
        "--data",
        pictures,
        "--align",
        "none",
        "--steps",
        10000,
        cwd=tmp_path,
        timeout=5,
    )
    log = tmp_path / "runs/vae/metrics.jsonl"
    wait_for(lambda: log.exists() and log.read_text().count("\n") >= 3)
    [hung] = [
        pid
        for pid, environment in processes_in(tmp_path).items()
        if environment.get("LOCAL_RANK") == "1"
    ]
    os.kill(hung, signal.SIGSTOP)
    try:
        assert run.wait(120) != 0
    finally:
        kill_all_in(tmp_path)
    text = (tmp_path / "output.txt").read_text()
    assert "error: process 0 lost process 1, which died or hangs" in text, text
    assert (
        "Traceback" not in text.split("failed (exitcode")[0]
    )  # torchrun then prints one of its own


def test_two_runs_in_one_folder_are_refused(pictures, tmp_path):
    words = [
        *VAE,
        "--data",
        pictures,
        "--align",
        "none",
        "--gan",
        0,
        "--steps",
        100000,
        "--workers",
        1,
    ]
    first = start(1, "train_vae", *words, cwd=tmp_path)
    try:
        log = tmp_path / "runs/vae/metrics.jsonl"
        wait_for(lambda: log.exists() and log.read_text())
        second = subprocess.run(
            [sys.executable, os.path.join(ROOT, "train_vae.py"), *map(str, words)],
            cwd=tmp_path,
            text=True,
            capture_output=True,
        )
        assert (
            second.returncode == 2 and "another process is writing into runs/vae" in second.stderr
        )
        assert first.poll() is None
    finally:
        first.kill()  # its loader lives on for some seconds, but not the lock
    first.wait()
    run = start(1, "train_vae", *words, "--steps", 1, "--overwrite", cwd=tmp_path)
    assert run.wait(60) == 0
    kill_all_in(tmp_path)


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(inside, pictures, capsys):
    """One flipped bit anywhere in the tensors is enough to be found."""
    words = [*VAE, "--data", pictures, "--align", "none", "--gan", 0, "--save-every", 1, "--steps"]
    script(train_vae, *words, 3, "--keep-every", 1)
    whole = load_checkpoint("runs/vae", "cpu")
    paths = list_checkpoints("runs/vae")
    assert len(paths) == 3  # --keep-every 1 keeps all
    content = bytearray(open(paths[-1], "rb").read())
    content[len(content) // 2] ^= 4
    open(paths[-1], "wb").write(content)
    script(train_vae, *words, 3)
    out = capsys.readouterr().out
    assert f"{paths[-1]} is damaged" in out and "at step 2" in out
    assert all(
        same_state(whole[k], v)
        for k, v in load_checkpoint("runs/vae", "cpu").items()
        if k != "arguments"
    )


def test_other_alignments(inside, pictures, vfm_weights):
    words = [*VAE, "--data", pictures, "--gan", 0, "--vfm-weights", vfm_weights]
    script(train_vae, *words, "--align", "vavae", "--shuffle-targets", "--steps", 2)
    shuffled = losses("runs/vae", ["align", "recon"])
    script(train_vae, *words, "--align", "vavae", "--steps", 2, "--overwrite")
    assert np.array_equal(
        losses("runs/vae", ["align", "recon"])[0, 1], shuffled[0, 1]
    )  # the same picture in
    assert (
        losses("runs/vae", ["align", "recon"])[0, 0] != shuffled[0, 0]
    )  # another one's features out


def test_runs_of_older_versions_are_refused_by_a_sentence(inside, pictures, vfm_weights, capsys):
    """--align was once the weight; and a part is missing."""
    words = [*VAE, "--data", pictures, "--gan", 0, "--vfm-weights", vfm_weights]
    script(train_vae, *words, "--steps", 1)
    [path] = list_checkpoints("runs/vae")
    state = torch.load(path, weights_only=True)
    torch.save(dict(state, arguments=dict(state["arguments"], align=0.5)), path)
    assert (
        "runs/vae holds a run with other settings: --align was 0.5 and is now mapper;"
        in refused(capsys, train_vae, *words, "--steps", 2)
    )
    torch.save({k: v for k, v in state.items() if k != "ema"}, path)
    message = refused(capsys, train_vae, *words, "--steps", 2)
    assert (
        "runs/vae cannot be read as a run of this version of the code; begin anew with --overwrite (KeyError: 'ema')"
        in message
    )


def test_help_names_every_default(capsys):
    for stage, words in (
        (train_vae, "--gan GAN (default: 0.1)"),
        (train_sit, "--lr LR (default: 0.0001)"),
        (sample, "--cfg CFG guidance scale; 1: none (default: 2.5)"),
    ):
        with pytest.raises(SystemExit) as end:
            stage.parse_arguments(["--help"])
        assert end.value.code == 0 and words in " ".join(capsys.readouterr().out.split())
