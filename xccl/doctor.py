"""`xccl doctor`: what xccl needs of a machine, checked one by one.

Each check is a function of the machine that returns a finding. To add one, write it and put it into CHECKS.
"""

from __future__ import annotations

import ctypes
import os
import platform
import resource
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from xccl._binding import ffi, lib
from xccl._core import __file__ as core_file
from xccl._object import SharedObject, leftovers, shm_directory
from xccl.cgroup import read_limits
from xccl.errors import XcclError, XcclUsageError
from xccl.options import LAUNCH_VARIABLES, check_environment, rc

PASS, WARN, FAIL = "pass", "warn", "fail"

MIB = 1 << 20
LEAST_MEMORY = 4 * MIB  # two ranks that use every operation on small arrays
COMFORTABLE_MEMORY = 256 * MIB
FUTEX_WAKE = 1
FUTEX_CALLS = {"x86_64": 202, "aarch64": 98}  # numbers of the system call


@dataclass(frozen=True)
class Finding:
    """What a check found: "pass", "warn" (xccl works, but something is missing or slow) or "fail" (it does not work).

    `why` says what was found, `todo` what to change; a pass has nothing to do.
    """

    status: str
    why: str
    todo: str = ""


@dataclass(frozen=True)
class Machine:
    """The machine that is examined; tests give a root directory of their own, with proc and sys."""

    root: Path = Path("/")
    shm: Path = field(default_factory=lambda: _directory())

    def read(self, path: str) -> str:
        """Text of a file below the root, empty if it cannot be read."""
        try:
            return (self.root / path).read_text().strip()
        except OSError:
            return ""


def _directory() -> Path:
    try:
        return shm_directory()
    except XcclUsageError:  # a bad value is a finding of check_environment_variables
        return Path("/dev/shm")


def examine(machine: Machine | None = None) -> dict[str, Finding]:
    """Runs all checks; a check that fails itself is a finding, too."""
    machine = machine or Machine()
    findings = {}
    for name, check in CHECKS.items():
        try:
            findings[name] = check(machine)
        except Exception as error:
            findings[name] = Finding(WARN, f"could not be checked: {type(error).__name__}: {error}")
    return findings


# ---- the package ----


def check_kernel(machine: Machine) -> Finding:
    """Linux 5.3 brought pidfd_open, which the launcher waits with."""
    release = platform.release()
    numbers = [int(number) for number in release.replace("-", ".").split(".")[:2] if number.isdigit()]
    if sys.platform != "linux" or numbers < [5, 3]:
        return Finding(FAIL, f"{sys.platform} {release}", "xccl needs Linux 5.3 or later")
    return Finding(PASS, f"Linux {release}, {platform.machine()}")


def check_core(machine: Machine) -> Finding:
    """The C core is compiled already."""
    return Finding(PASS, f"{Path(core_file).name} is loaded; no compiler is needed to run")


def check_simd(machine: Machine) -> Finding:
    """Vector instructions of dispatch and combine."""
    flags = set(machine.read("proc/cpuinfo").split())
    if flags.issuperset({"avx512f", "avx512bw", "avx512dq", "avx512vl"}):
        return Finding(PASS, "AVX-512")
    if "avx2" in flags:
        return Finding(PASS, "AVX2")
    return Finding(WARN, f"no AVX2 on this {platform.machine()}: the scalar code runs, slower and with the same bits")


def check_environment_variables(machine: Machine) -> Finding:
    """Every XCCL_* variable is known and has a good value."""
    try:
        check_environment()
        changed = [f"{name}={value}" for name, value in rc if f"XCCL_{name.upper()}" in os.environ]
    except XcclUsageError as error:
        return Finding(FAIL, str(error), "correct or unset the variable")
    inherited = [name for name in LAUNCH_VARIABLES if name in os.environ]
    if inherited:
        return Finding(WARN, f"{', '.join(inherited)} set: this process is a rank, or inherits from one", "unset them")
    return Finding(PASS, f"XCCL_*: {', '.join(changed)}" if changed else "no XCCL_* variable is set")


# ---- shared memory ----


def check_shared_memory(machine: Machine) -> Finding:
    """An object can be made, mapped and filled: the directory exists, is writable and has room."""
    name = str(machine.shm)
    if not machine.shm.is_dir():
        return Finding(FAIL, f"{name} is not a directory", f"mount -t tmpfs tmpfs {name}, or set XCCL_SHM_DIR")
    try:
        SharedObject(1).close()
    except XcclError as error:
        return Finding(FAIL, str(error), "give this user a writable directory on a tmpfs, or set XCCL_SHM_DIR to one")
    return Finding(PASS, f"objects can be made in {name}")


