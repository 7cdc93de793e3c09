"""The driver's end of a worker process."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

from .environments import BENCHMARKS


class WorkerProcess:
    """A running `contest.worker`; its talk goes to the file ``log``."""

    def __init__(self, interpreter: Path, contender: str, folder: Path, seq_len: int, eos_id: int, log: Path) -> None:
        self.contender = contender
        self._log = log
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "HF_DATASETS_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
        with open(log, "ab") as talk:
            self._process = subprocess.Popen(
                [interpreter, "-m", "contest.worker", contender, folder, str(seq_len), str(eos_id)],
                cwd=BENCHMARKS,
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=talk,
                text=True,
            )

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        """The worker's answer.

        Raises:
            RuntimeError: it ended; with the last lines that it wrote.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            tail = "\n".join(self._log.read_text(errors="replace").splitlines()[-15:])
            raise RuntimeError(f"the worker of {self.contender} ended at {do!r} {arguments}:\n{tail}")
        decoded: dict[str, Any] = json.loads(answer)
        return decoded

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
