"""The harness of `faults.py` in small: see there for what each of them holds."""

import signal

import faults
import pytest

pytestmark = pytest.mark.slow

STEPS = 200


@pytest.fixture(scope="module")
def expected(cli, tmp_path_factory):
    """The state of a run that nothing happens to."""
    return faults.straight(cli, tmp_path_factory.mktemp("straight"), STEPS)


def test_kills_at_random_moments_lose_nothing(cli, tmp_path):
    long = faults.straight(cli, tmp_path / "straight", 600)
    faults.kills(cli, tmp_path / "killed", long, steps=600, times=4)


def test_sigterm(cli, expected, tmp_path):
    faults.sigterm(cli, tmp_path, expected, steps=STEPS)


def test_a_newest_checkpoint_cut_short(cli, expected, tmp_path):
    faults.truncated(cli, tmp_path, expected, steps=STEPS)


def test_a_full_disk(cli, expected):
    if faults.full_disk(cli, expected, steps=STEPS) is None:
        pytest.skip("NOT TESTED: a full disk. It needs the right to mount a tmpfs (run as root)")


@pytest.mark.parametrize("victim, signal", [(0, 9), (1, 9), (0, 15), (1, 15)])
def test_one_process_of_two(cli, tmp_path, victim, signal):
    faults.one_of_two(cli, tmp_path / "run", victim=victim, signal=signal)


def test_sigterm_ends_a_job_that_has_nothing_to_save(cli, trained, tmp_path):
    flags = (f"--workdir={trained}", f"--out={tmp_path}", "--w=0", "--per_label=100000")
    jobs = faults.start_together(cli, 2, "sample", *flags)
    faults.wait_for(jobs[0], lambda: "image" in jobs[0].err())  # the bar
    for job in jobs:
        job.kill(signal.SIGTERM)
    assert [job.wait(20).status for job in jobs] == [-signal.SIGTERM] * 2
