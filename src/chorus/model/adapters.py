"""LoRA adapters of K agents: PEFT creates and names them; each pass states explicitly which agents it is for.

PEFT selects an adapter by mutating every layer (`set_adapter`), which changes `requires_grad`, and a
recomputation then uses whatever adapter is active at that time. Here a forward pass has an `AdapterContext`
(its agents, weights and random draws), and every recomputation uses the context of its forward pass.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import Linear as PeftLoraLinear
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from chorus.config import Config
from chorus.config.per_agent import NumberOrList, of_agent
from chorus.errors import InputError, first_line
from chorus.model.flat_adapter import Factors, Layout, Matrix
from chorus.model.kernels.lora_linear import lora_linear
from chorus.model.regularisation import Noise
from chorus.model.targets import Names, Targets, find_targets
from chorus.seeding import derive_seed

RANDOM_INITIAL_STD = 0.02  # `initialize_adapters_rand: true`


class TensorId(NamedTuple):
    """The identity of a trainable matrix, independent of mode, engine and process."""

    agent: int
    path: str  # PEFT's path of the layer, e.g. base_model.model.model.layers.0.self_attn.q_proj
    matrix: Literal["A", "B"]


class AdapterContext(NamedTuple):
    """The context of a pass through the shared base: of some agents together, or of the base alone (no
    agent).

    Attributes:
        agents: the rows of the pass belong to them in this order, equally many each (agent-major).
        num_tokens: rows x tokens of the pass, over all of them.
        weights: A_KRI and B_KOR of every layer that the pass goes through, in the dtype of the base.
        noise: only in training.
        num_rows: rows of the pass, over all agents; 0 if no layer is given more tokens than the pass has.
    """

    agents: tuple[int, ...]
    num_tokens: int
    weights: "Mapping[LoraLinear, tuple[Tensor, Tensor]]"
    noise: Noise | None = None
    num_rows: int = 0


BASE_ALONE = AdapterContext(agents=(), num_tokens=0, weights={})


@dataclass
class AdapterRouter:
    """Holds the adapter context of the current pass, for every LoRA layer of one set of agents."""

    context: AdapterContext = field(default=BASE_ALONE)

    @contextmanager
    def of(self, context: AdapterContext) -> Iterator[None]:
        """The context manager of a pass under `context`. Afterwards the previous context is restored, also on
        an error.
        """
        before = self.context
        self._take(context)
        try:
            yield
        finally:
            self._take(before)

    def _take(self, context: AdapterContext) -> None:
        # Each layer gets its own pair and needs no lookup by its name, so that torch.compile sees the same
        # code in all decoder layers. This bypasses nn.Module's slow __setattr__, because every recomputed
        # layer runs this.
        for layer in self.context.weights:
            vars(layer)["active_weights"] = None
        for layer, pair in context.weights.items():
            vars(layer)["active_weights"] = pair
        self.context = context

    def checkpoint_contexts(self) -> tuple[AbstractContextManager, AbstractContextManager]:
        """`context_fn` for torch's checkpoint: recompute under the context of the forward pass.

        Without it the recomputation would use the context at backward time: wrong gradients, and no error.
        """
        return nullcontext(), self.of(self.context)


class LoraLinear(PeftLoraLinear):
    """PEFT's LoRA linear, whose forward takes agents, weights and noise from the current context.

    y = base(x) + scaling · (drop(x) Aᵀ) Bᵀ, computed in the dtype of x (Hu et al. 2021), for each agent's
    rows of x.
    """

    router: AdapterRouter
    path: str
    has_weight: bool  # the base's layer is exactly x Wᵀ + b; a quantised one has a forward of its own
    active_weights: tuple[Tensor, Tensor] | None = None

    @property
    def weight_OI(self) -> Tensor:
        weight = cast(Tensor, self.base_layer.weight)
        return weight.T if isinstance(self.base_layer, Conv1D) else weight

    def forward(self, x: Tensor, *args: object, **kwargs: object) -> Tensor:
        if self.active_weights is None:
            return self.base_layer(x, *args, **kwargs)
        A_KRI, B_KOR = self.active_weights
        context, base = self.router.context, self.base_layer
        # Experts are given some of all rows' tokens, in two dimensions. A layer behind a cache (DeepSeek's
        # kv_b_proj) is given each row's earlier tokens, too.
        if (
            len(A_KRI) > 1
            and x.shape[:-1].numel() != context.num_tokens
            and (x.ndim < 3 or len(x) != context.num_rows)
        ):
            raise InputError(
                f"key 'parallel_mode': layer {self.path} is given other rows than the batch's, as experts "
                "are, so it cannot tell the agents apart; set parallel_mode to parallel or sequential"
            )
        x_KNI = x.reshape(len(A_KRI), -1, x.shape[-1])
        scaling: float = next(iter(self.scaling.values()))  # one for all agents: see LoraShape.gain_of_B
        dropped_KNI = x_KNI
        if context.noise is not None and context.noise.drops_inputs:
            rows = zip(x_KNI, context.agents, strict=True)
            dropped_KNI = torch.stack([context.noise.drop(x_NI, k, self.path) for x_NI, k in rows])
        elif self.has_weight:
            y_KNO = lora_linear(x_KNI, self.weight_OI, cast(Tensor | None, base.bias), A_KRI, B_KOR, scaling)
            return y_KNO.view(*x.shape[:-1], -1)
        y_KNO = torch.baddbmm(base(x_KNI), torch.bmm(dropped_KNI, A_KRI.mT), B_KOR.mT, alpha=scaling)
        return y_KNO.view(*x.shape[:-1], -1)


def adapter_name(agent: int) -> str:
    """The adapter's name inside PEFT and the name of its folder."""
    return f"agent_{agent}"


