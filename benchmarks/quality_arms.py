"""The arms of quality.py: what is compared, and what of each is chosen on the tuning rows.

One LoRA's seeds are the agents of one run: with lambda_sw 0, per_agent_batches and no clipping each agent has
its own start and its own order of the rows, and its gradient is that of a lone PEFT run (tests hold both), so
the run is exactly as many independent ones. So it is with K independent LoRAs and their seeds, and, for
tuning, with the rates of every arm that does not couple its agents: `lr` has a value for each of them.
Agent k's start and order depend on the seed and k alone, so that independent arms of one rank share members:
the committees of K = 4 are those of K = 2, two by two.

Monte-Carlo dropout is taken on weights (DropConnect: Mobiny et al. 2019, arXiv 1906.04569): one LoRA is
trained with it, and K draws of its masks are K members. Dropout on activations would not be compiled, and a
pass of it is no member that could be scored and served.

PEFT's MonteCLoRA is not an arm: PEFT 0.21 draws its noise on A in training alone and answers as one plain
LoRA. So it is a regularisation of a single LoRA and no ensemble.
"""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

from pydantic import ValidationError

from chorus.config import RunConfig

Settings = Mapping[str, Any]
SHARED = "Chorus, lambda 0"  # which the sources of diversity are added to
APART = "K independent LoRAs"
SINGLE = "one LoRA"
COMBINED = "Chorus, best combination"


class Arm(NamedTuple):
    """One way to spend compute.

    Attributes:
        agents: trained together for one seed.
        size: members of the ensemble; 0 is the base alone.
        settings: keys of its configuration, over those of all arms.
        variants: more settings, of which one is chosen by tuning.
        members: what the members are: the agents, snapshots of one agent, or draws of its DropConnect masks.
        epochs_of: the arm whose chosen number of epochs is taken, times `longer`; None: it is tuned.
        tuned_as: the arm of which all that was chosen is taken.
        lr_spread: the agents' rates go from rate / lr_spread to rate x lr_spread.
        is_source: a source of diversity that the best combination may take.
    """

    name: str
    agents: int = 1
    size: int = 1
    settings: Settings = MappingProxyType({})
    variants: Sequence[Settings] = ({},)
    members: Literal["agents", "snapshots", "masks"] = "agents"
    epochs_of: str | None = None
    longer: int = 1
    tuned_as: str | None = None
    lr_spread: float = 1.0
    is_source: bool = False

    @property
    def has_own_batches(self) -> bool:
        return bool(self.settings.get("per_agent_batches"))

    def is_coupled(self, variant: Settings) -> bool:
        """Whether an agent's gradient depends on the others."""
        return is_coupled({**self.settings, **variant})

    def rates(self, rate: float) -> list[float]:
        """The learning rate of each agent."""
        if self.agents == 1 or self.lr_spread == 1:
            return [rate] * self.agents
        places = [2 * k / (self.agents - 1) - 1 for k in range(self.agents)]
        return [rate * self.lr_spread**place for place in places]


def is_coupled(settings: Settings) -> bool:
    return settings.get("lambda_sw", 0) > 0 or settings.get("responsibility_alpha", 1) < 1


