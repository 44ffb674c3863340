"""The study: its commands parse and its jobs run in order (study/run.py); the page says what stands
in the runs' files (study/report.py) and its figures show it (study/figures.py); the paper's
commands parse and build networks that fit (study/paper.py); the judges measure what they say
(study/judge.py)."""

import json
import os
import shlex
import subprocess
import sys
import types

import numpy as np
import pytest
import torch
from conftest import ROOT, VAE, script
from PIL import Image
from scipy import stats

from common.files import UserError, read_weights, state_hash, write_json, write_weights
from common.flags import share_batch
from common.pictures import ImageSet
from common.weights import load_vae
import fid
import models
import probe
import sample
import train_sit
import train_vae
from probing import benchmarks
from study import attributes, figures, gpu, judge, paper, predictors, report, results, run as study

PARSERS = {
    "train_vae.py": train_vae,
    "train_sit.py": train_sit,
    "sample.py": sample,
    "probe.py": probe,
    "fid.py": fid,
}


def words_of(command):
    """A command line as a list that starts with the script, or with -m."""
    words = shlex.split(command)
    if words[0] == "python":
        words = words[1:]
    if words[0] == "torchrun":
        words = words[2:]
    return words


# --------------------------------------------------------------------------------------------------
# The plan


def test_every_command_parses_and_follows_the_jobs_it_depends_on():
    args = study.parse_arguments(["--vfm-weights", "w.safetensors", "--repa"])
    jobs = study.plan(args)
    names = list(jobs)
    for name, job in jobs.items():
        for predecessor in job.after:
            assert names.index(predecessor) < names.index(name)
        for command in job.commands:
            words = words_of(command.words)
            if words[0] in PARSERS:
                PARSERS[words[0]].parse_arguments(words[1:])
            elif words[:2] == ["-m", "study.judge"]:
                judge.parse_arguments(words[2:])
            else:
                assert words[:3] == ["-m", "study.run", "random"]
    assert len([name for name in names if name.startswith("vae ")]) >= 20


def test_breadth_before_depth():
    """Every VAE has one SiT before any VAE outside the main pair gets a second one."""
    names = list(study.plan(study.parse_arguments([])))
    second = names.index("sit plain_s1 1")
    for vae in study.vaes_of(study.QUESTIONS):
        assert names.index(f"sit {vae} 0") < second
    assert names.index("sit send 2") < names.index("sit plain_s1 0")


def test_the_quick_study_trains_the_main_pair_only():
    jobs = study.plan(study.parse_arguments(["--quick"]))
    measured = " ".join(command.words for command in jobs["judge send"].commands)
    assert "study.judge ifid" in measured
    assert "--neighbours 10000" in measured
    trained = {name for name in jobs if name.startswith(("vae", "sit"))}
    assert trained == {"vae base", "vae plain", "vae send", "sit plain 0", "sit send 0"}


# --------------------------------------------------------------------------------------------------
# Running jobs


def python(code, product):
    """A Command that runs a line of Python."""
    return study.Command(f"-c {shlex.quote(code)}", product)


def writes(name):
    """A Command that writes the file `name`."""
    return python(f"open('{name}', 'w')", name)


def notes(word, product):
    """A Command that appends a word to the file `order`, and does not write its product."""
    return python(f"open('order', 'a').write('{word} ')", product)


@pytest.fixture
def logs(inside):
    """An empty current folder with the folder of the jobs' logs."""
    os.makedirs("out/log")


def test_a_job_that_fails_stops_those_that_depend_on_it_and_no_others(logs):
    fails = python("import sys; print('why'); sys.exit(1)", "second")
    jobs = {
        "broken": study.Job([], [writes("first"), fails, writes("third")]),
        "after broken": study.Job(["broken"], [writes("a")]),
        "after that": study.Job(["after broken"], [writes("b")]),
        "sound": study.Job([], [writes("c")]),
        "after sound": study.Job(["sound"], [writes("d")]),
    }
    assert study.run_jobs(jobs, 2, 1, "out") == ["broken", "after broken", "after that"]
    assert sorted(name for name in os.listdir() if name != "out") == ["c", "d", "first"]
    with open("out/log/broken.txt") as log:
        assert "why" in log.read()


def test_done_products_are_skipped_and_a_run_that_a_signal_stopped_is_not_done(logs):
    os.makedirs("out/vae/checkpoints")
    checkpoint = "out/vae/checkpoints/5.pt"
    stopped = notes("2", "set")._replace(checkpoint=checkpoint)
    jobs = {"job": study.Job([], [notes("1", "there"), stopped, notes("3", "drawn")])}

    # The first command is done. The second ends well, but without its last checkpoint.
    open("there", "w").close()
    assert study.run_jobs(jobs, 1, 1, "out") == ["job"]
    with open("order") as file:
        assert file.read() == "2 "

    open(checkpoint, "w").close()
    assert study.run_jobs(jobs, 1, 1, "out") == []
    with open("order") as file:
        assert file.read() == "2 2 3 "
    open("set", "w").close()
    open("drawn", "w").close()
    assert study.run_jobs(jobs, 1, 1, "out") == []
    with open("order") as file:
        assert file.read() == "2 2 3 "


def test_the_most_urgent_job_that_is_ready_goes_first(logs):
    jobs = {
        "late": study.Job(["early"], [notes("late", "late")]),
        "early": study.Job([], [notes("early", "early")]),
        "other": study.Job([], [notes("other", "other")]),
    }
    assert study.run_jobs(jobs, 1, 1, "out") == []
    with open("order") as file:
        assert file.read() == "early late other "


def test_a_set_whose_judgement_is_kept_is_done(logs):
    jobs = {"job": study.Job([], [notes("set", "a.npz"), notes("other", "b.npz")])}
    write_json("a.json", {})
    study.run_jobs(jobs, 1, 1, "out")
    with open("order") as file:
        assert file.read() == "other "


# --------------------------------------------------------------------------------------------------
# The plan on a GPU


@pytest.fixture
def gpu_arguments(inside):
    """Arguments of study/gpu.py in a folder with two of the study's VAEs."""
    for vae in ("plain", "send"):
        os.makedirs(f"runs/study/vae_{vae}")
        open(f"runs/study/vae_{vae}/vae.safetensors", "w").close()
    return gpu.parse_arguments(["--only", "main", "noise", "early", "--repa", "--seeds", "2"])


