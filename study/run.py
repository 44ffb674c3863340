"""The paper's claim at a size a laptop can repeat: VAEs with and without alignment and their controls, a small SiT on each, and
what the samples, a linear probe and two judges say. A runner: it calls the stages as commands, and goes on where it was.

    python -m study.run --data data/cifar10 --vfm-weights tf_efficientnet_lite0.safetensors     # everything
    python -m study.run ... --only main noise controls --seeds 1                                # some questions, fewer seeds
    python -m study.run ... --quick                                                             # question 1 in little time
    python -m study.run --report                                                                # RESULTS.md from what is there
    python -m study.run ... --list                                                              # print the commands only
    python -m study.run --paper noise          # the paper's own runs: commands, its numbers, hours (study/paper.py)

--data: a folder with train/ and test/ in ImageNet's layout, small pictures. Everything goes to runs/study (--quick:
runs/study-quick), a log for each job under log/. Kill it at will; the same command goes on.
"""

import argparse
import concurrent.futures
import os
import shlex
import subprocess
import sys

from common.files import UserError, writing
from common.flags import parse_flags
from common.processes import available_cores, run_main, say
from common.runs import lock
from study import paper, report

NET = "--spec f4d16 --ch 32 --ch-mult 1 1 2 --num-res-blocks 1"
TRAIN = (
    "--resolution 32 --recon l1 --lpips 0 --gan 0 --batch-size 8 --lr-schedule cosine --warmup 100 --ema 0.99 "
    "--stats-images 5000 --save-every 2500 --sample-every 2500 --workers 1"
)
TEACHER = "--vfm tf_efficientnet_lite0 --vfm-stride 16"
MAPPER = f"{TEACHER} --mapper-patch 1 --mapper-width 192 --mapper-hidden 256"
SIT = (
    "--patch 2 --depth 6 --width 192 --heads 3 --no-flip --batch-size 64 --lr 1e-3 --ema 0.995 --preview-n 1 --preview-steps 10 "
    "--sample-every 1000000 --workers 1"
)
SAMPLER = "--sampler ode --steps 25 --num 1000"
# VAE steps from scratch and of tuning, SiT steps at which `plain` and `send` are judged; all others are judged at `compare` and
# at the last
SIZES = dict(
    full=dict(base=4400, tune=5000, points=(250, 500, 750, 1000, 2000), compare=750),
    quick=dict(base=3000, tune=3500, points=(250, 500, 750), compare=750),
)

# question: {VAE: (starts from, flags)}; `scratch` ones train for base + tune steps, `plain_short` for SHORT of the tuning's: as many
# as give it the PSNR of `send` (found by trying)
SHORT = 0.44
QUESTIONS = dict(  # in the order in which they are run
    main=dict(plain=("base", "--align none"), send=("base", MAPPER)),
    seeds=dict(
        plain_s1=("base", "--align none --seed 1"),
        send_s1=("base", f"{MAPPER} --seed 1"),
        plain_s2=("base", "--align none --seed 2"),
        send_s2=("base", f"{MAPPER} --seed 2"),
    ),
    controls=dict(
        shuffled=("base", f"{MAPPER} --shuffle-targets"),
        base=None,
        plain_short=("base", "--align none"),
    ),
    teacher=dict(random_teacher=("base", MAPPER + " --vfm-weights {out}/random.safetensors")),
    noise=dict(no_noise=("base", f"{MAPPER} --no-noise")),
    depth=dict(
        depth0=("base", f"{MAPPER} --mapper-depth 0"),
        depth2=("base", f"{MAPPER} --mapper-depth 2"),
        mlp=("base", f"{MAPPER} --mapper-depth 0 --mapper-hidden 632"),
    ),
    weight={f"weight{w}": ("base", f"{MAPPER} --align-weight {w}") for w in ("0.1", "2", "0.5")},
    loss=dict(vavae=("base", f"{TEACHER} --mapper-patch 1 --align vavae")),
    scratch=dict(
        scratch_plain=(None, f"{NET} --align none"), scratch_send=(None, f"{NET} {MAPPER}")
    ),
    channels=dict(
        plain_d8=("base_d8", "--align none"),
        send_d8=("base_d8", MAPPER),
        plain_d32=("base_d32", "--align none"),
        send_d32=("base_d32", MAPPER),
    ),
    kind=dict(constant_noise=("base", f"{MAPPER} --noise-kind constant")),
)
BASES = dict(base=NET, base_d8=NET.replace("d16", "d8"), base_d32=NET.replace("d16", "d32"))

