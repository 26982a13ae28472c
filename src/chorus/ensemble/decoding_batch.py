"""A batch of texts that are decoded together, some steps at a time."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from chorus.ensemble.cached_lanes import CachedLanes, prefill
from chorus.ensemble.drawing_plan import DrawingPlan
from chorus.ensemble.next_token import Answerer, Choice, NextTokenRule
from chorus.ensemble.seating import Seating, seat
from chorus.ensemble.texts import Text
from chorus.model.agents import Agents, causal_lm
from chorus.model.kernels.decode_graphs import CapturedStep, captured_if_possible

STEPS_AT_A_TIME = 16  # on a GPU
PROMPTS_ON_A_CPU = 64  # of one wave
FREE_SHARE = 0.8  # of a GPU's free memory that caches and logits may fill
SHRINK = 0.75  # the batch shrinks at this fraction of its rows, because shrinking copies the caches


@dataclass
class DecodingBatch:
    """Texts of every answerer, with their caches.

    Attributes:
        steps: taken at a time.
        plan: how each text's tokens are drawn.
        token_X: the last token of each text.
        text_R: the slot of each row's text.
        out: the tokens of the last steps, a `Choice` whose tensors have the step as a second dimension.
        taken: steps of `out` that count.
        times_too_large: how often in a row `leave` has found that fewer rows would do.
    """

    lanes: CachedLanes
    rule: NextTokenRule
    seating: Seating
    steps: int
    plan: DrawingPlan
    token_X: Tensor
    text_R: Tensor
    out: Choice
    taken: int
    is_captured: bool
    capture: CapturedStep | None = None
    times_too_large: int = 0

    @staticmethod
    def of(
        agents: Agents,
        rule: NextTokenRule,
        texts: Mapping[int, Text],
        captured: bool,
        length: int | None = None,
        spare: bool = False,
    ) -> "DecodingBatch":
        """Read the prompts and choose the first token of every text.

        Args:
            texts: under any numbers.
            length: columns of the caches; None is what the longest of these texts needs.
            spare: leave slots empty for texts that come later, see `seat`.
        """
        device = next(agents.parameters()).device
        own_A = [
            [number for number, text in texts.items() if text.answerer == index]
            for index in range(len(rule.answerers))
        ]
        seating = seat(rule.answerers, own_A, spare)
        steps = steps_at_a_time(device)
        prompts = list(dict.fromkeys(text.prompt for text in texts.values()))
        place_of = {prompt: place for place, prompt in enumerate(prompts)}
        seated = [texts[number] for row in seating.texts_A for number in _without_gaps(row)]
        slot_R = seating.slot_of_row()
        prompt_R = [place_of[seated[slot].prompt] for slot in slot_R]
        most = max(text.ending.max_new_tokens for text in texts.values())
        room = -(-most // steps) * steps if length is None else length - max(map(len, prompts))
        # The last token of a text is never read. Texts that join later fit into `length` columns.
        longest = max(len(text.prompt) + text.ending.max_new_tokens for text in texts.values())
        last_position = max(longest - 2, 0) if length is None else length - 1
        lanes, logits_RV = prefill(
            *(agents, seating.members_G, seating.block, prompt_R, prompts, room, last_position), pad_id=0
        )
        plan = DrawingPlan.of(rule.answerers, seated, room if length is None else length, device)
        choice = rule.choose(logits_RV, seating.slots_A, plan.draws(), plan.num_tops)
        plan.drawn_X.add_(1)
        first = Choice(*(figure[:, None] for figure in choice))
        places = torch.tensor(slot_R, device=device)
        is_captured = captured and lanes.is_static
        return DecodingBatch(lanes, rule, seating, steps, plan, choice.token_X, places, first, 1, is_captured)

    def written(self) -> Choice:
        """The tokens of the last steps, on the CPU."""
        return Choice(*(figure[:, : self.taken].cpu() for figure in self.out))

    def leave(self, live: Collection[int], spare: bool = False, patience: int = 0) -> None:
        """Remove texts that have ended, once that makes the batch smaller enough; only `live` ones remain.

        Args:
            patience: how many times in a row the batch keeps its size although fewer rows would do.
        """
        live_A = [[text for text in texts if text is not None] for texts in self.seating.kept(live).texts_A]
        seating = seat(self.seating.answerers, live_A, spare)
        is_smaller = len(seating.slot_of_row()) <= SHRINK * len(self.text_R)
        self.times_too_large = self.times_too_large + 1 if is_smaller else 0
        if self.times_too_large > patience:
            self._reseat(seating)
        else:
            self.seating = self.seating.kept(live)

    def join(self, new: "DecodingBatch", live: Collection[int], column: int) -> None:
        """Add the texts of a new batch; of this batch only `live` texts remain.

        Both have static caches of the same length. Where there are empty slots for them the batch keeps its
        shape, and what was captured.

        Args:
            column: of the next tokens; no text, live or new, is longer.
        """
        self.lanes.move_to(column)
        new.lanes.move_to(column)
        new_A = [[text for text in texts if text is not None] for texts in new.seating.texts_A]
        before, plan_changes = self.seating.kept(live), not self.plan.covers(new.plan)
        self.plan.widen(new.plan)
        filled = before.filled(new_A)
        if filled is None:
            live_A = [[text for text in texts if text is not None] for texts in before.texts_A]
            both_A = [own + more for own, more in zip(live_A, new_A, strict=True)]
            self._reseat(seat(before.answerers, both_A, spare=True), new)
            return
        slots, rows = filled.places()
        new_slots, new_rows = new.seating.places()
        self.lanes.put(
            [row for text in new_rows for row in rows[text]],
            new.lanes,
            [row for own in new_rows.values() for row in own],
        )
        to_X = torch.tensor([slots[text] for text in new_slots], device=self.token_X.device)
        from_X = torch.tensor(list(new_slots.values()), device=to_X.device)
        self.token_X[to_X] = new.token_X[from_X]
        self.plan.put(to_X, new.plan, from_X)
        self.seating = filled
        if plan_changes:
            self.capture = None

    def _reseat(self, seating: Seating, new: "DecodingBatch | None" = None) -> None:
        device = self.token_X.device
        slots, rows = seating.sources(self.seating, None if new is None else new.seating)
        slot_X = torch.tensor(slots, device=device)
        self.lanes.reseat(seating.members_G, seating.block, rows, None if new is None else new.lanes)
        tokens = [self.token_X] if new is None else [self.token_X, new.token_X]
        self.token_X = torch.cat(tokens)[slot_X]
        self.plan = self.plan.chosen(slot_X, None if new is None else new.plan)
        self.text_R = torch.tensor(seating.slot_of_row(), device=device)
        self.seating, self.capture, self.times_too_large = seating, None, 0

    def advance(self, steps: int | None = None) -> None:
        """Take the next steps: as many as the batch takes at a time, or fewer."""
        self.taken = self.steps if steps is None else min(steps, self.steps)
        if self.capture is None:  # which would write into the tensors of before
            self.out = self._empty_out()
        with self.lanes.stepping():
            self.lanes.prepare_steps(self.steps)
            if self.is_captured and self.capture is None:
                self.capture = captured_if_possible(self._step, self._counters())
                self.is_captured = self.capture is not None
            for _ in range(self.taken):
                self.capture.replay() if self.capture is not None else self._step()
                self.lanes.column += 1

    def _step(self) -> None:
        """One token for every text: read the last one, choose the
        next. In place, so that it can be captured."""
        place_1 = self.lanes.step_1.clone()
        logits_RV = self.lanes.step(self.token_X[self.text_R])
        choice = self.rule.choose(logits_RV, self.seating.slots_A, self.plan.draws(), self.plan.num_tops)
        self.token_X.copy_(choice.token_X)
        self.plan.count()
        for figure, into in zip(choice, self.out, strict=True):
            into.index_copy_(1, place_1, figure[:, None])

    def _counters(self) -> list[Tensor]:
        """The tensors that a step changes besides its output and the caches."""
        own = [self.token_X, self.plan.drawn_X, self.lanes.step_1]
        for state in self.lanes.states:
            layers: Any = state.cache.layers
            own += [state.position_L1, *(layer.cumulative_length for layer in layers)]
        return own

    def _empty_out(self) -> Choice:
        X, R, N = len(self.token_X), len(self.text_R), self.plan.num_tops
        figure_X = torch.empty(X, self.steps, device=self.token_X.device)
        token_X = torch.empty_like(figure_X, dtype=torch.int64)
        figures = (token_X, figure_X, figure_X.clone(), figure_X.clone(), figure_X.new_empty(R, self.steps))
        tops = figure_X.new_empty(X, self.steps, N)
        return Choice(*figures, torch.empty_like(tops, dtype=torch.int64), tops)


def _without_gaps(numbers: Sequence[int | None]) -> list[int]:
    """An empty slot does what its answerer's first text does."""
    return [number if number is not None else numbers[0] for number in numbers]  # pyright: ignore


