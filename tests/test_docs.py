"""README and the pages of docs/: every block of code runs, every command works, every tag that is mentioned exists."""

import contextlib
import importlib
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
import tomllib
import urllib.request
import warnings
from pathlib import Path

import pytest

from tests.recipes.conftest import folder, small  # noqa: F401  # fixtures: images, and small quick experiments
from torch_singlim.measure.tags import GROUPS, TAGS

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
README = PAGES[0].read_text()
INSTALL = re.compile(r'pip install -e "\.\[(\w+)\]" && (.*)')
COMMANDS = [
    line
    for page in PAGES
    for block in re.findall(r"```bash\n(.*?)```", page.read_text(), re.S)
    for line in block.splitlines()
]

pytestmark = pytest.mark.filterwarnings("ignore")  # a reader's terminal shows them, and goes on


def run_blocks(page):
    """Every block of code of a page, one after another, as a reader would paste them."""
    names: dict = {"__name__": "reader"}
    for block in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL):
        exec(compile(block, page.name, "exec"), names)


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    """Where a reader works, who has pasted the README's blocks: what they write is there for the commands."""
    where = tmp_path_factory.mktemp("desk")
    with contextlib.chdir(where), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run_blocks(PAGES[0])
    return where


def test_the_readme_s_code_runs(desk):
    assert list(desk.glob("runs/mine/version_0/events*"))
    assert len(list(desk.glob("checkpoints/*.ckpt"))) == 4


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_all_other_blocks_are_commands(page):
    """Of a kind that is executed here; the pages beside the README have none."""
    text = page.read_text()
    assert text.count("```") == 2 * len(re.findall(r"^```(?:python|bash)$", text, re.MULTILINE))
    assert page is PAGES[0] or "```" not in text


def recipe(command, images, out):
    """The recipe with the options of the command, on images made here, without its check at that size."""
    _, script, *options = shlex.split(command)
    options += ["--out", str(out), "--check", "false"]
    if "digits" in script:
        options += ["--samples", "24", "--hidden", "32", "--steps", "60", "--window", "20", "--batch-size", "6"]
    else:
        options += ["--data-dir", str(images)]
    return script, options


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_run(command, desk, folder, tmp_path, monkeypatch):  # noqa: F811  # the fixture imported above
    monkeypatch.chdir(desk)
    if installed := INSTALL.fullmatch(command):
        extra, command = installed.groups()
        assert extra in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    if command == "python -m pytest":  # .ci/run runs it, word for word
        assert "README.md" in (ROOT / ".ci" / "run").read_text()
    elif command.startswith("python recipes/"):
        script, options = recipe(command, folder, tmp_path)
        monkeypatch.setattr(sys, "argv", [script, *options])
        module = importlib.import_module(script.removesuffix(".py").replace("/", "."))
        module.command(module.main)  # as the script does
        assert list(tmp_path.rglob("events.out.tfevents.*"))
    elif command.startswith("tensorboard "):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        with subprocess.Popen([*shlex.split(command), "--port", str(port)], stderr=subprocess.DEVNULL) as process:
            for _ in range(300):
                try:
                    answer = urllib.request.urlopen(f"http://127.0.0.1:{port}/data/runs").read()
                    if b"mine/version_0" in answer:
                        break
                except OSError:
                    pass
                time.sleep(0.1)
            process.terminate()
        assert b"mine/version_0" in answer
    else:
        assert shutil.which(command.split()[0])
        subprocess.run(shlex.split(command), check=True)
        assert (desk / "report" / "report.html").exists()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_tag_that_is_mentioned_exists(page):
    """Of the form `group/name`, with or without the monitor's name; and the groups of charts, by their titles."""
    known = {tag.name for tag in TAGS} | {tag.stderr_name for tag in TAGS if tag.stderr is not None}
    text = page.read_text()
    groups = "|".join(sorted({name.partition("/")[0] for name in known if "/" in name}))
    mentioned = set(re.findall(rf"`(?:singlim/)?((?:{groups})/[a-z_]+)`", text))
    mentioned |= set(re.findall(r'(?:"|`)singlim/([a-z_/]+)(?:"|`)', text))
    assert mentioned
    assert mentioned <= known
    charts = re.search(r"\*\*Custom scalars\*\* has the charts[^:]*: (.*?)\. Set", text, re.DOTALL)
    assert (charts is not None) == (page is PAGES[0])
    if charts is not None:
        assert re.findall(r"\*(.+?)\*", charts[1].replace("\n ", "")) == list(GROUPS)


def test_links_between_pages_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\((?!http)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} -> {target}"


def test_the_two_commands_come_first():
    assert COMMANDS[:2] == [
        'pip install -e ".[recipes]" && python recipes/digits.py',
        'pip install -e ".[test]" && python -m pytest',
    ]
