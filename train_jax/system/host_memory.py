"""The free memory of the host, as reported by Linux."""

from collections.abc import Iterator
from pathlib import Path

# For versions 2 and 1 of control groups: the folder of the hierarchy, the files with a group's limit and use, and the
# statistics of its page cache, which the kernel frees on demand.
_V2 = ("", "memory.max", "memory.current", ("inactive_file", "active_file"))
_V1 = ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", ("total_inactive_file", "total_active_file"))


def host_memory_left(proc: Path = Path("/proc"), groups: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Returns the bytes that can be allocated without swapping; None on systems other than Linux.

    This is the available memory of the machine, or what the limit of a control group (such as a container's) leaves if
    that is less.

    Args:
      proc: mount point of procfs.
      groups: mount point of cgroupfs.
    """
    available = _fields(proc / "meminfo").get("MemAvailable:")
    if available is None:
        return None
    return max(min([available * 1024, *_left_in_groups(proc, groups)]), 0)


def _left_in_groups(proc: Path, groups: Path) -> Iterator[int]:
    """Yields the free bytes of each control group of this process, from the innermost to the outermost."""
    try:
        lines = (proc / "self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        hierarchy, limit, used, cached = _V1 if controllers else _V2
        root = groups / hierarchy
        own = root / path.lstrip("/")
        for folder in (own, *own.parents):  # a container may see its own group as the root
            if root in (folder, *folder.parents):
                yield from _left(folder, limit, used, cached)


def _left(folder: Path, limit: str, used: str, cached: tuple[str, ...]) -> Iterator[int]:
    """Yields the free bytes of one control group; nothing if it has no limit."""
    try:
        limit_text, used_text = ((folder / name).read_text().strip() for name in (limit, used))
    except OSError:
        return
    if limit_text != "max":
        stat = _fields(folder / "memory.stat")
        yield int(limit_text) - int(used_text) + sum(stat.get(name, 0) for name in cached)


def _fields(file: Path) -> dict[str, int]:
    """Returns numbers by name from lines "name number ..."; empty if the file cannot be read."""
    try:
        lines = file.read_text().splitlines()
    except OSError:
        return {}
    return {name: int(number) for name, number, *_ in map(str.split, lines) if number.isdigit()}
