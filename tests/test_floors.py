"""Rules for imports between modules, and that imported packages are declared dependencies.

Tasks and commands may import the packages below them in the order of FLOORS, and all may import `train_jax.core`.
Neither modules nor folders have circular imports. The number of pairs of folders with an import between them:

    python tests/test_floors.py
"""

import ast
import graphlib
import importlib.metadata
import re
import subprocess
import sys
import tomllib
from collections import defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("train_jax", "paligemma_jax", "flow_jax")
MOST_FILES = 14  # in a folder, without __init__

# A floor may import the floors before it; folders on the same floor may not import each other.
# "" is the folder of the package itself: loading, convert, merge and so on.
FLOORS = {
    "paligemma_jax": (
        ("files",),
        ("images",),
        ("models", "data"),
        ("losses", "adapt", "metrics"),
        ("generation", "weights"),
        ("",),
        ("inference",),
        ("tasks", "commands"),
    ),
}

# (modules, modules they may not import, exceptions).
RULES = [
    (r"train_jax(\..*)?", r"(paligemma_jax|flow_jax)(\..*)?", None),
    (r"train_jax\.core(\..*)?", r"train_jax(\..*)?", r"train_jax\.core(\..*)?"),
    (r"flow_jax(\..*)?", r"paligemma_jax(\..*)?", None),
    (r"paligemma_jax(?!\.tasks\.text_to_image(\.|$))(\..*)?", r"flow_jax(\..*)?", None),
    # Only tasks and commands may import the runtime; other modules may import train_jax.core.
    (
        r"(paligemma_jax\.(?!tasks\.|commands\.|loading$|convert$|merge$)|flow_jax\.(?!tasks\.|fid$)).*",
        r"train_jax(\..*)?",
        r"train_jax\.core(\..*)?",
    ),
    (r"flow_jax\.(?!tasks\.|fid$).*", r"flow_jax\.tasks(\..*)?", None),
    (r".*", r"(tensorflow|torch|clu|pickle|dill)(\..*)?", None),
]


def modules_of(root: Path) -> dict[str, Path]:
    """Returns {dotted name: file} for the modules of our packages; an __init__.py has the name of its package."""
    files = [file for package in PACKAGES for file in sorted((root / package).rglob("*.py"))]
    names = [file.relative_to(root).with_suffix("").parts for file in files]
    return {".".join(p[:-1] if p[-1] == "__init__" else p): file for p, file in zip(names, files, strict=True)}


def imports_of(name: str, file: Path, modules: dict[str, Path]) -> set[str]:
    """Returns the modules that `name` imports, also inside functions; `from a import b` counts as a.b if a module."""
    result = set()
    package = name if file.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            result |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = ".".join(package.split(".")[: len(package.split(".")) - node.level + 1]) if node.level else ""
            base = ".".join(filter(None, [above, node.module]))
            inner = {f"{base}.{alias.name}" for alias in node.names}
            result |= {module if module in modules else base for module in inner}
    return result - {name}


UNIX = {"fcntl", "grp", "posix", "pty", "pwd", "resource", "syslog", "termios", "tty"}
"""Modules of Python that Windows lacks."""


def test_modules_missing_on_windows_are_imported_with_a_guard():
    """They may only be imported inside `try`."""
    for name, file in modules_of(ROOT).items():
        top = ast.parse(file.read_text(encoding="utf-8")).body
        imported = {alias.name for node in top if isinstance(node, ast.Import) for alias in node.names}
        imported |= {node.module for node in top if isinstance(node, ast.ImportFrom)}
        assert not imported & UNIX, name


def graph_of(root: Path) -> dict[str, set[str]]:
    modules = modules_of(root)
    return {name: imports_of(name, file, modules) for name, file in modules.items()}


def violations(graph: dict[str, set[str]]) -> list[str]:
    """Returns a sentence for each import that violates a rule or goes to a higher floor."""
    pairs = [
        (name, target)
        for who, forbidden, allowed in RULES
        for name, targets in graph.items()
        for target in targets
        if re.fullmatch(who, name)
        and re.fullmatch(forbidden, target)
        and not (allowed and re.fullmatch(allowed, target))
    ]
    for name, targets in graph.items():
        package, floor, inside = floor_of(name)
        for target in targets if floor is not None and name != package else ():
            of, below, apart = floor_of(target)
            if of == package and below is not None and (below > floor or (below == floor and apart != inside)):
                pairs.append((name, target))
    return sorted({f"{name} imports {target}" for name, target in pairs})


