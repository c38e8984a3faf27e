"""`xccl run`: output, exit codes, failures, Ctrl-C, the launcher's own death."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from subprocess import PIPE

import pytest

from xccl.cli_run import Job

PROGRAM = """
import os, signal, sys, time
import xccl
comm = xccl.init()
mode, rank = sys.argv[1], comm.rank
if mode == "hello":
    print(f"hello from {rank} of {comm.size}")
    sys.stderr.write(f"{rank} on stderr\\n")
elif mode == "raise" and rank == 1:
    raise RuntimeError("rank one is unhappy")
elif mode == "exit" and rank == 1:
    comm.abort("leaving with 7")
    os._exit(7)
elif mode == "kill" and rank == 1:
    os.kill(os.getpid(), signal.SIGKILL)
elif mode == "wait":
    print(f"pid {os.getpid()}", flush=True)
    if rank == 1:
        time.sleep(60)
elif mode == "stdin":
    print(f"{rank} read {sys.stdin.read()!r}")
elif mode == "partial":
    sys.stdout.write("no newline")
elif mode == "twice":
    comm.close()
    xccl.init()
comm.wait_until(comm.signal(), "==", 0)
"""


@pytest.fixture
def program(tmp_path: Path) -> Path:
    path = tmp_path / "program.py"
    path.write_text(PROGRAM)
    return path


def _run(*arguments: object, **options: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "xccl", "run", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, **options)  # type: ignore[call-overload, no-any-return]


def test_all_ranks_run_and_print(program: Path) -> None:
    done = _run("-n", 3, program, "hello")
    assert done.returncode == 0
    assert sorted(done.stdout.splitlines()) == [f"hello from {rank} of 3" for rank in range(3)]
    assert sorted(done.stderr.splitlines()) == [f"{rank} on stderr" for rank in range(3)]


def test_prefix_names_the_rank_of_each_line(program: Path) -> None:
    done = _run("-n", 2, "--prefix", program, "hello")
    assert sorted(done.stdout.splitlines()) == ["[0] hello from 0 of 2", "[1] hello from 1 of 2"]


def test_an_unfinished_line_is_shown(program: Path) -> None:
    assert _run("-n", 1, program, "partial").stdout == "no newline"


def test_only_rank_0_has_standard_input(program: Path) -> None:
    done = _run("-n", 2, program, "stdin", input="text")
    assert sorted(done.stdout.splitlines()) == ["0 read 'text'", "1 read ''"]


def test_an_exception_is_shown_once_and_ends_all(program: Path) -> None:
    done = _run("-n", 3, program, "raise")
    assert done.returncode == 1
    assert done.stderr.count("Traceback") == 1
    assert "RuntimeError: rank one is unhappy" in done.stderr
    assert "xccl run: rank 1 " in done.stderr.splitlines()[-1]


def test_with_keep_going_the_survivors_of_a_kill_go_on(tmp_path: Path) -> None:
    program = tmp_path / "survive.py"
    program.write_text(
        "import os, signal, xccl\n"
        "comm = xccl.init()\n"
        "if comm.rank == 1:\n    os.kill(os.getpid(), signal.SIGKILL)\n"
        "try:\n    comm.barrier()\n"
        "except xccl.XcclPeerLost:\n    comm = comm.shrink()\n"
        "print(f'{comm.rank} of {comm.size}')\n"
    )
    done = _run("-n", 3, "--keep-going", program)
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == ["0 of 2", "1 of 2"]
    assert "rank 1" in done.stderr
    assert "was killed by SIGKILL" in done.stderr
    assert "the others go on" in done.stderr


@pytest.mark.parametrize("shell", [[], ["sh", "-c"]])
def test_the_survivors_learn_the_signal_also_behind_a_shell(tmp_path: Path, shell: list[str]) -> None:
    program = tmp_path / "survive.py"
    program.write_text(
        "import os, signal, xccl\n"
        "comm = xccl.init()\n"
        "if comm.rank == 1:\n    os.kill(os.getpid(), signal.SIGKILL)\n"
        "try:\n    comm.barrier()\n"
        "except xccl.XcclPeerLost as error:\n    print(error.rank, error.cause)\n    comm.shrink()\n"
    )
    command = [*shell, f"{sys.executable} {program}; exit $?"] if shell else [program]
    done = _run("-n", 3, "--keep-going", *command)
    assert done.stdout.splitlines() == ["1 killed by SIGKILL"] * 2, done.stderr


def test_a_killed_rank_is_named(program: Path) -> None:
    done = _run("-n", 3, program, "kill")
    assert done.returncode == 128 + signal.SIGKILL
    assert "was killed by SIGKILL in operation" in done.stderr
    assert "xccl run: rank 1 " in done.stderr


def test_the_exit_code_of_the_failing_rank_is_passed_on(program: Path) -> None:
    assert _run("-n", 2, program, "exit").returncode == 7


def test_the_time_limit_ends_all(program: Path) -> None:
    done = _run("-n", 2, "--timeout", "1.5", program, "wait")
    assert done.returncode == 124
    assert "ranks still ran after 1.5 s" in done.stderr
    assert "rank 1 (pid" in done.stderr


def test_init_again_under_the_launcher_is_refused(program: Path) -> None:
    done = _run("-n", 1, program, "twice")
    assert done.returncode == 1
    assert "a rank attaches once" in done.stderr


def _heed_ctrl_c() -> None:
    """A shell starts what it puts into the background with SIGINT ignored, and children inherit that."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _start_waiting(program: Path, *, behind_shells: bool = False) -> tuple[subprocess.Popen[str], list[int]]:
    """Two ranks: 0 waits in xccl, 1 sleeps outside it."""
    waiting = [str(program), "wait"]
    if behind_shells:  # so the rank's parent is no child of the launcher, and gets no signal at its death
        waiting = ["sh", "-c", f"sh -c '{sys.executable} {program} wait; exit $?'; exit $?"]
    command = [sys.executable, "-m", "xccl", "run", "-n", "2", *waiting]
    launcher = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=_heed_ctrl_c
    )
    assert launcher.stdout is not None
    return launcher, [int(launcher.stdout.readline().split()[1]) for _ in range(2)]


