"""The stages as commands: two processes give the results of one, a resumed run those of an
uninterrupted one, any batch size the same pictures; and each mistake a user can make ends in one
sentence and exit code 2."""

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

import sample
import train_sit
import train_vae
from common import pictures as pictures_module
from common.draws import normal
from common.pictures import ImageSet, from_uint8, load_image, to_uint8
from common.runs import list_checkpoints, load_checkpoint, save_checkpoint
from common.weights import load_sit, load_vae
from conftest import (
    PLAIN_VAE,
    ROOT,
    SIT,
    VAE,
    damage_inside,
    interrupt_drawing,
    kill_all_in,
    rank_1_in,
    read_metrics,
    refused,
    same_state,
    script,
    start,
    torchrun,
    wait_for,
)


def logged(folder, keys):
    """The values of some keys in a run's metrics.jsonl, an array (lines, keys)."""
    lines = read_metrics(os.path.join(folder, "metrics.jsonl"))
    return np.array([[line[key] for key in keys] for line in lines if keys[0] in line])


def read_bytes(path):
    with open(path, "rb") as file:
        return file.read()


def write_bytes(path, content):
    with open(path, "wb") as file:
        file.write(content)


def same_tensors(a, b):
    """Whether the tensors of state dict `a` are in `b` too, bit for bit, but for the statistics of
    latents."""
    return all(torch.equal(a[key], b[key]) for key in a if not key.startswith("latent_"))


@pytest.fixture(scope="module")
def trained(pictures, vfm_weights, tmp_path_factory):
    """Folder in which a VAE (with GAN and alignment) and a SiT (with REPA) were trained for a few
    steps."""
    folder = tmp_path_factory.mktemp("trained")
    words = ["--data", pictures, "--vfm-weights", vfm_weights, "--steps", 4]
    before = os.getcwd()
    os.chdir(folder)
    script(train_vae, *VAE, *words, "--val", pictures)
    script(train_sit, *SIT, *words)
    os.chdir(before)
    return folder


# --------------------------------------------------------------------------------------------------
# Invariants


def run_every_stage(processes, pictures, vfm_weights, folder):
    """Trains and samples on some processes, in folders and files whose names end in their number.
    SiTs are trained on the VAE of one process, since a VAE's hash is of its exact bytes."""
    n = processes
    words = ["--data", pictures, "--vfm-weights", vfm_weights, "--lr", "1e-4"]
    vae = [*VAE, *words]
    torchrun(n, "train_vae", *vae, "--steps", 20, "--gan", 0, "--out", f"vae{n}", cwd=folder)
    torchrun(n, "train_vae", *vae, "--steps", 2, "--out", f"gan{n}", cwd=folder)
    double = [*vae, "--steps", 20, "--accum", 2, "--out", f"double{n}"]
    torchrun(n, "tests/in_float64", *double, cwd=folder)

    # Each number of processes fills a cache of its own.
    sit = [*SIT, *words, "--vae", "vae1", "--cache", f"cache{n}"]
    torchrun(n, "train_sit", *sit, "--steps", 20, "--out", f"sit{n}", cwd=folder)
    drawing = ["--num-images", 7, "--steps", 5, "--batch-size", 2, "--precision", "fp32"]
    words = ["--sit", "sit1", *drawing, "--out", f"samples{n}.npz"]
    torchrun(n, "sample", *words, cwd=folder)


def test_two_processes_give_the_losses_and_pictures_of_one(pictures, vfm_weights, tmp_path):
    """The kinks of the GAN and its batch norms over few pictures amplify errors: float32's rounding
    error of 1e-7 grows to 1e-2 after twenty steps. That it is rounding is shown in float64, where
    twenty steps agree to 1e-10 (to 1e-14, when it was measured). They have two passes each, which
    must hold the same pictures on any number of processes, as batch norms see one pass at a
    time."""
    for processes in (1, 2):
        run_every_stage(processes, pictures, vfm_weights, tmp_path)

    vae_keys = ["align", "recon", "kl", "grad_norm"]
    gan_keys = [*vae_keys, "gan", "disc"]
    sit_keys = ["flow", "repa", "grad_norm"]
    for name, steps, keys, tolerance in (
        ("vae", 20, vae_keys, 1e-5),
        ("gan", 2, gan_keys, 1e-5),
        ("double", 20, gan_keys, 1e-10),
        ("sit", 20, sit_keys, 1e-5),
    ):
        one = logged(tmp_path / f"{name}1", keys)
        two = logged(tmp_path / f"{name}2", keys)
        assert one.shape == (steps, len(keys))
        np.testing.assert_allclose(two, one, rtol=tolerance)
    one = np.load(tmp_path / "samples1.npz")["arr_0"]
    two = np.load(tmp_path / "samples2.npz")["arr_0"]
    assert np.array_equal(one, two)


