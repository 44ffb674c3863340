"""What a weight file is, and a VAE for other code.

    python -m tools.weights info FILE                           # what it holds, where it is from
    python -m tools.weights export runs/vae --to diffusers DIR  # a folder for AutoencoderKL
    python -m tools.weights export runs/vae --to ldm FILE.pt    # a state_dict in LDM's names

Wherever a VAE is named, a file, a folder or hf:<owner>/<repository> will do."""

import argparse
import json
import os

import torch
from safetensors.torch import save_file

from common.files import UserError, read_weights
from common.processes import run_main
from common.published import (
    NO_STATISTICS,
    SIT_FORMATS,
    diffusers_names,
    find_discriminator,
    find_sit_part,
    find_vae,
    find_vae_part,
)
from common.weights import load_sit, load_vae

# Of every norm in LDM's VAE, in REPA-E's and in LightningDiT's.
LDM_GROUPS = 32

# --------------------------------------------------------------------------------------------------
# info


def describe(path, form="auto"):
    """What is in a file, as lines of text; several networks one after the other. Raises UserError
    for a file without any. form: of published.SIT_FORMATS, for a SiT."""
    texts = []
    for kind in networks_in(path):
        if kind == "SiT":
            texts.append(describe_network(kind, load_sit(path, form=form)))
        elif kind == "VAE":
            texts.append(describe_network(kind, load_vae(path)))
        else:
            texts.append(f"{kind}, for train_vae.py --init-disc")
    return "\n\n".join(texts)


def networks_in(path):
    """The kinds of the networks in a file or folder: ["VAE"], or several in a checkpoint of a
    training. What holds none counts as a VAE, and load_vae then says what is wrong."""
    own_sit = os.path.join(path, "sit.safetensors")
    file = own_sit if os.path.isfile(own_sit) else find_vae(path)
    state, metadata = read_weights(file)
    if "kind" in metadata:
        return ["SiT" if metadata["kind"] == "sit" else "VAE"]
    kinds = []
    for kind, find in (
        ("SiT", lambda state: find_sit_part(state, "ema")),
        ("VAE", find_vae_part),
        ("discriminator", find_discriminator),
    ):
        if find(state)[1]:
            kinds.append(kind)
    return kinds or ["VAE"]


def describe_network(kind, net):
    """A loaded network as lines of text. kind: "VAE" or "SiT"."""
    num_parameters = sum(parameter.numel() for parameter in net.parameters())
    lines = [
        f"{kind}, {net.info.get('format', 'ours')} format: {net.info['path']}",
        f"architecture  {json.dumps(net.config)}",
        f"parameters    {num_parameters:,}",
        f"hash          {net.info['hash']}",
    ]
    if kind == "VAE":
        lines.append(f"latent mean   {rounded(net.latent_mean)}")
        lines.append(f"latent std    {rounded(net.latent_std)}")
        if net.decode_std is not None:
            lines.append(f"to decode     {rounded(net.decode_std)}")
    for key, value in net.info.items():
        # The arguments and the names of the classes would fill the screen.
        if value is not None and key not in ("path", "hash", "arguments", "classes"):
            lines.append(f"{key:13} {value}")
    return "\n".join(lines)


def rounded(values):
    return [round(value, 4) for value in values.tolist()]


# --------------------------------------------------------------------------------------------------
# export


def export_vae(vae, kind, path):
    """Writes a VAE for other code. kind: "diffusers" or "ldm"."""
    if kind == "diffusers":
        export_diffusers(vae, path)
    else:
        export_ldm(vae, path)


def own_weights(vae):
    """The VAE's state dict without the statistics of its latents."""
    state = vae.state_dict()
    return {key: value for key, value in state.items() if not key.startswith("latent_")}


def export_ldm(vae, path):
    """Writes a checkpoint with a `state_dict` in LDM's names, which are ours, and the statistics of
    the latents beside it, in the names of LightningDiT (mean, std) and of REPA-E (latents_bias,
    latents_scale). Raises UserError for norms that LDM's network does not have."""
    groups = vae.config["groups"]
    if groups != LDM_GROUPS:
        raise UserError(
            f"{path} was not written: the norms of this VAE have {groups} groups, and LDM's code, "
            f"which takes {LDM_GROUPS} for any file, would decode it wrongly without an error; "
            "export it with --to diffusers, whose config.json has the number"
        )
    torch.save(dict(state_dict=own_weights(vae)), path)
    statistics = dict(mean=vae.latent_mean, std=vae.latent_std, latents_bias=vae.latent_mean)
    if vae.decode_std is None:
        statistics["latents_scale"] = 1 / vae.latent_std
    else:
        statistics["latents_scale"] = 1 / vae.decode_std
        statistics["decode_std"] = vae.decode_std
    if has_statistics(vae):
        # As these projects have them, (1,C,1,1).
        statistics = {key: value.view(1, -1, 1, 1) for key, value in statistics.items()}
        # For load_vae alone, since no shape of a narrow VAE shows it.
        statistics["groups"] = groups
        torch.save(statistics, f"{os.path.splitext(path)[0]}-latents-stats.pt")


