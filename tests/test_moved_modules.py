"""Old import paths import the moved modules, with a warning."""

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROWS = [
    (f"{package}.{old}", f"{package}.{new}")
    for package in ("train_jax", "paligemma_jax", "flow_jax")
    for old, new in re.findall(r"^([a-z]\S*) +(\S+)$", (ROOT / package / "moved.py").read_text(encoding="utf-8"), re.M)
]


@pytest.mark.parametrize("old, new", ROWS)
def test_an_old_path_imports_the_moved_module(old, new):
    sys.modules.pop(old, None)
    with pytest.warns(DeprecationWarning, match=f"^{re.escape(old)} has moved: import {re.escape(new)}$"):
        result = importlib.import_module(old)
    assert result is importlib.import_module(new) and result.__name__ == result.__spec__.name == new
    sys.modules.pop(old, None)


def test_exported_functions_are_not_replaced_by_old_modules():
    """`paligemma_jax.generate` was a module, and `pg.generate` is a function."""
    parents = sorted({old.rpartition(".")[0] for old, _ in ROWS})
    code = f"""
import importlib
packages = [importlib.import_module(name) for name in {parents}]
was = {{(p, name): value for p in packages for name, value in vars(p).items() if callable(value)}}
for old in {[old for old, _ in ROWS]}:
    importlib.import_module(old)
assert ("paligemma_jax.data.synthetic_clevr", "render") in {{(p.__name__, name) for p, name in was}}
assert [name for (p, name), value in was.items() if getattr(p, name) is not value] == []
"""
    subprocess.run([sys.executable, "-W", "ignore::DeprecationWarning", "-c", code], cwd=ROOT, check=True)


def test_our_packages_do_not_import_old_paths():
    code = "import paligemma_jax, flow_jax, train_jax.loop, paligemma_jax.tasks.vqa, paligemma_jax.tasks.text_to_image"
    subprocess.run([sys.executable, "-W", "error::DeprecationWarning", "-c", code], cwd=ROOT, check=True)


NAMES = [
    (f"{package}.{module}", old, new)
    for package in ("train_jax", "paligemma_jax", "flow_jax")
    for module, old, new in re.findall(
        r"^([a-z]\S*) +(\S+) +(\S+)$", (ROOT / package / "moved.py").read_text(encoding="utf-8"), re.M
    )
]


@pytest.mark.parametrize("module, old, new", NAMES)
def test_an_old_path_has_the_old_names_too(module, old, new):
    path = next(before for before, now in ROWS if now == module)
    sys.modules.pop(path, None)
    with pytest.warns(DeprecationWarning, match="has moved"):
        result = importlib.import_module(path)
    assert getattr(result, old) is getattr(result, new)
    sys.modules.pop(path, None)
