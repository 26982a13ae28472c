"""A batch of texts that are decoded together, some steps at a time."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from chorus.ensemble.cached_lanes import CachedLanes, prefill
from chorus.ensemble.next_token import Answerer, Choice, NextTokenRule
from chorus.ensemble.seating import Seating, seat
from chorus.model.agents import Agents, causal_lm
from chorus.model.kernels.decode_graphs import CapturedStep

STEPS_AT_A_TIME = 16  # on a GPU, between two looks of the host at what has ended
PROMPTS_ON_A_CPU = 64  # of one wave
FREE_SHARE = 0.8  # of a GPU's free memory that caches and logits may fill
SHRINK = 0.75  # the batch shrinks once this share of its rows is left: that costs a copy of the caches


@dataclass
class DecodingBatch:
    """Texts of every answerer, with their caches.

    Attributes:
        steps: taken at a time.
        uniform_XN: each text's numbers that decide its draws, for N tokens; None where none is drawn.
        drawn_1: tokens that each text has so far.
        token_X: the last token of each text.
        text_R: the text of each row.
        out: what the last steps have written, a `Choice` whose tensors have the step as a last dimension.
        taken: steps of `out` that count.
    """

    lanes: CachedLanes
    rule: NextTokenRule
    seating: Seating
    steps: int
    uniform_XN: Tensor | None
    drawn_1: Tensor
    token_X: Tensor
    text_R: Tensor
    out: Choice
    taken: int
    is_captured: bool
    capture: CapturedStep | None = None

    @staticmethod
    def of(
        agents: Agents,
        rule: NextTokenRule,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        draws: Sequence[Sequence[Tensor]],
        captured: bool,
    ) -> "DecodingBatch":
        """Read the prompts and choose the first token of every text."""
        device = next(agents.parameters()).device
        seating = seat(rule.answerers, [range(len(prompts))] * len(rule.answerers))
        steps = steps_at_a_time(device)
        room = -(-max_new_tokens // steps) * steps
        prompt_X = [prompt or 0 for row in seating.prompts_A for prompt in row]
        text_R = seating.text_of_row()
        prompt_R = [prompt_X[text] for text in text_R]
        lanes, logits_RV = prefill(
            agents, seating.members_G, seating.block, prompt_R, prompts, room, pad_id=0
        )
        uniform_XN = None
        if rule.temperature > 0:
            rows = zip(seating.prompts_A, draws, strict=True)
            drawn = [own[prompt or 0] for row, own in rows for prompt in row]
            # The last steps may reach beyond the limit of tokens; what they draw is thrown away.
            uniform_XN = torch.nn.functional.pad(torch.stack(drawn), (0, room + 1 - max_new_tokens)).to(
                device
            )
        choice = rule.choose(logits_RV, seating.texts_A, None if uniform_XN is None else uniform_XN[:, 0])
        drawn_1 = torch.ones(1, dtype=torch.int64, device=device)
        first = Choice(*(figure[:, None] for figure in choice))
        places = torch.tensor(text_R, device=device)
        is_captured = captured and lanes.is_static
        return DecodingBatch(
            lanes, rule, seating, steps, uniform_XN, drawn_1, choice.token_X, places, first, 1, is_captured
        )

    def written(self) -> Choice:
        """What the last steps have chosen, on the CPU."""
        return Choice(*(figure[:, : self.taken].cpu() for figure in self.out))

    def leave(self, live_A: Sequence[Sequence[int]]) -> None:
        """Let texts that have ended leave the batch, once that
        makes it enough smaller: only these prompts go on."""
        seating = seat(self.seating.answerers, live_A)
        if len(seating.text_of_row()) > SHRINK * len(self.text_R):
            prompts_A = zip(self.seating.prompts_A, live_A, strict=True)
            kept = (
                tuple(p if p in live else None for p in prompts) for prompts, live in map(_as_sets, prompts_A)
            )
            self.seating = Seating(self.seating.answerers, self.seating.block, tuple(kept))
            return
        device = self.token_X.device
        texts, rows = seating.sources(self.seating)
        text_X = torch.tensor(texts, device=device)
        self.lanes.reseat(seating.members_G, seating.block, rows)
        self.token_X = self.token_X[text_X]
        self.uniform_XN = None if self.uniform_XN is None else self.uniform_XN[text_X]
        self.text_R = torch.tensor(seating.text_of_row(), device=device)
        self.seating, self.capture = seating, None
        self.taken = 0

    def advance(self) -> None:
        """Take the next steps."""
        if self.taken != self.steps or self.out.token_X.shape != (len(self.token_X), self.steps):
            self.out = self._empty_out()
        with self.lanes.stepping():
            self.lanes.prepare_steps(self.steps)
            if self.is_captured and self.capture is None:
                self.capture = CapturedStep(self._step, self._counters())
            for _ in range(self.steps):
                self.capture.replay() if self.capture is not None else self._step()
                self.lanes.column += 1
        self.taken = self.steps

    def _step(self) -> None:
        """One token for every text: read the last one, choose the
        next. In place, so that it can be captured."""
        place_1 = self.lanes.step_1.clone()
        logits_RV = self.lanes.step(self.token_X[self.text_R])
        uniform_X = None if self.uniform_XN is None else self.uniform_XN.index_select(1, self.drawn_1)[:, 0]
        choice = self.rule.choose(logits_RV, self.seating.texts_A, uniform_X)
        self.token_X.copy_(choice.token_X)
        self.drawn_1.add_(1)
        for figure, into in zip(choice, self.out, strict=True):
            into.index_copy_(1, place_1, figure[:, None])

    def _counters(self) -> list[Tensor]:
        """What a step changes beside its output and the columns of the caches that it fills."""
        own = [self.token_X, self.drawn_1, self.lanes.step_1]
        for state in self.lanes.states:
            layers: Any = state.cache.layers
            own += [state.position_L1, *(layer.cumulative_length for layer in layers)]
        return own

    def _empty_out(self) -> Choice:
        X, R = len(self.token_X), len(self.text_R)
        figure_X = torch.empty(X, self.steps, device=self.token_X.device)
        token_X = torch.empty_like(figure_X, dtype=torch.int64)
        return Choice(
            token_X, figure_X, figure_X.clone(), figure_X.clone(), figure_X.new_empty(R, self.steps)
        )


def _as_sets(pair: tuple[Sequence[int | None], Sequence[int]]) -> tuple[Sequence[int | None], set[int]]:
    return pair[0], set(pair[1])


def steps_at_a_time(device: torch.device) -> int:
    """Steps between two looks at what has ended: a look makes a GPU wait for the host."""
    return STEPS_AT_A_TIME if device.type == "cuda" else 1


def is_capturable(agents: Agents) -> bool:
    """On a GPU, unless the base lies in shards (ZeRO-3), whose weights are fetched inside of a pass."""
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
    logits = 4 * config.vocab_size  # of a row, in the head's dtype and what else is made of them
    rows = sum(len(answerer.members) for answerer in answerers)
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info(model.device)
    fitting = max(1, int(FREE_SHARE * free / (rows * (width * length + logits))))
    waves = max(1, -(-len(prompts) // fitting))
    return -(-len(prompts) // waves) if prompts else 1  # as many in each