def has_statistics(vae):
    """Whether the statistics of a VAE's latents are known, not only assumed to be 0 and 1."""
    return getattr(vae, "info", {}).get("latent_statistics") != NO_STATISTICS


def export_diffusers(vae, folder):
    """Writes a folder that diffusers' AutoencoderKL.from_pretrained opens. Its latents_mean and
    latents_std, with a scaling_factor of 1, normalise latents as ours do; where all channels have
    the same statistics, scaling_factor and shift_factor do, which every pipeline reads."""
    os.makedirs(folder, exist_ok=True)
    with open(os.path.join(folder, "config.json"), "w") as file:
        json.dump(diffusers_config(vae), file, indent=1)
    state = own_weights(vae)
    for ours, theirs in diffusers_names(len(vae.config["ch_mult"])):
        state = {key.replace(ours, theirs): value for key, value in state.items()}
    for key, value in state.items():
        # Their attention has linear layers where LDM's has convolutions of 1x1.
        if ".attentions." in key and value.ndim == 4:
            value = value[:, :, 0, 0]
        state[key] = value.contiguous()
    path = os.path.join(folder, "diffusion_pytorch_model.safetensors")
    save_file(state, path, metadata=dict(format="pt"))


def diffusers_config(vae):
    """The config.json of diffusers' AutoencoderKL with this VAE's architecture."""
    config = vae.config
    widths = []
    down_block_types = []
    up_block_types = []
    for i, mult in enumerate(config["ch_mult"]):
        widths.append(config["ch"] * mult)
        attention = "Attn" if i in config["attn_levels"] else ""
        down_block_types.append(f"{attention}DownEncoderBlock2D")
        # The decoder's levels in the order in which they run, the lowest resolution first.
        up_block_types.insert(0, f"{attention}UpDecoderBlock2D")
    return dict(
        _class_name="AutoencoderKL",
        act_fn="silu",
        in_channels=3,
        out_channels=3,
        latent_channels=vae.channels,
        block_out_channels=widths,
        layers_per_block=config["num_res_blocks"],
        norm_num_groups=config["groups"],
        sample_size=vae.resolution,
        use_quant_conv=config["quant_conv"],
        use_post_quant_conv=config["quant_conv"],
        down_block_types=down_block_types,
        up_block_types=up_block_types,
        **diffusers_statistics(vae),
    )


def diffusers_statistics(vae):
    """The entries of diffusers' config.json for the statistics of the latents."""
    mean = vae.latent_mean.tolist()
    std = vae.latent_std.tolist()
    if vae.decode_std is None and len(set(mean)) == 1 and len(set(std)) == 1:
        return dict(scaling_factor=1 / std[0], shift_factor=mean[0] or None)
    entries = dict(scaling_factor=1.0, shift_factor=None, latents_mean=mean, latents_std=std)
    if vae.decode_std is not None:
        # diffusers ignores this entry; load_vae reads it.
        entries["latents_decode_std"] = vae.decode_std.tolist()
    return entries


# --------------------------------------------------------------------------------------------------
# Command line


def parse_arguments(words=None):
    parser = argparse.ArgumentParser(
        prog="python -m tools.weights", description="What a weight file is; a VAE for other code."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    path_help = "file, folder or hf:<owner>/<repository>"
    info_help = "format, architecture, latent statistics, hash, origin"
    info = commands.add_parser("info", help=info_help)
    info.add_argument("path", help=path_help)
    info.add_argument(
        "--sit-format",
        choices=SIT_FORMATS,
        default="auto",
        help="convention of time and sign of a published SiT: the original SiT's, or REPA's",
    )
    export = commands.add_parser("export", help="a VAE in the format of diffusers or LDM")
    export.add_argument("path", help=path_help)
    export.add_argument(
        "--to",
        nargs=2,
        required=True,
        metavar=("FORMAT", "PATH"),
        help="diffusers DIR, or ldm FILE",
    )
    args = parser.parse_args(words)
    if args.command == "export" and args.to[0] not in ("diffusers", "ldm"):
        raise UserError(f"--to {args.to[0]}: the formats are diffusers and ldm")
    return args


def main():
    args = parse_arguments()
    if args.command == "info":
        print(describe(args.path, args.sit_format))
    else:
        kind, path = args.to
        export_vae(load_vae(args.path), kind, path)


if __name__ == "__main__":
    run_main(main)
