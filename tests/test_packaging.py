"""The contents of a built wheel, and that CI runs the commands of the README."""

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

from paligemma_jax.files.shipped import SHIPPED
from train_jax.config.command_line import load_config

ROOT = Path(__file__).parent.parent
PACKAGES = ("train_jax", "paligemma_jax", "flow_jax")
MAX_TINY_BYTES = 8 * 2**20
MAIN_JOB = (
    "python3 -m venv .venv && . .venv/bin/activate && pip install -e . && python train.py --config=configs/clevr.py"
)
TESTS = 'python3 -m venv .venv && . .venv/bin/activate && pip install -e ".[dev]" && pytest'


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel built offline from a copy, so that the checkout is not changed and a stale build/ not used."""
    copy = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    for name in PACKAGES:
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", ".*"))
    script = "from setuptools import build_meta; build_meta.build_wheel('dist')"
    result = subprocess.run([sys.executable, "-c", script], cwd=copy, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    (path,) = (copy / "dist").glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        yield archive


def sources(*suffixes):
    """Returns the files of the packages, named as in the wheel."""
    files = [file for package in PACKAGES for suffix in suffixes for file in (ROOT / package).rglob(f"*{suffix}")]
    return {str(file.relative_to(ROOT)) for file in files}


def shipped():
    """Returns the files of the shipped models, named as in the wheel."""
    return {str(file.relative_to(ROOT)): file for folder in SHIPPED.values() for file in folder.iterdir()}


def test_wheel_holds_the_tiny_models(wheel):
    in_tree = {name: file.read_bytes() for name, file in shipped().items()}
    in_wheel = {name: wheel.read(name) for name in wheel.namelist() if name.startswith("paligemma_jax/tiny")}
    assert in_wheel == in_tree
    assert {"paligemma_jax/tiny/tokenizer.model", "paligemma_jax/tiny_siglip/tokenizer.model"} <= in_wheel.keys()
    assert sum(map(len, in_wheel.values())) <= MAX_TINY_BYTES


def test_wheel_holds_the_packages_and_nothing_else(wheel):
    names = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert {name for name in names if name.endswith(".py")} == sources(".py")
    typed = {f"{package}/py.typed" for package in PACKAGES}
    assert {name for name in names if not name.endswith(".py")} == set(shipped()) | typed


def test_wheel_metadata(wheel):
    (name,) = [name for name in wheel.namelist() if name.endswith(".dist-info/METADATA")]
    metadata = Parser().parsestr(wheel.read(name).decode())
    assert metadata["Requires-Python"] == ">=3.11"
    assert metadata["License-Expression"] == "Apache-2.0"
    assert {"cuda", "tpu", "parquet", "dev"} <= set(metadata.get_all("Provides-Extra"))
    versions = {f"Programming Language :: Python :: 3.{minor}" for minor in (11, 12, 13)}
    assert versions <= set(metadata.get_all("Classifier"))
    assert name.replace("METADATA", "licenses/LICENSE") in wheel.namelist()


def test_the_command_of_the_wheel_lists_its_subcommands(wheel, tmp_path):
    """Run from the wheel's own files, in a folder without the repository."""
    wheel.extractall(tmp_path)
    (metadata,) = tmp_path.glob("*.dist-info")
    (script,) = importlib.metadata.PathDistribution(metadata).entry_points.select(group="console_scripts")
    assert (script.name, script.value) == ("paligemma-jax", "paligemma_jax.commands.cli:main")
    code = f"import {script.module} as module; print(module.__file__); module.{script.attr}()"
    command = [sys.executable, "-c", code]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    result = subprocess.run([*command, "--help"], cwd=tmp_path, env=environment, capture_output=True, text=True)
    file, *lines = result.stdout.splitlines()
    assert result.returncode == 0 and Path(file) == tmp_path / "paligemma_jax/commands/cli.py", result.stderr
    assert [line.split()[0] for line in lines[2:]] == ["train", "eval", "predict", "plan", "convert"]
    result = subprocess.run([*command, "trian"], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 2 and "unknown subcommand 'trian'" in result.stderr


def test_the_readme_has_the_two_commands_and_what_they_name_exists():
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert lines.count(MAIN_JOB) == lines.count(TESTS) == 1
    script, config = re.search(r"python (\S+) --config=(\S+)$", MAIN_JOB).groups()
    assert (ROOT / script).is_file()
    assert load_config(str(ROOT / config)).task == "paligemma_jax.tasks.vqa:VQA"


def test_ci_runs_the_readmes_test_command():
    ci = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    steps = TESTS.split(" && ")
    assert all(re.search(rf"^{re.escape(step)}(\s|$)", ci, re.MULTILINE) for step in steps[2:])


def test_every_documented_extra_exists():
    """In documents and in messages of the packages: `[dev]`, ".[parquet]", paligemma-jax[hub]."""
    documents = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
    code = [file for package in PACKAGES for file in (ROOT / package).rglob("*.py")]
    told = set()
    for files, before in ((documents, r"(?:\.|`|paligemma-jax)"), (code, r"(?:\"\.|paligemma-jax)")):
        for file in files:
            for names in re.findall(before + r"\[([a-z]+(?:,[a-z]+)*)\]", file.read_text(encoding="utf-8")):
                told |= set(names.split(","))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert {"cuda", "tpu", "dev", "hub", "parquet"} <= told <= set(project["optional-dependencies"])
