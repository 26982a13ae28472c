"""A flame graph as one self-contained HTML page for any browser.

The width of a box is its time, and its callees are below it (Gregg 2016, the icicle layout,
https://queue.acm.org/detail.cfm?id=2927301). Boxes of the same name under the same box are merged. A click on
a box zooms in; a click on the top box zooms out.
"""

import html
import json
from collections.abc import Mapping
from typing import Any

Stack = tuple[str, ...]


def flame_graph(microseconds: Mapping[Stack, float], title: str) -> str:
    """The HTML page, from the self time of each stack."""
    root: dict[str, Any] = {"name": title, "time": 0.0, "inner": {}}
    for stack, time in microseconds.items():
        node = root
        node["time"] += time
        for name in stack:
            node = node["inner"].setdefault(name, {"name": name, "time": 0.0, "inner": {}})
            node["time"] += time
    tree = json.dumps(_plain(root)).replace("<", "\\u003c")  # no name can end the script
    return PAGE.replace("TITLE", html.escape(title)).replace("TREE", tree)


def _plain(node: Mapping[str, Any]) -> list[Any]:
    """[name, milliseconds, inner nodes with the longest first]"""
    inner = sorted(node["inner"].values(), key=lambda each: -each["time"])
    return [node["name"], round(node["time"] / 1000, 4), [_plain(each) for each in inner]]


PAGE = """<!DOCTYPE html>
<html lang="en"><meta charset="utf-8"><title>TITLE</title>
<style>
body { font: 13px system-ui, sans-serif; margin: 12px; background: #fff; color: #222 }
#graph { position: relative }
#graph div { position: absolute; height: 19px; line-height: 19px; overflow: hidden; white-space: nowrap;
  cursor: pointer; box-sizing: border-box; border: solid #fff; border-width: 0 1px 1px 0;
  padding-left: 3px; border-radius: 2px }
#graph div:hover { filter: brightness(0.88) }
</style>
<h3>TITLE, as a flame graph</h3>
<p id="told">The width of a box is its time; what ran inside it lies below. Click a box to widen it.</p>
<div id="graph"></div>
<script>
const tree = TREE, graph = document.getElementById("graph"), told = document.getElementById("told"), height = 20;
const hint = told.textContent, colours = {};
function colour(name, depth) {  // spans blue and green, modules and operators warm; a name keeps its colour
  if (!(name in colours)) {
    let sum = 0;
    for (const letter of name) sum = (sum * 31 + letter.charCodeAt(0)) % 997;
    const isSpan = /^[a-z]+(_[a-z]+)*(\\.\\w+)?$/.test(name) || depth == 0;
    colours[name] = isSpan ? `hsl(${170 + sum % 60} 55% 75%)` : `hsl(${10 + sum % 45} 85% ${72 + sum % 8}%)`;
  }
  return colours[name];
}
function draw(path) {
  graph.replaceChildren();
  const wide = path[path.length - 1], pixels = graph.clientWidth;
  let deepest = 0;
  function box(node, left, width, depth, above) {
    if (width * pixels < 1.5) return;
    const [name, time, inner] = node, share = (100 * time / tree[1]).toFixed(1);
    const element = document.createElement("div"), text = `${name}: ${time.toFixed(3)} ms, ${share} % of all`;
    Object.assign(element.style, { left: 100 * left + "%", width: 100 * width + "%", top: depth * height + "px",
      background: colour(name, depth) });
    element.textContent = width * pixels > 30 ? `${name} ${share} %` : "";
    element.title = text;
    element.onmouseover = () => told.textContent = text;
    element.onmouseout = () => told.textContent = hint;
    element.onclick = () => draw([...above, node]);
    graph.append(element);
    deepest = Math.max(deepest, depth);
    if (above.length < path.length - 1) return box(path[above.length + 1], 0, 1, depth + 1, [...above, node]);
    for (const each of inner) {
      const part = width * each[1] / time;
      box(each, left, part, depth + 1, [...above, node]);
      left += part;
    }
  }
  box(path[0], 0, 1, 0, []);
  graph.style.height = (deepest + 1) * height + "px";
}
draw([tree]);
window.onresize = () => draw([tree]);
</script></html>
"""
