"""Help pages in plain text, options grouped by what they are about.

typer's own pages draw the groups with rich, whose import alone takes as long as the rest of the command together.
"""

from __future__ import annotations

import re
from typing import Any

from typer.core import TyperCommand

from fluxsplit.errors import UsageError

OF_THE_PICTURE = frozenset(
    ("prompt", "negative", "seed", "steps", "guidance", "cfg", "sampler", "scheduler", "shift", "noise_index")
)
"""Options of `rerender` that a picture's recipe gives where they are not given."""
_DEFAULT = re.compile(r"\s*\[[^\[\]]*\]$")


class GroupedCommand(TyperCommand):
    """A command whose help page has one section for each `rich_help_panel`, and its examples as they are written."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the sections in the order in which their first option was declared."""
        sections: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = self.record(parameter, ctx)
            if record is not None:
                title = "Arguments" if parameter.param_type_name == "argument" else "Options"
                title = getattr(parameter, "rich_help_panel", None) or title
                sections.setdefault(title, []).append(record)
        sections["Options"] = sections.pop("Options", [])
        for title, records in sections.items():
            with formatter.section(title):
                formatter.write_dl(records)

    def record(self, parameter: Any, ctx: Any) -> tuple[str, str] | None:
        """Flags and text of one option; None for one that is not shown."""
        shown: tuple[str, str] | None = parameter.get_help_record(ctx)
        return shown

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        """Write the examples, each on its own line."""
        if self.epilog:
            formatter.write_paragraph()
            formatter.write("\n".join(line.rstrip() for line in self.epilog.strip().splitlines()) + "\n")


class PromptCommand(GroupedCommand):
    """A command whose prompt is a flag, as those who come from elsewhere may not expect."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Add to what is said of a word that stands alone."""
        try:
            return list(super().parse_args(ctx, args))
        except Exception as error:  # of the library that typer brings along under its own name
            said = str(getattr(error, "message", ""))
            if "unexpected extra argument" not in said:
                raise
            raise UsageError(said, 'a prompt is given as --prompt "a red circle"') from None


class RerenderCommand(GroupedCommand):
    """A command whose `--from-picks` may stand without a folder, and whose defaults are those of the picture."""

    def record(self, parameter: Any, ctx: Any) -> tuple[str, str] | None:
        """The usual default, in brackets, gives way to the picture's own where a recipe says it."""
        shown = super().record(parameter, ctx)
        if shown is None or parameter.name not in OF_THE_PICTURE:
            return shown
        flags, text = shown
        return flags, f"{re.sub(_DEFAULT, '', text)} [the picture's]"

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Put the usual folder behind a bare `--from-picks`."""
        words: list[str] = []
        for number, word in enumerate(args):
            words.append(word)
            following = args[number + 1] if number + 1 < len(args) else "-"
            if word == "--from-picks" and following.startswith("-"):
                words.append("previews")
        return list(super().parse_args(ctx, words))
