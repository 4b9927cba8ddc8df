"""The README's code runs, its table names every tag that is logged, and its commands are there for `.ci/run`."""

import re
from pathlib import Path

import pytest

README = (Path(__file__).parent.parent / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("block", [b for b in BLOCKS if "Trainer" not in b])
def test_code_blocks_run(block, capsys):
    exec(compile(block, "README.md", "exec"), {})
    assert capsys.readouterr().out


def test_every_logged_tag_is_explained():
    import inspect

    from torch_singlim import verdict
    from torch_singlim.callbacks import monitor

    scalars = inspect.getsource(verdict.observation_scalars) + inspect.getsource(verdict.window_scalars)
    logged = set(re.findall(r'"([a-z_]+(?:/[a-z_]+)?)"', scalars)) - {"ok"}
    logged |= set(re.findall(r'"singlim/([a-z_/]+)"', inspect.getsource(monitor))) - {"verdict"}
    table = README.split("## What is logged")[1].split("## What to expect")[0]
    explained = set(re.findall(r"`([a-z_/]+)`", table))
    assert len(logged) > 20
    assert logged <= explained
    rows = {
        tag
        for row in table.splitlines()
        if row.startswith("| `")
        for tag in re.findall(r"`([a-z_/]+)`", row.split("|")[1])
    }
    assert rows <= logged


def test_the_two_commands_are_there():
    commands = re.findall(r"```bash\n(.*?)\n```", README)
    assert commands[:2] == [
        'pip install -e ".[recipes]" && python recipes/digits.py',
        'pip install -e ".[test]" && python -m pytest',
    ]
