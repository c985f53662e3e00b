"""What can happen to a run, done to it on purpose: kills, a full disk, a process that dies.

    python tests/faults.py [--kills=20] [--steps=2000] [--seed=0]

prints a table of what was seen. `test_faults.py` does all of them in small. Every fault returns
what was seen; what must hold is asserted here, so that neither can look away.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from cli import TINY, Cli, Running

from cfg_jax import experiment, stored, train
from cfg_jax.runtime import checkpoint
from cfg_jax.runtime import mesh as meshes

EVERY = 10  # steps between checkpoints
HEARTBEAT = 100  # seconds, JAX's own: the longest that a dead process goes unnoticed
ENDLESS = "--config.train.steps=1000000"


@dataclasses.dataclass(frozen=True)
class Seen:
    """A row of the table."""

    fault: str
    times: int
    told: str  # the line that the user gets
    lost: str  # steps
    end: str  # of the run, once it was started again


def restored(workdir):
    """The model of a run, and its newest checkpoint as {item: tree}."""
    model = experiment.build(stored.saved_config(str(workdir)))
    shapes = train.make_step(model, meshes.make_mesh()).shapes
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    wanted = meshes.placed(shapes, jax.tree.map(lambda _: here, shapes))
    checkpoints = checkpoint.Checkpoints(str(workdir), read_only=True)
    _, found = checkpoints.restore(**train.items(wanted))
    checkpoints.close()
    return model, found


def final_state(workdir) -> dict[str, np.ndarray]:
    """{path: array} of the newest checkpoint: step, parameters, optimizer and EMA."""
    leaves = jax.tree_util.tree_leaves_with_path(restored(workdir)[1])
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def assert_equal(a, b):
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def outputs(workdir) -> np.ndarray:
    """What the networks of the parameters and of the EMA say of noise, every label (the null label
    too) at eight levels: [2, B, H, W, C].
    """
    model, found = restored(workdir)
    rows = model.dataset.num_classes + 1
    label, lam = (x.ravel() for x in np.meshgrid(np.arange(rows), np.linspace(-12.0, 12.0, 8)))
    z = jax.random.normal(jax.random.key(0), (len(label), *model.dataset.image_shape))
    apply = jax.jit(model.network.apply)
    of = (found["state"]["params"], found["ema"])
    return np.stack([apply(params, z, jnp.float32(lam), {"label": label}) for params in of])


def distance(a: np.ndarray, b: np.ndarray) -> float:
    """How far outputs are apart, relative: the larger of the parameters' and the EMA's.

    Parameters would not tell. The gradient of a bias in front of a norm that takes it out again is
    nothing but rounding, and so is that of attention's keys; Adam makes steps of it all the same,
    and they wander, further with every step, where no output depends on them.
    """
    return max(np.linalg.norm(x - y) / np.linalg.norm(y) for x, y in zip(a, b, strict=True))


def saved(workdir) -> list[int]:
    """The steps of the checkpoints that are whole, in order."""
    return sorted(int(p.name) for p in (Path(workdir) / "checkpoints").glob("[0-9]*[0-9]"))


def logged(workdir) -> int:
    """The last step in metrics.jsonl; the last line may be cut short."""
    steps = [0]
    file = Path(workdir) / "metrics.jsonl"
    for line in file.read_text().splitlines() if file.exists() else []:
        with contextlib.suppress(ValueError):
            steps.append(json.loads(line)["step"])
    return steps[-1]


def wait_for(job: Running, condition, seconds: float = 300) -> None:
    """Returns once condition() holds; fails where the job ends before, or it takes too long."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert not (job.folder / "status").exists(), job.err()[-2000:]
        assert time.monotonic() < deadline, job.err()[-2000:]
        time.sleep(0.001)


def told(result, start: str) -> str:
    """The one line of a result that begins so; there is no traceback beside it."""
    assert "Traceback" not in result.err, result.err[-3000:]
    lines = [line for line in result.err.splitlines() if line.startswith(start)]
    assert len(lines) == 1, result.err[-3000:]
    return lines[0]


def run_straight(cli: Cli, workdir: Path, steps: int) -> None:
    """A run that nothing happens to."""
    result = cli("train", *TINY, f"--workdir={workdir}", f"--config.train.steps={steps}")
    assert result.status == 0, result.err[-3000:]


def straight(cli: Cli, workdir: Path, steps: int) -> dict[str, np.ndarray]:
    """The state of a run that nothing happens to."""
    run_straight(cli, workdir, steps)
    return final_state(workdir)


