"""The paper's claim at a size that a laptop can repeat: VAEs with and without alignment and their
controls, a small SiT on each, and their judgement by a linear probe and by Frechet distances in
two networks' features.

    python -m study.run --data data/cifar10 --vfm-weights WEIGHTS.safetensors  # everything
    python -m study.run ... --only main noise controls --seeds 1    # some questions, fewer seeds
    python -m study.run ... --quick                                 # the first question, quickly
    python -m study.run ... --list                                  # print the commands only
    python -m study.run --report        # RESULTS.md and its figures from the runs that exist
    python -m study.run --paper noise   # the paper's own runs: commands, numbers, GPU-hours

--data is a folder with train/ and test/ in ImageNet's layout, holding small pictures (CIFAR-10).
The study calls the stages as commands and writes everything to runs/study (--quick:
runs/study-quick), with a log of each job under log/. It may be stopped at any time: rerun the
same command to resume it.
"""

import argparse
import concurrent.futures
import os
import shlex
import subprocess
import sys
from typing import NamedTuple

from common.files import UserError, writing
from common.flags import parse_flags
from common.processes import available_cores, run_main, say
from common.runs import lock
from study import figures, paper, report
from study.attributes import write_attributes

# --------------------------------------------------------------------------------------------------
# What is trained

NETWORK = "--spec f4d16 --ch 32 --ch-mult 1 1 2 --num-res-blocks 1"
VAE_TRAINING = (
    "--resolution 32 --recon l1 --lpips 0 --gan 0 --batch-size 8 --lr-schedule cosine --warmup 100 "
    "--ema 0.99 --stats-images 5000 --save-every 2500 --sample-every 2500 --workers 1 "
    # The defaults when RESULTS.md was measured.
    "--no-ema-warmup --clip-together --mapper-init torch"
)
TEACHER = "--vfm tf_efficientnet_lite0 --vfm-stride 16"
MAPPER = f"{TEACHER} --mapper-patch 1 --mapper-width 192 --mapper-hidden 256"
SIT_TRAINING = (
    "--patch 2 --depth 6 --width 192 --heads 3 --no-flip --batch-size 64 --lr 1e-3 --ema 0.995 "
    "--preview-n 1 --preview-steps 10 --sample-every 1000000 --workers 1 --no-ema-warmup"
)
SAMPLER = "--sampler ode --steps 25 --num 1000"

SCRATCH_LEARNING_RATE = 2e-3
TUNING_LEARNING_RATE = 1e-3


class Size(NamedTuple):
    """How long the study trains."""

    # VAE steps from scratch, and of the tuning that follows.
    base_steps: int
    tune_steps: int
    # SiT steps at which `plain` and `send` are judged; all other VAEs at compare_step and the last.
    sit_points: tuple
    compare_step: int
    # Flag of study.judge ifid, with a space before it: among how many training pictures it looks
    # for neighbours.
    neighbours: str = ""


SIZES = {
    "full": Size(4400, 5000, (250, 500, 750, 1000, 2000), 750),
    "quick": Size(3000, 3500, (250, 500, 750), 750, " --neighbours 10000"),
}


class Recipe(NamedTuple):
    """How a VAE is trained."""

    # The VAE that it is tuned from. None: it is trained from scratch, for as many steps as both
    # together.
    init: str | None
    # Flags of train_vae.py, besides those that all VAEs share.
    flags: str


def tuned(flags, init="base"):
    return Recipe(init, flags)


