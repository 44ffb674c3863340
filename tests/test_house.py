"""The rules of the house: standard format, simple functions, who may import whom, forks that hold
all they need, and documents whose files and flags exist."""

import ast
import functools
import graphlib
import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest
from radon.complexity import add_inner_blocks, cc_visit

import fid
import probe
import sample
import train_sit
import train_vae
from bench.evaluators import random_inception
from conftest import ROOT, SIT, VAE, script
from tools.pictures import draw_pictures

HOUSE = pathlib.Path(ROOT)
FOLDERS = ["common", "probing", "study", "bench", "tools", "tests"]
TOP_LEVEL = ["demo", "fid", "models", "probe", "sample", "train_sit", "train_vae"]
STAGES = [fid, probe, sample, train_sit, train_vae]


def python_files():
    """Every Python file of ours, as paths relative to the root."""
    files = [*HOUSE.glob("*.py")]
    for folder in FOLDERS:
        files += (HOUSE / folder).rglob("*.py")
    return sorted(path.relative_to(HOUSE) for path in files)


def documents():
    """README and its like, and the pages of docs/."""
    return sorted([*HOUSE.glob("*.md"), *(HOUSE / "docs").rglob("*.md")])


# --------------------------------------------------------------------------------------------------
# Form


def run_ruff(*words):
    return subprocess.run(
        [sys.executable, "-m", "ruff", *words, "--no-cache", "."],
        cwd=HOUSE,
        capture_output=True,
        text=True,
    )


def test_the_format_is_ruff_s():
    done = run_ruff("format", "--check")
    assert done.returncode == 0, done.stdout + done.stderr


def test_ruff_finds_nothing():
    done = run_ruff("check", "--output-format", "concise")
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_exception_from_ruff_s_rules_has_a_reason():
    for path in python_files():
        for line in (HOUSE / path).read_text().splitlines():
            exception = re.search(r"#\s*noqa(.*)", line)
            if exception:
                assert re.fullmatch(r": [A-Z]+\d+\W+\w.*", exception[1]), f"{path}: {line}"


HIGHEST_COMPLEXITY = 15
# {"path name": reason}. Better to leave it empty.
COMPLEX_WITH_A_REASON = {}


def complexities():
    """{"path name": cyclomatic complexity} of all functions, methods and classes, nested ones
    included, as `radon cc` counts it. That of a class is the average of its methods."""
    found = {}
    for path in python_files():
        for block in add_inner_blocks(cc_visit((HOUSE / path).read_text())):
            found[f"{path} {block.fullname}"] = block.complexity
    return found


def test_functions_are_simple():
    found = complexities()
    assert found
    too_complex = {name: n for name, n in found.items() if n > HIGHEST_COMPLEXITY}
    unexcused = {name: n for name, n in too_complex.items() if name not in COMPLEX_WITH_A_REASON}
    assert not unexcused
    assert set(COMPLEX_WITH_A_REASON) <= set(too_complex), "these exceptions are no longer needed"


# --------------------------------------------------------------------------------------------------
# Imports

COMMON = [
    "common.files",
    "common.draws",
    "common.processes",
    "common.archives",
    "common.contents",
    "common.flags",
    "common.pictures",
    "common.training",
    "common.runs",
    "common.published",
    "common.weights",
]

# What each stage calls, beside models.py and common/. A fork of the stage is a copy of all of it.
CALLS = {
    "train_vae": ["fid", "probe", "probing"],
    "train_sit": ["sample", "fid"],
    "sample": [],
    "fid": [],
    "probe": ["probing"],
}

# All that each file, or each file of a folder, may import.
BASE = ["models", *COMMON]
EVERYTHING = [*BASE, *CALLS, "demo", "probing", "study", "bench", "tools"]
MAY_IMPORT = {
    "common.files": [],
    "common.draws": [],
    "common.processes": ["common.files"],
    "common.archives": ["common.files", "common.processes"],
    "common.contents": ["common.files", "common.processes"],
    "common.flags": ["common.files", "common.processes"],
    "common.pictures": [
        "common.files",
        "common.draws",
        "common.processes",
        "common.contents",
        "common.archives",
    ],
    "common.training": ["common.files", "common.processes", "common.flags"],
    "common.runs": [
        "common.files",
        "common.draws",
        "common.processes",
        "common.contents",
        "common.flags",
        "common.pictures",
        "common.training",
    ],
    "common.published": ["common.files", "models"],
    "common.weights": ["common.files", "common.processes", "common.published", "models"],
    "models": ["common.files"],
    **{stage: [*BASE, *called] for stage, called in CALLS.items()},
    # The tutorial draws its own pictures and trains its own vision model.
    "demo": [*BASE, "tools"],
    "probing": [*COMMON, "probing"],
    "study": EVERYTHING,
    "bench": EVERYTHING,
    "tools": EVERYTHING,
    "tests": EVERYTHING,
}


