"""Compare fid.py with torch-fidelity and pytorch-fid.

    python -m bench.evaluators                           # speed and memory of the three
    python -m bench.evaluators --resize --num 500        # FID of two folders under two resizes
    python -m bench.evaluators --agreement --num 2000    # measures of two folders by two tools
    python -m bench.evaluators --neighbours --num 50000  # cost of precision and recall
    python -m bench.evaluators --weights pt_inception-2015-12-05-6726825d.pth

The first is one pass over a set, from files to features, each tool in a process of its own and with
its own batch size. It takes about two minutes on one core. Without --weights Inception's weights
are random, which changes no speed, but every FID. It needs tests/requirements.txt.
"""

import argparse
import functools
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

import fid
from common.pictures import ImageSet
from common.processes import run_main, setup


def random_inception(path):
    """Write random weights in the format of the published file.

    The batch norms hold the statistics of random pictures, so that activations stay of order 1 in
    every layer.
    """
    net = fid.tv.Inception3(num_classes=1008, aux_logits=False, init_weights=False)
    net.Mixed_7c = fid.MaxPoolE(2048)
    for module in net.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight)
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.normal_(module.bias, 0, 0.3)
            # The running statistics become the plain mean over batches, of which there is one.
            module.momentum = None
    x = F.interpolate(torch.rand(4, 3, 16, 16), (299, 299), mode="bilinear") * 2 - 1
    with torch.no_grad():
        net.train()(x)
    torch.save(net.state_dict(), path)


def clock():
    """Seconds of wall time and of CPU time, which other work on the machine does not stretch.

    CPU time includes the loader processes that have ended.
    """
    cpu_seconds = sum(os.times()[:4])
    return np.array([time.time(), cpu_seconds])


def peak_memory():
    """Largest resident memory of this process so far, in GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


# --------------------------------------------------------------------------------------------------
# Speed and memory of the three tools
#
# Each function takes the paths of one folder's pictures and returns the wall and the CPU seconds
# from files to features.


def time_fid_py(files, weights):
    setup("cpu")  # as fid.py's main does
    net = fid.Inception(weights)
    pictures = fid.Pictures(os.path.dirname(files[0]))
    start = clock()
    fid.collect(net, pictures.batches(torch.device("cpu"), 0), pictures.count)
    return clock() - start


def time_torch_fidelity(files, weights):
    from torch_fidelity.utils import create_feature_extractor, extract_featuresdict_from_input_id

    settings = {
        "cuda": False,
        "cache": False,
        "verbose": False,
        "feature_extractor_weights_path": weights,
    }
    net = create_feature_extractor("inception-v3-compat", ["2048", "logits_unbiased"], **settings)
    start = clock()
    extract_featuresdict_from_input_id(1, net, input1=os.path.dirname(files[0]), **settings)
    return clock() - start


def time_pytorch_fid(files, weights):
    from pytorch_fid import fid_score, inception

    inception.load_state_dict_from_url = lambda *a, **k: torch.load(weights, weights_only=True)
    net = inception.InceptionV3()
    start = clock()
    fid_score.calculate_activation_statistics(files, net, num_workers=0)
    return clock() - start


TOOLS = {
    "fid.py": time_fid_py,
    "torch-fidelity": time_torch_fidelity,
    "pytorch-fid": time_pytorch_fid,
}


def time_tool(tool, folder, weights):
    """Print wall seconds, CPU seconds and peak memory in GiB: what `throughput` reads."""
    files = evenly_spaced(folder)
    wall, cpu = TOOLS[tool](files, weights)
    print(wall, cpu, peak_memory())


def evenly_spaced(folder, num=None):
    """Paths of `num` pictures of a folder (default: all), evenly spaced."""
    data = ImageSet(folder)
    num = num or len(data)
    return [data.path(i) for i in np.arange(num) * len(data) // num]


def link_all(files, folder):
    """Fill `folder` with links to these files, in their order."""
    for i, path in enumerate(files):
        _, ending = os.path.splitext(path)
        os.symlink(os.path.abspath(path), os.path.join(folder, f"{i:05d}{ending}"))


def throughput(args):
    """Print pictures a second and memory of each tool, all on one folder.

    The tools take turns, each in a new process, and the fastest turn counts.
    """
    files = evenly_spaced(args.data, args.num)
    times = {tool: [] for tool in TOOLS}
    memory = {}
    with tempfile.TemporaryDirectory() as folder:
        link_all(files, folder)
        command = [sys.executable, "-m", "bench.evaluators"]
        command += ["--data", folder, "--weights", args.weights]
        for tool in list(TOOLS) * args.turns:
            done = subprocess.run(
                [*command, "--tool", tool], check=True, capture_output=True, text=True
            )
            # Other words may stand before the three numbers.
            wall, cpu, gib = (float(word) for word in done.stdout.split()[-3:])
            times[tool].append([wall, cpu])
            memory[tool] = gib
    print(f"{len(files)} pictures, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print(f"{'':16}{'pictures/s':>12}{'/CPU second':>14}{'peak memory':>14}")
    for tool in TOOLS:
        wall, cpu = np.min(times[tool], axis=0)
        print(f"{tool:16}{len(files) / wall:12.2f}{len(files) / cpu:14.2f}{memory[tool]:10.2f} GiB")


# --------------------------------------------------------------------------------------------------
# Agreement of the measures


def agreement(args):
    """Print the measures of --data against --ref by fid.py and by torch-fidelity."""
    from torch_fidelity import calculate_metrics

    with tempfile.TemporaryDirectory() as folder:
        samples = os.path.join(folder, "samples")
        ref = os.path.join(folder, "ref")
        for path, original in ((samples, args.data), (ref, args.ref)):
            os.mkdir(path)
            link_all(evenly_spaced(original, args.num), path)
        out = os.path.join(folder, "ours.json")
        command = [sys.executable, "fid.py", samples, "--ref", ref, "--out", out]
        command += ["--inception-weights", args.weights, "--device", "cpu"]
        subprocess.run(command, check=True, capture_output=True)
        with open(out) as file:
            ours = json.load(file)
        theirs = calculate_metrics(
            input1=samples,
            input2=ref,
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
    print(f"{args.num} pictures of {args.data} against {args.num} of {args.ref}")
    print(f"{'':20}{'fid.py':>14}{'torch-fidelity':>16}")
    for name, our_key, their_key in (
        ("FID", "fid", "frechet_inception_distance"),
        ("Inception Score", "inception_score", "inception_score_mean"),
        ("precision", "precision", "precision"),
        ("recall", "recall", "recall"),
    ):
        a = ours[our_key]
        b = theirs[their_key]
        print(f"{name:20}{a:14.6f}{b:16.6f}   {a / b - 1:+.1e}")


# --------------------------------------------------------------------------------------------------
# Cost of precision and recall


def neighbours(args):
    """Print the cost of precision and recall of random features of Inception's width."""
    setup("cpu")
    ref = torch.randn(args.num, 2048, generator=torch.Generator().manual_seed(0))
    samples = torch.randn(args.num, 2048, generator=torch.Generator().manual_seed(1))
    memory_before = peak_memory()
    start = clock()
    precision, recall = fid.precision_recall(ref, samples)
    wall, cpu = clock() - start
    print(
        f"{args.num} x {args.num} of 2048 features: "
        f"precision {precision:.5f}, recall {recall:.5f}; "
        f"{wall:.0f} s, {cpu:.0f} s of CPU time; "
        f"peak memory {peak_memory():.2f} GiB, of which {memory_before:.2f} before it began"
    )


