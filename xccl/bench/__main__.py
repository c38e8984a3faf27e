"""`python -m xccl.bench OP ...` is `xccl bench OP ...`, for mpirun."""

import sys

from xccl.cli import main

sys.exit(main(["bench", *sys.argv[1:]]))
