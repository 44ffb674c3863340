"""Weights of other code: each format is made by, or compared with, the library it belongs to."""

import argparse
import collections
import json
import os
import pathlib
import re
import shlex

import diffusers
import huggingface_hub
import lpips
import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

import models
import sample
import train_sit
import train_vae
from common import published
from common.files import UserError, write_weights
from common.pictures import ImageSet, from_uint8
from common.weights import load_sit, load_vae
from conftest import refused, script
from tools import weights

SMALL = {
    "f8d4": dict(ch=32, ch_mult=(1, 2, 2, 2)),
    "f16d32": dict(ch=32, ch_mult=(1, 1, 2, 2, 2)),
}


def small_vae(spec, groups=32):
    """A narrow VAE of random weights and random latent statistics."""
    torch.manual_seed(0)
    vae = models.VAE(spec, 64, groups=groups, **SMALL[spec])
    for p in vae.parameters():
        # A branch that starts at zero would hide errors inside it.
        torch.nn.init.normal_(p, std=0.1 if p.ndim > 1 else 0.3)
    vae.latent_mean.normal_()
    vae.latent_std.uniform_(0.5, 2)
    return vae.eval()


def random_images(count=1):
    return torch.rand(count, 3, 64, 64) * 2 - 1


def assert_near(got, expected):
    """To 1e-5 of the tensor's norm, the rounding of fp32 sums in another order."""
    assert got.shape == expected.shape
    assert (got - expected).norm() < 1e-5 * expected.norm()


def assert_same_weights(got, expected):
    """The state dict `got` has every entry of `expected`, bit for bit."""
    for key, value in expected.items():
        assert torch.equal(value, got[key]), key


def own_weights(vae):
    """The state dict without the statistics of the latents."""
    state = vae.state_dict()
    return {key: value for key, value in state.items() if not key.startswith("latent_")}


def per_channel(values):
    """(C,) -> (1,C,1,1)"""
    return torch.as_tensor(values).view(1, -1, 1, 1)


# --------------------------------------------------------------------------------------------------
# VAEs of diffusers


@pytest.mark.parametrize("spec", ["f8d4", "f16d32"])
def test_export_is_what_diffusers_computes_and_comes_back_bit_for_bit(spec, tmp_path):
    vae = small_vae(spec, groups=8)
    x = random_images(2)
    weights.export_vae(vae, "diffusers", tmp_path / "d")
    theirs = diffusers.AutoencoderKL.from_pretrained(tmp_path / "d", low_cpu_mem_usage=False)
    with torch.no_grad():
        mean, logvar = vae.encode(x)
        posterior = theirs.encode(x).latent_dist
        assert_near(posterior.mean, mean)
        assert_near(posterior.logvar, logvar)
        assert_near(theirs.decode(mean).sample, vae.decode(mean))
        z = mean - per_channel(theirs.config.latents_mean)
        z = z * theirs.config.scaling_factor / per_channel(theirs.config.latents_std)
        torch.testing.assert_close(z, vae.normalize(mean))
    again = load_vae(tmp_path / "d")
    assert again.config == vae.config
    assert again.info["format"] == "diffusers"
    assert_same_weights(again.state_dict(), vae.state_dict())


def their_vae(spec):
    """diffusers' own network with the architecture of a small VAE of ours."""
    torch.manual_seed(0)
    num_levels = len(SMALL[spec]["ch_mult"])
    down = ["DownEncoderBlock2D"] * num_levels
    up = ["UpDecoderBlock2D"] * num_levels
    if spec == "f16d32":
        down[4] = "AttnDownEncoderBlock2D"
        up[0] = "AttnUpDecoderBlock2D"
    return diffusers.AutoencoderKL(
        down_block_types=down,
        up_block_types=up,
        block_out_channels=[32 * mult for mult in SMALL[spec]["ch_mult"]],
        layers_per_block=2,
        norm_num_groups=16,
        latent_channels=int(spec.split("d")[1]),
        sample_size=64,
        scaling_factor=0.5,
        shift_factor=0.25,
    ).eval()


@pytest.mark.parametrize("spec", ["f8d4", "f16d32"])
def test_diffusers_own_network_loads_strictly(spec, tmp_path):
    net = their_vae(spec)
    net.save_pretrained(tmp_path)
    vae = load_vae(tmp_path)
    x = random_images()
    with torch.no_grad():
        posterior = net.encode(x).latent_dist
        mean, logvar = vae.encode(x)
        assert_near(mean, posterior.mean)
        assert_near(logvar, posterior.logvar)
        assert_near(vae.decode(mean), net.decode(mean).sample)
    torch.testing.assert_close(vae.normalize(mean), (mean - 0.25) * 0.5)


def test_vaes_of_sd3_and_flux(tmp_path, inside, pictures):
    """16 channels, no quant_conv, a scale and a shift: it is loaded, trained and exported."""
    torch.manual_seed(0)
    net = diffusers.AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        block_out_channels=[32, 32, 64, 64],
        layers_per_block=1,
        latent_channels=16,
        scaling_factor=0.3611,
        shift_factor=0.1159,
        use_quant_conv=False,
        use_post_quant_conv=False,
        sample_size=64,
    ).eval()
    net.save_pretrained(tmp_path / "flux")
    vae = load_vae(tmp_path / "flux")
    x = random_images()
    weights.export_vae(vae, "diffusers", tmp_path / "again")
    again = diffusers.AutoencoderKL.from_pretrained(tmp_path / "again", low_cpu_mem_usage=False)
    with torch.no_grad():
        mean, _ = vae.encode(x)
        assert_near(mean, net.encode(x).latent_dist.mean)
        assert_near(vae.decode(mean), net.decode(mean).sample)
        assert torch.equal(again.encode(x).latent_dist.mean, net.encode(x).latent_dist.mean)
    torch.testing.assert_close(vae.normalize(mean), (mean - 0.1159) * 0.3611)
    # Pipelines read these two and no latents_std.
    assert again.config.scaling_factor == pytest.approx(0.3611)
    assert again.config.shift_factor == pytest.approx(0.1159)
    # A file in LDM's names without quant_conv, as FLUX's own ae.safetensors is.
    save_file(own_weights(vae), tmp_path / "ae.safetensors")
    assert_same_weights(load_vae(tmp_path / "ae.safetensors").state_dict(), own_weights(vae))

    words = f"--init {tmp_path / 'flux'} --resolution 32 --align none --lpips 0 --gan 0"
    words += " --batch-size 4 --steps 1 --lr 1e-3 --workers 0"
    script(train_vae, *words.split(), "--data", pictures)
    trained = load_vae("runs/vae")
    assert trained.config["quant_conv"] is False
    assert (trained.encoder.conv_in.weight - vae.encoder.conv_in.weight).abs().max() > 0
    weights.export_vae(trained, "diffusers", tmp_path / "trained")
    assert_same_weights(load_vae(tmp_path / "trained").state_dict(), trained.state_dict())