# AwA's manner: what is true of most members of a class. Columns are the ten classes in alphabetical order.
CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
ATTRIBUTES = dict(
    animal="0011111100",
    four_legs="0001111100",
    hooves="0000100100",
    fur="0001110100",
    wings="1010000000",
    flies="1010000000",
    wheels="1100000001",
    metal="1100000011",
    on_water="0000000010",
    on_roads="0100000001",
    carries_people="1100000111",
    larger_than_a_man="1100100111",
    kept_as_a_pet="0001010000",
    lays_eggs="0010001000",
)


def parse_arguments(argv=None):
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
    p.add_argument("--jobs", type=int, default=available_cores(), help="side by side")
    p.add_argument("--quick", action="store_true", help="one seed of `main`, shorter")
    p.add_argument("--list", action="store_true", help="print the commands, run nothing")
    p.add_argument(
        "--paper",
        choices=list(paper.TABLES),
        help="print the commands of one of the paper's tables",
    )
    p.add_argument(
        "--report",
        action="store_true",
        help="write RESULTS.md and its figures from what is there (study/report.py)",
    )
    return parse_flags(p, argv)


# ----------------------------------------------------------------------------------------------------------------------
# Jobs: name -> (names of jobs to wait for, [(command, file that shows it is done)])


def plan(args, out, size):
    """All jobs, the more urgent first: `main` before all, then breadth (every VAE with one SiT), more SiT seeds, longer runs."""
    teacher = f" --vfm-weights {args.vfm_weights}" if args.vfm_weights else ""
    judge = f"{TEACHER}{teacher} --data {args.data} --classifier {out}/classifier.pt"
    data = f"--data {args.data}/train --val {args.data}/test"
    jobs = {
        "classifier": (
            [],
            [
                (
                    f"-m study.judge classifier --data {args.data} --out {out}/classifier.pt",
                    f"{out}/classifier.pt",
                )
            ],
        )
    }

    def add_vae(name, init, flags, steps, rate):
        after, start = ([f"vae {init}"], f"--init {out}/vae_{init} ") if init else ([], "")
        if "{out}" in flags:
            jobs["random teacher"] = (
                [],
                [(f"-m study.run random {out}", f"{out}/random.safetensors")],
            )
            after.append("random teacher")
        elif "--vfm " in flags:
            flags += teacher
        command = f"train_vae.py {data} {TRAIN} {flags.format(out=out)} {start}--steps {steps} --lr {rate} --out {out}/vae_{name}"
        jobs[f"vae {name}"] = after, [(command, f"{out}/vae_{name}/checkpoints/{steps:09d}.pt")]

    def add_judge(vae):
        names = f"--vae {out}/vae_{vae} --train-images 10000 --pictures 0 --workers 1"
        jobs[f"judge {vae}"] = (
            [f"vae {vae}", "classifier"],
            [
                (
                    f"-m study.judge vae {out}/vae_{vae} {judge} --out {out}/judged/{vae}.json",
                    f"{out}/judged/{vae}.json",
                ),
                (
                    f"probe.py {names} --data {args.data} --task classes --task uniformity --task mixture --out {out}/probe_{vae}",
                    f"{out}/probe_{vae}/result.json",
                ),
                (
                    f"probe.py {names} --data {out}/attributes --task attributes --out {out}/probe_{vae}_attributes",
                    f"{out}/probe_{vae}_attributes/result.json",
                ),
            ],
        )

    def add_chains(vae, seed):
        main = vae in QUESTIONS["main"]
        add_chain(
            f"sit {vae} {seed}",
            [f"vae {vae}"],
            vae,
            seed,
            "",
            "--repa 0",
            size["points"] if main else [size["compare"]],
            main,
        )
        if args.repa and main:
            repa = f"--repa 0.5 --repa-block 4 {TEACHER}{teacher}"
            add_chain(
                f"sit {vae}-repa {seed}",
                [f"vae {vae}"],
                vae,
                seed,
                "-repa",
                repa,
                [size["compare"]],
            )

    def add_chain(name, after, vae, seed, kind, flags, points, more=False):
        """A SiT that is stopped at each point to draw a set of samples; all sets are judged at the end. `more`: also a guided set
        at the last and, to see what the draw itself is worth, another set of the same SiT."""
        run, steps, sets = f"{out}/sit_{vae}{kind}_{seed}", [], []

        def draw(suffix, flags, draw_seed):
            sets.append(f"{out}/samples/{vae}{kind}_{seed}_{n}{suffix}.npz")
            steps.append(
                (
                    f"sample.py --sit {run} {SAMPLER} {flags} --seed {draw_seed} --out {sets[-1]}",
                    sets[-1],
                )
            )

        for n in points:
            steps.append(
                (
                    f"train_sit.py --data {args.data}/train --vae {out}/vae_{vae} {SIT} {flags} --seed {seed} --steps {n} "
                    f"--out {run}",
                    f"{out}/samples/{vae}{kind}_{seed}_{n}.npz",
                )
            )
            draw("", "--cfg 1", seed)
        if more:
            draw("-guided", "--cfg 1.5 --interval 0 1", seed)
            draw("-again", "--cfg 1", seed + 100)
        steps.append(
            (f"-m study.judge samples {' '.join(sets)} {judge}", sets[-1].replace(".npz", ".json"))
        )
        jobs[name] = [*after, "classifier"], steps

    for question in (q for q in QUESTIONS if q in args.only):
        for vae, how in QUESTIONS[question].items():
            if how is not None:
                init, flags = how
                if init and f"vae {init}" not in jobs:
                    add_vae(init, None, f"{BASES[init]} --align none", size["base"], 2e-3)
                steps = (
                    int(size["tune"] * SHORT)
                    if vae == "plain_short"
                    else size["tune"] + (0 if init else size["base"])
                )
                add_vae(vae, init, flags, steps, 1e-3 if init else 2e-3)
        for vae in QUESTIONS[question]:
            add_judge(vae)
            for seed in range(args.seeds if question == "main" else min(args.seeds, 1)):
                add_chains(vae, seed)
    for seed in range(1, args.seeds):
        for question in (q for q in QUESTIONS if q in args.only and q != "main"):
            for vae in QUESTIONS[question]:
                add_chains(vae, seed)
    for seed in range(args.seeds):
        for vae in (v for q in QUESTIONS if q in args.only and q != "main" for v in QUESTIONS[q]):
            add_chain(
                f"late {vae} {seed}",
                [f"sit {vae} {seed}"],
                vae,
                seed,
                "",
                "--repa 0",
                size["points"][-1:],
            )
    if "main" in args.only:
        jobs["latents"] = (
            ["vae plain", "vae send"],
            [
                (
                    f"-m study.judge latents {out}/vae_plain {out}/vae_send --data {args.data} "
                    f"--out {out}/latents.png",
                    f"{out}/latents.png",
                )
            ],
        )
    return jobs


