"""What the study's runs left in their folder, read for the report."""

import json
import os

import numpy as np

from study.text import pooled_spread

MAX_SIT_SEEDS = 20

# Measures of a VAE that probe.py took: name in the report -> (its name in probe.py's result, suffix
# of the result's folder).
PROBE_MEASURES = {
    "class probe": ("accuracy", ""),
    "attribute F1": ("F1 macro", "_attributes"),
    "Gini of density": ("Gini of density", ""),
    "mixture of 8": ("mixture of 8", ""),
}
# Those of its tasks disentanglement and editing.
EDITING_MEASURES = {
    "DCI disentanglement": ("DCI disentanglement", "_editing"),
    "DCI completeness": ("DCI completeness", "_editing"),
    "DCI informativeness": ("DCI informativeness", "_editing"),
    "SAP": ("SAP", "_editing"),
    "MIG": ("MIG", "_editing"),
    "own change": ("edit: own change", "_editing"),
    "leakage": ("edit: leakage", "_editing"),
}
# Measures of a VAE that study/judge.py took: name in the report -> its name in the judge's result.
JUDGE_MEASURES = {
    "PSNR": "psnr",
    "effective rank of channels": "rank_channels",
    "effective rank of latents": "rank_flat",
    "neighbour correlation": "neighbour_correlation",
    "largest / smallest channel std": "channel_spread",
}
# Those of its iFID.
IFID_MEASURES = {"iFID": "ifid", "rFID": "rfid"}
LATENT_MEASURES = (*PROBE_MEASURES, *JUDGE_MEASURES)
MEASURES = (*LATENT_MEASURES, *IFID_MEASURES, *EDITING_MEASURES)

# What an earlier training of the same recipe found.
RECORDED = os.path.join(os.path.dirname(__file__), "recorded.json")


def read_json(path):
    """The value in a JSON file, or None if there is no such file."""
    if not os.path.exists(path):
        return None
    with open(path) as file:
        return json.load(file)


def read_recorded(size):
    """The content of RECORDED, or None if a study of this Size of study/run.py has another
    recipe."""
    recorded = read_json(RECORDED)
    same = (
        recorded["base_steps"] == size.base_steps
        and recorded["tune_steps"] == size.tune_steps
        and recorded["sit_points"] == list(size.sit_points)
    )
    return recorded if same else None


