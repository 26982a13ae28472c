"""The page: what it holds, and that it needs nothing from elsewhere."""

import json
import re
from typing import Any

from chorus.monitoring.flame_graph import flame_graph


def tree_of(page: str) -> list[Any]:
    [tree] = re.findall(r"^const tree = (.*), graph = document", page, re.MULTILINE)
    return json.loads(tree)


def test_the_page_holds_every_stack_in_milliseconds_the_longest_first():
    tree = tree_of(
        flame_graph({("a",): 1000.0, ("a", "b"): 500.0, ("a", "c"): 1500.0, ("d",): 4000.0}, "Host time")
    )
    assert tree == ["Host time", 7.0, [["d", 4.0, []], ["a", 3.0, [["c", 1.5, []], ["b", 0.5, []]]]]]


def test_the_page_loads_nothing_and_a_name_cannot_leave_its_place():
    page = flame_graph({("</script><script>alert(1)</script>",): 1.0}, "a < b & c")
    assert "<title>a &lt; b &amp; c</title>" in page
    assert page.count("<script") == page.count("</script") == 1
    assert not re.search(r"https?:|src=|href=|@import|url\(|import ", page)
    assert tree_of(page)[2][0][0] == "</script><script>alert(1)</script>"
