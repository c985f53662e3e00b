"""The harness of `faults.py` in small: see there for what each of them holds."""

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


def test_a_full_disk(cli, expected):
    if faults.full_disk(cli, expected, steps=STEPS) is None:
        pytest.skip("NOT TESTED: a full disk. It needs the right to mount a tmpfs (run as root)")


@pytest.mark.parametrize("victim, signal", [(0, 9), (1, 9), (1, 15)])
def test_one_process_of_two(cli, tmp_path, victim, signal):
    faults.one_of_two(cli, tmp_path / "run", victim=victim, signal=signal)
