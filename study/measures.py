"""The measures of a VAE that need no diffusion model, taken as the study takes them, for
study/card.py: reconstruction, probes, disentanglement, evenness, interpolation, leakage."""

import contextlib
import os
import time

import torch

from common.files import UserError
from common.processes import say
import fid
import probe
from probing.benchmarks import read_benchmarks
from probing.latent_shape import latent_points, uniformity
from study.attributes import CLASSES, write_attributes

# How many pictures the study takes at most.
HELD_OUT = 2000
REAL = 10000
PROBE = 10000
# A probe is tested on so many times the other held-out pictures, at most: in the study on all.
PROBE_TEST = 5


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
    pictures = fid.Pictures(path, None, size)
    if pictures.count > count:
        pictures = fid.Pictures(path, count, size)
    return pictures


class Bench:
    """What all VAEs of a report card are measured on.

    training, held_out, real: fid.Pictures; the last are training pictures that reconstructions are
    compared with. of_classes, of_attributes: a Benchmark of probe.py and probe.py's arguments; None
    for pictures of one class, or of other classes than CIFAR-10's. settings: numbers of pictures,
    and the like. network, originals, real_statistics: see compare_in.

    Raises UserError for data that cannot be measured."""

    def __init__(self, args, size, device):
        self.args = args
        self.device = device
        train, held_out = splits(args.data)
        self.training = at_most(train, args.train_images, size)
        self.held_out = at_most(held_out, args.num, size)
        self.real = at_most(train, REAL, size)
        self.classes = self.training.set.classes
        self.settings = {
            "size": size,
            "held out": self.held_out.count,
            "real": self.real.count,
            "interpolated with": self.training.count,
            "probe": min(PROBE, args.train_images),
        }
        self.of_classes = None
        self.of_attributes = None
        if len(self.classes) > 1:
            self.of_classes = self.benchmark(args.data, "classes")
        if self.classes == CLASSES:
            folder = os.path.join(args.out, "attributes")
            write_attributes(args.data, folder)
            self.of_attributes = self.benchmark(folder, "attributes")
        self.seconds = {}

    def benchmark(self, data, task):
        """-> the Benchmark of probe.py in a folder, and probe.py's arguments for this task."""
        words = ["--data", data, "--task", task, "--pictures", "0", "--out", self.args.out]
        words += ["--train-images", str(self.settings["probe"])]
        words += ["--test-images", str(PROBE_TEST * self.args.num)]
        args = probe.parse_arguments(words)
        args.workers = self.args.workers
        try:
            return read_benchmarks(args)[0], args
        except UserError as error:
            raise UserError(
                f"{error}; for a report card without a class probe, put all pictures into one "
                "class's folder"
            ) from None

    def compare_in(self, network):
        """Distances are of this network's features, which are a network as fid.py describes it."""
        self.network = network
        count = self.held_out.count
        if count <= network.dims["pool"]:
            say(
                f"warning: {count} held-out pictures for {network.dims['pool']} features: "
                "distances are biased upwards, and only those of this card can be compared"
            )
        workers = self.args.workers
        self.originals = fid.cached_statistics(network, self.held_out, 0, workers)
        self.real_statistics = fid.cached_statistics(network, self.real, 0, workers)

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
    with bench.timed("reconstruction"):
        values = reconstruction(bench, vae)
    with bench.timed("interpolation"):
        values["ifid"], latents = interpolation(bench, vae, picture)
    if bench.of_classes is not None:
        with bench.timed("class probe"):
            values["class probe"], latents = class_probe(bench, vae, label)
    with bench.timed("gini"):
        points = latent_points(latents, vae.channels, 0)
        values["gini"] = uniformity(points, 0)[0]["Gini of density"][0]
    if bench.of_attributes is not None:
        values.update(attributes(bench, vae, label))
    return values, bench.seconds


@torch.no_grad()
def reconstruction(bench, vae):
    """PSNR and SSIM of held-out pictures; the distance of their reconstructions from them (rFID),
    and from training pictures, which is the floor of what samples can reach."""
    totals = {}
    for name in ("psnr", "ssim"):
        totals[name] = torch.zeros((), dtype=torch.float64, device=bench.device)
    originals = bench.held_out.batches(bench.device, bench.args.workers)
    decoded = fid.reconstructions(vae, None, originals, totals)
    statistics = fid.collect(bench.network, decoded, bench.held_out.count)
    values = {name: total.item() / bench.held_out.count for name, total in totals.items()}
    values["rfid"] = fid.set_distance(statistics, bench.originals)
    values["floor"] = fid.set_distance(statistics, bench.real_statistics)
    return values


@torch.no_grad()
def interpolation(bench, vae, picture):
    """The iFID of held-out pictures, in the network's features, and their latents, normalised and
    flattened, (n,D)."""
    found = fid.find_cached_latents(vae, bench.training)
    latents = fid.TrainingLatents(
        vae, bench.training, bench.device, bench.args.workers, "fp32", *found
    )
    between = fid.Interpolations(vae, bench.held_out, latents)
    statistics = fid.collect(bench.network, between.batches(), bench.held_out.count)
    between.save_picture(picture)
    return fid.set_distance(statistics, bench.originals), between.rows.cpu().numpy()


def class_probe(bench, vae, label):
    """The accuracy of a linear probe of the classes, and the latents of all its pictures, (N,D)."""
    benchmark, args = bench.of_classes
    job = probe.latent_job(benchmark, vae, args, bench.device)
    found, _, _ = probe.probe_one(benchmark, job.features, label, None, args, bench.device)
    return found["accuracy"][0], job.features


def attributes(bench, vae, label):
    """The F1 of a linear probe of the attributes of CIFAR-10's classes, DCI and, with --leakage,
    how much editing one attribute moves the others."""
    benchmark, args = bench.of_attributes
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
            found, _ = probe.edit_one(
                benchmark, label, vae, job.features, fitted, args, bench.device
            )
            values["leakage"] = found["edit: leakage"][0]
    return values
