"""Answers in a terminal: streamed text, coloured by how much the agents disagree, and a sentence about it."""

import math
import re
from collections.abc import Iterator, Sequence

from rich.console import Console
from rich.text import Text as Line

from chorus.commands.asking import Asked
from chorus.ensemble.texts import Text
from chorus.ensemble.uncertainty import AnswerUncertainty, uncertainty_of

# Thresholds of the colours, as fractions of log K, the maximum disagreement of K agents.
SHADES = ((0.02, "green"), (0.1, "yellow"), (0.25, "red"), (1.01, "bold white on red"))
AGREE, MOSTLY = 0.1, 0.25
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # control characters would change the terminal


def shade(mutual_information: float, num_members: int) -> int:
    """0 to 3: how far the members disagree about a token."""
    share = mutual_information / math.log(num_members) if num_members > 1 else 0.0
    return next(number for number, (limit, _) in enumerate(SHADES) if share < limit)


class Stream:
    """One text, printed as it is written."""

    def __init__(self, console: Console, text: Text, num_members: int) -> None:
        self.console, self.text, self.num_members = console, text, num_members
        self._ends: list[int] = []
        self._shown = 0

    def show(self, is_done: bool) -> None:
        """Print the text added since the last call."""
        ending, answer = self.text.ending, self.text.answer
        if is_done:
            del self._ends[len(answer.token_ids) :]
        settled = ending.text_of(answer) if is_done else ending.settled_text_of(answer)
        self._ends += ending.ends_of_tokens(answer, len(self._ends))
        for number, end in enumerate(self._ends):
            is_last = number + 1 == len(self._ends)
            stop = len(settled) if is_last else min(end, len(settled))
            if stop > self._shown:
                piece = CONTROL.sub("", settled[self._shown : stop])
                self.console.print(Line(piece, self._style(number)), end="", soft_wrap=True)
                self._shown = stop

    def _style(self, token: int) -> str:
        if self.num_members < 2:
            return ""
        return SHADES[shade(self.text.answer.mutual_informations[token], self.num_members)][1]


def in_words(uncertainty: AnswerUncertainty, name: str, least_agreed: str) -> str:
    """An answer's uncertainty in words, one line.

    Args:
        name: of the answerer.
        least_agreed: the token with the largest disagreement.
    """
    members = len(uncertainty.member_probabilities)
    figures = (
        f"the answer has a probability of {_percent(uncertainty.probability)} "
        f"({_percent(uncertainty.token_probability)} a token), entropy {uncertainty.entropy:.3f} nats a token"
    )
    if members < 2:
        return f"{name.replace('_', ' ')} alone: {figures}"
    share = uncertainty.largest_mutual_information / math.log(members)
    where = f" about {least_agreed!r}" if least_agreed.strip() else ""
    if share < AGREE:
        said = "The agents agree"
    elif share < MOSTLY:
        said = f"The agents mostly agree, least{where or ' at the end'}"
    else:
        said = f"The agents disagree, most{where or ' about where it ends'}"
    return f"{said}: {figures}, of which disagreement {uncertainty.mutual_information:.3f}"


def explained(asked: Asked) -> str:
    """The line under an answer."""
    text = asked.texts[asked.chosen]
    if len(asked.texts) > 1:
        counts = ", ".join(f"{count} x {CONTROL.sub('', answer)!r}" for answer, count in asked.votes())
        return f"{asked.votes()[0][1]} of {len(asked.texts)} agents: {counts}"
    mutual = text.answer.mutual_informations
    place = mutual.index(max(mutual)) if mutual else 0
    pieces = [*text.ending.pieces(text.answer), ""]
    return in_words(uncertainty_of(text.answer), asked.names[0], pieces[place] if mutual else "")


def _percent(share: float) -> str:
    return f"{share:.1%}" if share >= 0.001 else f"{share:.1e}"


def show(console: Console, asked: Sequence[Asked], steps: Iterator[None]) -> None:
    """Print the answers in order; the first unfinished one is streamed."""
    place, stream = 0, None
    for _ in steps:
        while place < len(asked):
            one = asked[place]
            if stream is None:
                if len(asked) > 1 and console.is_terminal:
                    console.print(f"> {one.prompt}", style="bold")
                text = one.texts[0]
                stream = Stream(console, text, len(text.answer.member_log_probs[0]))
            if len(one.texts) == 1:
                stream.show(one.is_done)
            if not one.is_done:
                break
            if len(one.texts) > 1:
                Stream(console, one.texts[one.chosen], 1).show(is_done=True)
            console.print()
            if console.is_terminal or len(one.texts) > 1:
                console.print(explained(one), style="dim", soft_wrap=True)
            place, stream = place + 1, None