# --------------------------------------------------------------------------------------------------
# The two resizes


def half_pixel_resize(x, size):
    """Resize as pytorch-fid does: between pixel centres; tf_resize takes upper left corners."""
    return F.interpolate(x, (size, size), mode="bilinear", align_corners=False)


def resized_statistics(net, resize, path, num):
    """Inception's statistics of `num` pictures of a folder, under another resize than fid.py's."""
    usual = fid.tf_resize
    fid.tf_resize = resize
    try:
        pictures = fid.Pictures(path, num)
        return fid.collect(net, pictures.batches(torch.device("cpu"), 0), pictures.count)
    finally:
        fid.tf_resize = usual


def resizes(args):
    """Print FID of --data against --ref, and of --data against itself, under the two resizes."""
    net = fid.Inception(args.weights)
    statistics = functools.partial(resized_statistics, net, num=args.num)
    data = statistics(fid.tf_resize, args.data)
    ref = statistics(fid.tf_resize, args.ref)
    data_half_pixel = statistics(half_pixel_resize, args.data)
    ref_half_pixel = statistics(half_pixel_resize, args.ref)
    tensorflow = fid.set_distance(data, ref)
    half_pixel = fid.set_distance(data_half_pixel, ref_half_pixel)
    print(f"FID of {args.num} pictures of {args.data} against {args.num} of {args.ref}")
    print(f"TensorFlow 1 resize   {tensorflow:12.4f}")
    print(f"half-pixel resize     {half_pixel:12.4f}   {half_pixel / tensorflow - 1:+.2%}")
    between = fid.set_distance(data, data_half_pixel)
    print(f"the same pictures, one resize against the other {between:.4f}")


def parse_arguments(argv=None):
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--data", default="data/cifar10/test")
    p.add_argument("--ref", default="data/cifar10/train", help="for --resize and --agreement")
    p.add_argument("--num", type=int, default=128, help="pictures, evenly spaced")
    p.add_argument("--turns", type=int, default=1, help="turns of each tool; the fastest counts")
    p.add_argument("--resize", action="store_true", help="compare the resizes, not the tools")
    p.add_argument(
        "--agreement", action="store_true", help="the folders' measures, ours and torch-fidelity's"
    )
    p.add_argument(
        "--neighbours", action="store_true", help="precision and recall alone, on random features"
    )
    p.add_argument("--weights", help="Inception's (default: random)")
    p.add_argument("--tool", choices=TOOLS, help=argparse.SUPPRESS)
    return p.parse_args(argv)


def main():
    args = parse_arguments()
    if args.neighbours:
        neighbours(args)
        return
    if args.tool:
        time_tool(args.tool, args.data, args.weights)
        return
    with tempfile.TemporaryDirectory() as folder:
        if not args.weights:
            args.weights = os.path.join(folder, "random.pth")
            torch.manual_seed(0)
            random_inception(args.weights)
        if args.resize:
            resizes(args)
        elif args.agreement:
            agreement(args)
        else:
            throughput(args)


if __name__ == "__main__":
    run_main(main)
