"""The rows of a decoding batch: which text and which member each belongs to.

Every group of rows has one adapter, and all groups have equally many rows. Each text has a row with every
member of its answerer. An answerer's texts fill one or more blocks of equal size, so that answerers with many
unended texts and with few share a batch without empty rows.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from chorus.ensemble.lanes import Member
from chorus.ensemble.next_token import Answerer

MAX_GROUPS = 48  # more than so many blocks would cost more in adapters than they save in rows


@dataclass(frozen=True)
class Seating:
    """A batch of texts.

    Attributes:
        block: rows of a group.
        texts_A: for each answerer, the text in each of its slots, as many as its blocks hold; None is empty.
    """

    answerers: tuple[Answerer, ...]
    block: int
    texts_A: tuple[tuple[int | None, ...], ...]

    @property
    def slots_A(self) -> list[int]:
        """Slots of each answerer."""
        return [len(texts) for texts in self.texts_A]

    @property
    def members_G(self) -> list[Member]:
        """The member of each group: answerer by answerer, member by member, block by block."""
        sizes = zip(self.answerers, self.slots_A, strict=True)
        return [m for answerer, slots in sizes for m in answerer.members for _ in range(slots // self.block)]

    def slot_of_row(self) -> list[int]:
        """For each row the place of its text among all slots: answerer by answerer."""
        places, first = [], 0
        for answerer, slots in zip(self.answerers, self.slots_A, strict=True):
            places += list(range(first, first + slots)) * len(answerer.members)
            first += slots
        return places

    def sources(self, before: "Seating", other: "Seating | None" = None) -> tuple[list[int], list[int]]:
        """For each slot, and for each row, the one of earlier batches that held its text.

        Those of `other` are counted after those of `before`. An empty slot takes what its answerer's first
        text takes.
        """
        slot_of, rows_of = before.places()
        if other is not None:
            slots, rows = sum(before.slots_A), len(before.slot_of_row())
            more_slots, more_rows = other.places()
            slot_of |= {text: slots + slot for text, slot in more_slots.items()}
            rows_of |= {text: [rows + row for row in own] for text, own in more_rows.items()}
        from_slots, from_rows = [], []
        for answerer, texts in zip(self.answerers, self.texts_A, strict=True):
            filled = [text if text is not None else texts[0] for text in texts]
            from_slots += [slot_of[text] for text in filled if text is not None]
            for member in range(len(answerer.members)):
                from_rows += [rows_of[text][member] for text in filled if text is not None]
        return from_slots, from_rows

    def places(self) -> tuple[dict[int, int], dict[int, list[int]]]:
        """The slot of each text, and its rows, one for each member."""
        slot_of, rows_of, slot, row = {}, {}, 0, 0
        for answerer, texts in zip(self.answerers, self.texts_A, strict=True):
            for place, text in enumerate(texts):
                if text is not None:
                    slot_of[text] = slot + place
                    rows_of[text] = [row + k * len(texts) + place for k in range(len(answerer.members))]
            slot += len(texts)
            row += len(answerer.members) * len(texts)
        return slot_of, rows_of

    def kept(self, live: Collection[int]) -> "Seating":
        """The same seats, with the seats of all other texts empty."""
        texts_A = (tuple(text if text in live else None for text in texts) for texts in self.texts_A)
        return Seating(self.answerers, self.block, tuple(texts_A))

    def filled(self, new_A: Sequence[Sequence[int]]) -> "Seating | None":
        """The same seats with new texts in empty ones; None where there are too few for an answerer."""
        seated = []
        for texts, new in zip(self.texts_A, new_A, strict=True):
            if texts.count(None) < len(new):
                return None
            coming = iter(new)
            seated.append(tuple(next(coming, None) if text is None else text for text in texts))
        return Seating(self.answerers, self.block, tuple(seated))


def seat(answerers: Sequence[Answerer], texts_A: Sequence[Sequence[int]], spare: bool = False) -> Seating:
    """The smallest batch that holds these texts for each answerer. An answerer without texts gets no row.

    With `spare` an answerer gets a power of two of slots, so that texts may come and go without a new batch.
    """
    slots = [1 << (len(texts) - 1).bit_length() if spare and texts else len(texts) for texts in texts_A]
    counts = [(len(answerer.members), count) for answerer, count in zip(answerers, slots, strict=True)]
    most = max(MAX_GROUPS, sum(K for K, texts in counts if texts))

    def size(block: int) -> tuple[int, int]:
        groups = sum(K * -(-texts // block) for K, texts in counts)
        return groups, groups * block

    blocks = range(1, max(slots) + 1)
    fitting = [block for block in blocks if size(block)[0] <= most]
    block = min(fitting, key=lambda block: (size(block)[1], -block))
    seated = []
    for texts, count in zip(texts_A, slots, strict=True):
        empty = count + -count % block - len(texts)
        seated.append((*texts, *[None] * empty))
    return Seating(tuple(answerers), block, tuple(seated))