def imported_names(path):
    """Every name that a file imports, at its top or in a function: "a.b" for `import a.b` and for
    `from a import b`, and "a" for the latter too."""
    names = []
    for node in ast.walk(ast.parse((HOUSE / path).read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            names += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return names


@functools.cache
def import_graph():
    """{module: modules of ours that it imports, a set}, for every Python file of ours. That tests
    import each other is left out: they do so without their folder's name."""
    files = {}
    for path in python_files():
        if path.name != "__init__.py":
            files[".".join(path.with_suffix("").parts)] = path
    return {
        module: {name for name in imported_names(path) if name in files}
        for module, path in files.items()
    }


def key_in_table(module):
    """The key of MAY_IMPORT that a module is under: its own name, or its folder's."""
    if module in MAY_IMPORT:
        return module
    return module.split(".")[0]


def test_the_top_level_shows_models_stages_and_demo_only():
    assert sorted(path.stem for path in HOUSE.glob("*.py")) == TOP_LEVEL
    found = {path.relative_to(HOUSE).parts[0] for path in HOUSE.glob("[!.]*/*.py")}
    # runs/ and data/ are the user's.
    assert found - {"runs", "data"} == set(FOLDERS)
    assert sorted(f"common.{path.stem}" for path in HOUSE.glob("common/[!_]*.py")) == sorted(COMMON)


def test_nothing_imports_upwards():
    for module, imported in import_graph().items():
        allowed = MAY_IMPORT[key_in_table(module)]
        for name in imported:
            assert key_in_table(name) in allowed, f"{module} may not import {name}"


def test_no_imports_run_in_a_circle():
    # It raises a CycleError that names the circle.
    graphlib.TopologicalSorter(import_graph()).prepare()


# --------------------------------------------------------------------------------------------------
# Forks: a stage, what it calls, models.py and common/


def copy_stage(stage, folder):
    """Copies a stage and what it needs into a folder, and nothing else."""
    for name in (stage, "models", "common", *CALLS[stage]):
        if (HOUSE / name).is_dir():
            shutil.copytree(
                HOUSE / name, folder / name, ignore=shutil.ignore_patterns("__pycache__")
            )
        else:
            shutil.copy(HOUSE / f"{name}.py", folder)


@pytest.fixture(scope="module")
def material(tmp_path_factory, pictures, vfm_weights):
    """Folder with what the stages read: the run folders vae/ and sit/, six pictures in few/, random
    Inception weights, and benchmark/, pictures with attributes."""
    folder = tmp_path_factory.mktemp("material")
    shutil.copytree(pictures, folder / "few", ignore=shutil.ignore_patterns("0[3-9]*", "1*"))
    words = ["--data", pictures, "--vfm-weights", vfm_weights, "--steps", 1]
    script(train_vae, *VAE, *words, "--out", folder / "vae")
    script(train_sit, *SIT, *words, "--vae", folder / "vae", "--out", folder / "sit")
    random_inception(folder / "inception.pth")
    draw_pictures(str(folder / "benchmark"), per_class=20)
    return folder


def shortest_run(stage, material, pictures, vfm_weights):
    """The flags of a stage's shortest run that calls all that the stage can call, and the file that
    the run must write."""
    few = material / "few"
    training = ["--data", pictures, "--vfm-weights", vfm_weights, "--steps", 3]
    inception = ["--inception-weights", material / "inception.pth"]
    fids = ["--fid-every", 3, "--fid-num", 4, "--fid-ref", few, *inception]
    probes = ["--probe-every", 3, "--probe-data", material / "benchmark"]
    vae = ["--vae", material / "vae"]
    if stage == "train_vae":
        return [*VAE, *training, *fids, *probes, "--val", few], "runs/vae/vae.safetensors"
    if stage == "train_sit":
        return [*SIT, *training, *fids, *vae], "runs/sit/sit.safetensors"
    if stage == "sample":
        sit = ["--sit", material / "sit"]
        return [*sit, "--steps", 3, "--n", 1, "--out", "grid.png"], "grid.png"
    if stage == "fid":
        return [*vae, "--data", few, "--lpips", 0, *inception, "--out", "fid.json"], "fid.json"
    return [*vae, "--data", material / "benchmark", "--workers", 0], "runs/probe/result.json"


@pytest.mark.parametrize("stage", CALLS)
def test_a_fork_runs_in_an_empty_folder(stage, material, pictures, vfm_weights, tmp_path):
    copy_stage(stage, tmp_path)
    flags, result = shortest_run(stage, material, pictures, vfm_weights)
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, f"{stage}.py", *map(str, flags)],
        cwd=tmp_path,
        env=dict(environment, OMP_NUM_THREADS="1"),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / result).exists()


