"""metrics.jsonl, TensorBoard, the progress line and the table of peaks."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from data_pipeline.errors import UserError
from pretrain.monitor import (
    WALL_CLOCK_FIELDS,
    WEIGHT_BINS,
    MetricsLog,
    Monitor,
    evaluation_line,
    peak_flops,
    progress_line,
    read_metrics,
    weight_histogram,
)
from pretrain.monitor.progress import duration

STEP = {
    "step": 1250,
    "position": 80_000,
    "tokens": 41_000_000,
    "loss": 3.45121,
    "learning_rate": 4.9e-4,
    "grad_norm": 0.8312,
    "step_seconds": 0.5,
    "tokens_per_second": 182_400.0,
    "data_wait_seconds": 0.0015,
    "mfu": 0.4123,
    "skipped": 0,
    "holes": 0,
}


def write_steps(folder: Path, steps: range, resume_step: int = 0) -> MetricsLog:
    log = MetricsLog(folder, resume_step)
    for step in steps:
        log.write({"step": step, "loss": 1 / step})
    return log


def test_a_written_line_is_read_back_to_the_bit_and_equal_lines_are_equal_bytes(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    line = {"step": 3, "loss": 0.1 + 0.2, "z": None, "name": "é <b>", "weights/histogram": [0, 2, 1], "a": 1e-300}
    MetricsLog(tmp_path / "a", 0).write(line)
    MetricsLog(tmp_path / "b", 0).write(dict(reversed(line.items())))
    assert read_metrics(tmp_path / "a") == [line]
    assert (tmp_path / "a/metrics.jsonl").read_bytes() == (tmp_path / "b/metrics.jsonl").read_bytes()
    assert (tmp_path / "a/metrics.jsonl").read_text().startswith('{"step": 3, "loss": 0.30000000000000004, "a": 1e-300')


def test_non_finite_numbers_are_strings_in_the_file_and_numbers_again_for_the_reader(tmp_path: Path) -> None:
    line = {"step": 1, "loss": math.nan, "up": math.inf, "down": -math.inf, "list": [1.0, math.inf], "event": "inf"}
    MetricsLog(tmp_path, 0).write(line)
    text = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))["up"] == "inf"
    (read,) = read_metrics(tmp_path)
    assert math.isnan(read["loss"])
    assert (read["up"], read["down"], read["list"], read["event"]) == (math.inf, -math.inf, [1.0, math.inf], "inf")


def test_opening_keeps_exactly_the_lines_of_the_checkpoint(tmp_path: Path) -> None:
    log = write_steps(tmp_path, range(1, 9))
    log.write({"evaluation": "heldout", "step": 8, "loss": 2.0})
    expected = (tmp_path / "metrics.jsonl").read_bytes()
    write_again = write_steps(tmp_path, range(9, 13), resume_step=8)
    assert (write_again.superseded, write_again.lost_steps) == (0, 0)
    with open(tmp_path / "metrics.jsonl", "ab") as handle:
        handle.write(b'{"step": 13, "lo')
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 3, 4, 5, 6, 7, 8, 8, 9, 10, 11, 12]
    resumed = MetricsLog(tmp_path, 8)
    assert (resumed.superseded, resumed.lost_steps) == (5, 4)
    assert (tmp_path / "metrics.jsonl").read_bytes() == expected
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_what_a_start_accepts_is_told_once(tmp_path: Path) -> None:
    """Killed before its first save, a start comes again: it accepts the same anew, or something else."""
    log = write_steps(tmp_path, range(1, 5))
    log.write({"event": "damage", "step": 4, "message": "of step 4"})
    log.write({"event": "data_change", "step": 4, "message": "accepted"})
    log.write({"step": 5, "loss": 1.0})
    MetricsLog(tmp_path, 4)
    assert [line.get("event") for line in read_metrics(tmp_path)][-2:] == [None, "damage"]
    MetricsLog(tmp_path, 4).write({"event": "data_change", "step": 4, "message": "accepted"})
    write_steps(tmp_path, range(5, 9), resume_step=5)
    assert [line.get("event") for line in read_metrics(tmp_path)].count("data_change") == 1


def test_a_fresh_start_keeps_nothing_of_a_start_that_left_no_checkpoint(tmp_path: Path) -> None:
    MetricsLog(tmp_path, 0).write({"evaluation": "heldout", "step": 0, "loss": 9.0})
    assert MetricsLog(tmp_path, 0).superseded == 1
    assert read_metrics(tmp_path) == []


def test_killed_and_resumed_leaves_the_bytes_of_the_uninterrupted_run(tmp_path: Path) -> None:
    (tmp_path / "straight").mkdir()
    (tmp_path / "killed").mkdir()
    write_steps(tmp_path / "straight", range(1, 21))
    program = (
        "import os, signal, sys; from pathlib import Path; from pretrain.monitor import MetricsLog\n"
        "log = MetricsLog(Path(sys.argv[1]), 0)\n"
        "for step in range(1, 14): log.write({'step': step, 'loss': 1 / step})\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    ended = subprocess.run([sys.executable, "-c", program, str(tmp_path / "killed")], check=False)
    assert ended.returncode == -signal.SIGKILL
    assert len(read_metrics(tmp_path / "killed")) == 13
    write_steps(tmp_path / "killed", range(9, 21), resume_step=8)
    assert (tmp_path / "killed/metrics.jsonl").read_bytes() == (tmp_path / "straight/metrics.jsonl").read_bytes()


@pytest.mark.parametrize("damage", [b"{not json}", b"[1, 2]", b"", b"\xff\xfe"])
def test_a_damaged_line_in_the_middle_is_refused_with_its_number(tmp_path: Path, damage: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n' + damage + b'\n{"step": 2}\n')
    before = path.read_bytes()
    with pytest.raises(UserError, match=r"metrics\.jsonl, line 2: not a JSON object: .*mend or delete that line"):
        read_metrics(tmp_path)
    with pytest.raises(UserError, match="line 2"):
        MetricsLog(tmp_path, 1)
    assert path.read_bytes() == before


def test_counts_of_holes_have_a_name_each_also_in_what_older_versions_wrote(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, 0)
    for line in ({"loss": 1.0}, {"event": "damage"}, {"evaluation": "heldout"}):
        log.write({"step": 1, "holes": 3, **line})
    step, event, evaluation = read_metrics(tmp_path)
    assert (step["holes"], event["new_holes"], evaluation["heldout_holes"]) == (3, 3, 3)
    assert "holes" not in {*event, *evaluation}
    assert evaluation_line({**evaluation, "loss": 3.2}).endswith("heldout_holes 3")
    told = evaluation_line({**evaluation, "loss": 3.2, "heldout_damage": "block 1 (3 sequences)", "domain_loss/a": 1.0})
    assert told.endswith("heldout_holes 3 (block 1 (3 sequences))  (a 1.0000)")


def test_lines_without_a_step_are_refused(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, 0)
    with pytest.raises(ValueError, match="whole-numbered 'step', got None"):
        log.write({"event": "skip"})
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"loss": 1.0}\n')
    with pytest.raises(UserError, match=r"line 2: has no whole-numbered 'step' \(found None\)"):
        MetricsLog(tmp_path, 1)


def test_an_unwritable_folder_is_a_user_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"can't be written: Not a directory.*run\.folder"):
        MetricsLog(tmp_path / "file", 0)


def test_a_full_disk_leaves_whole_lines_only(tmp_path: Path) -> None:
    """RLIMIT_FSIZE cuts a write short as a full disk does: part of the line is written, then an error."""
    program = (
        "import resource, signal, sys; from pathlib import Path; from pretrain.monitor import MetricsLog\n"
        "log = MetricsLog(Path(sys.argv[1]), 0); log.write({'step': 1})\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (20, 20))\n"
        "try: log.write({'step': 2, 'loss': 1.5})\n"
        "except OSError: sys.exit(7)"
    )
    ended = subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=False)
    assert ended.returncode == 7
    assert (tmp_path / "metrics.jsonl").read_bytes() == b'{"step": 1}\n'


def test_the_weight_histogram_counts_every_weight_once() -> None:
    assert WEIGHT_BINS[0] == 2**-6.125
    assert WEIGHT_BINS[-1] == 2**6.125
    counts = weight_histogram([1.0] * 5 + [1 - 1e-6, 1 + 1e-6, 0.0, 1e9, WEIGHT_BINS[3]])
    uniform = WEIGHT_BINS.index(2.0**0.125)
    assert len(counts) == len(WEIGHT_BINS) + 1
    assert {place: count for place, count in enumerate(counts) if count} == {0: 1, 4: 1, uniform: 7, len(counts) - 1: 1}


def test_the_progress_line_says_all_in_one_line() -> None:
    assert progress_line(STEP, 20_000) == (
        "step  1,250/20,000  loss 3.4512  lr 4.90e-04  grad norm 0.831  182.4k tokens/s  MFU 41.2%  data wait 0.3%  "
        "ETA 2 h 36 min"
    )
    assert progress_line(STEP, 20_000, seconds_per_step=1.0).endswith("ETA 5 h 12 min")
    sparse = {"step": 7, "loss": math.nan, "skipped": 2, "holes": 3}
    assert progress_line(sparse, 7) == "step 7/7  loss nan  skipped 2  holes 3"


def test_the_evaluation_line_names_the_domains() -> None:
    line = {"evaluation": "heldout", "step": 500, "loss": 3.2, "perplexity": 24.53, "bits_per_byte": 1.1234}
    assert evaluation_line({**line, "domain_bits_per_byte/docs": 1.2, "domain_bits_per_byte/code": 1.0}) == (
        "evaluation heldout at step 500  loss 3.2000  perplexity 24.53  1.1234 bits/byte  (code 1.0000, docs 1.2000)"
    )
    assert evaluation_line({**line, "domain_loss/docs": 3.5}).endswith("(docs 3.5000)")


def test_durations_read_well() -> None:
    texts = [duration(seconds) for seconds in (0, 45.4, 723, 3600, 18_120, 273_600)]
    assert texts == ["0 s", "45 s", "12 min 3 s", "1 h 0 min", "5 h 2 min", "3 d 4 h"]


@pytest.mark.parametrize(
    ("device", "dtype", "teraflops"),
    [
        ("NVIDIA A100-SXM4-80GB", "bf16", 312),
        ("NVIDIA A100 80GB PCIe", "tf32", 156),
        ("NVIDIA H100 80GB HBM3", "bf16", 989.5),
        ("NVIDIA H100 PCIe", "bf16", 756.5),
        ("NVIDIA H100 NVL", "bf16", 835.5),
        ("NVIDIA H200", "fp32", 67),
        ("NVIDIA B200", "bf16", 2250),
        ("NVIDIA L40S", "bf16", 362.05),
        ("NVIDIA A10", "bf16", 125),
        ("NVIDIA GeForce RTX 4090", "bf16", 165.2),
        ("Tesla V100-SXM2-32GB", "fp32", 15.7),
        ("Tesla V100-PCIE-16GB", "fp16", 112),
        ("AMD Instinct MI300X", "bf16", 1307.4),
        ("AMD Instinct MI250X / MI250", "bf16", 191.5),
    ],
)
def test_known_peaks(device: str, dtype: str, teraflops: float) -> None:
    assert peak_flops(device, dtype) == pytest.approx(teraflops * 1e12, rel=1e-12)


@pytest.mark.parametrize(
    "device",
    [
        "cpu",
        "NVIDIA A10G",
        "NVIDIA L40",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce RTX 4090 D",
        "NVIDIA A100-SXM4-40GB MIG 3g.20gb",
        "NVIDIA GB200",
    ],
)
def test_a_similar_name_is_not_guessed(device: str) -> None:
    assert peak_flops(device, "bf16") is None


def test_a_format_without_units_has_no_peak() -> None:
    assert peak_flops("Tesla V100-SXM2-32GB", "bf16") is None


def test_the_monitor_tells_file_terminal_and_tensorboard_the_same(tmp_path: Path) -> None:
    printed: list[str] = []
    monitor = Monitor(tmp_path, 0, 3, tensorboard=True, print=printed.append)
    histogram = weight_histogram([1.0, 1.0, 2.0])
    for step, loss in ((1, 4.0), (2, math.nan), (3, 3.0)):
        domains = {"experts/specialization/1": 0.5, "experts/domain_load/1/code": [0.5, 0.25, 0.25, 0.0]}
        monitor.log({"step": step, "loss": loss, "step_seconds": 2.0, "weights/histogram": histogram, **domains})
    monitor.evaluation({"evaluation": "heldout", "step": 2, "loss": 3.5})
    monitor.event({"event": "skipped_step", "step": 2, "message": "the loss is not finite", "rank": 1})
    monitor.close()

    lines = read_metrics(tmp_path)
    assert [line["step"] for line in lines] == [1, 2, 3, 2, 2]
    assert all(line["time"] > 1.7e9 for line in lines)
    assert printed == [
        "step 1/3  loss 4.0000  ETA 4 s",
        "step 2/3  loss nan  ETA 2 s",
        "step 3/3  loss 3.0000",
        "evaluation heldout at step 2  loss 3.5000",
        "step 2: skipped_step: the loss is not finite rank=1",
    ]
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")][::2] == [(1, 4.0), (3, 3.0)]
    assert [(event.step, event.value) for event in events.Scalars("heldout/loss")] == [(2, 3.5)]
    (text,) = events.Tensors("events/skipped_step/text_summary")
    assert (text.step, text.tensor_proto.string_val) == (2, [b"the loss is not finite rank=1"])
    drawn = events.Histograms("weights/histogram")[0].histogram_value
    assert (drawn.num, sum(drawn.bucket)) == (3, 3)
    assert [event.value for event in events.Scalars("experts/specialization/1")] == [0.5] * 3
    (row,) = events.Histograms("experts/domain_load/1/code")  # the reader keeps the last one alone
    shares = row.histogram_value
    assert (row.step, shares.min, shares.bucket_limit, shares.bucket) == (
        3,
        -0.5,
        [0.5, 1.5, 2.5, 3.5],
        [0.5, 0.25, 0.25, 0.0],
    )


def test_tensorboard_hides_what_a_resume_repeats(tmp_path: Path) -> None:
    for resume_step, value, last in ((0, 1.0, 6), (4, 2.0, 7)):
        monitor = Monitor(tmp_path, resume_step, 7, tensorboard=True, print=lambda text: None)
        for step in range(resume_step + 1, last + 1):
            monitor.log({"step": step, "loss": value})
        monitor.close()
    assert monitor.superseded == 2
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    scalars = [(event.step, event.value) for event in events.Scalars("loss")]
    assert scalars == [(1, 1.0), (2, 1.0), (3, 1.0), (4, 1.0), (5, 2.0), (6, 2.0), (7, 2.0)]


def test_wall_clock_fields_are_the_ones_that_differ_between_equal_runs(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        monitor = Monitor(tmp_path / name, 0, 9, tensorboard=False, print=lambda text: None)
        monitor.log({"step": 1, "loss": 1.5, "step_seconds": float(os.times().elapsed)})
    a, b = (read_metrics(tmp_path / name)[0] for name in ("a", "b"))
    assert a["time"] != b["time"]
    kept = [{key: value for key, value in line.items() if key not in WALL_CLOCK_FIELDS} for line in (a, b)]
    assert kept[0] == kept[1] == {"step": 1, "loss": 1.5}