def run_job(name, commands, threads, out):
    """Runs a job's commands that have not been done -> whether all went well."""
    for command, product in commands:
        if os.path.exists(product):
            continue
        with open(f"{out}/log/{name.replace(' ', '_')}.txt", "a") as log:
            log.write(f"$ python {command}\n")
            log.flush()
            code = subprocess.run(
                [sys.executable, *shlex.split(command)],
                stdout=log,
                stderr=log,
                env=dict(os.environ, OMP_NUM_THREADS=str(threads)),
            ).returncode
        if code:
            say(f"failed    {name}: see {log.name}")
            return False
        if "/checkpoints/" in product and not os.path.exists(
            product
        ):  # a run that a signal stopped ends well too
            say(f"stopped   {name}; the same command goes on")
            return False
    say(f"done      {name}")
    return True


def run_jobs(jobs, at_once, threads, out):
    """Runs them side by side, always the first whose predecessors have ended well -> names of those that failed or had to
    be left out."""
    waiting, running, good = dict(jobs), {}, set()
    with concurrent.futures.ThreadPoolExecutor(at_once) as pool:
        while True:
            ready = [name for name, (after, _) in waiting.items() if good.issuperset(after)]
            for name in ready[: at_once - len(running)]:
                running[pool.submit(run_job, name, waiting.pop(name)[1], threads, out)] = name
            if not running:
                return [name for name in jobs if name not in good]
            for future in concurrent.futures.wait(
                running, return_when=concurrent.futures.FIRST_COMPLETED
            ).done:
                name = running.pop(future)
                good |= {name} if future.result() else set()