class Results:
    """Reads the results under the folder `out`.

    sit_points: the SiT steps at which sets of samples were drawn; compare_step: the one of them
    at which all VAEs are compared. recorded: what read_recorded returned. A VAE is given by its
    name in study/run.py; <VAE>-repa stands for the SiTs that were trained on it with the REPA loss.
    """

    def __init__(self, out, sit_points, compare_step, recorded=None):
        self.out = out
        self.recorded = recorded
        self.sit_points = sit_points
        self.compare_step = compare_step
        self.last_step = sit_points[-1]

    # ---- sets of samples -------------------------------------------------------------------------

    def by_sit_seed(self, vae, step=None, key="classifier", suffix=""):
        """{SiT seed: value} over the sets of samples that were drawn at this SiT step.

        step: default compare_step. key: "classifier" or "target" (Frechet distances in the
        features of the two networks) or "told" (share of samples that the classifier assigns to
        their class). suffix: "" for the plain set, "-guided" or "-again".
        """
        if step is None:
            step = self.compare_step
        values = {}
        for seed in range(MAX_SIT_SEEDS):
            judged = read_json(f"{self.out}/samples/{vae}_{seed}_{step}{suffix}.json")
            # A set that was drawn from a SiT of another step does not count.
            if judged is not None and judged["settings"]["sit_step"] == step:
                values[seed] = judged[key]
        return values

    def values(self, vae, step=None, key="classifier", suffix=""):
        """The values of by_sit_seed as a list."""
        return list(self.by_sit_seed(vae, step, key, suffix).values())

    def mean_distance(self, vae, step=None):
        """The mean of `values`, or None if there are none."""
        values = self.values(vae, step)
        return float(np.mean(values)) if values else None

    def over_vae_seeds(self, vae, sit_seeds=None, step=None, variant="", suffix=""):
        """One distance for each seed of the VAE: the mean over the SiTs with these seeds (default:
        over all of its SiTs). Seeds of the VAE that lack one of them are left out.

        variant: what the names of the SiTs have after the VAE's.
        """
        distances = []
        for name in (vae, f"{vae}_s1", f"{vae}_s2"):
            by_seed = self.by_sit_seed(f"{name}{variant}", step, suffix=suffix)
            wanted = by_seed if sit_seeds is None else sit_seeds
            if by_seed and set(wanted) <= set(by_seed):
                distances.append(float(np.mean([by_seed[seed] for seed in wanted])))
        return distances

    def vae_seed_spread(self, sit_seeds, step=None):
        """How much the mean distance over the SiTs with these seeds changes with the VAE's seed:
        (standard deviation, degrees of freedom).

        It contains the spread over SiT seeds and draws. It is pooled over `plain` and `send`; None
        if neither has other VAE seeds.
        """
        groups = [self.over_vae_seeds(vae, sit_seeds, step) for vae in ("plain", "send")]
        groups = [group for group in groups if len(group) > 1]
        if not groups:
            return None
        standard_deviation, degrees = pooled_spread(groups)
        return float(standard_deviation), degrees

    # ---- measures of a VAE -----------------------------------------------------------------------

    def judged(self, vae, key):
        """A number from study/judge.py, or None."""
        judged = read_json(f"{self.out}/judged/{vae}.json")
        if judged is None:
            return None
        return judged.get(key)

    def probe(self, vae, measure):
        """A number from probe.py: [value, low, high], [value] where there is no interval, or
        None."""
        name, suffix = {**PROBE_MEASURES, **EDITING_MEASURES}[measure]
        result = read_json(f"{self.out}/probe_{vae}{suffix}/result.json")
        if result is None:
            return None
        # A result has one benchmark, which may also hold values of pixels and of the majority.
        benchmark = next(iter(result["results"].values()))
        for label, value in benchmark.get(name, {}).items():
            if label.endswith(f"vae_{vae}"):
                return value
        return None

    def weights_hash(self, vae):
        """The hash of the VAE's weights that probe.py measured, or None."""
        result = read_json(f"{self.out}/probe_{vae}/result.json")
        if result is None:
            return None
        return next(iter(result["vaes"].values()))["hash"]

    def class_probe_without_vae(self):
        """{label: accuracy, 0..1} of what probe.py measures beside the VAE, such as a probe of
        pixels."""
        result = read_json(f"{self.out}/probe_plain/result.json")
        if result is None:
            return {}
        accuracies = next(iter(result["results"].values()))["accuracy"]
        return {label: value[0] for label, value in accuracies.items() if "vae_" not in label}

    def measures(self, vae):
        """{measure of MEASURES: number or None}; none of them needs a SiT."""
        numbers = {}
        for measure in (*PROBE_MEASURES, *EDITING_MEASURES):
            value = self.probe(vae, measure)
            numbers[measure] = None if value is None else value[0]
        for measure, key in JUDGE_MEASURES.items():
            numbers[measure] = self.judged(vae, key)
        for measure, key in IFID_MEASURES.items():
            numbers[measure] = self.judged(f"{vae}-ifid", key)
        return {measure: numbers[measure] for measure in MEASURES}

    def fit(self, vae, suffix):
        """What probe.py recorded about its measures of a VAE in the result of this suffix, or
        None."""
        result = read_json(f"{self.out}/probe_{vae}{suffix}/result.json")
        if result is None:
            return None
        for label, about in result["fits"].items():
            if label.endswith(f"vae_{vae}"):
                return about
        return None

    def probe_pictures(self, vae, suffix):
        """How many pictures probe.py encoded for the result of this suffix."""
        result = read_json(f"{self.out}/probe_{vae}{suffix}/result.json")
        return sum(next(iter(result["benchmarks"].values()))["pictures"])

    def pictures_per_second(self, vae):
        """Training speed: the 90th percentile of a run's log, which other work disturbs least, or
        None."""
        rates = [line.get("images_per_s") for line in self.training_log(vae)]
        rates = [rate for rate in rates if rate]
        if not rates:
            return None
        return np.quantile(rates, 0.9)

    def vae_steps(self, vae):
        """The number of steps that a VAE was trained for, or None."""
        config = read_json(f"{self.out}/vae_{vae}/config.json")
        if config is None:
            return None
        return config["arguments"]["steps"]

    def validation_psnr(self, vae):
        """The last PSNR (dB) on held-out pictures that a VAE's training logged, or None."""
        last = None
        for line in self.training_log(vae):
            last = line.get("val_psnr", last)
        return last

    def training_log(self, vae):
        """The lines of a VAE's metrics.jsonl as dicts; none if there is no such file."""
        path = f"{self.out}/vae_{vae}/metrics.jsonl"
        if not os.path.exists(path):
            return []
        with open(path) as file:
            return [json.loads(line) for line in file]

    def kind(self, vae):
        """How a VAE was trained: "none" (no alignment), "control" (aligned to features that carry
        no meaning) or "aligned"."""
        config = read_json(f"{self.out}/vae_{vae}/config.json")
        if config is None or config["arguments"]["align"] == "none":
            return "none"
        arguments = config["arguments"]
        weights = os.path.basename(arguments.get("vfm_weights") or "")
        if arguments.get("shuffle_targets") or "random" in weights:
            return "control"
        return "aligned"