def test_the_jobs_on_a_gpu_are_those_of_the_study(gpu_arguments, capsys):
    jobs = dict(gpu.plan(gpu_arguments))
    assert "study/run.py has yet to train no_noise in runs/study" in capsys.readouterr().out
    assert list(jobs)[:4] == ["long plain", "long send", "sit plain 0", "sit send 0"]
    of_a_cpu = study.plan(study.parse_arguments(["--only", "main", "early", "--repa"]))
    for name, commands in jobs.items():
        for command in commands:
            words = gpu.words_of(command, gpu_arguments)
            assert words[0] in gpu.COMMANDS
            parser = judge if words[0] == "study.judge" else PARSERS[f"{words[0]}.py"]
            parser.parse_arguments(words[1:])
        if not name.startswith("long"):
            wanted = [
                command for command in of_a_cpu[name].commands if "judge" not in command.words
            ]
            assert [command for command in commands if "judge" not in command.words] == wanted
        # Every set is judged, right after it was drawn.
        drawn = [k for k, command in enumerate(commands) if command.words.startswith("sample.py")]
        for k in drawn:
            assert commands[k + 1].product == commands[k].product.replace(".npz", ".json")


def test_jobs_on_a_gpu_share_processes_and_one_that_fails_stops_no_other(logs, monkeypatch):
    def main():
        if sys.argv[1] == "fails":
            raise UserError("no such thing")
        open(sys.argv[1], "w").close()

    stage = types.ModuleType("stage")
    stage.main = main
    monkeypatch.setitem(sys.modules, "stage", stage)
    arguments = gpu.parse_arguments(["--jobs", "2", "--device", "cpu", "--limit", "60"])
    arguments.out = "out"
    monkeypatch.setattr(gpu, "words_of", lambda command, args: shlex.split(command.words))
    jobs = [
        ("broken", [study.Command("stage fails", "a"), study.Command("stage b", "b")]),
        ("sound", [study.Command("stage c", "c"), study.Command("stage d", "d")]),
        ("other", [study.Command("stage e", "e")]),
    ]
    assert gpu.run_jobs(jobs, arguments) == ["broken"]
    assert sorted(name for name in os.listdir() if name != "out") == ["c", "d", "e"]
    with open("out/log/gpu_broken.txt") as log:
        assert "no such thing" in log.read()


def test_a_limit_ends_the_jobs_on_a_gpu(logs):
    code = """
import sys, time, types
from study import gpu, run
stage = types.ModuleType("stage")
stage.main = lambda: time.sleep(100) if "slow" in sys.argv else open(sys.argv[1], "w").close()
sys.modules["stage"] = stage
gpu.words_of = lambda command, args: command.words.split()
args = gpu.parse_arguments(["--jobs", "2", "--device", "cpu", "--limit", "3"])
args.out = "out"
# More jobs than a pipe holds.
jobs = [("slow", [run.Command("stage slow", "a")]), ("quick", [run.Command("stage b", "b")])]
jobs += [(f"job {k} " + "x" * 1000, [run.Command("stage slow", "c")]) for k in range(500)]
print(len(gpu.run_jobs(jobs, args)))
"""
    environment = dict(os.environ, PYTHONPATH=ROOT)
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "501"
    assert os.path.exists("b")


# --------------------------------------------------------------------------------------------------
# The paper's runs


def follows_repa(args):
    """In the flags of train_sit.py."""
    assert args.repa == 0.5
    assert args.batch_size == 256
    assert not args.flip
    assert not args.ema_warmup


def follows_the_paper(args):
    """In the flags of train_vae.py."""
    assert args.epochs == 80
    assert args.batch_size == 1024
    assert args.lr == 3e-4
    assert args.align_weight == 1.0


def follows_repa_e(args):
    """What REPA-E's code does where the paper is silent, in the flags of train_vae.py."""
    assert args.lpips_rescale
    assert not args.autocast_losses
    assert args.init.split("/")[1] == args.init_disc.split("/")[1] or args.init == args.init_disc
    assert args.init_disc.endswith(("-discriminator-ckpt.pt", "50ep.ckpt"))
    assert args.disc_lr == 1e-4
    assert not args.clip_together
    assert args.mapper_init == "xavier"
    assert args.mapper_norm == "running"
    assert not args.flip
    assert args.ema == 0
    assert args.vfm_norm is None


