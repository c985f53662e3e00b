"""Two sides that are measured in turn, each in a process of its own.

A side is a process that does what a line of its standard input asks, and is blocked reading the
next one otherwise. `Worker` is the parent's end, `serve` the side's.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path


def serve(job) -> None:
    """Answers {"do": NAME, ...} with job.NAME(...) as a line of JSON, until the input ends.

    What the side's libraries print goes to the error stream, and so not between the lines.
    """
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        request = json.loads(line)
        reply = getattr(job, request.pop("do"))(**request)
        print(json.dumps(reply), file=replies, flush=True)


def reset_peak() -> None:
    """Starts `peak_mib` again from what is resident now."""
    Path("/proc/self/clear_refs").write_text("5")


def resident_mib() -> float:
    """The peak of this process's resident memory."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) / 1024


class Worker:
    """A side, started as `python -m MODULE ARGUMENTS` on the first `threads` of our cores."""

    def __init__(self, module: str, arguments: list[str], threads: int):
        cores = sorted(os.sched_getaffinity(0))[:threads]
        self._process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parent.parent,
            env=os.environ | {"JAX_PLATFORMS": "cpu", "OMP_NUM_THREADS": str(threads)},
            preexec_fn=lambda: os.sched_setaffinity(0, cores),
        )

    def __call__(self, do: str, **arguments):
        """The side's answer. Raises RuntimeError where it died instead."""
        self._process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self._process.args} ended with {self._process.wait()}")
        return json.loads(line)

    def cpu_seconds(self) -> float:
        """What all its threads have used so far."""
        stat = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(stat[11]) + int(stat[12])) / os.sysconf("SC_CLK_TCK")

    def close(self) -> None:
        """Ends its input, which ends the process, and waits for that."""
        self._process.stdin.close()
        self._process.wait()


def alternate(workers: dict[str, Worker], *, rounds: int, seconds: float) -> dict[str, dict]:
    """{name: {"seconds": [one a round], "idle_share": cores the others used during its turns}}.

    Every round runs each side once for about `seconds`, in an order that turns by one a round. The
    others' threads, which may spin for some milliseconds after work, are asleep by then.
    """
    counts = {}
    for name, worker in workers.items():
        took = worker("run", count=1)  # what is lazy is done by then
        took = min(took, worker("run", count=1))
        counts[name] = max(1, round(seconds / took))
    times = {name: [] for name in workers}
    stolen, wall = dict.fromkeys(workers, 0.0), dict.fromkeys(workers, 0.0)
    order = list(workers)
    for _ in range(rounds):
        for name in order:
            time.sleep(0.2)
            others = [w for n, w in workers.items() if n != name]
            before = sum(w.cpu_seconds() for w in others)
            took = workers[name]("run", count=counts[name])
            stolen[name] += sum(w.cpu_seconds() for w in others) - before
            wall[name] += took
            times[name].append(took / counts[name])
        order = order[1:] + order[:1]
    return {
        name: {"seconds": times[name], "idle_share": stolen[name] / wall[name]} for name in workers
    }
