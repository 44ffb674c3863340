"""Weights of other code: where their files are, and what their names and shapes mean in ours.

    VAEs             LDM (CompVis), REPA-E, LightningDiT, diffusers
    SiTs             the original SiT, REPA, REPA-E
    discriminators   LDM, REPA-E

load_vae and load_sit (common/weights.py) come here with a file that is not ours. A fork that reads
only its own files does without this one."""

import json
import math
import os
import re

import torch

from common.files import UserError, first_line, load_strictly, read_weights, reading
from models import SIT_SIZES, PatchDiscriminator

# --------------------------------------------------------------------------------------------------
# Files: paths, folders, the hub


def fetch(path):
    """hf:<owner>/<repository>[/<file or folder>][@<revision>] -> the path of a local copy, which is
    downloaded once. Any other path stays as it is. Raises UserError."""
    path = os.fspath(path)
    if not path.startswith("hf:"):
        return path
    match = re.fullmatch(r"hf:([^/@]+/[^/@]+)(?:/([^@]*))?(?:@(.+))?", path)
    if not match:
        raise UserError(f"{path} is not hf:<owner>/<repository>[/<file>][@<revision>]")
    repository, inside, revision = match.groups()
    patterns = ["*.json", "*.safetensors", "*.pt", "*.pth", "*.ckpt", "*.bin"]
    if inside:
        # The mean and std of the latents are in files beside the weights.
        folder = os.path.dirname(inside)
        statistics = os.path.join(folder, "*stats.pt")
        config = os.path.join(folder, "config.json")
        patterns = [inside, f"{inside}/*", statistics, config]
    from huggingface_hub import snapshot_download

    try:
        copy = snapshot_download(repository, revision=revision, allow_patterns=patterns)
    except Exception as error:
        raise UserError(f"cannot get {path} from the hub: {first_line(error)}") from None
    return os.path.join(copy, inside or "")


def find_vae(path):
    """The file of weights in a folder (ours, diffusers' or one with a checkpoint) or on the hub.
    A path to a file stays as it is. Raises UserError."""
    folder = fetch(path)
    if not os.path.isdir(folder):
        return folder
    usual_names = [
        "vae.safetensors",
        "diffusion_pytorch_model.safetensors",
        "diffusion_pytorch_model.bin",
    ]
    names = sorted(os.listdir(folder))
    for name in usual_names:
        if name in names:
            return os.path.join(folder, name)
    for name in names:
        is_weights = name.endswith((".pt", ".pth", ".ckpt", ".safetensors"))
        # REPA-E keeps the discriminator and the statistics of the latents beside the VAE.
        if is_weights and not re.search("stats|discriminator", name):
            return os.path.join(folder, name)
    raise UserError(f"{path} holds no weights ({', '.join(usual_names)}, or a .pt, .pth, .ckpt)")


def read_tensors(state, *wrappers):
    """The tensors of a state dict. wrappers: names of modules that contained the network when it
    was saved, and so stand before its own names ("module.encoder..."); they are removed."""
    prefix = re.compile(rf"^(({'|'.join(wrappers)})\.)+")
    return {prefix.sub("", key): value for key, value in state.items() if torch.is_tensor(value)}


def count_keys(state, pattern):
    """How many of the keys with number 0, 1, 2, ... in place of {} a state dict has in a row."""
    count = 0
    while pattern.format(count) in state:
        count += 1
    return count


# --------------------------------------------------------------------------------------------------
# VAEs in LDM's names, which are ours: LDM, REPA-E, LightningDiT. Other VAEs are renamed first.

VAE_PARTS = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")


def read_vae(state, path):
    """The content of a published VAE's file -> (state dict in our names with latent statistics,
    config, info). Raises UserError if it holds no VAE.

    info names the format, where the latent statistics were found, and which parts of the file are
    no part of the VAE (its loss, EMA copies, LightningDiT's projection to VFM tokens)."""
    state = read_tensors(state, "module", "first_stage_model", "vae")
    form = "LDM"
    settings = {}
    if any(key.startswith("encoder.down_blocks.") for key in state):
        form = "diffusers"
        settings = read_diffusers_config(path)
        state = rename_diffusers_state(state)
    if not {"encoder.conv_in.weight", "decoder.conv_in.weight"} <= set(state):
        raise UserError(
            f"{path} holds no VAE in the names of LDM or diffusers; its first keys are "
            f"{', '.join(list(state)[:3])}"
        )
    ignored = sorted({key.split(".")[0] for key in state if not key.startswith(VAE_PARTS)})
    state = {key: value.float() for key, value in state.items() if key.startswith(VAE_PARTS)}
    config = vae_config(state, settings)
    mean, std, source = latent_statistics(path, settings, config["spec"])
    channels = state["decoder.conv_in.weight"].shape[1]
    state["latent_mean"] = statistics_vector(mean, channels)
    state["latent_std"] = statistics_vector(std, channels)
    return state, config, dict(format=form, ignored=ignored, latent_statistics=source, step=None)


