"""A cloud that is played, for tests of the launchers: fixtures/launch/bin stands first on PATH.

gcloud keeps its states in a folder and runs what is sent by ssh, as `launch/worker.sh` would run on
the workers; kubectl and Slurm's commands record what they are called with. The job is a line of
shell instead of a training run.
"""

import contextlib
import dataclasses
import os
import shlex
import shutil
import signal
import subprocess
from pathlib import Path

FIXTURES = Path(__file__).parent / "fixtures" / "launch"


@dataclasses.dataclass(frozen=True)
class Ended:
    status: int
    out: str
    err: str

    @property
    def errors(self):
        return [x for x in self.err.splitlines() if x.startswith("error: ")]

    @property
    def told(self):
        return [x[3:] for x in self.err.splitlines() if x.startswith("== ")]


class Cloud:
    """What fixtures/launch/bin/gcloud plays, and what was called."""

    def __init__(self, folder: Path, checkout: Path):
        self.folder, self.checkout = folder, checkout
        shutil.copytree(FIXTURES / "bin", folder / "bin")
        for name in ("kubectl", "sbatch", "srun", "scontrol", "sudo"):
            (folder / "bin" / name).symlink_to("recorder")
        for name in ("calls", "fail", "late"):
            (folder / name).touch()
        self.says(queued=["ABSENT"], node=["ABSENT"], refusal=["ERROR: (gcloud) refused"])
        self.jobs(["exit 0"], ["exit 0"])

    def says(self, **states):
        for name, lines in states.items():
            (self.folder / name).write_text("".join(f"{x}\n" for x in lines))

    def jobs(self, *lines):
        """What the job does on worker 0, worker 1: a line of shell, one for each start."""
        for n, mine in enumerate(lines):
            self.says(**{f"jobs.{n}": mine})

    def env(self, **more):
        path = f"{self.folder / 'bin'}:/usr/bin:/bin"
        return {"PATH": path, "HOME": str(self.folder), "CLOUD": str(self.folder), **more}

    def __call__(self, script: str, *args: str, **env: str) -> Ended:
        command = ["bash", f"launch/{script}", *args]
        done = subprocess.run(
            command,
            cwd=self.checkout,
            env=self.env(**env),
            text=True,
            capture_output=True,
            timeout=120,
        )
        return Ended(done.returncode, done.stdout, done.stderr)

    def start(self, script: str, *args: str) -> subprocess.Popen:
        command = ["bash", f"launch/{script}", *args]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        where = {"cwd": self.checkout, "env": self.env(), "start_new_session": True}
        return subprocess.Popen(command, **pipes, **where)

    @property
    def calls(self) -> list[list[str]]:
        return [shlex.split(x) for x in (self.folder / "calls").read_text().splitlines()]

    @property
    def steps(self) -> list[str]:
        """The calls in a word or two each, without the questions for a state, and sudo."""
        return [x for x in map(short, self.calls) if not x.startswith(("describe", "ask", "sudo"))]

    def job_seen(self, worker: int) -> list[str]:
        return (self.folder / "worker" / str(worker) / "jobs_seen").read_text().splitlines()

    def close(self):
        for pid in self.folder.glob("worker/*/cfg_jax_job/child"):
            with contextlib.suppress(ProcessLookupError, ValueError):
                os.kill(int(pid.read_text()), signal.SIGKILL)


def short(call: list[str]) -> str:
    """What one call is for."""
    words = [x for x in call if not x.startswith("--")]
    option = dict(x[2:].split("=", 1) for x in call if x.startswith("--") and "=" in x)
    if call[0] != "gcloud":
        return call[0]
    kind, verb = words[3:5]
    if verb == "ssh":
        command = option["command"]
        for name in ("setup", "start", "stop", "state", "tail", "true"):
            if name in command.split():
                asks = "ask" if name == "state" else name
                return f"{asks} {option['worker']}"
    return f"{verb} {kind}" if verb == "describe" else verb


def git(folder, *args):
    subprocess.run(["git", "-C", folder, *args], check=True, capture_output=True)