def export_without_statistics(vae, folder):
    """As diffusers has a VAE whose config.json leaves the scaling factor to its default."""
    weights.export_vae(vae, "diffusers", folder)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    for key in ("scaling_factor", "shift_factor", "latents_mean", "latents_std"):
        config.pop(key, None)
    path.write_text(json.dumps(config))


def test_diffusers_without_scaling_factor_means_its_default(tmp_path):
    """The config.json of the first releases, sd-vae-ft-mse's among them, does not have the entry;
    diffusers then takes LDM's factor."""
    export_without_statistics(small_vae("f8d4"), tmp_path)
    theirs = diffusers.AutoencoderKL.from_pretrained(tmp_path, low_cpu_mem_usage=False)
    vae = load_vae(tmp_path)
    z = torch.randn(1, 4, 2, 2)
    torch.testing.assert_close(vae.normalize(z), z * theirs.config.scaling_factor)


def test_round_trip_is_bit_exact(tmp_path):
    vae = small_vae("f16d32")
    weights.export_vae(vae, "ldm", tmp_path / "a.ckpt")
    weights.export_vae(load_vae(tmp_path / "a.ckpt"), "diffusers", tmp_path / "d")
    assert_same_weights(load_vae(tmp_path / "d").state_dict(), own_weights(vae))


# --------------------------------------------------------------------------------------------------
# VAEs of LDM, REPA-E and LightningDiT


class LDMKeys:
    """Names and shapes of LDM's AutoencoderKL state dict, in .shapes, written down from the lists
    of keys of the published checkpoints."""

    def __init__(self, ch, ch_mult, attn_levels, channels):
        self.shapes = {}
        self.attn_levels = attn_levels
        widths = [ch * mult for mult in ch_mult]
        self.add_encoder(ch, widths, channels)
        self.add_decoder(widths, channels)
        self.conv("quant_conv", 2 * channels, 2 * channels, 1)
        self.conv("post_quant_conv", channels, channels, 1)

    def add_encoder(self, ch, widths, channels):
        self.conv("encoder.conv_in", 3, ch, 3)
        c = ch
        for i, width in enumerate(widths):
            for j in range(2):
                self.res(f"encoder.down.{i}.block.{j}", c, width)
                c = width
                if i in self.attn_levels:
                    self.attn(f"encoder.down.{i}.attn.{j}", c)
            if i < len(widths) - 1:
                self.conv(f"encoder.down.{i}.downsample.conv", c, c, 3)
        self.mid("encoder", c)
        self.norm("encoder.norm_out", c)
        self.conv("encoder.conv_out", c, 2 * channels, 3)

    def add_decoder(self, widths, channels):
        c = widths[-1]
        self.conv("decoder.conv_in", channels, c, 3)
        self.mid("decoder", c)
        for i, width in reversed(list(enumerate(widths))):
            for j in range(3):
                self.res(f"decoder.up.{i}.block.{j}", c, width)
                c = width
                if i in self.attn_levels:
                    self.attn(f"decoder.up.{i}.attn.{j}", c)
            if i > 0:
                self.conv(f"decoder.up.{i}.upsample.conv", c, c, 3)
        self.norm("decoder.norm_out", c)
        self.conv("decoder.conv_out", c, 3, 3)

    def conv(self, name, cin, cout, k):
        self.shapes[f"{name}.weight"] = (cout, cin, k, k)
        self.shapes[f"{name}.bias"] = (cout,)

    def norm(self, name, c):
        self.shapes[f"{name}.weight"] = (c,)
        self.shapes[f"{name}.bias"] = (c,)

    def res(self, name, cin, cout):
        self.norm(f"{name}.norm1", cin)
        self.conv(f"{name}.conv1", cin, cout, 3)
        self.norm(f"{name}.norm2", cout)
        self.conv(f"{name}.conv2", cout, cout, 3)
        if cin != cout:
            self.conv(f"{name}.nin_shortcut", cin, cout, 1)

    def attn(self, name, c):
        self.norm(f"{name}.norm", c)
        for part in ("q", "k", "v", "proj_out"):
            self.conv(f"{name}.{part}", c, c, 1)

    def mid(self, side, c):
        self.res(f"{side}.mid.block_1", c, c)
        self.attn(f"{side}.mid.attn_1", c)
        self.res(f"{side}.mid.block_2", c, c)


@pytest.mark.parametrize(
    "spec,ch_mult,attn", [("f8d4", (1, 2, 4, 4), ()), ("f16d32", (1, 1, 2, 2, 4), (4,))]
)
def test_names_and_shapes_are_ldms(spec, ch_mult, attn):
    with torch.device("meta"):
        state = own_weights(models.VAE(spec))
    shapes = {key: tuple(value.shape) for key, value in state.items()}
    channels = int(spec.split("d")[1])
    assert shapes == LDMKeys(128, ch_mult, attn, channels).shapes


def save_ldm(folder):
    """As LDM does: with the loss's weights and the EMA's, and no statistics of the latents."""
    vae = small_vae("f8d4")
    state = own_weights(vae)
    state["loss.discriminator.main.0.weight"] = torch.zeros(3)
    state["model_ema.decay"] = torch.zeros(1)
    torch.save(dict(state_dict=state, global_step=3), folder / "vae.pt")
    return vae, torch.zeros(4), torch.full((4,), 1 / 0.18215), ["loss", "model_ema"]


def save_repa_e(folder):
    """As REPA-E does: with bias and scale of the latents in a file that has the VAE's name."""
    vae = small_vae("f8d4")
    mean = torch.randn(4)
    std = torch.rand(4) + 0.5
    torch.save(own_weights(vae), folder / "vae.pt")
    statistics = dict(latents_scale=per_channel(1 / std), latents_bias=per_channel(mean))
    torch.save(statistics, folder / "vae-latents-stats.pt")
    return vae, mean, std, []