def check_shared_memory_size(machine: Machine) -> Finding:
    """Room for arrays, rings and staging blocks."""
    disk = os.statvfs(machine.shm)
    if disk.f_blocks == 0:
        return Finding(PASS, f"{machine.shm} has no limit of its own")
    total, free = disk.f_blocks * disk.f_frsize, disk.f_bavail * disk.f_frsize
    why = f"{machine.shm}: {_mib(free)} of {_mib(total)} free"
    todo = "start the container with --shm-size=2g (Kubernetes: emptyDir with medium: Memory), "
    todo += f"or mount -o remount,size=2g {machine.shm}"
    if free < LEAST_MEMORY:
        return Finding(FAIL, why, todo)
    if free < COMFORTABLE_MEMORY:
        return Finding(WARN, f"{why}: enough for small arrays; more raises XcclOutOfMemory", todo)
    return Finding(PASS, why)


def check_mount(machine: Machine) -> Finding:
    """The file system of shared memory is a tmpfs that may be written."""
    mount = _mount_of(machine, machine.shm)
    if mount is None:
        return Finding(WARN, f"the mount of {machine.shm} is not in /proc/self/mounts")
    point, kind, options = mount
    why = f"{point} is {kind} ({options})"
    if "ro" in options.split(","):
        return Finding(FAIL, why, f"mount -o remount,rw {point}")
    if kind != "tmpfs":
        return Finding(WARN, f"{why}: pages go to a disk", "set XCCL_SHM_DIR to a directory on a tmpfs")
    return Finding(PASS, why)


def check_leftovers(machine: Machine) -> Finding:
    """Nothing is left of dead sessions."""
    left = leftovers(machine.shm)
    if left:
        return Finding(WARN, f"{len(left)} objects of dead sessions in {machine.shm}", "xccl gc")
    return Finding(PASS, f"nothing left of dead sessions in {machine.shm}")


def check_huge_pages(machine: Machine) -> Finding:
    """Huge pages are used where the system gives them; nothing depends on them."""
    setting = machine.read("sys/kernel/mm/transparent_hugepage/shmem_enabled")
    return Finding(PASS, f"not needed; for shared memory: {setting or 'not offered'}")


# ---- limits ----


def check_address_space(machine: Machine) -> Finding:
    """A world is mapped as a whole: much address space, without memory behind it."""
    needed = int(lib.xccl_shm_object_bytes(ffi.new("xccl_config_t *", {"size": 2, "heap_bytes": rc.heap_size})))
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    why = f"two ranks map {needed >> 30} GiB; the limit is "
    if limit != resource.RLIM_INFINITY and limit < needed:
        return Finding(FAIL, f"{why}{limit >> 30} GiB (ulimit -v)", "ulimit -v unlimited, or a lower XCCL_HEAP_SIZE")
    return Finding(PASS, f"{why}{'none' if limit == resource.RLIM_INFINITY else f'{limit >> 30} GiB'}")


def check_overcommit(machine: Machine) -> Finding:
    """Strict accounting of memory ends allocations early, with an error."""
    mode = machine.read("proc/sys/vm/overcommit_memory")
    if mode == "2":
        return Finding(
            WARN,
            "vm.overcommit_memory is 2: shared pages count against the commit limit",
            "sysctl vm.overcommit_memory=0 if allocations fail while memory is free",
        )
    return Finding(PASS, f"vm.overcommit_memory is {mode or 'not readable'}")


def check_memory_limit(machine: Machine) -> Finding:
    """Shared memory counts against the container's memory: beyond it the kernel kills, and no error is raised."""
    limits = read_limits(machine.root)
    disk = os.statvfs(machine.shm)
    shared = disk.f_bavail * disk.f_frsize
    if limits.memory is None:
        return Finding(PASS, "no control group limits memory")
    left = limits.memory - (limits.memory_used or 0)
    why = f"{_mib(left)} left of the container's {_mib(limits.memory)}; shared memory counts"
    if disk.f_blocks == 0 or shared > left:
        todo = f"raise the container's memory, or make {machine.shm} smaller than it: "
        todo += "the kernel kills a rank before the shared memory is full"
        return Finding(WARN, why, todo)
    return Finding(PASS, why)


