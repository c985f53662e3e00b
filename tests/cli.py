"""Runs the jobs as a user does, without paying seconds of imports for each.

A zygote imports the package once, before jax starts a backend, and forks for every call: each call
is a process of its own, with its own flags, devices, signals and exit status.
"""

import dataclasses
import json
import os
import runpy
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Mapping
from pathlib import Path

# Networks small enough for a test, of which most of the cost is to trace them: one of 12 thousand
# parameters that has all but what a U-Net does between its levels, and one of two levels.
ONE_LEVEL = {"channels": 8, "num_res_blocks": 1, "head_channels": 8}
ONE_LEVEL |= {"channel_mult": (1,), "attention_resolutions": ()}
TWO_LEVELS = ONE_LEVEL | {"channel_mult": (1, 1), "attention_resolutions": (4,)}


def network_flags(fields: Mapping[str, object]) -> list[str]:
    """A tuple must be given once: what is given again is added to it."""
    return [f"--config.model.{field}={value}" for field, value in fields.items()]


# A digits run with such a network: 8x8 images, 8 noise levels.
RUN = (
    "--config.train.batch_size=16",
    "--config.train.log_every=5",
    "--config.train.checkpoint_every=10",
    "--config.train.sample_every=0",
    "--config.sample.steps=8",
    "--config.sample.batch_size=16",
)
TINY = ("--config=digits", *network_flags(ONE_LEVEL), *RUN)
# With it twenty steps teach a network enough for images to depend on noise, label and w.
QUICK = (
    "--config.optimizer.learning_rate=0.01",
    "--config.optimizer.warmup_steps=5",
    "--config.ema.decay=0.5",
)
TINY_TWO_LEVELS = ("--config=digits", *network_flags(TWO_LEVELS), *RUN)


@dataclasses.dataclass(frozen=True)
class Result:
    status: int  # negative: the signal that ended it
    out: str
    err: str

    @property
    def errors(self) -> list[str]:
        """The lines told to the user."""
        return [line for line in self.err.splitlines() if line.startswith("error: ")]


@dataclasses.dataclass(frozen=True)
class Running:
    pid: int
    folder: Path

    def err(self) -> str:
        return (self.folder / "err").read_text()

    def kill(self, signal: int) -> None:
        os.kill(self.pid, signal)

    def wait(self, timeout: float = 500) -> Result:
        deadline = time.monotonic() + timeout
        while not (self.folder / "status").exists():
            if time.monotonic() > deadline:
                self.kill(9)
                raise TimeoutError(self.err()[-3000:])
            time.sleep(0.02)
        status = int((self.folder / "status").read_text())
        return Result(status, (self.folder / "out").read_text(), self.err())


class Cli:
    """cli("train", "--config=digits", ...) -> Result."""

    def __init__(self, env: Mapping[str, str] | None = None):
        self._zygote = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
            | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
            | (env or {}),
        )

    def start(
        self,
        job: str,
        *args: str,
        env: dict[str, str] | None = None,
        cwd: Path | None = None,
        parse_only: Mapping[str, str] | None = None,
    ) -> Running:
        """Starts the job. With `parse_only` it reads its flags and config, and goes no further; the
        config of a workdir is that of the name it has there.
        """
        folder = tempfile.mkdtemp(prefix="cfg_jax_cli_")
        request = {"job": job, "args": list(args), "env": env or {}, "folder": folder}
        request |= {"cwd": str(cwd or Path.cwd()), "parse_only": parse_only}
        self._zygote.stdin.write(json.dumps(request) + "\n")
        self._zygote.stdin.flush()
        return Running(int(self._zygote.stdout.readline()), Path(folder))

    def __call__(self, job: str, *args: str, **options) -> Result:
        return self.start(job, *args, **options).wait()

    def close(self) -> None:
        self._zygote.stdin.close()
        self._zygote.wait()


def _run_job(request: dict) -> None:
    """In a fork: the job in place of this process."""
    folder = Path(request["folder"])
    for name, number in (("out", 1), ("err", 2)):
        os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT), number)
    os.environ.update(request["env"])
    os.chdir(request["cwd"])
    if request["parse_only"] is not None:
        _parse_only(request["parse_only"])
    sys.argv = [request["job"], *request["args"]]
    status = 1
    try:
        runpy.run_module(f"cfg_jax.{request['job']}", run_name="__main__")
        status = 0
    except SystemExit as exit:
        status = exit.code if isinstance(exit.code, int) else int(exit.code is not None)
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    import jax

    if jax.distributed.is_initialized():
        jax.distributed.shutdown()  # as at the end of a process of its own: waits for the others
    os._exit(status)


def _parse_only(configs: Mapping[str, str]) -> None:
    from cfg_jax import command, experiment, stored

    run = command.run
    command.run = lambda main, config=None: run(lambda *config: None, config)
    stored.saved_config = lambda path, flag="": experiment.SCHEMA.complete(
        experiment.load_config(configs[path])
    )


def _mind_job(request: dict) -> None:
    """In a fork: runs the job in another, says its number, and leaves its status behind."""
    pid = os.fork()
    if pid == 0:
        _run_job(request)
    print(pid, flush=True)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    done = Path(request["folder"]) / "status"
    done.with_suffix(".partial").write_text(str(status))
    done.with_suffix(".partial").rename(done)
    os._exit(0)


def _zygote() -> None:
    import cfg_jax.api
    import cfg_jax.data.builders  # what the data room would import at first use
    import cfg_jax.train  # noqa: F401

    # No backend is up and no other thread runs: forking is safe here.
    warnings.filterwarnings("ignore", category=RuntimeWarning)
    for line in sys.stdin:
        request = json.loads(line)
        if os.fork() == 0:
            _mind_job(request)
        while True:  # minders that have ended
            try:
                if os.waitpid(-1, os.WNOHANG) == (0, 0):
                    break
            except ChildProcessError:
                break


if __name__ == "__main__":
    _zygote()
