"""What the wire models say of their own fields."""

from __future__ import annotations

from pydantic import BaseModel


def ignored(model: type[BaseModel]) -> set[str]:
    """Fields that are taken and change nothing, by their descriptions."""
    fields = model.model_fields.items()
    return {name for name, field in fields if (field.description or "").startswith("Taken and ignored")}
