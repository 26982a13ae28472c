"""CONTRIBUTING.md lists the private names of libraries that the
source uses: what to look at when a library moves."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
FILES = [*(ROOT / "src").rglob("*.py"), ROOT / "train.py", ROOT / "dry_run_sanity_check.py"]
LIBRARIES = ("torch", "functorch", "deepspeed", "transformers", "peft", "accelerate", "datasets")
OF_NAMED_TUPLES = {"_replace", "_asdict", "_fields", "_make"}
PUBLIC_OF_DEEPSPEED = ("deepspeed.utils",)  # its documented access to single parameters


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def is_library_private(dotted: str) -> bool:
    library, *rest = dotted.split(".")
    return library in LIBRARIES and any(map(is_private, rest))


def own_names(trees: list[ast.Module]) -> set[str]:
    """Names that the source defines itself: functions, classes, arguments, variables, attributes of self."""
    found = set(OF_NAMED_TUPLES)
    for node in (node for tree in trees for node in ast.walk(tree)):
        match node:
            case (
                ast.FunctionDef(name=name)
                | ast.AsyncFunctionDef(name=name)
                | ast.ClassDef(name=name)
                | ast.arg(arg=name)
            ):
                found.add(name)
            case (
                ast.Name(id=name, ctx=ast.Store())
                | ast.Attribute(value=ast.Name(id="self"), attr=name, ctx=ast.Store())
            ):
                found.add(name)
    return found


def attribute_name(node: ast.Attribute, own: set[str]) -> str | None:
    """The library's name in `node`: with its modules where they
    are written, otherwise the attribute alone."""
    written = ast.unparse(node)
    if is_library_private(written):
        return written
    # DeepSpeed's optimizer is called so everywhere; `zero.get` is of a section of its JSON.
    is_of_zero = isinstance(node.value, ast.Name) and node.value.id == "zero" and node.attr != "get"
    if is_of_zero or node.attr.startswith("ds_") or (is_private(node.attr) and node.attr not in own):
        return node.attr
    return None


def used_names(tree: ast.Module, own: set[str]) -> Iterator[str]:
    longer = {
        node.value for node in ast.walk(tree) if isinstance(node, ast.Attribute)
    }  # part of a longer name
    for node in ast.walk(tree):
        match node:
            case ast.ImportFrom(module=str(module)):
                for name in (f"{module}.{alias.name}" for alias in node.names):
                    internal = module.startswith("deepspeed.") and not module.startswith(PUBLIC_OF_DEEPSPEED)
                    if internal or is_library_private(name) or module.startswith("functorch"):
                        yield name
            case ast.Attribute() if node not in longer or not is_library_private(ast.unparse(node)):
                name = attribute_name(node, own)
                if name is not None:
                    yield name
            case ast.Call(
                func=ast.Name(id="getattr" | "hasattr" | "setattr"),
                args=[where, ast.Constant(value=str(name)), *_],
            ):
                if is_private(name) or ast.unparse(where) == "zero":
                    yield name


def test_the_list_of_private_names_in_contributing_is_true():
    trees = [ast.parse(file.read_text(encoding="utf-8")) for file in FILES]
    own = own_names(trees)
    used = {name for tree in trees for name in used_names(tree, own)}
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    section = re.split(r"^## ", text.partition("## Private names of libraries")[2], flags=re.MULTILINE)[0]
    listed = set(re.findall(r"^- `([\w.]+)`", section, re.MULTILINE))
    assert used - listed == set(), "used in the source, not listed in CONTRIBUTING.md"
    assert listed - used == set(), "listed in CONTRIBUTING.md, no longer used"
    assert len(listed) > 30
