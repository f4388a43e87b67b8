"""The free memory of a host, from files like those of Linux."""

from pathlib import Path

import pytest

from train_jax.system.host_memory import host_memory_left

GIB = 2**30


@pytest.fixture
def host(tmp_path):
    """Writes files below proc and groups, which `left()` reads; 8 GiB are available."""

    class Host:
        proc, groups = tmp_path / "proc", tmp_path / "groups"

        def write(self, place: Path, **files):
            place.mkdir(parents=True, exist_ok=True)
            for name, text in files.items():
                (place / name.replace("__", ".")).write_text(f"{text}\n")

        def member(self, *lines):
            (self.proc / "self").mkdir(exist_ok=True)
            (self.proc / "self/cgroup").write_text("".join(f"{line}\n" for line in lines))

        def left(self):
            return host_memory_left(self.proc, self.groups)

    made = Host()
    meminfo = f"MemTotal:  {16 * 2**20} kB\nMemFree:  1000 kB\nMemAvailable:  {8 * 2**20} kB\nHugePages_Total:  0"
    made.write(made.proc, meminfo=meminfo)
    return made


def test_without_groups_it_is_the_available_memory(host):
    assert host.left() == 8 * GIB
    host.member("0::/", "4:memory:/")
    assert host.left() == 8 * GIB


def test_no_linux(host):
    (host.proc / "meminfo").unlink()
    assert host.left() is None


def test_a_containers_limit(host):
    """In version 2 the page cache counts as used but can be freed."""
    host.member("0::/pod/box")
    stat = f"anon {GIB}\nfile {3 * GIB}\ninactive_file {GIB}\nactive_file {GIB // 2}\nshmem {GIB}"
    host.write(host.groups / "pod/box", memory__max=6 * GIB, memory__current=4 * GIB, memory__stat=stat)
    assert host.left() == 2 * GIB + GIB + GIB // 2


def test_the_limit_of_an_outer_group(host):
    host.member("0::/pod/box")
    host.write(host.groups / "pod/box", memory__max="max", memory__current=GIB)
    host.write(host.groups / "pod", memory__max=4 * GIB, memory__current=3 * GIB)
    assert host.left() == GIB


def test_a_container_that_sees_its_group_as_the_root(host):
    host.member("0::/not/to/be/seen/from/within")
    host.write(host.groups, memory__max=2 * GIB, memory__current=GIB)
    assert host.left() == GIB


def test_version_1(host):
    host.member("9:name=systemd:/", "5:cpu,cpuacct:/x", "4:hugetlb,memory:/job", "0::/")
    stat = f"inactive_file 7\ntotal_inactive_file {GIB // 2}\ntotal_active_file 0"
    files = {"memory__limit_in_bytes": 3 * GIB, "memory__usage_in_bytes": 2 * GIB, "memory__stat": stat}
    host.write(host.groups / "memory/job", **files)
    host.write(host.groups / "memory", memory__limit_in_bytes=9223372036854771712, memory__usage_in_bytes=9 * GIB)
    assert host.left() == GIB + GIB // 2


def test_a_limit_above_the_available_memory_has_no_effect(host):
    host.member("0::/box")
    host.write(host.groups / "box", memory__max=60 * GIB, memory__current=GIB)
    assert host.left() == 8 * GIB


def test_a_group_beyond_its_limit_has_no_memory_left(host):
    host.member("0::/box")
    host.write(host.groups / "box", memory__max=GIB, memory__current=GIB + 4096)
    assert host.left() == 0
