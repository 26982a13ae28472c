"""Every family of bases against stock transformers and PEFT, on
tiny random models: gradients, text, exports."""

from functools import cache
from itertools import product
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from families import AGENTS, FAMILIES, agents_of, of_family
from launching import ddp
from peft import LoraConfig, PeftModel, get_peft_model
from preloaded import forked
from promises import EXACT, MODES
from rounding import AS_EXACT, typical_error
from torch import Tensor
from torch.nn.functional import cross_entropy
from toy import ALPHA, RANK, max_difference, run, toy_batch, toy_samples

from chorus.checkpoint.export import save_ensemble
from chorus.config import Config
from chorus.data.batches import Batch, collate
from chorus.errors import InputError
from chorus.model.adapters import TensorId
from chorus.model.agents import Agents, Mode, causal_lm
from chorus.model.attention import check_packing
from chorus.model.base import head_of, trunk_of
from chorus.model.kernels.cuda_graphs import CapturedPasses
from chorus.model.kernels.decoder_layers import Recompute
from chorus.model.targets import peft_target_modules

PAD = 1  # as train.py pads: with the end token, whose embedding is not zero as that of a padding token may be
WITHOUT_PACKING = {"qwen3.5"}  # its linear attention carries a state from sample to sample
# Experts are chosen by what the tokens say: neither one trace nor one graph fits every batch.
UNCAPTURED = {
    "gemma-3n",  # moves a scalar from the CPU in every pass
    "gpt-oss",
    "mixtral",
    "qwen3-moe",
    "deepseek-v3",
    "gemma-4 experts",
    "gemma-4 multimodal experts",
}
# Seeds of rows of one shape, packed or not: a further shape would compile every layer anew.
ONE_SHAPE = (4, 6, 12, 19, 24, 39, 43, 51)
SAMPLE = ["gemma-3 multimodal", "gemma-4 shared", "granite", "gpt2", "qwen3-moe"]
SAMPLED = [name if name in SAMPLE else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES]
EVERY_FAMILY = pytest.mark.parametrize("family", SAMPLED)


def stock_peft(family: str, agents: Agents, agent: int, **how: Any) -> tuple[PeftModel, dict[str, Tensor]]:
    """The agent alone in a PeftModel on a base of its own, and its trainable tensors."""
    paths = [identity.path.removeprefix("base_model.model.") for identity in agents.adapter_tensors()]
    base = of_family(family)
    targets = peft_target_modules(dict.fromkeys(paths), [path for path, _ in base.named_modules()])
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=targets, task_type="CAUSAL_LM", **how)
    model = get_peft_model(base, config)  # pyright: ignore[reportArgumentType]
    trained = {name: tensor for name, tensor in model.named_parameters() if tensor.requires_grad}
    own = {
        identity: tensor for identity, tensor in agents.adapter_tensors().items() if identity.agent == agent
    }
    assert trained.keys() == {f"{one.path}.lora_{one.matrix}.default.weight" for one in own}, (
        "PEFT adapts other layers"
    )
    for identity, tensor in own.items():
        trained[f"{identity.path}.lora_{identity.matrix}.default.weight"].data.copy_(tensor)
    return model, trained  # pyright: ignore[reportReturnType]


@cache
def stock_gradients(family: str, targets: str) -> dict[TensorId, Tensor]:
    """Of every agent, by stock PEFT and the stock loss."""
    agents, batch, found = agents_of(family, targets=targets), toy_batch(), {}
    labels = batch.target_BT.masked_fill(~batch.mask_BT, -100).flatten()
    for agent in agents.agents:
        model, trained = stock_peft(family, agents, agent)
        cross_entropy(model(input_ids=batch.input_BT).logits.flatten(0, 1), labels).backward()
        for identity in agents.adapter_tensors():
            if identity.agent == agent:
                found[identity] = trained[f"{identity.path}.lora_{identity.matrix}.default.weight"].grad
    return found


def assert_stock_gradients(
    agents: Agents, family: str, batch: Batch | None = None, targets: str = "auto"
) -> None:
    _, gradients = run(agents, batch or toy_batch(), lambda_sw=0)
    for identity, expected in stock_gradients(family, targets).items():
        assert max_difference(gradients[identity], expected) < EXACT, identity


@EVERY_FAMILY
def test_the_default_targets_get_the_gradients_of_stock_peft(family: str):
    agents = agents_of(family)
    assert_stock_gradients(agents, family)
    trained = [name for name, parameter in agents.named_parameters() if parameter.requires_grad]
    assert trained == [f"agent_{agent}" for agent in range(AGENTS)], "the base asks for gradients"


@pytest.mark.slow
@pytest.mark.parametrize("targets", ["auto", "all-linear"])
@pytest.mark.parametrize(("mode", "recompute"), [*product(MODES, get_args(Recompute))])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_mode_and_recomputation_gets_the_gradients_of_stock_peft(
    family: str, mode: Mode, recompute: Recompute, targets: str
):
    assert_stock_gradients(agents_of(family, mode, targets, recompute=recompute), family, targets=targets)


@EVERY_FAMILY
def test_packed_samples_get_the_gradients_of_samples_one_a_row(family: str):
    agents, samples = agents_of(family), toy_samples(4)
    if family in WITHOUT_PACKING:
        with pytest.raises(InputError, match="key 'packing'"):
            check_packing(of_family(family))
        return
    _, expected = run(agents, collate(samples, PAD), lambda_sw=0)
    _, packed = run(agents, collate(samples, PAD, packing=40), lambda_sw=0)
    for identity, gradient in expected.items():
        assert max_difference(packed[identity], gradient) < EXACT, identity