def save_lightningdit(folder):
    """As LightningDiT does: with the vision model's weights and its projection, and the statistics
    of the latents in a file of their own."""
    vae = small_vae("f16d32")
    mean = torch.randn(32)
    std = torch.rand(32) + 0.5
    state = own_weights(vae)
    state["foundation_model.x"] = torch.zeros(2)
    state["linear_proj.weight"] = torch.zeros(2)
    torch.save(dict(state_dict=state), folder / "vae.pt")
    statistics = dict(mean=per_channel(mean), std=per_channel(std))
    torch.save(statistics, folder / "latents_stats.pt")
    return vae, mean, std, ["foundation_model", "linear_proj"]


@pytest.mark.parametrize("save", [save_ldm, save_repa_e, save_lightningdit])
def test_published_checkpoints(save, tmp_path):
    vae, mean, std, ignored = save(tmp_path)
    again = load_vae(tmp_path / "vae.pt")
    assert again.info["format"] == "LDM"
    assert again.info["ignored"] == ignored
    assert torch.allclose(again.latent_mean, mean)
    assert torch.allclose(again.latent_std, std)
    assert_same_weights(again.state_dict(), own_weights(vae))


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_names_of_torch_compile_are_removed(prefix, repa_sit, tmp_path):
    def save(state):
        # The second network was compiled block by block.
        inside = {key.replace(".0.", ".0._orig_mod."): value for key, value in state.items()}
        for names in ({prefix + key: value for key, value in state.items()}, inside):
            torch.save(names, tmp_path / "x.pt")
            yield tmp_path / "x.pt"

    vae = own_weights(small_vae("f8d4"))
    for path in save(vae):
        assert_same_weights(load_vae(path).state_dict(), vae)
    for path in save(repa_sit[0].state_dict()):
        assert_same_weights(load_sit(path).state_dict(), repa_sit[0].state_dict())
    discriminator = models.PatchDiscriminator().state_dict()
    for path in save(discriminator):
        loaded = published.load_discriminator(path)
        assert_same_weights(loaded.state_dict(), discriminator)


@pytest.mark.parametrize("entry", ["model", "ema", "vae", "net"])
def test_a_vae_as_an_entry_of_its_file(entry, tmp_path):
    """MAR's is {"model": ...}."""
    state = own_weights(small_vae("f8d4"))
    torch.save({"opt": {"state": {0: torch.zeros(1)}}, entry: state}, tmp_path / "x.pt")
    loaded = load_vae(tmp_path / "x.pt")
    assert_same_weights(loaded.state_dict(), state)
    assert loaded.info["part"] == entry


def test_discriminator_comes_out_of_a_training_checkpoint(tmp_path):
    torch.manual_seed(0)
    expected = models.PatchDiscriminator().state_dict()
    state = {f"loss.discriminator.{key}": value for key, value in expected.items()}
    torch.save(dict(state_dict=state), tmp_path / "d.ckpt")
    loaded = published.load_discriminator(tmp_path / "d.ckpt")
    assert_same_weights(loaded.state_dict(), expected)
    torch.save(dict(a=torch.zeros(1)), tmp_path / "x.pt")
    with pytest.raises(UserError, match="holds no discriminator"):
        published.load_discriminator(tmp_path / "x.pt")


# --------------------------------------------------------------------------------------------------
# Files, folders, the hub


def message_of(path):
    """The one sentence with which load_vae refuses a path."""
    with pytest.raises(UserError) as stop:
        load_vae(path)
    assert "\n" not in str(stop.value)
    return str(stop.value)


def test_a_file_without_a_vae(tmp_path):
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pt")
    assert "holds no VAE" in message_of(tmp_path / "other.pt")


class Foreign:
    """Stands for a class of another package."""


class ForeignDict(dict):
    pass


class ForeignList(list):
    pass


@pytest.mark.parametrize("is_zip", [True, False])
def test_classes_of_other_packages_are_read_around_and_listed(is_zip, tmp_path, capsys):
    """As Lightning wrote every .ckpt of LDM's, keyed by a class; with and without the zip format of
    torch 1.6."""
    vae = small_vae("f8d4")
    thing = Foreign()
    thing.path = pathlib.Path("x")
    mapping = ForeignDict(a=thing)
    mapping.attribute = 1
    content = dict(
        state_dict=own_weights(vae),
        callbacks={Foreign: dict(best_model_path="x")},
        hyper_parameters=mapping,
        several=ForeignList([thing, 2]),
        defaults=collections.defaultdict(list, {1: [2]}),
        monitor=np.float64(0.5),
        array=np.arange(3),
        dtype=torch.float16,
    )
    torch.save(content, tmp_path / "v.ckpt", _use_new_zipfile_serialization=is_zip)
    again = load_vae(tmp_path / "v.ckpt")
    assert_same_weights(again.state_dict(), own_weights(vae))
    left_out = again.info["left_out"].split(", ")
    assert f"{__name__}.Foreign" in left_out
    assert {"pathlib.PosixPath", "collections.defaultdict"} <= set(left_out)
    assert not any(name.startswith("torch") for name in left_out)
    script(weights, "info", tmp_path / "v.ckpt")
    assert f"{__name__}.ForeignDict" in capsys.readouterr().out


