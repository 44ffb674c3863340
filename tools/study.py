"""The paper's claim at a size a laptop can repeat: VAEs with and without alignment and their controls, a small SiT on each, and
what the samples, a linear probe and two judges say. A runner: it calls the stages as commands, and goes on where it was.

    python -m tools.study --data data/cifar10 --vfm-weights tf_efficientnet_lite0.safetensors     # everything
    python -m tools.study ... --only main noise controls --seeds 1                                # some questions, fewer seeds
    python -m tools.study ... --quick                                                             # question 1 in little time
    python -m tools.study --report                                                                # RESULTS.md from what is there
    python -m tools.study ... --list                                                              # print the commands only
    python -m tools.study --paper noise          # the paper's own runs, ImageNet 256x256: commands and expected numbers

--data: a folder with train/ and test/ in ImageNet's layout, small pictures. Everything goes to runs/study (--quick:
runs/study-quick), a log for each job under log/. Kill it at will; the same command goes on.
"""
import argparse
import concurrent.futures
import json
import os
import shlex
import subprocess
import sys

import numpy as np
from PIL import Image, ImageDraw
from scipy import stats

import common
from common import say
from models import UserError
from tools.correlate import correlate

NET = "--spec f4d16 --ch 32 --ch-mult 1 1 2 --num-res-blocks 1"
TRAIN = ("--resolution 32 --recon l1 --lpips 0 --gan 0 --batch-size 8 --lr-schedule cosine --warmup 100 --ema 0.99 "
         "--stats-images 5000 --save-every 2500 --sample-every 2500 --workers 1")
TEACHER = "--vfm tf_efficientnet_lite0 --vfm-stride 16"
MAPPER = f"{TEACHER} --mapper-patch 1 --mapper-width 192 --mapper-hidden 256"
SIT = ("--patch 2 --depth 6 --width 192 --heads 3 --no-flip --batch-size 64 --lr 1e-3 --ema 0.995 --preview-n 1 --preview-steps 10 "
       "--sample-every 1000000 --workers 1")
SAMPLER = "--sampler ode --steps 25 --num 1000"
SIZES = dict(full=dict(base=4400, tune=5000, points=(200, 400, 600, 800, 1000)), quick=dict(base=2000, tune=1500, points=(250, 500)))

# question: {VAE: (starts from, flags)}; `scratch` ones train for base + tune steps
QUESTIONS = dict(
    main=dict(plain=("base", "--align none"), send=("base", MAPPER)),
    noise=dict(no_noise=("base", f"{MAPPER} --no-noise")),
    depth=dict(depth0=("base", f"{MAPPER} --mapper-depth 0"), depth2=("base", f"{MAPPER} --mapper-depth 2"),
               mlp=("base", f"{MAPPER} --mapper-depth 0 --mapper-hidden 632")),
    teacher=dict(random_teacher=("base", MAPPER + " --vfm-weights {out}/random.safetensors")),
    channels=dict(plain_d8=("base_d8", "--align none"), send_d8=("base_d8", MAPPER),
                  plain_d32=("base_d32", "--align none"), send_d32=("base_d32", MAPPER)),
    scratch=dict(scratch_plain=(None, f"{NET} --align none"), scratch_send=(None, f"{NET} {MAPPER}")),
    weight={f"weight{w}": ("base", f"{MAPPER} --align-weight {w}") for w in ("0.1", "0.5", "2")},
    controls=dict(shuffled=("base", f"{MAPPER} --shuffle-targets"), base=None),
    loss=dict(vavae=("base", f"{TEACHER} --mapper-patch 1 --align vavae")),
    seeds=dict(plain_s1=("base", "--align none --seed 1"), send_s1=("base", f"{MAPPER} --seed 1"),
               plain_s2=("base", "--align none --seed 2"), send_s2=("base", f"{MAPPER} --seed 2")))
BASES = dict(base=NET, base_d8=NET.replace("d16", "d8"), base_d32=NET.replace("d16", "d32"))