# The VAEs of each question, in the order in which they are run. None: the VAE is a base, which is
# trained anyway for others to start from. Which VAEs are compared is written in study/sections.py.
QUESTIONS = {
    "main": {"plain": tuned("--align none"), "send": tuned(MAPPER)},
    "seeds": {
        "plain_s1": tuned("--align none --seed 1"),
        "send_s1": tuned(f"{MAPPER} --seed 1"),
        "plain_s2": tuned("--align none --seed 2"),
        "send_s2": tuned(f"{MAPPER} --seed 2"),
    },
    "controls": {
        "shuffled": tuned(f"{MAPPER} --shuffle-targets"),
        "base": None,
        "plain_short": tuned("--align none"),
    },
    "teacher": {"random_teacher": tuned(MAPPER + " --vfm-weights {out}/random.safetensors")},
    "noise": {"no_noise": tuned(f"{MAPPER} --no-noise")},
    "depth": {
        "depth0": tuned(f"{MAPPER} --mapper-depth 0"),
        "depth2": tuned(f"{MAPPER} --mapper-depth 2"),
        "mlp": tuned(f"{MAPPER} --mapper-depth 0 --mapper-hidden 632"),
    },
    "weight": {
        "weight0.1": tuned(f"{MAPPER} --align-weight 0.1"),
        "weight2": tuned(f"{MAPPER} --align-weight 2"),
        "weight0.5": tuned(f"{MAPPER} --align-weight 0.5"),
    },
    "loss": {"vavae": tuned(f"{TEACHER} --mapper-patch 1 --align vavae")},
    "scratch": {
        "scratch_plain": Recipe(None, f"{NETWORK} --align none"),
        "scratch_send": Recipe(None, f"{NETWORK} {MAPPER}"),
    },
    "channels": {
        "plain_d8": tuned("--align none", "base_d8"),
        "send_d8": tuned(MAPPER, "base_d8"),
        "plain_d32": tuned("--align none", "base_d32"),
        "send_d32": tuned(MAPPER, "base_d32"),
    },
    "kind": {"constant_noise": tuned(f"{MAPPER} --noise-kind constant")},
    "verdict_seeds": {
        "no_noise_s1": tuned(f"{MAPPER} --no-noise --seed 1"),
        "depth0_s1": tuned(f"{MAPPER} --mapper-depth 0 --seed 1"),
        "depth2_s1": tuned(f"{MAPPER} --mapper-depth 2 --seed 1"),
        "scratch_send_s1": Recipe(None, f"{NETWORK} {MAPPER} --seed 1"),
        "no_noise_s2": tuned(f"{MAPPER} --no-noise --seed 2"),
        "depth0_s2": tuned(f"{MAPPER} --mapper-depth 0 --seed 2"),
        "depth2_s2": tuned(f"{MAPPER} --mapper-depth 2 --seed 2"),
        "scratch_send_s2": Recipe(None, f"{NETWORK} {MAPPER} --seed 2"),
    },
    "long": {
        "plain_long": tuned("--align none", "base_long"),
        "send_long": tuned(MAPPER, "base_long"),
    },
    # No other VAE: the first steps of SiTs on the main pair, see early_job.
    "early": {},
}
BASES = {
    "base": NETWORK,
    "base_d8": NETWORK.replace("d16", "d8"),
    "base_d32": NETWORK.replace("d16", "d32"),
    "base_long": NETWORK,
}

# `base_long` is trained this many times as long as the other bases, to be near its best PSNR when
# the tuning starts.
LONG_BASE_FACTOR = 6

# The first steps of a SiT: where sets of samples are drawn, and the learning rates.
EARLY_POINTS = (100, 200, 300, 400)
EARLY_RATES = (1e-3, 3e-4)

# SiTs that are trained ten times as long, on a GPU (study/gpu.py): on the main pair with all seeds
# of its VAEs, and on the controls that tell alignment to meaning from alignment to anything.
LONG_VAES = (
    "plain",
    "send",
    "plain_s1",
    "send_s1",
    "plain_s2",
    "send_s2",
    "shuffled",
    "random_teacher",
)
LONG_POINTS = (2000, 5000, 10000, 20000)
LONG_VARIANT = "-20k"

# `plain_short` is tuned for this share of the steps. It was found by trying and gives `send`'s
# PSNR.
SHORT_TUNING_SHARE = 0.44


