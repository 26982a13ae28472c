"""train.py, where the profiler's clock goes in the optimizer's step alone: one second on the first process, two on the
second. Run by test_profiler.py."""

import os
import sys

import torch
from test_spans import Clock

from chorus import spans
from chorus.config import load_config
from train import main

if __name__ == "__main__":
    clock, step = Clock(), torch.optim.AdamW.step

    def slow_step(*args, **kwargs):
        clock.spend(1.0 + int(os.environ["RANK"]))
        return step(*args, **kwargs)

    spans.perf_counter = clock
    torch.optim.AdamW.step = slow_step
    main(load_config(sys.argv[1:]))
