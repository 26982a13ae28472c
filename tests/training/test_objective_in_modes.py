"""The whole objective, in every mode, against K models of stock PEFT and the formula written out in float64.

The reference makes the logits of all agents whole and runs one backward through everything: each agent's
cross-entropy, the responsibilities of Soft Specialists, and the sliced distance between distributions.
"""

from functools import cache
from math import sqrt
from typing import get_args

import pytest
import torch
from mesh_worker import STEPS, Case, run
from peft import LoraConfig, get_peft_model
from promises import EVERY_MODE, EXACT
from torch import Tensor
from torch.nn.functional import cross_entropy
from toy import (
    ALPHA,
    RANK,
    TARGETS,
    VOCABULARY,
    gradients_of,
    max_difference,
    tiny_gemma,
    toy_agents,
    toy_batch,
)

from chorus.config import Config
from chorus.mesh import ALONE
from chorus.model.adapters import TensorId
from chorus.model.agents import Mode
from chorus.model.kernels.decoder_layers import Recompute
from chorus.training.function_space import Directions
from chorus.training.objective import objective_of
from chorus.training.schedule import diversity_weight

CONFIG = Config(
    num_agents=3,
    batch_size=4,
    lambda_sw=0.5,
    lambda_sw_warmup_ratio=0.4,
    swd_space="probabilities",
    swd_num_projections=7,
    responsibility_alpha=0.3,
    responsibility_floor=0.2,
)
STEP, NUM_STEPS, LAMBDA = 1, 10, 0.25  # the second of four warm-up steps


@cache
def stock() -> tuple[float, dict[TensorId, Tensor]]:
    """The objective and its gradients."""
    batch, logits, parameters = toy_batch(), [], {}
    source = toy_agents("parallel").adapter_tensors()
    for agent in range(3):
        config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=list(TARGETS), task_type="CAUSAL_LM")
        model = get_peft_model(tiny_gemma().double(), config)
        named = dict(model.named_parameters())
        for identity, tensor in source.items():
            if identity.agent == agent:
                own = named[f"{identity.path}.lora_{identity.matrix}.default.weight"]
                own.data = tensor.double()
                parameters[identity] = own
        logits.append(model(input_ids=batch.input_BT).logits)
    logits_KBTV = torch.stack(logits)
    labels_BT = batch.target_BT.masked_fill(~batch.mask_BT, -100)
    loss_KB = torch.stack(
        [
            torch.stack(
                [
                    cross_entropy(own, label, reduction="sum")
                    for own, label in zip(rows, labels_BT, strict=True)
                ]
            )
            for rows in logits_KBTV
        ]
    ).nan_to_num()  # of a row without targets
    renyi_B = -torch.log(torch.exp(-0.7 * loss_KB).mean(0)) / 0.7
    task = (0.8 * renyi_B + 0.2 * loss_KB.mean(0)).sum() / len(batch.target_rows_N)
    places = batch.points_SM[batch.points_SM >= 0]
    points_KNV = sqrt(VOCABULARY) * logits_KBTV.softmax(-1).flatten(1, 2)[:, places]
    [(_, slices_VP)] = Directions(7, CONFIG.seed, STEP).pieces(VOCABULARY, torch.device("cpu"))
    sorted_KNP = (points_KNV @ (slices_VP.double() / sqrt(VOCABULARY))).sort(dim=1).values
    pairs = [(sorted_KNP[i] - sorted_KNP[j]).square().mean() for i in range(3) for j in range(i)]
    whole = 3 * (task - LAMBDA * torch.stack(pairs).mean())
    gradients = torch.autograd.grad(whole, list(parameters.values()))
    return whole.item(), dict(zip(parameters, gradients, strict=True))


@EVERY_MODE
@pytest.mark.parametrize("checkpointing", get_args(Recompute))
def test_the_objective_and_every_agents_gradient_are_those_of_stock_models_and_the_formula_in_float64(
    mode: Mode, checkpointing: Recompute
):
    value, gradients = stock()
    batch, agents = toy_batch(), toy_agents(mode, gradient_checkpointing=checkpointing)
    lambda_at = diversity_weight(CONFIG.lambda_sw, NUM_STEPS, CONFIG.lambda_sw_warmup_ratio, 0.0)
    loss_fn = objective_of(CONFIG, CONFIG, ALONE, agents.head(), lambda_at)
    part = loss_fn(*agents(batch, step=STEP), batch, num_targets=len(batch.target_rows_N), step=STEP)
    part.share.backward()
    assert part.shared_nll is not None
    assert part.swd is not None
    found = part.shared_nll / len(batch.target_rows_N) - LAMBDA * part.swd
    assert 3 * found.item() == pytest.approx(value, rel=1e-5)
    for identity, gradient in gradients_of(agents).items():
        assert max_difference(gradient, gradients[identity]) < EXACT, identity


def test_the_loop_takes_each_step_with_its_own_lambda_also_resumed_at_any_step():
    """A step of the schedule is, to the bit, one from the same state with lambda constant at that value."""
    ratios = (("lambda_sw_warmup_ratio", 0.5), ("lambda_sw_decay_ratio", 0.5))
    whole = run(Case("fused", lambda_sw=0.8, objective=ratios))
    lambdas = [0.4, 0.8, 0.4]  # two steps up, of which the second is also the first of two down
    assert [whole.rows[step + 1]["lambda_sw"] for step in range(STEPS)] == lambdas
    for step, lambda_sw in enumerate(lambdas):
        saved = whole.states[step] if step else None
        constant = run(Case("fused", lambda_sw=lambda_sw), saved=saved, start=step).states[step + 1]
        resumed = run(Case("fused", lambda_sw=0.8, objective=ratios), saved=saved, start=step).states
        for identity, weight in whole.states[step + 1].weights.items():
            assert torch.equal(weight, constant.weights[identity]), (step, identity)
        for identity, weight in whole.states[STEPS].weights.items():
            assert torch.equal(weight, resumed[STEPS].weights[identity]), (step, identity)