def parse_arguments(argv=None):
    """The flags, and what follows from --quick: out (folder), size (Size), results (path of the
    page), scale (path of the scale). early_points and early_rates are those above."""
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--data", default="data/cifar10")
    p.add_argument(
        "--vfm-weights", help="local file of tf_efficientnet_lite0 (default: timm's hub)"
    )
    p.add_argument("--only", nargs="+", choices=list(QUESTIONS), default=list(QUESTIONS))
    p.add_argument("--seeds", type=int, default=3, help="SiT seeds on each VAE")
    p.add_argument(
        "--repa", action="store_true", help="also a SiT with the REPA loss on `plain` and `send`"
    )
    p.add_argument("--jobs", type=int, default=available_cores(), help="jobs that run side by side")
    p.add_argument("--quick", action="store_true", help="one seed of `main`, with shorter training")
    p.add_argument("--list", action="store_true", help="print the commands, run nothing")
    p.add_argument(
        "--paper",
        choices=list(paper.TABLES),
        help="print the commands of one of the paper's tables",
    )
    p.add_argument(
        "--report",
        action="store_true",
        help="write RESULTS.md and its figures from the runs that exist (study/report.py)",
    )
    args = parse_flags(p, argv)
    if args.quick:
        args.only = ["main"]
        args.seeds = 1
        args.size = SIZES["quick"]
        args.out = "runs/study-quick"
        args.results = "runs/study-quick/RESULTS.md"
    else:
        args.size = SIZES["full"]
        args.out = "runs/study"
        args.results = "RESULTS.md"
        args.scale = "study/scale.json"
    args.early_points = EARLY_POINTS
    args.early_rates = EARLY_RATES
    args.long_vaes = LONG_VAES
    args.long_variant = LONG_VARIANT
    args.long_points = LONG_POINTS
    return args


def vaes_of(questions):
    return [vae for question in questions for vae in QUESTIONS[question]]


# --------------------------------------------------------------------------------------------------
# Jobs


class Command(NamedTuple):
    # What follows `python` on the command line.
    words: str
    # A file whose existence shows that the command has been run.
    product: str
    # The checkpoint that training leaves at its end. A run that a signal stopped ends well too, but
    # without it.
    checkpoint: str | None = None


class Job(NamedTuple):
    # Names of the jobs that must have ended well before this one starts.
    after: list
    # Commands, run one after the other.
    commands: list


def plan(args):
    """All jobs as {name: Job}, the most urgent first.

    The main pair comes before everything else, then breadth (every VAE with one SiT), then more SiT
    seeds, and then longer training of the SiTs outside the main pair.
    """
    chosen = [question for question in QUESTIONS if question in args.only]
    others = vaes_of([question for question in chosen if question != "main"])

    jobs = {"classifier": classifier_job(args)}
    # Every VAE, its measures and one SiT; the main pair gets its SiTs of all seeds at once.
    for question in chosen:
        add_vaes(jobs, args, QUESTIONS[question])
        seeds = args.seeds if question == "main" else min(args.seeds, 1)
        for vae in QUESTIONS[question]:
            jobs[f"judge {vae}"] = judge_job(args, vae)
            for seed in range(seeds):
                add_sits(jobs, args, vae, seed)
    if "early" in args.only:
        add_early_sits(jobs, args)
    add_depth(jobs, args, others)
    if "main" in args.only:
        jobs["latents"] = latents_job(args)
    return jobs


def add_early_sits(jobs, args):
    for rate in EARLY_RATES:
        for seed in range(args.seeds):
            for vae in QUESTIONS["main"]:
                jobs[f"early {vae} {rate:g} {seed}"] = early_job(args, vae, rate, seed)


def add_depth(jobs, args, vaes):
    """Adds more SiT seeds on VAEs that have one SiT, and then longer training of all of these."""
    for seed in range(1, args.seeds):
        for vae in vaes:
            add_sits(jobs, args, vae, seed)
    last_step = args.size.sit_points[-1]
    for seed in range(args.seeds):
        for vae in vaes:
            after = f"sit {vae} {seed}"
            jobs[f"late {vae} {seed}"] = sit_job(args, vae, seed, [last_step], after)


