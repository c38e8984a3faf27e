"""`python -m xccl` is the command `xccl`."""

import sys

from xccl.cli import main

sys.exit(main())
