"""`dsgnn`: lists the commands of this toolkit and runs them, so that `dsgnn run` is `dsgnn-run`."""

from __future__ import annotations

from importlib.metadata import entry_points

import click

from dsgnn.runtime.console import HELP, CommandGroup

PREFIX = "dsgnn-"


class InstalledCommands(CommandGroup):
    """The commands that were installed as dsgnn-…, by the rest of their names."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        scripts = entry_points(group="console_scripts").names
        return sorted(name.removeprefix(PREFIX) for name in scripts if name.startswith(PREFIX))

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        found = entry_points(group="console_scripts", name=f"{PREFIX}{cmd_name}")
        return next(iter(found)).load() if found else None


@click.command(cls=InstalledCommands, context_settings=HELP)
@click.version_option(package_name="dsgnn")
def main() -> None:
    """Rank what people look at first: the commands of this toolkit.

    \b
    dsgnn run photo.jpg --out ranked
    dsgnn run --help
    """
