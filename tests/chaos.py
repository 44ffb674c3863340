"""Kills training and sampling at random instants, as a machine that is taken away does, and compares what comes out in the
end with a run that was left alone: weights, optimisers, latents and pictures bit for bit, metrics line for line.

    python tests/chaos.py 30                                # 30 kills of each program, on 1 and on 2 processes
    python tests/chaos.py 5 --only sit --processes 2

A kill is SIGKILL to every process of the run (torchrun, ranks, loaders), at a random time between its first line of output
and the end, and every other one then waits for the next moment at which a file is half written. The same command is then
given again. Exit code 1 if anything was lost or differs.
"""

import argparse
import json
import os
import random
import shutil
import sys
import tempfile
import time

import numpy as np

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

from conftest import (
    SIT,
    VAE,
    kill_all_in,
    make_pictures,
    make_vfm_weights,
    processes_in,
    same_state,
    start,  # noqa: E402
    torchrun,
    wait_for,
)

from common.runs import list_checkpoints, load_checkpoint


def commands(base):
    """Program -> its words. Saves, pictures and measurements come often, so that many kills hit one."""
    data, vfm = make_pictures(f"{base}/pictures"), make_vfm_weights(f"{base}/vfm.safetensors")
    torchrun(
        1,
        "train_vae",
        *VAE,
        "--data",
        data,
        "--align",
        "none",
        "--gan",
        0,
        "--steps",
        2,
        "--out",
        "vae",
        cwd=base,
    )
    torchrun(
        1,
        "train_sit",
        *SIT,
        "--data",
        data,
        "--repa",
        0,
        "--vae",
        f"{base}/vae",
        "--steps",
        2,
        "--out",
        "sit",
        cwd=base,
    )
    often = ["--save-every", 3, "--sample-every", 5, "--log-every", 2, "--workers", 1]
    return dict(
        vae=[
            "train_vae",
            *VAE,
            "--data",
            data,
            "--val",
            data,
            "--vfm-weights",
            vfm,
            "--steps",
            30,
            *often,
            "--out",
            "run",
        ],
        sit=[
            "train_sit",
            *SIT,
            "--data",
            data,
            "--vfm-weights",
            vfm,
            "--vae",
            f"{base}/vae",
            "--cache",
            "cache",
            "--steps",
            45,
            *often,
            "--out",
            "run",
        ],
        sample=[
            "sample",
            "--sit",
            f"{base}/sit",
            "--num-images",
            40,
            "--batch-size",
            2,
            "--steps",
            60,
            "--precision",
            "fp32",
            "--out",
            "run/set.npz",
        ],
    )


def result(program, folder):
    """What a finished run leaves, as nested values that can be compared."""
    run = os.path.join(folder, "run")
    if program == "sample":
        with np.load(f"{run}/set.npz") as file:
            return dict(
                pictures=file["arr_0"].tobytes(),
                labels=file["labels"].tolist(),
                left=sorted(os.listdir(run)),
            )
    state = load_checkpoint(run, "cpu")
    state.pop("arguments")
    with open(f"{run}/metrics.jsonl") as file:
        metrics = [
            {k: v for k, v in json.loads(line).items() if k != "images_per_s"} for line in file
        ]
    found = dict(
        state=state,
        metrics=metrics,
        samples=sorted(os.listdir(f"{run}/samples")),
        left=[f for _, _, files in os.walk(folder) for f in files if f.endswith(".tmp")],
    )
    if program == "sit":
        [cache] = os.listdir(f"{folder}/cache")
        found["latents"] = np.load(f"{folder}/cache/{cache}/latents.npy").tobytes()
    return found


def first_line(folder):
    path = os.path.join(folder, "output.txt")
    return os.path.exists(path) and os.path.getsize(path) > 0


def half_written(folder):
    return sum(f.endswith(".tmp") for _, _, files in os.walk(folder) for f in files)


def torment(program, words, processes, kills, base, rng):
    """-> whether all went well. A run that ends before its kill is compared and begun anew."""
    title = f"{program} on {processes} process{'es' * (processes > 1)}"
    folders = {
        name: os.path.join(base, f"{program}{processes}{name}") for name in ("whole", "killed")
    }
    os.makedirs(folders["whole"])
    run = start(processes, *words, cwd=folders["whole"])
    wait_for(lambda: first_line(folders["whole"]), 900)
    begin = time.time()
    assert run.wait() == 0, open(f"{folders['whole']}/output.txt").read()
    length, whole, killed, runs, halves = (
        time.time() - begin,
        result(program, folders["whole"]),
        0,
        0,
        0,
    )
    print(f"{title}: left alone it takes {length:.1f} s after its first line", flush=True)
    folder = folders["killed"]
    while True:
        fresh = not os.path.exists(folder)
        os.makedirs(folder, exist_ok=True)
        run = start(processes, *words, cwd=folder)
        wait_for(lambda: first_line(folder), 900)
        begin, wait = time.time(), rng.uniform(0, length / 2)
        while (
            killed < kills
            and run.poll() is None
            and (time.time() - begin < wait or killed % 2 and not half_written(folder))
        ):
            time.sleep(0.001 if time.time() - begin > wait else 0.005)
        if killed < kills and run.poll() is None:
            kill_all_in(folder)
            run.wait()
            wait_for(lambda: not processes_in(folder))
            killed, half = killed + 1, half_written(folder)
            halves += half > 0
            saved = [os.path.basename(p) for p in list_checkpoints(f"{folder}/run")[-1:]]
            print(
                f"{title}: kill {killed} after {time.time() - begin:.2f} s; newest checkpoint {saved}, half-written files "
                f"{half}",
                flush=True,
            )
            continue
        if run.wait() != 0:
            print(
                f"{title}: FAILED, a start after {killed} kills ended with code {run.returncode}:\n"
                + open(f"{folder}/output.txt").read()[-2000:]
            )
            return False
        length = (
            min(length, time.time() - begin) if fresh else length
        )  # other work may have slowed the first run
        found, runs = result(program, folder), runs + 1
        differ = [key for key in whole if not same_state(whole[key], found[key])]
        if differ:
            print(
                f"{title}: FAILED, after {killed} kills these differ from the run left alone: {', '.join(differ)}; see {base}"
            )
            return False
        if killed == kills:
            print(
                f"{title}: {kills} kills, {halves} of them with half-written files, in {runs} runs: no loss and no difference",
                flush=True,
            )
            return True
        shutil.rmtree(folder)


def main():
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("kills", type=int, nargs="?", default=30, help="of each program")
    p.add_argument(
        "--only", choices=["vae", "sit", "sample"], nargs="+", default=["vae", "sit", "sample"]
    )
    p.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    p.add_argument("--seed", type=int, default=0)
    args = p.parse_args()
    base = tempfile.mkdtemp(prefix="chaos")
    known = commands(base)
    good = [
        torment(name, known[name], n, args.kills, base, random.Random(f"{args.seed} {name} {n}"))
        for name in args.only
        for n in args.processes
    ]
    if all(good):
        shutil.rmtree(base)
    sys.exit(not all(good))


if __name__ == "__main__":
    main()
