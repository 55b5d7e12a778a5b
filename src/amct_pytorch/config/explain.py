"""What pydantic found wrong with a config, in words for the person who wrote the file."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Annotated, Any, get_args, get_origin

from pydantic import BaseModel, Tag, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from amct_pytorch.errors import ProblemList, did_you_mean, shown

Place = Callable[[list[str]], str]


def dotted(parts: list[str]) -> str:
    """A place as JSON files have it: keys with dots between, list positions in brackets."""
    return ".".join(parts)


def explain(
    error: ValidationError,
    model: type[BaseModel],
    problems: ProblemList,
    place: Place = dotted,
) -> None:
    """Add a problem to `problems` for each thing that pydantic refused.

    Args:
        error: what validating `model` raised.
        model: a model whose fields have descriptions saying what is allowed.
        problems: gets one text per refusal: place, value, what is allowed, nearest name.
        place: turns the keys from `model` down to the value into the text for the place; list
            positions are part of the key before them (``search_range[0]``).
    """
    for details in error.errors():
        problems.add(_problem(details, model, place))


def _problem(details: ErrorDetails, model: type[BaseModel], place: Place) -> str:
    kind, location = details["type"], list(details["loc"])
    missing = kind == "missing"
    if missing and isinstance(location[-1], int):
        # A list that is too short: it is the list that is wrong.
        missing, location = False, location[:-1]
    parts, field, owner = _walk(model, location)
    if kind == "extra_forbidden":
        return f"{place(parts)}: unknown key{_nearest_key(parts[-1], owner, model, location)}"
    allowed = field.description if field else "an object"
    if allowed is None:  # an option of a registered algorithm: pydantic knows what it is to be
        allowed = details["msg"].removeprefix("Input should be ")
    value = details["input"]
    if kind == "value_error":
        allowed = str(details["ctx"]["error"])
    elif kind in ("union_tag_invalid", "union_tag_not_found"):
        key = next(iter(owner.model_fields))
        parts, allowed = [*parts, key], owner.model_fields[key].description or ""
        value = value[key]
    elif kind == "model_type":
        allowed = "an object"
    if missing:
        return f"{place(parts)} is missing; allowed: {allowed}"
    nearest = did_you_mean(value, _words(allowed)) if isinstance(value, str) else ""
    return f"{place(parts)} is {shown(value)}; allowed: {allowed}{nearest}"


def _walk(
    model: type[BaseModel], location: list[int | str]
) -> tuple[list[str], FieldInfo | None, type[BaseModel]]:
    """The keys to a location without variant tags, the last key's field, and its model."""
    parts: list[str] = []
    field: FieldInfo | None = None
    owner, variants = model, dict[str, type[BaseModel]]()
    inner: type[BaseModel] | None = None
    for step in location:
        if isinstance(step, int):
            parts[-1] += f"[{step}]"
        elif step in variants:
            owner, variants = variants[step], {}
        else:
            owner = inner or owner
            parts.append(step)
            field = owner.model_fields.get(step)
            variants, inner = _variants(field), _inner(field)
    if variants:  # the tag itself is what is wrong
        owner = next(iter(variants.values()))
    return parts, field, owner


def _variants(field: FieldInfo | None) -> dict[str, type[BaseModel]]:
    """The models that a field chooses from, by tag."""
    found = {}
    for option in get_args(field.annotation) if field else ():
        if get_origin(option) is Annotated:
            variant, *marks = get_args(option)
            found.update({mark.tag: variant for mark in marks if isinstance(mark, Tag)})
    return found


def _inner(field: FieldInfo | None) -> type[BaseModel] | None:
    """The one model that a field holds, or may hold."""
    annotation = field.annotation if field else None
    for option in (annotation, *get_args(annotation)):
        if isinstance(option, type) and issubclass(option, BaseModel):
            return option
    return None


def _nearest_key(
    key: str, owner: type[BaseModel], model: type[BaseModel], location: list[Any]
) -> str:
    """Which key was meant, or what other variant of the block has such a key."""
    for name in location[:1]:
        for tag, variant in _variants(model.model_fields.get(name)).items():
            if variant is not owner and key in variant.model_fields:
                return f"; it belongs to {next(iter(variant.model_fields))} {shown(tag)}"
    return did_you_mean(key, owner.model_fields) or f"; allowed: {', '.join(owner.model_fields)}"


def _words(allowed: str) -> list[str]:
    """The texts among what is allowed: what stands in quotes, and true and false."""
    return [*re.findall('"([^"]+)"', allowed), *re.findall(r"\b(?:true|false)\b", allowed)]
