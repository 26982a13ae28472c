"""The outcome of every answerer on every problem: its answer, whether it is right, and its uncertainty."""

from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from chorus.data.rows import HeldOutRow
from chorus.data.samples import Sample
from chorus.ensemble.answers import answer_to, is_exact, pieces
from chorus.ensemble.calibration import Calibrated
from chorus.ensemble.decode import Answer, generate
from chorus.ensemble.distributions import choice_chunks, predict, token_states
from chorus.ensemble.lanes import Member
from chorus.ensemble.next_token import Answerer
from chorus.ensemble.uncertainty import Predictions, disagreement
from chorus.model.agents import Agents

Text = Callable[[Sequence[int]], str]


class Tokens(NamedTuple):
    """The tokens of a written answer, its end token last where it has one. Logarithms are natural.

    Attributes:
        texts: what each adds to the answer; nothing for the end token.
        log_prob_T: of each.
        entropy_T: of the distribution that each is from, the total uncertainty.
        mutual_information_T: the part of it that is the members' disagreement.
    """

    texts: list[str]
    log_prob_T: Tensor
    entropy_T: Tensor
    mutual_information_T: Tensor


class Outcome(NamedTuple):
    """One answerer, one problem, one temperature. Logarithms are natural.

    Attributes:
        answer: the text, or the choice.
        is_right: whether it is an exact match.
        probability: of the answer: the product over its tokens.
        entropy: of the distribution over the choices, or the mean of those of the answer's tokens.
        mutual_information: likewise; 0 for a single member.
        disagreement: the share of the members whose own answer is another one; 0 for a single member.
        log_prob_T: of the reference: of its tokens, or of the right choice. Empty where none is asked for.
        max_prob_T: of the most probable token, or choice, in the same places.
        is_top_T: whether that is the reference's.
        brier_T: Brier scores in the same places.
        tokens: of a mixture's answer; None of a single member, and of a choice.
    """

    answer: str
    is_right: bool
    probability: float
    entropy: float
    mutual_information: float
    disagreement: float
    log_prob_T: Tensor
    max_prob_T: Tensor
    is_top_T: Tensor
    brier_T: Tensor
    tokens: Tokens | None = None


Outcomes = list[list[list[Outcome]]]  # [answerer][temperature][problem]


def choice_outcomes(
    agents: Agents,
    members: Sequence[Member],
    calibrated: Calibrated,
    rows: Sequence[HeldOutRow],
    choices: Sequence[Sequence[int]],
    text: Text,
    after_pass: Callable[[], object] = lambda: None,
) -> Outcomes:
    """Every answerer takes the most probable choice."""
    if not rows:
        return [[[], []] for _ in calibrated.answerers]
    names = [text(choice) for choice in choices]
    references = [text(row.answer) for row in rows]
    targets = [names.index(reference) if reference in names else 0 for reference in references]
    chunks = choice_chunks(agents, members, [row.prompt for row in rows], choices, targets, after_pass)
    tops: list[Tensor] = []
    for chunk in chunks():
        tops = [_top(chunk.log_prob_MNV, members, answerer) for answerer in calibrated.answerers]
    of_member = {
        one.members[0]: top for one, top in zip(calibrated.answerers, tops, strict=True) if _is_single(one)
    }
    found = predict(chunks(), calibrated.answerers, members, _temperatures(calibrated), len(rows))
    outcomes: Outcomes = []
    for index, answerer in enumerate(calibrated.answerers):
        own = [of_member[member] for member in answerer.members] if not _is_single(answerer) else []
        of_temperatures = []
        for predicted in found[index]:
            line = []
            for n, figures in enumerate(predicted):
                answer = names[int(tops[index][n])]
                apart = disagreement(int(tops[index][n]), [int(top_N[n]) for top_N in own]) if own else 0.0
                line.append(_outcome(answer, answer == references[n], figures, apart, figures))
            of_temperatures.append(line)
        outcomes.append(of_temperatures)
    return outcomes