def kills(cli: Cli, workdir: Path, expected, *, steps: int, times: int, seed: int = 0) -> Seen:
    """kill -9 at random moments of one run, every other time while a checkpoint is written."""
    draw, run, lost = random.Random(seed), [*TINY, f"--workdir={workdir}"], []
    while_saving = 0
    for i in range(times):
        # Beyond what the last one logged, counted in steps, for a second is one step or hundreds;
        # and then anywhere between two lines.
        until = logged(workdir) + draw.randint(0, steps // (3 * times))
        job = cli.start("train", *run, ENDLESS)
        wait_for(job, lambda: logged(workdir) > until)  # noqa: B023 - called at once
        if i % 2:
            wait_for(job, lambda: list((workdir / "checkpoints").glob("*tmp*")))
        else:
            time.sleep(draw.uniform(0, 0.1))
        job.kill(signal.SIGKILL)
        assert job.wait().status == -signal.SIGKILL
        while_saving += bool(list((workdir / "checkpoints").glob("*tmp*")))
        reached, kept = logged(workdir), (saved(workdir) or [0])[-1]
        assert kept <= steps, "the harness's own: ask for more steps, or fewer kills"
        lost.append(reached - kept)
    # One checkpoint may be on its way to the disk while the next steps are made.
    assert max(lost) <= 2 * EVERY, lost
    result = cli("train", *run, f"--config.train.steps={steps}")
    assert result.status == 0, result.err[-3000:]
    # A kill before the first checkpoint leaves nothing to go on from.
    assert f"going on from step {kept} of {steps}" in result.err or kept in (0, steps)
    assert_equal(final_state(workdir), expected)
    every = list(range(5, steps + 1, 5))
    assert [json.loads(x)["step"] for x in (workdir / "metrics.jsonl").open()] == every
    fault = f"kill -9, {while_saving} of them with a checkpoint half-written"
    return Seen(fault, times, "going on from step N", f"at most {max(lost)}", "equal to the bit")


def sigterm(cli: Cli, workdir: Path, expected, *, steps: int) -> Seen:
    """SIGTERM: saves where it is, and leaves with 0."""
    run = [*TINY, f"--workdir={workdir}"]
    job = cli.start("train", *run, ENDLESS)
    wait_for(job, lambda: logged(workdir) >= 15)
    job.kill(signal.SIGTERM)
    result = job.wait(60)
    assert result.status == 0, result.err[-3000:]
    line = next(x for x in result.err.splitlines() if x.startswith("told to leave"))
    at = int(line.split("step ")[1].split(":")[0])
    assert saved(workdir)[-1] == at <= steps
    assert cli("train", *run, f"--config.train.steps={steps}").status == 0
    assert_equal(final_state(workdir), expected)
    return Seen("SIGTERM", 1, line, "0", "equal to the bit")


def truncated(cli: Cli, workdir: Path, expected, *, steps: int) -> Seen:
    """The newest checkpoint cut short: the one before it is taken, and it is put aside."""
    run = [*TINY, f"--workdir={workdir}", f"--config.train.steps={steps}"]
    assert cli("train", *run).status == 0
    newest = workdir / "checkpoints" / str(steps)
    for file in newest.rglob("*"):
        if file.is_file() and file.stat().st_size > 1000:
            file.write_bytes(file.read_bytes()[:200])
    result = cli("train", *run)
    assert result.status == 0, result.err[-3000:]
    line = next(x for x in result.err.splitlines() if x.startswith(f"checkpoint {steps} in"))
    assert f"going on from step {steps - EVERY}" in result.err
    assert_equal(final_state(workdir), expected)
    return Seen("newest checkpoint cut short", 1, line, str(EVERY), "equal to the bit")


@contextlib.contextmanager
def small_disk(kilobytes: int):
    """A folder with room for so much; None where this machine does not let us make one."""
    folder = tempfile.mkdtemp(prefix="cfg_jax_disk_")
    mount = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "none", folder]
    try:
        made = subprocess.run(mount, capture_output=True).returncode == 0
    except FileNotFoundError:
        made = False
    try:
        yield Path(folder) if made else None
    finally:
        if made:
            subprocess.run(["umount", "-l", folder], check=True)
        shutil.rmtree(folder, ignore_errors=True)


def full_disk(cli: Cli, expected, *, steps: int) -> Seen | None:
    """A disk that fills up; once there is room, the run goes on. None: no disk to fill."""
    with small_disk(16_000) as disk:
        if disk is None:
            return None
        run = [*TINY, f"--workdir={disk / 'run'}"]
        job = cli.start("train", *run, ENDLESS)
        wait_for(job, lambda: saved(disk / "run"))
        ballast = disk / "ballast"
        with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(2**20))  # what fits of it, then none
        result = job.wait(120)
        assert result.status == 1
        line = told(result, "stopped: ")
        kept = saved(disk / "run")[-1]
        assert kept < steps, "the harness's own: ask for more steps"
        lost = logged(disk / "run") - kept
        assert lost <= 2 * EVERY
        ballast.unlink()
        result = cli("train", *run, f"--config.train.steps={steps}")
        assert result.status == 0, result.err[-3000:]
        assert f"going on from step {kept} of" in result.err
        assert_equal(final_state(disk / "run"), expected)
        line = line.replace(str(disk), "DIR").replace("DIR/run", "DIR")
        return Seen("the disk is full", 1, line, f"at most {lost}", "equal to the bit")