class Payload:
    """Pickles as a call of a function."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("is_zip", [True, False])
def test_code_in_a_file_is_never_run(is_zip, tmp_path):
    mark = tmp_path / "was_run"
    state = own_weights(small_vae("f8d4"))
    for payload in (Payload(eval, f"open({str(mark)!r}, 'w')"), Payload(open, str(mark), "w")):
        path = tmp_path / "code.pt"
        torch.save(state | {"x": payload}, path, _use_new_zipfile_serialization=is_zip)
        assert_same_weights(load_vae(path).state_dict(), state)
        torch.save(payload, path, _use_new_zipfile_serialization=is_zip)
        assert "which is not read because it may run code" in message_of(path)
    torch.save(
        state | {"x": Payload(os.system, f"touch {mark}")},
        tmp_path / "system.pt",
        _use_new_zipfile_serialization=is_zip,
    )
    message = message_of(tmp_path / "system.pt")
    assert "it holds posix.system, which is not read because it may run code" in message
    assert "torch.save(network.state_dict(), FILE)" in message
    assert not mark.exists()


def test_a_whole_network_is_refused_by_name(tmp_path):
    torch.save(torch.nn.Linear(1, 1), tmp_path / "net.pt")
    assert "torch.nn.modules.linear.Linear" in message_of(tmp_path / "net.pt")


def test_a_function_in_the_place_of_a_tensor(tmp_path):
    torch.save({"encoder.conv_in.weight": print}, tmp_path / "code.pt")
    assert "holds no VAE" in message_of(tmp_path / "code.pt")


@pytest.mark.parametrize("content", [{}, {"state_dict": {}}, {"model": {}}, {1: torch.zeros(2)}])
@pytest.mark.parametrize("load", [load_vae, load_sit, published.load_discriminator])
def test_no_sentence_ends_in_an_empty_list(load, content, tmp_path):
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(UserError, match=r"it holds no tensor|its first keys are model$"):
        load(tmp_path / "x.pt")


def test_a_vae_that_does_not_fit(tmp_path):
    state = own_weights(small_vae("f8d4"))
    del state["encoder.mid.attn_1.q.bias"]
    del state["decoder.conv_in.bias"]
    state["quant_conv.bias"] = torch.zeros(3)
    save_file(state, tmp_path / "v.safetensors")
    message = message_of(tmp_path / "v.safetensors")
    assert 'Missing key(s) in state_dict: "encoder.mid.attn_1.q.bias"' in message
    assert "size mismatch for quant_conv.bias" in message


def test_ldm_s_format_holds_no_other_groups(tmp_path, capsys):
    """LDM's code, REPA-E's and LightningDiT's give every norm 32 groups. A VAE with others would
    load there, and decode something else."""
    vae = small_vae("f8d4", groups=8)
    write_weights(tmp_path / "ours.safetensors", "vae", vae.state_dict(), vae.config, dict(step=1))
    words = ["export", tmp_path / "ours.safetensors", "--to", "ldm", tmp_path / "v.pt"]
    message = refused(capsys, weights, *words)
    assert "v.pt was not written: the norms of this VAE have 8 groups" in message
    assert "export it with --to diffusers" in message
    assert not list(tmp_path.glob("v*"))


def test_the_groups_of_a_narrow_vae_in_ldm_s_names(tmp_path):
    """As exported now; by older versions, which lost their number; and by others."""
    vae = small_vae("f8d4")
    path = tmp_path / "v.pt"
    weights.export_vae(vae, "ldm", path)
    again = load_vae(path)
    assert again.info["assumed"] is None
    x = random_images()
    assert_near(again.encode(x)[0], vae.encode(x)[0])

    statistics = tmp_path / "v-latents-stats.pt"
    content = torch.load(statistics, weights_only=True)
    del content["groups"]
    torch.save(content, statistics)
    assert "lost the number of groups of its norms; export it anew" in message_of(path)

    statistics.unlink()
    assert "norms of 32 groups are assumed" in load_vae(path).info["assumed"]


def test_a_file_that_is_cut(tmp_path):
    weights.export_vae(small_vae("f8d4"), "ldm", tmp_path / "v.pt")
    data = (tmp_path / "v.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(data[:5000])
    assert "cut.pt cannot be read" in message_of(tmp_path / "cut.pt")


def test_wrong_names_of_the_hub(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "cannot get hf:nobody/nothing" in message_of("hf:nobody/nothing")
    assert "is not hf:<owner>/<repository>" in message_of("hf:nothing")


def replace_hub(monkeypatch, folder):
    """Has the hub answer every request with a folder. Returns the list of requests, as positional
    and keyword arguments of huggingface_hub.snapshot_download."""
    requests = []

    def snapshot_download(*words, **options):
        requests.append((words, options))
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return requests


def test_hub_names_are_fetched_at_their_revision(tmp_path, monkeypatch):
    """A test cannot reach the hub: it compares what the hub is asked for, and opens its answer."""
    weights.export_vae(small_vae("f8d4"), "diffusers", tmp_path / "sub")
    requests = replace_hub(monkeypatch, tmp_path)
    assert load_vae("hf:owner/name/sub@v2").channels == 4
    patterns = ["sub", "sub/*", "*stats.pt", "config.json"]
    assert requests == [(("owner/name",), dict(revision="v2", allow_patterns=patterns))]


def test_a_sit_trained_on_a_vae_of_the_hub_finds_it_again(tmp_path, monkeypatch):
    weights.export_vae(small_vae("f8d4"), "diffusers", tmp_path / "hub")
    replace_hub(monkeypatch, tmp_path / "hub")
    vae_hash = load_vae("hf:owner/vae").info["hash"]
    sit = models.SiT("S", 2, 4, 8, num_classes=3, depth=1, width=32, heads=1)
    info = dict(step=1, classes=[], vae_path="hf:owner/vae", vae_hash=vae_hash)
    path = tmp_path / "sit.safetensors"
    write_weights(path, "sit", sit.state_dict(), sit.config, info)
    _, vae = sample.load_pair(path, None, "cpu")
    assert vae.info["hash"] == vae_hash


def test_in_a_folder_of_several_files_the_vae_is_found_and_its_statistics_count(tmp_path):
    """REPA-E's repositories hold the discriminator, which sorts before the VAE, and the statistics
    of the latents beside it."""
    weights.export_vae(small_vae("f8d4"), "ldm", tmp_path / "sdvae-f8d4.pt")
    discriminator = {"loss.discriminator.main.0.weight": torch.zeros(1)}
    torch.save(discriminator, tmp_path / "sdvae-f8d4-discriminator-ckpt.pt")
    statistics = dict(latents_scale=torch.full((4,), 0.5), latents_bias=torch.ones(4))
    torch.save(statistics, tmp_path / "sdvae-f8d4-latents-stats.pt")
    vae = load_vae(tmp_path)
    assert vae.latent_mean.tolist() == [1] * 4
    assert vae.latent_std.tolist() == [2] * 4


def test_command_line(tmp_path, capsys):
    vae = small_vae("f8d4")
    weights.export_vae(vae, "ldm", tmp_path / "v.pt")
    script(weights, "info", tmp_path / "v.pt")
    out = capsys.readouterr().out
    num_parameters = sum(p.numel() for p in vae.parameters())
    assert f"{num_parameters:,}" in out
    assert "LDM format" in out
    assert "f8d4" in out
    script(weights, "export", tmp_path / "v.pt", "--to", "diffusers", tmp_path / "d")
    config = json.loads((tmp_path / "d" / "config.json").read_text())
    assert config["latent_channels"] == 4


# --------------------------------------------------------------------------------------------------
# SiTs


def original_sit():
    """A small network of ours -> (network, its state dict in the form of the original SiT's, with a
    learned variance). The network follows the original's convention: t = 0 is noise, and v = data -
    noise."""
    torch.manual_seed(0)
    net = models.SiT("S", 2, 4, 8, num_classes=3, depth=2, width=64, heads=1)
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.1)
    state = {key: value.clone() for key, value in net.state_dict().items()}
    for name in ("final_layer.linear.weight", "final_layer.linear.bias"):
        velocity = state[name].view(4, 4, -1)  # (pixels, channels, ...)
        both = torch.cat([velocity, torch.randn_like(velocity)], 1)
        state[name] = both.reshape(32, *state[name].shape[1:])
    return net.eval(), state


def test_original_sit_is_turned_in_time_and_sign(tmp_path):
    net, state = original_sit()
    torch.save(dict(ema=state, model=state, args=argparse.Namespace(a=1)), tmp_path / "sit.pt")
    loaded = load_sit(tmp_path / "sit.pt")
    x = torch.randn(5, 4, 8, 8)
    t = torch.tensor([0.0, 0.1, 0.5, 0.93, 1.0])
    y = torch.tensor([0, 1, 2, 3, 0])
    with torch.no_grad():
        expected = -net(x, 1 - t, y)
        assert_near(loaded(x, t, y), expected)
        # At the wrong time the velocity differs: the test can fail.
        assert (loaded(x, 1 - t, y) - expected).norm() > 0.01 * expected.norm()
    assert loaded.info["latent_std"] == pytest.approx([1 / 0.18215] * 4)


def test_original_sit_draws_the_same_pictures_in_either_convention(tmp_path):
    """Their sampler from noise at t = 0 to data at t = 1, in Euler steps, is ours from 1 to 0."""
    net, state = original_sit()
    torch.save(state, tmp_path / "sit.pt")
    loaded = load_sit(tmp_path / "sit.pt")
    noise = torch.randn(3, 4, 8, 8)
    y = torch.tensor([0, 1, 2])

    def velocity(x, t):
        return loaded(x, torch.full((3,), t), y)

    with torch.no_grad():
        x = noise.double()
        for i in range(10):
            x = x + 0.1 * net(x.float(), torch.full((3,), i / 10), y).double()
        z = sample.integrate(velocity, noise, "ode", 10)
    assert_near(z, x)


REPA_SIT = dict(
    size="S",
    patch=1,
    channels=32,
    latent_size=4,
    num_classes=3,
    vfm_dim=24,
    depth=8,
    width=64,
    heads=1,
)


@pytest.fixture
def repa_sit(tmp_path):
    """-> (network, REPA-E's batch norm of its latents), saved together as repa.pt."""
    torch.manual_seed(0)
    net = models.SiT(**REPA_SIT)
    batch_norm = {
        "bn.running_mean": torch.randn(32),
        "bn.running_var": torch.rand(32) + 0.5,
        "bn.num_batches_tracked": torch.tensor(5),
    }
    ema = {f"module.{key}": value for key, value in (net.state_dict() | batch_norm).items()}
    torch.save(dict(ema=ema), tmp_path / "repa.pt")
    return net, batch_norm


def test_repa_checkpoints_bring_their_projector(repa_sit, tmp_path):
    net, _ = repa_sit
    loaded = load_sit(tmp_path / "repa.pt")
    assert loaded.config["vfm_dim"] == 24
    assert_same_weights(loaded.state_dict(), net.state_dict())


def test_repa_checkpoints_bring_latent_statistics(repa_sit, tmp_path):
    _, batch_norm = repa_sit
    vae = models.VAE("f16d32", 64, **SMALL["f16d32"])
    vae.latent_mean += 7
    weights.export_vae(vae, "diffusers", tmp_path / "vae")
    _, vae = sample.load_pair(tmp_path / "repa.pt", tmp_path / "vae", "cpu")
    torch.testing.assert_close(vae.latent_mean, batch_norm["bn.running_mean"])
    torch.testing.assert_close(vae.latent_std, (batch_norm["bn.running_var"] + 1e-4).sqrt())
    assert vae.resolution == 64
    with pytest.raises(UserError, match="name it with --vae"):
        sample.load_pair(tmp_path / "repa.pt", None, "cpu")


@pytest.fixture
def joint(repa_sit, tmp_path):
    """REPA-E's training checkpoint, 0400000.pt -> (its entries, path)."""
    net, batch_norm = repa_sit
    raw = {key: value + 1 for key, value in net.state_dict().items()}
    content = dict(
        model={f"module.{key}": value for key, value in (raw | batch_norm).items()},
        ema=net.state_dict() | batch_norm,
        vae=own_weights(models.VAE("f16d32", 64, **SMALL["f16d32"])),
        discriminator=models.PatchDiscriminator().state_dict(),
        opt=dict(state={}),
        args=argparse.Namespace(encoder_depth=4, model="SiT-XL/1", num_classes=3, cfg_prob=0.1),
        steps=400000,
    )
    torch.save(content, tmp_path / "0400000.pt")
    return content, tmp_path / "0400000.pt"


def test_each_loader_finds_its_part_of_a_joint_checkpoint(joint, capsys):
    content, path = joint
    sit = load_sit(path)
    for name, value in sit.state_dict().items():
        assert torch.equal(value, content["ema"][name]), name
    assert sit.info["weights"] == "ema"
    assert sit.config["repa_block"] == 4
    assert sit.info["null_label_trained"]
    raw = load_sit(path, ema=False)
    assert torch.equal(raw.pos_embed, content["model"]["module.pos_embed"])
    assert raw.info["weights"] == "raw"
    assert_same_weights(load_vae(path).state_dict(), content["vae"])
    discriminator = published.load_discriminator(path)
    assert_same_weights(discriminator.state_dict(), content["discriminator"])
    capsys.readouterr()
    script(weights, "info", path)
    out = capsys.readouterr().out
    assert re.findall(r"^(SiT|VAE|discriminator),", out, re.M) == ["SiT", "VAE", "discriminator"]
    assert "sqrt(var + 1e-4) to normalise, sqrt(var) to decode" in out


def test_samples_of_a_joint_checkpoint_are_decoded_with_repa_es_std(joint, tmp_path):
    """REPA-E divides latents by sqrt(var + 1e-4), and multiplies by sqrt(var) before it decodes."""
    content, path = joint
    mean = content["ema"]["bn.running_mean"]
    variance = content["ema"]["bn.running_var"] * 1e-3  # so small that 1e-4 shows
    content["ema"]["bn.running_var"] = variance
    torch.save(content, path)
    _, pair_vae = sample.load_pair(path, None, "cpu")
    weights.export_vae(load_vae(path), "ldm", tmp_path / "out.pt")
    weights.export_vae(load_vae(path), "diffusers", tmp_path / "out")
    z = torch.randn(2, 32, 4, 4)
    for vae in (
        pair_vae,
        load_vae(path),
        load_vae(tmp_path / "out.pt"),
        load_vae(tmp_path / "out"),
    ):
        theirs = per_channel(variance).sqrt() * z + per_channel(mean)
        torch.testing.assert_close(vae.denormalize(z), theirs, rtol=1e-6, atol=1e-6)
        theirs = torch.nn.functional.batch_norm(z, mean, variance, eps=1e-4)
        torch.testing.assert_close(vae.normalize(z), theirs, rtol=1e-6, atol=1e-5)
        assert (vae.denormalize(vae.normalize(z)) - z).abs().max() > 1e-3
    stats = torch.load(tmp_path / "out-latents-stats.pt", weights_only=True)
    torch.testing.assert_close(1 / stats["latents_scale"], per_channel(variance).sqrt())


def save_repa(path, net, args=None, **extra):
    """Saves a network of ours as REPA's code does; args: those of its training."""
    content = dict(model=net.state_dict(), ema=net.state_dict() | extra)
    if args is not None:
        content["args"] = argparse.Namespace(**args)
    torch.save(content, path)


def test_shallow_networks_without_a_projector_and_with_several(tmp_path):
    torch.manual_seed(0)
    config = REPA_SIT | dict(depth=3, vfm_dim=None)
    net = models.SiT(**config)
    save_repa(tmp_path / "none.pt", net)
    assert_same_weights(load_sit(tmp_path / "none.pt").state_dict(), net.state_dict())
    net = models.SiT(**config | dict(vfm_dim=24, repa_block=2))
    save_repa(tmp_path / "one.pt", net)
    assert load_sit(tmp_path / "one.pt").config["repa_block"] == 3
    second = {f"projectors.1.{i}.bias": torch.zeros(2048) for i in (0, 2, 4)}
    save_repa(tmp_path / "two.pt", net, dict(encoder_depth=2), **second)
    loaded = load_sit(tmp_path / "two.pt")
    assert_same_weights(loaded.state_dict(), net.state_dict())
    assert loaded.config["repa_block"] == 2
    assert loaded.info["ignored"] == ["projectors.1"]


@pytest.mark.parametrize(
    "rows,args,classes",
    [
        (1000, None, 1000),
        (1001, None, 1000),
        (1000, dict(num_classes=1000), 1000),
        (1000, dict(num_classes=999), 999),
        (1000, dict(cfg_prob=0.1), 999),
        (10, dict(cfg_prob=0.0), 10),
        (10, dict(cfg_prob=0.0, num_classes=10), 10),
        (11, dict(cfg_prob=0.1, num_classes=10), 10),
        (11, None, 10),
    ],
)
def test_a_network_trained_without_label_dropout_has_no_null_label(rows, args, classes, tmp_path):
    torch.manual_seed(0)
    config = REPA_SIT | dict(depth=1, vfm_dim=None, num_classes=rows - 1)
    net = models.SiT(**config)
    save_repa(tmp_path / "x.pt", net, args)
    loaded = load_sit(tmp_path / "x.pt")
    assert loaded.num_classes == classes
    assert loaded.info["null_label_trained"] == (rows == classes + 1)
    table = loaded.y_embedder.embedding_table.weight
    assert torch.equal(table[:rows], net.y_embedder.embedding_table.weight)


def test_without_a_null_label_class_999_is_drawn_and_guidance_refused(inside, capsys):
    net = models.SiT(**REPA_SIT | dict(depth=1, vfm_dim=None, num_classes=999))
    save_repa("sit.pt", net, dict(cfg_prob=0.0, num_classes=1000, encoder_depth=8))
    vae = models.VAE("f16d32", 64, ch=8, ch_mult=(1, 1, 1, 1, 1), num_res_blocks=1)
    weights.export_vae(vae, "diffusers", "vae")
    words = "--sit sit.pt --vae vae --classes 999 --n 1 --steps 2 --out x.png --no-compile"
    with pytest.raises(SystemExit):
        script(sample, *words.split())
    assert "was trained without its null label" in capsys.readouterr().err
    script(sample, *words.split(), "--cfg", 1)
    assert os.path.exists("x.png")


def test_what_a_sit_s_file_does_not_tell_is_said_and_can_be_said_otherwise(tmp_path, capsys):
    """A DiT has the original SiT's names and shapes, and an original SiT without learned variance
    has REPA's."""
    net, original = original_sit()
    torch.save(original, tmp_path / "variance.pt")
    torch.save(net.state_dict(), tmp_path / "plain.pt")
    x = torch.randn(4, 4, 8, 8)
    t = torch.tensor([0.1, 0.3, 0.5, 0.9])
    y = torch.tensor([0, 1, 2, 3])
    with torch.no_grad():
        as_repa = net(x, t, y)
        as_sit = -net(x, 1 - t, y)
        expected = {
            ("variance.pt", "auto"): as_sit,
            ("variance.pt", "sit"): as_sit,
            ("variance.pt", "repa"): as_repa,
            ("plain.pt", "auto"): as_repa,
            ("plain.pt", "sit"): as_sit,
            ("plain.pt", "repa"): as_repa,
        }
        for (name, form), velocity in expected.items():
            capsys.readouterr()
            loaded = load_sit(tmp_path / name, form=form)
            assert_near(loaded(x, t, y), velocity)
            is_note = "--sit-format" in capsys.readouterr().out
            assert is_note == (form == "auto")
    script(weights, "info", tmp_path / "variance.pt")
    out = capsys.readouterr().out
    assert re.search("assumed +taken for an original SiT.*--sit-format repa.*DiT", out)
    script(weights, "info", tmp_path / "plain.pt", "--sit-format", "sit")
    assert "original SiT, time and sign turned format" in capsys.readouterr().out


def test_the_arguments_of_a_training_tell_its_convention(tmp_path, capsys):
    net, _ = original_sit()
    sit = dict(model="SiT-S/2", path_type="Linear", prediction="velocity")
    repa = dict(model="SiT-S/2", path_type="linear", prediction="v", encoder_depth=2)
    for args, format_name in ((sit, "original SiT"), (repa, "REPA")):
        save_repa(tmp_path / "x.pt", net, args)
        assert load_sit(tmp_path / "x.pt").info["format"].startswith(format_name)
    assert "--sit-format" not in capsys.readouterr().out
    wrong = {
        "is a DiT-XL/2": dict(model="DiT-XL/2"),
        "path GVP": dict(sit, path_type="GVP"),
        "to predict noise": dict(sit, prediction="noise"),
    }
    for message, args in wrong.items():
        save_repa(tmp_path / "x.pt", net, args)
        with pytest.raises(UserError, match=message):
            load_sit(tmp_path / "x.pt")


def test_raw_weights_that_a_file_does_not_have(tmp_path):
    net, _ = original_sit()
    torch.save(dict(ema=net.state_dict()), tmp_path / "x.pt")
    with pytest.raises(UserError, match="EMA weights only; leave out --raw"):
        load_sit(tmp_path / "x.pt", ema=False)
    torch.save(dict(model=net.state_dict()), tmp_path / "x.pt")
    assert load_sit(tmp_path / "x.pt").info["weights"] == "raw"


def test_a_sit_that_does_not_fit(repa_sit, tmp_path):
    state = repa_sit[0].state_dict()
    state["blocks.0.attn.q_norm.weight"] = state.pop("blocks.0.attn.qkv.bias")
    torch.save(state, tmp_path / "bad.pt")
    message = 'Missing.*"blocks.0.attn.qkv.bias". Unexpected.*"blocks.0.attn.q_norm.weight"'
    with pytest.raises(UserError, match=message):
        load_sit(tmp_path / "bad.pt")


# --------------------------------------------------------------------------------------------------
# Published files through the scripts


@pytest.fixture
def ldm_vae(inside):
    """A VAE, saved as kl-f8.ckpt with a discriminator."""
    vae = small_vae("f8d4")
    state = own_weights(vae)
    for key, value in models.PatchDiscriminator().state_dict().items():
        state[f"loss.discriminator.{key}"] = value
    torch.save(dict(state_dict=state), "kl-f8.ckpt")
    return vae


def test_sample_takes_a_published_pair(ldm_vae):
    _, state = original_sit()
    torch.save(dict(ema=state, model=state), "SiT.pt")
    words = "--sit SiT.pt --vae kl-f8.ckpt --num 3 --steps 3 --out x.npz --precision fp32"
    script(sample, *words.split())
    with np.load("x.npz") as file:
        assert file["arr_0"].shape == (3, 64, 64, 3)
        assert '"sit_hash"' in str(file["settings"])


def test_train_vae_starts_from_a_published_vae_and_discriminator(ldm_vae, pictures):
    words = "--init kl-f8.ckpt --init-disc kl-f8.ckpt --resolution 32 --align none --lpips 0"
    words += " --batch-size 4 --steps 1 --lr 0 --workers 0"
    script(train_vae, *words.split(), "--data", pictures)
    assert_same_weights(load_vae("runs/vae").state_dict(), own_weights(ldm_vae))


# One step of stage 2 that changes nothing, without a vision model.
STAGE_2 = shlex.split(
    "--repa 0 --no-flip --batch-size 8 --workers 0 --preview-n 1 --preview-steps 2 --steps 1 --lr 0"
    " --ema 0 --precision fp32 --vae vae"
)


def test_stage_2_measures_statistics_that_a_vae_lacks(pictures, inside, capsys):
    """Latents of std 6, as VA-VAE's have about 5, were trained on as they are: a flow loss of 37
    instead of 2."""
    torch.manual_seed(0)
    vae = models.VAE("f4d8", 32, 32, (1, 1, 1), 1, groups=32)
    with torch.no_grad():
        vae.quant_conv.weight[:8] *= 60
        vae.quant_conv.bias[:8] += 3
    weights.export_vae(vae, "diffusers", "vae")
    assert load_vae("vae").info["latent_statistics"] == published.NO_STATISTICS
    words = [*STAGE_2, "--data", pictures, "--depth", 1, "--width", 64, "--heads", 1]
    script(train_sit, *words)
    assert "measured over 24 pictures" in capsys.readouterr().out

    data = ImageSet(pictures)
    with torch.no_grad():
        mean, logvar = vae.encode(from_uint8(data.stack(np.arange(24), 32)))  # (24,8,8,8)
    samples = torch.distributions.Normal(mean, (logvar / 2).exp()).sample((50,))
    std, expected_mean = torch.std_mean(samples, (0, 1, 3, 4))
    assert std.min() > 2
    _, pair_vae = sample.load_pair("runs/sit", None, "cpu")
    torch.testing.assert_close(pair_vae.latent_std, std, rtol=0.02, atol=0)
    torch.testing.assert_close(pair_vae.latent_mean, expected_mean, rtol=0.02, atol=0.05)
    with open("runs/sit/metrics.jsonl") as file:
        # The untrained SiT predicts zero, so the loss is the variance of noise and latents.
        assert json.loads(file.readline())["flow"] == pytest.approx(2, abs=0.3)

    # Kept with the cache, they are read there, and damage is a sentence.
    (kept,) = inside.glob("vae/latents-*/statistics.json")
    kept.write_text(json.dumps(dict(mean=[0] * 8, std=[7] * 8, pictures=24)))
    script(train_sit, *words, "--out", "runs/other")
    assert load_sit("runs/other").info["latent_std"] == [7] * 8
    kept.write_text("{")
    assert "statistics.json cannot be read" in refused(capsys, train_sit, *words, "--overwrite")


@pytest.mark.parametrize("std, is_said", [(1.0, True), (1 / 0.18215, False)])
def test_stage_2_says_where_ldm_s_scale_factor_does_not_fit(std, is_said, pictures, inside, capsys):
    """An f8d4 VAE without statistics is taken for LDM's, whose latents have a std of 5.5. Others
    are trained on at another scale than the noise's: here 0.18 of it."""
    torch.manual_seed(0)
    vae = models.VAE("f8d4", 32, 32, (1, 1, 1, 1), 1, groups=32)
    data = ImageSet(pictures)
    with torch.no_grad():
        mean, _ = vae.encode(from_uint8(data.stack(np.arange(24), 32)))  # (24,4,4,4)
        old_std, old_mean = torch.std_mean(mean, (0, 2, 3))
        # Latents of mean 0 and this std, and next to no noise.
        vae.quant_conv.weight[:4] *= (std / old_std)[:, None, None, None]
        vae.quant_conv.bias[:4] -= old_mean
        vae.quant_conv.bias[:4] *= std / old_std
        vae.quant_conv.weight[4:] = 0
        vae.quant_conv.bias[4:] = -20
    export_without_statistics(vae, inside / "vae")
    words = [*STAGE_2, "--data", pictures, "--depth", 1, "--width", 64, "--heads", 1]
    script(train_sit, *words)
    note = "leaves them with a std of 0.182 to 0.182 over 24 pictures"
    assert (note in capsys.readouterr().out) == is_said
    with open("runs/sit/metrics.jsonl") as file:
        # The untrained SiT predicts zero, so the loss is the variance of noise and latents.
        wanted = 1 + (0.18215 * std) ** 2
        assert json.loads(file.readline())["flow"] == pytest.approx(wanted, abs=0.3)


def test_stage_2_starts_from_a_published_sit_of_other_classes(pictures, inside, capsys):
    _, state = original_sit()  # of three classes
    torch.save(state, "SiT.pt")
    vae = small_vae("f8d4")
    weights.export_vae(vae, "diffusers", "vae")
    script(train_sit, *STAGE_2, "--data", pictures, "--init", "SiT.pt")
    out = capsys.readouterr().out
    assert "new: the table of labels (2 classes instead of 3)" in out
    started = load_sit("runs/sit")
    expected = load_sit("SiT.pt")
    assert started.num_classes == 2
    for name, value in expected.state_dict().items():
        if not name.startswith("y_embedder"):
            assert torch.equal(started.state_dict()[name], value), name
    assert started.info["latent_std"] == pytest.approx([1 / 0.18215] * 4)
    assert started.info["null_label_trained"]

    # From a SiT of ours, of the same classes, everything is taken over.
    words = [*STAGE_2, "--data", pictures, "--init", "runs/sit", "--out", "runs/tuned"]
    script(train_sit, *words)
    assert "start     from runs/sit; new: nothing" in capsys.readouterr().out
    assert_same_weights(load_sit("runs/tuned").state_dict(), started.state_dict())
    script(train_sit, *words)
    assert "has its 1 steps already" in capsys.readouterr().out
    sentence = refused(capsys, train_sit, *words, "--depth", 3, "--out", "runs/deep")
    assert "--depth 3: the SiT of --init runs/sit has 2" in sentence


@pytest.mark.parametrize("change", [dict(vfm_dim=16), dict(vfm_dim=24, repa_block=2), dict()])
def test_what_begins_anew_when_a_sit_is_the_start(change, capsys):
    torch.manual_seed(0)
    config = dict(size="S", patch=1, channels=4, latent_size=4, num_classes=3, depth=2, width=64)
    config |= dict(heads=1, vfm_dim=24, repa_block=1)
    start = models.SiT(**config)
    net = models.SiT(**config | dict(latent_size=6) | change)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    train_sit.start_from(net, start, "x.pt")
    out = capsys.readouterr().out
    assert "the positions (6x6 tokens, not 4x4)" in out
    assert ("REPA's projector" in out) == bool(change)
    for name, value in net.state_dict().items():
        is_new = name == "pos_embed" or (change and name.startswith("projectors."))
        assert torch.equal(value, before[name] if is_new else start.state_dict()[name]), name


def test_a_start_that_does_not_fit_the_latents(pictures, inside, capsys):
    models_sit = models.SiT("S", 1, 32, 4, num_classes=3, depth=1, width=64, heads=1)
    torch.save(models_sit.state_dict(), "SiT.pt")
    weights.export_vae(small_vae("f8d4"), "diffusers", "vae")
    sentence = refused(capsys, train_sit, *STAGE_2, "--data", pictures, "--init", "SiT.pt")
    assert "--init SiT.pt needs latents of 32 channels, but vae has 4" in sentence


# --------------------------------------------------------------------------------------------------
# LPIPS


def test_lpips_is_the_packages(tmp_path):
    """The lpips package ships the published linear weights; VGG's convolutions are random here, in
    both networks."""
    theirs = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False).eval()
    torch.save(theirs.state_dict(), tmp_path / "whole.pth")
    vgg = {}
    for key, value in theirs.state_dict().items():
        if key.startswith("net."):
            vgg[re.sub(r"^net\.slice\d", "features", key)] = value
    torch.save(vgg, tmp_path / "vgg.pth")
    linear = os.path.join(os.path.dirname(lpips.__file__), "weights", "v0.1", "vgg.pth")
    a, b = torch.rand(2, 2, 3, 64, 48) * 2 - 1
    with torch.no_grad():
        expected = theirs(a, b).flatten()
        for files in ([tmp_path / "whole.pth"], [tmp_path / "vgg.pth", linear]):
            torch.testing.assert_close(models.LPIPS(files)(a, b), expected, rtol=1e-4, atol=1e-7)
    assert expected.min() > 1e-4