@pytest.mark.parametrize("table", paper.TABLES)
def test_the_papers_commands_parse_and_have_its_settings(table):
    for entry in paper.TABLES[table]:
        first_number = entry.paper_numbers.removeprefix("r = ").split(" ")[0]
        assert float(first_number) > -1
        for command in paper.commands(table, entry):
            words = words_of(command)
            args = PARSERS[words[0]].parse_arguments(words[1:])
            if words[0] == "train_sit.py":
                assert args.epochs == (800 if "800" in entry.title else 80)
                follows_repa(args)
            if words[0] == "sample.py":
                assert args.precision == "fp32"
            if words[0] == "train_vae.py" and args.align == "mapper":
                follows_the_paper(args)
                follows_repa_e(args)
                share_batch(args.batch_size // 8, args.accum)


@pytest.mark.parametrize("name", paper.VAES)
def test_the_papers_networks_fit_each_other(name):
    """On the meta device, with every vision model as timm builds it under its name: the mapper's
    tokens are as many and as wide as the vision model's, so are the SiT's, and its velocity has the
    latents' shape."""
    args, networks = paper.make_vae(name)
    vae = networks.net.vae
    mapper = networks.net.mapper
    x = torch.zeros(2, 3, args.resolution, args.resolution, device="meta")
    t = torch.zeros(2, device="meta")
    labels = torch.zeros(2, dtype=torch.long, device="meta")
    z = vae.encode(x)[0]
    assert vae.decode(z).shape == x.shape
    if mapper is not None:
        assert mapper(z, t, z).shape == networks.vfm(x).shape
    _, networks = paper.make_sit(vae, "--size B")
    v, tokens = networks.net(z, t, labels, tokens=True)
    assert v.shape == z.shape
    assert tokens.shape == networks.vfm(x).shape
    assert tokens.shape == (2, 256 if args.resolution == 256 else 1024, 768)
    assert networks.net.patch == (2 if vae.factor == 8 else 1)


def test_hours_are_those_of_the_published_operation_counts():
    """SiT-XL/2 on 32 x 32 latents is DiT-XL/2's network: 118.6 GFLOP for a forward pass by the DiT
    paper, which counts a multiplication with its addition once. DINOv2-B has 257 tokens and in each
    of its 12 blocks 12 products of 768 x 768 per token and two of attention."""
    _, networks = paper.make_vae("sdvae-as-is")
    vae = networks.net.vae
    args, networks = paper.make_sit(vae, "--size XL --epochs 80")
    t = torch.zeros(1, device="meta")
    z = paper.empty_latents(vae)
    assert z.shape == (1, 4, 32, 32)
    forward = paper.forward_operations(networks.net, z, t, paper.empty_labels()) / 2
    vision = paper.forward_operations(networks.vfm, paper.empty_images(vae)) / 2
    step = paper.operations(paper.sit_step, networks, args) / 2
    assert forward == pytest.approx(118.6e9, rel=0.01)
    assert vision == pytest.approx(12 * 257 * 768 * (12 * 768 + 2 * 257), rel=0.01)
    # The projector, 3% of a forward pass, comes on top.
    assert step == pytest.approx(3 * forward + vision, rel=0.05)
    entry = paper.Entry("", "", "sdvae-as-is", "--size XL --epochs 80")
    spent = paper.hours("system", entry)
    assert spent["SiT"] == pytest.approx(2 * step * 80 * 1281167 / (0.4 * 989e12) / 3600)


def test_paper_prints_what_to_download_and_that_hours_are_computed():
    text = "\n".join(paper.describe("probe"))
    for word in ("computed", "not measured", "CelebA", "REPA-E/invae", ".1385"):
        assert word in text
    assert "VIRTUAL" not in text
    assert "VIRTUAL_imagenet512.npz" in "\n".join(paper.downloads("init"))


# --------------------------------------------------------------------------------------------------
# Data and the page


def test_attributes_are_in_awa2s_form(tmp_path):
    for name in attributes.CLASSES:
        os.makedirs(tmp_path / "train" / name)
        for i in range(10):
            (tmp_path / "train" / name / f"{i}.png").write_bytes(b"x")
    # A link from an earlier run, to data that have been moved since.
    folder = tmp_path / "attributes"
    os.makedirs(folder / "JPEGImages")
    os.symlink("/moved/away", folder / "JPEGImages" / "cat")

    attributes.write_attributes(str(tmp_path), str(folder))
    bench = benchmarks.read_awa2(str(folder), probe.parse_arguments([]))
    assert bench.attributes == list(attributes.ATTRIBUTES)
    horses = bench.targets[[name.startswith("horse/") for name in bench.names]]
    present = {a for a, value in zip(bench.attributes, horses[0], strict=True) if value}
    assert present == {
        "animal",
        "four_legs",
        "hooves",
        "fur",
        "carries_people",
        "larger_than_a_man",
    }


def write_runs(sets, arguments=()):
    """Writes what runs leave in out/.

    sets: {(VAE, SiT seed, SiT step, suffix): distance in the classifier's features}; the other
    numbers follow from it. arguments: {VAE: flags in its config.json}.
    """
    provenance = dict(
        commit="abcdef0123", dirty=False, torch="9.9", device="a card", date="2030-01-02 03:04:05"
    )
    os.makedirs("out/samples", exist_ok=True)
    for (vae, seed, step, suffix), distance in sets.items():
        judged = dict(
            classifier=distance,
            target=10 * distance,
            told=distance / 10,
            settings=dict(sit_step=step, precision="fp32", provenance=provenance),
        )
        write_json(f"out/samples/{vae}_{seed}_{step}{suffix}.json", judged)
    for vae, flags in dict(arguments).items():
        os.makedirs(f"out/vae_{vae}", exist_ok=True)
        write_json(f"out/vae_{vae}/config.json", dict(arguments=flags, provenance=provenance))


def page(quick=False, points=(100, 200, 300), compare=300, vaes=("plain", "send")):
    """The text of the page about the runs in out/."""
    os.makedirs("docs", exist_ok=True)
    args = study.parse_arguments(["--quick"] if quick else [])
    args.size = study.Size(1, 1, points, compare)
    args.out = "out"
    args.results = "out/R.md"
    report.write(args, list(vaes))
    with open("out/R.md") as file:
        return file.read()


def test_first_steps_have_averaged_and_raw_weights_and_their_difference(inside):
    sets = {}
    for seed in range(3):
        for vae, distance in (("plain", 9.0), ("send", 7.0)):
            name = f"{vae}-early{study.EARLY_RATES[0]:g}"
            sets[name, seed, 100, ""] = 20 + seed
            sets[name, seed, 100, "-raw"] = distance + 0.1 * seed
    write_runs(sets)
    text = page()
    assert "0.995^n of the initial weights: 61% at step 100" in text
    half = 2.776 * (2 / 3) ** 0.5
    assert f"| 0.001 | EMA | plain - send | 0 [{-half:.3g}, {half:.3g}] | - | - | - |" in text
    raw = next(line for line in text.split("\n") if "| 0.001 | raw | plain - send |" in line)
    # Two groups of three values with standard deviation 0.1: t(0.975, 4) = 2.776.
    half = 2.776 * 0.1 * (2 / 3) ** 0.5
    assert f"2 [{2 - half:.3g}, {2 + half:.3g}]" in raw
    assert "| 0.0003 |" not in text


def test_longer_training_is_compared_over_the_seeds_of_the_vaes(inside):
    sets = {}
    for k, suffix in enumerate(("", "_s1", "_s2")):
        for step, kind, plain, send in (
            (2000, "", 6.0, 4.0),
            (5000, "", 5.0, 3.5),
            (20000, "", 3.0, 3.1),
            (20000, "-guided", 2.0, 1.0),
        ):
            sets[f"plain{suffix}-20k", 0, step, kind] = plain + 0.1 * k
            sets[f"send{suffix}-20k", 0, step, kind] = send + 0.1 * k
    sets["plain_short-20k", 0, 2000, ""] = 5.0
    write_runs(sets)
    text = page()
    text = text[text.index("## 17.") :]
    assert "| plain_s1-20k | 6.1 (1) | 5.1 (1) | 3.1 (1) | 2.1 (1) | 31 (1) | 21 (1) |" in text
    assert "plain_short" not in text
    # Two groups of three values with standard deviation 0.1: t(0.975, 4) = 2.776.
    half = 2.776 * 0.1 * (2 / 3) ** 0.5
    assert (
        f"difference over VAE seeds 2 [{2 - half:.3g}, {2 + half:.3g}]. The direction agrees"
        in text
    )
    assert f"-0.1 [{-0.1 - half:.3g}, {-0.1 + half:.3g}]. The direction is undecided" in text
    assert "Step 20000, guided: send 1.1 ± 0.25 (3) is 48% lower than plain 2.1 ± 0.25 (3)" in text
    assert os.path.exists("docs/long.png")


def test_the_cost_of_alignment_is_given_for_each_base(inside):
    psnrs = dict(plain=33.0, send=31.5, plain_long=36.0, send_long=35.6)
    write_runs({}, {"base": dict(steps=5, align="none"), "base_long": dict(steps=30, align="none")})
    os.makedirs("out/judged")
    for vae, psnr in psnrs.items():
        write_json(f"out/judged/{vae}.json", dict(psnr=psnr, ssim=0.5))
    with open("out/vae_base_long/metrics.jsonl", "w") as file:
        file.write('{"step": 10, "val_psnr": 30.0}\n{"step": 30, "val_psnr": 35.5}\n')
    text = page()
    # 10^-3.15 is 7.08e-4 and 10^-3.3 is 5.01e-4.
    assert "| base | 5 | - | 33.00 | 31.50 | -1.50 | +2.07 | - | - |" in text
    assert "| base_long | 30 | 35.50 | 36.00 | 35.60 | -0.40 | +0.24 | - | - |" in text
    assert "| scratch |" not in text


def test_report_has_means_intervals_and_speed_up(inside):
    sets = {}
    for vae, offset in (("plain", 1), ("send", 0)):
        for seed in range(3):
            for step in (100, 200, 300):
                sets[vae, seed, step, ""] = 5 - step / 100 + offset + 0.1 * seed
    write_runs(sets)
    # A set under the name of step 300 that was drawn from another step must not count.
    with open("out/samples/send_0_300.json") as file:
        wrong = dict(json.load(file), settings=dict(sit_step=100, precision="fp32"))
    write_json("out/samples/send_3_300.json", wrong)

    text = page()
    # The interval is t(0.975, 2) = 4.303 times the deviation of 0.1 over sqrt(3).
    assert "| plain | 11.40 | 3.1 ± 0.25 (3) | 31 ± 2.5 (3) |" in text
    assert (
        "- Step 300: send 2.1 is 32% lower than plain 3.1 (paper: 34% lower). Difference 1, over "
        "SiT seeds [0.773, 1.23]. The direction agrees."
    ) in text
    # Seed s of send is at plain's last mean, 3.1, at step 190 + 10 s. 300 / (190, 200, 210) are
    # 1.579, 1.5 and 1.429 times faster.
    assert "(3.1) at step 200 ± 25 (3), in 3 of 3 SiTs: 1.5 ± 0.19 (3) times faster" in text
    assert (
        "## 2. Noise injection\n\n"
        "Not measured yet. Paper: no_noise 8.42, send 7.57; noise injection off and on."
    ) in text
    assert "- 3 SiT seeds: plain, send" in text
    with Image.open("docs/study.png") as image:
        assert image.size == (720, 400)


def test_no_speed_up_where_the_first_point_is_below_already(inside):
    write_runs(
        {
            ("plain", 0, 100, ""): 4.0,
            ("plain", 0, 300, ""): 3.0,
            ("send", 0, 100, ""): 2.0,
            ("send", 0, 300, ""): 1.0,
        }
    )
    expected = (
        "No speed-up can be given: of 1 SiTs on `send`, 1 are at or below `plain`'s distance of "
        "step 300"
    )
    assert expected in page(points=(100, 300))


def test_quick_report_has_section_1_costs_and_ifid_only(inside):
    sets = {}
    for vae in ("plain", "send"):
        for step in (100, 300):
            for suffix in ("", "-guided", "-again"):
                sets[vae, 0, step, suffix] = 3.0
        write_measures(vae)
    write_runs(sets)
    text = page(quick=True, points=(100, 300))
    titles = [line[:5] for line in text.splitlines() if line.startswith("## ")]
    assert titles == ["## 1.", "## 9.", "## 14"]
    assert "| send | 3 | 1 | 3 (1) |\n" in text
    assert os.path.exists("out/study.png")
    assert not os.listdir("docs")
    assert "The direction does not agree, but one seed gives no interval." in text


def test_report_counts_draw_sit_seeds_and_vae_seeds_separately(inside):
    """Draws 0.2 apart have a deviation of 0.2 / sqrt(2); SiT seeds at 4.0, 4.2 and 4.4 one of 0.2;
    VAE seeds with means 4.2, 4.6 and 5.0 one of 0.4. The interval over VAE seeds is Welch's, that
    of a control with one run is t(0.975, 4) sqrt(2) times the spread of runs."""
    sets = {}
    for vae, base in (("plain", 4.0), ("send", 2.0)):
        for k, name in enumerate((vae, f"{vae}_s1", f"{vae}_s2")):
            for seed in range(3):
                sets[name, seed, 100, ""] = base + 0.4 * k + 0.2 * seed
        for seed in range(3):
            sets[vae, seed, 300, ""] = 1.0 + 0.1 * seed
            sets[vae, seed, 300, "-again"] = 1.2 + 0.1 * seed
    sets["shuffled", 0, 100, ""] = 3.0
    write_runs(sets)
    vaes = ["plain", "send", "plain_s1", "send_s1", "plain_s2", "send_s2", "shuffled", "base"]
    text = page(points=(100, 300), compare=100, vaes=vaes)

    assert "| the draw of 1,000 samples | 300 | 0.14 (3 pairs) | 0.14 (3 pairs) |" in text
    assert "| seed of the SiT | 300 | 0.1 (3) | 0.1 (3) |" in text
    assert "| seed of the SiT | 100 | 0.2 (3) | 0.2 (3) |" in text
    assert "| seed of the VAE's tuning, one SiT each | 100 | 0.4 (3) | 0.4 (3) |" in text
    assert "mean of its SiTs: plain 4.6 ± 0.99 (3), send 2.6 ± 0.99 (3)" in text

    # With equal spreads and sizes, Welch's interval is Student's.
    half = stats.t.ppf(0.975, 4) * 0.4 * (2 / 3) ** 0.5
    assert (
        f"over VAE seeds (3 and 3) 2 [{2 - half:.3g}, {2 + half:.3g}]. The direction agrees."
    ) in text
    # 3.0 against 2.2, the mean of send's SiTs.
    half = stats.t.ppf(0.975, 4) * 0.4 * 2**0.5
    assert (
        f"Difference 0.8; from the spread over VAE seeds [{0.8 - half:.3g}, {0.8 + half:.3g}]. The "
        "direction is undecided"
    ) in text
    assert "- send against base at step 100: not measured yet." in text
    assert "- missing: base" in text


def test_the_spread_over_vae_seeds_is_of_means_over_the_sits_in_question(inside):
    """Over the seeds of the VAE, SiT 0 has 1, 2, 3, and the mean of SiTs 0 and 1 has 1, 3, 5. The
    third seed has no SiT 2."""
    values = {"plain": (1, 1, 7), "plain_s1": (2, 4, 7), "plain_s2": (3, 7)}
    write_runs(
        {(vae, k, 100, ""): float(v) for vae, vs in values.items() for k, v in enumerate(vs)}
    )
    found = results.Results("out", (100,), 100)
    assert found.vae_seed_spread({0}) == (pytest.approx(1), 2)
    assert found.vae_seed_spread({0, 1}) == (pytest.approx(2), 2)
    assert found.vae_seed_spread({2}) == (0, 1)
    assert found.vae_seed_spread({3}) is None
    assert found.over_vae_seeds("plain") == [3, pytest.approx(13 / 3), 5]


def test_report_names_machine_and_date_and_which_vaes_are_aligned(inside, monkeypatch):
    # A remark on the machine would follow its line.
    monkeypatch.setattr(report, "REMARKS", {})
    mapper = dict(align="mapper", shuffle_targets=False, vfm_weights="net.safetensors")
    flags = {
        "plain": dict(align="none"),
        "send": mapper,
        "shuffled": dict(mapper, shuffle_targets=True),
        "random_teacher": dict(mapper, vfm_weights="runs/study/random.safetensors"),
    }
    write_runs({}, flags)
    found = results.Results("out", (300,), 300)
    kinds = {vae: found.kind(vae) for vae in flags}
    assert kinds == {
        "plain": "none",
        "send": "aligned",
        "shuffled": "control",
        "random_teacher": "control",
    }
    assert (
        "4 training runs: 2030-01-02 to 2030-01-02; a card; torch 9.9; commits abcdef0.\n"
    ) in page()
    write_runs({("plain", 0, 300, ""): 3.0})
    assert "1 sets of samples, in fp32: 2030-01-02 to 2030-01-02; a card; torch 9.9" in page()


@pytest.fixture
def six_vaes(inside):
    """Writes runs of six VAEs and returns their names. The distance falls with the class probe
    exactly; of the ranks of PSNR, one pair is exchanged. Three are aligned, which is too few for
    columns of their own."""
    vaes = ["plain", "send", "plain_s1", "send_s1", "plain_s2", "send_s2"]
    flags = {vae: dict(align="none" if "plain" in vae else "mapper") for vae in vaes}
    write_runs({(vae, 0, 300, ""): 10.0 - k for k, vae in enumerate(vaes)}, flags)
    for k, vae in enumerate(vaes):
        accuracy = {
            f"out/vae_{vae}": [0.4 + 0.02 * k, 0.3, 0.6],
            "1024 pixels": [0.394, 0.38, 0.41],
        }
        result = dict(results=dict(classes=dict(accuracy=accuracy)))
        write_json(f"out/probe_{vae}/result.json", result)
        write_json(f"out/judged/{vae}.json", dict(psnr=30.0 + SIX_PSNR[k], ssim=0.9))
    return vaes


SIX_PSNR = [0, 1, 2, 3, 5, 4]


def test_report_correlates_measures_with_distances(six_vaes):
    text = page(vaes=six_vaes)
    section = text[text.index("## 8.") : text.index("## 9.")]
    lines = {line.split(" | ")[0]: line for line in section.splitlines()}
    perfect = "-1.00 [-1.00, -1.00] (6)"
    assert f"| {perfect} | {perfect} | not enough (3) | not enough (3) |" in lines["| class probe"]
    pearson = stats.pearsonr(SIX_PSNR, range(10, 4, -1))[0]
    assert f"| {pearson:.2f} [" in lines["| PSNR"]
    assert "| -0.94 [" in lines["| PSNR"]
    assert "Best ranking of all VAEs (largest |Spearman|): class probe, 1.00." in text
    assert "Best ranking of aligned" not in text
    with Image.open("docs/probe.png") as image:
        assert image.size == (720, 400)


def test_report_has_probe_and_costs_of_what_was_measured(six_vaes):
    text = page(vaes=six_vaes)
    assert "Class probe without a VAE: 1024 pixels 39.4%." in text
    # `base` is not there, so the controls are not compared; no rates were logged.
    assert "plain 30.00 dB" not in text
    assert "Alignment: PSNR" not in text
    assert "| send | 31.00 | 0.900 | - |" in text


def test_remarks_stand_in_their_section_and_undecided_directions_are_named(
    inside, monkeypatch, capsys
):
    monkeypatch.setattr(report, "REMARKS", {})
    distances = dict(send=2.0, plain=1.0, shuffled=1.0)
    sets = {(vae, 0, 300, ""): distance for vae, distance in distances.items()}
    write_runs(sets, dict(plain=dict(align="none")))
    page()
    assert "sections [1, 10], which have no remark" in capsys.readouterr().out
    monkeypatch.setattr(report, "REMARKS", {1: "Because of this.", "machine": "An abacus."})
    text = page()
    assert "sections [10], which have no remark" in capsys.readouterr().out
    assert "An abacus." in text
    assert "An abacus." not in page(quick=True)
    assert text.index("## 1.") < text.index("Because of this.") < text.index("## 2.")


# --------------------------------------------------------------------------------------------------
# What is recorded of an earlier training


def full_page(vaes):
    """The text of the page of the full study's size about the runs in out/."""
    os.makedirs("docs", exist_ok=True)
    args = study.parse_arguments([])
    args.out = "out"
    args.results = "out/R.md"
    report.write(args, list(vaes))
    with open("out/R.md") as file:
        return file.read()


def test_another_recipe_has_no_record():
    assert results.read_recorded(study.SIZES["full"]) is not None
    assert results.read_recorded(study.SIZES["quick"]) is None
    assert results.read_recorded(study.SIZES["full"]._replace(tune_steps=5001)) is None


def test_the_runs_are_compared_with_those_of_the_earlier_training(inside):
    recorded = results.read_recorded(study.SIZES["full"])["vaes"]
    changes = {"plain": 0.1, "send": -0.3, "no_noise": 0.1, "depth0": 0.2}
    sets = {}
    for vae, change in changes.items():
        psnr = recorded[vae]["measures"]["PSNR"] + change
        write_json(f"out/judged/{vae}.json", dict(psnr=psnr, ssim=0.9))
        distance = recorded[vae]["distances"]["750"]["mean"]
        sets[vae, 0, 750, ""] = distance + change - 0.1
        sets[vae, 1, 750, ""] = distance + change + 0.1
    sets["plain", 0, 2000, ""] = 7.08
    sets["send", 0, 2000, ""] = 3.21
    write_runs(sets)
    section = full_page(changes).partition("## 18. ")[2].partition("\n## ")[0]
    lines = {line.split(" | ")[0]: line for line in section.splitlines()}
    assert lines["| PSNR"].startswith("| PSNR | 4 | +0.025 | 0.19 | -0.3 (send) | 1.4 | ")
    psnr = np.array([recorded[vae]["measures"]["PSNR"] for vae in changes])
    expected = stats.pearsonr(psnr, psnr + list(changes.values()))[0]
    assert lines["| PSNR"].endswith(f" | {expected:.2f} |")
    assert "| 4 | +0.025 | 0.19 | -0.3 (send) |" in lines["| distance, classifier, step 750"]
    assert lines["| distance, classifier, step 2000"].startswith(
        "| distance, classifier, step 2000 | 2 | -0.5 | 0.71 | -1 (send) |"
    )
    assert lines["| distance, classifier, step 2000"].endswith(" | - |")
    # Only the main pair has sets of both steps. Then: 9.77 - 6.04, and 7.08 - 4.21.
    assert lines["| plain - send"] == "| plain - send | +3.73 | +4.13 | +2.87 | +3.87 |"
    assert "| no_noise - send" not in lines


# --------------------------------------------------------------------------------------------------
# What predicts


def test_every_vae_has_one_family():
    names = [name for vaes, _ in predictors.FAMILIES.values() for name in vaes]
    assert len(names) == len(set(names))
    for vae in study.vaes_of(study.QUESTIONS):
        assert predictors.family(vae) in predictors.FAMILIES


def planted_table(families=5, per_family=4):
    """x (n,3), y (n,) and families (n,): y is 2 x0 - x1 and some noise, and x2 has no part in it.
    Families differ in their means."""
    rng = np.random.default_rng(0)
    names = np.repeat([f"f{k}" for k in range(families)], per_family)
    x = rng.normal(size=(len(names), 3)) + np.repeat(rng.normal(size=(families, 3)), per_family, 0)
    y = 2 * x[:, 0] - x[:, 1] + 0.01 * rng.normal(size=len(names))
    return x, y, names


def test_a_family_has_no_part_in_its_own_predictions():
    x, y, names = planted_table()
    predictions = predictors.predict_left_out(x[:, :2], y, names)
    assert predictors.error_of(predictions, y) < 0.03
    out = names == "f3"
    changed = predictors.predict_left_out(x[:, :2], np.where(out, 100, y), names)
    assert np.array_equal(changed[out], predictions[out])
    assert not np.allclose(changed[~out], predictions[~out])
    # Against least squares without standardisation.
    design = np.column_stack([np.ones(len(y)), x[:, :2]])
    weights = np.linalg.lstsq(design[~out], y[~out], rcond=None)[0]
    assert np.allclose(predictions[out], design[out] @ weights)
    # Without measures it is the mean of the others.
    mean = predictors.predict_left_out(x[:, :0], y, names)
    assert np.allclose(mean[out], y[~out].mean())


def test_the_choice_is_the_planted_pair_and_is_left_to_the_other_families():
    x, y, names = planted_table()
    pairs = [(0, 1), (0, 2), (1, 2)]
    assert predictors.best_choice(x, y, names, pairs) == (0, 1)
    anew = predictors.predict_with_choice(x, y, names, pairs)
    assert np.allclose(anew, predictors.predict_left_out(x[:, :2], y, names))


def test_correlations_without_a_family_go_from_the_weakest_to_the_strongest():
    vaes = ["plain", "plain_s1", "plain_s2", "send", "send_s1", "send_s2", "vavae"]
    values = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]
    distances = [7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 9.0]
    numbers = {vae: {"iFID": value} for vae, value in zip(vaes, values, strict=True)}
    table = predictors.Table(1, vaes, dict(zip(vaes, distances, strict=True)), numbers)
    found = predictors.correlations_without_families(table, "iFID", predictors.pearson)
    assert set(found) == {"plain", "send", "loss"}
    assert found["loss"] == pytest.approx(-1)
    assert found["plain"] == pytest.approx(stats.pearsonr(values[3:], distances[3:])[0])
    without_send = stats.pearsonr(values[:3] + values[6:], distances[:3] + distances[6:])[0]
    assert found["send"] == pytest.approx(without_send)
    cell = predictors.without_family_cell(table, "iFID", predictors.pearson)
    assert cell == f"{found['send']:.2f} (without send) to -1.00 (without loss)"