def start_together(cli: Cli, count: int, *args: str) -> list[Running]:
    """The same job in `count` real processes that find each other on loopback."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    return [
        cli.start(
            *args,
            env={
                "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
                "JAX_NUM_PROCESSES": str(count),
                "JAX_PROCESS_ID": str(i),
                "XLA_FLAGS": "--xla_force_host_platform_device_count=1",
            },
        )
        for i in range(count)
    ]


def run_together(cli: Cli, count: int, *args: str):
    """Their results, all of them good."""
    results = [job.wait() for job in start_together(cli, count, *args)]
    for result in results:
        assert result.status == 0, result.err[-3000:]
    return results


def one_of_two(cli: Cli, workdir: Path, *, victim: int, signal: int) -> Seen:
    """One process of two is told to leave, or killed, and the other leaves too.

    Then both go on, then one, to what one process makes that is never stopped.
    """
    killed = signal == 9
    # At the config's rate: what rounding does grows with it, and a fast machine makes many steps.
    run = [*TINY, f"--workdir={workdir}"]
    jobs = start_together(cli, 2, "train", *run, ENDLESS, "--unfinished_status=75")
    wait_for(jobs[0], lambda: logged(workdir) >= 15 and saved(workdir))
    jobs[victim].kill(signal)
    began = time.monotonic()
    other = jobs[1 - victim].wait(HEARTBEAT + 60)
    seconds = time.monotonic() - began
    first = jobs[victim].wait(60)
    reached, kept = logged(workdir), saved(workdir)[-1]
    if killed:
        assert first.status == -9 and other.status != 0, other.err[-3000:]
        assert seconds < HEARTBEAT + 30
        lines = [x for x in other.err.splitlines() if "another" in x]
        assert lines, other.err[-3000:]
        line = lines[0].split(" (")[0]
        assert reached - kept <= 2 * EVERY
        fault = f"process {victim} of two: kill -9"
        lost = f"at most {reached - kept}"
    else:
        assert first.status == other.status == 75, other.err[-3000:] + first.err[-3000:]
        assert f"told to leave at step {kept}:" in first.err + other.err
        line, lost = "told to leave at step N: saved, and leaving", "0"
        fault = f"process {victim} of two: SIGTERM"
    halfway, steps = kept + 15, kept + 30
    both = run_together(cli, 2, "train", *run, f"--config.train.steps={halfway}")
    assert f"going on from step {kept} of {halfway}" in both[0].err
    alone = cli("train", *run, f"--config.train.steps={steps}")
    assert alone.status == 0 and f"going on from step {halfway} of {steps}" in alone.err
    never = workdir.with_name(f"{workdir.name}_straight")
    run_straight(cli, never, steps)
    apart = distance(outputs(workdir), outputs(never))
    assert apart < 1e-5, (apart, steps)
    return Seen(
        fault,
        1,
        f"{line} (the other, after {seconds:.1f} s)",
        lost,
        f"as two, then as one: {apart:.0e} from never stopped",
    )


def main() -> None:
    """All of them, at length, as a table in Markdown."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    # As users run it: with all of the compiler's passes.
    home = Path(tempfile.mkdtemp(prefix="cfg_jax_faults_"))
    kept = {"JAX_COMPILATION_CACHE_DIR": str(home / "compiled")}
    cli = Cli({"JAX_DISABLE_MOST_OPTIMIZATIONS": "0", **kept})
    long, short = (
        straight(cli, home / f"straight_{steps}", steps) for steps in (options.steps, 200)
    )
    print("| fault | times | the user reads | steps lost | at the end |")
    print("|---|---|---|---|---|")

    def tell(seen: Seen | None) -> None:
        if seen is None:
            print("| the disk is full | not done: this machine mounts no tmpfs | | | |")
        else:
            cells = [seen.fault, str(seen.times), f"`{seen.told}`", seen.lost, seen.end]
            print("| " + " | ".join(c.replace(str(home), "DIR") for c in cells) + " |", flush=True)

    times = {"steps": options.steps, "times": options.kills, "seed": options.seed}
    tell(kills(cli, home / "killed", long, **times))
    tell(sigterm(cli, home / "sigterm", short, steps=200))
    tell(truncated(cli, home / "truncated", short, steps=200))
    tell(full_disk(cli, short, steps=200))
    for victim in (0, 1):
        for number in (9, 15):
            folder = home / f"two_{victim}_{number}"
            tell(one_of_two(cli, folder, victim=victim, signal=number))
    cli.close()


if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    jax.config.update("jax_num_cpu_devices", 1)
    main()
