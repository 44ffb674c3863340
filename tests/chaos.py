"""Kills training and sampling at random instants, as a machine that is taken away does, and
compares the final results with those of a run that was never killed: weights, optimisers, latents
and pictures bit for bit, metrics line for line.

    python tests/chaos.py 30        # 30 kills of each program, on 1 and on 2 processes
    python tests/chaos.py 5 --only sit --processes 2

A kill is a SIGKILL to every process of the run: torchrun, ranks and loaders. It comes at a random
time between the run's first line of output and its end; every other kill then waits for the next
moment at which a file is half written. After a kill the same command is started again. The exit
code is 1 if anything was lost or differs.
"""

import argparse
import os
import random
import shutil
import sys
import tempfile
import time

import numpy as np

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from common.runs import list_checkpoints, load_checkpoint
from conftest import (
    PLAIN_VAE,
    SIT,
    VAE,
    half_written_files,
    kill_all_in,
    make_pictures,
    make_vfm_weights,
    processes_in,
    read_metrics,
    same_state,
    start,
    torchrun,
    wait_for,
)

PROGRAMS = ["vae", "sit", "sample"]


def commands(base):
    """{program: words of its command line}. Makes the pictures and networks that they need. Saves,
    pictures and log lines are frequent, so that many kills hit one."""
    data = make_pictures(f"{base}/pictures")
    vfm = make_vfm_weights(f"{base}/vfm.safetensors")
    vae = [*PLAIN_VAE, "--data", data, "--steps", 2, "--out", "vae"]
    torchrun(1, "train_vae", *vae, cwd=base)
    sit = [*SIT, "--data", data, "--repa", 0, "--vae", f"{base}/vae", "--steps", 2, "--out", "sit"]
    torchrun(1, "train_sit", *sit, cwd=base)

    often = ["--save-every", 3, "--sample-every", 5, "--log-every", 2, "--workers", 1]
    training = ["--data", data, "--vfm-weights", vfm, *often, "--out", "run"]
    cache = ["--vae", f"{base}/vae", "--cache", "cache"]
    drawing = ["--num-images", 40, "--batch-size", 2, "--steps", 60, "--precision", "fp32"]
    return {
        "vae": ["train_vae", *VAE, *training, "--val", data, "--steps", 30],
        "sit": ["train_sit", *SIT, *training, *cache, "--steps", 45],
        "sample": ["sample", "--sit", f"{base}/sit", *drawing, "--out", "run/set.npz"],
    }


# --------------------------------------------------------------------------------------------------
# Results


def read_set(run):
    """What sampling leaves in its folder, as values that can be compared."""
    with np.load(f"{run}/set.npz") as file:
        return {
            "pictures": file["arr_0"].tobytes(),
            "labels": file["labels"].tolist(),
            "files": sorted(os.listdir(run)),
        }


def read_run(run):
    """What training leaves in its folder, as nested values that can be compared."""
    state = load_checkpoint(run, "cpu")
    state.pop("arguments")
    return {
        "state": state,
        "metrics": read_metrics(f"{run}/metrics.jsonl"),
        "samples": sorted(os.listdir(f"{run}/samples")),
    }


def read_latents(folder):
    """The latents in a cache that holds those of one VAE and one list of pictures, as bytes."""
    [name] = os.listdir(folder)
    return np.load(f"{folder}/{name}/latents.npy").tobytes()


def result(program, folder):
    """What a finished program leaves in its current folder, as nested values."""
    run = os.path.join(folder, "run")
    if program == "sample":
        return read_set(run)
    found = read_run(run)
    found["half-written files"] = half_written_files(folder)
    if program == "sit":
        found["latents"] = read_latents(f"{folder}/cache")
    return found


# --------------------------------------------------------------------------------------------------
# Kills


def output_of(folder):
    path = os.path.join(folder, "output.txt")
    if not os.path.exists(path):
        return ""
    with open(path) as file:
        return file.read()


