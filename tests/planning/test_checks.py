"""How findings are told."""

import io
import json
import re

import pytest
import torch
from rich.console import Console

from chorus.errors import InputError, RunError
from chorus.planning.checks import Check, Report, Stopped, sample_view


def speaking() -> tuple[Report, io.StringIO]:
    text = io.StringIO()
    return Report(Console(file=text, width=100)), text


def test_the_exit_code_tells_bad_input_from_a_failed_check():
    report, _ = speaking()
    report.add("one", True, "found")
    assert report.exit_code == 0
    report.add("two", False, "found", "remedy")
    assert report.exit_code == 3
    with pytest.raises(Stopped), report.trying("three"):
        raise InputError("key 'lr' is bad")
    assert report.exit_code == 2
    with pytest.raises(Stopped), speaking()[0].trying("four"):
        raise RunError("a loss is nan")


def test_a_mode_that_the_run_does_not_use_may_refuse():
    report, _ = speaking()
    with report.trying("other mode", may_be_refused=True):
        raise InputError("not this one")
    assert report.checks == [Check("other mode", "skip", "not this one")]
    assert report.exit_code == 0


def test_running_out_of_memory_is_a_failed_check_and_waits_for_nobody():
    report, _ = speaking()
    with pytest.raises(Stopped), report.trying("fused"):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate")
    assert report.is_alone
    assert report.exit_code == 3
    assert "sequential" in report.checks[0].remedy


def test_what_fails_on_another_process_alone_is_told_with_its_number():
    report, _ = speaking()
    report.add("both", False, "here")
    report.add("there", True, "fine here")
    report.join(
        [report.failures(), [Check("both", "FAIL", "x"), Check("there", "FAIL", "broken", "mend it")]]
    )
    assert [check.name for check in report.failures()] == ["both", "there (process 1)"]


def test_a_failure_shows_its_remedy_and_a_pass_does_not_without_colour():
    report, text = speaking()
    report.add("good [bracketed]", True, "as it [should] be", "not shown")
    report.add("bad", False, "as it is", "mend it")
    report.conclude()
    told = text.getvalue()
    assert re.search(r"PASS .* good \[bracketed\] .* as it \[should\] be", told)
    assert "remedy: mend it" in told
    assert "not shown" not in told
    assert "1 of 2 checks failed" in told
    assert "\x1b" not in told


def test_json_is_one_object():
    out = io.StringIO()
    report = Report(None, out)
    report.facts["plan"] = {"agents": 2}
    report.add("one", False, "found", "remedy")
    report.conclude()
    told = json.loads(out.getvalue())
    assert told == {
        "passed": False,
        "exit_code": 3,
        "plan": {"agents": 2},
        "checks": [{"name": "one", "status": "FAIL", "found": "found", "remedy": "remedy"}],
    }


def test_a_row_is_readable_without_colour():
    report, text = speaking()
    report.show(
        sample_view(
            [{"text": "Q:", "loss": False}, {"text": "\n", "loss": False}, {"text": " 2", "loss": True}]
        )
    )
    assert "Q:|\\n|[ 2]" in text.getvalue()
    assert "3 tokens, loss on the 1 in brackets" in text.getvalue()


def test_a_token_that_should_be_learnt_and_is_not_stands_out_without_colour():
    report, text = speaking()
    tokens = [{"text": "bc", "loss": False, "unlearnt": True}, {"text": "d", "loss": True, "unlearnt": False}]
    report.show(sample_view(tokens))
    assert "{bc}[d]" in text.getvalue()
    assert "none on the 1 in braces" in " ".join(text.getvalue().split())
