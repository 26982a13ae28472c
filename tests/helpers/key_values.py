"""Values of a configuration key, good and bad, derived from the
key's own field. A new key needs no line here."""

import math
from collections.abc import Iterator
from typing import Any

from jsonschema import Draft202012Validator, validators
from ruamel.yaml import YAML

from chorus.config import Config
from chorus.config.keys import schemas
from chorus.config.strict_yaml import as_yaml

# How a slip or an attack looks in YAML, whatever the key.
ODDITIES = (
    *(
        "true",
        "false",
        "null",
        '"1"',
        '"1e-4"',
        "fast",
        "[1]",
        "{a: 1}",
        ".nan",
        ".inf",
        "-.inf",
        "1e999",
        "2020-01-01",
    ),
    *("0", "1", "7", "-1", "0.0", "0.5", "1.0", "1.5", "1e3", "[]", "[a, a]", "[[a]]", '[""]', "[true]"),
    *('"\\ud800"', '""', "yes", "Auto", '"{"', '"{a}"', "runs/a", str(10**30), "-1e-9"),
)
STRICT = validators.extend(  # JSON Schema calls 1.0 an integer
    Draft202012Validator,
    type_checker=Draft202012Validator.TYPE_CHECKER.redefine(
        "integer", lambda _, value: isinstance(value, int) and not isinstance(value, bool)
    ),
)


def kinds(key: str) -> list[dict[str, Any]]:
    schema = schemas()[key]
    return schema.get("anyOf") or schema.get("oneOf") or [schema]


def edges(key: str) -> Iterator[str]:
    """The values at and beside every limit of the key, and its words."""
    for kind in kinds(key):
        step = 1 if kind.get("type") == "integer" else 1e-9
        for limit in ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"):
            if limit in kind:
                yield from (as_yaml(kind[limit] + change) for change in (-step, 0, step))
        yield from (f"[{as_yaml(word)}]" for word in kind.get("items", {}).get("enum", ()))
        yield from map(as_yaml, [*kind.get("enum", ()), *([kind["const"]] if "const" in kind else ())])


def parsed(written: str) -> Any:
    return YAML(typ="safe", pure=True).load(written)


def is_valid(key: str, value: Any) -> bool:
    """What the key's JSON schema says, by the `jsonschema` package, under two rules of ours: numbers are
    finite, and text is Unicode."""
    if isinstance(value, float) and not math.isfinite(value):
        return False
    if isinstance(value, str) and value.encode(errors="ignore").decode() != value:
        return False
    return STRICT(schemas()[key]).is_valid(value)


def has_a_rule_of_its_own(key: str) -> bool:
    """Whether a validator may refuse what the schema allows."""
    decorators = Config.__pydantic_decorators__.field_validators.values()
    return any(key in decorator.info.fields for decorator in decorators) or "AfterValidator" in repr(
        [Config.model_fields[key].annotation, *Config.model_fields[key].metadata]
    )


def other_value(key: str) -> Any:
    """A value that the key accepts and that is not its default."""
    default = getattr(Config(), key)
    for written in ("7", "2", "0.25", *edges(key), *ODDITIES):
        value = parsed(written)
        if is_valid(key, value) and value != default:
            try:
                return getattr(Config.model_validate({"lambda_sw": 0, key: value}), key)
            except ValueError:  # a rule of its own
                continue
    raise AssertionError(f"{key}: no other value is known")
