"""JSON text to Python values, strictly: errors with line and column, no key twice."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

from amct_pytorch.errors import ConfigError, ProblemList, shown


class _Object(dict[str, Any]):
    """An object of the file that remembers the keys it had more than once."""

    repeated: tuple[str, ...] = ()


def _object(pairs: list[tuple[str, Any]]) -> _Object:
    result = _Object(pairs)
    if len(result) < len(pairs):
        counts = Counter(key for key, _ in pairs)
        result.repeated = tuple(key for key, count in counts.items() if count > 1)
    return result


def parse_json(text: str, source: str, problems: ProblemList) -> dict[str, Any]:
    """The object that a JSON file holds.

    Args:
        text: the whole file.
        source: the file's name for messages.
        problems: gets an entry for each key that stands more than once in the same object.

    Raises:
        ConfigError: the text is not JSON (with line and column), or holds no object.
    """
    try:
        document = json.loads(text, object_pairs_hook=_object)
        _report_repeated(document, "", problems)
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise ConfigError(f"{source}: {where}: not valid JSON: {error.msg}") from None
    except (ValueError, RecursionError) as error:  # digits without end, brackets without end
        raise ConfigError(f"{source}: not a config: {error}") from None
    if not isinstance(document, dict):
        raise ConfigError(f"{source}: holds {shown(document)}; allowed: a JSON object")
    return document


def _report_repeated(value: Any, place: str, problems: ProblemList) -> None:
    if isinstance(value, _Object):
        for key in value.repeated:
            problems.add(f"{place}{key}: the key is there more than once")
        for key, inner in value.items():
            _report_repeated(inner, f"{place}{key}.", problems)
    elif isinstance(value, list):
        for inner in value:
            _report_repeated(inner, place, problems)
