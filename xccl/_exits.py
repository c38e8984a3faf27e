"""How ranks ended: what a launcher, which reaps them, can tell of it."""

from __future__ import annotations

import signal

from xccl._binding import lib
from xccl._world import Observer
from xccl.cgroup import oom_kills

_OF_A_SHELL = 128  # a shell exits with 128 + n when signal n killed its child


class Exits:
    """Puts into the rank table why ranks died, where the others find it.

    A code is an exit code, or minus the number of a signal.
    """

    def __init__(self, observer: Observer) -> None:
        self._observer = observer
        self._oom_kills = oom_kills()

    def describe(self, code: int) -> str:
        """ "killed by SIGKILL", "exited with code 3", or "killed, out of memory"."""
        if self._is_out_of_memory(code):
            return "killed, out of memory"
        if code >= 0:
            return f"exited with code {code}"
        try:
            return f"killed by {signal.Signals(-code).name}"
        except ValueError:
            return f"killed by signal {-code}"

    def note(self, rank: int, pid: int, code: int) -> None:
        """Tells the ranks how the process `pid`, which was started as `rank`, has ended."""
        if self._observer.pid(rank) != pid:  # a shell, which has reaped the rank
            if code <= _OF_A_SHELL:
                return
            code = _OF_A_SHELL - code
        if self._is_out_of_memory(code):
            self._observer.note_exit(rank, lib.XCCL_EXIT_MEMORY, -code)
        elif code < 0:
            self._observer.note_exit(rank, lib.XCCL_EXIT_SIGNAL, -code)
        else:
            self._observer.note_exit(rank, lib.XCCL_EXIT_CODE, code)

    def _is_out_of_memory(self, code: int) -> bool:
        return code == -signal.SIGKILL and oom_kills() > self._oom_kills
