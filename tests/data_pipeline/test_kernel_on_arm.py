"""The native kernel on another kind of CPU: compiled for 64-bit ARM and emulated, where both can be had."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from data_pipeline import kernel

COMPILER, EMULATOR = "aarch64-linux-gnu-gcc", "qemu-aarch64"
DRIVER = Path(__file__).with_name("kernel_driver.c")


def outcome(folder: Path, compiler: str, emulator: list[str], level: int) -> tuple[str, int]:
    """What the driver prints, and which features it says are used."""
    program = folder / f"{compiler}-driver"
    if not program.exists():
        flags = [flag for flag in kernel._FLAGS if flag != "-shared"]
        source = ["-static", f"-I{kernel._SOURCE.parent}", str(DRIVER), *kernel._LIBRARIES]
        subprocess.run([compiler, *flags, "-o", str(program), *source], check=True)
    done = subprocess.run([*emulator, str(program), str(level)], check=True, capture_output=True, text=True)
    return done.stdout, int(done.stderr)


@pytest.mark.skipif(
    not (shutil.which(COMPILER) and shutil.which(EMULATOR) and shutil.which("gcc")),
    reason=f"needs gcc, {COMPILER} (gcc-aarch64-linux-gnu) and {EMULATOR} (qemu-user)",
)
def test_arm_computes_the_same(tmp_path: Path) -> None:
    """CRC32C, batches and the order, with the CPU's CRC32C instruction and without."""
    expected, _ = outcome(tmp_path, "gcc", [], 0)
    assert expected.count("\n") > 1100
    for level, crc in ((0, "tables"), (1, "the CPU")):
        found, features = outcome(tmp_path, COMPILER, [EMULATOR], level)
        assert kernel._CRCS[features & 3] == crc
        assert found == expected
