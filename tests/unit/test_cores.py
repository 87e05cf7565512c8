"""How many threads compute by default, on machines that only exist as files."""

from collections.abc import Mapping
from pathlib import Path

import pytest

from layerskip.cores import Cores, default_threads, find_cores

CPU = "sys/devices/system/cpu"


def machine(root: Path, files: Mapping[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text + "\n")
    return root


def siblings(*cores: str, name: str = "core_cpus_list") -> dict[str, str]:
    """Topology of cores, each given as a list such as `0,4`."""
    return {f"{CPU}/cpu{number}/topology/{name}": core for core in cores for number in core.split(",")}


def counts(cores: Cores) -> tuple[int, int, int, int]:
    return cores.logical, cores.physical, cores.fast, cores.usable


def test_nothing_is_known(tmp_path: Path) -> None:
    assert counts(find_cores(tmp_path, range(3))) == (3, 3, 3, 3)
    assert find_cores(tmp_path, [0]).quota is None


@pytest.mark.parametrize("name", ["core_cpus_list", "thread_siblings_list"])
def test_two_threads_of_a_core_count_once(tmp_path: Path, name: str) -> None:
    root = machine(tmp_path, siblings("0,4", "1,5", "2,6", "3,7", name=name))
    assert counts(find_cores(root, range(8))) == (8, 4, 4, 4)
    assert counts(find_cores(root, [0, 4, 1])) == (3, 2, 2, 2)  # only some of them may be used
    assert counts(find_cores(root, [5])) == (1, 1, 1, 1)
    assert find_cores(root, range(8)).describe() == "8 processors that this process may run on, on 4 physical cores"


@pytest.mark.parametrize("by", ["kinds", "capacity", "clock"])
def test_cores_that_save_energy_are_left_out(tmp_path: Path, by: str) -> None:
    """Two fast cores of two threads, then four small ones."""
    files = siblings("0,1", "2,3", "4", "5", "6", "7")
    if by == "kinds":
        files |= {"sys/devices/cpu_core/cpus": "0-3", "sys/devices/cpu_atom/cpus": "4-7"}
    else:
        measure = "cpu_capacity" if by == "capacity" else "cpufreq/cpuinfo_max_freq"
        files |= {f"{CPU}/cpu{number}/{measure}": "1024" if number < 4 else "512" for number in range(8)}
    root = machine(tmp_path, files)
    assert counts(find_cores(root, range(8))) == (8, 6, 2, 2)
    assert counts(find_cores(root, range(4, 8))) == (4, 4, 4, 4)  # nothing but small ones
    assert "of which 2 are fast ones" in find_cores(root, range(8)).describe()


def test_cores_of_slightly_different_clocks_are_of_one_kind(tmp_path: Path) -> None:
    files = {f"{CPU}/cpu{number}/cpufreq/cpuinfo_max_freq": str(5_700_000 - 250_000 * number) for number in range(4)}
    assert find_cores(machine(tmp_path, files), range(4)).fast == 4


@pytest.mark.parametrize(
    ("limit", "quota", "usable"),
    [
        ("max 100000", None, 8),
        ("200000 100000", 2, 2),
        ("250000 100000", 2.5, 2),
        ("50000 100000", 0.5, 1),
        ("", None, 8),
    ],
)
def test_version_2_of_control_groups(tmp_path: Path, limit: str, quota: float | None, usable: int) -> None:
    files = {"proc/self/cgroup": "0::/user/jobs", "sys/fs/cgroup/user/jobs/cpu.max": limit}
    cores = find_cores(machine(tmp_path, files), range(8))
    assert (cores.quota, cores.usable) == (quota, usable)


def test_the_tightest_of_nested_groups_counts(tmp_path: Path) -> None:
    files = {
        "proc/self/cgroup": "0::/user/jobs",
        "sys/fs/cgroup/user/jobs/cpu.max": "600000 100000",
        "sys/fs/cgroup/user/cpu.max": "300000 100000",
    }
    assert find_cores(machine(tmp_path, files), range(8)).usable == 3


def test_the_group_of_a_container(tmp_path: Path) -> None:
    """Its own folder is the root, whatever the host calls it."""
    files = {"proc/self/cgroup": "0::/../docker/5f3a", "sys/fs/cgroup/cpu.max": "400000 100000"}
    assert find_cores(machine(tmp_path, files), range(8)).usable == 4


@pytest.mark.parametrize("controllers", ["cpu,cpuacct", "cpu"])
def test_version_1_of_control_groups(tmp_path: Path, controllers: str) -> None:
    group = f"sys/fs/cgroup/{controllers}/work"
    files = {
        "proc/self/cgroup": f"5:memory:/work\n3:{controllers}:/work",
        f"{group}/cpu.cfs_quota_us": "150000",
        f"{group}/cpu.cfs_period_us": "100000",
    }
    root = machine(tmp_path, files)
    assert (find_cores(root, range(8)).quota, find_cores(root, range(8)).usable) == (1.5, 1)
    machine(tmp_path, {f"{group}/cpu.cfs_quota_us": "-1"})
    assert find_cores(root, range(8)).quota is None


def test_what_was_chosen_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("os.cpu_count", lambda: 16)
    cores = Cores(logical=8, physical=4, fast=4, quota=3.0)
    for torch_threads, expected in ((16, 3), (8, 3), (4, 3), (3, 3), (5, 5), (2, 2), (1, 1)):
        assert default_threads(torch_threads, cores)[0] == expected, torch_threads
    assert default_threads(5, cores)[1] == "chosen by this program"
    assert default_threads(8, cores)[1].endswith("on 4 physical cores, with a limit of 3 cores' time")
    monkeypatch.setenv("OMP_NUM_THREADS", "8")
    assert default_threads(8, cores) == (8, "OMP_NUM_THREADS=8")


def test_this_machine() -> None:
    cores = find_cores()
    assert 1 <= cores.usable <= cores.fast <= cores.physical <= cores.logical