def _gone(pid: int) -> bool:
    try:
        return "Z" in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return True


def _await_gone(pids: list[int]) -> None:
    deadline = time.monotonic() + 20
    while not all(map(_gone, pids)):
        assert time.monotonic() < deadline, f"still running: {[pid for pid in pids if not _gone(pid)]}"
        time.sleep(0.02)


@pytest.mark.parametrize("behind_shells", [False, True])
def test_ctrl_c_ends_all_with_one_message(program: Path, behind_shells: bool) -> None:
    launcher, pids = _start_waiting(program, behind_shells=behind_shells)
    launcher.send_signal(signal.SIGINT)
    _, errors = launcher.communicate(timeout=30)
    assert launcher.returncode == 130
    assert errors == "xccl run: interrupted; ended all ranks\n"
    _await_gone(pids)


@pytest.mark.parametrize("behind_shells", [False, True])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_ranks_do_not_outlive_their_launcher(program: Path, number: signal.Signals, behind_shells: bool) -> None:
    launcher, pids = _start_waiting(program, behind_shells=behind_shells)
    launcher.send_signal(number)
    launcher.communicate(timeout=30)
    _await_gone(pids)


@pytest.mark.parametrize(
    ("arguments", "message", "code"),
    [
        (["-n", "0", "x.py"], "the number of ranks is 1 to 4096, got 0", 2),
        (["-n", "two", "x.py"], "invalid int value", 2),
        (["x.py"], "required: -n", 2),
        (["-n", "2"], "required: PROGRAM", 2),
        (["-n", "1", "/nowhere/program"], "No such file", 1),
    ],
)
def test_wrong_command_lines_are_explained(arguments: list[str], message: str, code: int) -> None:
    done = _run(*arguments)
    assert message in done.stderr
    assert done.returncode == code
    assert "Traceback" not in done.stderr


@pytest.fixture
def start_as_torchrun(tmp_path: Path) -> Iterator[Callable[[str, int], list[subprocess.Popen[str]]]]:
    """Starts ranks of a program that nobody watches over; ends what still runs afterwards."""
    started: list[subprocess.Popen[str]] = []

    def start(body: str, size: int) -> list[subprocess.Popen[str]]:
        program = tmp_path / "program.py"
        program.write_text("import os, sys\nimport xccl\ncomm = xccl.init()\n" + body)
        job = {
            "WORLD_SIZE": str(size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(os.getpid()),
            "TORCHELASTIC_RUN_ID": "t",
        }
        for rank in range(size):
            environment = os.environ | job | {"RANK": str(rank)}
            started.append(
                subprocess.Popen([sys.executable, str(program)], env=environment, stdout=PIPE, stderr=PIPE, text=True)
            )
        return started

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_torchruns_variables_form_a_world(start_as_torchrun: Callable[..., list[subprocess.Popen[str]]]) -> None:
    ranks = start_as_torchrun("print(comm.rank, comm.size)\ncomm.close()\n", 3)
    assert [rank.communicate(timeout=30)[0] for rank in ranks] == [f"{rank} 3\n" for rank in range(3)]


def test_a_death_is_noticed_without_a_launcher(
    start_as_torchrun: Callable[..., list[subprocess.Popen[str]]],
) -> None:
    """Nobody watches over these ranks: the survivors find the dead one in the process table, and name it."""
    body = "os.kill(os.getpid(), 9) if comm.rank == 1 else comm.wait_until(comm.signal(), '==', 1)\n"
    ranks = start_as_torchrun(body, 3)
    outputs = [rank.communicate(timeout=30) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [1, -9, 1]
    for survivor in (0, 2):
        assert "rank 1" in outputs[survivor][1]
    assert any(f"XcclPeerLost: rank {r}:" in outputs[r][1] and "rank 1 is lost" in outputs[r][1] for r in (0, 2))


def test_a_rank_that_failed_before_the_first_look_is_seen() -> None:
    job = Job(["sh", "-c", "exit 3"], 1, prefix=False)
    try:
        job.start()
        os.waitid(os.P_PID, job.processes[0].pid, os.WEXITED | os.WNOWAIT)
        assert job.processes[0].poll() == 3
        assert job.watch(timeout=None) == 3
    finally:
        job.close()