def teacher_weights(args):
    """The flag that names the vision model's weights, with a space before it, or nothing."""
    if not args.vfm_weights:
        return ""
    return f" --vfm-weights {args.vfm_weights}"


def judge_flags(args):
    return (
        f"{TEACHER}{teacher_weights(args)} --data {args.data} --classifier {args.out}/classifier.pt"
    )


def classifier_job(args):
    path = f"{args.out}/classifier.pt"
    return Job([], [Command(f"-m study.judge classifier --data {args.data} --out {path}", path)])


def add_vaes(jobs, args, recipes):
    """Adds the training of VAEs {name: Recipe or None}, and that of the bases that they start
    from."""
    for vae, recipe in recipes.items():
        if recipe is None:
            continue
        base = recipe.init
        if base is not None and f"vae {base}" not in jobs:
            flags = f"{BASES[base]} --align none"
            steps = args.size.base_steps
            if base == "base_long":
                steps *= LONG_BASE_FACTOR
            jobs[f"vae {base}"] = vae_job(
                args, base, Recipe(None, flags), steps, SCRATCH_LEARNING_RATE
            )
        if "{out}/random.safetensors" in recipe.flags:
            jobs["random teacher"] = random_teacher_job(args)
        rate = SCRATCH_LEARNING_RATE if base is None else TUNING_LEARNING_RATE
        jobs[f"vae {vae}"] = vae_job(args, vae, recipe, training_steps(args, vae, recipe), rate)


def training_steps(args, vae, recipe):
    """Training steps of a VAE that is not a base."""
    if vae == "plain_short":
        return int(args.size.tune_steps * SHORT_TUNING_SHARE)
    if recipe.init is None:
        return args.size.base_steps + args.size.tune_steps
    return args.size.tune_steps


def vae_job(args, name, recipe, steps, rate):
    """Training of one VAE. `rate` is the learning rate."""
    after = []
    start = ""
    if recipe.init is not None:
        after.append(f"vae {recipe.init}")
        start = f"--init {args.out}/vae_{recipe.init} "
    flags = recipe.flags.format(out=args.out)
    if "{out}/random.safetensors" in recipe.flags:
        after.append("random teacher")
    elif "--vfm " in flags:
        flags += teacher_weights(args)
    data = f"--data {args.data}/train --val {args.data}/test"
    folder = f"{args.out}/vae_{name}"
    words = (
        f"train_vae.py {data} {VAE_TRAINING} {flags} {start}"
        f"--steps {steps} --lr {rate} --out {folder}"
    )
    checkpoint = f"{folder}/checkpoints/{steps:09d}.pt"
    return Job(after, [Command(words, checkpoint, checkpoint)])


def random_teacher_job(args):
    words = f"-m study.run random {args.out}"
    return Job([], [Command(words, f"{args.out}/random.safetensors")])


def judge_job(args, vae):
    """Measures of a VAE that need no SiT."""
    folder = f"{args.out}/vae_{vae}"
    judged = f"{args.out}/judged/{vae}.json"
    probe = f"{args.out}/probe_{vae}"
    shared = f"probe.py --vae {folder} --train-images 10000 --pictures 0 --workers 1"
    ifid = f"{args.out}/judged/{vae}-ifid.json"
    ifid_flags = f"--data {args.data} --classifier {args.out}/classifier.pt{args.size.neighbours}"
    classes = f"--data {args.data} --task classes --task uniformity --task mixture --out {probe}"
    attributes = f"--data {args.out}/attributes --task attributes --out {probe}_attributes"
    commands = [
        Command(f"-m study.judge vae {folder} {judge_flags(args)} --out {judged}", judged),
        Command(f"{shared} {classes}", f"{probe}/result.json"),
        Command(f"{shared} {attributes}", f"{probe}_attributes/result.json"),
        Command(f"-m study.judge ifid {folder} {ifid_flags} --out {ifid}", ifid),
    ]
    if not args.quick:
        # In a folder of its own, so that what an earlier study has measured need not be redone.
        editing = f"--data {args.out}/attributes --task disentanglement --task editing"
        words = f"{shared} {editing} --out {probe}_editing"
        commands.append(Command(words, f"{probe}_editing/result.json"))
    return Job([f"vae {vae}", "classifier"], commands)


