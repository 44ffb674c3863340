"""fid.py beside torch-fidelity and pytorch-fid: pictures a second (of wall time, and of CPU time, for a machine that does
other work as well) and peak memory of one pass over a set, from files to features, each in a process of its own and with
its own batch size; and what pytorch-fid's other resize does to FID.

    python -m bench.evaluators                       # table of the three; about two minutes on one core
    python -m bench.evaluators --resize --num 500    # FID of two folders under both resizes
    python -m bench.evaluators --agreement --num 2000    # FID, IS, precision, recall of two folders, ours and torch-fidelity's
    python -m bench.evaluators --neighbours --num 50000  # precision and recall of sets of that size: time and peak memory
    python -m bench.evaluators --weights pt_inception-2015-12-05-6726825d.pth

Without --weights Inception's are random, which changes no speed, but every FID. Needs tests/requirements.txt.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time

import numpy as np
import torch
import torch.nn.functional as F

from common.pictures import ImageSet
from common.processes import run_main, setup
import fid

TOOLS = ["fid.py", "torch-fidelity", "pytorch-fid"]


def random_inception(path):
    """Writes random weights in the format of the published file. Batch norms hold the statistics of random pictures, so
    that activations stay of order 1 in every layer."""
    net = fid.tv.Inception3(num_classes=1008, aux_logits=False, init_weights=False)
    net.Mixed_7c = fid.MaxPoolE(2048)
    for module in net.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight)
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.normal_(module.bias, 0, 0.3)
            module.momentum = None  # the plain mean over batches, of which there is one
    with torch.no_grad():
        net.train()(F.interpolate(torch.rand(4, 3, 16, 16), (299, 299), mode="bilinear") * 2 - 1)
    torch.save(net.state_dict(), path)


def clock():
    """Seconds of wall time, and of CPU time (with loader processes that have ended), which other work does not stretch."""
    return np.array([time.time(), sum(os.times()[:4])])


def fid_py(files, weights):
    setup("cpu")  # as its main does
    net, pictures = fid.Inception(weights), fid.Pictures(os.path.dirname(files[0]))
    start = clock()
    fid.collect(net, pictures.batches(torch.device("cpu"), 0), pictures.count)
    return clock() - start


def torch_fidelity(files, weights):
    from torch_fidelity.utils import create_feature_extractor, extract_featuresdict_from_input_id

    settings = dict(cuda=False, cache=False, verbose=False, feature_extractor_weights_path=weights)
    net = create_feature_extractor("inception-v3-compat", ["2048", "logits_unbiased"], **settings)
    start = clock()
    extract_featuresdict_from_input_id(1, net, input1=os.path.dirname(files[0]), **settings)
    return clock() - start


def pytorch_fid(files, weights):
    from pytorch_fid import fid_score, inception

    inception.load_state_dict_from_url = lambda *a, **k: torch.load(weights, weights_only=True)
    net = inception.InceptionV3()
    start = clock()
    fid_score.calculate_activation_statistics(files, net, num_workers=0)
    return clock() - start


def link(files, folder):
    """Makes `folder` one of these files, in their order."""
    for i, path in enumerate(files):
        os.symlink(
            os.path.abspath(path), os.path.join(folder, f"{i:05d}{os.path.splitext(path)[1]}")
        )


def throughput(args, files):
    """One folder of `files` for all; the tools take turns, each in a new process, and the fastest turn counts."""
    with tempfile.TemporaryDirectory() as folder:
        link(files, folder)
        times, memory = {tool: [] for tool in TOOLS}, {}
        for tool in TOOLS * args.turns:
            words = [
                "-m",
                "bench.evaluators",
                "--tool",
                tool,
                "--data",
                folder,
                "--weights",
                args.weights,
            ]
            out = subprocess.run(
                [sys.executable, *words], check=True, capture_output=True, text=True
            ).stdout.split()
            times[tool].append([float(x) for x in out[-3:-1]])
            memory[tool] = float(out[-1])
    print(f"{len(files)} pictures, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print(f"{'':16}{'pictures/s':>12}{'/CPU second':>14}{'peak memory':>14}")
    for tool in TOOLS:
        wall, cpu = np.min(times[tool], axis=0)
        print(f"{tool:16}{len(files) / wall:12.2f}{len(files) / cpu:14.2f}{memory[tool]:10.2f} GiB")


def agreement(args, files, ref_files):
    """The two folders' numbers by fid.py and by torch-fidelity, each from the files on, with one file of weights."""
    from torch_fidelity import calculate_metrics

    with tempfile.TemporaryDirectory() as folder:
        for name, paths in (("a", files), ("b", ref_files)):
            os.mkdir(f"{folder}/{name}")
            link(paths, f"{folder}/{name}")
        command = [
            sys.executable,
            "fid.py",
            f"{folder}/a",
            "--ref",
            f"{folder}/b",
            "--inception-weights",
            args.weights,
            "--out",
            f"{folder}/ours.json",
            "--device",
            "cpu",
        ]
        subprocess.run(command, check=True, capture_output=True)
        with open(f"{folder}/ours.json") as file:
            ours = json.load(file)
        theirs = calculate_metrics(
            input1=f"{folder}/a",
            input2=f"{folder}/b",
            cuda=False,
            fid=True,
            isc=True,
            prc=True,
            verbose=False,
            isc_splits=1,
            cache=False,
            feature_extractor_weights_path=args.weights,
            prc_neighborhood=3,
            feature_layer_prc="2048",
            feature_extractor="inception-v3-compat",
        )
    print(
        f"{args.num} pictures of {args.data} against {args.num} of {args.ref}\n{'':20}{'fid.py':>14}{'torch-fidelity':>16}"
    )
    for name, a, b in (
        ("FID", "fid", "frechet_inception_distance"),
        ("Inception Score", "inception_score", "inception_score_mean"),
        ("precision", "precision", "precision"),
        ("recall", "recall", "recall"),
    ):
        print(f"{name:20}{ours[a]:14.6f}{theirs[b]:16.6f}   {ours[a] / theirs[b] - 1:+.1e}")