def arms(K: int, rank: int, sizes: Sequence[int]) -> list[Arm]:
    """All arms but the combination and its sizes, the most important first.

    Args:
        K: members of an ensemble. sizes: other numbers of members.
    """
    own = {"per_agent_batches": True}
    high = {"lora_rank": K * rank}
    of_K = {"agents": K, "size": K}
    source = {**of_K, "epochs_of": SHARED, "is_source": True}
    masks = [{"dropconnect_p": 0.05}, {"dropconnect_p": 0.2}]
    distances = [{"lambda_sw": weight} for weight in (0.01, 0.1, 0.5)]
    return [
        Arm("base", agents=0, size=0),
        Arm(f"{SINGLE}, rank {rank}", settings=own),
        Arm(f"{SINGLE}, rank {K * rank}", settings=own | high),
        Arm(APART, **of_K, settings=own),
        Arm(SHARED, **of_K),
        Arm("Chorus, SWD of hidden states", **source, variants=distances),
        Arm(
            "Chorus, bootstrap",
            **source,
            variants=[{"bootstrap": "poisson"}, {"bootstrap": "bayesian"}],
        ),
        Arm(f"{APART}, rank {K * rank}", **of_K, settings=own | high, epochs_of=f"{SINGLE}, rank {K * rank}"),
        Arm("K snapshots of one LoRA", size=K, settings=own, members="snapshots", epochs_of=_single(rank)),
        Arm(
            "MC dropout on weights, K passes",
            size=K,
            settings=own,
            variants=masks,
            members="masks",
            epochs_of=_single(rank),
        ),
        Arm(f"{SINGLE}, {K} times the steps", settings=own, epochs_of=_single(rank), longer=K),
        Arm("Chorus, DropConnect", **source, variants=masks),
        Arm(
            "Chorus, gain of A",
            **source,
            variants=[{"lora_init_gain": 3.0}, {"lora_init_gain": 10.0}],
        ),
        Arm(
            "Chorus, responsibilities",
            **source,
            variants=[{"responsibility_alpha": 0.9}, {"responsibility_alpha": 0.5}],
        ),
        Arm(
            "Chorus, SWD of predictions",
            **source,
            settings={"swd_space": "probabilities"},
            variants=distances,
        ),
        Arm("Chorus, a rate for each agent", **source, lr_spread=2.0),
        *(
            Arm(f"{APART}, K = {size}", agents=size, size=size, settings=own, tuned_as=APART)
            for size in sizes
            if size != K
        ),
    ]


def _single(rank: int) -> str:
    return f"{SINGLE}, rank {rank}"


def combined_arms(
    K: int,
    rank: int,
    sizes: Sequence[int],
    found: Mapping[str, tuple[float, Settings]],
    sources: Sequence[Arm],
) -> list[Arm]:
    """The combination of all sources that help, and the same with other numbers of agents; none where fewer
    than two help.

    Args:
        found: of each tuned arm, its NLL of the tuning rows and the chosen variant.
        sources: the arms that may be taken.
    """
    if SHARED not in found or APART not in found:
        return []
    apart = Arm("", settings={"per_agent_batches": True})
    helping = [arm for arm in sources if arm.name in found and found[arm.name][0] < found[SHARED][0]]
    offered = [(found[arm.name][0], arm, found[arm.name][1]) for arm in helping]
    if found[APART][0] < found[SHARED][0]:
        offered.append((found[APART][0], apart, {}))
    taken: dict[str, Any] = {}
    spread, count = 1.0, 0
    for _, arm, variant in sorted(offered, key=lambda one: one[0]):
        more = {**arm.settings, **variant}
        if _go_together(taken, more, K):
            taken, spread, count = taken | more, max(spread, arm.lr_spread), count + 1
    if count < 2:
        return []
    of_all = {"settings": taken, "lr_spread": spread}
    batches_of = APART if "per_agent_batches" in taken else SHARED
    ranks = ({}, {"lora_rank": K * rank})
    return [
        Arm(COMBINED, agents=K, size=K, **of_all, variants=ranks, epochs_of=batches_of),
        *(
            Arm(f"{COMBINED}, K = {size}", agents=size, size=size, **of_all, tuned_as=COMBINED)
            for size in sizes
            if size != K
        ),
    ]


def _go_together(taken: Settings, more: Settings, K: int) -> bool:
    if any(key in taken and taken[key] != value for key, value in more.items()):
        return False
    both = {"lambda_sw": 0.0, **taken, **more}
    if is_coupled(both) and both.get("per_agent_batches"):
        return False  # coupled agents are compared on the same rows
    try:
        RunConfig(num_agents=K, **both)
    except ValidationError:
        return False
    return True
