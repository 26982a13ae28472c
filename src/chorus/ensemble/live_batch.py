"""Texts that are decoded together; texts may join and leave between the steps."""

from collections.abc import Iterable, Sequence

import torch

from chorus.ensemble.cached_lanes import static_cache
from chorus.ensemble.decoding_batch import DecodingBatch, is_capturable, steps_at_a_time
from chorus.ensemble.next_token import Answerer, next_token_rule
from chorus.ensemble.texts import Text
from chorus.model.agents import Agents, causal_lm

# Where texts come and go: so many times in a row fewer rows would have done before the batch shrinks. Rows
# cost little beside the base's weights, which every step reads; another size of batch is captured anew.
PATIENCE = 8


class LiveBatch:
    """A batch of texts by any of the answerers.

    Texts join with `join`, which reads their prompts in a pass of their own, and leave when they end or with
    `drop`. With architectures without static caches (see `cached_lanes`) no text can join a running batch:
    `can_join` is False.
    """

    def __init__(
        self,
        agents: Agents,
        answerers: Sequence[Answerer],
        length: int | None = None,
        captured: bool | None = None,
    ) -> None:
        """A batch without texts.

        Args:
            agents: in evaluation mode, of any mode.
            length: columns of the caches; None is what the first texts need, and no others may join later.
            captured: replay a step as a CUDA graph; None does so on a GPU. It changes no result.
        """
        self.agents, self.length = agents, length
        self.rule = next_token_rule(agents, answerers)
        self.is_static = static_cache(causal_lm(agents.peft_model(agents.agents[0])), 2) is not None
        self.texts: dict[int, Text] = {}  # under way
        self._captured = is_capturable(agents) if captured is None else captured
        self._batch: DecodingBatch | None = None
        self._count = 0

    @property
    def most_tokens(self) -> int:
        """The most tokens of a text, prompt included. The last steps of a text may reach beyond its end."""
        assert self.length is not None
        return self.length - steps_at_a_time(next(self.agents.parameters()).device)

    @property
    def can_join(self) -> bool:
        """Whether texts may join now."""
        return not self.texts or (self.is_static and self.length is not None)

    @torch.no_grad()
    def join(self, texts: Iterable[Text]) -> None:
        """Read the prompts and choose the first token of each text. A text that ends with it is not kept."""
        numbered = {self._count + n: text for n, text in enumerate(texts)}
        self._count += len(numbered)
        if not self.texts and self.length is None:
            self._batch = None  # its caches must be freed before new ones are allocated
        new = DecodingBatch.of(
            *(self.agents, self.rule, numbered, self._captured), self.length, spare=self.length is not None
        )
        live = _append(new, numbered)
        if live and (self._batch is None or not (self.texts or self._fits(new))):
            new.leave(live, spare=self.length is not None)
            self._batch = new
        elif live and self._batch is not None:
            new.seating = new.seating.kept(live)
            reach = max((text.num_read for text in self.texts.values()), default=0)
            self._batch.join(new, self.texts.keys(), max(reach, new.lanes.column))
        self.texts |= {number: numbered[number] for number in live}

    def _fits(self, new: DecodingBatch) -> bool:
        """Whether the batch, while it is empty, has seats for these texts."""
        assert self._batch is not None
        sizes = zip(self._batch.seating.slots_A, new.seating.slots_A, strict=True)
        return self.is_static and all(own >= needed for own, needed in sizes)

    def drop(self, text: Text) -> None:
        """Stop generating a text and free its seat."""
        self.texts = {number: other for number, other in self.texts.items() if other is not text}

    @torch.no_grad()
    def advance(self, steps: int | None = None) -> None:
        """Take the next steps of all texts under way, on a GPU 16 or fewer; those that have ended leave."""
        if not self.texts:
            return
        assert self._batch is not None
        others_may_come = self.length is not None
        self._batch.leave(self.texts.keys(), others_may_come, PATIENCE if others_may_come else 0)
        lanes = self._batch.lanes
        if self.length is not None and self.is_static and lanes.column + self._batch.steps > self.length:
            lanes.move_to(max(text.num_read for text in self.texts.values()))
        self._batch.advance(steps)
        self._captured = self._batch.is_captured
        live = _append(self._batch, self.texts)
        self.texts = {number: self.texts[number] for number in live}


def _append(batch: DecodingBatch, texts: dict[int, Text]) -> list[int]:
    """Append the batch's new tokens to the answers; returns the texts that continue."""
    token_ids, log_probs, entropies, mutual, of_rows, top_ids, top_log_probs = (
        figure.tolist() for figure in batch.written()
    )
    slot_of, rows_of = batch.seating.places()
    live = []
    for number, text in texts.items():
        slot, answer = slot_of[number], text.answer
        answer.token_ids += token_ids[slot]
        answer.log_probs += log_probs[slot]
        answer.entropies += entropies[slot]
        answer.mutual_informations += mutual[slot]
        members = [of_rows[row] for row in rows_of[number]]
        answer.member_log_probs += [list(of_token) for of_token in zip(*members, strict=True)]
        if text.num_tops:
            pairs = zip(top_ids[slot], top_log_probs[slot], strict=True)
            tops = [list(zip(ids, own, strict=True))[: text.num_tops] for ids, own in pairs]
            answer.tops += tops
        if text.ending.apply(answer):
            answer.text, text.has_ended = text.ending.text_of(answer), True
        else:
            live.append(number)
    return live