def vae_config(state, settings):
    """The arguments of models.VAE, from the shapes of a state dict in LDM's names and, for what
    shapes do not show, diffusers' settings."""
    ch = len(state["encoder.conv_in.weight"])
    channels = state["decoder.conv_in.weight"].shape[1]
    num_levels = count_keys(state, "encoder.down.{}.block.0.conv2.weight")
    factor = 2 ** (num_levels - 1)
    ch_mult = []
    attn_levels = []
    for i in range(num_levels):
        ch_mult.append(len(state[f"encoder.down.{i}.block.0.conv2.weight"]) // ch)
        if f"encoder.down.{i}.attn.0.q.weight" in state:
            attn_levels.append(i)
    return dict(
        spec=f"f{factor}d{channels}",
        resolution=settings.get("sample_size", 256),
        ch=ch,
        ch_mult=ch_mult,
        groups=settings.get("norm_num_groups", 32),
        num_res_blocks=count_keys(state, "encoder.down.0.block.{}.conv2.weight"),
        attn_levels=attn_levels,
    )


# --------------------------------------------------------------------------------------------------
# VAEs of diffusers: a folder with weights and config.json


def diffusers_names(num_levels):
    """[(our part of a name, that of diffusers' AutoencoderKL)], to be replaced in this order."""
    pairs = []
    for i in range(num_levels):
        pairs.append((f".down.{i}.", f".down_blocks.{i}."))
        # diffusers numbers the decoder's levels in the order in which they run.
        pairs.append((f".up.{i}.", f".up_blocks.{num_levels - 1 - i}."))
    return [
        *pairs,
        (".mid.block_1.", ".mid_block.resnets.0."),
        (".mid.block_2.", ".mid_block.resnets.1."),
        (".mid.attn_1.", ".mid_block.attentions.0."),
        (".block.", ".resnets."),
        (".attn.", ".attentions."),
        (".downsample.", ".downsamplers.0."),
        (".upsample.", ".upsamplers.0."),
        (".norm_out.", ".conv_norm_out."),
        (".nin_shortcut.", ".conv_shortcut."),
        (".norm.", ".group_norm."),
        (".q.", ".to_q."),
        (".k.", ".to_k."),
        (".v.", ".to_v."),
        (".proj_out.", ".to_out.0."),
    ]


# As above, in files of diffusers before 0.16.
OLD_DIFFUSERS_NAMES = [
    (".q.", ".query."),
    (".k.", ".key."),
    (".v.", ".value."),
    (".proj_out.", ".proj_attn."),
]


def rename_diffusers_state(state):
    """A state dict of diffusers' AutoencoderKL in our names."""
    levels = {key.split(".")[2] for key in state if key.startswith("encoder.down_blocks.")}
    for ours, theirs in diffusers_names(len(levels)) + OLD_DIFFUSERS_NAMES:
        state = {key.replace(theirs, ours): value for key, value in state.items()}
    for key, value in state.items():
        # Their attention has linear layers where LDM's has convolutions of 1x1.
        if ".attn" in key and value.ndim == 2:
            state[key] = value[:, :, None, None]
    return state


def read_diffusers_config(path):
    """The content of the config.json beside a file of weights; {} if there is none."""
    config = os.path.join(os.path.dirname(path), "config.json")
    if not os.path.isfile(config):
        return {}
    with open(config) as file:
        return json.load(file)


# --------------------------------------------------------------------------------------------------
# Mean and std of published latents

# LDM divides latents by the std that it measured once for f8d4, and diffusers does so too where its
# config.json gives no number.
LDM_STD = 1 / 0.18215


def latent_statistics(path, settings, spec):
    """-> (mean, std, where they were found) of a published VAE's latents. Each is a number or has
    one for every channel. path: of the VAE's weights. settings: diffusers' config.json, or {}."""
    folder, file = os.path.split(path)
    stem = os.path.splitext(file)[0]
    for name in (f"{stem}-latents-stats.pt", "latents_stats.pt"):
        if os.path.isfile(os.path.join(folder, name)):
            stats, _ = read_weights(os.path.join(folder, name))
            if "latents_scale" in stats:  # REPA-E
                return stats["latents_bias"], 1 / stats["latents_scale"], name
            return stats["mean"], stats["std"], name  # LightningDiT
    if settings.get("latents_std"):
        return settings.get("latents_mean") or 0.0, settings["latents_std"], "config.json"
    if settings.get("scaling_factor"):
        return settings.get("shift_factor") or 0.0, 1 / settings["scaling_factor"], "config.json"
    if spec == "f8d4":
        return 0.0, LDM_STD, "LDM's scale factor 0.18215"
    return 0.0, 1.0, "none found: 0 and 1"


def statistics_vector(value, channels):
    """A number, or a list or tensor of one for every channel -> (channels,), fp32."""
    return torch.as_tensor(value, dtype=torch.float32).flatten().expand(channels).clone()


# --------------------------------------------------------------------------------------------------
# SiTs of REPA and REPA-E, whose names and convention are ours, and of SiT, which are converted


def read_sit(state, path):
    """The state dict of a published SiT -> (state dict in our convention, config, info). Raises
    UserError if it holds no SiT.

    info["latent_mean"], info["latent_std"]: for every channel, of the latents that it was trained
    on; None where its file does not tell."""
    state = read_tensors(state, "module")
    if not {"x_embedder.proj.weight", "pos_embed"} <= set(state):
        raise UserError(f"{path} holds no SiT; its first keys are {', '.join(list(state)[:3])}")
    mean, std = sit_latent_statistics(state)
    state = {key: value.float() for key, value in state.items() if not key.startswith("bn.")}
    config = sit_config(state)
    pixels = config["patch"] ** 2
    form = "REPA" if config["vfm_dim"] else "SiT"
    if len(state["final_layer.linear.bias"]) == 2 * pixels * config["channels"]:
        form = "original SiT, time and sign turned, variance dropped"
        convert_original_sit(state, pixels, config["channels"])
    info = dict(
        format=form,
        step=None,
        classes=[],
        vae_hash=None,
        vae_path=None,
        latent_mean=mean,
        latent_std=std,
    )
    return state, config, info


def sit_config(state):
    """The arguments of models.SiT, from the shapes of a state dict."""
    width, channels, patch = state["x_embedder.proj.weight"].shape[:3]
    grid = math.isqrt(state["pos_embed"].shape[1])
    block_numbers = {key.split(".")[1] for key in state if key.startswith("blocks.")}
    # No shape shows the number of heads: those of a published size, or 64 channels a head.
    heads = width // 64
    for _, published_width, published_heads in SIT_SIZES.values():
        if width == published_width:
            heads = published_heads
    vfm_dim = None
    if "projectors.0.4.bias" in state:
        vfm_dim = len(state["projectors.0.4.bias"])
    return dict(
        patch=patch,
        channels=channels,
        latent_size=patch * grid,
        depth=len(block_numbers),
        width=width,
        heads=heads,
        num_classes=len(state["y_embedder.embedding_table.weight"]) - 1,
        repa_block=8,
        vfm_dim=vfm_dim,
    )


def sit_latent_statistics(state):
    """-> (mean, std) of the latents that a SiT was trained on, as lists, or (None, None)."""
    if "bn.running_mean" in state:
        # REPA-E trains the SiT on latents that this batch norm normalises.
        std = (state["bn.running_var"] + 1e-4).sqrt()
        return state["bn.running_mean"].tolist(), std.tolist()
    channels = state["x_embedder.proj.weight"].shape[1]
    if channels == 4:  # SiT and REPA use SD-VAE with LDM's constant
        return [0.0] * 4, [LDM_STD] * 4
    return None, None


def convert_original_sit(state, pixels, channels):
    """Changes the state dict of an original SiT (Ma et al. 2024), in place, to our convention.

    In theirs t = 0 is noise and t = 1 data, and the network predicts data - noise and, in as many
    channels again, a variance: our v(x, t) = -theirs(x, 1 - t). Both changes are linear where they
    meet a layer, so they go into its weights.
    pixels: of a patch of the latents. channels: of the latents."""
    for name in ("final_layer.linear.weight", "final_layer.linear.bias"):
        value = state[name]  # (pixels * 2 * channels, ...)
        velocity = value.view(pixels, 2 * channels, -1)[:, :channels]
        state[name] = -velocity.reshape(-1, *value.shape[1:])
    # The first layer that sees the time multiplies cos((1-t) w) by a weight a, and sin((1-t) w) by
    # b, for every frequency w. In terms of cos(t w) and sin(t w) their weights are
    # a cos(w) + b sin(w) and a sin(w) - b cos(w).
    name = "t_embedder.mlp.0.weight"
    a, b = state[name].double().chunk(2, dim=1)  # each (width, 128)
    half = a.shape[1]
    omega = torch.exp(-math.log(10000.0) * torch.arange(half, dtype=torch.float64) / half)
    cos_weight = a * omega.cos() + b * omega.sin()
    sin_weight = a * omega.sin() - b * omega.cos()
    state[name] = torch.cat([cos_weight, sin_weight], dim=1).float()


# --------------------------------------------------------------------------------------------------
# Discriminators of LDM and REPA-E: in the checkpoint of the VAE's training, or in a file of its own


def load_discriminator(path):
    """The PatchDiscriminator in a checkpoint, where it is called loss.discriminator.main.*, or in a
    file of its own (main.*). Raises UserError if there is none."""
    state, _ = read_weights(fetch(path))
    state = read_tensors(state, "module", "loss", "discriminator")
    state = {key: value for key, value in state.items() if key.startswith("main.")}
    if not state:
        raise UserError(
            f"{path} holds no discriminator (no key such as loss.discriminator.main.0.weight)"
        )
    with reading(path, "a discriminator"):
        return load_strictly(PatchDiscriminator(), state, path)
