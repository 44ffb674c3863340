"""Weights of other code: where their files are, and what their names and shapes mean in ours.

    VAEs             LDM (CompVis), REPA-E, LightningDiT, MAR, diffusers (SD, SD3, FLUX)
    SiTs             the original SiT, REPA, REPA-E
    discriminators   LDM, REPA-E

load_vae and load_sit (common/weights.py) come here with a file that is not ours. A fork that reads
only its own files does without this one."""

import json
import math
import os
import re
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

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


# Modules that torch.compile, FSDP and activation checkpointing put around a network or its parts.
WRAPPERS = r"\b(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."


def read_tensors(state, *wrappers):
    """The tensors of a state dict. wrappers: names of modules that contained the network when it
    was saved, and so stand before its own names ("module.encoder..."); they are removed, and so
    are those of WRAPPERS, wherever they stand."""
    prefix = re.compile(rf"^(({'|'.join(wrappers)})\.)+")
    tensors = {}
    for key, value in state.items():
        if isinstance(key, str) and torch.is_tensor(value):
            tensors[prefix.sub("", re.sub(WRAPPERS, "", key))] = value
    return tensors


def find_part(state, names, needed, *wrappers):
    """Finds a network in the content of a file, where it may be one entry of several, as in
    REPA-E's {"model": ..., "ema": ..., "vae": ...}. Returns the name of its entry, None for the
    file itself, and its tensors as of read_tensors; (None, {}) if there is none.

    names     of entries, the likeliest first; after them comes any other that is not in PARTS
    needed    names of tensors that the network has"""
    others = [name for name in state if name not in PARTS]
    for name in [None, *names, *others]:
        part = state if name is None else state.get(name)
        if isinstance(part, dict):
            tensors = read_tensors(part, *wrappers)
            if needed <= set(tensors):
                return name, tensors
    return None, {}


# The names of entries that tell what is in them.
PARTS = ("ema", "model", "vae", "discriminator")


def contents(state):
    """What is in a file, for a sentence that says what is not in it."""
    names = [str(name) for name in state]
    if not names:
        return "it holds no tensor under a name"
    return f"its first keys are {', '.join(names[:3])}"


def count_keys(state, pattern):
    """How many of the keys with number 0, 1, 2, ... in place of {} a state dict has in a row."""
    count = 0
    while pattern.format(count) in state:
        count += 1
    return count


# --------------------------------------------------------------------------------------------------
# VAEs in LDM's names, which are ours: LDM, REPA-E, LightningDiT. Other VAEs are renamed first.

VAE_PARTS = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")
VAE_TENSORS = {"encoder.conv_in.weight", "decoder.conv_in.weight"}


def find_vae_part(state):
    """find_part for a VAE."""
    names = ("vae", "first_stage_model", "ema", "model")
    return find_part(state, names, VAE_TENSORS, "module", "first_stage_model", "vae")


def read_vae(content, path):
    """The content of a published VAE's file -> (state dict in our names with latent statistics,
    config, info). Raises UserError if it holds no VAE.

    info names the format, the entry of the file that the VAE is (None: all of it), where the latent
    statistics were found, what was assumed, and which parts are no part of the VAE (its loss, EMA
    copies, LightningDiT's projection to VFM tokens)."""
    part, state = find_vae_part(content)
    if not state:
        raise UserError(
            f"{path} holds no VAE in the names of LDM or diffusers; {contents(content)}"
        )
    form = "LDM"
    settings = {}
    if any(key.startswith("encoder.down_blocks.") for key in state):
        form = "diffusers"
        settings = read_diffusers_config(path)
        state = rename_diffusers_state(state)
    ignored = sorted({key.split(".")[0] for key in state if not key.startswith(VAE_PARTS)})
    state = {key: value.float() for key, value in state.items() if key.startswith(VAE_PARTS)}
    groups = settings.get("norm_num_groups")
    if len(state["encoder.conv_in.weight"]) < 128 and not groups:
        groups = groups_beside(path)
    config = vae_config(state, settings, groups)
    statistics = joint_statistics(content) or latent_statistics(path, settings, config["spec"])
    channels = state["decoder.conv_in.weight"].shape[1]
    state["latent_mean"] = statistics_vector(statistics.mean, channels)
    state["latent_std"] = statistics_vector(statistics.std, channels)
    found = statistics_info(statistics, channels)
    info = dict(
        format=form,
        part=part,
        ignored=ignored,
        latent_statistics=found["latent_statistics"],
        latent_decode_std=found["latent_decode_std"],
        assumed=vae_assumptions(statistics, config, groups),
        step=None,
    )
    return state, config, info


