"""What a weight file is, and a VAE for other code.

    python -m tools.weights info FILE                           # what it holds, where it is from
    python -m tools.weights export runs/vae --to diffusers DIR  # a folder for AutoencoderKL
    python -m tools.weights export runs/vae --to ldm FILE       # a state_dict in LDM's names

Wherever a VAE is named, a file, a folder or hf:<owner>/<repository> will do."""

import argparse
import json
import os

import torch
from safetensors.torch import save_file

from common.files import UserError, read_weights
from common.processes import run_main
from common.published import diffusers_names
from common.weights import load_sit, load_vae

# --------------------------------------------------------------------------------------------------
# info


def describe(path):
    """What is in a file, as lines of text. Raises UserError for neither a VAE nor a SiT of ours."""
    if is_sit(path):
        net = load_sit(path)
        kind = "SiT"
    else:
        net = load_vae(path)
        kind = "VAE"
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
    for key, value in net.info.items():
        # The arguments and the names of the classes would fill the screen.
        if key not in ("path", "hash", "arguments", "classes"):
            lines.append(f"{key:13} {value}")
    return "\n".join(lines)


def is_sit(path):
    """Whether a path is a SiT of ours, or the folder of its run."""
    if os.path.isdir(path):
        path = os.path.join(path, "sit.safetensors")
    if not os.path.isfile(path):
        return False
    _, metadata = read_weights(path)
    return metadata.get("kind") == "sit"


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
    """Writes a checkpoint with a `state_dict` in LDM's names, which are ours."""
    torch.save(dict(state_dict=own_weights(vae)), path)


def export_diffusers(vae, folder):
    """Writes a folder that diffusers' AutoencoderKL.from_pretrained opens. Its latents_mean and
    latents_std, with a scaling_factor of 1, normalise latents as ours do."""
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
        scaling_factor=1.0,
        shift_factor=None,
        latents_mean=vae.latent_mean.tolist(),
        latents_std=vae.latent_std.tolist(),
        down_block_types=down_block_types,
        up_block_types=up_block_types,
    )


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
        print(describe(args.path))
    else:
        kind, path = args.to
        export_vae(load_vae(args.path), kind, path)


if __name__ == "__main__":
    run_main(main)