def test_a_resumed_vae_is_the_uninterrupted_one_bit_for_bit(pictures, vfm_weights, inside):
    words = [*VAE, "--data", pictures, "--vfm-weights", vfm_weights, "--log-every", 3]
    script(train_vae, *words, "--steps", 8, "--out", "whole")
    script(train_vae, *words, "--steps", 5, "--out", "parts")
    # A run that is killed after its checkpoint leaves lines of later steps, the last one cut.
    with open("parts/metrics.jsonl", "a") as file:
        file.write('{"step": 6, "align": 0}\n{"step": 7, "ali')
    script(train_vae, *words, "--steps", 8, "--out", "parts")

    whole = load_checkpoint("whole", "cpu")
    parts = load_checkpoint("parts", "cpu")
    for key in ("net", "ema", "disc"):
        assert same_state(whole[key], parts[key])
    assert same_state(whole["optimizer"]["state"], parts["optimizer"]["state"])
    steps = [line["step"] for line in read_metrics("parts/metrics.jsonl")]
    assert steps == [3, 5, 6, 8]


def test_a_resumed_sit_is_the_uninterrupted_one_bit_for_bit(pictures, trained, inside, vfm_weights):
    words = [*SIT, "--data", pictures, "--vfm-weights", vfm_weights, "--vae", trained / "runs/vae"]
    words += ["--cache", "cache"]
    script(train_sit, *words, "--steps", 6, "--out", "whole")
    script(train_sit, *words, "--steps", 3, "--out", "parts")
    script(train_sit, *words, "--steps", 6, "--out", "parts")
    assert same_state(load_sit("whole").state_dict(), load_sit("parts").state_dict())
    keys = ["flow", "repa", "grad_norm"]
    assert np.array_equal(logged("whole", keys), logged("parts", keys))


def test_a_cosine_schedule_resumes_too(pictures, inside):
    """What the optimiser keeps must be loadable without unpickling code, the learning rate
    included."""
    schedule = ["--lr-schedule", "cosine", "--steps", 4, "--save-every", 2, "--data", pictures]
    for module, words, load in (
        (train_vae, PLAIN_VAE, load_vae),
        (train_sit, [*SIT, "--repa", 0, "--vae", "runs/vae"], load_sit),
    ):
        script(module, *words, *schedule)
        folder = "runs/" + module.__name__.removeprefix("train_")
        whole = load(folder).state_dict()
        os.remove(list_checkpoints(folder)[-1])
        assert load_checkpoint(folder, "cpu")["step"] == 2
        script(module, *words, *schedule)
        assert len(list_checkpoints(folder)) == 2
        assert same_state(load(folder).state_dict(), whole)


SAMPLE_10 = ["--num", 10, "--steps", 6, "--precision", "fp32", "--seed", 3]


def test_pictures_do_not_depend_on_the_batch_size(trained, monkeypatch):
    monkeypatch.chdir(trained)
    script(sample, *SAMPLE_10, "--batch-size", 10, "--out", "whole.npz")
    script(sample, *SAMPLE_10, "--batch-size", 3, "--out", "small.npz")
    whole = np.load("whole.npz", allow_pickle=False)
    assert whole["arr_0"].shape == (10, 32, 32, 3)
    assert whole["arr_0"].dtype == np.uint8
    assert json.loads(str(whole["settings"]))["seed"] == 3
    assert whole["labels"].tolist() == [0, 1] * 5
    # The rounding of a matrix product depends on its shape.
    difference = np.abs(whole["arr_0"].astype(int) - np.load("small.npz")["arr_0"])
    assert difference.max() <= 1
    assert difference.mean() < 0.01


def test_pictures_do_not_depend_on_interruption(trained, monkeypatch):
    monkeypatch.chdir(trained)
    words = [*SAMPLE_10, "--batch-size", 3]
    script(sample, *words, "--out", "uninterrupted.npz")
    batches = interrupt_drawing(monkeypatch, 3)
    with pytest.raises(SystemExit):
        script(sample, *words, "--out", "again.npz")
    script(sample, *words, "--out", "again.npz")
    assert batches == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [6, 7, 8], [9]]
    again = np.load("again.npz")["arr_0"]
    assert np.array_equal(again, np.load("uninterrupted.npz")["arr_0"])
    assert not os.path.exists("again.npz.parts")