def floor_of(module: str) -> tuple[str, int | None, str]:
    """Returns a module's package, the number of its floor (None if the package has none), and its top folder."""
    package, *rest = module.split(".")
    floors = FLOORS.get(package, ())
    folder = rest[0] if rest and any(rest[0] in floor for floor in floors) else ""
    return package, next((i for i, floor in enumerate(floors) if folder in floor), None), folder


def test_every_folder_has_a_floor():
    for package, floors in FLOORS.items():
        folders = {folder.name for folder in (ROOT / package).iterdir() if (folder / "__init__.py").exists()}
        assert folders == {folder for floor in floors for folder in floor if folder}


def folder_pairs(graph: dict[str, set[str]], modules: dict[str, Path]) -> dict[tuple[str, str], list[str]]:
    """Returns {(folder, folder that it imports from): imports}, without imports by the packages' __init__.py."""
    pairs = defaultdict(list)
    for name, targets in graph.items():
        for target in targets & set(modules):
            one, other = (
                each if modules[each].name == "__init__.py" else each.rpartition(".")[0] for each in (name, target)
            )
            if one != other and name not in PACKAGES:
                pairs[one, other].append(f"{name} imports {target}")
    return dict(sorted(pairs.items()))


def circle(graph: dict[str, set[str]]) -> list[str]:
    """Returns the nodes of a circular import, [] if there is none."""
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return error.args[1]
    return []


def test_imports_follow_the_floors():
    graph = graph_of(ROOT)
    assert {"train_jax.loop", "paligemma_jax.models.paligemma", "flow_jax"} <= set(graph)
    assert violations(graph) == []


def graph_of_folders(graph: dict[str, set[str]], modules: dict[str, Path]) -> dict[str, set[str]]:
    """Returns {folder: folders that it imports}; a module beside subfolders is a node of its own.

    So a folder may have a subfolder that imports one of its modules and is imported by another, as
    flow_jax/arrays.py <- flow_jax/paths <- flow_jax/losses.py.
    """
    with_subfolders = {folder.parent for folder in {file.parent for file in modules.values()}}

    def node_of(name: str) -> str:
        beside = modules[name].name == "__init__.py" or modules[name].parent in with_subfolders
        return name if beside else name.rpartition(".")[0]

    result = defaultdict(set)
    for name, targets in graph.items():
        if name not in PACKAGES:
            result[node_of(name)] |= {node_of(target) for target in targets & set(modules)} - {node_of(name)}
    return dict(result)


def test_no_circles():
    """Neither between modules nor between folders."""
    graph = graph_of(ROOT)
    assert circle(graph) == []
    assert circle(graph_of_folders(graph, modules_of(ROOT))) == []


def test_folders_are_small():
    files = [file for package in PACKAGES for file in (ROOT / package).rglob("*.py") if file.name != "__init__.py"]
    counts = {folder: sum(file.parent == folder for file in files) for folder in {file.parent for file in files}}
    assert max(counts.values()) <= MOST_FILES, {str(k): v for k, v in counts.items() if v > MOST_FILES}