@dataclass(frozen=True)
class LoraShape:
    """The definition of an adapter: rank, scaling, target layers and initialisation.

    Attributes:
        alpha: scales an adapter's output, by alpha / rank; of all agents, or of each.
        target_modules, exclude_modules, layers: which layers of a base carry it, see `targets.find_targets`.
        use_rslora: scale by alpha / sqrt(rank) in place of alpha / rank (Kalajdzievski 2023).
        init_gain: factor on the initial values of A; of all agents, or of each.
    """

    rank: int
    alpha: NumberOrList
    target_modules: Names
    random_init: bool
    seed: int
    exclude_modules: Names = ()
    layers: tuple[int, ...] | None = None
    use_rslora: bool = False
    init_gain: NumberOrList = 1.0

    @property
    def has_unlike_scalings(self) -> bool:
        """Whether each agent has an alpha of its own."""
        return not isinstance(self.alpha, float | int)

    def gain_of_B(self, agent: int) -> float:
        """The factor on an agent's B in a pass.

        The layers scale all agents' outputs by the alpha of agent 0, in one product. If another agent's alpha
        differs, the ratio is multiplied into its B; a power of two is exact.
        """
        return of_agent(self.alpha, agent) / of_agent(self.alpha, 0)

    def targets(self, model: PreTrainedModel) -> Targets:
        """The layers of this model that carry an adapter. Raises InputError as `find_targets` does."""
        return find_targets(model, self.target_modules, self.exclude_modules, self.layers)

    def peft_config(self, base_name: str | None, target_modules: Names, agent: int = 0) -> LoraConfig:
        """PEFT's configuration of this agent's adapter on exactly `target_modules`, as PEFT matches them."""
        return LoraConfig(
            r=self.rank,
            lora_alpha=of_agent(self.alpha, agent),  # pyright: ignore[reportArgumentType]  (a float works: alpha / r)
            use_rslora=self.use_rslora,
            target_modules=target_modules if isinstance(target_modules, str) else list(target_modules),
            task_type="CAUSAL_LM",
            base_model_name_or_path=base_name,
        )


def lora_shape(config: Config) -> LoraShape:
    """The adapters that a configuration asks for."""
    layers = config.layers_to_transform
    return LoraShape(
        rank=config.lora_rank,
        alpha=config.lora_alpha,
        target_modules=config.lora_target_modules,
        random_init=config.initialize_adapters_rand,
        seed=config.seed,
        exclude_modules=config.lora_exclude_modules,
        layers=None if layers is None else tuple(layers),
        use_rslora=config.use_rslora,
        init_gain=config.lora_init_gain,
    )


def attach_agents(
    model: PreTrainedModel,
    agents: Sequence[int],
    shape: LoraShape,
    router: AdapterRouter,
    paths: Sequence[str] | None = None,
) -> PeftModel:
    """Give `model` the layers that carry the adapters of `agents`; `take_matrices` gives each agent's initial
    values.

    Args:
        paths: the layers that carry them; None: those that `shape` names in this model.

    Raises:
        InputError: `lora_target_modules` names no linear layer of the text model, or one that cannot carry an
        adapter.
    """
    paths = shape.targets(model).paths if paths is None else paths
    lora_config = shape.peft_config(model.name_or_path or None, paths)
    # PEFT's interface for custom layers.
    lora_config._register_custom_module({nn.Linear: LoraLinear, Conv1D: LoraLinear})
    with _peft_draws(shape, agents[0]):
        peft_model = _first_adapter(model, lora_config, agents[0])
    for path, layer in lora_layers(peft_model).items():
        layer.router, layer.path = router, path
        layer.has_weight = type(layer.base_layer).forward in (nn.Linear.forward, Conv1D.forward)
    return peft_model


