"""put, get, signal, atomics: what they do and what they refuse."""

from __future__ import annotations

import numpy as np
from support import ranks

import xccl


@ranks(1, 2, 3, 8)
def test_put_signal_makes_data_visible_before_the_signal(comm: xccl.Communicator) -> None:
    a, ready = comm.zeros((64, 33), "float32"), comm.signal()
    to, source = (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size
    for turn in range(1, 50):
        comm.put_signal(a, np.full(a.shape, comm.rank * 1000 + turn, a.dtype), to, signal=ready, value=turn)
        assert comm.wait_until(ready, ">=", turn) == turn
        assert (a == source * 1000 + turn).all()
        comm._sync(None)
