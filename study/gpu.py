"""The SiTs of study/run.py on one GPU, in minutes, and what a CPU cannot do: ten times the steps.

    python -m study.gpu --data data/cifar10 --vfm-weights WEIGHTS.safetensors
    python -m study.gpu ... --only main noise --seeds 1     # as in study/run.py
    python -m study.gpu ... --limit 400                     # end after so many seconds
    python -m study.gpu ... --device cpu --list             # print the commands

The VAEs, the classifier and the measures are study/run.py's, which has to run first. A SiT of the
study is so small that a process launches its kernels slower than a card runs them, so many
processes share the card. They are forked, which spares each command the seconds of imports, and a
process runs all commands of a SiT. NVIDIA's MPS lets their kernels run at the same time; start it
before (`nvidia-cuda-mps-control -d`).

Each set of samples is judged as soon as it is drawn. What is judged already is left out, also if
the set is gone, so the judgements are all that need be kept of a rented card.
"""

import argparse
import importlib
import multiprocessing
import os
import queue as queues
import shlex
import sys
import time
import traceback
from contextlib import redirect_stderr, redirect_stdout

import torch

from common.files import UserError
from common.flags import parse_flags
from common.processes import available_cores, run_main, say
from study import run

# The modules of the commands are imported once, here.
COMMANDS = ("train_sit", "sample", "study.judge")

# The sets of the SiTs that are trained ten times as long.
LONG_SAMPLES = "--num 10000 --batch-size 500"


def parse_arguments(argv=None):
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--data", default="data/cifar10")
    p.add_argument("--vfm-weights", help="local file of tf_efficientnet_lite0")
    p.add_argument("--only", nargs="+", choices=list(run.QUESTIONS), default=list(run.QUESTIONS))
    p.add_argument("--seeds", type=int, default=3, help="SiT seeds on each VAE")
    p.add_argument("--repa", action="store_true", help="also SiTs with the REPA loss on the pair")
    p.add_argument("--no-long", dest="long", action="store_false", help="not the longer training")
    p.add_argument("--jobs", type=int, default=max(1, available_cores() - 2))
    p.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    p.add_argument("--no-compile", dest="compile", action="store_false")
    p.add_argument("--limit", type=float, default=1e6, help="seconds for everything")
    p.add_argument("--list", action="store_true", help="print the commands, run nothing")
    args = parse_flags(p, argv)
    args.out = "runs/study"
    args.size = run.SIZES["full"]
    return args


# --------------------------------------------------------------------------------------------------
# Jobs


def plan(args):
    """Lists of commands, [(name, [study.run.Command, ...])], the longest and most urgent first."""
    chosen = [question for question in run.QUESTIONS if question in args.only]
    vaes = existing_vaes(args, run.vaes_of(chosen))
    jobs = []
    if args.long:
        jobs += [long_job(args, vae) for vae in run.LONG_VAES if vae in vaes]
    jobs += [sit_job(args, vae, 0) for vae in vaes]
    if "early" in chosen:
        jobs += early_jobs(args)
    for seed in range(1, args.seeds):
        jobs += [sit_job(args, vae, seed) for vae in vaes]
    if args.repa and "main" in chosen:
        jobs += repa_jobs(args)
    return jobs


def existing_vaes(args, vaes):
    """Those of `vaes` that are trained. The others are named in a note."""
    missing = [vae for vae in vaes if not has_vae(args, vae)]
    if missing:
        say(f"note: study/run.py has yet to train {', '.join(missing)} in {args.out}")
    return [vae for vae in vaes if vae not in missing]


def has_vae(args, vae):
    return os.path.exists(f"{args.out}/vae_{vae}/vae.safetensors")


def sit_job(args, vae, seed):
    """A SiT to its last step, with sets where study/run.py has them."""
    last_step = args.size.sit_points[-1]
    if vae in run.QUESTIONS["main"]:
        job = run.sit_job(args, vae, seed, args.size.sit_points, "", more_sets=True)
    else:
        job = run.sit_job(args, vae, seed, [args.size.compare_step, last_step], "")
    return f"sit {vae} {seed}", judged_at_once(args, job.commands)


def repa_jobs(args):
    """The main pair's SiTs with the REPA loss."""
    planned = {}
    for seed in range(args.seeds):
        for vae in run.QUESTIONS["main"]:
            run.add_repa_sit(planned, args, vae, seed)
    return all_judged_at_once(args, planned)


def early_jobs(args):
    planned = {}
    run.add_early_sits(planned, args)
    return all_judged_at_once(args, planned)


def all_judged_at_once(args, planned):
    """Jobs {name: study.run.Job} in the form of this plan."""
    return [(name, judged_at_once(args, job.commands)) for name, job in planned.items()]


