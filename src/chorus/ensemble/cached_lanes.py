"""The KV caches of texts that are being decoded.

Each member reads each prompt once; the result is shared among the rows of all answerers with that member. The
caches are transformers' own. If every layer has full or sliding attention they are static, so that a step has
fixed shapes and can be captured; a sliding layer then keeps all keys, and the mask hides those outside of its
window. Architectures with other layers (recurrent, hybrid) get a dynamic cache.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel, StaticCache
from transformers.cache_utils import DynamicLayer, StaticLayer, StaticSlidingWindowLayer
from transformers.masking_utils import create_masks_for_generate

from chorus.ensemble.lanes import Lane, Member, lanes_of
from chorus.model.agents import Agents
from chorus.model.kernels.grouped_attention import attention_over_caches

# Tokens of one pass over prompts: 8 rows of 4,096. Eager attention's scores grow with the square of the
# length.
PREFILL_TOKENS = 32_768


@dataclass
class _LaneState:
    """The state of one lane's rows: what they have read so far.

    Attributes:
        row_L: the lane's rows among those of the batch; None is all of them, in order.
        seen_LC: bool, the columns of the cache that hold no padding.
        position_L1: of the next token within its text.
        masks: of the coming steps, as the trunk takes them.
    """

    lane: Lane
    cache: Cache
    row_L: Tensor | None
    seen_LC: Tensor
    position_L1: Tensor
    masks: Any = None


@dataclass
class CachedLanes:
    """A batch of R rows that are being decoded.

    Attributes:
        column: number of filled columns of the caches; the caller of a step increments it.
        last_position: the last one that a text under way needs.
        is_static: every step has the same shapes.
        order_R: the index of each row in the concatenated rows of the lanes; None where they are in order.
        step_1: steps since the masks were made; on the device, so that a captured step can read it.
    """

    agents: Agents
    states: list[_LaneState]
    column: int
    last_position: int
    is_static: bool
    order_R: Tensor | None
    step_1: Tensor

    @contextmanager
    def stepping(self) -> Iterator[None]:
        """Run the lanes with the attention that their caches need."""
        with ExitStack() as stack:
            for state in self.states:
                if isinstance(state.cache, StaticCache):
                    stack.enter_context(attention_over_caches(state.lane.model))
            yield

    def prepare_steps(self, steps: int) -> None:
        """Make the masks of the next steps, in the same tensors as before: a captured step reads them.

        Call it within `stepping`: the kind of mask depends on the attention.
        """
        self.step_1.zero_()
        for state in self.states if self.is_static else []:
            model, device = state.lane.model, state.seen_LC.device
            rows = torch.empty(len(state.seen_LC), steps, 1, dtype=model.dtype, device=device)
            made = create_masks_for_generate(model.config, rows, state.seen_LC, past_key_values=state.cache)
            state.masks = made if state.masks is None else _copied(state.masks, made)

    def step(self, token_R: Tensor) -> Tensor:
        """Read one token in every row: the head's output for the next one, logits_RV, before any soft-cap."""
        outputs = []
        for state in self.states:
            token_L1 = (token_R if state.row_L is None else token_R[state.row_L])[:, None]
            masks = (
                _taken(state.masks, self.step_1) if self.is_static else state.seen_LC[:, : self.column + 1]
            )
            with state.lane.trunk(len(token_L1), 1) as trunk:
                hidden_L1D = trunk(
                    input_ids=token_L1,
                    attention_mask=masks,
                    position_ids=state.position_L1,
                    past_key_values=state.cache,
                    use_cache=True,
                ).last_hidden_state
            outputs.append(self.agents.head().linear(hidden_L1D[:, -1]))
            # A text that has ended is still decoded until its row is reused; its position must stay in the
            # table of a base with learned positions. Columns may be more, for the steps taken at a time.
            state.position_L1.add_(1).clamp_(max=self.last_position)
        self.step_1.add_(1)
        logits_RV = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
        return logits_RV if self.order_R is None else logits_RV[self.order_R]

    def move_to(self, column: int) -> None:
        """Shift all texts, in place, so that their next tokens go to `column`.

        Static caches only. No text may be longer than `column`.
        """
        shift, self.column = column - self.column, column
        for state in self.states if shift else []:
            layers: Any = state.cache.layers
            for layer in layers:
                layer.keys.copy_(layer.keys.roll(shift, 2))
                layer.values.copy_(layer.values.roll(shift, 2))
                layer.cumulative_length.fill_(column)
            state.seen_LC.copy_(state.seen_LC.roll(shift, 1))
            state.seen_LC[:, : max(shift, 0)] = False
            state.seen_LC[:, column:] = True

    def put(self, rows: Sequence[int], other: "CachedLanes", other_rows: Sequence[int]) -> None:
        """Replace some rows by texts of another batch, in place; static caches only.

        Both batches have the same number of columns and the same `column`, and this batch has every lane of
        the other.
        """
        source_of = dict(zip(rows, other_rows, strict=True))
        others = {state.lane.name: state for state in other.states}
        for state in self.states:
            places = [(place, row) for place, row in enumerate(_rows_of(state)) if row in source_of]
            if not places:
                continue
            source = others[state.lane.name]
            place_of = {row: place for place, row in enumerate(_rows_of(source))}
            to_L = torch.tensor([place for place, _ in places], device=self.step_1.device)
            from_L = torch.tensor([place_of[source_of[row]] for _, row in places], device=to_L.device)
            layers: Any = zip(state.cache.layers, source.cache.layers, strict=True)
            for layer, new in layers:
                layer.keys[to_L] = new.keys[from_L]
                layer.values[to_L] = new.values[from_L]
            state.seen_LC[to_L] = source.seen_LC[from_L]
            state.position_L1[to_L] = source.position_L1[from_L]

    def reseat(
        self,
        members_G: Sequence[Member],
        block: int,
        source_R: Sequence[int],
        other: "CachedLanes | None" = None,
    ) -> None:
        """Rebuild the batch: each row continues the text of the previous row `source_R`, of the same member.

        Rows of another batch are counted after this one's; see `put` for what both must have in common.
        """
        before = [self] if other is None else [self, other]
        place_of: dict[int, int] = {}  # the index of a row within its lane, over all batches
        was: dict[Any, list[_LaneState]] = {}
        first = 0
        for lanes in before:
            for state in lanes.states:
                earlier = sum(len(one.seen_LC) for one in was.get(state.lane.name, []))
                place_of |= {first + row: earlier + place for place, row in enumerate(_rows_of(state))}
                was.setdefault(state.lane.name, []).append(state)
            first += lanes.num_rows
        states = []
        for lane in lanes_of(self.agents, members_G):
            parts = was[lane.name]
            index = [place_of[source_R[row]] for row in _rows(lane, block)]
            index_L = torch.tensor(index, device=self.step_1.device)
            cache = _chosen_rows([part.cache for part in parts], index_L)
            seen_LC = torch.cat([part.seen_LC for part in parts])[index_L]
            position_L1 = torch.cat([part.position_L1 for part in parts])[index_L]
            states.append(_state(lane, block, cache, seen_LC, position_L1, len(members_G)))
        self.states = states
        self.order_R = _order(states)

    @property
    def num_rows(self) -> int:
        return sum(len(state.seen_LC) for state in self.states)