def _top(log_prob_MNV: Tensor, members: Sequence[Member], answerer: Answerer) -> Tensor:
    own = log_prob_MNV[[list(members).index(member) for member in answerer.members]]
    weight_K = torch.tensor(answerer.weights, device=own.device)
    return (own.exp() * weight_K[:, None, None]).sum(0).argmax(-1).cpu()


def text_outcomes(
    agents: Agents,
    calibrated: Calibrated,
    rows: Sequence[HeldOutRow],
    text: Text,
    *,
    end_ids: Sequence[int],
    max_new_tokens: int,
    prompts_at_a_time: int,
    with_references: bool,
    advance: Callable[[int], None],
    after_pass: Callable[[], object] = lambda: None,
) -> Outcomes:
    """Every answerer writes greedily; then its answers and the references are scored, all in the same passes.

    A temperature does not change which token is the most probable, so both temperatures share their texts.
    """
    write = partial(
        generate,
        agents,
        calibrated.answerers,
        max_new_tokens=max_new_tokens,
        end_ids=frozenset(end_ids),
        after_tokens=after_pass,
    )
    answers = _written(write, len(calibrated.answerers), rows, prompts_at_a_time, advance)
    reader = _Reader(calibrated)
    for index, own in enumerate(answers):
        for n, row in enumerate(rows):
            if with_references:
                reader.ask(index, (n, "reference"), row.sample)
            reader.ask(index, (n, "own"), _own_sample(row, own[n], end_ids))
    reader.read(agents, after_pass)

    texts = [[text(answer.token_ids) for answer in own] for own in answers]
    references = [text(row.answer) for row in rows]
    keys = [[_key(one, reference) for one, reference in zip(own, references, strict=True)] for own in texts]
    of_member = {
        one.members[0]: key for one, key in zip(calibrated.answerers, keys, strict=True) if _is_single(one)
    }
    outcomes: Outcomes = []
    for index, answerer in enumerate(calibrated.answerers):
        own = [of_member[member] for member in answerer.members] if not _is_single(answerer) else []
        of_temperatures: list[list[Outcome]] = [[], []]
        for n, written in enumerate(texts[index]):
            apart = disagreement(keys[index][n], [key_N[n] for key_N in own]) if own else 0.0
            is_right = is_exact(written, references[n])
            for temperature, line in enumerate(of_temperatures):
                of_answer = reader.found(index, (n, "own"))[temperature]
                reference = reader.found(index, (n, "reference"))[temperature] if with_references else None
                outcome = _outcome(written, is_right, of_answer, apart, reference)
                if own:
                    outcome = outcome._replace(tokens=_tokens(answers[index][n], of_answer, text))
                line.append(outcome)
        outcomes.append(of_temperatures)
    return outcomes


def _written(
    write: Callable[[list[list[int]]], list[list[Answer]]],
    num_answerers: int,
    rows: Sequence[HeldOutRow],
    prompts_at_a_time: int,
    advance: Callable[[int], None],
) -> list[list[Answer]]:
    """The answers of every answerer to every row. Prompts of like length are written to together."""
    by_length = sorted(range(len(rows)), key=lambda n: len(rows[n].prompt), reverse=True)
    answers = [[Answer() for _ in rows] for _ in range(num_answerers)]
    for start in range(0, len(rows), prompts_at_a_time):
        wave = by_length[start : start + prompts_at_a_time]
        for kept, new in zip(answers, write([rows[n].prompt for n in wave]), strict=True):
            for n, answer in zip(wave, new, strict=True):
                kept[n] = answer
        advance(len(wave))
    return answers


