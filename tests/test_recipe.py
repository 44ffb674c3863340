"""The details of the published recipe, each beside ours: vision models' names and final norms, the
mapper, LPIPS, precision, clipping, learning rates, mirror images, the EMA's warm-up; that runs of
versions that knew no such choice resume as they were or are refused; and that bench/recipe.py,
which measures what the details move, plans and reports rightly."""

import argparse
import json
import math
import os
import re
import shlex

import pytest
import timm
import torch
from safetensors.torch import save_file
from scipy import stats

import models
import train_vae
from bench import recipe
from bench.speed import write_random_lpips
from common.flags import settings_of
from common.runs import list_checkpoints, load_checkpoint
from common.training import ema_decay, ema_update, schedule, set_learning_rates
from conftest import VAE, refused, same_state, script

# --------------------------------------------------------------------------------------------------
# Vision models


def plan(short_name):
    with torch.device("meta"):
        return timm.create_model(models.VFM_NAMES[short_name], pretrained=False)


@pytest.mark.parametrize("short_name", models.VFM_NAMES)
def test_a_short_name_stands_for_the_network_that_its_weights_were_trained_in(short_name):
    """timm notes beside OpenAI's CLIP that it is natively QuickGELU; its plain variant moves the
    tokens by a hundredth."""
    name = models.VFM_NAMES[short_name]
    assert name in timm.list_pretrained()
    config = timm.get_pretrained_cfg(name)
    notes = " ".join(config.notes or ())
    activation = type(plan(short_name).blocks[0].mlp).__name__
    if activation == "Mlp":
        activation = type(plan(short_name).blocks[0].mlp.act).__name__
    assert ("QuickGELU" in notes) == (activation == "QuickGELU"), notes


def test_the_six_have_the_final_norms_of_the_published_code():
    chosen = {
        name: models.choose_norm(models.VFM_NAMES[name], plan(name), None)
        for name in models.VFM_NAMES
    }
    before = [name for name, norm in chosen.items() if norm is False]
    assert before == ["mae-l", "clip-l"]
    assert set(chosen.values()) == {True, False}
    clip = models.VFM_NAMES["clip-l"]
    assert models.choose_norm(clip, plan("clip-l"), True) is True


@pytest.mark.parametrize("name", ["test_vit", "vit_small_patch16_dinov3"])
def test_tokens_before_the_final_norm_become_those_after_it(name, tmp_path):
    """And the stride of a transformer's patches is no reason to leave the norm out."""
    torch.manual_seed(0)
    net = timm.create_model(name)
    torch.nn.init.normal_(net.norm.weight)
    path = str(tmp_path / "w.safetensors")
    save_file({key: value.contiguous() for key, value in net.state_dict().items()}, path)
    x = torch.rand(2, 3, 32, 32) * 2 - 1

    after = models.VFM(name, path, 32, grid=2)
    before = models.VFM(name, path, 32, grid=2, norm=False)
    with_stride = models.VFM(name, path, 32, grid=2, stride=16)
    assert (after.norm, before.norm, with_stride.norm) == (True, False, True)
    assert torch.allclose(before.model.norm(before(x)), after(x), atol=1e-5)
    assert (before(x) - after(x)).abs().mean() > 0.1
    assert torch.allclose(with_stride(x), after(x), atol=1e-5)


def test_a_vision_model_without_a_final_norm(tmp_path, capsys, inside, pictures):
    net = timm.create_model("test_resnet")
    path = str(tmp_path / "w.safetensors")
    save_file({key: value.contiguous() for key, value in net.state_dict().items()}, path)
    assert models.VFM("test_resnet", path, 32, grid=2, norm=True).norm is None
    words = [*VAE, "--data", pictures, "--vfm", "test_resnet", "--vfm-weights", path]
    message = refused(capsys, train_vae, *words, "--no-vfm-norm")
    assert "test_resnet has no final norm that --no-vfm-norm could leave out" in message


# --------------------------------------------------------------------------------------------------
# Mapper


def matrices(network):
    return {name: p.detach() for name, p in network.named_parameters() if p.ndim > 1}


def test_the_mapper_starts_as_repa_es_modules_do():
    """Xavier uniform: every weight within sqrt(6 / (inputs + outputs)), and as wide as that."""
    torch.manual_seed(0)
    mapper = models.Mapper(16, 8, 2, 64, 4, hidden=128)
    for name, weight in matrices(mapper).items():
        outputs, inputs = weight.flatten(1).shape
        bound = math.sqrt(6 / (inputs + outputs))
        assert 0.97 * bound < weight.abs().max() <= bound, name
        assert weight.std() == pytest.approx(bound / math.sqrt(3), rel=0.05)
    biases = [p for name, p in mapper.named_parameters() if name.endswith("bias")]
    assert all(not bias.any() for bias in biases)

    torch.manual_seed(0)
    default = models.Mapper(16, 8, 2, 64, 4, hidden=128, init="torch")
    for name, weight in matrices(default).items():
        bound = 1 / math.sqrt(weight.flatten(1).shape[1])
        assert 0.97 * bound < weight.abs().max() <= bound, name


