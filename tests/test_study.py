"""study/run.py: its commands parse, its jobs run in order; study/report.py says of runs what stands in their files;
study/paper.py: its commands parse and build networks that fit; study/judge.py."""

import json
import os
import shlex
import sys

import numpy as np
import pytest
import torch
from conftest import VAE, script
from PIL import Image
from scipy import stats

from common.files import write_json, write_weights
from common.flags import share_batch
import fid
import models
import probe
import sample
import train_sit
import train_vae
from probing import benchmarks
from study import judge, paper, report, run as study

PARSERS = {
    "train_vae.py": train_vae,
    "train_sit.py": train_sit,
    "sample.py": sample,
    "probe.py": probe,
    "fid.py": fid,
}


def words_of(command):
    words = shlex.split(command)
    words = words[1:] if words[0] == "python" else words
    return words[2:] if words[0] == "torchrun" else words


def test_every_command_parses():
    args = study.parse_arguments(["--vfm-weights", "w.safetensors", "--repa"])
    jobs = study.plan(args, "runs/study", study.SIZES["full"])
    for name, (after, commands) in jobs.items():
        assert all(
            list(jobs).index(a) < list(jobs).index(name) for a in after if a in jobs
        ) and set(after) <= set(jobs), name
        for command, _ in commands:
            words = words_of(command)
            if words[0] in PARSERS:
                PARSERS[words[0]].parse_arguments(words[1:])
            else:
                assert words[:2] in (["-m", "study.judge"], ["-m", "study.run"])
    assert len([name for name in jobs if name.startswith("vae ")]) >= 20


def left_by(sets, flags=()):
    """Writes out/samples/*.json as the judge does, {(VAE, seed, step, suffix): distance}, and each VAE's config.json."""
    os.makedirs("out/samples", exist_ok=True)
    for (vae, seed, step, suffix), value in sets.items():
        write_json(
            f"out/samples/{vae}_{seed}_{step}{suffix}.json",
            dict(
                classifier=value,
                target=10 * value,
                told=value / 10,
                settings=dict(sit_step=step, precision="fp32"),
            ),
        )
    for vae, arguments in dict(flags).items():
        os.makedirs(f"out/vae_{vae}", exist_ok=True)
        write_json(
            f"out/vae_{vae}/config.json",
            dict(
                arguments=arguments,
                provenance=dict(
                    commit="abcdef0123",
                    dirty=False,
                    torch="9.9",
                    device="a card",
                    date="2030-01-02 03:04:05",
                ),
            ),
        )


def written(quick=False, points=(100, 200, 300), compare=300, vaes=("plain", "send")):
    os.makedirs("docs", exist_ok=True)
    args, size = (
        study.parse_arguments(["--quick"] if quick else []),
        dict(base=1, tune=1, points=points, compare=compare),
    )
    report.write(args, "out", size, list(vaes), study.CLASSES, study.ATTRIBUTES, "out/R.md")
    return open("out/R.md").read()


# ---- the runner ------------------------------------------------------------------------------------------------------


def python_that(words):
    """A job's command line, run by the same Python."""
    return f"-c {shlex.quote(words)}"


def test_a_job_that_fails_takes_its_followers_with_it_and_no_others(inside):
    os.makedirs("out/log")

    def writes(name):
        return python_that(f"open('{name}', 'w')"), name

    fails = python_that("import sys; print('why'); sys.exit(1)"), "second"
    jobs = {
        "broken": ([], [writes("first"), fails, writes("third")]),
        "after broken": (["broken"], [writes("a")]),
        "after that": (["after broken"], [writes("b")]),
        "sound": ([], [writes("c")]),
        "after sound": (["sound"], [writes("d")]),
    }
    assert study.run_jobs(jobs, 2, 1, "out") == ["broken", "after broken", "after that"]
    assert sorted(name for name in os.listdir() if name != "out") == ["c", "d", "first"]
    assert "why" in open("out/log/broken.txt").read()