def test_two_sits_are_compared_over_the_vaes_that_have_both(inside):
    vaes = ["plain", "send", "mlp", "vavae", "depth0"]
    rng = np.random.default_rng(0)
    distances = rng.normal(size=(len(vaes), 3))
    # depth0 has no third SiT.
    sets = {
        (vae, k, 300, ""): distances[i, k]
        for i, vae in enumerate(vaes)
        for k in range(3)
        if (vae, k) != ("depth0", 2)
    }
    write_runs(sets)
    found = results.Results("out", (300,), 300)
    pairs = [(distances[:, 0], distances[:, 1])]
    pairs += [(distances[:4, k], distances[:4, 2]) for k in (0, 1)]
    pearsons, spearmans = predictors.agreement_of_sits(found, vaes, 300)
    assert pearsons == pytest.approx(np.mean([stats.pearsonr(x, y)[0] for x, y in pairs]))
    assert spearmans == pytest.approx(np.mean([stats.spearmanr(x, y)[0] for x, y in pairs]))
    assert predictors.agreement_of_sits(found, vaes[:3], 300) is None
    assert predictors.agreement_of_sits(found, [], 300) is None


def write_measures(vae, ifid=3.0):
    """Writes results of a VAE with the costs of its measures."""
    label = f"out/vae_{vae}"
    spent = dict(encoding=2.0, decoding=3.0)
    judged = dict(psnr=30.0, ssim=0.9, pictures=2000, reconstruction_classifier=1.5)
    write_json(f"out/judged/{vae}.json", dict(judged, processor_seconds=spent))
    record = dict(
        neighbours=10,
        seed=0,
        interpolation="slerp",
        weights="softmax",
        latents="encoded",
        training=dict(pictures=500),
    )
    record["nearest by"] = "cosine"
    record["held out"] = 2000
    result = dict(ifid=ifid, rfid=1.0, interpolation=record, processor_seconds=50.0)
    write_json(f"out/judged/{vae}-ifid.json", result)
    about = dict(
        uniformity=dict(points=10000),
        editing=dict(steps=[-3, 3], judge_f1_macro=0.7, pictures=128),
        processor_seconds=dict(probe=4.0, uniformity=0.5, mixture=8.0, disentanglement=1.0),
    )
    about["processor_seconds"]["editing"] = 6.0
    measured = {"accuracy": 0.5, "F1 macro": 0.6, "Gini of density": 0.3, "edit: leakage": 0.4}
    measured["edit: own change"] = 0.8
    for suffix in ("", "_attributes", "_editing"):
        result = dict(
            results=dict(b={name: {label: [value]} for name, value in measured.items()}),
            fits={f"b, {label}": about},
            benchmarks=dict(b=dict(pictures=[10000, 4000, 6000])),
            vaes={label: dict(hash=f"hash of {vae}")},
        )
        write_json(f"out/probe_{vae}{suffix}/result.json", result)