def test_accumulation_gives_the_same_sit(pictures, trained, inside):
    """SiT has no batch statistics, so one pass of 8 pictures a step and four of 2 are one run."""
    words = [*SIT, "--data", pictures, "--vae", trained / "runs/vae", "--repa", 0, "--steps", 5]
    script(train_sit, *words, "--out", "a")
    script(train_sit, *words, "--out", "b", "--accum", 4)
    keys = ["flow", "grad_norm"]
    np.testing.assert_allclose(logged("a", keys), logged("b", keys), rtol=1e-5)


# --------------------------------------------------------------------------------------------------
# Results


def test_what_a_run_leaves_behind(trained, monkeypatch):
    monkeypatch.chdir(trained)
    vae = load_vae("runs/vae")
    sit = load_sit("runs/sit")
    raw = load_sit("runs/sit", ema=False)
    assert vae.info["step"] == 4
    assert sit.info["vae_hash"] == vae.info["hash"]
    assert sit.info["classes"] == ["a", "b"]
    assert sit.num_classes == 2
    assert sit.info["weights"] == "ema"
    assert raw.info["weights"] == "raw"
    assert not same_state(sit.state_dict(), raw.state_dict())
    for path in ("runs/vae/samples/0000004.png", "runs/sit/samples/0000004.png"):
        assert Image.open(path).size[0] > 100
    with open("runs/vae/config.json") as file:
        assert {"commit", "torch", "device"} <= set(json.load(file)["provenance"])


def encode_all(vae, pictures):
    """All pictures of a folder in [-1,1] (N,3,32,32), and their posteriors' mean and logvar, each
    (N,C,h,w)."""
    paths = sorted(pictures.rglob("*.png"))
    images = np.stack([load_image(path, 32) for path in paths])
    x = from_uint8(torch.from_numpy(images).permute(0, 3, 1, 2))
    with torch.no_grad():
        return x, *vae.encode(x)


def test_the_logged_psnr_is_that_of_the_saved_vae(trained, pictures):
    vae = load_vae(trained / "runs/vae")
    x, mean, _ = encode_all(vae, pictures)
    with torch.no_grad():
        y = to_uint8(vae.decode(mean))
    mse = (y.double() - to_uint8(x)).square().mean((1, 2, 3))
    psnr = (10 * torch.log10(255**2 / mse)).mean()
    measured = read_metrics(trained / "runs/vae/metrics.jsonl")[-1]["val_psnr"]
    assert abs(psnr - measured) < 1e-3


def test_the_saved_statistics_are_those_of_posterior_samples(trained, pictures):
    vae = load_vae(trained / "runs/vae")
    _, mean, logvar = encode_all(vae, pictures)
    # 4000 draws for each of the pictures: noise (4000,1,C,h,w), samples (4000,N,C,h,w). Each noise
    # occurs with both signs, and is scaled, so that its mean is 0 and its variance 1, as those of a
    # normal distribution are.
    noise = normal(0, "z", torch.arange(2000), mean.shape[1:])[:, None].double()
    noise = torch.cat([noise, -noise])
    noise = noise / noise.square().mean(0).sqrt()
    z = vae.sample(mean.double(), logvar.double(), noise)
    assert torch.allclose(z.mean((0, 1, 3, 4)).float(), vae.latent_mean, atol=3e-3)
    std = z.transpose(0, 2).flatten(1).std(1).float()
    assert torch.allclose(std, vae.latent_std, rtol=3e-3)

    normalised = vae.normalize(z.float())
    assert torch.allclose(vae.denormalize(normalised), z.float(), atol=1e-5)
    assert abs(normalised.mean()) < 1e-2
    assert abs(normalised.std() - 1) < 1e-2


def test_latent_cache_holds_posteriors_and_mirror_images(trained, pictures):
    [folder] = glob.glob(f"{trained}/runs/vae/latents-*")
    cache = np.load(f"{folder}/latents.npy", mmap_mode="r")
    assert cache.shape == (24, 2, 2, 4, 8, 8)
    assert cache.dtype == np.float16
    vae = load_vae(trained / "runs/vae")
    image = torch.from_numpy(ImageSet(pictures).load(5, 32).copy())
    x = from_uint8(image.permute(2, 0, 1)[None])
    for side, picture in enumerate((x, x.flip(3))):
        with torch.no_grad():
            mean, logvar = vae.encode(picture)
        std = (0.5 * logvar).exp()
        np.testing.assert_allclose(cache[5, side, 0], mean[0], rtol=2e-3, atol=1e-3)
        np.testing.assert_allclose(cache[5, side, 1], std[0], rtol=2e-3, atol=1e-3)


