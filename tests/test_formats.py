"""Weights of other code: each format is made by, or compared with, the library it belongs to."""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys

import diffusers
import lpips
import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file

from common.files import UserError, write_weights
from common.weights import load_sit, load_vae
import models
import sample
import train_vae
from conftest import ROOT, VAE, script
from common import published
from tools import weights

SMALL = dict(f8d4=dict(ch=32, ch_mult=(1, 2, 2, 2)), f16d32=dict(ch=32, ch_mult=(1, 1, 2, 2, 2)))


def small_vae(spec, groups=32):
    torch.manual_seed(0)
    vae = models.VAE(spec, 64, groups=groups, **SMALL[spec])
    for p in vae.parameters():  # zero-initialised branches would hide their errors
        torch.nn.init.normal_(p, std=0.1 if p.ndim > 1 else 0.3)
    vae.latent_mean.normal_(), vae.latent_std.uniform_(0.5, 2)
    return vae.eval()


@pytest.mark.parametrize("spec", ["f8d4", "f16d32"])
def test_export_is_what_diffusers_computes_and_comes_back_bit_for_bit(spec, tmp_path):
    vae, x = small_vae(spec, groups=8), torch.rand(2, 3, 64, 64) * 2 - 1
    weights.export_vae(vae, "diffusers", tmp_path / "d")
    theirs = diffusers.AutoencoderKL.from_pretrained(tmp_path / "d", low_cpu_mem_usage=False)
    with torch.no_grad():
        mean, logvar = vae.encode(x)
        posterior = theirs.encode(x).latent_dist
        assert_near(posterior.mean, mean)
        assert_near(posterior.logvar, logvar)
        assert_near(theirs.decode(mean).sample, vae.decode(mean))
        z = (
            mean - torch.tensor(theirs.config.latents_mean).view(1, -1, 1, 1)
        ) * theirs.config.scaling_factor
        torch.testing.assert_close(
            z / torch.tensor(theirs.config.latents_std).view(1, -1, 1, 1), vae.normalize(mean)
        )
    again = load_vae(tmp_path / "d")
    assert again.config == vae.config and again.info["format"] == "diffusers"
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in vae.state_dict().items())


@pytest.mark.parametrize("spec", ["f8d4", "f16d32"])
def test_diffusers_own_network_loads_strictly(spec, tmp_path):
    torch.manual_seed(0)
    attn = [spec == "f16d32" and i == 4 for i in range(len(SMALL[spec]["ch_mult"]))]
    net = diffusers.AutoencoderKL(
        down_block_types=["AttnDownEncoderBlock2D" if a else "DownEncoderBlock2D" for a in attn],
        up_block_types=[
            "AttnUpDecoderBlock2D" if a else "UpDecoderBlock2D" for a in reversed(attn)
        ],
        block_out_channels=[32 * m for m in SMALL[spec]["ch_mult"]],
        layers_per_block=2,
        norm_num_groups=16,
        latent_channels=int(spec.split("d")[1]),
        sample_size=64,
        scaling_factor=0.5,
        shift_factor=0.25,
    ).eval()
    net.save_pretrained(tmp_path)
    vae, x = load_vae(tmp_path), torch.rand(1, 3, 64, 64) * 2 - 1
    with torch.no_grad():
        posterior = net.encode(x).latent_dist
        mean, logvar = vae.encode(x)
        assert_near(mean, posterior.mean)
        assert_near(logvar, posterior.logvar)
        assert_near(vae.decode(mean), net.decode(mean).sample)
    torch.testing.assert_close(vae.normalize(mean), (mean - 0.25) * 0.5)


def test_diffusers_without_scaling_factor_means_its_default(tmp_path):
    """The config.json of the first releases, sd-vae-ft-mse's among them, does not name it; diffusers then takes LDM's."""
    weights.export_vae(small_vae("f8d4"), "diffusers", tmp_path)
    config = json.load(open(tmp_path / "config.json"))
    for key in ("scaling_factor", "shift_factor", "latents_mean", "latents_std"):
        del config[key]
    json.dump(config, open(tmp_path / "config.json", "w"))
    theirs, vae = (
        diffusers.AutoencoderKL.from_pretrained(tmp_path, low_cpu_mem_usage=False),
        load_vae(tmp_path),
    )
    z = torch.randn(1, 4, 2, 2)
    torch.testing.assert_close(vae.normalize(z), z * theirs.config.scaling_factor)


