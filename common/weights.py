"""load_vae and load_sit: from weight files of ours or, through published.py, of other code."""

import json
import os

import torch

from common.files import UserError, content_hash, load_strictly, read_weights, reading, state_hash
from common.processes import say
from common.published import fetch, find_vae, read_sit, read_vae
from models import VAE, SiT

# The entries in the metadata of our files. Files of other code have "format" at most.
OUR_METADATA = {"kind", "config", "info", "hash"}


def load_vae(path, device="cpu"):
    """The VAE in a file, the folder of a run, a published checkpoint or its folder, or
    hf:<owner>/<repository>, in eval mode. Raises UserError.

    vae.info: where it is from: path, hash (of its weights), step and what else its file tells."""
    path = os.fspath(path)
    own = os.path.join(path, "vae.safetensors")
    if os.path.isfile(own):
        path = own
    elif os.path.isdir(path) or path.startswith("hf:"):
        path = find_vae(path)
    vae = load_network(VAE, path, device, read_vae)
    if vae.info.get("latent_decode_std"):
        vae.set_statistics(vae.latent_mean, vae.latent_std, vae.info["latent_decode_std"])
    finite = vae.latent_mean.isfinite().all() and vae.latent_std.isfinite().all()
    if not finite or (vae.latent_std <= 0).any():
        raise UserError(
            f"{path}: the mean and std of its latents are no finite numbers, or a std is not "
            "positive"
        )
    return vae


def load_sit(path, device="cpu", ema=True, form="auto"):
    """The SiT in a file, the folder of a run, a published checkpoint or
    hf:<owner>/<repository>/<file>, in eval mode: its EMA weights, or the raw ones. Raises
    UserError.

    form: of a published SiT's convention, one of published.SIT_FORMATS.
    sit.info: as for a VAE, and vae_hash and vae_path, which tell the VAE that it was trained on."""
    path = os.fspath(path)
    if path.startswith("hf:"):
        path = fetch(path)
    if os.path.isdir(path):
        path = os.path.join(path, "sit.safetensors")
    if not ema and os.path.basename(path) == "sit.safetensors":
        path = os.path.join(os.path.dirname(path), "sit_raw.safetensors")

    def read_published_sit(content, path):
        return read_sit(content, path, ema, form)

    sit = load_network(SiT, path, device, read_published_sit)
    is_raw = not ema or sit.info.get("part") == "model"
    sit.info["weights"] = "raw" if is_raw else "ema"
    return sit


def load_network(network, path, device, read_published):
    """The network that a file holds, in eval mode, with its .info. Prints what was assumed about a
    published file. Raises UserError.

    network          the class: VAE or SiT
    read_published   converts the content of a file that is not ours:
                     (state dict, path) -> (state dict in our names, config, info)"""
    with reading(path, f"a {network.__name__}"):
        state, metadata = read_weights(path)
        is_ours = bool(OUR_METADATA & set(metadata))
        if is_ours:
            config, info = read_metadata(network, metadata, path)
        else:
            state, config, info = read_published(state, path)
        weights_hash = state_hash(state)
        if is_ours:
            check_content(metadata, weights_hash, path)
        net = build(network, config, state, path)
        net.info = dict(info, path=path, hash=weights_hash)
    if metadata.get("left_out"):
        net.info["left_out"] = metadata["left_out"]
    if net.info.get("assumed"):
        say(f"note: {path}: {net.info['assumed']}")
    return net.to(device).eval()


def read_metadata(network, metadata, path):
    """-> (config, info) of a weight file of ours. Raises UserError if it holds another network."""
    kind = network.__name__.lower()
    if metadata.get("kind") != kind:
        found = metadata.get("kind", "nameless")
        raise UserError(f"{path} is a {found} checkpoint, but a {kind} is needed")
    return json.loads(metadata["config"]), json.loads(metadata["info"])


def check_content(metadata, weights_hash, path):
    """Raises UserError unless a weight file of ours holds what was written into it."""
    expected = metadata.get("hash")  # files of the first versions of this code have none
    is_changed = expected and expected != content_hash(weights_hash, metadata)
    # Damage to the name of an entry makes an entry that we never write.
    unknown = set(metadata) - OUR_METADATA - {"format"}
    if is_changed or unknown:
        raise UserError(
            f"{path} is damaged: its content is not what was written; make it again or restore a "
            "copy"
        )


def build(network, config, state, path):
    """network(**config) with the weights of a state dict. A damaged or hostile config must not take
    memory for a network that the weights do not fit, so a network without memory is tried first."""
    depth = config.get("depth") or 0
    num_res_blocks = config.get("num_res_blocks") or 0
    num_levels = len(config.get("ch_mult") or ())
    # Even without memory for weights, a million blocks would take long to build.
    if max(depth, num_res_blocks, num_levels) > len(state):
        raise UserError(
            f"{path} does not fit: {len(state)} tensors are too few for its architecture"
        )
    with torch.device("meta"):
        load_strictly(network(**config), state, path, assign=True)
    return load_strictly(network(**config), state, path)
