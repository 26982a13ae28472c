import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import of_family
from peft import PeftModel
from safetensors.torch import load_file, save_file
from stock import ADAPTERS, save_adapter, stock_base, word_tokenizer, write_base
from torch import Tensor
from toy import VOCABULARY

from chorus.data.batches import Sample
from chorus.ensemble.load import load_ensemble
from chorus.ensemble.scoring import token_log_probs
from chorus.errors import InputError
from chorus.model import quantisation
from chorus.model.quantisation import QUANTISING

FILE = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def made(base: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Adapters that stock PEFT has made, of different ranks, scalings and layers."""
    place = tmp_path_factory.mktemp("adapters")
    for number, settings in enumerate(ADAPTERS):
        save_adapter(base, place / f"adapter_{number}", number, **settings)
    return [place / f"adapter_{number}" for number in range(len(ADAPTERS))]


def stock_log_probs(base: Path, folder: Path, ids_T: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """What stock PEFT gives each token after the first."""
    model = PeftModel.from_pretrained(stock_base(base, dtype), folder).eval()
    with torch.no_grad():
        log_prob_TV = model(input_ids=ids_T[None]).logits[0].float().log_softmax(-1)
    return log_prob_TV[:-1].gather(1, ids_T[1:, None])[:, 0]


def text_of(length: int = 12) -> Sample:
    ids_T = torch.randint(3, VOCABULARY, (length,), generator=torch.Generator().manual_seed(1))
    return Sample(ids_T, torch.ones(length, dtype=torch.bool))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.bfloat16, 0.25)])
def test_agents_of_any_rank_scaling_and_layers_are_what_stock_peft_makes_of_them(
    base: Path, made: list[Path], dtype: torch.dtype, tolerance: float
):
    """bf16 rounds the adapters, too, which PEFT keeps in fp32:
    a quarter nat is what these large ones leave."""
    ensemble = load_ensemble(made, dtype=dtype)
    sample = text_of()
    (log_prob_KT,) = token_log_probs(ensemble.agents, ensemble.agents.agents, [sample])
    for own_T, folder in zip(log_prob_KT, made, strict=True):
        torch.testing.assert_close(
            own_T, stock_log_probs(base, folder, sample.ids, dtype), atol=tolerance, rtol=0
        )
    assert ensemble.names == tuple(folder.name for folder in made)
    assert ensemble.weights == (0.25,) * 4
    assert ensemble.base_name == str(base)
    assert not ensemble.agents.training


@pytest.mark.parametrize(
    ("family", "targets"), [("deepseek-v3", ["kv_b_proj"]), ("gpt2", ["c_attn", "c_fc"])]
)
def test_bases_that_mix_rows_or_transpose_weights_answer_as_stock_peft_does(
    tmp_path: Path, family: str, targets: list[str]
):
    of_family(family).save_pretrained(tmp_path)
    word_tokenizer().save_pretrained(tmp_path)
    for number in (0, 1):
        save_adapter(tmp_path, tmp_path / "agents" / f"{number}", number, r=2, target_modules=targets)
    agents = load_ensemble(tmp_path / "agents").agents
    sample = text_of()
    (log_prob_KT,) = token_log_probs(agents, agents.agents, [sample])
    for own_T, number in zip(log_prob_KT, (0, 1), strict=True):
        expected_T = stock_log_probs(tmp_path, tmp_path / "agents" / f"{number}", sample.ids)
        torch.testing.assert_close(own_T, expected_T, atol=2e-5, rtol=0)


def test_adapters_of_one_scaling_and_rank_are_kept_bit_by_bit(base: Path, tmp_path: Path):
    for number in (0, 1):
        save_adapter(base, tmp_path / f"{number}", number, r=3, lora_alpha=5, target_modules=["q_proj"])
    ensemble = load_ensemble(tmp_path)
    for identity, tensor in ensemble.agents.adapter_tensors().items():
        stored = load_file(tmp_path / f"{identity.agent}" / FILE)
        assert torch.equal(tensor, stored[f"{identity.path}.lora_{identity.matrix}.weight"])


def test_folders_in_a_folder_come_in_the_order_of_their_numbers(base: Path, tmp_path: Path):
    for number in (10, 2, 1):
        save_adapter(base, tmp_path / f"agent_{number}", number, r=1, target_modules=["q_proj"])
    assert load_ensemble(tmp_path).names == ("agent_1", "agent_2", "agent_10")


def test_a_runs_description_gives_weights_temperature_and_order(base: Path, made: list[Path], tmp_path: Path):
    run = describe(tmp_path, base, made[:2], weights=[0.7, 0.3], temperature=1.5)
    ensemble = load_ensemble(run)
    assert ensemble.weights == (0.7, 0.3)
    assert ensemble.temperature == 1.5
    assert ensemble.names == ("adapter_0", "adapter_1")


def describe(run: Path, base: Path, folders: list[Path], **entries: Any) -> Path:
    for folder in folders:
        shutil.copytree(folder, run / "agents" / folder.name)
    names = [f"agents/{folder.name}" for folder in folders]
    (run / "ensemble.json").write_text(json.dumps({"agents": names, "base_model": str(base), **entries}))
    return run


def edit_tensors(change: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        tensors = load_file(folder / FILE)
        change(tensors)
        save_file(tensors, folder / FILE)

    return edit


def edit_config(**entries: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        file = folder / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | entries))

    return edit


def rename_one(tensors: dict[str, Tensor]) -> None:
    key = next(iter(tensors))
    tensors[key.replace("q_proj", "k_proj").replace("self_attn", "self_attn")] = tensors.pop(key)


def drop_pair(tensors: dict[str, Tensor]) -> None:
    for key in [key for key in tensors if "layers.1.self_attn.q_proj" in key]:
        del tensors[key]


def set_all(value: float, letter: str = "_") -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: [
        tensor.fill_(value) for key, tensor in tensors.items() if f"lora_{letter}" in key or letter == "_"
    ]


DAMAGES: list[tuple[Callable[[Path], Any], str]] = [
    (edit_tensors(lambda tensors: tensors.clear()), "holds no tensor"),
    (edit_tensors(lambda tensors: tensors.pop(next(iter(tensors)))), r"lora_[AB] is missing"),
    (edit_tensors(drop_pair), "2|have no tensor"),
    (edit_tensors(rename_one), r"is missing|not among the target_modules|have no tensor"),
    (edit_tensors(lambda t: t.update({"lm_head.weight": torch.ones(2)})), "no lora_A or lora_B"),
    (
        edit_tensors(lambda t: t.update({"base_model.model.x.lora_A.weight": torch.ones(1, 1)})),
        "no linear layer x",
    ),
    (edit_tensors(lambda t: t.update({k: v[:, :2].contiguous() for k, v in t.items()})), "has shape"),
    (edit_tensors(lambda t: t.update({k: v.long() for k, v in t.items()})), "not a floating-point"),
    (edit_tensors(set_all(float("nan"))), "not finite"),
    (edit_tensors(set_all(0.0, "B")), "adds nothing"),
    (edit_config(use_dora=True), "use_dora"),
    (edit_config(bias="all"), "bias"),
    (edit_config(modules_to_save=["lm_head"]), "modules_to_save"),
    (edit_config(init_lora_weights="pissa"), "pissa"),
    (edit_config(peft_type="IA3"), "IA3"),
    (edit_config(of_a_later_peft={"x": 1}), "of_a_later_peft"),
    (edit_config(r=7), "has shape"),
    (edit_config(base_model_name_or_path="another/base"), "name folders of one base, or .* add base=BASE"),
    (edit_config(r="8"), "r is '8', no whole number above 0; give the rank"),
    (lambda folder: (folder / FILE).rename(folder / "adapter_model.bin"), "may run code"),
    (lambda folder: (folder / FILE).write_bytes((folder / FILE).read_bytes()[:200]), "cannot be read"),
    (lambda folder: (folder / "adapter_config.json").write_text("{"), "cannot be read as JSON"),
    (lambda folder: shutil.rmtree(folder), "no such folder"),
    (lambda folder: (folder / "adapter_config.json").unlink(), "holds no adapters"),
]


@pytest.mark.parametrize(("damage", "words"), DAMAGES)
def test_a_damaged_or_foreign_adapter_is_refused_in_one_line(
    made: list[Path], tmp_path: Path, damage: Callable[[Path], Any], words: str
):
    folder = tmp_path / "adapter"
    shutil.copytree(made[0], folder)
    damage(folder)
    refusal([made[1], folder], words)


def refusal(paths: Any, words: str) -> None:
    with pytest.raises(InputError, match=words) as caught:
        load_ensemble(paths)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    assert re.search(r"[;:?] .{3,}|\(.{3,}\)", message), message


def test_an_agent_that_equals_another_is_refused_however_its_factors_are_scaled(
    made: list[Path], tmp_path: Path
):
    refusal([made[0], made[0]], "is the same agent")
    folder = tmp_path / "same"
    shutil.copytree(made[0], folder)
    edit_tensors(lambda t: t.update({k: v * (4 if "lora_A" in k else 0.25) for k, v in t.items()}))(folder)
    refusal([made[0], folder], "is the same agent")


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ({"weights": [1.0]}, r"weights \[1.0\] of 2 agents; give one number"),
        ({"weights": [0.5, 0.6]}, r"weights .* of 2 agents; give one number"),
        ({"weights": [0.5, 0.5], "temperature": 0}, "temperature 0; give a number above 0"),
        ({}, "weights None of 2 agents; give one number"),
        ({"weights": [0.5, 0.5], "agents": ["agents/gone", "agents/adapter_0"]}, "not there"),
    ],
)
def test_a_description_that_is_none_is_refused(
    base: Path, made: list[Path], tmp_path: Path, entries: dict[str, Any], words: str
):
    refusal(describe(tmp_path, base, made[:2], **entries), words)


def test_a_base_that_has_moved_is_named_with_what_the_user_would_type(
    base: Path, made: list[Path], tmp_path: Path
):
    folder = tmp_path / "adapter"
    shutil.copytree(made[0], folder)
    edit_config(base_model_name_or_path="/nowhere/base")(folder)
    with pytest.raises(InputError, match=r"does not exist; .* if it has moved, add --model BASE"):
        load_ensemble([folder], base_option="--model BASE")
    with pytest.raises(InputError, match=r"does not exist; check the path$"):  # what is named is not offered
        load_ensemble([folder], base="/nowhere/else", base_option="--model BASE")
    assert load_ensemble([folder], base=str(base)).base_name == str(base)


@pytest.mark.parametrize("device", ["gpu", "meta", "cuda:99", "mps"])
def test_a_device_that_is_not_there_is_refused(made: list[Path], device: str):
    refusal_of_device = pytest.raises(InputError, match=rf"^device {device}: cannot be used \(.*\); name cpu")
    with refusal_of_device:
        load_ensemble(made[:1], device=device)


@pytest.mark.parametrize(("key", "dtype"), [("load_in_4bit", torch.uint8), ("load_in_8bit", torch.int8)])
def test_the_base_of_a_run_is_quantised_as_in_training(
    key: str, dtype: torch.dtype, base: Path, made: list[Path], tmp_path: Path
):
    pytest.importorskip("bitsandbytes")
    run = describe(tmp_path / "run", base, made[:1], weights=[1.0], config={key: True})
    stored = {tensor.dtype for tensor in load_ensemble(run).agents.frozen_tensors().values()}
    assert dtype in stored
    of_folders = load_ensemble(run / "agents").agents.frozen_tensors().values()
    assert dtype not in {tensor.dtype for tensor in of_folders}


def test_a_folder_without_adapters_is_refused(tmp_path: Path):
    refusal(tmp_path, "holds no adapters")
    refusal([], "no folder")


def test_another_base_of_the_same_shape_is_refused_where_the_run_has_left_its_fingerprint(
    base: Path,
    made: list[Path],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
):
    run = describe(tmp_path / "run", base, made[:1], weights=[1.0])
    state = run / "checkpoints" / "step_000001" / "state.json"
    state.parent.mkdir(parents=True)
    config = {"num_agents": 1, "model_name": str(base), "dataset_name": "rows.jsonl", "batch_size": 1}
    config |= {"gradient_accumulation_steps": 1, "epochs": 1, "max_train_steps": 1}
    about = {"parallel_mode": "fused", "engine": "plain", "world_size": 1, "precision": "no", "num_steps": 1}
    fingerprints = {"tokenizer": "0" * 64, "data": "0" * 64, "base": "0" * 64}
    entries = {
        "format": 1,
        "step": 1,
        "optimizer_step": 1,
        **about,
        "config": config,
        "fingerprints": fingerprints,
    }
    state.write_text(json.dumps(entries))
    refusal(run, "differ from those")
    # Without bitsandbytes the base is loaded as it is; the fingerprint is that of the quantised one.
    monkeypatch.setattr(quantisation, "find_spec", lambda name: None)
    for key in QUANTISING:
        description = json.loads((run / "ensemble.json").read_text()) | {"config": {**config, key: True}}
        (run / "ensemble.json").write_text(json.dumps(description))
        caplog.clear()
        assert load_ensemble(run).names
        assert (
            f"trained with {key}; without the package bitsandbytes the base is loaded as it is" in caplog.text
        )
        assert f"{base} has other weights than the base of training, which was quantised" in caplog.text