def assert_near(got, want):
    """To 1e-5 of the tensor's norm, the rounding of fp32 sums in another order."""
    assert got.shape == want.shape and (got - want).norm() < 1e-5 * want.norm()


def ldm_keys(ch, ch_mult, attn_levels, channels):
    """Names and shapes of LDM's AutoencoderKL state dict, written down from the published checkpoints' key lists."""
    shapes = {}

    def conv(name, cin, cout, k):
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (cout, cin, k, k), (cout,)

    def norm(name, c):
        shapes[f"{name}.weight"] = shapes[f"{name}.bias"] = (c,)

    def res(name, cin, cout):
        norm(f"{name}.norm1", cin), conv(f"{name}.conv1", cin, cout, 3), norm(f"{name}.norm2", cout)
        conv(f"{name}.conv2", cout, cout, 3)
        if cin != cout:
            conv(f"{name}.nin_shortcut", cin, cout, 1)

    def attn(name, c):
        norm(f"{name}.norm", c)
        for part in ("q", "k", "v", "proj_out"):
            conv(f"{name}.{part}", c, c, 1)

    last = len(ch_mult) - 1
    conv("encoder.conv_in", 3, ch, 3), conv("decoder.conv_in", channels, ch * ch_mult[-1], 3)
    c = ch
    for i, m in enumerate(ch_mult):
        for j in range(2):
            res(f"encoder.down.{i}.block.{j}", c, ch * m)
            c = ch * m
            if i in attn_levels:
                attn(f"encoder.down.{i}.attn.{j}", c)
        if i < last:
            conv(f"encoder.down.{i}.downsample.conv", c, c, 3)
    for side in ("encoder", "decoder"):
        (
            res(f"{side}.mid.block_1", c, c),
            attn(f"{side}.mid.attn_1", c),
            res(f"{side}.mid.block_2", c, c),
        )
    norm("encoder.norm_out", c), conv("encoder.conv_out", c, 2 * channels, 3)
    for i in range(last, -1, -1):
        for j in range(3):
            res(f"decoder.up.{i}.block.{j}", c, ch * ch_mult[i])
            c = ch * ch_mult[i]
            if i in attn_levels:
                attn(f"decoder.up.{i}.attn.{j}", c)
        if i > 0:
            conv(f"decoder.up.{i}.upsample.conv", c, c, 3)
    norm("decoder.norm_out", c), conv("decoder.conv_out", c, 3, 3)
    (
        conv("quant_conv", 2 * channels, 2 * channels, 1),
        conv("post_quant_conv", channels, channels, 1),
    )
    return shapes


@pytest.mark.parametrize(
    "spec,ch_mult,attn", [("f8d4", (1, 2, 4, 4), ()), ("f16d32", (1, 1, 2, 2, 4), (4,))]
)
def test_names_and_shapes_are_ldms(spec, ch_mult, attn):
    with torch.device("meta"):
        ours = models.VAE(spec).state_dict()
    ours = {k: tuple(v.shape) for k, v in ours.items() if not k.startswith("latent_")}
    assert ours == ldm_keys(128, ch_mult, attn, int(spec.split("d")[1]))