def check_cores(machine: Machine) -> Finding:
    """Cores that the ranks share."""
    affinity, online = len(os.sched_getaffinity(0)), os.cpu_count() or 1
    quota = read_limits(machine.root).cpus
    why = f"{affinity} of {online} cores in the affinity mask"
    if quota is not None and quota < affinity:
        return Finding(
            WARN,
            f"{why}, but time for {quota:g} (control group)",
            "no more ranks than that; or raise the container's --cpus",
        )
    return Finding(PASS, f"{why}; more ranks than cores work, too")


def check_descriptors(machine: Machine) -> Finding:
    """The launcher has three descriptors for each rank."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = (limit - 32) // 3
    if most < 2:
        return Finding(FAIL, f"{limit} open files (ulimit -n)", "ulimit -n 1024")
    return Finding(PASS, f"{limit} open files: up to {most} ranks")


def check_processes(machine: Machine) -> Finding:
    """Each rank is a process with a few threads."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NPROC)
    pids = read_limits(machine.root).pids
    limits = [number for number in (None if limit == resource.RLIM_INFINITY else limit, pids) if number is not None]
    if limits and min(limits) < 64:
        return Finding(WARN, f"at most {min(limits)} processes", "raise ulimit -u, or the container's --pids-limit")
    return Finding(PASS, f"at most {min(limits)} processes" if limits else "no limit of processes")


# ---- what ranks do with the kernel ----


def check_futex(machine: Machine) -> Finding:
    """Waiting ranks sleep on a futex."""
    number = FUTEX_CALLS.get(platform.machine())
    if number is None:
        return Finding(WARN, f"not checked on {platform.machine()}")
    word = ctypes.c_uint32()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.syscall(number, ctypes.byref(word), FUTEX_WAKE, 1, None, None, 0) < 0:
        return Finding(FAIL, f"futex: {os.strerror(ctypes.get_errno())}", "let the sandbox (seccomp) allow futex")
    return Finding(PASS, "futex works")


def check_processes_visible(machine: Machine) -> Finding:
    """A dead rank is found in /proc."""
    fields = machine.read("proc/self/stat").rpartition(")")[2].split()
    if not fields:
        return Finding(FAIL, "/proc is not mounted", "mount -t proc proc /proc: death of a rank is seen there")
    if machine.root == Path("/") and os.readlink("/proc/self") != str(os.getpid()):
        return Finding(WARN, "/proc shows another PID namespace: deaths are told by locks", "mount a /proc of this one")
    mount = _mount_of(machine, Path("/proc"))
    if mount is not None and "hidepid=" in mount[2] and "hidepid=0" not in mount[2]:
        return Finding(PASS, "/proc hides other users' processes; own ones are seen")
    return Finding(PASS, "/proc tells of this user's processes; no right to trace (ptrace) is needed")


def check_pidfd(machine: Machine) -> Finding:
    """`xccl run` waits for its ranks by descriptor."""
    try:
        os.close(os.pidfd_open(os.getpid()))
    except OSError as error:
        return Finding(FAIL, f"pidfd_open: {error.strerror}", "let the sandbox (seccomp) allow pidfd_open")
    return Finding(PASS, "pidfd_open works")


def check_sockets(machine: Machine) -> Finding:
    """Ranks of mpirun and torchrun get the shared memory over an abstract Unix socket."""
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as server:
            server.bind(f"\0xccl-doctor-{os.getpid()}")
    except OSError as error:
        todo = "needed under mpirun and torchrun only; XCCL_SHM_DIR does without it"
        return Finding(WARN, f"abstract Unix sockets: {error.strerror}", todo)
    return Finding(PASS, "abstract Unix sockets work")


def check_mpi(machine: Machine) -> Finding:
    """The mpirun in PATH is the one of mpi4py's MPI."""
    code = "import mpi4py; mpi4py.rc.initialize = False; from mpi4py import MPI; print(MPI.Get_library_version())"
    library = _output([sys.executable, "-c", code])
    mpirun = shutil.which("mpirun") or shutil.which("mpiexec")
    launcher = _output([mpirun, "--version"]) if mpirun else ""
    if not library:
        return Finding(PASS, "mpi4py is not installed; xccl run needs no MPI (pip install 'xccl[mpi]' brings one)")
    if not launcher:
        return Finding(
            WARN, f"mpi4py uses {_vendor(library)}, and no mpirun is in PATH", "xccl run, or install that MPI"
        )
    why = f"mpi4py uses {_vendor(library)}, {mpirun} is of {_vendor(launcher)}"
    if _vendor(library) != _vendor(launcher):
        return Finding(WARN, why, "use the mpirun of mpi4py's MPI, or point MPI4PY_LIBMPI at the library of this one")
    return Finding(PASS, why)


