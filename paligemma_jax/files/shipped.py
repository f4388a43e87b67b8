"""Names of the small models that ship with the package: "tiny", a PaliGemma, and "tiny-siglip" (docs/tiny_base.md)."""

from pathlib import Path

HERE = Path(__file__).parent.parent
SHIPPED = {"tiny": HERE / "tiny", "tiny-siglip": HERE / "tiny_siglip"}


def local(path: str | Path) -> Path:
    """Returns the folder of the shipped model of that name, else the path itself."""
    return SHIPPED.get(str(path)) or Path(path).expanduser()
