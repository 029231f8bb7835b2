"""The one base class of every section of a run's configuration and of every layer's options."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field


class Config(BaseModel):
    """Strict, frozen, and deaf to no typo: an unknown key is an error, `true` is not 1, and nothing changes
    after loading.

    Every field's docstring says its meaning and unit.
    """

    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, use_attribute_docstrings=True, validate_default=True
    )


class Part:
    """Marks an option that names other recipes: `into: Annotated[str, Part()]` takes one layer of that
    recipe.

    The value is a pattern text over the keys of `model.layers`; the builder builds the items that it expands
    to and hands them to the layer as a list of branches, so that a composite layer needs to know neither the
    builder nor other layers.
    """


PartPattern = Annotated[str, Part()]
"""The type of an option that names recipes (see `Part`)."""

Positive = Annotated[int, Field(gt=0)]
"""A whole number of at least one."""

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
"""A number from 0 to 1."""