def long_job(args, vae):
    """A SiT that is trained ten times as long, with sets of 10,000 samples."""
    draws = [(step, "", f"{LONG_SAMPLES} --cfg 1 --seed 0") for step in run.LONG_POINTS]
    guided = f"{LONG_SAMPLES} --cfg 1.5 --interval 0 1 --seed 0"
    draws.append((run.LONG_POINTS[-1], "-guided", guided))
    commands = run.sit_commands(args, vae, 0, run.LONG_VARIANT, "--repa 0", draws)
    return f"long {vae}", judged_at_once(args, commands)


def judged_at_once(args, commands):
    """Commands of run.sit_commands, which judge all sets together at the end, with each set judged
    when it is drawn. So a limit takes no more than the last set."""
    found = []
    for command in commands[:-1]:
        found.append(command)
        if command.words.startswith("sample.py"):
            words = f"-m study.judge samples {command.product} {run.judge_flags(args)}"
            found.append(run.Command(words, command.product.replace(".npz", ".json")))
    return found


def words_of(command, args):
    """The words of a command, with the flags of this machine."""
    words = shlex.split(command.words)
    if words[0] == "-m":
        return [*words[1:], "--device", args.device]
    module = words[0].removesuffix(".py")
    words = [module, *words[1:], "--device", args.device]
    if module == "train_sit":
        # The kernels of the first process are found in PyTorch's cache by all others. To compile
        # the vision model takes longer than the few steps with REPA.
        is_compiled = args.compile and words[words.index("--repa") + 1] == "0"
        return [*words, "--workers", "0", "--compile" if is_compiled else "--no-compile"]
    if "--batch-size" not in words:
        words += ["--batch-size", "500"]
    return [*words, "--no-compile"]


# --------------------------------------------------------------------------------------------------
# Running them


def work(jobs, taken, answers, args):
    """In a process of its own: runs jobs [(name, commands)], each time the first that no process
    has taken, and puts (name, whether all went well) into a queue.

    taken: how many jobs have been taken, a multiprocessing.Value."""
    torch.set_num_threads(1)
    while True:
        with taken.get_lock():
            number = taken.value
            taken.value += 1
        if number >= len(jobs):
            return
        name, commands = jobs[number]
        path = f"{args.out}/log/gpu_{name.replace(' ', '_')}.txt"
        with open(path, "a") as log, redirect_stdout(log), redirect_stderr(log):
            # What compilers print, too.
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
            is_good = run_job(commands, args)
        answers.put((name, is_good))


def run_job(commands, args):
    """Runs the commands of a job one after the other, as `python -m <module>` would. Returns
    whether all of them came to their end."""
    try:
        for command in commands:
            if not run.is_done(command):
                sys.argv = words_of(command, args)
                print("$", *sys.argv, flush=True)
                sys.modules[sys.argv[0]].main()
                if run.is_stopped(command):
                    return False
    except (Exception, SystemExit):
        traceback.print_exc()
        return False
    return True


def run_jobs(jobs, args):
    """Runs jobs [(name, commands)], args.jobs of them side by side, until all are done or the limit
    is reached. Returns the names of those that failed or were not done."""
    context = multiprocessing.get_context("fork")
    end = time.monotonic() + args.limit
    left = [job for job in jobs if not all(map(run.is_done, job[1]))]
    say(f"{len(jobs) - len(left)} of {len(jobs)} jobs are done already")
    names = [name for name, _ in left]
    # The jobs themselves are handed on by forking. A queue that a killed process has not read keeps
    # its writer from ending.
    taken = context.Value("i", 0)
    answers = context.Queue()
    shared = (left, taken, answers, args)
    workers = [context.Process(target=work, args=shared) for _ in range(args.jobs)]
    failed = []
    try:
        for worker in workers:
            worker.start()
        while names and time.monotonic() < end and any(worker.is_alive() for worker in workers):
            try:
                name, is_good = answers.get(timeout=1)
            except queues.Empty:
                continue
            names.remove(name)
            if not is_good:
                failed.append(name)
            seconds = args.limit - (end - time.monotonic())
            say(f"{seconds:6.1f} s  {'done' if is_good else 'FAILED'}  {name}; {len(names)} left")
    finally:
        for worker in workers:
            worker.kill()
    return failed + names


def main():
    args = parse_arguments()
    jobs = plan(args)
    if args.list:
        for name, commands in jobs:
            print(f"# {name}")
            for command in commands:
                print("python -m", *words_of(command, args))
        return
    for module in COMMANDS:
        importlib.import_module(module)
    for folder in ("log", "samples"):
        os.makedirs(f"{args.out}/{folder}", exist_ok=True)
    left = run_jobs(jobs, args)
    if left:
        raise UserError(f"failed or not done: {', '.join(left)}; see {args.out}/log")


if __name__ == "__main__":
    run_main(main)