def add_sits(jobs, args, vae, seed):
    """Adds the SiT of one seed on a VAE. Those of the main pair are judged at every point, and with
    --repa they also get a SiT with the REPA loss."""
    main = vae in QUESTIONS["main"]
    points = args.size.sit_points if main else [args.size.compare_step]
    jobs[f"sit {vae} {seed}"] = sit_job(args, vae, seed, points, f"vae {vae}", more_sets=main)
    if args.repa and main:
        add_repa_sit(jobs, args, vae, seed)


def add_repa_sit(jobs, args, vae, seed):
    jobs[f"sit {vae}-repa {seed}"] = sit_job(
        args,
        vae,
        seed,
        [args.size.compare_step],
        f"vae {vae}",
        variant="-repa",
        flags=f"--repa 0.5 --repa-block 4 {TEACHER}{teacher_weights(args)}",
    )


def sit_job(args, vae, seed, points, after, variant="", flags="--repa 0", more_sets=False):
    """Training of a SiT that is stopped at each of `points` (steps) to draw a set of samples; all
    sets are judged at the end.

    after: name of the job to wait for. more_sets: at the last point also draw a set with
    guidance and, to see how much the draw alone changes, a second set without guidance.
    """
    # The sets to draw: (SiT step, suffix of the file's name, flags of sample.py).
    draws = [(step, "", f"--cfg 1 --seed {seed}") for step in points]
    if more_sets:
        draws.append((points[-1], "-guided", f"--cfg 1.5 --interval 0 1 --seed {seed}"))
        draws.append((points[-1], "-again", f"--cfg 1 --seed {seed + 100}"))
    return Job([after, "classifier"], sit_commands(args, vae, seed, variant, flags, draws))


def early_job(args, vae, rate, seed):
    """The first steps of a SiT's training at a learning rate, with sets drawn from the averaged
    weights (EMA) and, "-raw", from the weights themselves."""
    draws = []
    for step in EARLY_POINTS:
        draws.append((step, "", f"--cfg 1 --seed {seed}"))
        draws.append((step, "-raw", f"--cfg 1 --raw --seed {seed}"))
    flags = f"--repa 0 --lr {rate:g}"
    commands = sit_commands(args, vae, seed, f"-early{rate:g}", flags, draws)
    return Job([f"vae {vae}", "classifier"], commands)


def sit_commands(args, vae, seed, variant, flags, draws):
    """Commands that train a SiT from set to set, draw the sets and judge them.

    variant: what its name has after the VAE's. flags: of train_sit.py. draws: a list of (SiT step,
    suffix of the set's name, flags of sample.py) in the order of the steps; the first of a step has
    no suffix.
    """
    name = f"{vae}{variant}_{seed}"
    folder = f"{args.out}/sit_{name}"
    training = (
        f"train_sit.py --data {args.data}/train --vae {args.out}/vae_{vae} {SIT_TRAINING} {flags}"
    )
    commands = []
    sets = []
    for step, suffix, sampler_flags in draws:
        path = f"{args.out}/samples/{name}_{step}{suffix}.npz"
        if suffix == "":
            # Only the last checkpoints are kept, so it is the set drawn at a step that shows that
            # the training up to this step is done.
            words = f"{training} --seed {seed} --steps {step} --out {folder}"
            commands.append(Command(words, path, f"{folder}/checkpoints/{step:09d}.pt"))
        words = f"sample.py --sit {folder} {SAMPLER} {sampler_flags} --out {path}"
        commands.append(Command(words, path))
        sets.append(path)
    words = f"-m study.judge samples {' '.join(sets)} {judge_flags(args)}"
    commands.append(Command(words, sets[-1].replace(".npz", ".json")))
    return commands


def latents_job(args):
    path = f"{args.out}/latents.png"
    vaes = f"{args.out}/vae_plain {args.out}/vae_send"
    words = f"-m study.judge latents {vaes} --data {args.data} --out {path}"
    return Job(["vae plain", "vae send"], [Command(words, path)])


