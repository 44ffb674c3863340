"""What is kept to be used again: latents, features, statistics and lists of pictures, with sizes.

    python -m tools.caches                            # lists them
    python -m tools.caches --remove FOLDER ...        # removes these
    python -m tools.caches --remove-old               # removes the latents that no command will use

Latents are old if they are of another VAE than the one beside them, of pictures that no list in
runs/cache knows as they are now, or of a version of this code that named them otherwise.
"""

import argparse
import glob
import os
import re
import shutil
import time

from common.contents import fingerprint_of, read_table
from common.files import UserError, read_weights, state_hash
from common.flags import parse_flags
from common.pictures import COLUMNS
from common.processes import run_main, say
from common.runs import lock

# What may be in a folder of latents or features. Nothing else is ever removed.
OWN_FILES = {"latents.npy", "features.npy", "done.npy", "statistics.json", ".lock"}

NAME = re.compile(r"latents-(\w{8})-(\w{8})-\d+-(?:fp32|bf16)(?:-noflip)?")


def parse_arguments(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--cache", nargs="+", default=[], help="other folders that hold latents, beside runs/"
    )
    parser.add_argument("--remove", nargs="+", default=[], metavar="FOLDER")
    parser.add_argument("--remove-old", action="store_true")
    return parse_flags(parser, argv)


def find_caches(roots):
    """-> paths of the folders of latents and features, and of the files in runs/cache, sorted."""
    found = set(glob.glob(os.path.join("runs", "cache", "*.*")))
    for root in roots:
        for kind in ("latents", "features"):
            pattern = os.path.join(glob.escape(root), "**", f"{kind}-*")
            found.update(path for path in glob.glob(pattern, recursive=True) if os.path.isdir(path))
    return sorted(found)


def size_of(path):
    """Bytes that a file, or the files in a folder, take on the disk."""
    paths = [path]
    if os.path.isdir(path):
        paths = [entry.path for entry in os.scandir(path)]
    # A file may have been given room that it does not fill yet.
    return sum(os.stat(file).st_blocks * 512 for file in paths)


def known_fingerprints():
    """The fingerprints, 8 digits, of all folders of pictures that runs/cache knows."""
    found = set()
    for path in glob.glob(os.path.join("runs", "cache", "pictures-*.npz")):
        kept = read_table(path, COLUMNS)
        if kept is not None:
            table = kept[1]
            fingerprint = fingerprint_of(table["names"], table["states"][:, 0], table["checksums"])
            found.add(fingerprint[:8])
    return found


def why_old(path, fingerprints):
    """-> words that say why no command will use a folder of latents, or None. fingerprints: those
    of the pictures that are known."""
    match = NAME.fullmatch(os.path.basename(path))
    if match is None:
        return "of an older version"
    vae = os.path.join(os.path.dirname(path), "vae.safetensors")
    if os.path.exists(vae) and state_hash(read_weights(vae)[0])[:8] != match[1]:
        return "of another VAE than the one beside it"
    if match[2] not in fingerprints:
        return "of pictures that runs/cache does not know"
    return None


def remove(path):
    """Removes a folder of latents or features. Raises a UserError for any other folder, and while
    a run fills it."""
    if not os.path.isdir(path) or not set(os.listdir(path)) & {"latents.npy", "features.npy"}:
        raise UserError(f"--remove {path}: it is no folder of latents or features")
    others = sorted(set(os.listdir(path)) - OWN_FILES)
    if others:
        raise UserError(f"--remove {path}: it also holds {others[0]!r}, which is not ours")
    gigabytes = size_of(path) / 1e9
    lock_file = lock(path)
    shutil.rmtree(path)
    if lock_file is not None:
        os.close(lock_file)
    say(f"removed   {path}, {gigabytes:.2f} GB")


def main():
    args = parse_arguments()
    for path in args.remove:
        remove(path)
    if args.remove:
        return
    fingerprints = known_fingerprints()
    total = 0
    for path in find_caches(["runs", *args.cache]):
        old = None
        if os.path.basename(path).startswith("latents-"):
            old = why_old(path, fingerprints)
        if old and args.remove_old:
            remove(path)
            continue
        size = size_of(path)
        total += size
        date = time.strftime("%Y-%m-%d", time.localtime(os.path.getmtime(path)))
        say(f"{size / 1e9:9.3f} GB  {date}  {path}" + (f"  old: {old}" if old else ""))
    say(f"{total / 1e9:9.3f} GB in all")


if __name__ == "__main__":
    run_main(main)