@pytest.mark.parametrize("stage", CALLS)
def test_a_fork_holds_all_that_its_stage_imports(stage):
    graph = import_graph()
    copied = [stage, *BASE, *CALLS[stage]]
    reached = {stage}
    waiting = [stage]
    while waiting:
        for name in graph[waiting.pop()] - reached:
            assert key_in_table(name) in copied, f"a fork of {stage} lacks {name}"
            reached.add(name)
            waiting.append(name)


# --------------------------------------------------------------------------------------------------
# Words


def test_readme_is_short():
    assert len((HOUSE / "README.md").read_text().splitlines()) <= 150


def test_no_path_of_one_machine():
    text_files = [HOUSE / path for path in python_files()]
    text_files += [*documents(), *HOUSE.glob("*.toml"), HOUSE / ".ci" / "run"]
    text_files += [*HOUSE.glob("requirements.txt"), *HOUSE.glob("*/requirements.txt")]
    for path in text_files:
        found = re.findall(r"(?<![\w.])/(?:home|Users|root|work|mnt)/\S+", path.read_text())
        assert not found, f"{path} names {found}"


def commands():
    """The commands in all documents that start a file of ours, as (document, file, rest of the
    command) triples. They are in blocks of code, where a backslash continues a line, or in
    sentences and tables. Those of docs/forking.md may need its changes, and tests/test_forks.py
    runs them.
    """
    pattern = r"(?:python|torchrun) (?:[^`|\n]*? )??(?:-m ([\w.]+)|([\w/]+\.py))([^`|#&;\n]*)"
    found = []
    for path in documents():
        if path.name == "forking.md":
            continue
        text = re.sub(r"\\\n\s*", "", path.read_text())
        for module, file, rest in re.findall(pattern, text):
            if module.split(".")[0] in FOLDERS:
                file = module.replace(".", "/") + ".py"
            if file:
                found.append((path.name, file, rest))
    return found


def test_every_file_that_a_command_starts_exists():
    found = commands()
    assert len(found) > 20
    for document, file, _ in found:
        assert (HOUSE / file).exists(), f"{document} has a command that starts {file}"


def test_every_flag_of_a_stage_s_command_exists(capsys):
    known = {}
    for stage in STAGES:
        with pytest.raises(SystemExit):
            stage.parse_arguments(["--help"])
        known[f"{stage.__name__}.py"] = capsys.readouterr().out
    for document, file, rest in commands():
        if file in known:
            for flag in re.findall(r"(?<!\S)--[\w-]+", rest):
                assert flag in known[file], f"{document}: {file} has no {flag}"


def test_every_link_to_a_file_leads_somewhere():
    for path in documents():
        for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text()):
            file = target.split("#")[0]
            if file and "://" not in file:
                assert (path.parent / file).exists(), f"{path.name} links to {target}"


def test_every_file_of_ours_that_a_document_names_exists():
    for path in documents():
        for name in re.findall(r"`([\w/]+\.(?:py|md))`", path.read_text()):
            assert (HOUSE / name).exists(), f"{path.name} names {name}"