@EVERY_FAMILY
def test_an_exported_folder_gives_stock_peft_the_logits_of_the_agent(family: str, tmp_path: Path):
    base = of_family(family)
    base.config.save_pretrained(tmp_path / "base")
    agents, batch = agents_of(family), toy_batch()
    config = Config(model_name=str(tmp_path / "base"), num_agents=AGENTS, lora_rank=RANK, lora_alpha=ALPHA)
    save_ensemble(tmp_path, agents.adapter_tensors(), [0.5, 0.5], config, {})
    agents.eval()
    for agent in agents.agents:
        with torch.no_grad(), agents.trunk(agent) as trunk:
            ours = agents.head().logits(trunk(input_ids=batch.input_BT, use_cache=False).last_hidden_state)
        stock = PeftModel.from_pretrained(of_family(family), tmp_path / "agents" / f"agent_{agent}").eval()
        loaded = sum("lora_" in name for name, _ in stock.named_parameters())
        assert loaded == len(agents.layout.shapes), "PEFT adapts other layers"
        with torch.no_grad():
            assert max_difference(ours, stock(input_ids=batch.input_BT, use_cache=False).logits) < EXACT


@EVERY_FAMILY
def test_text_is_that_of_stock_generate(family: str):
    """Greedy, with a cache; the logits of each token, so that a close call cannot hide a difference."""
    agents = agents_of(family)
    agents.eval()
    prompt_BT, count = toy_batch().input_BT[:1, :7], 8
    model, _ = stock_peft(family, agents, 1)
    model.eval()
    told = model.generate(
        input_ids=prompt_BT,
        attention_mask=torch.ones_like(prompt_BT),
        max_new_tokens=count,
        min_new_tokens=count,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    ids_BT, cache, place = prompt_BT, None, 0
    with torch.no_grad(), agents.trunk(1) as trunk:
        for step in range(count):
            position_BT = torch.arange(place, place + ids_BT.shape[1])[None]
            mask_BT = torch.ones(1, place + ids_BT.shape[1], dtype=torch.int64)
            how = {
                "attention_mask": mask_BT,
                "position_ids": position_BT,
                "past_key_values": cache,
                "use_cache": True,
            }
            output = trunk(input_ids=ids_BT, **how)
            cache, place = output.past_key_values, place + ids_BT.shape[1]
            logits_BV = agents.head().logits(output.last_hidden_state[:, -1])
            assert max_difference(logits_BV, told.logits[step]) < 1e-4, step
            ids_BT = told.sequences[:, prompt_BT.shape[1] + step][:, None]


@EVERY_FAMILY
def test_the_head_of_the_trunk_gives_the_models_own_logits(family: str):
    model, batch = of_family(family), toy_batch()
    with torch.no_grad():
        hidden_BTD = trunk_of(model)(input_ids=batch.input_BT, use_cache=False).last_hidden_state
        own = model(input_ids=batch.input_BT, use_cache=False).logits
    assert max_difference(head_of(model).logits(hidden_BTD), own) < 1e-6


@pytest.mark.launch
@pytest.mark.parametrize(
    "family",
    ["gemma-3 multimodal", *(pytest.param(one, marks=pytest.mark.slow) for one in ("mixtral", "gpt2"))],
)
def test_two_ddp_processes_get_the_gradients_of_one(family: str, tmp_path: Path):
    """Twice in a row: a parameter that asks for a gradient and
    never gets one stops DDP at its second step."""
    result = forked([*ddp(2)[:-1], "tests/helpers/family_worker.py"], family, str(tmp_path))
    assert result.returncode == 0, result.stderr[-3000:]
    agents = agents_of(family)
    _, expected = run(agents, toy_batch(without_targets=None), lambda_sw=0)
    for name in ("first", "second"):
        found = torch.load(tmp_path / f"{name}.pt", weights_only=True)
        for agent, adapter_F in agents.adapters().items():
            assert adapter_F.grad is not None
            assert max_difference(found[agent], adapter_F.grad) < EXACT, name
    assert len(expected) == 2 * len(agents.layout.shapes)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("packing", [None, 40], ids=["", "packed"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_defaults_of_a_gpu_are_as_exact_as_plain_bf16(family: str, packing: int | None):
    """Compiled and captured, over eight batches of one shape, the
    last of them replayed: errors against fp32 as of plain bf16."""
    if packing and family in WITHOUT_PACKING:
        pytest.skip("refuses packing")
    fast = {"compiled": True, "captured": True, "may_fall_back": family in UNCAPTURED}
    agents = agents_of(family, dtype=torch.bfloat16, device="cuda", **fast)
    found = flat_gradients(agents, packing)
    passes = agents._run_pass
    assert isinstance(passes, CapturedPasses)
    assert bool(passes.captures) or family in UNCAPTURED
    exact = flat_gradients(agents_of(family, device="cuda"), None)
    plain = flat_gradients(agents_of(family, dtype=torch.bfloat16, device="cuda"), None)
    for agent in agents.agents:
        allowed = typical_error(plain[agent], exact[agent])
        assert typical_error(found[agent], exact[agent]) < AS_EXACT * allowed + 1e-4, agent


def flat_gradients(agents: Agents, packing: int | None) -> dict[int, list[Tensor]]:
    """Of each agent, those of each of eight batches."""
    found: dict[int, list[Tensor]] = {agent: [] for agent in agents.agents}
    for seed in ONE_SHAPE:
        batch = collate(toy_samples(4, 20, seed=seed), PAD, 20, packing=packing).to(
            causal_lm(agents.peft_model(0)).device
        )
        run(agents, batch, step=seed, lambda_sw=0)
        for agent, adapter_F in agents.adapters().items():
            assert adapter_F.grad is not None
            found[agent].append(adapter_F.grad.float().clone())
    return found
