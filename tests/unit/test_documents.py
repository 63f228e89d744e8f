"""The documents name what the code has."""

from __future__ import annotations

import re
from pathlib import Path

import click
import pytest

from migrate.cli.main import VERBS as MIGRATE_VERBS
from runtime.cli.main import VERBS, cli
from runtime.criu.findings import REMEDY
from tests.integration.test_contents import SCENARIOS

DOCS = Path(__file__).resolve().parents[2] / "docs"
CHECKPOINT = (DOCS / "checkpoint.md").read_text()


@pytest.mark.parametrize("code", sorted(REMEDY))
def test_each_finding(code: str) -> None:
    assert f"`{code}`" in CHECKPOINT


@pytest.mark.parametrize("name", [s.name for s in SCENARIOS])
def test_each_kind_of_resource(name: str) -> None:
    assert name.lower() in CHECKPOINT.lower()


@pytest.mark.parametrize("verb", VERBS)
def test_each_option(verb: str) -> None:
    text = (DOCS / "runtime.md").read_text() + CHECKPOINT
    command = cli.get_command(click.Context(cli), verb)
    assert (command is not None and f"`{verb}`" in text) or f"`{verb} " in text
    for option in command.params:
        if isinstance(option, click.Option):
            assert any(name in text for name in option.opts if name.startswith("--")), option.opts


@pytest.mark.parametrize("verb", MIGRATE_VERBS)
def test_each_verb_of_migrate(verb: str) -> None:
    text = (DOCS / "move.md").read_text() + (DOCS.parent / "README.md").read_text()
    assert f"migrate {verb} " in text or f"migrate {verb}\n" in text


def test_each_finding_of_the_preflight() -> None:
    text = (DOCS / "move.md").read_text()
    source = (DOCS.parent / "migrate/preflight.py").read_text()
    codes = set(re.findall(r'_(?:fail|warn|ok)\(\s*"([a-z-]+)"', source))
    assert len(codes) > 30 and [c for c in sorted(codes) if c not in text] == []
