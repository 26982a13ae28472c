"""The report shows what a run has written, names what is missing, and stands alone in a real browser."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from browser import browser_page, find_browser
from folders import contents

pytest.importorskip("matplotlib", reason="the extra 'report' is not installed")

from chorus.commands.report import main
from chorus.errors import InputError
from chorus.reporting.page import write_report

STEPS = 12


def answer(number: int, agent: int | None, scale: float = 1.0) -> dict[str, Any]:
    """Agents differ on every third problem; a wrong answer is less sure."""
    right = number % 4 > 0 and (agent is None or (number + agent) % 3 > 0)
    unsure = (0.1 if right else 0.6) * scale + 0.003 * number
    uncertainty = {"max_p": min(unsure, 1.0), "entropy": unsure}
    if agent is None:
        uncertainty |= {"mutual_information": unsure / 2, "disagreement": 0.5 * (not right)}
    text = f" {number}" if right else f" {number + 1 + (agent or 0)}"
    found = {"text": text, "right": right, "probability": 1 - min(unsure, 1.0), "uncertainty": uncertainty}
    if agent is None:
        columns = {"probability": [0.9, 0.8], "entropy": [0.2, 0.1], "mutual_information": [unsure / 2, 0.0]}
        found["tokens"] = {"text": [text, ""], **columns}
    return {**found, "reference_nll": unsure}


def problem(number: int, ood: bool = False) -> dict[str, Any]:
    own = {"uniform": None, "agent_0": 0, "agent_1": 1}
    answers = {name: answer(number, agent, 1.5 if ood else 1.0) for name, agent in own.items()}
    answers |= {f"{name}/calibrated": answer(number, agent, 0.8) for name, agent in own.items()}
    prompt = f"<script>alert({number})</script> & how many?"
    return {"prompt": prompt, "reference": f" {number}", "ood": ood, "answers": answers}


def write_run(folder: Path, name: str, *, ood: bool = True, **config: Any) -> Path:
    run = folder / name
    run.mkdir()
    rows: list[dict[str, Any]] = [
        {
            **{"step": step, "task_loss": 2.0 / step, "task_loss_per_agent": [2.1 / step, 1.9 / step]},
            **{"swd": 0.01 * step, "lr": 1e-3, "grad_norm": 1.0, "skipped": 0},
            **{"agent_tokens_per_second": 100.0},
        }
        for step in range(1, STEPS + 1)
    ]
    scores = {f"{name}/{key}": 0.5 for name in ("agent_0", "uniform") for key in ("cls/Acc", "token/NLL")}
    rows += [{"step": step, "scores": scores} for step in (6, 12)]
    part = {"seconds": 0.1, "calls": 3, "share": 0.5, "slowest_process_seconds": 0.1}
    parts = {"forward_pass": part, "backward_pass": part}
    rows.append({"step": 4, "profile": {"steps": 3, "parts": parts, "memory_gb": {"resident": 1.5}}})
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    problems = [problem(number) for number in range(30)]
    problems += [problem(number, ood=True) for number in range(10)] if ood else []
    (run / "problems.jsonl").write_text("".join(json.dumps(one) + "\n" for one in problems))
    (run / "ensemble.json").write_text(json.dumps({"config": {"num_agents": 2, **config}}))
    return run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_run(tmp_path_factory.mktemp("runs"), "one", model_name="a/base")
    main([str(folder)])
    return folder


def test_a_page_has_every_picture_the_run_has_figures_for_and_files_of_them(run: Path):
    wanted = {"loss", "swd", "lr", "grad_norm", "throughput", "eval_accuracy", "eval_nll", "time", "memory"}
    wanted |= {"disagreement", "reliability", "risk_coverage", "right_wrong", "in_out"}
    files = contents(run / "report")
    assert set(files) == {f"{name}.{kind}" for name in wanted for kind in ("svg", "png")}
    page = (run / "report.html").read_text()
    assert page.count("<svg") == len(wanted)
    assert page.count("<article") == 20
    assert "20 answers of the mixture" in page


def test_what_a_run_has_not_is_left_out_with_a_sentence(tmp_path: Path):
    bare = write_run(tmp_path, "bare", ood=False)
    rows = [json.loads(line) for line in (bare / "metrics.jsonl").read_text().splitlines()]
    kept = [{**row, "swd": None, "lr": [1e-3, 2e-3]} for row in rows if "task_loss" in row]
    (bare / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept) + '{"step": 13, "ta')
    page = write_report([bare]).read_text()
    rates = (bare / "report" / "lr.svg").read_text()
    assert all(f"agent {agent}" in rates for agent in (0, 1)), "each agent has a learning rate of its own"
    sentences = ["No distance between agents", "No scores while training", "No times by part", "No memory"]
    for words in [*sentences, "No problems out of distribution", "No scores: no held-out problem"]:
        assert words in page
    (bare / "problems.jsonl").unlink()
    assert "No answers one by one" in write_report([bare]).read_text()
    assert not (bare / "report" / "reliability.svg").exists(), "a picture of an earlier report has stayed"


def test_captions_give_the_figures_of_the_answers(run: Path):
    page = (run / "report.html").read_text()
    apart = sum(answer(n, 0)["text"] != answer(n, 1)["text"] for n in range(30)) / 30
    assert f"{apart:.1%} over all pairs" in page
    right = sum(answer(n, None)["right"] for n in range(30))
    assert f"{right} right and {30 - right} wrong answers" in page
    assert "30 held-out problems and 10 of another kind" in page


def test_the_pages_colours_follow_the_reader_and_those_of_the_files_do_not(run: Path):
    assert "var(--series-0)" in (run / "report.html").read_text()
    assert not re.search(r"var\(", (run / "report" / "loss.svg").read_text())


def test_several_runs_share_their_pictures(run: Path, tmp_path: Path):
    other = write_run(tmp_path, "two", ood=False)
    main([str(run), str(other), "--out", str(tmp_path / "both.html")])
    page = (tmp_path / "both.html").read_text()
    assert "2 runs compared" in page
    assert {path.stem for path in (tmp_path / "both").glob("*.svg")} == {
        *("loss", "swd", "grad_norm", "throughput", "risk_coverage")
    }


def test_a_file_of_scored_problems_has_a_report_of_its_own(run: Path, tmp_path: Path):
    (tmp_path / "scored.jsonl").write_bytes((run / "problems.jsonl").read_bytes())
    main([str(tmp_path / "scored.jsonl")])
    assert "How often agents disagree" in (tmp_path / "scored.html").read_text()


@pytest.mark.skipif(find_browser() is None, reason="no Chromium is installed")
def test_a_real_browser_shows_it_without_a_network_at_every_width_in_light_and_dark(
    run: Path, tmp_path: Path
):
    with browser_page(tmp_path / "profile") as page:
        colours = set()
        for width in (1280, 390):
            for dark in (False, True):
                page.open(run / "report.html", width, dark=dark)
                assert page.value("document.documentElement.scrollWidth") == width, "it scrolls sideways"
                narrow = "[...document.querySelectorAll('figure svg')].filter(one => one.clientWidth < 250)"
                assert page.value(f"{narrow}.length") == 0
                colours.add(page.value("getComputedStyle(document.body).backgroundColor"))
                line = "document.querySelector('#loss-axes_1 path[style*=\"stroke: var\"]')"
                colours.add(page.value(f"getComputedStyle({line}).stroke"))
        assert len(colours) == 4, "paper and ink, each in light and dark"
        assert page.value("document.querySelectorAll('.prompt script').length") == 0
        assert not page.errors
        assert {url.partition(":")[0] for url in page.requests} == {"file"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "gone: no such file or folder"),
        ("{}\n[1]\n", "line 2 is not a JSON object"),
        ("{\n{}\n", "line 1 is not valid JSON"),
        ('{"prompt": "a"}\n', "line 1 is not a scored problem"),
    ],
)
def test_what_is_no_run_is_refused_in_one_line(tmp_path: Path, content: str | None, message: str):
    file = tmp_path / "gone"
    if content is not None:
        file = tmp_path / "problems.jsonl"
        file.write_text(content)
    with pytest.raises(InputError, match=message) as caught:
        main([str(file)])
    assert len(str(caught.value).splitlines()) == 1
