"""What slurm/pretrain.sbatch itself decides: programs in Slurm's place only note what they are called with."""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "slurm" / "pretrain.sbatch"
PROGRAM = """\
#!/usr/bin/env bash
call="$(basename "$0") $*"
echo "$call" >>calls
"""
"""The beginning of each: notes its call."""
BUSY = """\
if [[ $call != *hostnames* ]] && (($(grep -cxF -- "$call" calls) == 1)); then
  echo "Unable to contact slurm controller" >&2
  exit 1
fi
"""
"""A controller that answers when asked a second time; for the names of hosts nobody asks it."""
JOB = """\
case $4 in
  begin) echo "folder=run attempts=0 logs=logs port=1 check_port=2 use=2 skip=''" ;;
  end) echo "action=$ACTION exit_code=1 exclude=$EXCLUDE" ;;
esac
"""


@dataclass
class Job:
    folder: Path

    def program(self, name: str, body: str) -> None:
        path = self.folder / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(PROGRAM + body)
        path.chmod(0o755)

    def run(self, action: str, exclude: str = "", **env: str) -> tuple[subprocess.CompletedProcess[str], list[str]]:
        """The script in a job of two nodes whose run ended so, and the calls that it made of Slurm's commands."""
        environment = {
            "PATH": f"{self.folder / 'bin'}{os.pathsep}{os.environ['PATH']}",
            "HEADRACE_SETUP": "/dev/null",
            "HEADRACE_CONTAINER": "job",
            "HEADRACE_NODE_CHECK": "no",
            "SLURM_JOB_ID": "7",
            "SLURM_JOB_NUM_NODES": "2",
            "SLURM_JOB_NODELIST": "n[1-2]",
            **env,
        }
        done = subprocess.run(
            ["bash", SCRIPT, "run.yaml"],
            env={**environment, "ACTION": action, "EXCLUDE": exclude},
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        return done, (self.folder / "calls").read_text().splitlines()


@pytest.fixture
def job(tmp_path: Path) -> Job:
    made = Job(tmp_path)
    made.program("job", JOB)
    made.program("srun", "")
    made.program("sleep", "")
    made.program("squeue", "echo 'n[1-2]'\n")
    made.program(
        "scontrol",
        'case "$*" in\n'
        "  *hostnames*1-2*) printf 'n1\\nn2\\n' ;;\n"
        "  *hostnames*) echo n1 ;;\n"
        "  *'show node'*) echo 'NodeName=n1 NodeAddr=10.0.0.1 NodeHostName=n1' ;;\n"
        "  *'show job 7_1') echo 'JobId=7 ReqNodeList=(null) ExcNodeList=n9 NumNodes=2' ;;\n"
        "  *'show job 7') echo 'JobId=7 ReqNodeList=(null) ExcNodeList=(null) NumNodes=2' ;;\n"
        "esac\n",
    )
    return made


def test_a_job_queues_itself_again(job: Job) -> None:
    done, calls = job.run("requeue")
    assert done.returncode == 75, done.stderr
    assert "scontrol requeue 7" in calls


def test_one_task_of_an_array_queues_itself_again_and_not_the_others(job: Job) -> None:
    """One of the tasks has the array's own id as its job id, which to Slurm means all of them."""
    task = {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "1"}
    done, calls = job.run("requeue", **task)
    assert done.returncode == 75, done.stderr
    assert "scontrol requeue 7_1" in calls
    assert any(call.startswith("squeue") and "--jobs=7_1" in call for call in calls)
    (job.folder / "calls").unlink()
    done, calls = job.run("requeue", "n2", **task)
    assert done.returncode == 75, done.stderr
    assert [call for call in calls if call.startswith("scontrol")][-3:] == [
        "scontrol requeuehold 7_1",
        "scontrol update JobId=7_1 ExcNodeList=n9,n2",
        "scontrol release 7_1",
    ]


@pytest.mark.parametrize("busy", ["squeue", "scontrol"])
def test_a_controller_that_does_not_answer_for_a_while_is_asked_again(job: Job, busy: str) -> None:
    path = job.folder / "bin" / busy
    path.write_text(PROGRAM + BUSY + path.read_text().removeprefix(PROGRAM))
    done, calls = job.run("requeue")
    assert done.returncode == 75, done.stderr
    assert calls[-1] == "scontrol requeue 7"
    assert any(call.startswith("srun") and "--nodelist=n1,n2" in call for call in calls)
    assert not any("--lost n" in call for call in calls)


def test_a_node_is_known_to_be_lost_although_squeue_did_not_answer_at_first(job: Job) -> None:
    """Were it not asked again, all nodes that the job began with would be taken."""
    job.program("squeue", BUSY + "echo n1\n")
    done, calls = job.run("requeue")
    assert done.returncode == 75, done.stderr
    assert len([call for call in calls if call.startswith("squeue")]) > 2
    assert any(call.startswith("srun") and "--nodelist=n1 " in call for call in calls)
