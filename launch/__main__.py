"""The command ``pretrain-launch``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from data_pipeline.errors import run_command

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.callback()
def launch() -> None:
    """Start runs."""


@app.command()
def local(
    config: Annotated[Path, typer.Argument(help="YAML file of the run")],
    overrides: Annotated[list[str] | None, typer.Argument(help="section.key=value, over the file")] = None,
    ranks: Annotated[int, typer.Option(help="processes on this machine; one for each GPU")] = 1,
) -> None:
    """Run on this machine under torchrun; the same command starts the run and goes on with it."""
    from .local import launch_local

    raise typer.Exit(launch_local(config, overrides or [], ranks))


def main() -> None:
    """Entry point of the console script."""
    sys.exit(run_command(app))


if __name__ == "__main__":
    main()