def test_costs_count_what_a_measure_needs(inside):
    """Encoding takes a millisecond a picture."""
    for vae in ("plain", "send"):
        write_measures(vae)
    found = results.Results("out", (300,), 300)
    expected = {
        "PSNR": 5.0,
        "effective rank of channels": 2.0,
        "iFID": 50.0,
        "Gini of density": 10.0 + 0.5,
        "class probe": 20.0 + 4.0,
        "DCI completeness": 20.0 + 4.0 + 1.0,
        "leakage": 20.0 + 4.0 + 6.0,
    }
    for measure, seconds in expected.items():
        assert predictors.cost(found, ["plain", "send"], measure) == pytest.approx(seconds)
    assert predictors.cost(found, ["absent"], "iFID") is None


def test_the_page_has_ifid_editing_and_the_scale(inside, pictures, monkeypatch):
    for vae in ("plain", "send"):
        write_measures(vae)
    os.makedirs("data/cifar10")
    os.symlink(pictures, "data/cifar10/test")
    net = judge.Classifier(2)
    torch.save(dict(net.state_dict(), accuracy=torch.tensor(0.5)), "out/classifier.pt")
    os.makedirs("study")
    write_runs({("plain", 0, 750, ""): 8.0})
    text = full_page(["plain", "send"])
    assert "| plain | 3 | 1 | 8 (1) | - |" in text
    assert "| send | - | - | - | - | - | 0.8 | 0.4 | 0.5 |" in text
    with open("study/scale.json") as file:
        scale = json.load(file)
    assert scale["data"] == ImageSet(pictures).fingerprint
    assert scale["classifier"] == state_hash(net.state_dict())
    assert scale["settings"]["held out"] == 2000
    assert scale["settings"]["interpolated with"] == 500
    plain = scale["vaes"]["plain"]
    assert plain["hash"] == "hash of plain"
    assert (plain["psnr"], plain["floor"], plain["ifid"]) == (30.0, 1.5, 3.0)
    assert (plain["class probe"], plain["gini"], plain["leakage"]) == (0.5, 0.3, 0.4)
    assert plain["dci completeness"] is None
    assert (plain["distance 750"], plain["distance 2000"]) == (8.0, None)


