"""The command ``pretrain``: train, evaluate, plan, report, export, verify-checkpoint."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from data_pipeline.errors import run_command

from .export.names import LayoutName

app = typer.Typer(
    help="Train language models, and look at what was trained.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

ConfigFile = Annotated[Path, typer.Argument(help="YAML file of the run")]
Overrides = Annotated[list[str] | None, typer.Argument(help="section.key=value, over the file")]
RunFolder = Annotated[Path, typer.Argument(help="folder of the run")]
AsJson = Annotated[bool, typer.Option("--json", help="print one JSON object")]


@app.command()
def train(config: ConfigFile, overrides: Overrides = None) -> None:
    """Start a run, or go on with it: the same command line does both. Under torchrun for several ranks."""
    from .run import run_training

    run_training(config, overrides or [])


@app.command()
def evaluate(
    run: RunFolder,
    checkpoint: Annotated[Path | None, typer.Option(help="a step_... folder; the run's newest if left out")] = None,
    sequences: Annotated[
        int | None, typer.Option(min=1, help="held-out sequences of each source; all if left out")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Score a checkpoint on the held-out split, in this process alone."""
    from .evaluate_run import evaluate_run
    from .monitor import evaluation_line
    from .monitor.lines import encode

    line = evaluate_run(run, checkpoint, sequences)
    print(encode(line).decode().rstrip() if as_json else evaluation_line(line))


@app.command()
def plan(
    config: ConfigFile,
    overrides: Overrides = None,
    ranks: Annotated[int, typer.Option(min=1, help="number of ranks to plan for")] = 1,
    as_json: AsJson = False,
) -> None:
    """Check a configuration and its data without starting anything, and say what the run will be."""
    from .plan import make_plan, show_plan

    planned = make_plan(config, overrides or [], ranks)
    print(json.dumps(planned) if as_json else show_plan(planned))


@app.command()
def report(run: RunFolder) -> None:
    """Write report.html into the run folder: curves, weights, throughput, attempts, configuration."""
    from .report import write_report

    print(write_report(run))


@app.command()
def export(
    source: Annotated[Path, typer.Argument(help="a step_... folder, or a run folder: its newest checkpoint")],
    output: Annotated[Path, typer.Argument(help="folder to make")],
    layout: Annotated[
        LayoutName | None, typer.Option(help="transformers' model_type; without it, the first that fits")
    ] = None,
    dtype: Annotated[Literal["fp32", "bf16"], typer.Option(help="of the weights")] = "fp32",
    unmerged: Annotated[bool, typer.Option("--unmerged", help="keep the parts of linear layers")] = False,
    tokenizer: Annotated[
        Path | None, typer.Option(help="SentencePiece model, where the run's data sets are gone")
    ] = None,
    no_tokenizer: Annotated[bool, typer.Option("--no-tokenizer", help="write no tokenizer")] = False,
    max_shard_size: Annotated[str, typer.Option(help="of a file of weights, as 500MB")] = "5GB",
    as_json: AsJson = False,
) -> None:
    """Write a checkpoint as a folder that the transformers library loads."""
    from .export.export import export_checkpoint, show_export

    written = export_checkpoint(
        source,
        output,
        layout=layout,
        dtype=dtype,
        unmerged=unmerged,
        tokenizer="none" if no_tokenizer else tokenizer or "data",
        max_shard_size=max_shard_size,
    )
    print(json.dumps(written._asdict()) if as_json else show_export(written))


@app.command("verify-checkpoint")
def verify_checkpoint(
    checkpoint: Annotated[str, typer.Argument(help="a step_... folder, or its address in an object store")],
) -> None:
    """Read every byte of a checkpoint, compare it with its manifest, and see that every parameter is there whole."""
    from .checkpoint import intact_elsewhere, intact_layout, read_state

    if "://" in checkpoint:
        files, layout, saved = intact_elsewhere(checkpoint)
    else:
        files, layout = intact_layout(Path(checkpoint))
        saved = read_state(Path(checkpoint))
    size = sum(file.bytes for file in files)
    print(
        f"{checkpoint}: step {saved['step']:,}, {len(files)} files, {size:,} bytes, all as they were saved; "
        f"{len(layout.shapes)} parameters, whole, saved by {saved['topology']['world_size']} ranks at ZeRO stage "
        f"{saved['topology']['zero_stage']}"
    )


def main() -> None:
    """Entry point of the console script."""
    sys.exit(run_command(app))


if __name__ == "__main__":
    main()
