"""A number travels round the ring twice: with send/recv, then with put and signal.

xccl run -n 4 examples/ring.py
"""

import numpy as np

import xccl


def ring_of_messages(comm: xccl.Communicator) -> int:
    """Each rank adds its number to what its left neighbour sent, and sends it on."""
    left, right = (comm.rank - 1) % comm.size, (comm.rank + 1) % comm.size
    total = np.zeros(1, np.int64)
    if comm.rank == 0:
        comm.send(total, right)
        comm.recv(total, left)
    else:
        comm.recv(total, left)
        total += comm.rank
        comm.send(total, right)
    return int(total[0])


def ring_of_puts(comm: xccl.Communicator) -> int:
    """The same without messages: write into the right neighbour's memory, then set its signal."""
    right = (comm.rank + 1) % comm.size
    total, arrived = comm.zeros(1, np.int64), comm.signal()
    if comm.rank == 0:
        comm.put_signal(total, np.zeros(1, np.int64), right, signal=arrived, value=1)
        comm.wait_until(arrived, "==", 1)
    else:
        comm.wait_until(arrived, "==", 1)
        comm.put_signal(total, total + comm.rank, right, signal=arrived, value=1)
    return int(total[0])


def main() -> None:
    with xccl.init() as comm:
        by_messages = ring_of_messages(comm)
        by_puts = ring_of_puts(comm)
        if comm.rank == 0:
            print(f"round the ring of {comm.size} ranks: {by_messages} by send/recv, {by_puts} by put/signal")


if __name__ == "__main__":
    main()