def test_running_statistics_are_averages_and_constants():
    """Latents of mean 3 and std 2, and averages that start at 0 and 1 with momentum 0.1."""
    mapper = models.Mapper(2, 4, 2, 8, 1, depth=0, hidden=8, norm="running").train()
    embedded = []
    mapper.embed.register_forward_pre_hook(lambda module, inputs: embedded.append(inputs[0]))
    mean = torch.zeros(2).double()
    variance = torch.ones(2).double()
    for step in range(3):
        z = 3 + 2 * torch.randn(8, 2, 4, 4, generator=torch.Generator().manual_seed(step))
        z.requires_grad_()
        mapper(z)
        values = z.detach().double()
        mean = 0.9 * mean + 0.1 * values.mean((0, 2, 3))
        variance = 0.9 * variance + 0.1 * values.var((0, 2, 3), correction=1)
        scale = (variance + 1e-4).rsqrt()[:, None, None]
        expected = (values - mean[:, None, None]) * scale
        assert torch.allclose(embedded[-1].double(), expected, atol=1e-5)
    # The gradient is that of a division by a constant.
    [gradient] = torch.autograd.grad(embedded[-1][0].sum(), z)
    assert torch.allclose(gradient[0].double(), scale.expand(2, 4, 4), atol=1e-5)
    assert not gradient[1:].any()

    mapper.eval()
    mapper(z)
    assert torch.allclose(embedded[-1].double(), expected, atol=1e-5)


def test_the_mapper_s_averages_start_as_the_statistics_of_the_vae():
    args = train_vae.parse_arguments(["--mapper-hidden", "8", "--mapper-depth", "0"])
    vae = models.VAE("f4d4", 32, ch=32, ch_mult=(1, 1, 1), num_res_blocks=1)
    vae.latent_mean.fill_(0.5)
    vae.latent_std.fill_(3.0)
    mapper = train_vae.build_mapper(args, vae, 8, 4)
    assert torch.equal(mapper.norm.running_mean, torch.full((4,), 0.5))
    assert torch.equal(mapper.norm.running_var, torch.full((4,), 9.0))


def test_va_vaes_projection_has_no_bias():
    assert [name for name, _ in train_vae.Projection(4, 8, 2).named_parameters()] == ["weight"]


# --------------------------------------------------------------------------------------------------
# LPIPS and discriminator