# --------------------------------------------------------------------------------------------------
# Vision models


@pytest.mark.parametrize("name", sorted(models.VFM_NAMES))
def test_short_names_have_the_papers_grids(name):
    """16x16 tokens at 256 px and 32x32 at 512, without memory for the weights."""
    timm_name = models.VFM_NAMES[name]
    with torch.device("meta"):
        patch = timm.create_model(timm_name, pretrained=False).patch_embed.patch_size[0]
        for pixels, grid in ((256, 16), (512, 32)):
            size = pixels // 16 * patch
            net = timm.create_model(timm_name, pretrained=False, img_size=size)
            tokens = net.forward_features(torch.zeros(1, 3, size, size))
            assert tokens.shape[1] - net.num_prefix_tokens == grid**2
    assert timm.models.is_model_pretrained(timm_name)


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
    """Models with a class token, with registers, with neither (SigLIP, pooled by the mean), and
    CNNs, all of random weights."""
    torch.manual_seed(0)
    net = timm.create_model(name).eval()
    state = {key: value.contiguous() for key, value in net.state_dict().items()}
    save_file(state, tmp_path / "w.safetensors")
    vfm = models.VFM(name, tmp_path / "w.safetensors", 64, grid=4)
    assert vfm.grid == 4

    x = random_images(2)
    size = (vfm.input_size, vfm.input_size)
    with torch.no_grad():
        x_01 = (F.interpolate(x, size, mode="bicubic") + 1) / 2
        features = vfm.model.forward_features((x_01 - vfm.mean) / vfm.std)
        if features.ndim == 4:  # a CNN's (B,D,h,w)
            expected = features.flatten(2).transpose(1, 2)
        else:
            expected = features[:, getattr(net, "num_prefix_tokens", 0) :]
        assert torch.equal(vfm(x), expected)

    loaded = vfm.model.state_dict()
    resized = {key for key, value in state.items() if value.shape != loaded[key].shape}
    assert resized <= {"pos_embed"}
    for key in set(state) - resized:
        assert torch.equal(state[key], loaded[key]), key