def _first_adapter(model: PreTrainedModel, lora_config: LoraConfig, agent: int) -> PeftModel:
    try:
        return get_peft_model(model, lora_config, adapter_name=adapter_name(agent))  # pyright: ignore
    except ValueError as error:  # such as a layer of Mamba whose forward would bypass an adapter
        raise InputError(
            f"key 'lora_target_modules': {first_line(error)}; leave modules out by lora_exclude_modules"
        ) from error


@contextmanager
def _peft_draws(shape: LoraShape, agent: int) -> Iterator[None]:
    """PEFT initialises from the global generator: seed it for this agent, and restore it afterwards."""
    with torch.random.fork_rng():
        torch.manual_seed(derive_seed(shape.seed, "initial adapter", agent))
        yield


def take_matrices(
    peft_model: PeftModel, layers: Mapping[str, LoraLinear], agent: int, shape: LoraShape
) -> dict[Matrix, Tensor]:
    """An agent's initial matrices, as PEFT draws them, removed from PEFT's layers: `Agents` owns them.

    `PeftModel.add_adapter` would draw the same, but traverses the model some twenty times for each agent: 18
    seconds for 64 agents on a model of four layers.
    """
    name, lora_config = adapter_name(agent), next(iter(peft_model.peft_config.values()))
    if name not in peft_model.peft_config:
        with _peft_draws(shape, agent):
            for layer in layers.values():
                layer.update_layer(name, lora_config.r, lora_config.lora_alpha, config=lora_config)  # pyright: ignore
    found: dict[Matrix, Tensor] = {}
    for path, layer in layers.items():
        # In fp32, as PEFT trains them: on a base of lower precision they were first rounded to its dtype.
        found[path, "A"] = layer.lora_A.pop(name).weight.detach().float()  # pyright: ignore
        found[path, "B"] = layer.lora_B.pop(name).weight.detach().float()  # pyright: ignore
        if name not in peft_model.peft_config:
            layer.delete_adapter(name)
    if shape.random_init:
        for (path, matrix), weight in found.items():
            _fill_normal(weight, TensorId(agent, path, matrix), shape.seed)
    gain = of_agent(shape.init_gain, agent)
    if gain != 1.0:
        for (_, matrix), weight in found.items():
            if matrix == "A":
                weight.mul_(gain)
    return found


def _fill_normal(weight: Tensor, identity: TensorId, seed: int) -> None:
    """N(0, 0.02) from a CPU generator, so that a run has the same initial weights on every device."""
    generator = torch.Generator().manual_seed(derive_seed(seed, "initial normal", *identity))
    weight.copy_(torch.randn(weight.shape, generator=generator) * RANDOM_INITIAL_STD)


def lora_layers(model: nn.Module) -> dict[str, LoraLinear]:
    """PEFT's path of every layer that carries adapters, in the model's order."""
    return {path: layer for path, layer in model.named_modules() if isinstance(layer, LoraLinear)}


def factors_of(shape: LoraShape, is_B_F: Tensor | None, agent: int | None, noise: Noise | None) -> Factors:
    """The factors on an agent's weights in a pass; 1 for the base (None), whose weights are zeros.

    Args:
        is_B_F: see `Layout.is_B`; None where all agents have one scaling.
    """
    if agent is None:
        return Factors()
    of_B = {"gain_of_B": shape.gain_of_B(agent), "is_B_F": is_B_F}
    if noise is None or agent not in noise.keep:
        return Factors(**of_B)
    return Factors(noise.keep[agent], 1 - of_agent(noise.dropconnect_p, agent), **of_B)


def adapter_context(
    layers: Mapping[str, LoraLinear],
    layout: Layout,
    agents: Sequence[int],
    flat_KF: Tensor,
    num_tokens: int,
    noise: Noise | None,
) -> AdapterContext:
    """The context of a joint pass of `agents` through `layers`, with the weights that the pass uses."""
    matrices = layout.stacked(flat_KF)
    pairs = {layer: (matrices[path, "A"], matrices[path, "B"]) for path, layer in layers.items()}
    return AdapterContext(tuple(agents), num_tokens, pairs, noise)