def test_done_products_are_skipped_and_a_run_that_a_signal_stopped_is_not_done(inside):
    os.makedirs("out/log"), os.makedirs("out/vae/checkpoints")
    note = "open('order', 'a').write('{} ')"
    jobs = {
        "job": (
            [],
            [
                (python_that(note.format(1)), "there"),
                (python_that(note.format(2)), "out/vae/checkpoints/5.pt"),
            ],
        )
    }
    open("there", "w").close()
    assert (
        study.run_jobs(jobs, 1, 1, "out") == ["job"] and open("order").read() == "2 "
    )  # it ended well, without its last step
    open("out/vae/checkpoints/5.pt", "w").close()
    assert study.run_jobs(jobs, 1, 1, "out") == [] and open("order").read() == "2 "


def test_the_most_urgent_job_that_is_ready_goes_first(inside):
    os.makedirs("out/log")
    jobs = {
        name: (after, [(python_that(f"open('order', 'a').write('{name} ')"), name)])
        for name, after in dict(late=["early"], early=[], other=[]).items()
    }
    assert study.run_jobs(jobs, 1, 1, "out") == [] and open("order").read() == "early late other "


def test_breadth_before_depth():
    """Every VAE has one SiT planned before any VAE outside the main pair gets a second."""
    names = list(study.plan(study.parse_arguments([]), "out", study.SIZES["full"]))
    vaes = [v for q in study.QUESTIONS.values() for v in q]
    second = names.index("sit plain_s1 1")
    assert all(names.index(f"sit {v} 0") < second for v in vaes) and names.index(
        "sit send 2"
    ) < names.index("sit plain_s1 0")
    quick = study.parse_arguments(["--quick"])
    quick.only, quick.seeds = ["main"], 1
    assert {
        n for n in study.plan(quick, "out", study.SIZES["quick"]) if n.startswith(("vae", "sit"))
    } == {"vae base", "vae plain", "vae send", "sit plain 0", "sit send 0"}