def test_latents_of_another_precision_are_another_cache(trained, pictures, inside):
    words = [*SIT, "--data", pictures, "--vae", trained / "runs/vae", "--repa", 0, "--steps", 1]
    for precision in ("fp32", "bf16"):
        script(train_sit, *words, "--precision", precision, "--cache", "cache", "--out", precision)
    [fp32] = glob.glob("cache/*fp32/latents.npy")
    [bf16] = glob.glob("cache/*bf16/latents.npy")
    fp32 = np.load(fp32)
    bf16 = np.load(bf16)
    assert (fp32 != bf16).any()
    assert np.abs(fp32 - bf16).max() < 0.1 * np.abs(fp32).max()


def test_repa_0_needs_no_pictures_once_latents_are_cached(trained, pictures, inside, monkeypatch):
    # Any attempt to open a picture fails.
    monkeypatch.setattr(pictures_module, "load_image", None)
    words = ["--data", pictures, "--vae", trained / "runs/vae", "--repa", 0, "--steps", 2]
    script(train_sit, *SIT, *words)
    assert load_sit("runs/sit").config["vfm_dim"] is None


def test_a_frozen_vae_does_not_change(trained, pictures, vfm_weights, inside):
    words = [*VAE, "--data", pictures, "--vfm-weights", vfm_weights, "--steps", 3]
    words += ["--freeze", "--init", trained / "runs/vae", "--mapper-depth", 0, "--no-noise"]
    script(train_vae, *words)
    before = load_vae(trained / "runs/vae").state_dict()
    assert same_tensors(before, load_vae("runs/vae").state_dict())


def test_file_list_is_read_once_and_follows_changes(pictures, inside, monkeypatch):
    shutil.copytree(pictures, "p")
    first = ImageSet("p")
    with monkeypatch.context() as patch:
        patch.setattr(pictures_module, "examine_picture", lambda *_: pytest.fail("read again"))
        assert ImageSet("p").fingerprint == first.fingerprint
    shutil.copy("p/a/00.png", "p/b/new.png")
    changed = ImageSet("p")
    assert len(changed) == len(first) + 1
    assert changed.fingerprint != first.fingerprint


def test_no_steps_at_all_leave_the_initial_weights_and_their_statistics(trained, pictures, inside):
    words = ["--data", pictures, "--epochs", 0]
    script(train_vae, *PLAIN_VAE, *words, "--init", trained / "runs/vae")
    before = load_vae(trained / "runs/vae").state_dict()
    after = load_vae("runs/vae").state_dict()
    assert same_tensors(before, after)
    assert after["latent_std"].min() > 0
    script(train_sit, *SIT, *words, "--vae", "runs/vae", "--repa", 0)
    assert load_sit("runs/sit").info["step"] == 0


# --------------------------------------------------------------------------------------------------
# Mistakes


def test_nothing_there_yet(inside, capsys):
    assert "data/imagenet/train: no such folder" in refused(capsys, train_vae)
    for module in (train_sit, sample):
        message = refused(capsys, module)
        assert "demo.py" in message
        assert "train_" in message


def test_bad_folders(inside, pictures, capsys):
    os.makedirs("empty")
    assert "has no pictures" in refused(capsys, train_vae, "--data", "empty")
    shutil.copytree(pictures, "p/train")
    assert "give one of them" in refused(capsys, train_vae, "--data", "p")
    os.makedirs("p/train/c")
    assert f"p{os.sep}train{os.sep}c" in refused(capsys, train_vae, "--data", "p/train")


