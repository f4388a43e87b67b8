"""The memory that a host has left for this process, as Linux tells it."""

from collections.abc import Iterator
from pathlib import Path

# Of version 2 and 1 of control groups: where a group's folder lies, its files of limit and use, and the names under
# which its statistics have the pages of files, which the kernel takes back when somebody needs memory.
_V2 = ("", "memory.max", "memory.current", ("inactive_file", "active_file"))
_V1 = ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", ("total_inactive_file", "total_active_file"))


def host_memory_left(proc: Path = Path("/proc"), groups: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Bytes that may still be taken without swapping; None where the system does not tell (no Linux).

    What the machine has available, or what the limit of a control group (a container's, say) leaves if that is less.

    Args:
      proc, groups: where the kernel's files are.
    """
    available = _fields(proc / "meminfo").get("MemAvailable:")
    if available is None:
        return None
    return max(min([available * 1024, *_left_in_groups(proc, groups)]), 0)


def _left_in_groups(proc: Path, groups: Path) -> Iterator[int]:
    """What the limit of each group leaves that this process is in, from its own to the outermost."""
    try:
        lines = (proc / "self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        place, limit, used, cached = _V1 if controllers else _V2
        root = groups / place
        own = root / path.lstrip("/")
        for folder in (own, *own.parents):  # a container may see its own group as the root
            if root in (folder, *folder.parents):
                yield from _left(folder, limit, used, cached)


def _left(folder: Path, limit: str, used: str, cached: tuple[str, ...]) -> Iterator[int]:
    """Limit less use of one group; nothing where it has no limit."""
    try:
        most, taken = ((folder / name).read_text().strip() for name in (limit, used))
    except OSError:
        return
    if most != "max":
        stat = _fields(folder / "memory.stat")
        yield int(most) - int(taken) + sum(stat.get(name, 0) for name in cached)


def _fields(file: Path) -> dict[str, int]:
    """Numbers by name, of lines "name number ..."; none where the file is not there."""
    try:
        lines = file.read_text().splitlines()
    except OSError:
        return {}
    return {name: int(number) for name, number, *_ in map(str.split, lines) if number.isdigit()}