@pytest.mark.parametrize("release", ["ldm", "repa-e", "lightningdit"])
def test_published_checkpoints(release, tmp_path):
    spec = "f16d32" if release == "lightningdit" else "f8d4"
    vae, mean, std = small_vae(spec), torch.randn(4), torch.rand(4) + 0.5
    path = tmp_path / "vae.pt"
    weights.export_vae(vae, "ldm", path)
    state = torch.load(path, weights_only=True)["state_dict"]
    if release == "ldm":
        state.update(
            {"loss.discriminator.main.0.weight": torch.zeros(3), "model_ema.decay": torch.zeros(1)}
        )
        torch.save(dict(state_dict=state, global_step=3), path)
        mean, std = torch.zeros(4), torch.full((4,), 1 / 0.18215)
    elif release == "repa-e":
        torch.save(state, path)
        torch.save(
            dict(latents_scale=1 / std.view(1, 4, 1, 1), latents_bias=mean.view(1, 4, 1, 1)),
            tmp_path / "vae-latents-stats.pt",
        )
    else:
        mean, std = torch.randn(32), torch.rand(32) + 0.5
        state["foundation_model.x"] = state["linear_proj.weight"] = torch.zeros(2)
        torch.save(dict(state_dict=state), path)
        torch.save(
            dict(mean=mean.view(1, 32, 1, 1), std=std.view(1, 32, 1, 1)),
            tmp_path / "latents_stats.pt",
        )
    again = load_vae(path)
    assert again.info["format"] == "LDM"
    assert again.info["ignored"] == dict(
        ldm=["loss", "model_ema"], lightningdit=["foundation_model", "linear_proj"]
    ).get(release, [])
    assert torch.allclose(again.latent_mean, mean) and torch.allclose(again.latent_std, std)
    assert all(
        torch.equal(v, again.state_dict()[k])
        for k, v in vae.state_dict().items()
        if not k.startswith("latent_")
    )


def test_round_trip_is_bit_exact(tmp_path):
    vae = small_vae("f16d32")
    weights.export_vae(vae, "ldm", tmp_path / "a.ckpt")
    one = load_vae(tmp_path / "a.ckpt")
    weights.export_vae(one, "diffusers", tmp_path / "d")
    two = load_vae(tmp_path / "d")
    assert all(
        torch.equal(v, two.state_dict()[k])
        for k, v in vae.state_dict().items()
        if not k.startswith("latent_")
    )


def test_wrong_files(tmp_path, monkeypatch):
    def says(path):
        with pytest.raises(UserError) as stop:
            load_vae(path)
        assert "\n" not in str(stop.value)
        return str(stop.value)

    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pt")
    assert "holds no VAE" in says(tmp_path / "other.pt")
    torch.save({"encoder.conv_in.weight": print}, tmp_path / "code.pt")
    assert "without code" in says(tmp_path / "code.pt")
    weights.export_vae(small_vae("f8d4"), "ldm", tmp_path / "v.pt")
    state = torch.load(tmp_path / "v.pt", weights_only=True)["state_dict"]
    del state["encoder.mid.attn_1.q.bias"], state["decoder.conv_in.bias"]
    state["quant_conv.bias"] = torch.zeros(3)
    save_file(state, tmp_path / "v.safetensors")
    message = says(tmp_path / "v.safetensors")
    assert (
        'Missing key(s) in state_dict: "encoder.mid.attn_1.q.bias"' in message
        and "size mismatch for quant_conv.bias" in message
    )
    open(tmp_path / "cut.pt", "wb").write(open(tmp_path / "v.pt", "rb").read()[:5000])
    assert "cut.pt cannot be read" in says(tmp_path / "cut.pt")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "cannot get hf:nobody/nothing" in says("hf:nobody/nothing")
    assert "is not hf:<owner>/<repository>" in says("hf:nothing")


def test_hub_names_are_fetched_at_their_revision(tmp_path, monkeypatch):
    """The hub itself cannot be reached in a test: what we ask it for is checked, and that its answer is opened."""
    import huggingface_hub

    weights.export_vae(small_vae("f8d4"), "diffusers", tmp_path / "sub")
    asked = []
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda *a, **k: asked.append((a, k)) or str(tmp_path)
    )
    assert load_vae("hf:owner/name/sub@v2").channels == 4
    assert asked == [
        (
            ("owner/name",),
            dict(revision="v2", allow_patterns=["sub", "sub/*", "*stats.pt", "config.json"]),
        )
    ]