def test_lpips_scales_once_more_on_demand(tmp_path):
    torch.manual_seed(0)
    file = write_random_lpips(tmp_path / "lpips.pth")
    a, b = torch.rand(2, 2, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        rescaled = models.LPIPS([file], rescale=True)(a, b)
        plain = models.LPIPS([file])
        assert torch.equal(rescaled, plain(2 * a - 1, 2 * b - 1))
        assert not torch.allclose(rescaled, plain(a, b), rtol=0.01)


class Probe(torch.nn.Module):
    """Stands for a network of the loss, and notes whether it runs under autocast."""

    def __init__(self, seen):
        super().__init__()
        self.seen = seen

    def forward(self, *images):
        self.seen.append(torch.is_autocast_enabled("cpu"))
        return images[0].mean((1, 2, 3))


@pytest.mark.parametrize("flags, under_autocast", [([], False), (["--autocast-losses"], True)])
def test_lpips_and_discriminator_run_in_fp32(flags, under_autocast):
    args = train_vae.parse_arguments(["--align", "none", *flags])
    train_vae.check_arguments(args)
    vae = models.VAE("f4d4", 32, ch=32, ch_mult=(1, 1, 1), num_res_blocks=1)
    seen = []
    net = train_vae.SendVAE(vae, None)
    networks = train_vae.Networks(net, None, Probe(seen), Probe(seen), (4, 8, 8))
    batch = dict(image=torch.zeros(2, 3, 32, 32, dtype=torch.uint8), position=torch.arange(2))
    with torch.autocast("cpu", torch.bfloat16):
        losses = train_vae.vae_losses(networks, batch, 0, args)
    # LPIPS, and the discriminator three times: as the VAE's judge, on real and on fake pictures.
    assert seen == [under_autocast] * 4
    assert list(losses) == ["recon", "lpips", "kl", "gan", "disc"]


# --------------------------------------------------------------------------------------------------
# Learning rates, clipping, mirror images, EMA


def groups_of_parameters(state):
    """-> the numbers of parameters of an optimiser's groups in a checkpoint, and their rates."""
    groups = state["optimizer"]["param_groups"]
    return [len(group["params"]) for group in groups], [group["lr"] for group in groups]


def number_of_parameters(state, prefix=""):
    """Of the part of a network whose names begin so."""
    names = [name for name in state if name.startswith(prefix)]
    buffers = r"latent_mean|latent_std|running_mean|running_var|num_batches_tracked"
    return sum(not re.search(buffers, name) for name in names)


def test_vae_mapper_and_discriminator_are_clipped_apart(inside, pictures, vfm_weights):
    words = [*VAE, "--data", pictures, "--vfm-weights", vfm_weights, "--steps", 2, "--warmup", 4]
    script(train_vae, *words)
    state = load_checkpoint("runs/vae", "cpu")
    vae = number_of_parameters(state["net"], "vae.")
    mapper = number_of_parameters(state["net"], "mapper.")
    disc = number_of_parameters(state["disc"])
    sizes, rates = groups_of_parameters(state)
    assert sizes == [vae, mapper, disc]
    # The second of four steps of warm-up; TINY's learning rate is 1e-3.
    assert rates == pytest.approx([5e-4, 5e-4, 0.5e-4])

    script(train_vae, *words, "--clip-together", "--disc-lr", "2e-4", "--overwrite")
    sizes, rates = groups_of_parameters(load_checkpoint("runs/vae", "cpu"))
    assert sizes == [vae + mapper, disc]
    assert rates == pytest.approx([5e-4, 1e-4])


def test_every_group_has_its_share_of_its_own_rate():
    parameters = [torch.nn.Parameter(torch.zeros(1)) for _ in range(2)]
    optimizer = torch.optim.SGD([dict(params=[p]) for p in parameters], lr=1.0)
    args = argparse.Namespace(warmup=10, lr_schedule="cosine")
    assert schedule(args, 4, 100) == pytest.approx(0.5 * 0.5 * (1 + math.cos(0.04 * math.pi)))
    assert schedule(args, 50, 100) == pytest.approx(0.5)
    set_learning_rates(optimizer, [3e-4, 1e-4], 0.5)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([1.5e-4, 0.5e-4])


@pytest.mark.parametrize("flags, mirrored", [([], True), (["--no-flip"], False)])
def test_mirror_images_in_stage_1(flags, mirrored, inside, pictures, monkeypatch):
    flips = []
    losses = train_vae.vae_losses

    def spy(networks, batch, step, args):
        flips.extend(batch["flip"].tolist())
        return losses(networks, batch, step, args)

    monkeypatch.setattr(train_vae, "vae_losses", spy)
    words = [*VAE, "--align", "none", "--gan", 0, "--data", pictures, "--steps", 2]
    script(train_vae, *words, *flags)
    assert len(flips) == 16
    assert any(flips) == mirrored


@pytest.mark.parametrize("decay", [0.999, 0.9999])
def test_a_short_run_publishes_what_it_learned(decay):
    """Weights go from 0 to 1 in the first of 100 steps. A fixed decay of 0.9999 leaves the average
    at 0.01."""
    args = argparse.Namespace(ema=decay, ema_warmup=True)
    ema = torch.nn.Linear(1, 1)
    net = torch.nn.Linear(1, 1)
    torch.nn.init.zeros_(ema.weight)
    torch.nn.init.ones_(net.weight)
    for step in range(100):
        ema_update(ema, net, ema_decay(args, step))
    assert ema.weight.item() > 0.9999


def test_the_ema_s_decay_warms_up_to_its_value():
    args = argparse.Namespace(ema=0.9999, ema_warmup=True)
    assert ema_decay(args, 0) == 0.1
    assert ema_decay(args, 990) == pytest.approx(0.991)
    assert ema_decay(args, 89_989) < 0.9999 == ema_decay(args, 89_991)
    args.ema = 0.0
    assert ema_decay(args, 990) == 0
    args = argparse.Namespace(ema=0.9999, ema_warmup=False)
    assert ema_decay(args, 0) == 0.9999


# --------------------------------------------------------------------------------------------------
# Runs of older versions

NEW_FLAGS = {
    "flip",
    "mapper_norm",
    "mapper_init",
    "lpips_rescale",
    "autocast_losses",
    "clip_together",
    "ema_warmup",
    "disc_lr",
    "vfm_norm",
}


def forget_new_flags(folder):
    """Makes a run's newest checkpoint one of a version without these flags."""
    path = list_checkpoints(folder)[-1]
    state = torch.load(path, weights_only=True)
    old = {name: value for name, value in state["arguments"].items() if name not in NEW_FLAGS}
    assert len(old) == len(state["arguments"]) - len(NEW_FLAGS)
    torch.save(dict(state, arguments=old), path)


def test_an_older_run_is_refused_by_name_or_goes_on_as_it_was(
    inside, pictures, vfm_weights, capsys
):
    words = [*VAE, "--data", pictures, "--vfm-weights", vfm_weights]
    # TINY's learning rate is 1e-3.
    old = ["--autocast-losses", "--clip-together", "--no-ema-warmup", "--disc-lr", "1e-3"]
    script(train_vae, *words, *old, "--steps", 4, "--out", "whole")
    script(train_vae, *words, *old, "--steps", 2)
    forget_new_flags("runs/vae")
    message = refused(capsys, train_vae, *words, "--steps", 4)
    for was in (
        "--disc-lr was 0.001 and is now 0.0001",
        "--autocast-losses was True and is now False",
        "--clip-together was True and is now False",
    ):
        assert was in message
    assert "vfm-norm" not in message
    assert "mapper-init" not in message
    assert "--vfm-norm was True and is now False" in refused(
        capsys, train_vae, *words, *old, "--steps", 4, "--no-vfm-norm"
    )
    script(train_vae, *words, *old, "--steps", 4)
    whole = load_checkpoint("whole", "cpu")
    parts = load_checkpoint("runs/vae", "cpu")
    for name in ("net", "ema", "disc", "optimizer"):
        assert same_state(whole[name], parts[name]), name


def test_an_older_run_without_these_parts_needs_no_flags(inside, pictures, capsys):
    words = [*VAE, "--align", "none", "--gan", 0, "--data", pictures]
    script(train_vae, *words, "--no-ema-warmup", "--steps", 2)
    forget_new_flags("runs/vae")
    script(train_vae, *words, "--steps", 3)
    said = capsys.readouterr().out
    assert "resuming  runs/vae at step 2" in said
    assert "note: its EMA now warms up; --no-ema-warmup goes on as the run began" in said


def test_an_older_projection_with_a_bias_is_refused(inside, pictures, vfm_weights, capsys):
    """VA-VAE's has none, and that of older versions had one."""
    words = [*VAE, "--align", "vavae", "--gan", 0, "--data", pictures, "--vfm-weights", vfm_weights]
    script(train_vae, *words, "--steps", 2)
    path = list_checkpoints("runs/vae")[-1]
    state = torch.load(path, weights_only=True)
    for part in ("net", "ema"):
        outputs = len(state[part]["mapper.weight"])
        state[part]["mapper.bias"] = torch.zeros(outputs)
    torch.save(state, path)
    message = refused(capsys, train_vae, *words, "--steps", 4)
    assert "mapper.bias" in message
    assert "begin anew with --overwrite" in message


def test_what_older_versions_did():
    """A name that stood for another network, and a stride that left out the final norm."""
    args = argparse.Namespace(vfm_norm=False, vfm="clip-l")
    old = settings_of(dict(vfm="clip-l", vfm_stride=None), args)
    assert old == dict(vfm="vit_large_patch14_clip_224.openai", vfm_stride=None, vfm_norm=True)
    new = dict(vfm="clip-l", vfm_stride=None, vfm_norm=False)
    assert settings_of(new, args) == new
    args = argparse.Namespace(vfm_norm=True)
    assert settings_of(dict(vfm="test_vit", vfm_stride=16), args)["vfm_norm"] is False
    # A CNN has no final norm.
    args = argparse.Namespace(vfm_norm=None)
    assert "vfm_norm" not in settings_of(dict(vfm="test_resnet", vfm_stride=16), args)


# --------------------------------------------------------------------------------------------------
# What the details move: bench/recipe.py


def planned(*words):
    """{name of a run: its train_vae.py arguments as a dict}, and the jobs."""
    jobs = recipe.plan(recipe.parse_arguments(["--vfm-weights", "w.safetensors", *words]))
    found = {}
    for name, job in jobs.items():
        [command] = job.commands
        script_name, *flags = shlex.split(command.words)
        assert script_name == "train_vae.py"
        args = train_vae.parse_arguments(flags)
        train_vae.check_arguments(args)
        found[name] = vars(args)
        assert command.product == f"{args.out}/checkpoints/{args.steps:09d}.pt"
    return found, jobs


def test_every_run_differs_from_its_reference_in_one_flag():
    arguments, jobs = planned()
    names = list(jobs)
    assert names[0] == "base"
    assert sum(name.startswith("default-") for name in names) == 3
    differing = set()
    for name, job in jobs.items():
        assert all(names.index(before) < names.index(name) for before in job.after)
        if name == "base":
            continue
        variant, seed = name.rsplit("-", 1)
        assert arguments[name]["seed"] == int(seed)
        reference = arguments[f"{recipe.RECIPES[variant].reference}-{seed}"]
        differ = {key for key in reference if reference[key] != arguments[name][key]} - {"out"}
        if recipe.RECIPES[variant].reference == variant:
            assert not differ
        else:
            [flag] = differ
            differing.add(flag)
    assert differing == {
        "mapper_norm",
        "flip",
        "clip_together",
        "mapper_init",
        "ema_warmup",
        "autocast_losses",
        "disc_lr",
        "init_disc",
    }
    assert "gan-0" in jobs["init-disc-1"].after
    assert arguments["init-disc-1"]["init_disc"] == jobs["gan-0"].commands[0].product


def test_a_chosen_recipe_comes_with_what_it_is_compared_with():
    _, jobs = planned("--only", "disc-lr", "--seeds", "2", "--variant-seeds", "1")
    assert list(jobs) == ["base", "gan-0", "disc-lr-0", "gan-1"]


def plant_run(name, psnr, align, is_finished=True):
    folder = f"{recipe.OUT}/{name}"
    os.makedirs(f"{folder}/checkpoints")
    lines = [
        dict(step=50, recon=0.5, align=0.9),
        # The measure of an earlier save does not count.
        dict(step=100, val_psnr=1.0, val_align=1.0),
        dict(step=400, val_psnr=psnr, val_align=align),
    ]
    with open(f"{folder}/metrics.jsonl", "w") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)
    if is_finished:
        open(f"{folder}/checkpoints/{recipe.TUNING_STEPS:09d}.pt", "w").close()


