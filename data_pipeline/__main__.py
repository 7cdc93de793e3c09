"""`pretrain-data`: the commands of this package. Heavy imports wait until a command needs them."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from .errors import EXIT_STOPPED, EXIT_USER_ERROR, HeadraceError, UserError, run_command

app = typer.Typer(
    help="Text to WebDataset shards, and looking at them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _local_folder(text: str) -> Path:
    from .sources.inputs import is_remote, shown_name

    if is_remote(text):
        raise UserError(
            f"{shown_name(text)} is no folder: inspect, verify and index work on local folders only. Give the path of "
            "a data set on this machine; a remote one must be copied first."
        )
    return Path(text)


Config = Annotated[Path, typer.Argument(help="A YAML file (see configs/data).")]
Overrides = Annotated[list[str] | None, typer.Argument(help="Settings to change: section.key=value.")]
Folder = Annotated[Path, typer.Argument(parser=_local_folder, help="A data set folder.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for another program.")]
Processes = Annotated[int | None, typer.Option(min=1, help="Worker processes; as many as cores by default.")]


@app.command()
def tokenizer(config: Config, overrides: Overrides = None) -> None:
    """Train the SentencePiece tokenizer of a data set (or take it from a file)."""
    from .prepare import PrepareSettings, make_tokenizer
    from .settings import load_settings

    settings = load_settings(PrepareSettings, config, overrides or ())
    with _continues_after_interrupt():
        made = make_tokenizer(settings)
    print(f"{settings.output}/tokenizer.model: {made.vocab_size:,} pieces, SHA-256 {made.sha256}")


@app.command()
def prepare(
    config: Config,
    overrides: Overrides = None,
    task: Annotated[int | None, typer.Option(help="Do only this task's share, counted from 0.")] = None,
    tasks: Annotated[int | None, typer.Option(help="How many tasks share the work.")] = None,
    merge: Annotated[bool, typer.Option("--merge", help="Publish what the tasks have written.")] = False,
) -> None:
    """Write a data set: tokenise the sources into shuffled shards. Start again to continue a killed one.

    With --task and --tasks the work is shared: start all tasks, on any machines, once for each pass, then --merge.
    """
    from .inspect import inspect_dataset, render
    from .prepare import PrepareSettings, Share, prepare_share
    from .prepare import merge as publish
    from .prepare import prepare as write
    from .settings import load_settings

    if (task is None) != (tasks is None) or (merge and task is not None):
        raise UserError("give --task and --tasks together, and --merge without them.")
    settings = load_settings(PrepareSettings, config, overrides or ())
    with _continues_after_interrupt():
        if task is not None and tasks is not None:
            print(prepare_share(settings, Share(task, tasks)))
            return
        (publish if merge else write)(settings)
    print(render(inspect_dataset(Path(settings.output))))


@app.command()
def inspect(
    dataset: Folder,
    samples: Annotated[int, typer.Option(min=0, help="Documents to decode of every domain and split.")] = 0,
    entropy: Annotated[bool, typer.Option("--entropy", help="Measure the unigram entropy (reads all tokens).")] = False,
    as_json: AsJson = False,
) -> None:
    """Print what a data set holds."""
    from .inspect import inspect_dataset, render

    report = inspect_dataset(dataset, samples, entropy)
    print(json.dumps(report, indent=2) if as_json else render(report))


@app.command()
def verify(
    dataset: Folder,
    rebuild_sidecars: Annotated[
        bool, typer.Option("--rebuild-sidecars", help="First write missing or damaged block indexes again.")
    ] = False,
    processes: Processes = None,
    as_json: AsJson = False,
) -> None:
    """Read every byte of a data set and report all damage (exit code 2 if there is any)."""
    from .verify import rebuild_indexes, verify_dataset

    with _writable(dataset):
        rebuilt = rebuild_indexes(dataset) if rebuild_sidecars else []
    damage = verify_dataset(dataset, processes)
    if as_json:
        print(json.dumps({"rebuilt": rebuilt, "damage": [asdict(item) for item in damage]}, indent=2))
    else:
        for name in rebuilt:
            print(f"rebuilt the block index of shard {name}")
        problems = f"{len(damage)} problem{'s' if len(damage) > 1 else ''}"
        print(f"{dataset}: {problems if damage else 'every byte is as written'}")
    for item in damage:
        print(f"damaged: {item}", file=sys.stderr)
    if damage:
        raise typer.Exit(EXIT_USER_ERROR)


@app.command()
def index(
    dataset: Folder,
    form: Annotated[str, typer.Option(help="energon or wids.")],
) -> None:
    """Write the index files with which another library reads the shards; the shards stay as they are."""
    from .interop import write_index

    with _writable(dataset):
        for path in write_index(dataset, form):
            print(path)


RunFolder = Annotated[Path, typer.Argument(help="The folder of a run.")]


@app.command()
def explain(
    run: RunFolder,
    step: Annotated[int, typer.Option(min=1, help="The step, as metrics.jsonl names it.")],
    rank: Annotated[int | None, typer.Option(min=0, help="Only this rank's rows.")] = None,
    row: Annotated[int | None, typer.Option(min=0, help="Only this row, over a rank's micro-batches.")] = None,
    text: Annotated[bool, typer.Option("--text", help="Decode the tokens.")] = False,
    as_json: AsJson = False,
) -> None:
    """Name the documents that a step of a run has read, and where they lie."""
    from .explain import describe
    from .explain import explain as explain_step

    for found in explain_step(run, step, rank, row, text):
        print(json.dumps(asdict(found)) if as_json else describe(found))


@app.command(name="when-seen")
def when_seen(
    run: RunFolder,
    document: Annotated[str, typer.Argument(help="A document's id (32 hex digits) or url.")],
    as_json: AsJson = False,
) -> None:
    """Name the steps in which a run reads a document, up to the run's end."""
    from .when_seen import describe
    from .when_seen import when_seen as find

    found = find(run, document)
    if as_json:
        print(json.dumps([asdict(each) for each in found], indent=2))
    else:
        print("\n".join(describe(each) for each in found) or f"{document}: not before the end of the run")


@contextmanager
def _writable(dataset: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{dataset} can't be written: {error.strerror or error}. Free space there or mend its rights, then give "
            "the same command again."
        ) from error


class InterruptedPrepareError(HeadraceError):
    """Ctrl-C: what is published stays."""

    exit_code = EXIT_STOPPED


@contextmanager
def _continues_after_interrupt() -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt as error:
        raise InterruptedPrepareError("interrupted; start the same command again, it continues") from error


def main() -> int:
    """The console script."""
    return run_command(app)


if __name__ == "__main__":
    sys.exit(main())
