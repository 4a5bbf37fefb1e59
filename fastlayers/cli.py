"""The `fastlayers` command; each subcommand has its own file, imported when it is asked for."""

from __future__ import annotations

import pkgutil
from collections.abc import Iterator
from contextlib import contextmanager

import click

import fastlayers

# What these modules import at their top must need nothing beyond fastlayers' own dependencies.
COMMANDS = {
    "bench": "fastlayers_benchmarks.command:bench",
    "info": "fastlayers.info:info",
    "quickstart": "fastlayers.experiments.command:quickstart",
    "study": "fastlayers.studies.command:study",
}


class _LazyGroup(click.Group):
    """A group of the subcommands in COMMANDS."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = pkgutil.resolve_name(COMMANDS[cmd_name])
        return command


@click.group(cls=_LazyGroup)
@click.version_option(fastlayers.__version__, prog_name="fastlayers")
def main() -> None:
    """Fused BatchNorm, activation, dropout and residual add for PyTorch."""


@contextmanager
def needs_extra(extra: str) -> Iterator[None]:
    """Makes a failed import in its block an error that says which pip extra to install."""
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("fastlayers"):
            raise
        raise click.ClickException(
            f'{error.name} is missing. What this command needs: pip install -e ".[{extra}]"'
        ) from error
