"""Command-line flags that the stages share."""

import argparse
import importlib.util
import os
import sys

from common.files import UserError
from common.processes import say, world


def whole_number(text, least=0):
    """An argparse type: a whole number that is at least `least`."""
    number = int(text)
    if number < least:
        raise argparse.ArgumentTypeError(f"{text} is less than {least}")
    return number


def positive(text):
    """An argparse type: a whole number that is at least 1."""
    return whole_number(text, least=1)


def two_or_more(text):
    """An argparse type: a whole number that is at least 2."""
    return whole_number(text, least=2)


def auto_or_positive(text):
    """An argparse type: "auto", or a whole number that is at least 1."""
    if text == "auto":
        return text
    return positive(text)


def parse_flags(parser, argv=None):
    """parser.parse_args, after the help of every flag that has a default was made to name it.

    A ~ at the start of a path is replaced, since shells leave it where they read --data=~/pictures.
    --tensorboard is refused here, before a run has begun, where the package is not installed."""
    for action in parser._actions:
        has_default = action.default not in (None, False, argparse.SUPPRESS)
        if has_default and "default" not in (action.help or ""):
            action.help = f"{action.help or ''} (default: %(default)s)".strip()
    args = parser.parse_args(argv)
    for name, value in vars(args).items():
        setattr(args, name, with_home(value))
    say_if_repeated("--data", sys.argv[1:] if argv is None else argv)
    if "tensorboard" in args and args.tensorboard and not importlib.util.find_spec("tensorboard"):
        parser.error("--tensorboard needs a package that is not here: pip install tensorboard")
    return args


def with_home(value):
    """A flag's value -> the same with the home folder for a ~ at its start, or at that of each
    word."""
    if isinstance(value, list):
        return [with_home(word) for word in value]
    if isinstance(value, str) and value.startswith("~/"):
        return os.path.expanduser(value)
    return value


def say_if_repeated(flag, words):
    """Says which value of a flag counts where the command's words give it several."""
    values = []
    for i, word in enumerate(words):
        if word == flag:
            values += words[i + 1 : i + 2]
        elif word.startswith(f"{flag}="):
            values.append(word.partition("=")[2])
    # The process group, which `say` asks for the first process, does not exist yet.
    if len(set(values)) > 1 and os.environ.get("RANK", "0") == "0":
        say(
            f"note: {flag} is given {len(values)} times, and the last counts, {values[-1]}; for "
            "one set of several folders, put links to them into one folder"
        )


def add_machine_flags(parser):
    """Adds the flags that mean the same in every stage."""
    group = parser.add_argument_group("machine")
    group.add_argument(
        "--precision",
        choices=["auto", "bf16", "fp32"],
        default="auto",
        help="autocast type; auto: bf16 where the hardware has bf16 matrix products, else fp32",
    )
    group.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, help="torch.compile (default: on CUDA)"
    )
    group.add_argument("--device", choices=["cuda", "cpu"], help="default: cuda if there is one")
    group.add_argument(
        "--timeout",
        type=float,
        default=1800,
        help="seconds until a process gives up waiting for the others",
    )
    group.add_argument(
        "--workers",
        type=whole_number,
        help="loader processes per process (default: its share of the cores, up to 8)",
    )
    group.add_argument("--seed", type=whole_number, default=0)


