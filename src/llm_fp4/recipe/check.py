"""Data to a section of a recipe, or one sentence that says what is wrong, where, and what to write instead."""

from __future__ import annotations

from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from llm_fp4.errors import RecipeError

_WRITE = {"bits": "bits: {embedding: 4, weight: 4, activation: 4}", "calibration": "calibration: {source: text.txt}"}


def validated(model: type[Any], data: Any, where: str) -> Any:
    """Return ``model`` built from ``data``, or raise RecipeError with the first problem in one sentence."""
    try:
        return model.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        path = [str(p) for p in first["loc"]]
        raise RecipeError(f"{where}: {_sentence(model, first, path)}") from None


def _sentence(model: type[Any], problem: Any, path: list[str]) -> str:
    """Return what is wrong at ``path``, and what to write."""
    place = ".".join(path)
    if problem["type"] == "extra_forbidden":
        section = model
        for key in (p for p in path[:-1] if not p.isdecimal()):
            section = _section(section.model_fields[key].annotation) or section
        there = f" in {'.'.join(path[:-1])}; known there" if path[1:] else "; known at the top level"
        return f"unknown key {path[-1]!r}{there}: {', '.join(sorted(section.model_fields))}"
    if problem["type"] in ("model_type", "model_attributes_type"):
        return f"{place} holds keys and values; write {_WRITE.get(place, f'{_named(path)}{{key: value}}')}"
    if problem["type"] == "list_type" and isinstance(problem["input"], str):
        return f"{place} is a list; write {_named(path)}[{problem['input']}]"
    return ": ".join(part for part in (place, problem["msg"].removeprefix("Value error, ")) if part)


def _named(path: list[str]) -> str:
    return "" if path[-1].isdecimal() else f"{path[-1]}: "


def _section(annotation: Any) -> type[BaseModel] | None:
    """Return the section that a field holds, itself, in a list or as one of several types."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for a in get_args(annotation) if (found := _section(a)) is not None), None)
