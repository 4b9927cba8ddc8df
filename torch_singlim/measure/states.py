"""Checks of states from checkpoints, which are restored completely or not at all."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

__all__ = ["check_keys"]


def check_keys(state: Mapping[str, Any], expected: Iterable[str]) -> None:
    """Raise ValueError unless a state has the expected keys and no others; the message names the differences.

    Args:
        state: from a checkpoint.
        expected: the keys that it should have.

    Raises:
        ValueError: keys are missing or unknown.

    >>> check_keys({"lr": 1.0}, ["lr"])
    """
    keys = set(expected)
    missing, unknown = sorted(keys - state.keys()), sorted(state.keys() - keys)
    if missing or unknown:
        named = {"missing": missing, "unknown": unknown}
        words = "; ".join(f"{word}: {', '.join(found)}" for word, found in named.items() if found)
        raise ValueError(f"a state with {', '.join(sorted(keys))} was expected, {words}")
