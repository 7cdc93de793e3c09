"""The code and the configuration that a submitted run will use, frozen: editing goes on while it waits in the queue.

``RUN/code/DIGEST/`` holds the three packages, the batch scripts and ``run.yaml``, the resolved configuration; the
digest is of their content, so that submitting the same again makes no second copy.
"""

from __future__ import annotations

import hashlib
import shutil
import uuid
from pathlib import Path

import yaml

from data_pipeline.errors import UserError
from pretrain.config import Config
from pretrain.run_folder import COMMIT_FILE, plain, versions

ROOT = Path(__file__).parents[1]
PACKAGES = ("pretrain", "data_pipeline", "launch")
CONFIG = "run.yaml"


def batch_script(name: str) -> Path:
    """One of slurm/'s scripts.

    Raises:
        UserError: Headrace was installed without them.
    """
    path = ROOT / "slurm" / f"{name}.sbatch"
    if not path.is_file():
        raise UserError(f"{path} is not there. Submit from a checkout of Headrace (pip install --editable).")
    return path


def take_snapshot(config: Config, folder: Path, scripts: tuple[str, ...] = ("pretrain",)) -> Path:
    """Copy what the run needs below ``folder``; returns the copy.

    Raises:
        UserError: ``folder`` can't be written.
    """
    files = {
        path.relative_to(ROOT): path.read_bytes()
        for package in PACKAGES
        for path in sorted((ROOT / package).rglob("*"))
        if path.is_file() and "__pycache__" not in path.parts
    }
    files |= {Path("slurm", f"{name}.sbatch"): batch_script(name).read_bytes() for name in scripts}
    files[Path(CONFIG)] = yaml.safe_dump(plain(config), sort_keys=False).encode()
    if commit := versions().get("commit"):
        files[Path(COMMIT_FILE)] = f"{commit}\n".encode()
    digest = hashlib.sha256()
    for path in sorted(files):
        digest.update(f"{path}\0{len(files[path])}\0".encode() + files[path])
    target = folder / digest.hexdigest()[:12]
    if target.is_dir():
        return target
    draft = folder / f".{target.name}.{uuid.uuid4().hex}"
    try:
        for path, content in files.items():
            (draft / path).parent.mkdir(parents=True, exist_ok=True)
            (draft / path).write_bytes(content)
        draft.rename(target)
    except OSError as error:
        shutil.rmtree(draft, ignore_errors=True)
        if not target.is_dir():  # else another submission was faster
            raise UserError(f"{folder} can't be written: {error.strerror}. Mend that.") from error
    return target