def neighbours(args):
    """Precision and recall between two sets of random features of Inception's width."""
    setup("cpu")
    ref, samples = (
        torch.randn(args.num, 2048, generator=torch.Generator().manual_seed(seed))
        for seed in (0, 1)
    )
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, clock()
    precision, recall = fid.precision_recall(ref, samples)
    wall, cpu = clock() - start
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(
        f"{args.num} x {args.num} of 2048 features: precision {precision:.5f}, recall {recall:.5f}; {wall:.0f} s, {cpu:.0f} s of CPU "
        f"time; peak memory {after:.2f} GiB, of which {before:.2f} before it began"
    )


def half_pixel(x, size):
    """What pytorch-fid does: bilinear between pixel centres, where tf_resize takes upper left corners."""
    return F.interpolate(x, (size, size), mode="bilinear", align_corners=False)


def resizes(args):
    """FID of --data against --ref and of --data against itself, under the two resizes."""
    net, stats, usual = fid.Inception(args.weights), {}, fid.tf_resize
    for name, resize in (("TensorFlow 1", usual), ("half-pixel", half_pixel)):
        fid.tf_resize = resize
        for path in (args.data, args.ref):
            pictures = fid.Pictures(path, args.num)
            stats[name, path] = fid.collect(
                net, pictures.batches(torch.device("cpu"), 0), pictures.count
            )
    fid.tf_resize = usual

    def distance(a, b):
        return fid.frechet_distance(*(stats[x][key] for x in (a, b) for key in ("mu", "sigma")))

    one, two = (
        distance((name, args.data), (name, args.ref)) for name in ("TensorFlow 1", "half-pixel")
    )
    print(f"FID of {args.num} pictures of {args.data} against {args.num} of {args.ref}")
    print(
        f"TensorFlow 1 resize   {one:12.4f}\nhalf-pixel resize     {two:12.4f}   {two / one - 1:+.2%}"
    )
    same = distance(("TensorFlow 1", args.data), ("half-pixel", args.data))
    print(f"the same pictures, one resize against the other {same:.4f}")


def chosen(data, num):
    """Paths of `num` pictures of a set, evenly spaced."""
    return [data.path(i) for i in np.arange(num) * len(data) // num]


def main():
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--data", default="data/cifar10/test")
    p.add_argument("--ref", default="data/cifar10/train", help="for --resize and --agreement")
    p.add_argument("--num", type=int, default=128, help="pictures, evenly spaced")
    p.add_argument("--turns", type=int, default=1, help="of each tool; the fastest counts")
    p.add_argument("--resize", action="store_true", help="compare the resizes, not the tools")
    p.add_argument(
        "--agreement", action="store_true", help="the folders' numbers, ours and torch-fidelity's"
    )
    p.add_argument(
        "--neighbours", action="store_true", help="precision and recall alone, on random features"
    )
    p.add_argument("--weights", help="Inception's (default: random)")
    p.add_argument("--tool", choices=TOOLS, help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.neighbours:
        return neighbours(args)
    data = ImageSet(args.data)
    if args.tool:
        files = chosen(data, len(data))
        measure = dict(zip(TOOLS, (fid_py, torch_fidelity, pytorch_fid)))[args.tool]
        return print(
            *measure(files, args.weights),
            resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        )
    with tempfile.TemporaryDirectory() as folder:
        if not args.weights:
            args.weights = os.path.join(folder, "random.pth")
            torch.manual_seed(0)
            random_inception(args.weights)
        if args.resize:
            return resizes(args)
        if args.agreement:
            return agreement(args, chosen(data, args.num), chosen(ImageSet(args.ref), args.num))
        throughput(args, chosen(data, args.num))


if __name__ == "__main__":
    run_main(main)
