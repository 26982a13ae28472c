"""docs/faults.md names tests; a name that is no test would promise what nothing holds."""

import re

from launching import ROOT


def test_every_test_that_the_page_names_is_there():
    named = re.findall(r"`([\w/]*test_\w+\.py)::(\w+)`", (ROOT / "docs" / "faults.md").read_text())
    assert len(named) > 40
    for file, name in named:
        assert f"\ndef {name}(" in (ROOT / "tests" / file).read_text(), f"{file}::{name}"
