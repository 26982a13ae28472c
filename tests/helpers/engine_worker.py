"""One of two ZeRO-2 processes: what the engine itself says
about partitions. Writes `rank_N.json` into a folder."""

import json
import sys
from pathlib import Path

import torch
from toy import toy_agents, toy_batch

from chorus.config import Config
from chorus.errors import input_errors_end_the_program
from chorus.training.engine import make_accelerator, start_engine


def main(folder: Path) -> None:
    config = Config(batch_size=4, lambda_sw=0.0, max_grad_norm=0.5, lr=0.01, output_dir=str(folder))
    accelerator = make_accelerator(config, config)
    engine = start_engine(accelerator, toy_agents("parallel"), config)
    zero = engine.module.optimizer
    loss = engine.module(toy_batch(without_targets=None), step=0).nll_KBT.mean()
    engine.module.set_gradient_accumulation_boundary(True)
    engine.module.backward(loss)  # pyright: ignore
    gradients = [gradient.numel() for group in zero.averaged_gradients.values() for gradient in group]
    engine.module.step()
    state = zero.optimizer.state_dict()["state"].values()
    facts = {
        "trainable": sum(adapter_F.numel() for adapter_F in engine.agents.adapters().values()),
        "gradients": sum(gradients),
        "optimizer_state": [
            sum(entry[name].numel() for entry in state) for name in ("exp_avg", "exp_avg_sq")
        ],
        "clipping": engine.module.gradient_clipping(),
        "stage": engine.module.zero_optimization_stage(),
        "world": torch.distributed.get_world_size(),
    }
    (folder / f"rank_{accelerator.process_index}.json").write_text(json.dumps(facts))
    engine.close()


if __name__ == "__main__":
    with input_errors_end_the_program():
        main(Path(sys.argv[1]))
