"""Configurations from text, and the errors that refuse them."""

import re
from pathlib import Path

import pytest

from chorus.config import Config, load_config
from chorus.errors import InputError


def load(text: str, *arguments: str) -> Config:
    Path("configs.yaml").write_bytes(text.encode())
    return load_config(arguments)


def refusal(text: str, *arguments: str) -> str:
    """The error of one line that refuses this text; it must name a remedy."""
    with pytest.raises(InputError) as caught:
        load(text, *arguments)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    assert re.search(r"; .{3,}$", message), message
    return message