# What stands in RESULTS.md: title, the VAEs of its table, the paper's finding, pairs (better, worse) that the paper expects
SECTIONS = [
    ("1. Alignment against none", ["plain", "send"], "11.40 -> 7.57 gFID (VA-VAE, SiT-B/1, 80 epochs)", [("send", "plain")]),
    ("2. Noise injection", ["no_noise", "send"], "8.42 without, 7.57 with", [("send", "no_noise")]),
    ("3. Mapper depth 0, 1, 2, and an MLP of as many parameters as depth 1", ["depth0", "send", "depth2", "mlp"],
     "9.20, 8.42, 9.47 (without noise)", [("send", "depth0"), ("send", "depth2")]),
    ("4. Vision model: none, random weights, pre-trained", ["plain", "random_teacher", "send"], "none 11.40, DINOv2 7.57",
     [("send", "random_teacher")]),
    ("5. Latent channels 8, 16, 32", ["plain_d8", "send_d8", "plain", "send", "plain_d32", "send_d32"],
     "13.85->7.02 (16), 17.43->8.25 (32), 26.27->10.99 (64)", [("send_d8", "plain_d8"), ("send_d32", "plain_d32")]),
    ("6. From scratch against tuned", ["scratch_plain", "scratch_send", "send"], "it is silent", [("scratch_send", "scratch_plain")]),
    ("7. Weight 0.1, 0.5, 1, 2", ["weight0.1", "weight0.5", "send", "weight2"], "1.0 is its choice", []),
    ("10. Controls: targets shuffled between pictures; the VAE before tuning", ["plain", "base", "shuffled", "send"],
     "it is silent", [("send", "shuffled"), ("send", "base")]),
    ("VA-VAE's loss in the same place", ["vavae", "send"], "E2E and VA-VAE are other trainings there", [("send", "vavae")]),
    ("Other seeds of the VAE's tuning", ["plain", "plain_s1", "plain_s2", "send", "send_s1", "send_s2"], "one seed",
     [("send_s1", "plain_s1"), ("send_s2", "plain_s2")])]

# The paper's ablations (SPEC: gFID of SiT-B/1 + REPA, 80 epochs, no guidance) and its system: row: (expected, VAE flags or None
# for the VAE as published, its file, SiT flags). vavae.pt, invae-*.pt and sdvae.pt are REPA-E's and LightningDiT's published files
TUNE = "--epochs 80 --batch-size 1024 --lr 3e-4"
PAPER = dict(
    system={f"{n} epochs": (want, TUNE, "vavae.pt", f"--size XL --epochs {n}") for n, want in ((80, "2.88 / 1.41"), (800, "1.75 / 1.21"))},
    depth={f"depth {d}": (want, f"{TUNE} --no-noise --mapper-depth {d}", "vavae.pt", "--size B") for d, want in
           enumerate(("9.20", "8.42", "9.47"))},
    noise={"off": ("8.42", f"{TUNE} --no-noise", "vavae.pt", "--size B"), "on": ("7.57", TUNE, "vavae.pt", "--size B")},
    vfm={"none": ("11.40", None, "vavae.pt", "--size B"),
         **{name: (want, f"{TUNE} --vfm {name}", "vavae.pt", "--size B") for name, want in (
             ("mae-l", "10.01"), ("clip-l", "9.85"), ("ijepa-h", "9.70"), ("siglip-b", "9.10"), ("dinov2-b", "7.57"), ("dinov3-b", "7.16"))}},
    channels={f"d{d} {word}": (want, flags, f"invae-f16d{d}.pt", "--size B") for d, pair in (
        (16, ("13.85", "7.02")), (32, ("17.43", "8.25")), (64, ("26.27", "10.99"))) for word, want, flags in
        (("as it is", pair[0], None), ("aligned", pair[1], TUNE))},
    init={f"{file} {word}": (want, flags, f"{file}.pt", "--size B") for file, pair in (
        ("sdvae", ("21.41", "11.86")), ("invae-f16d32", ("17.43", "8.25")), ("vavae", ("11.40", "7.57"))) for word, want, flags in
        (("as it is", pair[0], None), ("aligned", pair[1], TUNE))})

