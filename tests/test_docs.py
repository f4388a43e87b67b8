"""The pages and docstrings: their commands parse, and the files, headings and names that they point to exist."""

import ast
import functools
import importlib
import importlib.util
import re
import shlex
import sys
from pathlib import Path

import pytest
from absl import flags

import flow_jax
import paligemma_jax
from tests.test_configs import check
from train_jax.config import command_line

ROOT = Path(__file__).parents[1]
PAGES = ["README.md", "CONTRIBUTING.md", *sorted(f"docs/{file.name}" for file in (ROOT / "docs").glob("*.md"))]
MODULES = [
    str(file.relative_to(ROOT))
    for folder in ("configs", "benchmarks", "train_jax", "paligemma_jax", "flow_jax")
    for file in sorted((ROOT / folder).rglob("*.py"))
]
WITH_CONFIG = ("train", "eval", "predict", "train_jax.plan", "flow_jax.fid")  # take --config, --workdir or both
NOT_HERE = {"configs/x.py", "sweep.md", "trainers/constants.py"}  # a placeholder, a sweep's report, CoPrompt's own code
BLOCK = re.compile(r"^```[^\n]*\n(.*?)^```", re.M | re.S)


def read(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def code(page: str) -> list[str]:
    """The lines of the code blocks of a page or of a module's docstring, continued ones joined, and its inline code."""
    text = (ast.get_docstring(ast.parse(read(page))) or "") if page.endswith(".py") else read(page)
    text = text.replace("\\\n", " ")
    blocks = [text] if page.endswith(".py") else BLOCK.findall(text)
    lines = [line for block in blocks for line in block.splitlines() if line.startswith("    ") or ".md" in page]
    return lines + [" ".join(part.split()) for part in re.findall(r"`([^`]+)`", BLOCK.sub("", text))]


def commands(page: str) -> list[str]:
    """The calls of our scripts and modules in a page, without `python`; optional parts are written out."""
    calls = []
    for line in code(page):
        for part in re.split(r" && | \| ", line.partition(" # ")[0]):
            command = re.search(r"(?:^|\s)python3? (-m \S+.*|\S+\.py.*)", part.strip())
            if command and not command[1].startswith("-m venv"):
                words = shlex.split(re.sub(r"[\[\]]", " ", command[1]))
                calls.append(shlex.join(word for word in words if word not in ("...", "--config.key=value")))
    return calls


NAMED = sorted({(page, command) for page in (*PAGES, *MODULES) for command in commands(page)})


def module_of(words: list[str]) -> tuple[str, list[str]]:
    """The module that a command runs, and the command's arguments."""
    if words[0] == "-m":
        return words[1], words[2:]
    assert (ROOT / words[0]).is_file(), f"there is no {words[0]}"
    return words[0].removesuffix(".py").replace("/", "."), words[1:]


def flags_of(name: str) -> set[str]:
    """The flags that a module takes: as it declares them, or as its source names them for argparse."""
    spec = importlib.util.find_spec(name)
    assert spec is not None, f"there is no module {name}"
    if spec.submodule_search_locations:
        spec = importlib.util.find_spec(f"{name}.__main__")
    source = Path(spec.origin).read_text(encoding="utf-8")
    if "import argparse" in source:
        return set(re.findall(r"add_argument\(\s*\"--(\w+)\"", source))
    module, values = command_of(name), flags.FlagValues()
    if hasattr(module, "_flags"):
        module._flags(values)
    return {*values, "help"} | ({"config", "workdir"} if name in WITH_CONFIG else set())


def command_of(name: str):
    """The module whose `main` a script or module calls."""
    is_package = importlib.util.find_spec(name).submodule_search_locations is not None
    return sys.modules[importlib.import_module(f"{name}.__main__" if is_package else name).main.__module__]


def test_the_readme_names_every_entry_point():
    scripts = {command.split()[0] for page, command in NAMED if page == "README.md"}
    assert {"train.py", "eval.py", "predict.py"} <= scripts
    assert ("README.md", "train.py --config=configs/clevr.py") in NAMED


@pytest.mark.parametrize(("page", "command"), NAMED)
def test_commands_parse(page, command, monkeypatch):
    """The script or module exists and takes the flags; the config exists, and its argument and every override."""
    monkeypatch.chdir(ROOT)
    name, words = module_of(shlex.split(command))
    given = {word.lstrip("-").partition("=")[0] for word in words if word.startswith("-")}
    assert {flag for flag in given if not flag.startswith("config.")} <= flags_of(name)
    if name in WITH_CONFIG[:3]:
        assert all(word.startswith("--") for word in words)
    if "config" in given:
        config, _, _ = command_line.load_from_flags([name, *words], "", command_of(name)._flags)
        if name == "train" and page in PAGES:  # tests/test_configs.py checks the configs
            check(config)


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files_and_headings(page):
    for target in re.findall(r"(?:\]\(|src=\")([^)\s\"]+)", BLOCK.sub("", read(page))):
        file, _, heading = target.partition("#")
        if "://" in target:
            continue
        linked = (ROOT / page).parent / file if file else ROOT / page
        assert linked.exists(), target
        if heading:
            assert heading in headings(linked), target


def headings(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.*)$", BLOCK.sub("", page.read_text(encoding="utf-8")), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@functools.cache
def files() -> set[str]:
    """Each file of the repository by its path and by every end of it."""
    folders = ("benchmarks", "configs", "docs", "flow_jax", "paligemma_jax", "tests", "train_jax")
    paths = [file.relative_to(ROOT).parts for name in folders for file in (ROOT / name).rglob("*") if file.is_file()]
    paths += [(file.name,) for file in ROOT.iterdir()]
    return {"/".join(parts[start:]) for parts in paths for start in range(len(parts))}


@pytest.mark.parametrize("page", PAGES)
def test_files_in_code_exist(page):
    """Modules may be named from any folder on, such as `losses/coprompt.py`; what begins with my_ is a user's."""
    names = {name for line in code(page) for name in re.findall(r"(?:[\w.]+/)*\w+\.(?:py|md)\b", line)}
    assert {name for name in names if not re.search(r"\bmy_", name)} - NOT_HERE <= files()


@pytest.mark.parametrize("page", PAGES)
def test_public_names_in_code_exist(page):
    """`pg.` is paligemma_jax, `fj.` is flow_jax."""
    for package, path in {name for line in code(page) for name in re.findall(r"\b(pg|fj)((?:\.[A-Za-z_]\w*)+)", line)}:
        value = {"pg": paligemma_jax, "fj": flow_jax}[package]
        for part in path.split(".")[1:]:
            assert hasattr(value, part), f"{package}{path}"
            value = getattr(value, part)


@pytest.mark.parametrize("page", PAGES)
def test_blocks_of_python_parse_and_import(page):
    for block in re.findall(r"^```python\n(.*?)^```", read(page), re.M | re.S):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and node.module.partition(".")[0].endswith("_jax"):
                module = importlib.import_module(node.module)
                assert all(hasattr(module, alias.name) for alias in node.names), ast.unparse(node)
