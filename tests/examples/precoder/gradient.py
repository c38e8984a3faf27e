"""Program for the tests: writes the gradient of one global batch, at fixed parameters, to the file given."""

from __future__ import annotations

import sys
from dataclasses import replace

import numpy as np
from precoder.config import TASKS
from precoder.train import settled_process
from precoder.trainer import Trainer

import xccl

with settled_process(), xccl.init() as comm:
    # 10 samples: on 4 ranks the slices are of 2, 3, 2 and 3.
    trainer = Trainer(replace(TASKS["mixed"], precision="float64", batch=10, users=(4,)), comm)
    trainer.compute_gradient(step=3)
    if comm.rank == 0:
        np.save(sys.argv[1], trainer.shared)
    trainer.close()
