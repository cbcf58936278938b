"""Help pages in plain text, options grouped by what they are about.

typer's own pages draw the groups with rich, whose import alone takes as long as the rest of the command together.
"""

from __future__ import annotations

from typing import Any

from typer.core import TyperCommand


class GroupedCommand(TyperCommand):
    """A command whose help page has one section for each `rich_help_panel`, and its examples as they are written."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the sections in the order in which their first option was declared."""
        sections: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None:
                title = "Arguments" if parameter.param_type_name == "argument" else "Options"
                title = getattr(parameter, "rich_help_panel", None) or title
                sections.setdefault(title, []).append(record)
        sections["Options"] = sections.pop("Options", [])
        for title, records in sections.items():
            with formatter.section(title):
                formatter.write_dl(records)

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        """Write the examples, each on its own line."""
        if self.epilog:
            formatter.write_paragraph()
            formatter.write("\n".join(line.rstrip() for line in self.epilog.strip().splitlines()) + "\n")


class RerenderCommand(GroupedCommand):
    """A command whose `--from-picks` may stand without a folder."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Put the usual folder behind a bare `--from-picks`."""
        words: list[str] = []
        for number, word in enumerate(args):
            words.append(word)
            following = args[number + 1] if number + 1 < len(args) else "-"
            if word == "--from-picks" and following.startswith("-"):
                words.append("previews")
        return list(super().parse_args(ctx, words))
