"""One readable line a logged step."""

from __future__ import annotations

from .metrics import MetricLine, MetricValue


def progress_line(line: MetricLine, total_steps: int, seconds_per_step: float | None = None) -> str:
    """A metric line for people; what it lacks is left out.

    ``seconds_per_step`` (smoothed, if given) replaces the line's own ``step_seconds`` in the remaining time.
    """
    step = line["step"]
    assert isinstance(step, int)
    width = len(f"{total_steps:,}")
    parts = [f"step {step:>{width},}/{total_steps:,}"]
    parts += [text for text in (_show(line, key, style) for key, style in _SHOWN.items()) if text]
    step_seconds, wait = _number(line.get("step_seconds")), _number(line.get("data_wait_seconds"))
    if step_seconds and wait is not None:
        parts.append(f"data wait {wait / step_seconds:.1%}")
    parts += [f"{key} {line[key]}" for key in ("skipped", "holes") if line.get(key)]
    pace = seconds_per_step or step_seconds
    if pace is not None and step < total_steps:
        parts.append(f"ETA {duration((total_steps - step) * pace)}")
    return "  ".join(parts)


def evaluation_line(line: MetricLine) -> str:
    """An evaluation for people: the whole set, then bits per byte (or, without it, the loss) of each domain."""
    figures = [f"evaluation {line['evaluation']} at step {line['step']:,}"]
    styles = {"loss": "loss {:.4f}", "perplexity": "perplexity {:.2f}", "bits_per_byte": "{:.4f} bits/byte"}
    styles |= {"accuracy": "accuracy {:.2%}", "reciprocal_rank": "reciprocal rank {:.4f}"}
    figures += [text for text in (_show(line, key, style) for key, style in styles.items()) if text]
    if line.get("heldout_holes"):
        which = f" ({line['heldout_damage']})" if line.get("heldout_damage") else ""
        figures.append(f"heldout_holes {line['heldout_holes']}{which}")
    prefix = "domain_bits_per_byte/" if any(key.startswith("domain_bits_per_byte/") for key in line) else "domain_loss/"
    domains = [f"{key.removeprefix(prefix)} {line[key]:.4f}" for key in sorted(line) if key.startswith(prefix)]
    return "  ".join(figures) + (f"  ({', '.join(domains)})" if domains else "")


def duration(seconds: float) -> str:
    """``"45 s"``, ``"12 min 3 s"``, ``"5 h 2 min"``, ``"3 d 4 h"``: the two largest units."""
    whole = max(0, round(seconds))
    days, hours, minutes = whole // 86400, whole // 3600 % 24, whole // 60 % 60
    units = [(days, "d"), (hours, "h"), (minutes, "min"), (whole % 60, "s")]
    first = next((place for place, (count, _) in enumerate(units) if count), len(units) - 1)
    return " ".join(f"{count} {unit}" for count, unit in units[first : first + 2])


def _tokens(value: float) -> str:
    for size, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.4g}{suffix} tokens/s"
    return f"{value:.4g} tokens/s"


_SHOWN = {
    "loss": "loss {:.4f}",
    "learning_rate": "lr {:.2e}",
    "grad_norm": "grad norm {:.3g}",
    "tokens_per_second": _tokens,
    "mfu": "MFU {:.1%}",
}


def _show(line: MetricLine, key: str, style: object) -> str:
    value = _number(line.get(key))
    if value is None:
        return ""
    return style.format(value) if isinstance(style, str) else _tokens(value)


def _number(value: MetricValue | None) -> float | None:
    return float(value) if isinstance(value, int | float) else None