# ---- the paper's runs ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("table", paper.TABLES)
def test_the_papers_commands_parse(table):
    for row, expected, vaes, flags in paper.TABLES[table]:
        assert float(expected.strip("r = ").split(" ")[0]) > -1
        for command in paper.commands(table, vaes, flags):
            words = words_of(command)
            args = PARSERS[words[0]].parse_arguments(words[1:])
            if words[0] == "train_sit.py":
                assert (
                    args.repa == 0.5
                    and args.batch_size == 256
                    and args.epochs == (800 if "800" in row else 80)
                )
            if words[0] == "train_vae.py" and args.align == "mapper":
                assert (args.epochs, args.batch_size, args.lr, args.align_weight) == (
                    80,
                    1024,
                    3e-4,
                    1.0,
                )
                share_batch(args.batch_size // 8, args.accum)


@pytest.mark.parametrize("name", paper.VAES)
def test_the_papers_networks_fit_each_other(name):
    """On the meta device, every vision model in the form that timm has under its name: the mapper's tokens are as many and as
    wide as the vision model's, so are the SiT's, and its velocity has the latents' shape."""
    with torch.device("meta"):
        args, vae, vfm, mapper = paper.make_vae(name)
        x = torch.zeros(2, 3, args.resolution, args.resolution)
        z = vae.encode(x)[0]
        assert vae.decode(z).shape == x.shape
        if mapper is not None:
            assert mapper(z, torch.zeros(2), z).shape == vfm(x).shape
        _, sit, vfm = paper.make_sit(vae, "--size B")
        v, tokens = sit(z, torch.zeros(2), torch.zeros(2, dtype=torch.long), tokens=True)
        assert v.shape == z.shape and tokens.shape == vfm(x).shape == (
            2,
            256 if args.resolution == 256 else 1024,
            768,
        )
        assert sit.patch == (2 if vae.factor == 8 else 1)


def test_hours_are_those_of_the_published_operation_counts():
    """SiT-XL/2 on 32x32 latents is DiT-XL/2's network: 118.6 GFLOP a forward by the DiT paper, which counts a multiplication with
    its addition once. DINOv2-B has 257 tokens, in each of 12 blocks 12 products of 768 x 768 a token and two of attention."""
    with torch.device("meta"):
        _, vae, *_ = paper.make_vae("sdvae-as-is")
        args, sit, vfm = paper.make_sit(vae, "--size XL --epochs 80")
        z = torch.zeros(1, 4, 32, 32)
        once = paper.forward(sit, z, torch.zeros(1), torch.zeros(1, dtype=torch.long)) / 2
        seen = paper.forward(vfm, torch.zeros(1, 3, 256, 256)) / 2
        step = paper.operations(lambda: paper.sit_step(vae, sit, vfm)) / 2
    assert once == pytest.approx(118.6e9, rel=0.01) and seen == pytest.approx(
        12 * 257 * 768 * (12 * 768 + 2 * 257), rel=0.01
    )
    assert step == pytest.approx(3 * once + seen, rel=0.05)  # and the projector, 3% of a forward
    spent = paper.hours("system", "sdvae-as-is", "--size XL --epochs 80")
    assert spent["SiT"] == pytest.approx(2 * step * 80 * 1281167 / (0.4 * 989e12) / 3600)


def test_paper_prints_what_to_download_and_that_hours_are_computed():
    text = "\n".join(paper.describe("probe"))
    assert (
        "computed" in text
        and "not measured" in text
        and "CelebA" in text
        and "REPA-E/invae" in text
        and ".1385" in text
    )
    assert "VIRTUAL" not in text and "VIRTUAL_imagenet512.npz" in "\n".join(paper.downloads("init"))


# ---- data and report -------------------------------------------------------------------------------------------------


def test_attributes_are_in_awa2s_form(tmp_path):
    for name in study.CLASSES:
        os.makedirs(tmp_path / "train" / name)
        for i in range(10):
            (tmp_path / "train" / name / f"{i}.png").write_bytes(b"x")
    os.makedirs(tmp_path / "out" / "attributes" / "JPEGImages")
    os.symlink("/moved/away", tmp_path / "out" / "attributes" / "JPEGImages" / "cat")
    study.write_attributes(str(tmp_path), str(tmp_path / "out"))
    args = probe.parse_arguments([])
    bench = benchmarks.read_awa2(str(tmp_path / "out" / "attributes"), args)
    horse = bench.targets[[n.startswith("horse/") for n in bench.names]][0]
    assert bench.attributes == list(study.ATTRIBUTES) and {
        a for a, v in zip(bench.attributes, horse) if v
    } == {"animal", "four_legs", "hooves", "fur", "carries_people", "larger_than_a_man"}


def test_report_has_means_intervals_and_speed_up(inside):
    left_by(
        {
            (vae, seed, n, ""): 5 - n / 100 + (vae == "plain") + 0.1 * seed
            for vae in ("plain", "send")
            for seed in range(3)
            for n in (100, 200, 300)
        }
    )
    with open("out/samples/send_0_300.json") as file:
        wrong = dict(json.load(file), settings=dict(sit_step=100, precision="fp32"))
    with open(
        "out/samples/send_3_300.json", "w"
    ) as file:  # drawn from another step: must not count
        json.dump(wrong, file)
    text = written()
    assert (
        "| plain | 11.40 | 3.1 ± 0.25 (3) | 31 ± 2.5 (3) |" in text
    )  # t(0.975, 2) 4.303 * std 0.1 / sqrt(3)
    assert (
        "- Step 300: send 2.1, plain 3.1, 32% lower (paper: 34% lower); difference 1, over SiT seeds [0.773, 1.23]. The direction "
        "agrees." in text
    )
    # seed s of send is at plain's last mean 3.1 at step 190 + 10 s; 300 / (190, 200, 210) are 1.579, 1.5, 1.429 times faster
    assert "(3.1) at step 200 ± 25 (3), 3 of 3 SiTs: 1.5 ± 0.19 (3) times faster" in text
    assert (
        "## 2. Noise injection\n\nNot measured yet. Paper: no_noise 8.42, send 7.57, noise off and on."
        in text
    )
    assert "- 3 SiT seeds: plain, send" in text and Image.open("docs/study.png").size == (720, 400)


def test_no_speed_up_where_the_first_point_is_below_already(inside):
    left_by(
        {
            ("plain", 0, 100, ""): 4.0,
            ("plain", 0, 300, ""): 3.0,
            ("send", 0, 100, ""): 2.0,
            ("send", 0, 300, ""): 1.0,
        }
    )
    assert (
        "No speed-up can be given: of 1 SiTs on `send`, 1 are at `plain`'s distance of step 300"
        in written(points=(100, 300))
    )


@pytest.mark.parametrize(
    "low,high,expected",
    [(0, 21, [0, 5, 10, 15, 20]), (0.39, 0.57, [0.4, 0.45, 0.5, 0.55]), (-3, 3, range(-3, 4))],
)
def test_axes_have_round_numbers(low, high, expected):
    assert report.ticks(low, high) == pytest.approx(list(expected))


def test_quick_report_has_section_1_and_costs_only(inside):
    left_by(
        {
            (vae, 0, n, s): 3.0
            for vae in ("plain", "send")
            for n in (100, 300)
            for s in ("", "-guided", "-again")
        }
    )
    text = written(quick=True, points=(100, 300))
    titles = [line for line in text.splitlines() if line.startswith("## ")]
    assert titles == ["## 1. Alignment against none", "## 9. What does it cost?"]
    assert os.path.exists("out/study.png") and not os.listdir("docs")
    assert "The direction does not agree, but with one seed there is no interval." in text


def test_report_counts_draw_sit_seeds_and_vae_seeds_separately(inside):
    """Draws 0.2 apart have a deviation of 0.2 / sqrt(2); SiT seeds at 4.0, 4.2, 4.4 of 0.2; VAE seeds with means 4.2, 4.6, 5.0 of
    0.4. The interval over VAE seeds is Welch's, that of a control with one run t(0.975, 4) sqrt(2) times the spread of runs."""
    sets = {}
    for vae, base in (("plain", 4.0), ("send", 2.0)):
        for k, name in enumerate((vae, f"{vae}_s1", f"{vae}_s2")):
            sets.update({(name, seed, 100, ""): base + 0.4 * k + 0.2 * seed for seed in range(3)})
        for seed in range(3):
            sets.update(
                {
                    (vae, seed, 300, ""): 1.0 + 0.1 * seed,
                    (vae, seed, 300, "-again"): 1.2 + 0.1 * seed,
                }
            )
    sets["shuffled", 0, 100, ""] = 3.0
    left_by(sets)
    names = ["plain", "send", "plain_s1", "send_s1", "plain_s2", "send_s2", "shuffled", "base"]
    text = written(points=(100, 300), compare=100, vaes=names)
    assert "| the draw of 1,000 samples | 300 | 0.14 (3 pairs) | 0.14 (3 pairs) |" in text
    assert (
        "| seed of the SiT | 300 | 0.1 (3) | 0.1 (3) |" in text
        and "| seed of the SiT | 100 | 0.2 (3) | 0.2 (3) |" in text
    )
    assert "| seed of the VAE's tuning, one SiT each | 100 | 0.4 (3) | 0.4 (3) |" in text
    assert "mean of its SiTs: plain 4.6 ± 0.99 (3), send 2.6 ± 0.99 (3)" in text
    half = (
        stats.t.ppf(0.975, 4) * 0.4 * (2 / 3) ** 0.5
    )  # equal spreads and sizes: Welch's is Student's
    assert (
        f"over VAE seeds (3 and 3) 2 [{2 - half:.3g}, {2 + half:.3g}]. The direction agrees."
        in text
    )
    half = stats.t.ppf(0.975, 4) * 0.4 * 2**0.5  # 3.0 against the mean 2.2 of send's SiTs
    assert (
        f"difference 0.8; by the spread of VAE seeds [{0.8 - half:.3g}, {0.8 + half:.3g}]. The direction is open"
        in text
    )
    assert "- send against base, step 100: not measured yet." in text and "- missing: base" in text


def test_report_names_machine_and_date_and_which_vaes_are_aligned(inside):
    plain, mapper = (
        dict(align="none"),
        dict(align="mapper", shuffle_targets=False, vfm_weights="net.safetensors"),
    )
    left_by(
        {},
        dict(
            plain=plain,
            send=mapper,
            shuffled=dict(mapper, shuffle_targets=True),
            random_teacher=dict(mapper, vfm_weights="runs/study/random.safetensors"),
        ),
    )
    results = report.Results("out", (300,), 300)
    assert [results.kind(v) for v in ("plain", "send", "shuffled", "random_teacher")] == [
        "none",
        "aligned",
        "control",
        "control",
    ]
    assert (
        "4 training runs, 2030-01-02 to 2030-01-02, on: a card a process; torch 9.9; no samples yet; commits abcdef0."
        in written()
    )


def test_report_correlates_measures_with_distances(inside):
    """Six VAEs whose distance falls with the probe exactly and whose PSNR has one pair of ranks exchanged; three are aligned, which
    is too few for their own columns."""
    vaes = ["plain", "send", "plain_s1", "send_s1", "plain_s2", "send_s2"]
    flags = {v: dict(align="none" if "plain" in v else "mapper") for v in vaes}
    left_by({(v, 0, 300, ""): 10.0 - k for k, v in enumerate(vaes)}, flags)
    os.makedirs("out/judged")
    for k, v in enumerate(vaes):
        os.makedirs(f"out/probe_{v}")
        accuracy = {f"out/vae_{v}": [0.4 + 0.02 * k, 0.3, 0.6], "1024 pixels": [0.394, 0.38, 0.41]}
        write_json(
            f"out/probe_{v}/result.json", dict(results=dict(classes=dict(accuracy=accuracy)))
        )
        write_json(f"out/judged/{v}.json", dict(psnr=30.0 + [0, 1, 2, 3, 5, 4][k], ssim=0.9))
    text = written(vaes=vaes)
    assert "Class probe without a VAE: 1024 pixels 39.4%." in text
    rows = {line.split(" | ")[0]: line for line in text.splitlines()}
    assert (
        "| -1.00 [-1.00, -1.00] (6) | -1.00 [-1.00, -1.00] (6) | not enough (3) | not enough (3) |"
        in rows["| class probe"]
    )
    psnr = [0, 1, 2, 3, 5, 4]
    assert (
        f"| {stats.pearsonr(psnr, range(10, 4, -1))[0]:.2f} [" in rows["| PSNR"]
        and "| -0.94 [" in rows["| PSNR"]
    )
    assert (
        "Ranks all VAEs best (largest |Spearman|): class probe, 1.00." in text
        and "Ranks aligned" not in text
    )
    assert "plain 30.00 dB" not in text  # base is not there, so the three are not compared
    assert (
        "Alignment: PSNR" not in text and "| send | 31.00 | 0.900 | - |" in text
    )  # no rates were logged
    assert Image.open("docs/probe.png").size == (720, 400)


def test_remarks_stand_in_their_section_and_open_directions_are_named(inside, monkeypatch, capsys):
    monkeypatch.setattr(report, "REMARKS", {})
    distances = dict(send=2.0, plain=1.0, shuffled=1.0)
    left_by({(v, 0, 300, ""): d for v, d in distances.items()}, dict(plain=dict(align="none")))
    text = written()
    assert "sections [1, 10], write REMARKS" in capsys.readouterr().out
    monkeypatch.setattr(report, "REMARKS", {1: "Because of this.", "machine": "An abacus."})
    text = written()
    assert "sections [10], write REMARKS" in capsys.readouterr().out and "An abacus." in text
    assert text.index("## 1.") < text.index("Because of this.") < text.index("## 2.")


def test_latents_of_two_classes_lie_apart_on_the_first_axis():
    """Points along one direction with a little noise: the first axis has their variance and orders them."""
    t = torch.linspace(-1, 1, 50).double()
    x = t[:, None] * torch.tensor([3.0, 4.0, 0.0]) + 1e-3 * torch.sin(torch.arange(150.0)).view(
        50, 3
    )
    places, share = judge.principal_plane(x)
    assert share[0] > 0.999 and share.sum() <= 1 + 1e-9 and places.shape == (50, 2)
    assert torch.allclose(places[:, 0].abs(), 5 * t.abs(), atol=0.01)


def test_latents_are_drawn_side_by_side(pictures, inside):
    os.symlink(pictures, "test")
    small = models.VAE("f4d4", 32, 32, [1, 1, 1], 1)
    for name in ("a", "b"):
        write_weights(f"{name}.safetensors", "vae", small.state_dict(), small.config, {})
    script(
        judge,
        "latents",
        "a.safetensors",
        "b.safetensors",
        "--data",
        ".",
        "--num",
        20,
        "--out",
        "l.png",
    )
    with Image.open("l.png") as image:
        left, right = (np.asarray(image.crop((640 * i, 0, 640 * i + 640, 560))) for i in (0, 1))
    colours = {tuple(c) for c in left.reshape(-1, 3)}
    assert (
        left.shape == right.shape and (204, 0, 0) in colours and (0, 204, 204) in colours
    )  # a class each


def test_noise_of_one_level(pictures, vfm_weights, inside):
    """--noise-kind constant is a run of its own: after one step the mapper's loss is that of t = 0.5, not of t uniform."""
    losses = {}
    for kind in ("flow", "constant"):
        script(
            train_vae,
            *VAE,
            "--data",
            pictures,
            "--vfm-weights",
            vfm_weights,
            "--gan",
            0,
            "--steps",
            1,
            "--noise-kind",
            kind,
            "--out",
            kind,
        )
        with open(f"{kind}/metrics.jsonl") as file:
            losses[kind] = json.loads(file.readline())["align"]
    assert losses["flow"] != losses["constant"]
    assert train_vae.mapper_times(0, torch.arange(4), "constant").tolist() == [0.5] * 4


def test_classifier_and_distances(tmp_path, monkeypatch):
    """Two classes that differ in brightness are learned, and a set's distance from itself is nothing, from another much."""
    rng = np.random.default_rng(0)
    for part in ("train", "test"):
        for label, name in enumerate("ab"):
            os.makedirs(tmp_path / part / name)
            for i in range(200):
                pixels = rng.integers(128 * label, 128 + 128 * label, (16, 16, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / part / name / f"{i}.png")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        sys,
        "argv",
        ["judge", "classifier", "--data", ".", "--out", "c.pt", "--size", "16", "--workers", "0"],
    )
    judge.main()
    net = judge.load_classifier("c.pt")
    assert judge.read_weights("c.pt")[0]["accuracy"] > 0.9
    x = np.stack([np.asarray(Image.open(f"test/a/{i}.png")) for i in range(200)])
    np.savez("a.npz", arr_0=x, labels=np.zeros(200, np.int64))
    pictures = judge.fid.Pictures("a.npz")
    found = [net(images)[1] for _, images in pictures.batches(torch.device("cpu"), 0)]
    a = torch.cat(found).detach()
    stub = judge.Judge.__new__(judge.Judge)
    stub.real = dict(classifier=a, target=a)
    assert stub.distances(dict(classifier=a, target=a))["classifier"] < 1e-6
    assert stub.distances(dict(classifier=a + 1, target=a))["classifier"] == pytest.approx(
        128, rel=1e-4
    )
