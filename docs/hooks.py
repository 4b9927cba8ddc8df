"""What the site needs beside its pages: the README as its first page, screenshots, formulas that need no network."""

import html
import logging
import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
# where the tests of what TensorBoard shows leave their screenshots
SHOTS = ROOT / "artefacts" / "tensorboard"
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)

_log = logging.getLogger("mkdocs.hooks")


def on_files(files: Any, *, config: Any) -> Any:
    """Add the README, with links as they are from the pages, and the screenshots."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    readme = readme.replace("docs/pages/", "").replace("docs/CONTRIBUTING.md", "contributing.md")
    readme = re.sub(r"\[CITATION\.cff\]\(.*?\)", "`CITATION.cff`", readme)
    files.append(File.generated(config, "index.md", content=readme))
    shots = sorted(SHOTS.rglob("*.png"))
    if not shots:
        # a warning, which ends a strict build
        _log.warning("no screenshots in %s: run python -m pytest tests/report/test_browser.py -m '' first", SHOTS)
    for shot in shots:
        name = f"screenshots/{shot.relative_to(SHOTS).as_posix()}"
        files.append(File.generated(config, name, abs_src_path=str(shot)))
    return files


def on_page_content(content: str, **_: Any) -> str:
    """Formulas as MathML, which browsers draw by themselves."""

    def mathml(found: re.Match) -> str:
        display = "block" if found[1] == "div" else "inline"
        return convert(html.unescape(found[2]), display=display)

    return FORMULA.sub(mathml, content)
