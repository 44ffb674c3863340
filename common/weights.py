"""Our weight files: load_vae and load_sit."""

import json
import os

import torch

from common.files import UserError, content_hash, load_strictly, read_weights, reading, state_hash
from common.published import fetch, find_vae, read_sit, read_vae
from models import SiT, VAE


def build(network, config, state, path):
    """network(**config) with the weights of a state dict, which are compared with its plan before memory is taken."""
    if max(
        config.get("depth") or 0,
        config.get("num_res_blocks") or 0,
        len(config.get("ch_mult") or ()),
    ) > len(state):
        raise UserError(
            f"{path} does not fit: {len(state)} tensors are too few for its architecture"
        )
    with torch.device("meta"):
        load_strictly(network(**config), state, path, assign=True)
    return load_strictly(network(**config), state, path)


OURS = {"kind", "config", "info", "hash"}  # metadata of our files; others have "format" at most


def load_network(network, path, device, read_published):
    """The network that a file describes, in eval mode; `.info` tells where it came from. A file of ours says what it
    is in its metadata, and its content must be what was written (files of older versions have no "hash" of it); any
    other goes through read_published(state dict) -> (state dict, config, info)."""
    kind = network.__name__.lower()
    with reading(path, f"a {network.__name__}"):
        state, metadata = read_weights(path)
        ours = OURS & set(metadata)
        if ours and metadata.get("kind") != kind:
            raise UserError(
                f"{path} is a {metadata.get('kind', 'nameless')} checkpoint, but a {kind} is needed"
            )
        if ours:
            config, info = json.loads(metadata["config"]), json.loads(metadata["info"])
        else:
            state, config, info = read_published(state)
        info = dict(info, path=path, hash=state_hash(state))
        wrong = metadata.get("hash") and metadata["hash"] != content_hash(info["hash"], metadata)
        if ours and (wrong or set(metadata) - OURS - {"format"}):
            raise UserError(
                f"{path} is damaged: its content is not what was written; make it again or restore a copy"
            )
        net = build(network, config, state, path)
        net.info = info
    return net.to(device).eval()


def load_vae(path, device="cpu"):
    """The VAE in a file, a run's folder, a published checkpoint or its folder, or hf:<owner>/<repository>."""
    path = os.fspath(path)
    own = os.path.join(path, "vae.safetensors")
    if os.path.isfile(own):
        path = own
    elif os.path.isdir(path) or path.startswith("hf:"):
        path = find_vae(path)
    vae = load_network(VAE, path, device, lambda state: read_vae(state, path))
    if not (
        vae.latent_mean.isfinite().all()
        and vae.latent_std.isfinite().all()
        and (vae.latent_std > 0).all()
    ):
        raise UserError(
            f"{path}: the mean and std of its latents are no finite numbers, or a std is not positive"
        )
    return vae


def load_sit(path, device="cpu", ema=True):
    """The SiT in a file, a run's folder, a published checkpoint or hf:<owner>/<repository>/<file>: its EMA weights, or
    the raw ones. `sit.info` also tells which VAE it belongs to."""
    path = os.fspath(path)
    if path.startswith("hf:"):
        path = fetch(path)
    if os.path.isdir(path):
        path = os.path.join(path, "sit.safetensors")
    if not ema and os.path.basename(path) == "sit.safetensors":
        path = os.path.join(os.path.dirname(path), "sit_raw.safetensors")
    sit = load_network(
        SiT, path, device, lambda state: read_sit(state.get("ema" if ema else "model", state), path)
    )
    sit.info["weights"] = "ema" if ema else "raw"
    return sit