def test_the_best_measure_is_named_with_its_error_and_cost(inside):
    """The distance is twice iFID and a little; eight VAEs of four families."""
    vaes = ["plain", "plain_s1", "send", "send_s1", "depth0", "mlp", "weight2", "weight0.5"]
    for k, vae in enumerate(vaes):
        write_measures(vae, ifid=float(k))
    numbers = {vae: dict.fromkeys(results.MEASURES, 1.0) for vae in vaes}
    rng = np.random.default_rng(0)
    for k, vae in enumerate(vaes):
        numbers[vae].update(iFID=float(k), PSNR=rng.normal(), SAP=rng.normal())
    distances = {vae: 2.0 * k + 0.1 * rng.normal() for k, vae in enumerate(vaes)}
    table = predictors.Table(300, vaes, distances, numbers)
    found = results.Results("out", (300,), 300)
    text = "\n".join(predictors.fit_lines(found, table, "all", vaes))
    assert "Best single measure: iFID." in text
    rows = {line.split(" | ")[0]: line for line in text.splitlines()}
    assert rows["| iFID"].endswith("| 0.98 | 50 |") or rows["| iFID"].endswith("| 1.00 | 50 |")
    assert rows["| none: the mean of the others"].endswith("| - | - |")
    few = predictors.fit_lines(found, table, "all", vaes[:4])
    assert few[0] == "Step 300, all VAEs (4 with all measures): not enough families (2) for a fit."