def test_the_report_of_planted_runs(inside, capsys):
    default = [28.0, 28.3, 28.4]
    variant = [27.1, 27.0]
    for seed, psnr in enumerate(default):
        plant_run(f"default-{seed}", psnr, 0.5)
    for seed, psnr in enumerate(variant):
        plant_run(f"no-flip-{seed}", psnr, 0.25)
    plant_run("no-flip-2", 99.0, 0.5, is_finished=False)
    recipe.report(recipe.OUT)
    [heading, _, first, second] = capsys.readouterr().out.strip().splitlines()
    assert heading.count("|") == first.count("|") == second.count("|")
    assert [cell.strip() for cell in first.split("|")[1:-1]] == [
        "`default`",
        "",
        "3",
        "28.233",
        "seeds 28.000 to 28.400",
        "0.5000",
        "seeds 0.5000 to 0.5000",
    ]
    # Of two groups, the interval is that of the t test for equal variances.
    low, high = stats.ttest_ind(variant, default).confidence_interval(0.95)
    assert [cell.strip() for cell in second.split("|")[1:-1]] == [
        "`no-flip`",
        "`--no-flip`",
        "2",
        "27.050",
        f"{(low + high) / 2:+.3f} ± {(high - low) / 2:.3f}",
        "0.2500",
        "-0.2500 ± 0.0000",
    ]


def test_the_spread_is_that_of_all_seeds_around_their_own_means():
    spread, freedom = recipe.pooled_spread([[1.0, 3.0], [10.0, 10.0, 13.0], [5.0]])
    assert freedom == 3
    assert spread == pytest.approx(math.sqrt((1 + 1 + 1 + 1 + 4) / 3))
    assert recipe.pooled_spread([[1.0], [2.0]])[1] == 0


def test_gradients_are_compared_as_vectors():
    images = torch.rand(2, 3, 4, 4)
    gradient = recipe.gradient(lambda images: images.square().sum(), images)
    assert torch.allclose(gradient, 2 * images)
    assert recipe.compare(1.5 * gradient, gradient) == pytest.approx((0.5, 1.0))
    assert recipe.compare(-gradient, gradient) == pytest.approx((2.0, -1.0))
    # A bf16 product keeps 8 bits.
    weight = torch.randn(4, 4)
    exact = recipe.gradient(lambda x: (x @ weight).square().sum(), images)
    rounded = recipe.gradient(recipe.under_autocast(lambda x: (x @ weight).square().sum()), images)
    relative, cosine = recipe.compare(rounded, exact)
    assert 1e-4 < relative < 2e-2
    assert 0.999 < cosine < 1