def write_attributes(data, out):
    """The data set in AwA2's form, with the table above, for probe.py."""
    folder = f"{out}/attributes"
    found = sorted(os.listdir(f"{data}/train"))
    if found != CLASSES:
        raise UserError(
            f"{data}/train: the attribute table is of CIFAR-10's classes, these are {', '.join(found[:5])} ..."
        )
    os.makedirs(f"{folder}/JPEGImages", exist_ok=True)
    for name in CLASSES:
        link = f"{folder}/JPEGImages/{name}"
        if not os.path.exists(link):
            if os.path.islink(link):  # to where the data were when a run began
                os.remove(link)
            os.symlink(os.path.abspath(f"{data}/train/{name}"), link)
    lines = dict(
        classes=[f"{i + 1}\t{c}" for i, c in enumerate(CLASSES)],
        predicates=[f"{i + 1}\t{a}" for i, a in enumerate(ATTRIBUTES)],
    )
    lines["predicate-matrix-binary"] = [" ".join(row) for row in zip(*ATTRIBUTES.values())]
    for name, text in lines.items():
        with writing(f"{folder}/{name}.txt") as file:
            file.write(("\n".join(text) + "\n").encode())


def write_random_teacher(out):
    import timm
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(0)
    with writing(f"{out}/random.safetensors") as file:
        save_file(timm.create_model("tf_efficientnet_lite0").state_dict(), file.name)


def main():
    if sys.argv[1:2] == ["random"]:
        return write_random_teacher(sys.argv[2])
    args = parse_arguments()
    if args.paper:
        return say("\n".join(paper.describe(args.paper)))
    size = SIZES["quick" if args.quick else "full"]
    out, results = (
        ("runs/study-quick", "runs/study-quick/RESULTS.md")
        if args.quick
        else ("runs/study", "RESULTS.md")
    )
    if args.quick:
        args.only, args.seeds = ["main"], 1
    vaes = [v for question in args.only for v in QUESTIONS[question]]
    if args.report:
        return report.write(args, out, size, vaes, CLASSES, ATTRIBUTES, results)
    jobs = plan(args, out, size)
    if args.list:
        for name, (_, commands) in jobs.items():
            say(f"# {name}\n" + "\n".join(f"python {command}" for command, _ in commands))
        return
    os.makedirs(f"{out}/log", exist_ok=True)
    lock(out)
    write_attributes(args.data, out)
    failed = run_jobs(jobs, args.jobs, max(1, available_cores() // args.jobs), out)
    report.write(args, out, size, vaes, CLASSES, ATTRIBUTES, results)
    if failed:
        raise UserError(
            f"{len(failed)} jobs failed or wait for one that did, the first is {failed[0]}; see {out}/log"
        )


if __name__ == "__main__":
    run_main(main)