def test_in_a_folder_of_several_files_the_vae_is_found_and_its_statistics_count(tmp_path):
    """REPA-E's repositories hold the discriminator, which sorts before the VAE, and the latents' statistics beside it."""
    weights.export_vae(small_vae("f8d4"), "ldm", tmp_path / "sdvae-f8d4.pt")
    torch.save(
        {"loss.discriminator.main.0.weight": torch.zeros(1)},
        tmp_path / "sdvae-f8d4-discriminator-ckpt.pt",
    )
    torch.save(
        dict(latents_scale=torch.full((4,), 0.5), latents_bias=torch.ones(4)),
        tmp_path / "sdvae-f8d4-latents-stats.pt",
    )
    vae = load_vae(tmp_path)
    assert vae.latent_mean.tolist() == [1] * 4 and vae.latent_std.tolist() == [2] * 4


def test_a_sit_trained_on_a_vae_of_the_hub_finds_it_again(tmp_path, monkeypatch):
    import huggingface_hub

    weights.export_vae(small_vae("f8d4"), "diffusers", tmp_path / "hub")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: str(tmp_path / "hub"))
    sit = models.SiT("S", 2, 4, 8, num_classes=3, depth=1, width=32, heads=1)
    info = dict(
        step=1, classes=[], vae_path="hf:owner/vae", vae_hash=load_vae("hf:owner/vae").info["hash"]
    )
    write_weights(tmp_path / "sit.safetensors", "sit", sit.state_dict(), sit.config, info)
    assert (
        sample.load_pair(tmp_path / "sit.safetensors", None, "cpu")[1].info["hash"]
        == info["vae_hash"]
    )


def test_command_line(tmp_path, monkeypatch, capsys):
    vae = small_vae("f8d4")
    weights.export_vae(vae, "ldm", tmp_path / "v.pt")
    monkeypatch.setattr("sys.argv", ["weights.py", "info", str(tmp_path / "v.pt")])
    weights.main()
    out = capsys.readouterr().out
    assert (
        f"{sum(p.numel() for p in vae.parameters()):,}" in out
        and "LDM format" in out
        and "f8d4" in out
    )
    monkeypatch.setattr(
        "sys.argv",
        ["weights.py", "export", str(tmp_path / "v.pt"), "--to", "diffusers", str(tmp_path / "d")],
    )
    weights.main()
    assert json.load(open(tmp_path / "d" / "config.json"))["latent_channels"] == 4


def test_lpips_is_the_packages(tmp_path):
    """The lpips package ships the published linear weights; VGG's convolutions are random here, in both."""
    theirs = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False).eval()
    torch.save(theirs.state_dict(), tmp_path / "whole.pth")
    vgg = {
        re.sub(r"^net\.slice\d", "features", k): v
        for k, v in theirs.state_dict().items()
        if k.startswith("net.")
    }
    torch.save(vgg, tmp_path / "vgg.pth")
    linear = os.path.join(os.path.dirname(lpips.__file__), "weights", "v0.1", "vgg.pth")
    a, b = torch.rand(2, 2, 3, 64, 48) * 2 - 1
    with torch.no_grad():
        want = theirs(a, b).flatten()
        for files in ([tmp_path / "whole.pth"], [tmp_path / "vgg.pth", linear]):
            torch.testing.assert_close(models.LPIPS(files)(a, b), want, rtol=1e-4, atol=1e-7)
    assert want.min() > 1e-4


def test_discriminator_comes_out_of_a_training_checkpoint(tmp_path):
    torch.manual_seed(0)
    disc = models.PatchDiscriminator()
    torch.save(
        dict(state_dict={f"loss.discriminator.{k}": v for k, v in disc.state_dict().items()}),
        tmp_path / "d.ckpt",
    )
    loaded = published.load_discriminator(tmp_path / "d.ckpt")
    assert all(torch.equal(v, loaded.state_dict()[k]) for k, v in disc.state_dict().items())
    torch.save(dict(a=torch.zeros(1)), tmp_path / "x.pt")
    with pytest.raises(UserError, match="holds no discriminator"):
        published.load_discriminator(tmp_path / "x.pt")


# ---- SiT -------------------------------------------------------------------------------------------------------------


