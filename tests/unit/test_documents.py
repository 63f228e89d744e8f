"""The documents name what the code has."""

from __future__ import annotations

from pathlib import Path

import click
import pytest

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