def start_in(folder, processes, words):
    """Starts a command and waits for its first line of output. Returns its Popen."""
    os.makedirs(folder, exist_ok=True)
    run = start(processes, *words, cwd=folder)
    wait_for(lambda: output_of(folder) != "", 900)
    return run


def kill_after(run, folder, seconds, while_writing):
    """Kills all processes of a run after some seconds and, if `while_writing`, not before a file is
    half written. Returns whether the run still ran then."""
    begin = time.time()
    while run.poll() is None:
        late = time.time() - begin >= seconds
        if late and (not while_writing or half_written_files(folder)):
            kill_all_in(folder)
            run.wait()
            wait_for(lambda: not processes_in(folder))
            return True
        time.sleep(0.001 if late else 0.005)
    return False


def run_undisturbed(title, program, processes, words, folder):
    """Runs a program to its end and returns its result and its seconds after the first line."""
    run = start_in(folder, processes, words)
    begin = time.time()
    assert run.wait() == 0, output_of(folder)
    seconds = time.time() - begin
    print(f"{title}: left alone it takes {seconds:.1f} s after its first line", flush=True)
    return result(program, folder), seconds


def report_kill(title, folder, kills, seconds):
    """Prints where a kill hit, and returns whether it left a half-written file."""
    newest = [os.path.basename(path) for path in list_checkpoints(f"{folder}/run")[-1:]]
    half = len(half_written_files(folder))
    print(
        f"{title}: kill {kills} after {seconds:.2f} s; newest checkpoint {newest},"
        f" half-written files {half}",
        flush=True,
    )
    return half > 0


def failure(program, folder, code, kills, expected):
    """What is wrong with a run that ended by itself, in words, or None."""
    if code != 0:
        output = output_of(folder)[-2000:]
        return f"a start after {kills} kills ended with code {code}:\n{output}"
    found = result(program, folder)
    differ = [key for key in expected if not same_state(expected[key], found[key])]
    if differ:
        names = ", ".join(differ)
        return f"after {kills} kills these differ from the run left alone: {names}; see {folder}"
    return None


def torment(program, words, processes, wanted, base, rng):
    """Kills a program `wanted` times and returns whether all went well. A run that ends before it
    is killed is compared, and another one is begun in an empty folder.
    """
    plural = "es" if processes > 1 else ""
    title = f"{program} on {processes} process{plural}"
    undisturbed = os.path.join(base, f"{program}{processes}whole")
    expected, length = run_undisturbed(title, program, processes, words, undisturbed)

    folder = os.path.join(base, f"{program}{processes}killed")
    kills = kills_while_writing = finished = 0
    while True:
        fresh = not os.path.exists(folder)
        run = start_in(folder, processes, words)
        begin = time.time()
        seconds = rng.uniform(0, length / 2)
        while_writing = kills % 2 == 1
        if kills < wanted and kill_after(run, folder, seconds, while_writing):
            kills += 1
            kills_while_writing += report_kill(title, folder, kills, time.time() - begin)
            continue

        problem = failure(program, folder, run.wait(), kills, expected)
        if problem is not None:
            print(f"{title}: FAILED, {problem}", flush=True)
            return False
        finished += 1
        if fresh:
            # The first run may have shared the machine with other work.
            length = min(length, time.time() - begin)
        if kills == wanted:
            print(
                f"{title}: {kills} kills, {kills_while_writing} of them with half-written files,"
                f" in {finished} runs: no loss and no difference",
                flush=True,
            )
            return True
        shutil.rmtree(folder)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("kills", type=int, nargs="?", default=30, help="of each program")
    parser.add_argument("--only", choices=PROGRAMS, nargs="+", default=PROGRAMS)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    base = tempfile.mkdtemp(prefix="chaos")
    words = commands(base)
    good = []
    for program in args.only:
        for processes in args.processes:
            rng = random.Random(f"{args.seed} {program} {processes}")
            good.append(torment(program, words[program], processes, args.kills, base, rng))
    if all(good):
        shutil.rmtree(base)
        return
    sys.exit(1)


if __name__ == "__main__":
    main()