def groups_beside(path):
    """The number of groups that tools/weights.py writes into the statistics beside a VAE in LDM's
    names, None where there is none. Raises UserError for what its older versions exported: nothing
    tells whether such a narrow VAE's norms have 32 groups or a quarter of its width."""
    file = f"{os.path.splitext(path)[0]}-latents-stats.pt"
    if not os.path.isfile(file):
        return None
    statistics, _ = read_weights(file)
    # Only tools/weights.py writes them in the names of both LightningDiT and REPA-E.
    is_ours = {"mean", "latents_scale"} <= set(statistics)
    if is_ours and "groups" not in statistics:
        raise UserError(
            f"{path} was exported by an older version of this code, which lost the number of "
            "groups of its norms; export it anew, with --to diffusers"
        )
    return statistics.get("groups")


def vae_assumptions(statistics, config, groups):
    """What a user should know because the file of a VAE does not tell it, or None. groups: as of
    vae_config."""
    assumptions = [statistics.assumed]
    if config["ch"] < 128 and not groups:
        # A VAE of ours this narrow has other groups.
        assumed = config["groups"]
        assumptions.append(f"norms of {assumed} groups are assumed, which no shape shows")
    return "; ".join(filter(None, assumptions)) or None


def vae_config(state, settings, groups):
    """The arguments of models.VAE, from the shapes of a state dict in LDM's names and, for what
    shapes do not show, diffusers' settings. groups: of its norms, None if the file does not tell.
    """
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
        # No shape shows it. 32 is everybody's number; a quarter is ours for narrow networks.
        groups=groups or (32 if ch % 32 == 0 else max(1, ch // 4)),
        num_res_blocks=count_keys(state, "encoder.down.0.block.{}.conv2.weight"),
        attn_levels=attn_levels,
        quant_conv="quant_conv.weight" in state,
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
# What load_vae's info calls it.
LDM_SOURCE = "LDM's scale factor 0.18215"

# What load_vae's info calls statistics that a file does not have. train_sit.py then measures them.
NO_STATISTICS = "none found: 0 and 1"


class Statistics(NamedTuple):
    """Of latents; each is a number or has one for every channel."""

    mean: Any
    std: Any
    source: str  # where they were found
    decode_std: Any = None  # see models.VAE; None: std
    assumed: str | None = None  # what a user should know if no file tells them


def latent_statistics(path, settings, spec):
    """The Statistics of a published VAE's latents, from the files beside it.
    path: of the VAE's weights. settings: diffusers' config.json, or {}."""
    folder, file = os.path.split(path)
    stem = os.path.splitext(file)[0]
    for name in (f"{stem}-latents-stats.pt", "latents_stats.pt"):
        if os.path.isfile(os.path.join(folder, name)):
            stats, _ = read_weights(os.path.join(folder, name))
            if "mean" in stats:  # LightningDiT, and tools/weights.py
                return Statistics(stats["mean"], stats["std"], name, stats.get("decode_std"))
            return Statistics(stats["latents_bias"], 1 / stats["latents_scale"], name)  # REPA-E
    if settings.get("latents_std"):
        mean = settings.get("latents_mean") or 0.0
        decode_std = settings.get("latents_decode_std")
        return Statistics(mean, settings["latents_std"], "config.json", decode_std)
    # A factor of 1 is what tools/weights.py writes for a VAE without statistics.
    if settings.get("scaling_factor", 1.0) != 1.0:
        mean = settings.get("shift_factor") or 0.0
        return Statistics(mean, 1 / settings["scaling_factor"], "config.json")
    other = f"a file {stem}-latents-stats.pt beside it with mean and std says otherwise"
    if spec == "f8d4":
        # diffusers takes this number where a config.json of its own has none.
        assumed = None if settings else f"no latent statistics: {LDM_SOURCE} is assumed; {other}"
        return Statistics(0.0, LDM_STD, LDM_SOURCE, assumed=assumed)
    assumed = f"no latent statistics: train_sit.py measures them; {other}"
    return Statistics(0.0, 1.0, NO_STATISTICS, assumed=assumed)


def joint_statistics(content):
    """The Statistics in a training checkpoint of REPA-E's, which holds VAE and SiT; None for any
    other file."""
    if not isinstance(content.get("vae"), dict):
        return None
    _, sit = find_sit_part(content, "ema")
    if not sit:
        _, sit = find_sit_part(content, "model")
    return batch_norm_statistics(sit)


def batch_norm_statistics(sit):
    """The Statistics in the batch norm by which a SiT of REPA-E's normalises latents, None if it
    has none. REPA-E divides by the batch norm's sqrt(var + 1e-4), and multiplies by sqrt(var)
    before it decodes. sit: a state dict."""
    if "bn.running_mean" not in sit:
        return None
    mean = sit["bn.running_mean"].float()
    variance = sit["bn.running_var"].float()
    source = "the SiT's batch norm: sqrt(var + 1e-4) to normalise, sqrt(var) to decode"
    return Statistics(mean, (variance + 1e-4).sqrt(), source, variance.sqrt())


def statistics_info(statistics, channels):
    """What a network's info says of Statistics, or of None: lists of one number a channel."""
    info = dict(latent_statistics=None, latent_mean=None, latent_std=None, latent_decode_std=None)
    if statistics is not None:
        info["latent_statistics"] = statistics.source
        info["latent_mean"] = statistics_vector(statistics.mean, channels).tolist()
        info["latent_std"] = statistics_vector(statistics.std, channels).tolist()
        if statistics.decode_std is not None:
            info["latent_decode_std"] = statistics_vector(statistics.decode_std, channels).tolist()
    return info


def statistics_vector(value, channels):
    """A number, or a list or tensor of one for every channel -> (channels,), fp32."""
    return torch.as_tensor(value, dtype=torch.float32).flatten().expand(channels).clone()


# --------------------------------------------------------------------------------------------------
# SiTs of REPA and REPA-E, whose names and convention are ours, and of SiT, which are converted


SIT_TENSORS = {"x_embedder.proj.weight", "pos_embed", "y_embedder.embedding_table.weight"}

# The conventions of time that a file of weights may have; see convert_original_sit.
SIT_FORMATS = ("auto", "sit", "repa")


def find_sit_part(state, name):
    """find_part for a SiT. name: "ema" or "model", the entry that is wanted if there are both."""
    names = ("ema", "model") if name == "ema" else ("model",)
    return find_part(state, names, SIT_TENSORS, "module")


def read_sit(content, path, ema=True, form="auto"):
    """The content of a published SiT's file -> (state dict in our convention, config, info). Raises
    UserError if it holds no SiT.

    ema    whether to take the EMA weights or the raw ones, where the file has both
    form   of SIT_FORMATS: "sit" for the original SiT's convention of time and sign, "repa" for
           REPA's, which is ours; "auto" decides by what else is in the file

    info["latent_mean"], info["latent_std"]: for every channel, of the latents that it was trained
    on; None where its file does not tell. info["latent_decode_std"]: see models.VAE.
    info["null_label_trained"]: whether guidance is possible. info["assumed"]: what the file does
    not tell, and how to say otherwise."""
    part, state = sit_weights(content, path, ema)
    arguments = content.get("args")
    refuse_other_diffusions(arguments, path)
    statistics = sit_latent_statistics(state)
    ignored = leave_out_projectors(state)
    state = {key: value.float() for key, value in state.items() if not key.startswith("bn.")}
    config, label_assumption = sit_config(state, arguments)
    has_null_label = add_null_label(state, config)
    has_variance = drop_variance(state, config)
    is_original, assumption = is_original_sit(state, statistics, arguments, form, has_variance)
    name = "REPA" if config["vfm_dim"] or ignored else "REPA, without a projector"
    if is_original:
        turn_time_and_sign(state)
        name = "original SiT, time and sign turned"
    if has_variance:
        name += ", variance dropped"
    info = dict(
        format=name,
        part=part,
        ignored=ignored,
        assumed="; ".join(filter(None, [assumption, label_assumption])) or None,
        step=None,
        classes=[],
        null_label_trained=has_null_label,
        vae_hash=None,
        # A training checkpoint of REPA-E's holds the VAE as well.
        vae_path=path if find_vae_part(content)[1] else None,
        **statistics_info(statistics, config["channels"]),
    )
    return state, config, info


def sit_weights(content, path, ema):
    """-> (name of the entry or None, tensors) of the SiT in a file. Raises UserError."""
    part, state = find_sit_part(content, "ema" if ema else "model")
    if state:
        return part, state
    if not ema and find_sit_part(content, "ema")[1]:
        raise UserError(f"{path} holds EMA weights only; leave out --raw")
    raise UserError(f"{path} holds no SiT; {contents(content)}")


def setting(arguments, name, default=None):
    """One of the arguments of a training, which checkpoints hold as a Namespace or a dict."""
    if isinstance(arguments, dict):
        return arguments.get(name, default)
    return getattr(arguments, name, default)


def refuse_other_diffusions(arguments, path):
    """Raises UserError where the arguments tell of a network that predicts no velocity on the
    straight path, which is all that sample.py integrates."""
    model = str(setting(arguments, "model", ""))
    if model.startswith("DiT"):
        raise UserError(f"{path} is a {model}, which predicts the noise of another diffusion")
    diffusion = [
        str(setting(arguments, "path_type", "linear")),
        str(setting(arguments, "prediction", "velocity")),
    ]
    if diffusion[0].lower() != "linear" or diffusion[1] not in ("v", "velocity"):
        raise UserError(
            f"{path} was trained with the path {diffusion[0]} to predict {diffusion[1]}, and only "
            "velocities on the linear path are supported"
        )


def leave_out_projectors(state):
    """Removes from a state dict the projectors that models.SiT does not have: all but the first,
    and the first if its hidden layers are not 2048 wide. Returns their names."""
    ignored = set()
    for key in list(state):
        if key.startswith("projectors."):
            number = key.split(".")[1]
            hidden = state.get(f"projectors.{number}.0.bias")
            if number != "0" or hidden is None or len(hidden) != 2048:
                ignored.add(f"projectors.{number}")
                del state[key]
    return sorted(ignored)


def sit_config(state, arguments):
    """-> (the arguments of models.SiT, what was assumed or None), from the shapes of a state dict
    and, for what shapes do not show, the arguments of its training, if its file holds them."""
    width, channels, patch = state["x_embedder.proj.weight"].shape[:3]
    grid = math.isqrt(state["pos_embed"].shape[1])
    depth = len({key.split(".")[1] for key in state if key.startswith("blocks.")})
    # No shape shows the number of heads: those of a published size, or 64 channels a head.
    heads = max(1, width // 64)
    for _, published_width, published_heads in SIT_SIZES.values():
        if width == published_width:
            heads = published_heads
    vfm_dim = None
    if "projectors.0.4.bias" in state:
        vfm_dim = len(state["projectors.0.4.bias"])
    rows = len(state["y_embedder.embedding_table.weight"])
    num_classes, assumption = count_classes(rows, arguments)
    config = dict(
        patch=patch,
        channels=channels,
        latent_size=patch * grid,
        depth=depth,
        width=width,
        heads=heads,
        num_classes=num_classes,
        repa_block=setting(arguments, "encoder_depth") or min(8, depth),
        vfm_dim=vfm_dim,
    )
    return config, assumption


def count_classes(rows, arguments):
    """-> (the number of classes, what was assumed or None) of a table of labels of so many rows.
    One row is the null label's, unless the network was trained without label dropout."""
    told = setting(arguments, "num_classes")
    if told in (rows, rows - 1):
        return told, None
    if setting(arguments, "cfg_prob") is not None:
        return (rows - 1 if setting(arguments, "cfg_prob") > 0 else rows), None
    if rows == 1000:
        return rows, "its 1000 labels are taken for ImageNet's classes, without a null label"
    return rows - 1, None


def add_null_label(state, config):
    """Adds a row of zeros to the table of labels where it has none for the null label, and returns
    whether it had one."""
    name = "y_embedder.embedding_table.weight"
    has_null_label = len(state[name]) == config["num_classes"] + 1
    if not has_null_label:
        state[name] = F.pad(state[name], (0, 0, 0, 1))
    return has_null_label


def sit_latent_statistics(state):
    """The Statistics of the latents that a SiT was trained on, or None."""
    statistics = batch_norm_statistics(state)
    if statistics is None and state["x_embedder.proj.weight"].shape[1] == 4:
        # SiT and REPA use SD-VAE with LDM's constant.
        statistics = Statistics(0.0, LDM_STD, LDM_SOURCE)
    return statistics


def is_original_sit(state, statistics, arguments, form, has_variance):
    """-> (whether a SiT has the original's convention of time, what was assumed or None)."""
    if form != "auto":
        return form == "sit", None
    has_batch_norm = statistics is not None and statistics.decode_std is not None
    has_projector = any(key.startswith("projectors.") for key in state)
    if has_projector or has_batch_norm or setting(arguments, "encoder_depth") is not None:
        return False, None
    # SiT's training writes "velocity" where REPA's writes "v".
    if setting(arguments, "prediction") == "velocity":
        return True, None
    if has_variance:
        return True, (
            "taken for an original SiT, in its convention of time and sign; --sit-format repa says "
            "otherwise, and a DiT, whose names and shapes are the same, cannot be used"
        )
    return False, (
        "taken for REPA's convention of time and sign; --sit-format sit says that it is an "
        "original SiT without learned variance, whose names and shapes are the same"
    )


def drop_variance(state, config):
    """Removes, in place, the half of the last layer that predicts a variance where there is one,
    and returns whether there was. It has channels, then as many for the variance, per pixel."""
    pixels = config["patch"] ** 2
    channels = config["channels"]
    if len(state["final_layer.linear.bias"]) != 2 * pixels * channels:
        return False
    for name in ("final_layer.linear.weight", "final_layer.linear.bias"):
        value = state[name]  # (pixels * 2 * channels, ...)
        velocity = value.view(pixels, 2 * channels, -1)[:, :channels]
        state[name] = velocity.reshape(-1, *value.shape[1:])
    return True


def turn_time_and_sign(state):
    """Changes the state dict of an original SiT (Ma et al. 2024), in place, to our convention.

    In theirs t = 0 is noise and t = 1 data, and the network predicts data - noise: our v(x, t) =
    -theirs(x, 1 - t). Both changes are linear where they meet a layer, so they go into its weights.
    """
    for name in ("final_layer.linear.weight", "final_layer.linear.bias"):
        state[name] = -state[name]
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


def find_discriminator(state):
    """find_part for a discriminator."""
    wrappers = ("module", "loss", "discriminator")
    part, tensors = find_part(state, ("discriminator",), {"main.0.weight"}, *wrappers)
    return part, {key: value for key, value in tensors.items() if key.startswith("main.")}


def load_discriminator(path):
    """The PatchDiscriminator in a checkpoint, where it is called loss.discriminator.main.* or
    discriminator, or in a file of its own (main.*). Raises UserError if there is none."""
    content, _ = read_weights(fetch(path))
    _, state = find_discriminator(content)
    if not state:
        raise UserError(
            f"{path} holds no discriminator (no key such as loss.discriminator.main.0.weight); "
            f"{contents(content)}"
        )
    with reading(path, "a discriminator"):
        return load_strictly(PatchDiscriminator(), state, path)
