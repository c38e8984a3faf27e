"""How ranks ended: what a launcher, which reaps them, can tell of it."""

from __future__ import annotations

import signal

from xccl._binding import lib
from xccl._world import Observer
from xccl.cgroup import oom_kills

_OF_A_SHELL = 128  # a shell exits with 128 + n when signal n killed its child


def describe_exit(code: int) -> str:
    """ "killed by SIGKILL" or "exited with code 3", from an exit code, or minus the number of a signal."""
    if code >= 0:
        return f"exited with code {code}"
    try:
        return f"killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"killed by signal {-code}"


class Exits:
    """Puts into the rank table why ranks died, where the others find it.

    A code is an exit code, or minus the number of a signal. "Its process" is what the launcher started as a rank: the
    rank itself, or a shell in front of it.
    """

    def __init__(self, observer: Observer) -> None:
        self._observer = observer
        self._oom_kills = oom_kills()

    def describe(self, code: int) -> str:
        """ "killed by SIGKILL", "exited with code 3", or "killed, out of memory"."""
        return "killed, out of memory" if self._is_out_of_memory(code) else describe_exit(code)

    def of_rank(self, rank: int, pid: int, code: int) -> int:
        """The rank's own code, from that of its process: a shell tells of a signal in its own way."""
        behind_shell = self._observer.pid(rank) != pid
        return _OF_A_SHELL - code if behind_shell and code > _OF_A_SHELL else code

    def note(self, rank: int, pid: int, code: int) -> None:
        """Tells the ranks how `rank`, whose process is `pid`, ended. `code` is its own."""
        if self._observer.pid(rank) != pid and code >= 0:
            return  # that of a shell, which need not be the rank's
        if self._is_out_of_memory(code):
            self._observer.note_exit(rank, lib.XCCL_EXIT_MEMORY, -code)
        elif code < 0:
            self._observer.note_exit(rank, lib.XCCL_EXIT_SIGNAL, -code)
        else:
            self._observer.note_exit(rank, lib.XCCL_EXIT_CODE, code)

    def _is_out_of_memory(self, code: int) -> bool:
        return code == -signal.SIGKILL and oom_kills() > self._oom_kills
