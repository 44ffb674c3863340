"""Weights of others: LDM (CompVis), REPA-E, LightningDiT, diffusers, the original SiT, REPA; from the hub too.

load_vae and load_sit come here with a file that is not ours. A fork that reads only its own files does without this one.
"""

import json
import math
import os
import re

import torch

from common.files import UserError, first_line, load_strictly, read_weights, reading
from models import PatchDiscriminator, SIT_SIZES


# ----------------------------------------------------------------------------------------------------------------------
# Files, folders, the hub


def fetch(path):
    """A local path as it is; hf:<owner>/<repository>[/<file or folder>][@<revision>] is downloaded once -> local path."""
    path = os.fspath(path)
    if not path.startswith("hf:"):
        return path
    found = re.fullmatch(r"hf:([^/@]+/[^/@]+)(?:/([^@]*))?(?:@(.+))?", path)
    if not found:
        raise UserError(f"{path} is not hf:<owner>/<repository>[/<file>][@<revision>]")
    repository, inside, revision = found.groups()
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.safetensors", "*.pt", "*.pth", "*.ckpt", "*.bin"]
    if inside:  # and what tells the mean and std of its latents
        patterns = [
            inside,
            f"{inside}/*",
            *(os.path.join(os.path.dirname(inside), f) for f in ("*stats.pt", "config.json")),
        ]
    try:
        folder = snapshot_download(repository, revision=revision, allow_patterns=patterns)
    except Exception as error:
        raise UserError(f"cannot get {path} from the hub: {first_line(error)}") from None
    return os.path.join(folder, inside or "")


def find_vae(path):
    """The file that holds the weights in a folder, ours or diffusers', or in a repository of the hub."""
    folder = fetch(path)
    if not os.path.isdir(folder):
        return folder
    names = [
        "vae.safetensors",
        "diffusion_pytorch_model.safetensors",
        "diffusion_pytorch_model.bin",
    ]
    files = sorted(os.listdir(folder))
    loose = [
        f
        for f in files
        if f.endswith((".pt", ".pth", ".ckpt", ".safetensors"))
        and not re.search("stats|discriminator", f)
    ]
    found = [f for f in names if f in files] + loose
    if not found:
        raise UserError(f"{path} holds no weights ({', '.join(names)}, or a .pt, .pth, .ckpt)")
    return os.path.join(folder, found[0])


def tensors(state, *wrappers):
    """The tensors of a state dict, without the words that wrappers put before their names."""
    return {
        re.sub(rf"^(({'|'.join(wrappers)})\.)+", "", k): v
        for k, v in state.items()
        if torch.is_tensor(v)
    }


def load_discriminator(path):
    """The discriminator of an LDM-style checkpoint (`loss.discriminator.main.0.weight`), or one of its own file."""
    state = tensors(read_weights(fetch(path))[0], "module", "loss", "discriminator")
    state = {k: v for k, v in state.items() if k.startswith("main.")}
    if not state:
        raise UserError(
            f"{path} holds no discriminator (no key such as loss.discriminator.main.0.weight)"
        )
    with reading(path, "a discriminator"):
        return load_strictly(PatchDiscriminator(), state, path)


# ----------------------------------------------------------------------------------------------------------------------
# VAEs

LDM_STD = 1 / 0.18215  # of the f8d4 latents, where no file says better


def diffusers_names(levels):
    """Pairs of what LDM and diffusers' AutoencoderKL call the same part of a VAE, to be replaced in this order."""
    down = [(f".down.{i}.", f".down_blocks.{i}.") for i in range(levels)]
    up = [(f".up.{i}.", f".up_blocks.{levels - 1 - i}.") for i in range(levels)]
    return (
        down
        + up
        + [
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
            (".q.", ".query."),
            (".k.", ".key."),
            (".v.", ".value."),
            (".proj_out.", ".proj_attn."),
        ]
    )  # before diffusers 0.16