@pytest.mark.parametrize(
    "file, source, expected",
    [
        ("train_jax/loop.py", "import paligemma_jax.losses", "train_jax.loop imports paligemma_jax.losses"),
        ("train_jax/loop.py", "def f():\n    from flow_jax import paths", "train_jax.loop imports flow_jax"),
        ("flow_jax/tasks/plane.py", "import paligemma_jax as pg", "flow_jax.tasks.plane imports paligemma_jax"),
        ("paligemma_jax/losses/x.py", "from train_jax import loop", "paligemma_jax.losses.x imports train_jax.loop"),
        ("paligemma_jax/losses/x.py", "from ..tasks import vqa", "paligemma_jax.losses.x imports paligemma_jax.tasks"),
        ("paligemma_jax/data/x.py", "from ..models import vit", "paligemma_jax.data.x imports paligemma_jax.models"),
        ("paligemma_jax/tasks/vqa/task.py", "import flow_jax", "paligemma_jax.tasks.vqa.task imports flow_jax"),
        ("train_jax/core/errors.py", "import train_jax.loop", "train_jax.core.errors imports train_jax.loop"),
        ("paligemma_jax/data/x.py", "from torch import nn", "paligemma_jax.data.x imports torch"),
        ("paligemma_jax/losses/x.py", "from train_jax.core.errors import UserError", None),
        ("paligemma_jax/tasks/text_to_image/task.py", "import flow_jax", None),
        ("paligemma_jax/tasks/vqa/task.py", "from train_jax import loop", None),
    ],
)
def test_violations_are_found(tmp_path, file, source, expected):
    for name in {
        "train_jax/loop.py",
        "train_jax/core/errors.py",
        "paligemma_jax/tasks/vqa/task.py",
        "flow_jax/__init__.py",
        file,
    }:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(source if name == file else "")
    assert violations(graph_of(tmp_path)) == ([expected] if expected else [])


def test_circles_are_found(tmp_path):
    (tmp_path / "flow_jax").mkdir()
    (tmp_path / "flow_jax/__init__.py").write_text("from .a import x")
    (tmp_path / "flow_jax/a.py").write_text("from flow_jax.b import x")
    (tmp_path / "flow_jax/b.py").write_text("def f():\n    from . import x")
    assert set(circle(graph_of(tmp_path))) == {"flow_jax", "flow_jax.a", "flow_jax.b"}


@pytest.mark.parametrize(
    ("imported", "expected"), [("flow_jax.loss", {"flow_jax.loss", "flow_jax.ode"}), ("flow_jax.arrays", set())]
)
def test_circles_of_a_folder_and_a_module_beside_it_are_found(tmp_path, imported, expected):
    """No two modules import each other here."""
    (tmp_path / "flow_jax/ode").mkdir(parents=True)
    for name, source in {
        "__init__": "",
        "arrays": "",
        "loss": "import flow_jax.ode.solve",
        "ode/__init__": "",
        "ode/solve": "",
        "ode/guide": f"import {imported}",
    }.items():
        (tmp_path / f"flow_jax/{name}.py").write_text(source)
    graph = graph_of(tmp_path)
    assert circle(graph) == []
    assert set(circle(graph_of_folders(graph, modules_of(tmp_path)))) == expected


def loaded(names: list[str], looked_for: set[str]) -> str:
    """Returns those of some packages that a process loads when it imports modules, as a list in a string."""
    script = (
        f"import importlib, sys\nfor name in {names}:\n    importlib.import_module(name)\n"
        f"print(sorted(set(sys.modules) & {looked_for}))"
    )
    result = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()[-1]


def test_importing_everything_loads_neither_tensorflow_nor_torch():
    """Not even through the packages that we import."""
    assert loaded(sorted(modules_of(ROOT)), {"tensorflow", "torch", "jax"}) == "['jax']"


def test_answering_a_question_loads_no_package_that_evaluation_alone_needs():
    """They take as long to import as JAX."""
    names = ["paligemma_jax.commands.predict", "paligemma_jax.tasks.vqa.task"]
    assert loaded(names, {"jax", "matplotlib", "nltk", "rouge_score", "scipy"}) == "['jax']"


def normalized(requirement: str) -> str:
    """Returns the normalized name of a distribution (PEP 503)."""
    return re.sub(r"[-_.]+", "-", re.match(r"[\w.-]+", requirement)[0]).lower()


def test_dependencies_are_what_is_imported():
    tops = {target.partition(".")[0] for targets in graph_of(ROOT).values() for target in targets}
    owners = importlib.metadata.packages_distributions()
    imported = {tuple(map(normalized, owners[top])) for top in tops - sys.stdlib_module_names - set(PACKAGES)}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    declared = {(normalized(requirement),) for requirement in project["dependencies"]}
    # What others import without declaring it: tensorflow-datasets, and JAX for a compilation cache of limited size.
    assert imported == declared - {("importlib-resources",), ("filelock",)}


if __name__ == "__main__":
    print(f"{len(folder_pairs(graph_of(ROOT), modules_of(ROOT)))} ordered pairs of folders with an import between them")
