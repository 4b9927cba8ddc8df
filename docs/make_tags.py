"""Write tags.md: the introduction that stands there, and the tables that follow from the registry of tags.

python docs/make_tags.py
"""

from pathlib import Path

from torch_singlim.measure.tags import tags_page

PAGE = Path(__file__).with_name("pages") / "tags.md"


def page(present: str) -> str:
    """The page, from what is there: all before the first table stays."""
    introduction = present.partition("\n## ")[0].rstrip()
    return "\n".join([introduction, *tags_page()]) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
