"""What sections of the configuration share: strictness, common types, and what a resumed run may change.

A key says all about itself in its field: type, default, the comment over it in `configs.yaml` (the text under
the field), its section (the class) and, by `MayChange` or `ComparedByEffect` around the type, whether a
resumed run may change it. A room takes the sections that it reads, and not the whole `Config`, which is all
of them.
"""

import os
from enum import Enum
from typing import Annotated, ClassVar, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

T = TypeVar("T")
Text = Annotated[
    str, Field(min_length=1)
]  # any min_length also refuses a lone surrogate, which YAML can spell
MOST_STEPS = 10**12  # no run takes so many; a larger number is a slip, or a damaged file
Count = Annotated[int, Field(ge=1, le=2**20)]  # of things that are held in memory; a larger number is a slip
Probability = Annotated[float, Field(ge=0, lt=1)]


def _place(text: str) -> str:
    """A path with `~` and `~user` filled in, as a shell does it."""
    if "\0" in text:
        raise ValueError("a path holds no NUL character; write it without one")
    path = os.path.expanduser(text)
    if path.startswith("~"):
        raise ValueError(f"there is no such user; write ./{path} for a folder of that name")
    return path


Place = Annotated[Text, AfterValidator(_place)]  # a path, or a name that is not a path


class OnResume(Enum):
    """Whether a run that resumes from a checkpoint may have
    another value for a key than the run that saved it."""

    MUST_EQUAL = "the key shapes the run; of a key without a mark this is assumed"
    MAY_CHANGE = "how a run is carried out, or what is looked at beside it"
    COMPARED_BY_EFFECT = (
        "its effect is compared: base or data may lie elsewhere, a step may be split otherwise"
    )


MayChange = Annotated[T, OnResume.MAY_CHANGE]
ComparedByEffect = Annotated[T, OnResume.COMPARED_BY_EFFECT]


class Section(BaseModel):
    """Some keys of `configs.yaml`. The text under a key becomes the comment over it in the file."""

    TITLE: ClassVar[str]

    model_config = ConfigDict(
        frozen=True,
        strict=True,  # "1e-4" is not a number, true is not 1; only a whole number may stand for a float
        extra="forbid",
        allow_inf_nan=False,
        validate_default=True,  # so that a check over two keys also sees the key that was left out
        use_attribute_docstrings=True,
    )
