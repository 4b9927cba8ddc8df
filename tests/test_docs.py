"""README and the pages of docs/: every block of code runs, every command works, every tag that is mentioned exists."""

import contextlib
import functools
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
from lightning.pytorch.loggers import TensorBoardLogger

import torch_singlim
from tests.recipes.conftest import folder, small  # noqa: F401  # fixtures: images, and small quick experiments
from tests.zoo import Net, fit, monitor_of, seeded
from torch_singlim import demo
from torch_singlim.__main__ import main
from torch_singlim.measure.tags import TAGS, Group

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
WITH_CODE = [page for page in PAGES if "```python" in page.read_text()]
INSTALL = re.compile(r'pip install -e "\.\[(\w+)\]" && (.*)')
README = PAGES[0].read_text()
COMMANDS = list(
    dict.fromkeys(
        line
        for page in PAGES
        for block in re.findall(r"```bash\n(.*?)```", page.read_text(), re.S)
        for line in block.splitlines()
    )
)

pytestmark = pytest.mark.filterwarnings("ignore")  # a reader's terminal shows them, and goes on


def run_blocks(page):
    """Every block of code of a page, one after another, as a reader would paste them."""
    names: dict = {"__name__": "reader"}
    for block in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL):
        exec(compile(block, page.name, "exec"), names)


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    """Where a reader works, who has pasted the blocks of all pages: what they write is there for the commands."""
    where = tmp_path_factory.mktemp("desk")
    with contextlib.chdir(where), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for page in WITH_CODE:
            run_blocks(page)
    return where


def test_the_code_of_every_page_runs(desk):
    assert {page.name for page in WITH_CODE} == {"README.md", "start.md", "contributing.md"}
    assert list(desk.glob("runs/mine/version_0/events*"))
    assert len(list(desk.glob("checkpoints/*.ckpt"))) == 4


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_all_other_blocks_are_commands(page):
    """Of a kind that is executed here."""
    text = page.read_text()
    assert text.count("```") == 2 * len(re.findall(r"^```(?:python|bash|text)$", text, re.MULTILINE))


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
    elif command == "python -m torch_singlim digits":
        monkeypatch.setattr(demo, "train", functools.partial(demo.train, steps=40))
        main(["digits", "--out", "runs/demo"])
        assert Path("runs/demo/drift.png").exists()
    elif command.startswith("mkdocs "):  # .ci/run builds the site
        assert "mkdocs build --strict -f docs/mkdocs.yml" in (ROOT / ".ci" / "run").read_text()
    elif command.startswith("tensorboard "):
        logs = command.split()[-1]
        make_run(Path(logs) / "mine" / "version_0")
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
        assert command.startswith("torch_singlim report ")
        make_run(Path(command.split()[2]) / "mine" / "version_0")
        assert shutil.which("torch_singlim")
        main([*shlex.split(command)[1:], *([] if "--out" in command else ["--out", str(tmp_path / "report")])])
        assert list(Path.cwd().rglob("report.html")) or list(tmp_path.rglob("report.html"))


def make_run(where):
    """A run, if the reader has none there."""
    if not where.exists():
        fit(seeded(Net), monitor_of(every_n_steps=5, window=5), steps=10, logger=TensorBoardLogger(where, "", ""))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_tag_that_is_mentioned_exists(page):
    """Of the form `group/name`, with or without the monitor's name."""
    known = {tag.name for tag in TAGS} | {tag.stderr_name for tag in TAGS if tag.stderr is not None}
    text = page.read_text()
    groups = "|".join(sorted({name.partition("/")[0] for name in known if "/" in name}))
    mentioned = set(re.findall(rf"`(?:singlim/)?((?:{groups})/[a-z_]+)`", text))
    mentioned |= set(re.findall(r'(?:"|`)singlim/([a-z_/]+)(?:"|`)', text))
    assert mentioned <= known


def test_the_groups_of_charts_are_explained():
    """In the README in one sentence, on the page of the dashboard with a section for each."""
    questions = [group.value for group in Group]
    text = " ".join(README.split())
    assert [found for found in re.findall(r"\*([A-Z][^*]+\?)\*", text) if found in questions] == questions
    dashboard = (ROOT / "docs" / "pages" / "dashboard.md").read_text()
    assert [head for head in re.findall(r"^## (.*)$", dashboard, re.MULTILINE) if head in questions] == questions


def test_links_between_pages_lead_somewhere():
    """But for the screenshots, which are made for the site."""
    for page in PAGES:
        for target in re.findall(r"\]\((?!http|screenshots/)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} -> {target}"


def test_the_reference_has_every_public_name():
    page = (ROOT / "docs" / "pages" / "api.md").read_text()
    named = re.findall(r"^::: torch_singlim\.(?:[a-z_.]+\.)?(\w+)$", page, re.MULTILINE)
    assert sorted(named) == sorted(torch_singlim.__all__)


def test_the_readme_is_short_and_its_two_commands_come_first():
    assert len(README.splitlines()) <= 120
    assert COMMANDS[:2] == [
        'pip install -e ".[recipes]" && python recipes/digits.py',
        'pip install -e ".[test]" && python -m pytest',
    ]
