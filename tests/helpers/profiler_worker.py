"""train.py, where the profiler's clock goes in the optimizer's steps alone, of which ZeRO takes one for each
agent.

Half a second for each on the first process, one on the second. Run by test_profiler.py.
"""

import os
import sys

from clock import Clock

from chorus import spans
from chorus.config import load_config
from chorus.training.optimizer import AgentwiseAdamW
from train import main

if __name__ == "__main__":
    clock, step = Clock(), AgentwiseAdamW.step

    def slow_step(*args, **kwargs):
        clock.spend((1.0 + int(os.environ["RANK"])) / 2)
        return step(*args, **kwargs)

    spans.perf_counter = clock
    AgentwiseAdamW.step = slow_step
    main(load_config(sys.argv[1:]))