def write_bad_picture(kind, path, whole):
    """Writes a picture that cannot be read. whole: bytes of a good one."""
    if kind == "zero":
        write_bytes(path, b"")
    if kind == "truncated":
        write_bytes(path, whole[: len(whole) // 2])
    if kind == "text":
        write_bytes(path, b"hello")
    if kind == "float":
        Image.fromarray(np.random.rand(40, 40).astype(np.float32)).save(path)


@pytest.mark.parametrize("kind", ["zero", "truncated", "text", "float"])
def test_a_bad_picture_is_named(kind, inside, pictures, capsys):
    shutil.copytree(pictures, "p")
    path = "p/b/bad.tif" if kind == "float" else "p/b/bad.png"
    write_bad_picture(kind, path, read_bytes("p/a/00.png"))
    message = refused(capsys, train_vae, *PLAIN_VAE, "--data", "p")
    assert path.replace("/", os.sep) in message


def test_a_picture_damaged_in_the_middle_stops_the_run_and_keeps_checkpoints(inside, pictures):
    """The picture's checksums are right, so only training finds the damage. Loader processes must
    pass the message on, and must end."""
    shutil.copytree(pictures, "p")
    words = [*PLAIN_VAE, "--data", "p", "--workers", 1]
    # In a process of its own, since a run holds its folder's lock until its process ends.
    torchrun(1, "train_vae", *words, "--steps", 2, cwd=inside)
    damage_inside("p/b/03.png")

    # A file that was written over is another picture, which a run is told to go on with.
    words = [*words, "--steps", 9, "--change", "data"]
    words = [sys.executable, os.path.join(ROOT, "train_vae.py"), *words]
    done = subprocess.run(list(map(str, words)), capture_output=True, text=True, timeout=300)
    assert done.returncode == 2
    assert "error: cannot read the picture" in done.stderr
    assert "03.png" in done.stderr
    assert "Traceback" not in done.stderr
    assert len(list_checkpoints("runs/vae")) == 1
    assert load_vae("runs/vae").info["step"] == 2


def test_sizes_and_batches(inside, pictures, capsys, vfm_weights):
    words = [*VAE, "--data", pictures, "--vfm-weights", vfm_weights]
    message = refused(capsys, train_vae, *words, "--resolution", 30)
    assert "30 is not divisible by the VAE's factor 4" in message
    assert "--batch-size 8 is not divisible" in refused(capsys, train_vae, *words, "--accum", 3)
    assert "f3d4" in refused(capsys, train_vae, *words, "--spec", "f3d4")
    assert "patches of 3" in refused(capsys, train_vae, *words, "--mapper-patch", 3)


@pytest.mark.parametrize(
    "module,flag,value,least",
    [
        (train_vae, "--batch-size", 0, 1),
        (train_vae, "--accum", 0, 1),
        (train_vae, "--resolution", 0, 1),
        (train_vae, "--seed", -1, 0),
        (train_sit, "--save-every", 0, 1),
        (train_sit, "--log-every", -2, 1),
        (sample, "--n", 0, 1),
    ],
)
def test_numbers_that_mean_nothing(module, flag, value, least, inside, capsys):
    message = refused(capsys, module, flag, value)
    assert f"argument {flag}: {value} is less than {least}" in message


def test_words_in_the_place_of_a_number(inside, capsys):
    message = refused(capsys, train_vae, "--steps", "many")
    assert "argument --steps: invalid positive value: 'many'" in message


def test_small_pictures_are_allowed_and_reported(inside, pictures, capsys):
    script(train_vae, *PLAIN_VAE, "--data", pictures, "--steps", 1, "--resolution", 64)
    assert capsys.readouterr().out.count("smaller than 64") == 1


def test_vision_models(inside, pictures, capsys, vfm_weights):
    words = [*VAE, "--data", pictures]

    def message(*flags):
        return refused(capsys, train_vae, *words, *flags)

    assert "vit_base_patch14_dinov2" in message("--vfm", "vit_bas_patch14_dinov2")
    assert "--vfm-weights" in message("--vfm", "vit_base_patch14_dinov2.lvd142m")
    assert "no such file" in message("--vfm-weights", "nowhere")
    assert "test_resnet" in message("--vfm", "test_resnet", "--vfm-weights", vfm_weights)
    assert "no feature map at stride 3" in message("--vfm-stride", 3)
    # Pickled code.
    torch.save({"a": print}, "code.pt")
    assert "code.pt" in message("--vfm-weights", "code.pt")


def test_a_sit_or_a_damaged_file_is_no_vae(inside, trained, pictures, capsys):
    words = [*SIT, "--data", pictures, "--repa", 0, "--steps", 1]
    sit = trained / "runs/sit/sit.safetensors"
    assert "is a sit checkpoint" in refused(capsys, train_sit, *words, "--vae", sit)
    write_bytes("cut.safetensors", read_bytes(sit)[:-100])
    message = refused(capsys, train_sit, *words, "--vae", "cut.safetensors")
    assert "cut.safetensors cannot be read" in message


def test_the_vae_of_another_sit_is_refused(inside, trained, pictures, capsys):
    sit = trained / "runs/sit/sit.safetensors"
    script(train_vae, *PLAIN_VAE, "--data", pictures, "--steps", 1, "--seed", 5)
    own_hash = load_sit(sit).info["vae_hash"]
    other_hash = load_vae("runs/vae").info["hash"]
    message = refused(capsys, sample, "--sit", sit, "--vae", "runs/vae")
    assert own_hash in message
    assert other_hash in message

    words = [*SIT, "--data", pictures, "--repa", 0]
    script(train_sit, *words, "--vae", trained / "runs/vae", "--steps", 1)
    message = refused(capsys, train_sit, *words, "--vae", "runs/vae", "--steps", 2)
    assert f"with the hash {own_hash} and is now runs/vae with the hash {other_hash}" in message


def test_sample_arguments(trained, capsys, monkeypatch):
    monkeypatch.chdir(trained)
    assert "0 to 1" in refused(capsys, sample, "--classes", 2)
    assert "0 to 1" in refused(capsys, sample, "--classes", "zebra")
    assert ".npz" in refused(capsys, sample, "--num", 4, "--out", "x.png")
    script(sample, "--classes", "b", 0, "--n", 2, "--steps", 3, "--out", "x.png")
    assert "a row each of b, a" in capsys.readouterr().out


def test_flags_that_contradict_the_checkpoint(inside, pictures, capsys):
    words = [*PLAIN_VAE, "--data", pictures]
    script(train_vae, *words, "--steps", 1)
    message = refused(capsys, train_vae, *words, "--steps", 2, "--kl", 0.5)
    assert "--kl was 1e-06 and is now 0.5" in message
    script(train_vae, *words, "--steps", 2, "--kl", 0.5, "--overwrite")
    assert load_vae("runs/vae").info["arguments"]["kl"] == 0.5
    message = refused(capsys, train_vae, *words, "--resume", "--out", "other")
    assert "holds no checkpoint" in message


# --------------------------------------------------------------------------------------------------
# Damaged checkpoints, full disks, steps that are not finite


def test_a_cut_checkpoint_is_passed_over(inside, pictures, capsys):
    words = [*PLAIN_VAE, "--data", pictures, "--save-every", 1]
    script(train_vae, *words, "--steps", 2)
    _, newest = list_checkpoints("runs/vae")
    with open(newest, "r+b") as file:
        file.truncate(os.path.getsize(newest) // 2)
    script(train_vae, *words, "--steps", 3)
    out = capsys.readouterr().out
    assert f"{newest} is damaged" in out
    assert "resuming  runs/vae at step 1" in out


def test_one_flipped_bit_in_a_checkpoint_is_found(inside, pictures, capsys):
    """The damaged checkpoint is named, and the one before it is used."""
    words = [*PLAIN_VAE, "--data", pictures, "--save-every", 1, "--steps", 3]
    script(train_vae, *words, "--keep-every", 1)
    whole = load_checkpoint("runs/vae", "cpu")
    paths = list_checkpoints("runs/vae")
    # --keep-every 1 keeps all of them.
    assert len(paths) == 3
    content = bytearray(read_bytes(paths[-1]))
    content[len(content) // 2] ^= 4
    write_bytes(paths[-1], content)

    script(train_vae, *words)
    out = capsys.readouterr().out
    assert f"{paths[-1]} is damaged" in out
    assert "at step 2" in out
    again = load_checkpoint("runs/vae", "cpu")
    del whole["arguments"], again["arguments"]
    assert same_state(whole, again)


def test_full_disk_keeps_the_last_good_checkpoint(inside, pictures, capsys):
    """A limit on the size of files stands for the full disk: both make a write fail that has
    begun."""
    words = [*PLAIN_VAE, "--data", pictures]
    script(train_vae, *words, "--steps", 1)
    [checkpoint] = list_checkpoints("runs/vae")
    good = {path: read_bytes(path) for path in (checkpoint, "runs/vae/vae.safetensors")}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))
    try:
        message = refused(capsys, train_vae, *words, "--steps", 3, "--save-every", 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "cannot save step 3 in runs/vae" in message
    assert checkpoint in message
    assert all(read_bytes(path) == content for path, content in good.items())
    assert not glob.glob("runs/vae/**/*.tmp", recursive=True)
    script(train_vae, *words, "--steps", 3)
    assert load_vae("runs/vae").info["step"] == 3


def test_nan_stops_the_run_and_is_never_saved(inside, pictures, capsys):
    words = [*PLAIN_VAE, "--data", pictures, "--save-every", 1]
    script(train_vae, *words, "--steps", 1)
    saved = read_bytes("runs/vae/vae.safetensors")
    state = load_checkpoint("runs/vae", "cpu")
    state["net"]["vae.encoder.conv_in.bias"][0] = float("nan")
    save_checkpoint("runs/vae", 1, state)
    message = refused(capsys, train_vae, *words, "--steps", 3)
    assert "2 steps in a row, the last one 2, were not finite" in message
    assert "recon" in message
    assert "000000001.pt" in message
    assert read_bytes("runs/vae/vae.safetensors") == saved


@pytest.mark.parametrize(
    "module,loss,words",
    [
        (train_vae, "kl_loss", PLAIN_VAE),
        (train_sit, "interpolate", [*SIT, "--repa", 0]),
    ],
)
def test_a_bad_step_just_before_the_end_does_not_keep_the_run_from_it(
    module, loss, words, trained, pictures, inside, monkeypatch
):
    """One bad step since the guard's counts were last read, followed by good ones, once ended the
    run at its last step, unsaved; and the same command came to the same end."""
    good = getattr(module, loss)
    calls = []

    def bad_the_second_time(*inputs):
        calls.append(loss)
        if len(calls) == 2:
            inputs = [x * torch.nan for x in inputs]
        return good(*inputs)

    monkeypatch.setattr(module, loss, bad_the_second_time)
    if module is train_sit:
        words = [*words, "--vae", trained / "runs/vae"]
    often = ["--steps", 4, "--log-every", 10]
    script(module, *words, "--data", pictures, *often, "--out", "run")
    last = read_metrics("run/metrics.jsonl")[-1]
    assert last["step"] == 4
    assert last["bad_steps"] == 1
    assert np.isfinite(last["grad_norm"])
    assert load_checkpoint("run", "cpu")["step"] == 4


# --------------------------------------------------------------------------------------------------
# Survival


def wait_for_metrics(run, lines):
    """Waits until a run's metrics.jsonl has some lines."""
    path = run / "metrics.jsonl"
    wait_for(lambda: path.exists() and path.read_text().count("\n") >= lines)


@pytest.mark.parametrize(
    "processes,number", [(1, signal.SIGTERM), (1, signal.SIGUSR1), (2, signal.SIGTERM)]
)
def test_a_scheduler_s_signal_saves_and_the_next_start_resumes(
    pictures, tmp_path, processes, number
):
    words = [*VAE, "--data", pictures, "--align", "none", "--steps", 40, "--workers", 1]
    words += ["--save-every", 1000, "--sample-every", 1000]
    run = start(processes, "train_vae", *words, cwd=tmp_path)
    wait_for_metrics(tmp_path / "runs/vae", lines=3)
    if processes == 1:
        # The signal goes to the loaders too.
        os.killpg(run.pid, number)
    else:
        # torchrun passes it on.
        run.send_signal(number)
    code = run.wait(60)
    text = (tmp_path / "output.txt").read_text()
    [path] = list_checkpoints(str(tmp_path / "runs/vae"))
    assert 3 <= int(os.path.basename(path)[:-3]) < 40
    assert "stopped   by a signal" in text, text
    # torchrun's own code is 1 after a signal.
    assert code == 0 or processes > 1

    torchrun(processes, "train_vae", *words, cwd=tmp_path)
    torchrun(processes, "train_vae", *words, "--out", "whole", cwd=tmp_path)
    resumed = load_checkpoint(str(tmp_path / "runs/vae"), "cpu")
    whole = load_checkpoint(str(tmp_path / "whole"), "cpu")
    del resumed["arguments"], whole["arguments"]
    assert resumed["step"] == 40
    assert same_state(resumed, whole)
    keys = ["recon", "kl", "gan", "grad_norm"]
    assert np.array_equal(logged(tmp_path / "runs/vae", keys), logged(tmp_path / "whole", keys))


def test_a_run_may_resume_on_another_number_of_processes(pictures, vfm_weights, tmp_path):
    words = ["--data", pictures, "--vfm-weights", vfm_weights, "--lr", "1e-4"]
    vae = [*VAE, *words, "--gan", 0]
    sit = [*SIT, *words, "--vae", "vae_whole"]
    torchrun(1, "train_vae", *vae, "--steps", 40, "--out", "vae_whole", cwd=tmp_path)
    torchrun(1, "train_sit", *sit, "--steps", 40, "--out", "sit_whole", cwd=tmp_path)
    for processes, steps in ((1, 20), (2, 40)):
        torchrun(processes, "train_vae", *vae, "--steps", steps, "--out", "vae_parts", cwd=tmp_path)
        torchrun(processes, "train_sit", *sit, "--steps", steps, "--out", "sit_parts", cwd=tmp_path)
    for name, keys in (
        ("vae", ["align", "recon", "kl", "grad_norm"]),
        ("sit", ["flow", "repa", "grad_norm"]),
    ):
        whole = logged(tmp_path / f"{name}_whole", keys)
        parts = logged(tmp_path / f"{name}_parts", keys)
        assert whole.shape == (40, len(keys))
        np.testing.assert_allclose(parts, whole, rtol=1e-5)


def test_a_batch_the_processes_do_not_divide_is_refused(pictures, tmp_path):
    words = [*VAE, "--data", pictures, "--align", "none", "--batch-size", 7]
    run = start(2, "train_vae", *words, cwd=tmp_path)
    assert run.wait(120) != 0
    text = (tmp_path / "output.txt").read_text()
    assert "error: --batch-size 7 is not divisible by 2 processes" in text


def test_a_process_that_hangs_ends_the_run_and_is_named(pictures, tmp_path):
    """One of two processes is stopped in the middle of the run, as by a driver that hangs."""
    words = [*VAE, "--data", pictures, "--align", "none", "--steps", 10000]
    run = start(2, "train_vae", *words, cwd=tmp_path, timeout=5)
    wait_for_metrics(tmp_path / "runs/vae", lines=3)
    os.kill(rank_1_in(tmp_path), signal.SIGSTOP)
    try:
        assert run.wait(120) != 0
    finally:
        kill_all_in(tmp_path)
    text = (tmp_path / "output.txt").read_text()
    assert "error: process 0 lost process 1, which died or hangs" in text, text
    # torchrun then prints a traceback of its own.
    assert "Traceback" not in text.split("failed (exitcode")[0]


def test_two_runs_in_one_folder_are_refused(pictures, tmp_path):
    words = [*PLAIN_VAE, "--data", pictures, "--steps", 100000, "--workers", 1]
    first = start(1, "train_vae", *words, cwd=tmp_path)
    try:
        wait_for_metrics(tmp_path / "runs/vae", lines=1)
        second = subprocess.run(
            [sys.executable, os.path.join(ROOT, "train_vae.py"), *map(str, words)],
            cwd=tmp_path,
            text=True,
            capture_output=True,
        )
        assert second.returncode == 2
        assert "another process is writing into runs/vae" in second.stderr
        assert first.poll() is None
    finally:
        # The loader outlives the run by some seconds, but the lock does not.
        first.kill()
    first.wait()
    run = start(1, "train_vae", *words, "--steps", 1, "--overwrite", cwd=tmp_path)
    assert run.wait(60) == 0
    kill_all_in(tmp_path)


# --------------------------------------------------------------------------------------------------
# Other settings


def test_other_alignments(inside, pictures, vfm_weights):
    words = [*VAE, "--data", pictures, "--gan", 0, "--vfm-weights", vfm_weights]
    words += ["--align", "vavae", "--steps", 2]
    script(train_vae, *words, "--shuffle-targets")
    [shuffled_align, shuffled_recon] = logged("runs/vae", ["align", "recon"])[0]
    script(train_vae, *words, "--overwrite")
    [align, recon] = logged("runs/vae", ["align", "recon"])[0]
    # The input is the same picture, but the target comes from another one.
    assert recon == shuffled_recon
    assert align != shuffled_align


def test_runs_of_older_versions_are_refused_in_one_sentence(inside, pictures, vfm_weights, capsys):
    """In the first --align was the weight; in the second a part is missing."""
    words = [*VAE, "--data", pictures, "--gan", 0, "--vfm-weights", vfm_weights]
    script(train_vae, *words, "--steps", 1)
    [path] = list_checkpoints("runs/vae")
    state = torch.load(path, weights_only=True)
    torch.save(dict(state, arguments=dict(state["arguments"], align=0.5)), path)
    message = refused(capsys, train_vae, *words, "--steps", 2)
    assert "runs/vae holds a run with other settings: --align was 0.5 and is now mapper;" in message

    del state["ema"]
    torch.save(state, path)
    message = refused(capsys, train_vae, *words, "--steps", 2)
    assert (
        "runs/vae cannot be read as a run of this version of the code; begin anew with --overwrite"
        " (KeyError: 'ema')" in message
    )


@pytest.mark.parametrize(
    "stage,words",
    [
        (train_vae, "--gan GAN (default: 0.1)"),
        (train_sit, "--lr LR (default: 0.0001)"),
        (sample, "--cfg CFG guidance scale; 1: none (default: 2.5)"),
    ],
)
def test_help_names_every_default(stage, words, capsys):
    with pytest.raises(SystemExit) as end:
        stage.parse_arguments(["--help"])
    assert end.value.code == 0
    assert words in " ".join(capsys.readouterr().out.split())