# --------------------------------------------------------------------------------------------------
# Figures


@pytest.fixture
def drawn(monkeypatch):
    """A list that takes every figure that is saved."""
    found = []
    monkeypatch.setattr(figures, "save", lambda figure, path: found.append(figure))
    return found


def test_curves_start_at_zero_and_run_through_the_means(drawn):
    figures.draw_curves("x.png", "title", "steps", {"one": ("navy", {100: [3.0, 5.0], 300: [2.0]})})
    axes = drawn[0].axes[0]
    line, *dots = axes.lines
    assert line.get_xydata().tolist() == [[100, 4], [300, 2]]
    places = np.concatenate([marks.get_xydata() for marks in dots])
    assert places.tolist() == [[100, 3], [100, 5], [300, 2]]
    assert axes.get_xlim()[0] == 0
    assert axes.get_ylim()[0] == 0
    assert axes.get_xticks().tolist() == [100, 300]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["one"]


def test_names_of_crowded_dots_cover_neither_each_other_nor_a_dot(drawn):
    crowd = [(0.01 * k, 0.01 * k, f"name_{k}") for k in range(6)]
    groups = {"crowd": ("navy", crowd), "far": ("firebrick", [(1.0, 1.0, "far")])}
    figures.draw_scatter("x.png", "title", "x", groups)
    axes = drawn[0].axes[0]
    names = [text for text in axes.texts if text.get_text()]
    assert [text.get_text() for text in names] == [*(name for _, _, name in crowd), "far"]
    boxes = [text.get_window_extent() for text in names]
    dots = axes.transData.transform([(x, y) for x, y, _ in [*crowd, (1.0, 1.0, "")]])
    for k, box in enumerate(boxes):
        assert box.count_overlaps(boxes[:k]) == 0
        assert box.count_contains(dots) == 0


def test_panels_share_families_and_name_every_dot(drawn):
    groups = {
        "one": ("navy", [(0.0, 0.0, "a"), (0.01, 0.01, "b")]),
        "two": ("firebrick", [(1.0, 1.0, "c")]),
    }
    figures.draw_panels("x.png", "title", [("first", groups), ("second", groups), ("3", groups)])
    panels = [axes for axes in drawn[0].axes if axes.get_visible()]
    assert [axes.get_xlabel() for axes in panels] == ["first", "second", "3"]
    assert [text.get_text() for text in drawn[0].legends[0].get_texts()] == ["one", "two"]
    for axes in panels:
        names = [text for text in axes.texts if text.get_text()]
        assert [text.get_text() for text in names] == ["a", "b", "c"]
        boxes = [text.get_window_extent() for text in names]
        assert boxes[1].count_overlaps(boxes[:1]) == 0


def test_a_missing_matplotlib_is_named_with_the_way_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(UserError, match=r"pip install -r study/requirements\.txt"):
        figures.figure_class()


def test_pictures_are_stacked_only_if_all_are_there(inside):
    Image.new("RGB", (30, 10), "red").save("a.png")
    assert not figures.stack_pictures(["a.png", "b.png"], "c.png")
    assert not os.path.exists("c.png")
    Image.new("RGB", (20, 10), "blue").save("b.png")
    assert figures.stack_pictures(["a.png", "b.png"], "c.png")
    with Image.open("c.png") as image:
        assert image.width == 30
        assert image.getpixel((0, 0)) == (255, 0, 0)
        assert image.getpixel((0, 26)) == (0, 0, 255)