# AwA's manner: what is true of most members of a class. Columns are the ten classes in alphabetical order.
CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
ATTRIBUTES = dict(
    animal="0011111100", four_legs="0001111100", hooves="0000100100", fur="0001110100", wings="1010000000", flies="1010000000",
    wheels="1100000001", metal="1100000011", on_water="0000000010", on_roads="0100000001", carries_people="1100000111",
    larger_than_a_man="1100100111", kept_as_a_pet="0001010000", lays_eggs="0010001000")


def parse_arguments(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--data", default="data/cifar10")
    p.add_argument("--vfm-weights", help="local file of tf_efficientnet_lite0 (default: timm's hub)")
    p.add_argument("--only", nargs="+", choices=list(QUESTIONS), default=list(QUESTIONS))
    p.add_argument("--seeds", type=int, default=3, help="SiT seeds on each VAE")
    p.add_argument("--repa", action="store_true", help="also a SiT with the REPA loss on `plain` and `send`")
    p.add_argument("--jobs", type=int, default=common.cores(), help="side by side")
    p.add_argument("--quick", action="store_true", help="one seed of `main`, shorter")
    p.add_argument("--list", action="store_true", help="print the commands, run nothing")
    p.add_argument("--paper", choices=list(PAPER), help="print the commands of one of the paper's tables")
    p.add_argument("--report", action="store_true", help="write RESULTS.md and docs/study.png from what is there")
    return p.parse_args(argv)


def paper_commands(name):
    """-> [(row, expected gFID, [commands])] on 8 GPUs."""
    rows = []
    for row, (expected, flags, file, sit) in PAPER[name].items():
        stem = f"runs/paper/{name}-{row.replace(' ', '-')}"
        vae, commands = file, []
        if flags is not None:
            vae = f"{stem}-vae"
            commands.append(f"torchrun --nproc_per_node=8 train_vae.py --init {file} {flags} --out {vae}")
        commands.append(f"torchrun --nproc_per_node=8 train_sit.py --vae {vae} {sit} --out {stem}-sit")
        for suffix, guidance in (("", "--cfg 1"), ("-guided", "--cfg 2.5"))[:1 + (name == "system")]:
            out = f"{stem}{suffix}.npz"
            commands += [f"torchrun --nproc_per_node=8 sample.py --sit {stem}-sit --num-images 50000 {guidance} --out {out}",
                         f"python fid.py {out} --ref VIRTUAL_imagenet256_labeled.npz"]
        rows.append((row, expected, commands))
    return rows


# ----------------------------------------------------------------------------------------------------------------------
# Jobs: name -> (names of jobs to wait for, [(command, file that shows it is done)])

def plan(args, out, size):
    teacher = f" --vfm-weights {args.vfm_weights}" if args.vfm_weights else ""
    judge = f"{TEACHER}{teacher} --data {args.data} --classifier {out}/classifier.pt"
    data = f"--data {args.data}/train --val {args.data}/test"
    jobs = {"classifier": ([], [(f"-m tools.judge classifier --data {args.data} --out {out}/classifier.pt", f"{out}/classifier.pt")])}

    def add_vae(name, init, flags, steps, rate):
        after, start = ([f"vae {init}"], f"--init {out}/vae_{init} ") if init else ([], "")
        if "{out}" in flags:
            jobs["random teacher"] = [], [(f"-m tools.study random {out}", f"{out}/random.safetensors")]
            after.append("random teacher")
        elif "--vfm " in flags:
            flags += teacher
        command = f"train_vae.py {data} {TRAIN} {flags.format(out=out)} {start}--steps {steps} --lr {rate} --out {out}/vae_{name}"
        jobs[f"vae {name}"] = after, [(command, f"{out}/done/vae_{name}")]

    for name in (q for q in QUESTIONS if q in args.only):
        for vae, how in QUESTIONS[name].items():
            if how is None:
                continue
            init, flags = how
            if init and f"vae {init}" not in jobs:
                add_vae(init, None, f"{BASES[init]} --align none", size["base"], 2e-3)
            add_vae(vae, init, flags, size["tune"] + (0 if init else size["base"]), 1e-3 if init else 2e-3)

    measured = [v for q in args.only for v in QUESTIONS[q]]
    for vae in measured:
        names = f"--vae {out}/vae_{vae} --train-images 10000 --pictures 0 --workers 1"
        jobs[f"judge {vae}"] = [f"vae {vae}", "classifier"], [
            (f"-m tools.judge vae {out}/vae_{vae} {judge} --out {out}/judged/{vae}.json", f"{out}/judged/{vae}.json"),
            (f"probe.py {names} --data {args.data} --task classes --task uniformity --task mixture --out {out}/probe_{vae}",
             f"{out}/probe_{vae}/result.json"),
            (f"probe.py {names} --data {out}/attributes --task attributes --out {out}/probe_{vae}_attributes",
             f"{out}/probe_{vae}_attributes/result.json")]
    for seed in range(args.seeds):
        for vae in measured:
            add_chain(jobs, args, out, size, judge, vae, seed, "", "--repa 0")
            if args.repa and vae in ("plain", "send"):
                add_chain(jobs, args, out, size, judge, vae, seed, "-repa", f"--repa 0.5 --repa-block 4 {TEACHER}{teacher}")
    return jobs


def add_chain(jobs, args, out, size, judge, vae, seed, kind, flags):
    """A SiT that is stopped at each point to draw a set of samples, which is judged."""
    run, steps = f"{out}/sit_{vae}{kind}_{seed}", []
    sets = [(n, "", "--cfg 1") for n in size["points"]] + [(size["points"][-1], "-guided", "--cfg 1.5 --interval 0 1")]
    for n, suffix, guidance in sets:
        stem = f"{out}/samples/{vae}{kind}_{seed}_{n}{suffix}"
        if not suffix:                                      # the guided set is of the same SiT as the last one without
            steps.append((f"train_sit.py --data {args.data}/train --vae {out}/vae_{vae} {SIT} {flags} --seed {seed} --steps {n} "
                          f"--out {run}", f"{stem}.npz"))
        steps += [(f"sample.py --sit {run} {SAMPLER} {guidance} --seed {seed} --out {stem}.npz", f"{stem}.npz"),
                  (f"-m tools.judge samples {stem}.npz {judge} --out {stem}.json", f"{stem}.json")]
    jobs[f"sit {vae}{kind} {seed}"] = [f"vae {vae}", "classifier"], steps


def run_job(name, commands, earlier, threads, out):
    """Runs a job's commands once the jobs it waits for have ended well -> whether it did."""
    if not all(future.result() for future in earlier):
        return False
    for command, product in commands:
        if os.path.exists(product):
            continue
        with open(f"{out}/log/{name.replace(' ', '_')}.txt", "a") as log:
            log.write(f"$ python {command}\n")
            log.flush()
            code = subprocess.run([sys.executable, *shlex.split(command)], stdout=log, stderr=log,
                                  env=dict(os.environ, OMP_NUM_THREADS=str(threads))).returncode
        if code:
            say(f"failed    {name}: see {log.name}")
            return False
        if "/done/" in product:
            common.write_json(product, command)
    say(f"done      {name}")
    return True


def write_attributes(data, out):
    """The data set in AwA2's form, with the table above, for probe.py."""
    folder = f"{out}/attributes"
    found = sorted(os.listdir(f"{data}/train"))
    if found != CLASSES:
        raise UserError(f"{data}/train: the attribute table is of CIFAR-10's classes, these are {', '.join(found[:5])} ...")
    os.makedirs(f"{folder}/JPEGImages", exist_ok=True)
    for name in CLASSES:
        if not os.path.islink(f"{folder}/JPEGImages/{name}"):
            os.symlink(os.path.abspath(f"{data}/train/{name}"), f"{folder}/JPEGImages/{name}")
    lines = dict(classes=[f"{i + 1}\t{c}" for i, c in enumerate(CLASSES)], predicates=[f"{i + 1}\t{a}" for i, a in enumerate(ATTRIBUTES)])
    lines["predicate-matrix-binary"] = [" ".join(row) for row in zip(*ATTRIBUTES.values())]
    for name, text in lines.items():
        with common.writing(f"{folder}/{name}.txt") as file:
            file.write(("\n".join(text) + "\n").encode())


def write_random_teacher(out):
    import timm
    import torch
    from safetensors.torch import save_file
    torch.manual_seed(0)
    with common.writing(f"{out}/random.safetensors") as file:
        save_file(timm.create_model("tf_efficientnet_lite0").state_dict(), file.name)


# ----------------------------------------------------------------------------------------------------------------------
# RESULTS.md

def read(path):
    return json.load(open(path)) if os.path.exists(path) else None


def interval(values):
    """Values of several seeds -> 'mean ± half a 95% interval (n)'."""
    if not len(values):
        return "-"
    half = stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / len(values) ** 0.5 if len(values) > 1 else None
    return f"{np.mean(values):.3g}" + (f" ± {half:.2g}" if half else "") + f" ({len(values)})"


class Results:
    def __init__(self, out, points):
        self.out, self.points = out, points

    def samples(self, vae, point, key="classifier", suffix=""):
        """One value for each SiT seed whose set was drawn at this step."""
        found = [read(f"{self.out}/samples/{vae}_{seed}_{point}{suffix}.json") for seed in range(20)]
        return [f[key] for f in found if f and f["settings"]["sit_step"] == point]

    def last(self, vae, key="classifier", suffix=""):
        return self.samples(vae, self.points[-1], key, suffix)

    def vae(self, vae, key):
        return (read(f"{self.out}/judged/{vae}.json") or {}).get(key)

    def probe(self, vae, name, kind=""):
        """[value, low, high] or [value] of the probe's measure."""
        found = read(f"{self.out}/probe_{vae}{kind}/result.json")
        rows = list(found["results"].values())[0].get(name, {}) if found else {}
        return next((v for k, v in rows.items() if k.endswith(f"vae_{vae}")), None)

    def speed(self, vae):
        path = f"{self.out}/vae_{vae}/metrics.jsonl"
        rates = [json.loads(line).get("images_per_s") for line in open(path)] if os.path.exists(path) else []
        rates = [r for r in rates if r]
        return np.median(rates) if rates else None


def cell(value, form=".3f"):
    value = value[0] if isinstance(value, list) and value else value
    return "-" if value is None else format(value, form)


def table(results, vaes):
    yield ("| VAE | distance, classifier | distance, target's own | guided, classifier | class probe | attribute F1 | PSNR | floor |")
    yield "|---|---|---|---|---|---|---|---|"
    for v in vaes:
        yield (f"| {v} | {interval(results.last(v))} | {interval(results.last(v, 'target'))} | "
               f"{interval(results.last(v, suffix='-guided'))} | {cell(results.probe(v, 'accuracy'), '.1%')} | "
               f"{cell(results.probe(v, 'F1 macro', '_attributes'))} | {cell(results.vae(v, 'psnr'), '.2f')} | "
               f"{cell(results.vae(v, 'reconstruction_classifier'), '.3g')} |")


def verdict(results, better, worse):
    """A sentence on whether `better` has the smaller distance, by Welch's interval over SiT seeds."""
    a, b = results.last(better), results.last(worse)
    if not a or not b:
        return f"- {better} against {worse}: not measured yet."
    text = f"- {better} {np.mean(a):.3g}, {worse} {np.mean(b):.3g}: "
    if min(len(a), len(b)) < 2:
        return text + f"the direction {'agrees' if np.mean(a) < np.mean(b) else 'does not agree'}, but with one seed of the SiT."
    low, high = stats.ttest_ind(b, a, equal_var=False).confidence_interval(0.95)
    word = "agrees" if low > 0 else "does not agree" if high < 0 else "is open: the interval holds 0"
    return text + f"difference {np.mean(b) - np.mean(a):.3g} [{low:.3g}, {high:.3g}]; the direction {word}."


def speed_up(results):
    """Steps at which `send` reaches the last value of `plain`, between points on a straight line."""
    points = [(n, np.mean(results.samples("send", n))) for n in results.points if results.samples("send", n)]
    goal = results.last("plain")
    for (n0, d0), (n1, d1) in zip(points, points[1:]):
        if goal and d1 <= np.mean(goal) < d0:
            at = n0 + (n1 - n0) * (d0 - np.mean(goal)) / (d0 - d1)
            return f"`send` reaches `plain`'s distance of step {results.points[-1]} at step {at:.0f}: {results.points[-1] / at:.2f} times faster."
    return "No point of `send` brackets `plain`'s last distance: no speed-up can be given."


def report(args, out, size, path):
    results = Results(out, size["points"])
    known = [v for q in QUESTIONS.values() for v in q]
    done = [v for v in known if results.last(v)]
    lines = ["# Results of the small-scale study", "", "Written by `python -m tools.study" + (" --quick" if args.quick else "")
             + " --report`; every number is read from the runs.", "",
             f"Data: {args.data}; VFM tf_efficientnet_lite0, its stride-16 map; VAE f4, {size['base']} steps of 8 pictures from scratch, then "
             f"{size['tune']} with or without alignment; SiT of depth 6, width 192, patch 2, {size['points'][-1]} steps of 64; 1,000 samples, 25 Euler "
             "steps. Distance: Frechet, in 128 features of a classifier trained on the same data (no VAE saw it), and in the target's pooled "
             "tokens; smaller is better. ± is half a 95% t-interval over SiT seeds (their number). Floor: distance of 2,000 reconstructions.", "",
             f"Sample distances exist for {len(done)} of {len(known)} VAEs: {', '.join(done) or 'none'}.", ""]
    for title, vaes, paper, pairs in SECTIONS:
        lines += [f"## {title}", ""]
        if not any(results.last(v) for v in vaes if v not in ("plain", "send") or title.startswith("1.")):
            lines += [f"Not measured yet. Paper: {paper}.", ""]
            continue
        lines += [*table(results, vaes), "", f"Paper: {paper}.", "", *(verdict(results, *pair) for pair in pairs), ""]
        if title.startswith("1."):
            lines += ["| steps | " + " | ".join(map(str, size["points"])) + " |", "|---" * (len(size["points"]) + 1) + "|"]
            for v in vaes:
                for key in ("classifier", "target"):
                    row = " | ".join(interval(results.samples(v, n, key)) for n in size["points"])
                    lines.append(f"| {v}, {key} | {row} |")
            lines += ["", speed_up(results), ""]
    lines += ["## 8. Which measure predicts the distance?", ""]
    rows = {v: dict(zip(("class probe", "attribute F1", "PSNR", "Gini of density", "mixture of 8", "rank of channels", "neighbours"),
                        (results.probe(v, "accuracy"), results.probe(v, "F1 macro", "_attributes"), results.vae(v, "psnr"),
                         results.probe(v, "Gini of density"), results.probe(v, "mixture of 8"), results.vae(v, "rank_channels"),
                         results.vae(v, "neighbour_correlation")))) for v in done}
    rows = {v: {k: x[0] if isinstance(x, list) else x for k, x in r.items()} for v, r in rows.items() if None not in r.values()}
    if len(rows) < 4:
        lines += [f"Not measured yet: {len(rows)} VAEs have all measures.", ""]
    else:
        distances = [float(np.mean(results.last(v))) for v in rows]
        lines += [f"Over {len(rows)} VAEs ({', '.join(rows)}), 95% intervals over resampled VAEs:", "", "| measure | Pearson | Spearman |",
                  "|---|---|---|"]
        for k in next(iter(rows.values())):
            found = correlate([r[k] for r in rows.values()], distances, 0)
            lines.append(f"| {k} | " + " | ".join(f"{v:.2f} [{a:.2f}, {b:.2f}]" for v, a, b in found.values()) + " |")
        lines.append("")
    lines += ["## 9. What it costs, and what the latents are like", "", "| VAE | PSNR | SSIM | pictures/s in training | effective rank, channels "
              "| flat | neighbours' correlation | widest/narrowest channel | Gini of density | mixture of 8 |", "|---" * 10 + "|"]
    for v in known:
        if results.vae(v, "psnr"):
            shape = [results.vae(v, k) for k in ("rank_channels", "rank_flat", "neighbour_correlation", "channel_spread")]
            lines.append(f"| {v} | {cell(results.vae(v, 'psnr'), '.2f')} | {cell(results.vae(v, 'ssim'))} | {cell(results.speed(v), '.1f')} | "
                         + " | ".join(cell(x, ".3g") for x in shape) + f" | {cell(results.probe(v, 'Gini of density'))} | "
                         f"{cell(results.probe(v, 'mixture of 8'))} |")
    lines += ["", "## The attribute table", "", "AwA's manner: true of most members of a class, whether or not a picture shows it.", "",
              "| attribute | classes |", "|---|---|"]
    lines += [f"| {a.replace('_', ' ')} | {', '.join(c for c, bit in zip(CLASSES, bits) if bit == '1')} |" for a, bits in ATTRIBUTES.items()]
    with common.writing(path) as file:
        file.write(("\n".join(lines) + "\n").encode())
    curves = {v: [(n, results.samples(v, n)) for n in size["points"] if results.samples(v, n)] for v in ("plain", "send")}
    if all(curves.values()):
        draw_curves("docs/study.png" if not args.quick else f"{out}/study.png", curves)
    say(f"written   {path}")


def draw_curves(path, curves):
    """Mean distance over SiT steps, a line for each VAE, a dot for each seed."""
    canvas = Image.new("RGB", (720, 400), "white")
    pen, colours = ImageDraw.Draw(canvas), ("firebrick", "navy")
    steps = [n for points in curves.values() for n, _ in points]
    top = 1.05 * max(d for points in curves.values() for _, ds in points for d in ds)

    def at(n, d):
        return 70 + 600 * n / max(steps), 350 - 310 * d / top
    for k in range(5):
        y = at(0, top * k / 4)[1]
        pen.line((70, y, 670, y), "lightgrey")
        pen.text((20, y - 6), f"{top * k / 4:.3g}", "black")
    for n in sorted(set(steps)):
        pen.text((at(n, 0)[0] - 10, 356), str(n), "black")
    pen.text((300, 376), "SiT training steps", "black")
    pen.text((70, 12), "Frechet distance of samples, in an independent classifier's features (smaller is better)", "black")
    for i, (colour, (name, points)) in enumerate(zip(colours, curves.items())):
        pen.line([at(n, np.mean(ds)) for n, ds in points], colour, 3)
        for n, ds in points:
            for d in ds:
                x, y = at(n, d)
                pen.ellipse((x - 3, y - 3, x + 3, y + 3), outline=colour)
        pen.text((520, 50 + 18 * i), dict(send="Send-VAE", plain="the same VAE, no alignment")[name], colour)
    with common.writing(path) as file:
        canvas.save(file, "PNG")


def main():
    if sys.argv[1:2] == ["random"]:
        return write_random_teacher(sys.argv[2])
    args = parse_arguments()
    if args.paper:
        for row, expected, commands in paper_commands(args.paper):
            say(f"# {args.paper}, {row}: the paper's gFID is {expected}. GPU-hours: no GPU has been measured yet.\n" + "\n".join(commands))
        return
    size = SIZES["quick" if args.quick else "full"]
    out, results = ("runs/study-quick", "runs/study-quick/RESULTS.md") if args.quick else ("runs/study", "RESULTS.md")
    if args.quick:
        args.only, args.seeds = ["main"], 1
    if args.report:
        return report(args, out, size, results)
    jobs = plan(args, out, size)
    if args.list:
        for name, (_, commands) in jobs.items():
            say(f"# {name}\n" + "\n".join(f"python {command}" for command, _ in commands))
        return
    os.makedirs(f"{out}/log", exist_ok=True)
    common.lock(out)
    write_attributes(args.data, out)
    threads, futures = max(1, common.cores() // args.jobs), {}
    with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
        for name, (after, commands) in jobs.items():        # in an order in which nobody waits for a later one
            futures[name] = pool.submit(run_job, name, commands, [futures[a] for a in after], threads, out)
    report(args, out, size, results)
    failed = [name for name, future in futures.items() if not future.result()]
    if failed:
        raise UserError(f"{len(failed)} jobs failed or wait for one that did, the first is {failed[0]}; see {out}/log")


if __name__ == "__main__":
    common.run(main)