def steps_at_a_time(device: torch.device) -> int:
    """Steps between two checks for ended texts: a check makes a GPU wait for the host."""
    return STEPS_AT_A_TIME if device.type == "cuda" else 1


def is_capturable(agents: Agents) -> bool:
    """On a GPU, unless the base is sharded (ZeRO-3), whose weights are fetched within a pass."""
    parameter = next(iter(agents.frozen_tensors().values()))
    return parameter.is_cuda and not hasattr(parameter, "ds_id")


def fitting_prompts(
    agents: Agents, answerers: Sequence[Answerer], prompts: Sequence[Sequence[int]], max_new_tokens: int
) -> int:
    """How many prompts are answered at a time: on a GPU as many as its free memory holds caches for."""
    model = causal_lm(agents.peft_model(agents.agents[0]))
    if model.device.type != "cuda":
        return PROMPTS_ON_A_CPU
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    width = 2 * config.num_hidden_layers * heads * head_dim * model.dtype.itemsize
    length = max(map(len, prompts), default=1) + max_new_tokens + STEPS_AT_A_TIME
    logits = 4 * config.vocab_size  # of a row: logits in the head's dtype, and the tensors derived from them
    rows = sum(len(answerer.members) for answerer in answerers)
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info(model.device)
    fitting = max(1, int(FREE_SHARE * free / (rows * (width * length + logits))))
    waves = max(1, -(-len(prompts) // fitting))
    return -(-len(prompts) // waves) if prompts else 1  # as many in each