# --------------------------------------------------------------------------------------------------
# Running them


def run_jobs(jobs, jobs_at_once, threads, out):
    """Runs jobs {name: Job} side by side, always the first whose predecessors have ended well, with
    `threads` threads each. Returns the names of those that failed or could not be started."""
    waiting = dict(jobs)
    names_of_running = {}
    done = set()
    with concurrent.futures.ThreadPoolExecutor(jobs_at_once) as pool:
        while True:
            ready = [name for name, job in waiting.items() if done.issuperset(job.after)]
            for name in ready[: jobs_at_once - len(names_of_running)]:
                job = waiting.pop(name)
                future = pool.submit(run_job, name, job.commands, threads, out)
                names_of_running[future] = name
            if not names_of_running:
                break
            finished, _ = concurrent.futures.wait(
                names_of_running, return_when=concurrent.futures.FIRST_COMPLETED
            )
            for future in finished:
                name = names_of_running.pop(future)
                if future.result():
                    done.add(name)
    return [name for name in jobs if name not in done]


def run_job(name, commands, threads, out):
    """Runs the commands of a job whose products do not exist yet. Returns whether all went well."""
    log_path = f"{out}/log/{name.replace(' ', '_')}.txt"
    for command in commands:
        if is_done(command):
            continue
        if run_command(command, threads, log_path) != 0:
            say(f"failed    {name}: see {log_path}")
            return False
        if is_stopped(command):
            say(f"stopped   {name}; rerun the same command to resume it")
            return False
    say(f"done      {name}")
    return True


def is_done(command):
    """Whether the command's product exists or, where that is a set of samples, its judgement: the
    set itself may be gone."""
    judgement = command.product.replace(".npz", ".json")
    return os.path.exists(command.product) or os.path.exists(judgement)


def is_stopped(command):
    """Whether a command that has ended was stopped before its end."""
    return command.checkpoint is not None and not os.path.exists(command.checkpoint)


def run_command(command, threads, log_path):
    """Runs one command with this Python, its output appended to the log. Returns its exit code."""
    with open(log_path, "a") as log:
        log.write(f"$ python {command.words}\n")
        log.flush()
        finished = subprocess.run(
            [sys.executable, *shlex.split(command.words)],
            stdout=log,
            stderr=log,
            env=dict(os.environ, OMP_NUM_THREADS=str(threads)),
        )
    return finished.returncode


def write_random_teacher(out):
    """Writes the vision model with random weights, for a control, to <out>/random.safetensors."""
    import timm
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(0)
    with writing(f"{out}/random.safetensors") as file:
        save_file(timm.create_model("tf_efficientnet_lite0").state_dict(), file.name)


def print_commands(jobs):
    for name, job in jobs.items():
        say(f"# {name}")
        for command in job.commands:
            say(f"python {command.words}")


def run_study(args):
    """Runs every job that is not done, then writes the page."""
    # If matplotlib is missing, the study fails now rather than after hours of training.
    figures.figure_class()
    os.makedirs(f"{args.out}/log", exist_ok=True)
    lock(args.out)
    write_attributes(args.data, f"{args.out}/attributes")
    threads = max(1, available_cores() // args.jobs)
    failed = run_jobs(plan(args), args.jobs, threads, args.out)
    report.write(args, vaes_of(args.only))
    if failed:
        raise UserError(
            f"{len(failed)} jobs failed or depend on one that did, the first is '{failed[0]}'; see "
            f"{args.out}/log"
        )


def main():
    # Internal: one of the study's own jobs.
    if sys.argv[1:2] == ["random"]:
        write_random_teacher(sys.argv[2])
        return
    args = parse_arguments()
    if args.paper:
        say("\n".join(paper.describe(args.paper)))
    elif args.report:
        report.write(args, vaes_of(args.only))
    elif args.list:
        print_commands(plan(args))
    else:
        run_study(args)


if __name__ == "__main__":
    run_main(main)
