"""`xccl doctor`: each check passes here or says what to do, and finds what it is for."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from xccl import doctor
from xccl.cgroup import oom_kills, read_limits, usable_cores
from xccl.doctor import CHECKS, FAIL, PASS, WARN, Machine, examine


def _xccl_doctor(**environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "xccl", "doctor", "--json"]
    return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, timeout=120)


def test_this_machine_works() -> None:
    done = _xccl_doctor()
    findings = json.loads(done.stdout)
    assert done.returncode == 0, findings
    assert list(findings) == list(CHECKS)
    assert all(finding["why"] for finding in findings.values())
    assert findings["two ranks"]["status"] == PASS


def test_a_needed_thing_that_is_missing_fails() -> None:
    done = _xccl_doctor(XCCL_SHM_DIR="/nowhere", XCCL_TIMEUOT="3")
    findings = json.loads(done.stdout)
    assert done.returncode == 1
    assert findings["environment"]["status"] == FAIL
    assert "XCCL_TIMEUOT" in findings["environment"]["why"]
    assert findings["shared memory"]["status"] == FAIL
    assert "tmpfs" in findings["shared memory"]["todo"]
    assert findings["two ranks"]["status"] == FAIL


def test_every_finding_but_a_pass_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(doctor.CHECKS, "two ranks", lambda machine: doctor.Finding(PASS, "not here"))
    for name, finding in examine(Machine(tmp_path, tmp_path / "shm")).items():
        assert finding.status in (PASS, WARN, FAIL)
        assert finding.status != FAIL or finding.todo, name


def _write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


@pytest.mark.parametrize(
    ("check", "files", "status", "words"),
    [
        ("SIMD", {"proc/cpuinfo": "flags : sse2 avx2"}, PASS, "AVX2"),
        ("SIMD", {"proc/cpuinfo": "flags : sse2"}, WARN, "scalar"),
        ("shared memory mount", {"proc/self/mounts": "tmpfs /dev/shm tmpfs rw 0 0"}, PASS, "tmpfs"),
        ("shared memory mount", {"proc/self/mounts": "tmpfs /dev/shm tmpfs ro,nosuid 0 0"}, FAIL, "ro"),
        ("shared memory mount", {"proc/self/mounts": "/dev/sda / ext4 rw 0 0"}, WARN, "ext4"),
        ("overcommit", {"proc/sys/vm/overcommit_memory": "2"}, WARN, "commit limit"),
        (
            "memory limit",
            {"proc/self/cgroup": "0::/a", "sys/fs/cgroup/a/memory.max": "4096", "sys/fs/cgroup/a/memory.current": "1"},
            WARN,
            "of the container's",
        ),
        ("cores", {"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "50000 100000"}, WARN, "time for 0.5"),
        ("processes", {"proc/self/cgroup": "5:pids:/", "sys/fs/cgroup/pids/pids.max": "20"}, WARN, "at most 20"),
        ("/proc", {}, FAIL, "not mounted"),
    ],
)
def test_checks_find_what_they_are_for(
    check: str, files: dict[str, str], status: str, words: str, tmp_path: Path
) -> None:
    finding = CHECKS[check](Machine(_write(tmp_path, files), Path("/dev/shm")))
    assert finding.status == status, finding
    assert words in finding.why


@pytest.mark.parametrize(("free", "status"), [(1 << 20, FAIL), (64 << 20, WARN), (1 << 30, PASS)])
def test_the_size_of_shared_memory_counts(free: int, status: str, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = SimpleNamespace(f_blocks=1 << 20, f_frsize=4096, f_bavail=free // 4096)
    monkeypatch.setattr(os, "statvfs", lambda path: disk)
    finding = doctor.check_shared_memory_size(Machine())
    assert finding.status == status
    assert ("--shm-size" in finding.todo) == (status != PASS)


@pytest.mark.parametrize(
    ("limit", "check", "value"),
    [(resource.RLIMIT_AS, "address space", 1 << 30), (resource.RLIMIT_NOFILE, "open files", 35)],
)
def test_limits_of_the_process_count(limit: int, check: str, value: int, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = resource.getrlimit
    monkeypatch.setattr(resource, "getrlimit", lambda which: (value, value) if which == limit else asked(which))
    assert CHECKS[check](Machine()).status == FAIL


@pytest.mark.parametrize(
    ("library", "launcher", "status"),
    [
        ("Open MPI v5.0.6", "mpirun (Open MPI) 5.0.6", PASS),
        ("MPICH Version: 4.2", "HYDRA build details:\n Version: 4.2", PASS),
        ("Intel(R) MPI Library 2021.14", "Intel(R) MPI Library for Linux* OS", PASS),
        ("MPICH Version: 4.2", "mpirun (Open MPI) 5.0.6", WARN),
    ],
)
def test_mpirun_must_be_that_of_mpi4py(
    library: str, launcher: str, status: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "_output", lambda command: library if command[0] == sys.executable else launcher)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: "/usr/bin/mpirun")
    assert doctor.check_mpi(Machine()).status == status


# ---- control groups ----


@pytest.mark.parametrize(
    ("files", "cpus", "memory"),
    [
        ({}, None, None),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "max 100000"}, None, None),
        (
            {
                "proc/self/cgroup": "0::/a/b\n",
                "sys/fs/cgroup/a/cpu.max": "150000 100000",
                "sys/fs/cgroup/a/b/cpu.max": "400000 100000",
                "sys/fs/cgroup/a/b/memory.max": "max",
                "sys/fs/cgroup/a/memory.max": "1000",
            },
            1.5,
            1000,
        ),
        (
            {
                "proc/self/cgroup": "4:memory:/docker/x\n3:cpu,cpuacct:/docker/x\n",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "200000",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000",
                "sys/fs/cgroup/memory/memory.limit_in_bytes": "5000",
            },
            2.0,
            5000,
        ),
        (
            {
                "proc/self/cgroup": "4:memory:/\n3:cpu:/\n",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000",
                "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712",
            },
            None,
            None,
        ),
    ],
)
def test_the_tightest_limit_counts(
    files: dict[str, str], cpus: float | None, memory: int | None, tmp_path: Path
) -> None:
    limits = read_limits(_write(tmp_path, files))
    assert (limits.cpus, limits.memory) == (cpus, memory)


@pytest.mark.parametrize(
    ("files", "kills"),
    [
        ({}, 0),
        ({"proc/self/cgroup": "0::/a\n", "sys/fs/cgroup/a/memory.events": "low 0\noom 7\noom_kill 3\n"}, 3),
        (
            {
                "proc/self/cgroup": "4:memory:/docker/x\n",
                "sys/fs/cgroup/memory/memory.oom_control": "oom_kill_disable 0\nunder_oom 0\noom_kill 2\n",
            },
            2,
        ),
    ],
)
def test_kills_for_want_of_memory_are_counted(files: dict[str, str], kills: int, tmp_path: Path) -> None:
    assert oom_kills(_write(tmp_path, files)) == kills


def test_cores_are_at_least_one() -> None:
    assert 1 <= usable_cores() <= len(os.sched_getaffinity(0))


def test_refused_single_copies_are_a_warning_that_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scope = tmp_path / "proc/sys/kernel/yama/ptrace_scope"
    scope.parent.mkdir(parents=True)
    scope.write_text("1\n")
    assert doctor.check_single_copy(doctor.Machine(tmp_path)).status == doctor.PASS, "tried, not guessed"
    monkeypatch.setattr(doctor, "_SINGLE_COPY", "print(0)")
    finding = doctor.check_single_copy(doctor.Machine(tmp_path))
    assert finding.status == doctor.WARN
    assert "ptrace_scope is 1" in finding.why
    monkeypatch.setenv("XCCL_CMA", "off")
    assert "switched off" in doctor.check_single_copy(doctor.Machine(tmp_path)).why