def add_training_flags(
    parser, out, batch_size, epochs, lr, ema, log_every, sample_every, save_every, fid, fid_ref
):
    """Adds the flags that mean the same in both training stages. `out` to `save_every` are their
    defaults; `fid` and `fid_ref` are what the help calls the measure of --fid-every and its default
    reference."""
    group = parser.add_argument_group("pictures and vision model")
    group.add_argument(
        "--data",
        default="data/imagenet/train",
        help="folder of <class>/<picture>, or a .zip or .tar file and more: see docs/images.md",
    )
    group.add_argument(
        "--check-data",
        action="store_true",
        help="decode every picture before training, once for each list of files",
    )
    group.add_argument(
        "--skip-bad",
        action="store_true",
        help="another picture of the class for one that cannot be read; else an error",
    )
    group.add_argument("--vfm", default="vit_base_patch14_dinov2.lvd142m", help="any timm model")
    group.add_argument(
        "--vfm-weights", help="local file of its weights (default: timm's, from the hub)"
    )
    group.add_argument(
        "--vfm-stride", type=int, help="for a CNN: stride of the feature map (default: its last)"
    )
    group.add_argument(
        "--vfm-norm",
        action=argparse.BooleanOptionalAction,
        help="a transformer's tokens after its final norm (default: not of mae-l and clip-l, as in "
        "REPA)",
    )
    group = parser.add_argument_group("optimisation")
    group.add_argument(
        "--batch-size", type=positive, default=batch_size, help="global, pictures a step"
    )
    group.add_argument(
        "--accum",
        type=auto_or_positive,
        default="auto",
        help="forward passes a step; a batch norm sees one at a time; auto: the fewest that fit "
        "into the GPU's memory, on a CPU 1",
    )
    group.add_argument("--epochs", type=float, default=epochs)
    group.add_argument("--steps", type=positive, help="instead of --epochs")
    group.add_argument("--lr", type=float, default=lr)
    group.add_argument("--lr-schedule", choices=["constant", "cosine"], default="constant")
    group.add_argument("--warmup", type=whole_number, default=0, help="steps")
    group.add_argument("--clip", type=float, default=1.0, help="gradient norm")
    group.add_argument(
        "--ema",
        type=float,
        default=ema,
        help="decay of the weights that are published; 0: the raw ones",
    )
    group.add_argument(
        "--no-ema-warmup",
        dest="ema_warmup",
        action="store_false",
        help="that decay from the first step on, as published, instead of "
        "min(decay, (1 + step) / (10 + step))",
    )
    group.add_argument(
        "--grad-checkpoint", action="store_true", help="less memory, about a third more time"
    )
    group = parser.add_argument_group("run")
    group.add_argument("--out", default=out)
    group.add_argument(
        "--overwrite", action="store_true", help="begin anew in a folder that holds a run"
    )
    group.add_argument(
        "--resume",
        action="store_true",
        help="fail if there is nothing to resume (resuming is the default)",
    )
    group.add_argument(
        "--change",
        nargs="+",
        default=[],
        metavar="FLAG",
        help="on resuming: flags whose value may differ from before, such as lr, or data for other "
        "pictures of the same classes",
    )
    group.add_argument("--log-every", type=positive, default=log_every, help="steps")
    group.add_argument(
        "--tensorboard",
        action="store_true",
        help="also write the log and the pictures as event files into tensorboard/",
    )
    group.add_argument(
        "--sample-every",
        type=positive,
        default=sample_every,
        help="steps between pictures in samples/",
    )
    group.add_argument(
        "--save-every",
        type=positive,
        default=save_every,
        help="steps between checkpoints; the last two are kept",
    )
    group.add_argument(
        "--keep-every",
        type=whole_number,
        default=0,
        help="steps between checkpoints that stay for good; 0: none",
    )
    group.add_argument(
        "--max-bad-steps",
        type=whole_number,
        default=10,
        help="stop after more steps in a row whose loss is not finite",
    )
    group = parser.add_argument_group(f"{fid} during training")
    group.add_argument("--fid-every", type=whole_number, default=0, help="steps; 0: never")
    group.add_argument(
        "--fid-num",
        type=positive,
        default=5000,
        help="pictures; few pictures give a higher FID than 50,000",
    )
    group.add_argument("--fid-ref", help=f"reference as for fid.py (default: {fid_ref})")
    group.add_argument("--inception-weights", help="local file (default: downloaded once)")
    add_machine_flags(parser)


# Of these flags, the ones that may change when a run is resumed. A stage adds its own.
FREE_FLAGS = {
    # The pictures count, not the spelling of their folder: see common.runs.compare_data.
    "data",
    "check_data",
    "skip_bad",
    "vfm_weights",
    "accum",
    # Not a flag: what settle_passes of common/training.py notes.
    "machine",
    "ema_warmup",
    "epochs",
    "steps",
    "grad_checkpoint",
    "out",
    "overwrite",
    "resume",
    "change",
    "log_every",
    "tensorboard",
    "sample_every",
    "save_every",
    "keep_every",
    "max_bad_steps",
    "fid_every",
    "fid_num",
    "fid_ref",
    "inception_weights",
    "compile",
    "device",
    "timeout",
    "workers",
}


# Flags of what is measured. They may change, too, but that is said: a curve then goes on with
# values of another kind.
MEASURED_FLAGS = {"val_hash", "fid_ref", "inception_weights", "probe_data"}


# What a run did before these flags existed, whose names its checkpoint lacks.
BEFORE_FLAGS = {
    "flip": True,
    "mapper_norm": "batch",
    "lpips_rescale": False,
    "autocast_losses": True,
    "clip_together": True,
    "ema_warmup": False,
}


def settings_of(saved, args):
    """The flags of a checkpoint, {name: value}, completed by what older versions did in place of
    those that they did not know. A flag that is None in `args` has no effect in this run, and is
    left out."""
    older = dict(BEFORE_FLAGS, disc_lr=saved.get("lr"), vfm_norm=not saved.get("vfm_stride"))
    settings = {name: older[name] for name in older if getattr(args, name, None) is not None}
    if "vfm_norm" not in saved and saved.get("vfm") == "clip-l":
        # The name then stood for the model with the plain GELU.
        settings["vfm"] = "vit_large_patch14_clip_224.openai"
        saved = {name: value for name, value in saved.items() if name != "vfm"}
    return settings | saved


def share_batch(batch_size, accum):
    """Global batch size -> pictures per process and forward pass; with accum "auto", pictures per
    process. Raises a UserError where the batch cannot be divided so.
    """
    shares = world()
    what = f"{world()} processes"
    if accum != "auto":
        shares *= accum
        what += f" x --accum {accum}"
    if batch_size % shares:
        raise UserError(f"--batch-size {batch_size} is not divisible by {what}")
    return batch_size // shares


# What a stage prints before it compiles. The bar stands still meanwhile.
COMPILING = "compile   the first step takes a minute or more; --no-compile starts at once"


def wants_compile(args, device):
    """Whether to use torch.compile: --compile or --no-compile, else on CUDA only."""
    if args.compile is not None:
        return args.compile
    return device.type == "cuda"
