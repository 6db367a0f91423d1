"""Options of a method by name, as configurations and the command line give them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from inspect import Parameter, signature
from typing import Any

from kullback.core.errors import ConfigError

__all__ = ["as_default", "keywords"]


def keywords(name: str, builder: Callable[..., Any], options: Mapping[str, Any], *, where: str) -> dict[str, Any]:
    """The options as keywords of `builder`, each in the type of its default there.

    name: what the builder makes, for the message; where: the configuration's key. Raises ConfigError for an option that
    the builder does not take, and for a value of another type.

    >>> keywords("a box", lambda *, width=1.0, closed=False: None, {"width": 2}, where="options")
    {'width': 2.0}
    """
    takes = {p.name: p.default for p in signature(builder).parameters.values() if p.kind is Parameter.KEYWORD_ONLY}
    for option in options:
        if option not in takes:
            near = get_close_matches(option, takes, n=1)
            hint = f"did you mean {near[0]}?" if near else f"it takes {', '.join(sorted(takes)) or 'none'}"
            raise ConfigError(f"{name} takes no option {option!r}: {hint}")
    return {key: as_default(f"{where}.{key}", value, takes[key]) for key, value in options.items()}


def as_default(key: str, value: Any, default: Any) -> Any:
    """The value in the type of a default, None standing for an optional number. ConfigError when it is none of that.

    >>> as_default("rows", 3.0, 1), as_default("limit", 3, None)
    (3, 3.0)
    """
    wanted = float if default is None else type(default)
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and not math.isnan(value)
    fits = {
        bool: isinstance(value, bool) or value in (0, 1),
        int: number and math.isfinite(value) and value == round(value),
        float: number,
        str: isinstance(value, str),
    }[wanted]
    if not fits:
        raise ConfigError(f"{key} is {'a number' if default is None else f'like {default!r}'}, got {value!r}")
    return wanted(value)
