"""The measures of a VAE that need no diffusion model, taken as the study takes them, for
study/card.py: reconstruction, probes, disentanglement, evenness, interpolation, leakage."""

import contextlib
import os
import time

import torch

from common.files import UserError
from common.pictures import to_uint8
import fid
import probe
from probing.benchmarks import read_benchmarks
from probing.editing import edit_attributes
from probing.latent_shape import latent_points, uniformity
from study.attributes import CLASSES, write_attributes

# How many pictures the study takes at most.
HELD_OUT = 2000
REAL = 10000
PROBE = 10000


def splits(data):
    """The folders of training and of held-out pictures in the folder `data`. Raises UserError if
    one is missing."""
    train = os.path.join(data, "train")
    found = [os.path.join(data, name) for name in ("val", "test")]
    found = [path for path in found if os.path.isdir(path)]
    if not os.path.isdir(train) or not found:
        raise UserError(
            f"--data {data}: a report card needs {train}, on which the VAE may have been trained, "
            f"and {data}/val or {data}/test with other pictures of the same classes, each with a "
            "folder for each class; move some pictures there"
        )
    # As in probe.py, which takes val/ where both are there.
    return train, found[0]


def at_most(path, count, size):
    """The fid.Pictures of a folder: at most so many, evenly spaced."""
    available = fid.Pictures(path, None, size).count
    return fid.Pictures(path, min(count, available), size)


class Bench:
    """What all VAEs of a report card are measured on.

    network: of features, as fid.py describes them. size: of the pictures, in pixels. The numbers of
    pictures are in `settings`."""

    def __init__(self, args, network, size, device):
        self.args = args
        self.network = network
        self.device = device
        train, held_out = splits(args.data)
        self.training = at_most(train, args.train_images, size)
        self.held_out = at_most(held_out, args.num, size)
        real = at_most(train, REAL, size)
        self.originals = fid.cached_statistics(network, self.held_out, 0, args.workers)
        self.real = fid.cached_statistics(network, real, 0, args.workers)
        self.classes = self.training.set.classes
        self.settings = {
            "size": size,
            "held out": self.held_out.count,
            "real": real.count,
            "interpolated with": self.training.count,
            "probe": min(PROBE, args.train_images),
        }
        self.seconds = {}

    def benchmark(self, data, *tasks):
        """-> the Benchmark of probe.py in a folder, and probe.py's arguments for these tasks."""
        words = ["--data", data, "--pictures", "0", "--out", self.args.out]
        words += ["--train-images", str(self.settings["probe"])]
        for task in tasks:
            words += ["--task", task]
        args = probe.parse_arguments(words)
        args.workers = self.args.workers
        return read_benchmarks(args)[0], args

    @contextlib.contextmanager
    def timed(self, name):
        """The context of work whose seconds are noted under this name."""
        begin = time.time()
        yield
        self.seconds[name] = round(time.time() - begin, 1)


def measure(bench, vae, label, picture):
    """-> {measure: number} of a VAE, and {step: seconds}. What the data do not allow is left out:
    the class probe with one class, attributes of other classes than CIFAR-10's.

    label: its name in files. picture: path of a PNG of originals, reconstructions, interpolations
    and neighbours."""
    bench.seconds = {}
    values = {}
    with bench.timed("reconstruction"):
        values.update(reconstruction(bench, vae))
    with bench.timed("interpolation"):
        values.update(interpolation(bench, vae, picture))
    values.update(classes(bench, vae, label))
    if bench.classes == CLASSES:
        values.update(attributes(bench, vae, label))
    return values, bench.seconds


@torch.no_grad()
def reconstruction(bench, vae):
    """PSNR and SSIM of held-out pictures, and the distance of their reconstructions from real
    training pictures: the floor of what samples can reach."""
    totals = {}
    for name in ("psnr", "ssim"):
        totals[name] = torch.zeros((), dtype=torch.float64, device=bench.device)
    originals = bench.held_out.batches(bench.device, bench.args.workers)
    decoded = fid.reconstructions(vae, None, originals, totals)
    statistics = fid.collect(bench.network, decoded, bench.held_out.count)
    values = {name: total.item() / bench.held_out.count for name, total in totals.items()}
    values["floor"] = fid.set_distance(statistics, bench.real)
    return values


@torch.no_grad()
def interpolation(bench, vae, picture):
    """The iFID of held-out pictures, in the network's features."""
    found = fid.find_cached_latents(vae, bench.training)
    latents = fid.TrainingLatents(
        vae, bench.training, bench.device, bench.args.workers, "fp32", *found
    )
    between = fid.Interpolations(vae, bench.held_out, latents)
    statistics = fid.collect(bench.network, between.batches(), bench.held_out.count)
    between.save_picture(picture)
    return {"ifid": fid.set_distance(statistics, bench.originals)}


def classes(bench, vae, label):
    """The accuracy of a linear probe of the classes, and the Gini coefficient of the latents'
    density."""
    benchmark, args = bench.benchmark(bench.args.data, "classes")
    values = {}
    with bench.timed("class probe"):
        job = probe.latent_job(benchmark, vae, args, bench.device)
        found, _, _ = probe.probe_one(benchmark, job.features, label, None, args, bench.device)
        values["class probe"] = found["accuracy"][0]
    with bench.timed("gini"):
        points = latent_points(job.features, job.channels, args.seed)
        values["gini"] = uniformity(points, args.seed)[0]["Gini of density"][0]
    return values


def attributes(bench, vae, label):
    """The F1 of a linear probe of the attributes of CIFAR-10's classes, DCI and, with --leakage,
    how much editing one attribute moves the others."""
    folder = os.path.join(bench.args.out, "attributes")
    write_attributes(bench.args.data, folder)
    benchmark, args = bench.benchmark(folder, "attributes")
    values = {}
    with bench.timed("attribute F1"):
        job = probe.latent_job(benchmark, vae, args, bench.device)
        found, _, fitted = probe.probe_one(benchmark, job.features, label, None, args, bench.device)
        values["attribute F1"] = found["F1 macro"][0]
    with bench.timed("DCI"):
        found, _ = probe.disentangle_one(benchmark, job.features, fitted)
        for name in ("disentanglement", "completeness", "informativeness"):
            values[f"dci {name}"] = found[f"DCI {name}"][0]
    if bench.args.leakage:
        with bench.timed("leakage"):
            values["leakage"] = leakage(bench, vae, label, benchmark, job, fitted, args)
    return values


def leakage(bench, vae, label, benchmark, job, fitted, args):
    @torch.no_grad()
    def decode(latents):
        maps = latents.to(bench.device).unflatten(1, (vae.channels, vae.latent_size, -1))
        return to_uint8(vae.decode(vae.denormalize(maps))).cpu()

    found, _ = edit_attributes(
        benchmark,
        label,
        fitted.weight.cpu(),
        job.features,
        decode,
        vae.resolution,
        args,
        bench.device,
    )
    return found["edit: leakage"][0]
