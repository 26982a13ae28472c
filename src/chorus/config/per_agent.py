"""Keys with a value for each agent: a number holds for all agents, a list has one number for each."""

from collections.abc import Sequence
from typing import Annotated, TypeVar

from pydantic import AfterValidator, Discriminator, Tag, ValidationInfo

T = TypeVar("T")
NumberOrList = float | Sequence[float]


def _one_for_each_agent(value: float | list[float], info: ValidationInfo) -> float | list[float]:
    """The value; a list of equal numbers becomes that number, which is the same run at no extra cost."""
    if not isinstance(value, list):
        return value
    num_agents = info.data.get("num_agents")  # missing where it is itself refused
    if num_agents == "auto":
        raise ValueError(
            f"a list has a value for each agent, and num_agents is auto; set num_agents={len(value)}"
        )
    if num_agents is not None and len(value) != num_agents:
        raise ValueError(
            f"its length is {len(value)}, and num_agents is {num_agents}; give a value for each agent, or "
            "one number for all"
        )
    return value[0] if len(set(value)) == 1 else value


def _kind(value: object) -> str:
    return "list" if isinstance(value, list) else "number"


# So an error message refers to what was written, a number or a list, and not to both.
PerAgent = Annotated[
    Annotated[T, Tag("number")] | Annotated[list[T], Tag("list")],
    Discriminator(_kind),
    AfterValidator(_one_for_each_agent),
]


def of_agent(value: NumberOrList, agent: int) -> float:
    """An agent's own value, counted over all agents of the run."""
    return value if isinstance(value, float | int) else value[agent]


def largest(value: NumberOrList) -> float:
    """The largest value of an agent."""
    return value if isinstance(value, float | int) else max(value)