def read_vae(state, path):
    """LDM, REPA-E, LightningDiT or diffusers -> (state dict in our names with latent statistics, config, info). What is
    not part of the VAE (loss, EMA copies, VA-VAE's projection) is listed in info."""
    state, form, settings = tensors(state, "module", "first_stage_model", "vae"), "LDM", {}
    levels = len({k.split(".")[2] for k in state if k.startswith("encoder.down_blocks.")})
    if levels:
        form, beside = "diffusers", os.path.join(os.path.dirname(path), "config.json")
        if os.path.isfile(beside):
            with open(beside) as file:
                settings = json.load(file)
        for ours, theirs in diffusers_names(levels):
            state = {k.replace(theirs, ours): v for k, v in state.items()}
        state = {
            k: v[:, :, None, None] if ".attn" in k and v.ndim == 2 else v for k, v in state.items()
        }
    if not {"encoder.conv_in.weight", "decoder.conv_in.weight"} <= set(state):
        raise UserError(
            f"{path} holds no VAE in the names of LDM or diffusers; its first keys are {', '.join([*state][:3])}"
        )
    part = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")
    ignored = sorted({k.split(".")[0] for k in state if not k.startswith(part)})
    state = {k: v.float() for k, v in state.items() if k.startswith(part)}
    ch, channels = len(state["encoder.conv_in.weight"]), state["decoder.conv_in.weight"].shape[1]
    widths = [
        len(state[k])
        for k in sorted(state)
        if re.fullmatch(r"encoder\.down\.\d\.block\.0\.conv2\.weight", k)
    ]
    config = dict(
        spec=f"f{2 ** (len(widths) - 1)}d{channels}",
        resolution=settings.get("sample_size", 256),
        ch=ch,
        ch_mult=[width // ch for width in widths],
        groups=settings.get("norm_num_groups", 32),
        num_res_blocks=sum(
            re.fullmatch(r"encoder\.down\.0\.block\.\d\.conv2\.weight", k) is not None
            for k in state
        ),
        attn_levels=[i for i in range(len(widths)) if f"encoder.down.{i}.attn.0.q.weight" in state],
    )
    mean, std, source = latent_statistics(path, settings, config["spec"])
    for name, value in (("latent_mean", mean), ("latent_std", std)):
        state[name] = torch.as_tensor(value, dtype=torch.float32).flatten().expand(channels).clone()
    return state, config, dict(format=form, ignored=ignored, latent_statistics=source, step=None)


def latent_statistics(path, settings, spec):
    """Mean and std of a published VAE's latents, each a number or one a channel, and where they were found: in a file
    beside it, in diffusers' config.json (here `settings`), or, for f8d4, in LDM's constant."""
    folder, file = os.path.split(path)
    for name in (f"{os.path.splitext(file)[0]}-latents-stats.pt", "latents_stats.pt"):
        if os.path.isfile(os.path.join(folder, name)):
            stats = read_weights(os.path.join(folder, name))[0]
            if "latents_scale" in stats:  # REPA-E
                return stats["latents_bias"], 1 / stats["latents_scale"], name
            return stats["mean"], stats["std"], name  # LightningDiT
    if settings.get("latents_std"):
        return settings.get("latents_mean") or 0.0, settings["latents_std"], "config.json"
    if settings.get("scaling_factor"):
        return settings.get("shift_factor") or 0.0, 1 / settings["scaling_factor"], "config.json"
    if spec == "f8d4":
        return (
            0.0,
            LDM_STD,
            "LDM's scale factor 0.18215",
        )  # also what diffusers takes where config.json says nothing
    return 0.0, 1.0, "none found: 0 and 1"


# ----------------------------------------------------------------------------------------------------------------------
# SiTs


def read_sit(state, path):
    """SiT, REPA or REPA-E -> (state dict in our convention, config, info)."""
    state = tensors(state, "module")
    if not {"x_embedder.proj.weight", "pos_embed"} <= set(state):
        raise UserError(f"{path} holds no SiT; its first keys are {', '.join(list(state)[:3])}")
    width, channels, patch = state["x_embedder.proj.weight"].shape[:3]
    mean, std = ([0.0] * 4, [LDM_STD] * 4) if channels == 4 else (None, None)
    if "bn.running_mean" in state:  # REPA-E's batch norm of the latents
        mean, std = (
            state["bn.running_mean"].tolist(),
            (state["bn.running_var"] + 1e-4).sqrt().tolist(),
        )
    state = {k: v.float() for k, v in state.items() if not k.startswith("bn.")}
    config = dict(
        patch=patch,
        channels=channels,
        latent_size=patch * math.isqrt(state["pos_embed"].shape[1]),
        depth=len({k.split(".")[1] for k in state if k.startswith("blocks.")}),
        width=width,
        heads={w: heads for _, w, heads in SIT_SIZES.values()}.get(width, width // 64),
        num_classes=len(state["y_embedder.embedding_table.weight"]) - 1,
        repa_block=8,
        vfm_dim=len(state["projectors.0.4.bias"]) if "projectors.0.4.bias" in state else None,
    )
    form = "REPA" if config["vfm_dim"] else "SiT"
    if len(state["final_layer.linear.bias"]) == patch * patch * channels * 2:
        form = "original SiT, time and sign turned, variance dropped"
        turn_original_sit(state, patch * patch, channels)
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


def turn_original_sit(state, pixels, channels):
    """The original SiT has t = 0 at noise and predicts data - noise and a variance: v(x, t) = -theirs(x, 1-t). Both turns
    are linear, so they go into the weights: the sign into the last layer; cos and sin of (1-t) w mix those of t w, in the
    first layer that sees them."""
    for name in ("final_layer.linear.weight", "final_layer.linear.bias"):
        value = state[name]
        state[name] = -value.view(pixels, 2 * channels, -1)[:, :channels].reshape(
            -1, *value.shape[1:]
        )
    first = "t_embedder.mlp.0.weight"
    cos, sin = state[first].double().chunk(2, dim=1)
    half = cos.shape[1]
    omega = torch.exp(-math.log(10000.0) * torch.arange(half, dtype=torch.float64) / half)
    state[first] = torch.cat(
        [cos * omega.cos() + sin * omega.sin(), cos * omega.sin() - sin * omega.cos()], 1
    ).float()