def check_world(machine: Machine) -> Finding:
    """Two ranks start, exchange something and end."""
    command = [sys.executable, "-c", _WORLD]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=_own_environment())
    except subprocess.TimeoutExpired:
        return Finding(
            FAIL, "two ranks did not end in 60 s", "xccl run -n 2 --timeout 10 program.py shows where they hang"
        )
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines()
        return Finding(FAIL, lines[-1] if lines else f"exit code {done.returncode}", "see the other findings")
    return Finding(PASS, "two ranks started, met at a barrier and ended")


def check_single_copy(machine: Machine) -> Finding:
    """Whether the kernel copies from rank to rank (cross-memory attach), as large messages like best."""
    done = subprocess.run(
        [sys.executable, "-c", _SINGLE_COPY], capture_output=True, text=True, timeout=60, env=_own_environment()
    )
    if done.stdout.strip() == "1":
        return Finding(PASS, "ranks read each other's memory: large messages are copied once")
    if rc.cma == "off":
        return Finding(PASS, "switched off by XCCL_CMA=off: large messages are copied twice")
    scope = machine.read("proc/sys/kernel/yama/ptrace_scope")
    why = f"kernel.yama.ptrace_scope is {scope}" if scope not in ("", "0") else "the sandbox or container refuses it"
    return Finding(
        WARN,
        f"ranks cannot read each other's memory ({why}): large messages between ordinary arrays are copied twice",
        "nothing is wrong; for one copy use symmetric arrays, or allow ptrace between processes of one user "
        "(sysctl kernel.yama.ptrace_scope=0; Docker: --cap-add SYS_PTRACE)",
    )


def _own_environment() -> dict[str, str]:
    """Without what would make a new process a rank."""
    return {name: value for name, value in os.environ.items() if name not in LAUNCH_VARIABLES}


_SINGLE_COPY = """
import xccl
from xccl._binding import ffi, lib
def reads(comm):
    info = ffi.new("xccl_rank_info_t *")
    lib.xccl_shm_rank_info(comm._world._w, comm.rank, info)
    return info.reads_peers
print(min(xccl.run(reads, 2, timeout=30)))
"""

_WORLD = """
import xccl
def meet(comm):
    comm.barrier(timeout=20)
xccl.run(meet, 2, timeout=30)
"""

_VENDORS = {
    "Open MPI": ("Open MPI", "OpenRTE", "PRRTE"),
    "Intel MPI": ("Intel",),
    "MPICH": ("MPICH", "HYDRA"),
    "MVAPICH": ("MVAPICH",),
}


def _vendor(text: str) -> str:
    for vendor, words in _VENDORS.items():
        if any(word in text for word in words):
            return vendor
    return text.splitlines()[0]


def _output(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _mount_of(machine: Machine, path: Path) -> tuple[str, str, str] | None:
    """Mount point, type and options of the file system that `path` is on."""
    found = None
    for line in machine.read("proc/self/mounts").splitlines():
        _, point, kind, options, *_ = line.split()
        # the longest mount point that contains it, and of several at one place the last
        if path.is_relative_to(point) and (found is None or len(point) >= len(found[0])):
            found = (point, kind, options)
    return found


def _mib(count: int) -> str:
    return f"{count / MIB:.0f} MiB" if count < 10240 * MIB else f"{count / MIB / 1024:.0f} GiB"


CHECKS: dict[str, Callable[[Machine], Finding]] = {
    "kernel": check_kernel,
    "C core": check_core,
    "SIMD": check_simd,
    "environment": check_environment_variables,
    "shared memory": check_shared_memory,
    "shared memory size": check_shared_memory_size,
    "shared memory mount": check_mount,
    "leftovers": check_leftovers,
    "huge pages": check_huge_pages,
    "address space": check_address_space,
    "overcommit": check_overcommit,
    "memory limit": check_memory_limit,
    "cores": check_cores,
    "open files": check_descriptors,
    "processes": check_processes,
    "futex": check_futex,
    "/proc": check_processes_visible,
    "pidfd": check_pidfd,
    "sockets": check_sockets,
    "MPI": check_mpi,
    "two ranks": check_world,
    "single copy": check_single_copy,
}
