"""Which layers of a base carry adapters, and what is said of those that do not."""

import re
from typing import Any

import pytest
import torch
from families import of_family
from toy import tiny_gemma
from transformers import MambaConfig, MambaForCausalLM, OPTConfig, OPTForCausalLM

from chorus.errors import InputError
from chorus.model.adapters import AdapterRouter, LoraShape, attach_agents
from chorus.model.targets import Targets, find_targets, peft_target_modules

MULTIMODAL = "gemma-4 multimodal"
SEVEN = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
SEVEN += ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]


def of_layers(prefix: str, names: list[str], layers: tuple[int, ...] = (0, 1)) -> list[str]:
    return [f"{prefix}.layers.{layer}.{name}" for layer in layers for name in names]


@pytest.mark.parametrize("wanted", ["auto", "all-linear", [name.split(".")[1] for name in SEVEN]])
def test_of_a_text_model_all_ways_are_its_seven_linears(wanted: Any):
    assert find_targets(tiny_gemma(), wanted) == Targets(of_layers("model", SEVEN), [], [], [])


@pytest.mark.parametrize("wanted", ["auto", "all-linear", ["q_proj", "k_proj"], r".*\.self_attn\.[qk]_proj"])
def test_of_a_multimodal_model_the_text_model_alone_is_adapted(wanted: Any):
    targets = find_targets(of_family(MULTIMODAL), wanted)
    assert targets.paths
    assert all(path.startswith("model.language_model.layers.") for path in targets.paths)


def test_what_a_tower_has_is_counted_as_left_out_whichever_way_it_was_named():
    model = of_family("gemma-3 multimodal")
    targets = find_targets(model, ["q_proj"])
    assert targets.paths == of_layers("model.language_model", ["self_attn.q_proj"])
    assert targets.unreached == ["model.vision_tower.encoder.layers.0.self_attn.q_proj"]
    in_tower = [
        path for path, one in model.named_modules() if "tower" in path and isinstance(one, torch.nn.Linear)
    ]
    assert len(in_tower) == 9
    for wanted in ("auto", "all-linear"):
        assert find_targets(model, wanted).unreached == in_tower


def test_a_target_that_only_a_tower_has_is_refused():
    with pytest.raises(InputError, match=r"no text passes through model\.vision_tower\.encoder.*fc1"):
        find_targets(of_family("gemma-3 multimodal"), ["fc1"])


def test_a_projection_that_is_there_and_not_used_is_left_out():
    """As the keys of a layer that shares another one's."""
    model = tiny_gemma()
    attention = model.model.layers[1].self_attn
    attention.unused = torch.nn.Linear(32, 4)
    assert find_targets(model, "auto").unreached == ["model.layers.1.self_attn.unused"]


def test_auto_knows_attention_and_mlp_by_other_names():
    gpt2 = find_targets(of_family("gpt2"), "auto").paths
    assert gpt2[:4] == [
        f"transformer.h.0.{name}" for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    ]
    size = {"hidden_size": 16, "word_embed_proj_dim": 16, "ffn_dim": 24, "num_hidden_layers": 1}
    opt = OPTForCausalLM(OPTConfig(vocab_size=40, num_attention_heads=2, max_position_embeddings=32, **size))
    assert {path.rpartition(".")[2] for path in find_targets(opt, "auto").paths} == {
        *("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")
    }


def test_auto_leaves_routers_and_what_is_neither_attention_nor_mlp_alone():
    experts = find_targets(of_family("gemma-4 experts"), "auto")
    assert not any("router" in path for path in experts.paths)
    assert experts.experts == ["model.layers.0.experts", "model.layers.1.experts"]
    per_layer = find_targets(of_family("gemma-3n"), "auto").paths
    assert {path.split(".")[3] for path in per_layer} == {"self_attn", "mlp"}


def test_names_that_mean_the_experts_to_peft_are_left_out_by_auto_and_refused_by_name():
    model = of_family("deepseek-v3")
    targets = find_targets(model, "auto")
    assert {path.rpartition(".")[2] for path in targets.for_experts} == {"gate_proj", "up_proj", "down_proj"}
    with pytest.raises(
        InputError, match="gate_proj: in DeepseekV3ForCausalLM PEFT takes these names to mean the expe"
    ):
        find_targets(model, ["o_proj", "gate_proj"])


def test_excluded_modules_and_other_layers_get_none():
    model = tiny_gemma()
    assert find_targets(model, ["q_proj", "o_proj"], ["o_proj"], [1]).paths == [
        "model.layers.1.self_attn.q_proj"
    ]
    assert find_targets(model, "auto", r".*\.mlp\..*").paths == of_layers("model", SEVEN[:4])


@pytest.mark.parametrize(
    ("how", "words"),
    [
        (
            {"wanted": ["q_projj"]},
            "'q_projj' cannot carry an adapter: the model has no such layer; .* down_proj, gate",
        ),
        ({"wanted": ["self_attn"]}, "self_attn is a Gemma2Attention"),
        ({"wanted": r".*\.nothing"}, "the model has no such layer"),
        (
            {"wanted": "auto", "excluded": ["nothing"]},
            "key 'lora_exclude_modules': 'nothing' matches nothing",
        ),
        ({"wanted": "auto", "excluded": r".*proj"}, "nothing is left to adapt"),
        (
            {"wanted": "auto", "layers": [2]},
            "key 'layers_to_transform': the base has no decoder layer 2; .* 0 to 1",
        ),
    ],
)
def test_what_matches_nothing_is_named(how: dict[str, Any], words: str):
    with pytest.raises(InputError, match=words):
        find_targets(tiny_gemma(), **how)


def test_a_layer_that_peft_refuses_is_one_line():
    size = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 1, "state_size": 4}
    with pytest.raises(
        InputError, match=r"key 'lora_target_modules': .*out_proj.* incompatible.*; .*lora_exclude"
    ):
        attach_agents(
            MambaForCausalLM(MambaConfig(**size)),
            [0],
            LoraShape(2, 4, ["out_proj"], False, 0),
            AdapterRouter(),
        )


def test_without_weights_the_same_layers_are_found():
    for family in ("llama", MULTIMODAL, "gpt2", "qwen3-moe"):
        model = of_family(family)
        paths = find_targets(model, "auto").paths
        assert find_targets(model.to("meta"), "auto").paths == paths  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("family", ["llama", MULTIMODAL, "gemma-4 multimodal shared"])
@pytest.mark.parametrize("layers", [None, [1]])
def test_an_exported_target_means_exactly_the_same_layers(family: str, layers: list[int] | None):
    model = of_family(family)
    modules = [path for path, _ in model.named_modules()]
    paths = find_targets(model, "auto", layers=layers).paths
    for known in (modules, []):
        told = peft_target_modules(paths, known)
        if isinstance(told, str):
            assert [path for path in modules if re.fullmatch(told, path)] == paths
        else:
            assert (family, layers, known) == ("llama", None, modules)
            assert told == sorted(name.split(".")[1] for name in SEVEN)