def original_sit():
    """A small network in the original's convention, from ours: learned sigma, t = 0 is noise, v = data - noise."""
    torch.manual_seed(0)
    net = models.SiT("S", 2, 4, 8, num_classes=3, depth=2, width=64, heads=1)
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.1)
    state = {k: v.clone() for k, v in net.state_dict().items()}
    for name in ("final_layer.linear.weight", "final_layer.linear.bias"):
        value = state[name].view(4, 4, -1)
        state[name] = torch.cat([value, torch.randn_like(value)], 1).reshape(
            32, *state[name].shape[1:]
        )
    return net.eval(), state


def test_original_sit_is_turned_in_time_and_sign(tmp_path):
    net, state = original_sit()
    torch.save(dict(ema=state, model=state, args=argparse.Namespace(a=1)), tmp_path / "sit.pt")
    loaded = load_sit(tmp_path / "sit.pt")
    x, t, y = (
        torch.randn(5, 4, 8, 8),
        torch.tensor([0.0, 0.1, 0.5, 0.93, 1.0]),
        torch.tensor([0, 1, 2, 3, 0]),
    )
    with torch.no_grad():
        want = -net(x, 1 - t, y)
        assert_near(loaded(x, t, y), want)
        assert (loaded(x, 1 - t, y) - want).norm() > 0.01 * want.norm()  # the test can fail
    assert loaded.info["latent_std"] == pytest.approx([1 / 0.18215] * 4)


def test_original_sit_draws_the_same_pictures_in_either_convention(tmp_path):
    """Their sampler from noise at t = 0 to data at t = 1, in Euler steps, is ours from 1 to 0."""
    net, state = original_sit()
    torch.save(state, tmp_path / "sit.pt")
    loaded, noise, y = (
        load_sit(tmp_path / "sit.pt"),
        torch.randn(3, 4, 8, 8),
        torch.tensor([0, 1, 2]),
    )
    with torch.no_grad():
        x = noise.double()
        for i in range(10):
            x = x + 0.1 * net(x.float(), torch.full((3,), i / 10), y).double()
        z = sample.integrate(lambda x, t: loaded(x, torch.full((3,), t), y), noise, "ode", 10)
    assert_near(z, x)


def test_repa_checkpoints_bring_projector_and_latent_statistics(tmp_path):
    torch.manual_seed(0)
    net = models.SiT("S", 1, 32, 4, num_classes=3, vfm_dim=24, depth=8, width=64, heads=1)
    bn = {
        "bn.running_mean": torch.randn(32),
        "bn.running_var": torch.rand(32) + 0.5,
        "bn.num_batches_tracked": torch.tensor(5),
    }
    torch.save(
        dict(ema={f"module.{k}": v for k, v in (net.state_dict() | bn).items()}),
        tmp_path / "repa.pt",
    )
    loaded = load_sit(tmp_path / "repa.pt")
    assert loaded.config["vfm_dim"] == 24 and all(
        torch.equal(v, loaded.state_dict()[k]) for k, v in net.state_dict().items()
    )
    vae = models.VAE("f16d32", 64, **SMALL["f16d32"])
    vae.latent_mean += 7
    weights.export_vae(vae, "diffusers", tmp_path / "vae")
    sit, vae = sample.load_pair(tmp_path / "repa.pt", tmp_path / "vae", "cpu")
    torch.testing.assert_close(vae.latent_mean, bn["bn.running_mean"])
    torch.testing.assert_close(vae.latent_std, (bn["bn.running_var"] + 1e-4).sqrt())
    assert vae.resolution == 64
    with pytest.raises(UserError, match="name it with --vae"):
        sample.load_pair(tmp_path / "repa.pt", None, "cpu")
    state = net.state_dict()
    state["blocks.0.attn.q_norm.weight"] = state.pop("blocks.0.attn.qkv.bias")
    torch.save(state, tmp_path / "bad.pt")
    with pytest.raises(
        UserError,
        match='Missing.*"blocks.0.attn.qkv.bias". Unexpected.*"blocks.0.attn.q_norm.weight"',
    ):
        load_sit(tmp_path / "bad.pt")


