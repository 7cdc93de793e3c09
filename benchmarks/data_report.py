"""What `benchmarks/data.py` measured, as targets met or missed and as Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

Result = dict[str, Any]


def targets(result: Result) -> list[dict[str, Any]]:
    """Each target with what was measured for it, and by how much it is missed."""
    return [
        {
            "what": what,
            "target": f"{sign} {bound:g}",
            "measured": value,
            "met": value >= bound if sign == ">=" else value < bound,
        }
        for what, sign, bound, value in _targets(result)
    ]


def _targets(result: Result) -> Iterator[tuple[str, str, float, float]]:
    if "throughput" in result:
        for mode, ratios in result["throughput"]["ratios"].items():
            yield f"throughput, {mode}, over plain webdataset", ">=", 5, ratios["webdataset"]
            yield f"throughput, {mode}, over the best peer", ">=", 3, ratios["best peer"]
    if "scale" in result:
        scale = result["scale"]
        for start in scale["first_batch"]:
            where = f"{start['mode']}, files checked by {start['ranks_that_share_the_check_of_files']} rank(s)"
            yield f"first batch, {where}: seconds", "<", 1, start["seconds"]
            yield f"first batch, {where}: MB of memory", "<", 200, start["peak_rss_growth_mb"]
        for order in scale["order"]:
            worst = max(order["microseconds_per_sequence_by_call"].values())
            yield f"order, {order['mode']}: us per sequence", "<", 5, worst
        for resume in scale["resume"]:
            yield f"resume far in over resume at 0, {resume['mode']}", "<", 1.25, resume["ratio"]
        yield "memory growth over the batches: MB", "<", 5, scale["memory"]["growth_mb_after_the_first_twentieth"]
    if "prepare" in result:
        yield (
            "prepare: share of CPU time inside SentencePiece",
            ">=",
            0.9,
            result["prepare"]["share_inside_sentencepiece"],
        )
    if "remote" in result:
        yield from ((*row,) for row in result["remote"]["targets"])


def render(result: Result) -> str:
    """All of it, one table a section."""
    machine = result["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    lines = [
        "# The data pipeline, measured",
        "",
        f"`{result['command']}`, {result['seconds']:.0f} s on {machine['cores']} cores ({machine['cpu']}), Python "
        f"{machine['python']}, {versions}, commit {machine['commit'][:12]}; load average {machine['load_at_start']} at "
        f"the start and {machine['load_at_end']} at the end. How each figure is taken: `benchmarks/data.py`.",
        "",
    ]
    sections = {
        "throughput": _throughput,
        "scale": _scale,
        "prepare": _prepare,
        "shuffle": _shuffle,
        "interop": _interop,
    }
    lines += _table(
        ["target", "asked", "measured", ""],
        [
            [t["what"], t["target"], f"{t['measured']:.3g}", "met" if t["met"] else "**missed**"]
            for t in result["targets"]
        ],
    )
    for name, section in sections.items():
        if name in result:
            lines += section(result[name])
    return "\n".join(lines) + "\n"


def _throughput(section: Result) -> list[str]:
    text = section["text"]
    rows = [
        [
            f"{row['system']} {row['version']}" if row["system"] not in ("headrace", "no library") else row["system"],
            row["reads"],
            row["variant"],
            "yes" if row["boundaries"] else "no",
            _millions(row["tokens_per_cpu_second"]),
            " to ".join(map(_millions, row["tokens_per_cpu_second_range"])),
            _millions(row["tokens_per_wall_second"]),
            f"{row['disk_bytes'] / 1e6:.0f}",
        ]
        for row in section["rows"]
    ]
    modes = list(section["ratios"])
    systems = list(section["ratios"][modes[0]])
    ratios = [[system, *(f"{section['ratios'][mode][system]:.2f}" for mode in modes)] for system in systems]
    return [
        "## Tokens per second and core into ready batches",
        "",
        f"Batches of [{section['batch']}, {section['seq_len']}]; {text['tokens'] / 1e6:.1f} M tokens of "
        f"{text['documents']} documents, {text['bytes'] / 1e6:.0f} MB of Python source code; medians of "
        f"{section['rounds']} rounds. M tokens per second.",
        "",
        *_table(["system", "reads", "variant", "boundaries", "of CPU", "range", "of wall", "MB on disk"], rows),
        f"Ours over each system's fastest variant (the best peer is {section['best_peer']}):",
        "",
        *_table(["over", *modes], ratios),
    ]


def _scale(section: Result) -> list[str]:
    starts = [
        [
            start["mode"],
            str(start["ranks_that_share_the_check_of_files"]),
            f"{start['seconds']:.3f}",
            f"{start['of_them_manifest']:.3f}",
            f"{start['of_them_sources']:.3f}",
            f"{start['peak_rss_growth_mb']:.0f}",
        ]
        for start in section["first_batch"]
    ]
    chunks = list(section["order"][0]["microseconds_per_sequence_by_call"])
    orders = [
        [one["mode"], *(f"{one['microseconds_per_sequence_by_call'][chunk]:.3f}" for chunk in chunks)]
        for one in section["order"]
    ]
    resumes = [
        [
            one["mode"],
            *(f"{one['milliseconds_to_first_batch'][key]:.2f}" for key in ("at_zero", "far")),
            f"{one['ratio']:.2f}",
        ]
        for one in section["resume"]
    ]
    first, memory = section["first_batch"][0], section["memory"]
    return [
        f"## {first['shards']:,} shards, {first['tokens']:.0e} tokens",
        "",
        "From nothing to the first batch: manifest read and checked, sources opened, shard files looked at (each rank "
        "looks at its share of them), order, loader, batch with its CRC32C. Imports are not counted. Shards are links "
        "to one sparse file.",
        "",
        *_table(["order", "ranks", "seconds", "manifest", "sources", "MB more memory"], starts),
        "Cost of the order, us per sequence, by sequences per call (3 sources, "
        f"{section['order'][0]['sequences'] / 1e9:.2f}e9 sequences):",
        "",
        *_table(["order", *chunks], orders),
        f"Milliseconds from a loader's making to its first batch, at position {section['resume'][0]['far_position']:,}:",
        "",
        *_table(["order", "at 0", "far in", "ratio"], resumes),
        f"Memory over {memory['batches']:,} batches ({memory['epochs']:.0f} epochs of a small data set): "
        f"{memory['growth_mb_after_the_first_twentieth']:+.2f} MB after the first twentieth.",
        "",
    ]


def _prepare(section: Result) -> list[str]:
    rows = [
        [
            way,
            _millions(row["tokens_per_cpu_second"]),
            _millions(row["tokens_per_wall_second"]),
            f"{section['ratios'][way]:.2f}" if way in section["ratios"] else "",
            f"{row['tokens']:,}",
        ]
        for way, row in section["rows"].items()
    ]
    return [
        "## Text to tokens on the disk",
        "",
        f"{section['text_bytes'] / 1e6:.0f} MB of JSON lines, one process on one core, the same vocabulary; M tokens per "
        f"second, medians of {section['rounds']} rounds. Only ours and datatrove shuffle. Inside SentencePiece: "
        f"{section['share_inside_sentencepiece']:.1%} of our CPU time.",
        "",
        *_table(["way", "of CPU", "of wall", "ours over it", "tokens"], rows),
    ]


def _shuffle(section: Result) -> list[str]:
    rows = [
        [
            row["scheme"],
            f"{row['batch']:.2f}",
            f"{row['batches_32']:.2f}",
            f"{row['shards_per_batch']:.0f}",
            row["code"],
        ]
        for row in section["rows"]
    ]
    return [
        "## Shuffle quality on a sorted corpus",
        "",
        f"{section['sequences']:,} sequences in {section['shards']:,} shards, batches of {section['batch']}; spread of "
        "the mean of a batch, and of 32 in a row, over that of independent draws (1 = as good; less = more even).",
        "",
        *_table(["scheme", "batch", "32 batches", "shards a batch", "code"], rows),
    ]


def _interop(section: Result) -> list[str]:
    return ["## Interop", "", f"webdataset, GNU tar, wids and megatron-energon on our shards: {section['tests']}.", ""]


def _millions(value: float) -> str:
    return f"{value / 1e6:.{1 if value < 1e8 else 0}f}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [
        f"| {' | '.join(head)} |",
        f"|{' --- |' * len(head)}",
        *(f"| {' | '.join(row)} |" for row in rows),
        "",
    ]
