"""What `benchmarks/data.py` measured, as targets met or missed and as Markdown."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterator, Sequence
from typing import Any

Result = dict[str, Any]

_COMPARE = {">=": operator.ge, "<": operator.lt, "<=": operator.le}


def targets(result: Result) -> list[dict[str, Any]]:
    """Each target with what was measured for it, and by how much it is missed."""
    return [
        {
            "what": what,
            "target": f"{sign} {bound:g}",
            "measured": value,
            "met": _COMPARE[sign](value, bound),
        }
        for what, sign, bound, value in _targets(result)
    ]


def _targets(result: Result) -> Iterator[tuple[str, str, float, float]]:
    if "throughput" in result:
        for work, against in result["throughput"]["against"].items():
            for mode, ratios in against["ratios"].items():
                where = f"throughput, {mode}, {work}, over"
                yield f"{where} webdataset with its own decoder", ">=", 5, ratios["webdataset, its own decoder"]
                yield f"{where} webdataset with one made by hand", ">=", 5, ratios["webdataset"]
                yield f"{where} the best peer", ">=", 3, ratios["best peer"]
    if "scale" in result:
        scale = result["scale"]
        for start in scale["first_batch"]:
            where = f"{start['mode']}, files checked by {start['ranks_that_share_the_check_of_files']} rank(s)"
            yield f"first batch, {where}: seconds", "<", 1, start["seconds"]
            yield f"first batch, {where}: MB of memory", "<", 200, start["memory_growth_mb"]
        for order in scale["order"]:
            worst = max(order["microseconds_per_sequence_by_call"].values())
            yield f"order, {order['mode']}: us per sequence", "<", 5, worst
        for resume in scale["resume"]:
            yield f"resume far in over resume at 0, {resume['mode']}", "<", 1.25, resume["ratio"]
        growth = scale["memory"]["growth_mb_in_the_second_half"]
        yield "memory growth in the second half of the batches: MB", "<", 2, growth
    if "prepare" in result:
        share = result["prepare"]["share_inside_sentencepiece"]
        yield "prepare: share of CPU time inside SentencePiece", ">=", 0.9, share
    if "remote" in result:
        remote = result["remote"]
        for way, ratio in remote["store"]["ratio"].items():
            yield f"remote, store, {way}: over the plain transfer", "<=", remote["store"]["limit"], ratio
        for order, read in remote["reader"]["orders"].items():
            yield f"remote, an epoch of the loader, {order}: over the plain transfer", "<=", 1.2, read["ratio"]


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
    reached = [
        [target["what"], target["target"], f"{target['measured']:.3g}", "met" if target["met"] else "**missed**"]
        for target in result["targets"]
    ]
    lines += _table(["target", "asked", "measured", ""], reached)
    for name, section in _SECTIONS.items():
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
    return [
        "## Tokens per second and core into ready batches",
        "",
        f"Batches of [{section['batch']}, {section['seq_len']}]; {text['tokens'] / 1e6:.1f} M tokens of "
        f"{text['documents']} documents, {text['bytes'] / 1e6:.0f} MB of Python source code; medians of "
        f"{section['rounds']} rounds. M tokens per second.",
        "",
        *_table(["system", "reads", "variant", "boundaries", "of CPU", "range", "of wall", "MB on disk"], rows),
        *itertools.chain.from_iterable(_against(work, found) for work, found in section["against"].items()),
    ]


def _against(work: str, found: Result) -> list[str]:
    modes = list(found["ratios"])
    ratios = [[over, *(f"{found['ratios'][mode][over]:.2f}" for mode in modes)] for over in found["ratios"][modes[0]]]
    return [
        f"Ours over each system's fastest variant, {work} (the best peer is {found['best_peer']}):",
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
            f"{start['memory_growth_mb']:.0f}",
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
    far = section["resume"][0]["far_position"]
    first, memory = section["first_batch"][0], section["memory"]
    return [
        f"## {first['shards']:,} shards, {first['tokens']:.0e} tokens",
        "",
        "From nothing to the first batch: manifest read and checked, sources opened, shard files looked at (each rank "
        "looks at its share of them), order, loader, batch with its CRC32C. Imports are not counted. Shards are links "
        "to one sparse file.",
        "",
        *_table(["order", "ranks", "seconds", "manifest", "sources", "MB more memory"], starts),
        "Cost of the order, us of CPU time per sequence, by sequences per call (3 sources, "
        f"{section['order'][0]['sequences'] / 1e9:.2f}e9 sequences):",
        "",
        *_table(["order", *chunks], orders),
        f"CPU milliseconds from a loader's making to its first batch; far in: position {far:,}.",
        "",
        *_table(["order", "at 0", "far in", "ratio"], resumes),
        f"Memory over {memory['batches']:,} batches ({memory['epochs']:.0f} epochs of a small data set): "
        f"{memory['growth_mb_after_the_first_twentieth']:+.2f} MB after the first twentieth (the mixture keeps 4 of "
        f"its blocks), {memory['growth_mb_in_the_second_half']:+.2f} MB in the second half.",
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
        f"{section['text_bytes'] / 1e6:.0f} MB of JSON lines, one process on one core, the same vocabulary; M tokens "
        f"per second, medians of {section['rounds']} rounds. Only ours and datatrove shuffle. Inside SentencePiece: "
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


def _remote(section: Result) -> list[str]:
    store, reader = section["store"], section["reader"]
    rows = [[f"store, {way}", f"{store['ratio'][way]:.2f}", "no" if store["lost"] else "yes"] for way in store["ratio"]]
    rows += [
        [f"an epoch of the loader, {order}", f"{read['ratio']:.2f}", "yes" if read["equal"] else "no"]
        for order, read in reader["orders"].items()
    ]
    faulty = store["faulty_answers"] + sum(read["faulty_answers"] for read in reader["orders"].values())
    return [
        "## A slow, failing http server",
        "",
        f"50 ms before every answer, 1 % errors, 1 % of the answers broken off ({faulty} faulty answers in all), over "
        f"a link of {store['bandwidth'] / 1e6:.0f} MB/s (store) and {reader['bandwidth'] / 1e6:.0f} MB/s (loader); "
        "time over that of one plain transfer of the same bytes from a server without latency or faults.",
        "",
        *_table(["read", "over the transfer", "equal bytes"], rows),
    ]


def _interop(section: Result) -> list[str]:
    return ["## Interop", "", f"webdataset, GNU tar, wids and megatron-energon on our shards: {section['tests']}.", ""]


_SECTIONS = {
    "throughput": _throughput,
    "scale": _scale,
    "prepare": _prepare,
    "shuffle": _shuffle,
    "remote": _remote,
    "interop": _interop,
}


def _millions(value: float) -> str:
    return f"{value / 1e6:.{1 if value < 1e8 else 0}f}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [
        f"| {' | '.join(head)} |",
        f"|{' --- |' * len(head)}",
        *(f"| {' | '.join(row)} |" for row in rows),
        "",
    ]