def prefill(
    agents: Agents,
    members_G: Sequence[Member],
    block: int,
    prompt_R: Sequence[int],
    prompts: Sequence[Sequence[int]],
    new_tokens: int,
    last_position: int,
    pad_id: int,
) -> tuple[CachedLanes, Tensor]:
    """Read prompts, once for every member.

    Args:
        members_G: the member of each group of `block` rows.
        prompt_R: the prompt of each row.
        prompts: token ids, at least one each; of any lengths.
        new_tokens: most tokens that will be read afterwards.
        last_position: that any text will need.

    Returns:
        The batch, and the head's output at the end of each row's prompt, logits_RV.
    """
    device = next(agents.parameters()).device
    T = max(map(len, prompts))
    # Padding on the left, so that the next token of every row goes to the same column.
    ids_PT = torch.tensor([[pad_id] * (T - len(prompt)) + list(prompt) for prompt in prompts], device=device)
    real_PT = torch.tensor(
        [[False] * (T - len(prompt)) + [True] * len(prompt) for prompt in prompts], device=device
    )
    members = list(dict.fromkeys(members_G))
    states, logits = [], []
    for reader, lane in zip(lanes_of(agents, members), lanes_of(agents, members_G), strict=True):
        own = {members[group]: place for place, group in enumerate(reader.groups)}
        source_L = [own[members_G[row // block]] * len(prompts) + prompt_R[row] for row in _rows(lane, block)]
        index_L = torch.tensor(source_L, device=device)
        cache, logits_NV = _read(reader, ids_PT, real_PT, index_L, T + new_tokens)
        logits.append(logits_NV[index_L])
        seen_PC = torch.cat([real_PT, real_PT.new_ones(len(prompts), new_tokens)], 1)
        prompt_L = index_L % len(prompts)
        position_L1 = real_PT.sum(1, keepdim=True)[prompt_L].clamp(max=last_position)
        states.append(_state(lane, block, cache, seen_PC[prompt_L], position_L1, len(members_G)))
    is_static = isinstance(states[0].cache, StaticCache)
    step_1 = torch.zeros(1, dtype=torch.int64, device=device)
    lanes = CachedLanes(agents, states, T, last_position, is_static, _order(states), step_1)
    logits_RV = torch.cat(logits)
    return lanes, logits_RV if lanes.order_R is None else logits_RV[lanes.order_R]


def static_cache(model: PreTrainedModel, length: int) -> StaticCache | None:
    """A cache of `length` columns; None if there are layers other than full and sliding attention."""
    try:
        cache = StaticCache(config=model.config, max_cache_len=length)
    except KeyError:  # a kind of layer that transformers has no static cache for
        return None
    if any(type(layer) not in (StaticLayer, StaticSlidingWindowLayer) for layer in cache.layers):
        return None
    cache.layers = [StaticLayer(max_cache_len=length) for _ in cache.layers]  # pyright: ignore
    return cache


def _read(
    reader: Lane, ids_PT: Tensor, real_PT: Tensor, index_L: Tensor, length: int
) -> tuple[Cache, Tensor]:
    """The cache of rows `index_L` among N = members x prompts, and the head's output at the prompts' ends."""
    P, T = ids_PT.shape
    M = len(reader.groups)
    into = static_cache(reader.model, length)
    if into is None:
        cache = DynamicCache(config=reader.model.config)
        logits_MPV = _read_rows(reader, ids_PT, real_PT, cache)
        cache.reorder_cache(index_L)  # pyright: ignore[reportArgumentType]
        return cache, logits_MPV.flatten(0, 1)
    parts = []
    chunk = max(1, PREFILL_TOKENS // (M * T))
    for start in range(0, P, chunk):
        prompts = slice(start, min(start + chunk, P))
        cache = Cache(layer_class_to_replicate=DynamicLayer)
        with attention_over_caches(reader.model):
            parts.append(_read_rows(reader, ids_PT[prompts], real_PT[prompts], cache))
        _copy_rows(cache, into, index_L, P, prompts)
    return into, torch.cat(parts, 1).flatten(0, 1)


def _read_rows(reader: Lane, ids_PT: Tensor, real_PT: Tensor, cache: Cache) -> Tensor:
    M = len(reader.groups)
    position_PT = (real_PT.cumsum(1) - 1).clamp(min=0)
    with reader.trunk(M * len(ids_PT), ids_PT.shape[1]) as trunk:
        hidden_NTD = trunk(
            input_ids=ids_PT.repeat(M, 1),
            attention_mask=real_PT.repeat(M, 1),
            position_ids=position_PT.repeat(M, 1),
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state
    return reader.agents.head().linear(hidden_NTD[:, -1]).unflatten(0, (M, -1))


def _chosen_rows(caches: Sequence[Cache], index_L: Tensor) -> Cache:
    """Rows of several concatenated caches; the first cache is changed, layer by layer."""
    into, *others = caches
    if not others:
        into.reorder_cache(index_L)  # pyright: ignore[reportArgumentType]
        return into
    layers: Any = zip(*(cache.layers for cache in caches), strict=True)
    for layer, *more in layers:
        layer.keys = torch.cat([layer.keys, *(one.keys for one in more)])[index_L]
        layer.values = torch.cat([layer.values, *(one.values for one in more)])[index_L]
    return into


def _copy_rows(read: Cache, into: StaticCache, index_L: Tensor, P: int, prompts: slice) -> None:
    """Copy what was read of some prompts to the rows of `into` that continue them."""
    member_L, prompt_L = index_L // P, index_L % P
    (to_L,) = torch.where((prompt_L >= prompts.start) & (prompt_L < prompts.stop))
    from_L = member_L[to_L] * (prompts.stop - prompts.start) + prompt_L[to_L] - prompts.start
    layers: Any = zip(read.layers, into.layers, strict=True)  # of other classes; all have keys and values
    for old, new in layers:
        if not new.is_initialized:
            keys, values = (
                kind.new_empty(len(index_L), kind.shape[1], 0, kind.shape[3])
                for kind in (old.keys, old.values)
            )
            new.lazy_initialization(keys, values)
            new.cumulative_length.fill_(old.keys.shape[2])
        new.keys[to_L, :, : old.keys.shape[2]] = old.keys[from_L]
        new.values[to_L, :, : old.keys.shape[2]] = old.values[from_L]


def _state(
    lane: Lane, block: int, cache: Cache, seen_LC: Tensor, position_L1: Tensor, num_groups: int
) -> _LaneState:
    row_L = None
    if len(lane.groups) < num_groups:
        row_L = torch.tensor(_rows(lane, block), device=seen_LC.device)
    return _LaneState(lane, cache, row_L, seen_LC, position_L1)


def _rows(lane: Lane, block: int) -> list[int]:
    return [group * block + slot for group in lane.groups for slot in range(block)]


def _rows_of(state: _LaneState) -> list[int]:
    return list(range(len(state.seen_LC))) if state.row_L is None else state.row_L.tolist()


def _order(states: Sequence[_LaneState]) -> Tensor | None:
    if states[0].row_L is None:
        return None
    return torch.cat([state.row_L for state in states if state.row_L is not None]).argsort()


def _taken(masks: Any, step_1: Tensor) -> Any:
    if isinstance(masks, dict):
        return {kind: _taken(mask, step_1) for kind, mask in masks.items()}
    return None if masks is None else masks.index_select(2, step_1)


def _copied(into: Any, masks: Any) -> Any:
    if isinstance(into, dict):
        return {kind: _copied(mask, masks[kind]) for kind, mask in into.items()}
    return None if into is None else into.copy_(masks)