def test_published_pair_through_the_scripts(tmp_path, monkeypatch, pictures):
    """sample.py --sit and --vae, and train_vae.py --init and --init-disc, on files in the published formats."""
    monkeypatch.chdir(tmp_path)
    _, state = original_sit()
    torch.save(dict(ema=state, model=state), "SiT.pt")
    vae = small_vae("f8d4")
    disc = {
        f"loss.discriminator.{k}": v for k, v in models.PatchDiscriminator().state_dict().items()
    }
    torch.save(
        dict(
            state_dict={k: v for k, v in vae.state_dict().items() if not k.startswith("latent_")}
            | disc
        ),
        "kl-f8.ckpt",
    )
    script(
        sample,
        "--sit",
        "SiT.pt",
        "--vae",
        "kl-f8.ckpt",
        "--num",
        3,
        "--steps",
        3,
        "--out",
        "x.npz",
        "--precision",
        "fp32",
    )
    with np.load("x.npz") as file:
        assert file["arr_0"].shape == (3, 64, 64, 3) and '"sit_hash"' in str(file["settings"])
    script(
        train_vae,
        "--init",
        "kl-f8.ckpt",
        "--init-disc",
        "kl-f8.ckpt",
        "--data",
        pictures,
        "--resolution",
        32,
        "--align",
        "none",
        "--lpips",
        0,
        "--batch-size",
        4,
        "--steps",
        1,
        "--lr",
        0,
        "--workers",
        0,
    )
    trained = load_vae("runs/vae").state_dict()
    assert all(
        torch.equal(v, trained[k])
        for k, v in vae.state_dict().items()
        if not k.startswith("latent_")
    )


# ---- vision models ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(models.VFM_NAMES))
def test_short_names_have_the_papers_grids(name):
    """16x16 tokens at 256 px, 32x32 at 512, without building the weights (meta tensors)."""
    with torch.device("meta"):
        net = timm.create_model(models.VFM_NAMES[name], pretrained=False)
        patch = net.patch_embed.patch_size[0]
        for pixels, grid in ((256, 16), (512, 32)):
            net = timm.create_model(
                models.VFM_NAMES[name], pretrained=False, img_size=pixels // 16 * patch
            )
            tokens = net.forward_features(
                torch.zeros(1, 3, pixels // 16 * patch, pixels // 16 * patch)
            )
            assert tokens.shape[1] - net.num_prefix_tokens == grid**2
    assert timm.models.is_model_pretrained(models.VFM_NAMES[name])


@pytest.mark.parametrize(
    "name",
    [
        "test_vit",
        "test_vit2",
        "vit_wee_patch16_reg1_gap_256",
        "vit_small_patch16_dinov3",
        "vit_base_patch16_siglip_gap_224",
        "test_resnet",
        "test_efficientnet",
    ],
)
def test_vfm_tokens_are_timms_without_prefix(name, tmp_path):
    """Class token, registers, none (SigLIP, pooled by the mean), CNNs; on networks with random weights."""
    torch.manual_seed(0)
    net = timm.create_model(name).eval()
    save_file({k: v.contiguous() for k, v in net.state_dict().items()}, tmp_path / "w.safetensors")
    x = torch.rand(2, 3, 64, 64) * 2 - 1
    vfm = models.VFM(name, tmp_path / "w.safetensors", 64, grid=4)
    size = vfm.input_size
    with torch.no_grad():
        scaled = (torch.nn.functional.interpolate(x, (size, size), mode="bicubic") + 1) / 2
        want = vfm.model.forward_features((scaled - vfm.mean) / vfm.std)
        want = (
            want.flatten(2).transpose(1, 2)
            if want.ndim == 4
            else want[:, getattr(net, "num_prefix_tokens", 0) :]
        )
        assert vfm.grid == 4 and torch.equal(vfm(x), want)
    same = {k for k, v in net.state_dict().items() if v.shape == vfm.model.state_dict()[k].shape}
    assert all(torch.equal(net.state_dict()[k], vfm.model.state_dict()[k]) for k in same)
    assert set(net.state_dict()) - same <= {"pos_embed"}
