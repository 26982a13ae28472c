"""Which row of a decoding batch is whose: texts, and the members that read them.

Every group of rows is under one adapter, and all groups have as many rows. Each text has a row with every
member of its answerer. An answerer's texts fill one or more blocks of equal size, so that answerers with many
unended texts and with few share a batch without empty rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from chorus.ensemble.lanes import Member
from chorus.ensemble.next_token import Answerer

MAX_GROUPS = 48  # more than so many blocks would cost more in adapters than they save in rows


@dataclass(frozen=True)
class Seating:
    """A batch of texts.

    Attributes:
        block: rows of a group.
        prompts_A: for each answerer, the prompt of each of its slots, as many as its blocks hold; None is
        empty.
    """

    answerers: tuple[Answerer, ...]
    block: int
    prompts_A: tuple[tuple[int | None, ...], ...]

    @property
    def texts_A(self) -> list[int]:
        """Slots of each answerer."""
        return [len(prompts) for prompts in self.prompts_A]

    @property
    def members_G(self) -> list[Member]:
        """The member of each group: answerer by answerer, member by member, block by block."""
        sizes = zip(self.answerers, self.texts_A, strict=True)
        return [m for answerer, texts in sizes for m in answerer.members for _ in range(texts // self.block)]

    def text_of_row(self) -> list[int]:
        """For each row the place of its text among all slots: answerer by answerer."""
        places, first = [], 0
        for answerer, texts in zip(self.answerers, self.texts_A, strict=True):
            places += list(range(first, first + texts)) * len(answerer.members)
            first += texts
        return places

    def sources(self, before: "Seating") -> tuple[list[int], list[int]]:
        """For each slot, and for each row, the one of an earlier batch that held its text.

        An empty slot takes what its answerer's first text takes.
        """
        text_of, row_of = before._places()
        texts, rows = [], []
        for index, (answerer, prompts) in enumerate(zip(self.answerers, self.prompts_A, strict=True)):
            filled = [prompts[0] if prompt is None else prompt for prompt in prompts]
            texts += [text_of[index, prompt] for prompt in filled]
            rows += [
                row_of[index, member, prompt] for member in range(len(answerer.members)) for prompt in filled
            ]
        return texts, rows

    def _places(self) -> tuple[dict, dict]:
        """The slot of (answerer, prompt), and the row of (answerer, member, prompt)."""
        text_of, row_of, text, row = {}, {}, 0, 0
        for index, (answerer, prompts) in enumerate(zip(self.answerers, self.prompts_A, strict=True)):
            for slot, prompt in enumerate(prompts):
                if prompt is not None:
                    text_of[index, prompt] = text + slot
                    for member in range(len(answerer.members)):
                        row_of[index, member, prompt] = row + member * len(prompts) + slot
            text += len(prompts)
            row += len(answerer.members) * len(prompts)
        return text_of, row_of


def seat(answerers: Sequence[Answerer], prompts_A: Sequence[Sequence[int]]) -> Seating:
    """The smallest batch that holds these prompts for each
    answerer. An answerer without prompts gets no row."""
    counts = [
        (len(answerer.members), len(prompts)) for answerer, prompts in zip(answerers, prompts_A, strict=True)
    ]
    most = max(MAX_GROUPS, sum(K for K, texts in counts if texts))

    def size(block: int) -> tuple[int, int]:
        groups = sum(K * -(-texts // block) for K, texts in counts)
        return groups, groups * block

    blocks = range(1, max(texts for _, texts in counts) + 1)
    fitting = [block for block in blocks if size(block)[0] <= most]
    block = min(fitting, key=lambda block: (size(block)[1], -block))
    seated = []
    for prompts in prompts_A:
        empty = -len(prompts) % block
        seated.append((*prompts, *[None] * empty))
    return Seating(tuple(answerers), block, tuple(seated))
