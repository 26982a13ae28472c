"""CONTRIBUTING.md lists where a setting of the whole process is made; nothing else may make one."""

import re

from launching import ROOT

SETS = re.compile(
    r"\bgc\.\w+\(|signal\.signal\(|pthread_sigmask\(|filterwarnings\(|simplefilter\(|disable_progress_bar\("
    r"|\.setLevel\(|torch\._(?:dynamo|inductor)\.config\.\w+ =|os\.environ\.(?:setdefault|update|pop)\("
    r"|os\.environ\[[^]]+\] =|deepspeed\.ops\.__dict__|_set_pg_timeout\(|set_num_threads\("
    r"|torch\.backends\.\S+ =|set_float32_matmul_precision\(|set_default_\w+\("
    r"|use_deterministic_algorithms\(|manual_seed_all\(|torch\.manual_seed\(|random\.seed\("
    r"|set_start_method\(|os\.umask\(|os\.chdir\(|setrlimit\(|\.prctl\("
)


def test_every_place_that_sets_something_for_the_whole_process_is_listed():
    sources = [*(ROOT / "src").rglob("*.py"), ROOT / "train.py", ROOT / "dry_run_sanity_check.py"]
    found: dict[str, set[str]] = {}
    for source in sources:
        # `gc.collect` sets nothing.
        calls = {call for call in SETS.findall(source.read_text()) if call != "gc.collect("}
        if calls:
            found[str(source.relative_to(ROOT))] = calls
    text = (ROOT / "CONTRIBUTING.md").read_text()
    section = text.partition("## Process-wide settings")[2].partition("\n## ")[0]
    listed = dict(re.findall(r"^\| `([\w./]+)` \| ([^|]+) \|", section, re.MULTILINE))
    assert found.keys() == listed.keys()
    for file, calls in found.items():
        for call in calls:
            names = re.findall(r"`([\w.]+)`", listed[file])
            assert any(name in call for name in names), f"{file}: {call}"
