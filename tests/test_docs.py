"""The pages say what the program does."""

from __future__ import annotations

import re
from pathlib import Path

from help_page import PAGE, page

ROOT = Path(__file__).resolve().parent.parent


def test_help_page_is_what_help_prints() -> None:
    assert PAGE.read_text() == page(), "run python scripts/help_page.py"


def test_ci_runs_the_readmes_test_command() -> None:
    readme = (ROOT / "README.md").read_text()
    section = readme.split("## Set up and test")[1]
    command = re.search(r"```\n(.+?)\n```", section)
    assert command is not None
    assert (ROOT / ".ci" / "run").read_text().rstrip().endswith(command[1])


def test_links_of_the_readme_lead_somewhere() -> None:
    readme = (ROOT / "README.md").read_text()
    for target in re.findall(r"\]\((?!http)([^)#]+)", readme):
        assert (ROOT / target).exists(), target