class _Reader:
    """Samples to score and the answerers that need them. Equal samples are read once, and only by the members
    needed.
    """

    def __init__(self, calibrated: Calibrated) -> None:
        self.calibrated = calibrated
        self.samples: list[Sample] = []
        self.wanted_by: list[set[int]] = []
        self._place: dict[tuple[int, ...], int] = {}
        self._asked: dict[tuple[int, Hashable], int] = {}
        self._found: dict[tuple[int, int], list[Predictions]] = {}

    def ask(self, answerer: int, name: Hashable, sample: Sample) -> None:
        """Register that the answerer of this index needs predictions on a sample's targets, under `name`."""
        key = (int(sample.is_target.sum()), *sample.ids.tolist())
        if key not in self._place:
            self._place[key] = len(self.samples)
            self.samples.append(sample)
            self.wanted_by.append(set())
        place = self._asked[answerer, name] = self._place[key]
        self.wanted_by[place].add(answerer)

    def read(self, agents: Agents, after_pass: Callable[[], object]) -> None:
        """Read all samples; those needed by the same members are read together."""
        answerers, temperatures = self.calibrated.answerers, _temperatures(self.calibrated)
        groups: dict[tuple[Member, ...], list[int]] = {}
        for place, wanted_by in enumerate(self.wanted_by):
            members = {member for index in wanted_by for member in answerers[index].members}
            ordered = tuple(sorted(members, key=lambda member: -1 if member is None else member))
            groups.setdefault(ordered, []).append(place)
        head = agents.head()
        for members, places in groups.items():
            asking = sorted({index for place in places for index in self.wanted_by[place]})
            samples = [self.samples[place] for place in places]
            states = token_states(agents, members, samples, after_pass)
            found = predict(
                (chunk for state in states for chunk in state.chunks(head)),
                [answerers[index] for index in asking],
                members,
                [temperatures[index] for index in asking],
                len(places),
            )
            for index, of_temperatures in zip(asking, found, strict=True):
                for row, place in enumerate(places):
                    self._found[index, place] = [predicted[row] for predicted in of_temperatures]

    def found(self, answerer: int, name: Hashable) -> list[Predictions]:
        """An answerer's predictions on a sample, at each of its temperatures."""
        return self._found[answerer, self._asked[answerer, name]]


def _key(text: str, reference: str) -> str | None:
    """The form of an answer in which answers are compared."""
    return answer_to(reference, text)


def _own_sample(row: HeldOutRow, answer: Answer, end_ids: Sequence[int]) -> Sample:
    """An answer after its prompt, with its end token: of several end tokens, the one in the reference."""
    ids = list(answer.token_ids)
    if answer.ended == "end" or not ids:
        last = int(row.sample.ids[-1])
        ids.append(last if last in end_ids else end_ids[0])
    is_target = torch.arange(len(row.prompt) + len(ids)) >= len(row.prompt)
    return Sample(torch.tensor([*row.prompt, *ids]), is_target)


def _outcome(
    answer: str, is_right: bool, own: Predictions, disagreement: float, reference: Predictions | None
) -> Outcome:
    """`own`: of the answer's tokens. Of a choice, `own` and `reference` are the same distribution."""
    is_choice = own is reference
    log_prob = float(own.max_log_prob_N.sum()) if is_choice else float(own.log_prob_N.double().sum())
    none = torch.empty(0)
    of_reference = (none, none, none, none)
    if reference is not None:
        tops = (reference.max_log_prob_N.exp(), reference.is_top_N, reference.brier_N)
        of_reference = (reference.log_prob_N, *tops)
    return Outcome(
        answer,
        is_right,
        float(torch.tensor(log_prob, dtype=torch.float64).exp()),
        float(own.entropy_N.mean()),
        float(own.mutual_information_N.mean()),
        disagreement,
        *of_reference,
    )


def _tokens(answer: Answer, predicted: Predictions, text: Text) -> Tokens:
    texts = pieces(answer.token_ids, text)
    texts += [""] * (len(predicted.log_prob_N) - len(texts))  # the end token
    return Tokens(texts, predicted.log_prob_N, predicted.entropy_N, predicted.mutual_information_N)


def _is_single(answerer: Answerer) -> bool:
    return len(answerer.members) == 1


def _temperatures(calibrated: Calibrated) -> list[list[float]]:
    return [[1.0, temperature] for temperature in calibrated.temperatures]