# --------------------------------------------------------------------------------------------------
# Judges


def test_latents_of_two_classes_lie_apart_on_the_first_axis():
    """Points along one direction with a little noise: the first axis has their variance and orders
    them."""
    t = torch.linspace(-1, 1, 50).double()
    noise = 1e-3 * torch.sin(torch.arange(150.0)).view(50, 3)
    x = t[:, None] * torch.tensor([3.0, 4.0, 0.0]) + noise
    places, shares = judge.principal_plane(x)
    assert shares[0] > 0.999
    assert shares.sum() <= 1 + 1e-9
    assert places.shape == (50, 2)
    assert torch.allclose(places[:, 0].abs(), 5 * t.abs(), atol=0.01)


def test_latents_are_drawn_side_by_side(pictures, inside):
    os.symlink(pictures, "test")
    small = models.VAE("f4d4", 32, 32, [1, 1, 1], 1)
    for name in ("a", "b"):
        write_weights(f"{name}.safetensors", "vae", small.state_dict(), small.config, {})
    files = ["a.safetensors", "b.safetensors"]
    script(judge, "latents", *files, "--data", ".", "--num", 20, "--out", "l.png")
    with Image.open("l.png") as image:
        pixels = np.asarray(image.convert("RGB"))
    assert pixels.shape == (560, 1280, 3)
    # Each panel has dots of both classes.
    for panel in (pixels[:, :600], pixels[:, 600:1150]):
        colours = {tuple(colour) for colour in panel.reshape(-1, 3).tolist()}
        assert (204, 0, 0) in colours
        assert (0, 204, 204) in colours


def test_noise_of_one_level(pictures, vfm_weights, inside):
    """--noise-kind constant changes the run: after one step the mapper's loss is that of t = 0.5
    and not that of uniform t."""
    losses = {}
    for kind in ("flow", "constant"):
        flags = ["--data", pictures, "--vfm-weights", vfm_weights, "--gan", 0, "--steps", 1]
        script(train_vae, *VAE, *flags, "--noise-kind", kind, "--out", kind)
        with open(f"{kind}/metrics.jsonl") as file:
            losses[kind] = json.loads(file.readline())["align"]
    assert losses["flow"] != losses["constant"]
    args = train_vae.parse_arguments(["--noise-kind", "constant"])
    _, t, _ = train_vae.draw_noise((4, 2, 2), torch.arange(4), 0, args)
    assert t.tolist() == [0.5] * 4


def test_the_classifier_learns_two_classes_that_differ_in_brightness(inside):
    rng = np.random.default_rng(0)
    for part in ("train", "test"):
        for label, name in enumerate("ab"):
            os.makedirs(f"{part}/{name}")
            for i in range(200):
                pixels = rng.integers(128 * label, 128 + 128 * label, (16, 16, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(f"{part}/{name}/{i}.png")
    words = "classifier --data . --out c.pt --size 16 --workers 0"
    script(judge, *words.split())
    assert read_weights("c.pt")[0]["accuracy"] > 0.9
    net = judge.load_classifier("c.pt")
    test = fid.Pictures("test", size=16)
    assert judge.accuracy(net, test) == pytest.approx(read_weights("c.pt")[0]["accuracy"].item())


def test_the_distance_of_a_set_from_itself_is_nothing_and_of_a_shifted_one_the_shift():
    """128 features that are all larger by 1 have a squared distance of 128."""
    features = torch.randn(200, 128, generator=torch.Generator().manual_seed(0))
    stub = judge.Judge.__new__(judge.Judge)
    stub.real = dict(classifier=features, target=features)
    assert stub.distances(stub.real)["classifier"] < 1e-6
    moved = dict(classifier=features + 1, target=features)
    assert stub.distances(moved)["classifier"] == pytest.approx(128, rel=1e-4)


def small_vae(path):
    """Writes a VAE with random weights, for pictures of 32 pixels."""
    torch.manual_seed(0)
    vae = models.VAE("f4d4", 32, 32, [1, 1, 1], 1)
    write_weights(path, "vae", vae.state_dict(), vae.config, {})


def test_ifid_is_the_distance_of_interpolations_in_the_classifiers_features(pictures, inside):
    """Against a formula without covariances: tr (S S')^(1/2) is the nuclear norm of the product of
    the centred features over n - 1."""
    for name in ("train", "test"):
        os.symlink(pictures, name)
    small_vae("v.safetensors")
    net = judge.Classifier(2).eval()
    torch.save(dict(net.state_dict(), accuracy=torch.tensor(0.5)), "c.pt")
    words = "ifid v.safetensors --data . --classifier c.pt --num 16 --neighbours 20 --out o/i.json"
    script(judge, *words.split())
    with open("o/i.json") as file:
        result = json.load(file)
    assert os.path.exists("o/i.png")
    record = result["interpolation"]
    assert record["held out"] == 16
    assert record["training"]["pictures"] == 20
    assert record["neighbours"] == 10
    assert result["processor_seconds"] > 0

    vae = load_vae("v.safetensors")
    held_out = fid.Pictures("test", 16, 32)
    training = fid.TrainingLatents(vae, fid.Pictures("train", 20, 32), torch.device("cpu"), 0)
    joined = [images for _, images in fid.Interpolations(vae, held_out, training).batches()]
    with torch.no_grad():
        a = net(torch.cat(joined))[1].double().numpy()
        b = net(held_out.stack(np.arange(16), 32))[1].double().numpy()
    expected = np.square(a.mean(0) - b.mean(0)).sum()
    a -= a.mean(0)
    b -= b.mean(0)
    expected += (np.square(a) + np.square(b)).sum() / 15
    expected -= 2 * np.linalg.norm(a @ b.T, "nuc") / 15
    assert result["ifid"] == pytest.approx(expected, rel=1e-4)
    assert result["rfid"] != result["ifid"]


def test_without_a_vision_model_there_is_only_the_classifiers_distance(pictures, inside):
    os.symlink(pictures, "train")
    net = judge.Classifier(2).eval()
    torch.save(dict(net.state_dict(), accuracy=torch.tensor(0.5)), "c.pt")
    words = ["vae", "none", "--data", ".", "--classifier", "c.pt", "--real", "20"]
    found = judge.Judge(judge.parse_arguments(words))
    small_vae("v.safetensors")
    latents, measured = judge.measure_reconstructions(
        load_vae("v.safetensors"), found, fid.Pictures("train", 8, 32)
    )
    assert latents.shape == (8, 4, 8, 8)
    spent = measured.pop("processor_seconds")
    assert set(spent) == {"encoding", "decoding"}
    assert set(measured) == {"reconstruction_classifier", "psnr", "ssim"}
