"""The small models that ship with the package, by name: "tiny", a PaliGemma, and "tiny-siglip" (docs/tiny_base.md)."""

from pathlib import Path

HERE = Path(__file__).parent.parent
SHIPPED = {"tiny": HERE / "tiny", "tiny-siglip": HERE / "tiny_siglip"}


def local(path: str | Path) -> Path:
    """The folder of the model of that name, or else the path itself."""
    return SHIPPED.get(str(path)) or Path(path).expanduser()
