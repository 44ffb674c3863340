"""What a weight file is, and a VAE for other code.

    python -m tools.weights info FILE                              # format, architecture, latent statistics, hash, origin
    python -m tools.weights export runs/vae --to diffusers DIR     # AutoencoderKL.from_pretrained(DIR)
    python -m tools.weights export runs/vae --to ldm FILE          # state_dict in LDM's names

Wherever a VAE is named, a file, a folder or hf:<owner>/<repository> will do.
"""

import argparse
import json
import os

import torch
from safetensors.torch import save_file

from common.files import UserError, read_weights
from common.processes import run_main
from common.published import diffusers_names
from common.weights import load_sit, load_vae


def describe(path):
    """What a file is, as lines of text."""
    sit = os.path.join(path, "sit.safetensors") if os.path.isdir(path) else path
    if os.path.isfile(sit) and read_weights(sit)[1].get("kind") == "sit":
        net, kind = load_sit(sit), "SiT"
    else:
        net, kind = load_vae(path), "VAE"
    lines = [
        f"{kind}, {net.info.get('format', 'ours')} format: {net.info['path']}",
        f"architecture  {json.dumps(net.config)}",
        f"parameters    {sum(p.numel() for p in net.parameters()):,}",
        f"hash          {net.info['hash']}",
    ]
    if kind == "VAE":
        lines += [
            f"latent mean   {[round(v, 4) for v in net.latent_mean.tolist()]}",
            f"latent std    {[round(v, 4) for v in net.latent_std.tolist()]}",
        ]
    skip = ("path", "hash", "arguments", "classes")
    return "\n".join(lines + [f"{k:13} {v}" for k, v in net.info.items() if k not in skip])


def export_vae(vae, kind, path):
    """Writes a VAE for other code. 'diffusers': a folder that AutoencoderKL.from_pretrained opens, whose latents_mean,
    latents_std and scaling_factor 1 normalise as we do; 'ldm': one checkpoint with a `state_dict` in LDM's names."""
    state = {k: v for k, v in vae.state_dict().items() if not k.startswith("latent_")}
    if kind == "ldm":
        return torch.save(dict(state_dict=state), path)
    c, levels = vae.config, len(vae.config["ch_mult"])
    attn = [i in c["attn_levels"] for i in range(levels)]
    config = dict(
        _class_name="AutoencoderKL",
        act_fn="silu",
        in_channels=3,
        out_channels=3,
        latent_channels=vae.channels,
        block_out_channels=[c["ch"] * m for m in c["ch_mult"]],
        layers_per_block=c["num_res_blocks"],
        norm_num_groups=c["groups"],
        sample_size=vae.resolution,
        scaling_factor=1.0,
        shift_factor=None,
        latents_mean=vae.latent_mean.tolist(),
        latents_std=vae.latent_std.tolist(),
        down_block_types=["AttnDownEncoderBlock2D" if a else "DownEncoderBlock2D" for a in attn],
        up_block_types=[
            "AttnUpDecoderBlock2D" if a else "UpDecoderBlock2D" for a in reversed(attn)
        ],
    )
    os.makedirs(path, exist_ok=True)
    with open(os.path.join(path, "config.json"), "w") as file:
        json.dump(config, file, indent=1)
    for ours, theirs in diffusers_names(levels):
        state = {k.replace(ours, theirs): v for k, v in state.items()}
    state = {
        k: (v[:, :, 0, 0] if ".attentions." in k and v.ndim == 4 else v).contiguous()
        for k, v in state.items()
    }
    save_file(
        state, os.path.join(path, "diffusion_pytorch_model.safetensors"), metadata=dict(format="pt")
    )


def main():
    p = argparse.ArgumentParser(
        prog="python -m tools.weights", description="What a weight file is; a VAE for other code."
    )
    commands = p.add_subparsers(dest="command", required=True)
    q = commands.add_parser("info", help="format, architecture, latent statistics, hash, origin")
    q.add_argument("path", help="file, folder or hf:<owner>/<repository>")
    q = commands.add_parser("export", help="a VAE in the format of diffusers or LDM")
    q.add_argument("path", help="file, folder or hf:<owner>/<repository>")
    q.add_argument(
        "--to",
        nargs=2,
        required=True,
        metavar=("FORMAT", "PATH"),
        help="diffusers DIR, or ldm FILE",
    )
    args = p.parse_args()
    if args.command == "info":
        return print(describe(args.path))
    if args.to[0] not in ("diffusers", "ldm"):
        raise UserError(f"--to {args.to[0]}: the formats are diffusers and ldm")
    export_vae(load_vae(args.path), *args.to)


if __name__ == "__main__":
    run_main(main)
