"""Shared by all sections of the configuration: strictness, common types, and what a resumed run may change.

A field defines everything about its key: type, default, comment in `configs.yaml` (the text under the field),
section (the class) and, by `MayChange` or `ComparedByEffect` around the type, whether a resumed run may
change it. A function takes the sections that it reads, not the whole `Config`.
"""

import os
from enum import Enum
from typing import Annotated, ClassVar, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

T = TypeVar("T")
Text = Annotated[
    str, Field(min_length=1)
]  # min_length also makes pydantic refuse lone surrogates, which YAML can contain
MOST_STEPS = 10**12  # more than any run; a larger number is a mistake or a damaged file
Count = Annotated[int, Field(ge=1, le=2**20)]  # of objects held in memory; a larger number is a mistake
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
    """Whether a run that resumes from a checkpoint may change the value of a key."""

    MUST_EQUAL = "the key defines the run; the default for a key without a mark"
    MAY_CHANGE = "how a run is executed, or what is observed"
    COMPARED_BY_EFFECT = (
        "its effect is compared: base or data may be elsewhere, a step may be split differently"
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
