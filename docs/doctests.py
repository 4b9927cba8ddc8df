"""Doctests in docstrings, as blocks of code of the reference."""

import re
from typing import Any

from griffe import Extension, Object

# from the first prompt to the next empty line
BLOCK = re.compile(r"^>>> .*?(?=^\s*$|\Z)", re.MULTILINE | re.DOTALL)


class Doctests(Extension):
    """Fences that make the doctests blocks of code."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        """Put them into the docstring."""
        if obj.docstring is not None:
            obj.docstring.value = BLOCK.sub(lambda found: f"```pycon\n{found[0].rstrip()}\n```\n", obj.docstring.value)
