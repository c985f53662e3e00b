"""The launchers: what they would do, what they do, and what they do when something fails."""

import os
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
import yaml
from cloud import FIXTURES, Cloud, git, short

ROOT = Path(__file__).parent.parent
TRANSCRIPTS = sorted(FIXTURES.glob("*.txt"))
POD = ["--name=pod", "--zone=us-west4-a", "--type=v5litepod-16", "--spot"]
QUICK = ["--poll=0.01"]
JOB = ["--", "--config=digits", "--workdir=gs://bucket/digits"]
RUN = ["run", *POD, *QUICK, *JOB]

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="the workers are Linux: /proc")


@pytest.fixture(scope="module")
def small_checkout(tmp_path_factory):
    """A checkout that packs in no time."""
    folder = tmp_path_factory.mktemp("checkout")
    shutil.copytree(ROOT / "launch", folder / "launch")
    (folder / ".gitignore").write_text("runs/\n")
    (folder / "code.py").write_text("first\n")
    git(folder, "init", "--quiet")
    return folder


@pytest.fixture
def cloud(tmp_path, small_checkout):
    shutil.rmtree(small_checkout / "runs", ignore_errors=True)
    (small_checkout / "code.py").write_text("first\n")
    cloud = Cloud(tmp_path / "cloud", small_checkout)
    yield cloud
    cloud.close()


@pytest.fixture(scope="module")
def set_up(tmp_path_factory, small_checkout):
    """The folder of a cloud with a TPU of two workers, set up, and what was shipped to it."""
    cloud = Cloud(tmp_path_factory.mktemp("pod") / "cloud", small_checkout)
    for verb in ("create", "setup"):
        result = cloud("tpu.sh", verb, *POD, *QUICK)
        assert result.status == 0, result.err
    cloud.says(calls=[])
    shutil.copytree(small_checkout / "runs", cloud.folder.with_name("runs"))
    return cloud.folder


@pytest.fixture
def pod(cloud, set_up):
    """A cloud with a TPU of two workers, set up."""
    shutil.rmtree(cloud.folder)
    shutil.copytree(set_up, cloud.folder, symlinks=True)
    shutil.copytree(set_up.with_name("runs"), cloud.checkout / "runs")
    return cloud


# Dry runs


@pytest.mark.parametrize("file", TRANSCRIPTS, ids=lambda f: f.stem)
def test_dry_run(file, cloud):
    """The commands are those of the transcript, a shell can read them, and none is run."""
    first, wanted = file.read_text().split("\n", 1)
    _, _, script, *args = shlex.split(first)
    result = cloud(Path(script).name, *args)
    assert (result.status, result.err, result.out) == (0, "", wanted)
    assert cloud.calls == []
    assert not (cloud.checkout / "runs").exists()
    subprocess.run(["bash", "-n"], input=wanted, text=True, check=True)


@linux_only
@pytest.mark.parametrize("verb", ["setup", "run", "status", "stop", "delete"])
def test_a_dry_run_prints_what_is_run(verb, pod):
    """Each call of the real thing is a line of the dry run."""
    args = [verb, *POD, *(JOB if verb == "run" else [])]
    dry = pod("tpu.sh", *args[:1], "--dry_run", *args[1:])
    assert pod("tpu.sh", *args[:1], *(QUICK if verb == "run" else []), *args[1:]).status == 0
    printed = [shlex.split(x) for x in dry.out.splitlines() if x.startswith("gcloud")]
    called = [x for x in pod.calls if x[0] == "gcloud"]
    assert called and all(x in printed for x in called)
    if verb != "run":  # whose dry run has a preemption too
        assert all(x in called for x in printed)


# TPU: the order of calls


def test_create_and_setup(cloud):
    result = cloud("tpu.sh", "create", *POD, *QUICK)
    assert result.status == 0, result.err
    assert cloud.steps == ["create"]
    assert [short(x) for x in cloud.calls] == [
        "describe queued-resources",
        "create",
        "describe queued-resources",  # waiting for resources
        "describe queued-resources",
        "describe tpu-vm",
    ]
    assert result.told == ["pod: ABSENT", "pod: WAITING_FOR_RESOURCES", "pod: READY"]

    (cloud.checkout / "new.py").write_text("not added to git\n")
    result = cloud("tpu.sh", "setup", *POD, *QUICK)
    (cloud.checkout / "new.py").unlink()
    assert result.status == 0, result.err
    assert cloud.steps == ["create", "true all", "scp", "setup all", "pip", "pip"]
    pip, sudo = cloud.calls[-2:]
    assert sudo[:2] == ["sudo", "-n"] and "transparent_hugepage" in sudo[-1]
    assert shlex.join(pip).endswith(
        "install --quiet --disable-pip-version-check -e '.[tpu,gcs]' -c launch/constraints.txt"
    )
    for worker in "01":
        assert (cloud.folder / "worker" / worker / "cfg_jax" / "new.py").exists()
    assert "worker-0: ready\nworker-1: ready" in result.out


@linux_only
def test_run_to_the_end(pod):
    bar = "printf 'loss 0.3\\rloss 0.1\\n\\033[A   \\n'"
    pod.jobs([f"sleep 0.3; {bar}"], ["true"])
    result = pod("tpu.sh", *RUN)
    assert result.status == 0, result.err
    assert pod.steps == ["start all"]
    assert result.told[-1] == "finished on worker-0: loss 0.1"
    wanted = "-m cfg_jax.train --config=digits --workdir=gs://bucket/digits --unfinished_status=75"
    assert pod.job_seen(0) == pod.job_seen(1) == [wanted]


@linux_only
def test_run_sets_up_what_is_bare(cloud):
    assert cloud("tpu.sh", "create", *POD, *QUICK).status == 0
    old = cloud.checkout / "runs" / "launch" / "pod.tar.gz"
    old.parent.mkdir(parents=True)
    old.write_text("what was shipped to another TPU of that name")
    assert cloud("tpu.sh", *RUN).status == 0
    assert cloud.steps == ["create", "true all", "scp", "setup all", "pip", "pip", "start all"]


@linux_only
def test_arguments_and_environment_arrive_as_they_were_typed(pod):
    odd = ["--config.train.sample_w=(0.0,1.0)", "--config.x=a 'b' \"c\" $HOME \\d", "--config.y=*"]
    env = "--env=LIBTPU_INIT_ARGS=--one=1 --two='2'"
    pod.jobs(['echo "$LIBTPU_INIT_ARGS"; exit 0'], ["true"])
    result = pod("tpu.sh", "run", *POD, *QUICK, env, *JOB, *odd)
    assert result.status == 0, result.err
    assert pod.job_seen(0)[0].endswith(" ".join([*odd, "--unfinished_status=75"]))
    assert result.told[-1].endswith(": --one=1 --two='2'")


@linux_only
def test_the_job_outlives_the_watcher_which_finds_it_again(pod):
    pod.jobs(["echo step 1; sleep 20"], ["sleep 20"])
    watcher = pod.start("tpu.sh", *RUN)
    for line in watcher.stderr:
        if "step 1" in line:
            break
    os.killpg(watcher.pid, signal.SIGKILL)  # with all that is in its ssh session
    watcher.communicate()
    status = pod("tpu.sh", "status", *POD)
    assert status.out.splitlines() == [
        "queued resource: ACTIVE",
        "node: READY",
        "job: running on worker-0: step 1",
    ]
    assert pod("tpu.sh", "run", *POD, *QUICK, "--nowatch", *JOB).status == 0
    assert len(pod.job_seen(0)) == 1
    other = pod("tpu.sh", "run", *POD, *QUICK, "--", "--config=mnist", "--workdir=gs://bucket/m")
    assert other.status == 1 and len(pod.job_seen(0)) == 1
    assert any("runs another job: train --config=digits" in x for x in other.errors)
    shipped = pod("tpu.sh", "setup", *POD, *QUICK)
    assert shipped.status == 1 and "a job runs on worker-0: stop it first" in shipped.err


# TPU: preemption


@linux_only
@pytest.mark.parametrize(
    "queued, node, status",
    [("SUSPENDED", "ABSENT", 75), ("ACTIVE", "PREEMPTED", 75), ("FAILED", "ABSENT", 1)],
)
def test_a_preempted_job_is_started_again_elsewhere(pod, queued, node, status):
    """Deleted, made, set up with the code that was there, and given the same command."""
    goes = f"echo {queued} >$CLOUD/queued; echo {node} >$CLOUD/node; exit {status}"
    edits = f"echo second >{pod.checkout}/code.py; "
    pod.jobs([f"{edits} {goes}", "echo 'going on'; exit 0"], ["sleep 0.2; exit 75", "exit 0"])
    result = pod("tpu.sh", *RUN)
    assert result.status == 0, result.err
    again = ["delete", "create", "true all", "scp", "setup all", "pip", "pip", "start all"]
    assert pod.steps == ["start all", *again]
    starts = [x for x in pod.calls if short(x) == "start all"]
    assert starts[0] == starts[1]
    seen = node if queued == "ACTIVE" else queued
    assert [x for x in result.told if "of 20" in x] == [
        f"pod is gone ({seen}): making it again (1 of 20)"
    ]
    assert result.told[-1] == "finished on worker-0: going on"
    assert (pod.folder / "worker" / "0" / "cfg_jax" / "code.py").read_text() == "first\n"


@linux_only
@pytest.mark.parametrize("status", [75, 1])
def test_the_job_knows_of_a_preemption_before_the_cloud_says_it(pod, status):
    goes = f"printf '%s\\n' ACTIVE ACTIVE SUSPENDED >$CLOUD/queued; exit {status}"
    pod.jobs([goes, "exit 0"], ["exit 0"])
    result = pod("tpu.sh", *RUN)
    assert result.status == 0, result.err
    assert "delete" in pod.steps and pod.steps.count("start all") == 2


@linux_only
def test_a_node_that_goes_while_the_job_is_started_is_made_again(pod):
    pod.says(queued=["ACTIVE", "SUSPENDED"], fail=["*worker.sh start*"])
    result = pod("tpu.sh", *RUN)
    assert result.status == 0, result.err
    assert pod.steps[:4] == ["start all", "stop all", "delete", "create"]
    assert pod.steps[-1] == "start all"


@linux_only
def test_reruns_are_bounded(pod):
    pod.jobs(["echo SUSPENDED >$CLOUD/queued; exit 75"], ["exit 75"])
    result = pod("tpu.sh", "run", *POD, *QUICK, "--max_reruns=2", *JOB)
    assert result.status == 1
    assert pod.steps.count("create") == 2 and pod.steps.count("start all") == 3
    assert result.errors == [
        "error: pod is gone (SUSPENDED), and --max_reruns=2 are used up: run again to go on"
    ]


@linux_only
def test_a_job_that_was_told_to_leave_starts_again_where_the_node_stays(pod):
    """As after maintenance: 75 is no end, however often the cloud says READY."""
    pod.jobs(["exit 75", "exit 137", "exit 0"], ["exit 75", "exit 137", "exit 0"])
    result = pod("tpu.sh", *RUN)
    assert result.status == 0, result.err
    assert pod.steps == ["start all"] * 3
    assert [x for x in result.told if "of 20" in x] == [
        f"the job was interrupted, and pod is READY still: starting it again ({n} of 20)"
        for n in (1, 2)
    ]


@linux_only
def test_a_worker_that_lost_another_is_started_again(pod):
    lost = "echo 'stopped: another process is gone (x); start all of them again'; exit 1"
    pod.jobs([lost, "exit 0"], ["exit 134", "exit 0"])
    result = pod("tpu.sh", *RUN)
    assert result.status == 0 and pod.steps == ["start all"] * 2, result.err
    # What worker.sh looks for is what the job says.
    assert "stopped: another process is gone" in (ROOT / "cfg_jax" / "command.py").read_text()


@linux_only
@pytest.mark.parametrize("status", [1, 2])
def test_a_job_that_fails_by_itself_is_not_started_again(pod, status):
    pod.jobs([f"echo 'error: no such config'; exit {status}"], ["exit 0"])
    result = pod("tpu.sh", *RUN)
    assert result.status == 1 and pod.steps == ["start all"]
    (line,) = result.errors
    assert f"the job failed {status} on worker-0: error: no such config" in line


@linux_only
def test_a_worker_that_took_the_others_along_is_named(pod):
    lost = "echo 'stopped: another process is gone (x); start all of them again'; exit 1"
    pod.jobs([lost], ["echo 'no space left'; exit 1"])
    result = pod("tpu.sh", *RUN)
    assert result.status == 1 and pod.steps == ["start all"]
    assert "the job failed 1 on worker-1: no space left" in result.errors[0]


@linux_only
def test_stop_ends_the_watch(pod):
    leave = "trap 'kill $! && exit 75' TERM; echo step 7; sleep 20 & wait"
    pod.jobs([leave], [leave])
    watcher = pod.start("tpu.sh", *RUN)
    for line in watcher.stderr:
        if "step 7" in line:
            break
    assert pod("tpu.sh", "stop", *POD).status == 0
    _, err = watcher.communicate(timeout=60)
    assert watcher.returncode == 1 and "error: the job was told to stop, and has: step 7" in err
    assert pod.steps == ["start all", "stop all"]


@linux_only
def test_deleted_by_somebody_it_is_not_made_again(pod):
    pod.jobs(["echo ABSENT >$CLOUD/queued; exit 75"], ["exit 75"])
    result = pod("tpu.sh", *RUN)
    assert result.status == 1 and pod.steps == ["start all"]
    assert "pod was deleted" in result.errors[0]


@linux_only
def test_a_cloud_that_is_silent_for_a_while_is_borne(pod):
    pod.jobs(["printf '%s\\n' SILENT SILENT ACTIVE >$CLOUD/queued; sleep 0.5"], ["true"])
    result = pod("tpu.sh", *RUN)
    assert result.status == 0 and pod.steps == ["start all"], result.err

    pod.says(queued=["ACTIVE"])
    pod.jobs(["echo SILENT >$CLOUD/queued; sleep 20"], ["sleep 20"])
    result = pod("tpu.sh", *RUN)
    assert result.status == 1 and "delete" not in pod.steps
    assert "the cloud does not say how pod is: ERROR: (gcloud) the connection" in result.errors[0]


@linux_only
def test_a_node_that_is_ready_and_not_found_is_looked_at_again(pod):
    not_found = ["ERROR: (gcloud) NOT_FOUND: no node pod"]
    pod.says(fail=["*worker.sh state*"] * 3, refusal=not_found)
    result = pod("tpu.sh", *RUN)
    assert result.status == 0 and pod.steps == ["start all"], result.err

    pod.says(fail=["*worker.sh state*"] * 99, calls=[])
    (pod.folder / "bin" / "sleep").symlink_to("recorder")
    result = pod("tpu.sh", *RUN)
    assert result.status == 1
    assert result.errors == [f"error: worker 0 of pod does not answer: {not_found[0]}"]
    seen = [short(x) for x in pod.calls]
    assert seen.count("ask 0") == 10 and seen.count("sleep") == 9


# TPU: what happens when a call fails

FAILS = {
    "create": (["create"], "*queued-resources create*", "pod was not created", ["create"]),
    "describe": (["create"], "*describe*", "the cloud does not say how pod is", []),
    "ssh": (["setup"], "*--command=true*", "", ["true all", "true all", "scp", "setup all"]),
    "scp": (["setup"], "* scp *", "pod is not set up", ["true all", "scp"]),
    "setup": (
        ["setup"],
        "*worker.sh setup*",
        "pod is not set up",
        ["true all", "scp", "setup all"],
    ),
    "start": (RUN, "*worker.sh start*", "did not start on every worker", ["start all", "stop all"]),
    "stop": (["stop"], "*worker.sh stop*", "not every worker of pod was told", ["stop all"]),
    "logs": (["logs"], "*tail*", "no log came from worker 0", ["tail 0"]),
    "delete": (["delete"], "*delete*", "it is READY, and may cost", ["delete"]),
    "status": (["status"], "*describe*", "the cloud does not say how pod is", []),
    "state": (["status"], "*worker.sh state*", "worker 0 of pod does not answer", []),
}


@pytest.mark.parametrize("case", FAILS)
def test_a_call_fails(case, cloud, request):
    """It stops there, says so in one line with what to do, and ends with 1."""
    (verb, *rest), pattern, wanted, steps = FAILS[case]
    if verb != "create":
        request.getfixturevalue("pod")
    cloud.says(fail=[pattern])
    quick = QUICK if verb in ("create", "setup") else []
    result = cloud("tpu.sh", verb, *(rest or [*POD, *quick]))
    assert [x for x in cloud.steps if x != "pip"] == steps
    if not wanted:  # borne: a node that has just come may be starting its ssh
        assert result.status == 0, result.err
        return
    assert result.status == 1, result.err
    (line,) = result.errors
    assert wanted in line


def test_a_create_that_comes_half_the_way_is_told(cloud):
    """gcloud ends with an error, and the request is in the queue all the same."""
    cloud.says(queued=["ABSENT", "ACCEPTED"], fail=["*queued-resources create*"])
    result = cloud("tpu.sh", "create", *POD, *QUICK)
    assert result.status == 1
    assert result.errors == [
        "error: creating pod failed, and left it ACCEPTED: "
        "bash launch/tpu.sh delete --name=pod --zone=us-west4-a"
    ]


# Each call of a re-creation: what it is told as, the short names of a try, and what follows it.
AGAIN = {
    "delete": ("*delete*", "pod could not be deleted, to be made again", ["delete"]),
    "create": ("*queued-resources create*", "pod could not be made again", ["create"]),
    "scp": ("* scp *", "pod is not set up", ["true all", "scp"]),
    "setup": ("*worker.sh setup*", "pod is not set up", ["true all", "scp", "setup all"]),
    "start": (
        "*worker.sh start*",
        "the job did not start on every worker of pod, and was stopped on the others",
        ["start all", "stop all"],
    ),
}
PREEMPTED = "echo SUSPENDED >$CLOUD/queued"
AGAIN_STEPS = ["delete", "create", "true all", "scp", "setup all", "start all"]


def refuse_after_a_preemption(pod, pattern, times, refusal="ERROR: (gcloud) UNAVAILABLE: later"):
    """The job is preempted, and calls that fit the pattern then fail so often."""
    fails = f"for i in {{1..{times}}}; do echo '{pattern}' >>$CLOUD/fail; done"
    pod.jobs([f"{fails}; {PREEMPTED}; exit 75", "exit 0"], ["exit 75", "exit 0"])
    pod.says(refusal=refusal.splitlines())
    result = pod("tpu.sh", *RUN)
    steps = [x for x in pod.steps if x != "pip"]
    assert steps.pop(0) == "start all"
    return result, steps


@linux_only
@pytest.mark.parametrize("case", AGAIN)
def test_a_call_that_fails_twice_while_it_is_made_again_is_borne(pod, case):
    pattern, wanted, tried = AGAIN[case]
    result, steps = refuse_after_a_preemption(pod, pattern, 2)
    assert result.status == 0, result.err
    assert [x for x in result.told if "trying again" in x] == [
        f"{wanted}: ERROR: (gcloud) UNAVAILABLE: later: trying again ({n} of 10)" for n in (1, 2)
    ]
    first = AGAIN_STEPS.index(tried[0])
    assert steps == [*AGAIN_STEPS[:first], *tried, *tried, *AGAIN_STEPS[first:]]
    assert sum("of 20)" in x for x in result.told) == 1, "no preemption of its own"
    assert result.told[-1] == "finished on worker-0: "


@linux_only
@pytest.mark.parametrize("case", AGAIN)
def test_a_call_that_fails_on_and_on_while_it_is_made_again_ends_the_watch(pod, case):
    pattern, wanted, tried = AGAIN[case]
    result, steps = refuse_after_a_preemption(pod, pattern, 99)
    assert result.status == 1
    (line,) = result.errors
    verb = {"delete": "status", "create": "create"}.get(case, "delete")
    why = "tried 10 times: ERROR: (gcloud) UNAVAILABLE: later. To go on: "
    assert line.startswith(f"error: {wanted}, {why}")
    hint = f"bash launch/tpu.sh {verb} --name=pod --zone=us-west4-a"
    if case == "create":
        hint += " --type=v5litepod-16 --spot"
    assert hint in line
    assert sum("trying again" in x for x in result.told) == 9
    assert steps == [*AGAIN_STEPS[: AGAIN_STEPS.index(tried[0])], *10 * tried]
    # And what is told is so.
    pod.says(fail=[])
    if case == "create":
        assert pod("tpu.sh", *shlex.split(hint)[2:], *QUICK).status == 0
    result = pod("tpu.sh", *RUN)
    assert result.status == 0, result.err


@linux_only
@pytest.mark.parametrize(
    "refusal, again",
    [
        ("(gcloud.x.create) unrecognized arguments: --spto (did you mean '--spot'?)\n\n  help", 0),
        ("(gcloud.x.create) argument --accelerator-type: Must be specified.", 0),
        ("(gcloud.x.create) INVALID_ARGUMENT: no such runtime\n- '@type': BadRequest", 0),
        ("(gcloud.x.create) PERMISSION_DENIED: tpu.nodes.create denied\n- reason: IAM", 0),
        ("(gcloud.x.create) PERMISSION_DENIED: Quota 'TPUs' exceeded. Limit: 16.", 9),
        ("(gcloud.x.create) RESOURCE_EXHAUSTED: no more capacity in the zone", 9),
    ],
)
def test_what_no_patience_mends_ends_at_once(pod, refusal, again):
    result, steps = refuse_after_a_preemption(
        pod, "*queued-resources create*", 99, f"ERROR: {refusal}"
    )
    assert result.status == 1 and steps == ["delete", *(1 + again) * ["create"]]
    (line,) = result.errors
    first = refusal.splitlines()[0]
    assert f"pod could not be made again{', tried 10 times' * (again > 0)}: ERROR: {first}" in line
    assert sum("trying again" in x for x in result.told) == again


@linux_only
@pytest.mark.parametrize("where", ["made again", "not there"])
@pytest.mark.parametrize(
    "options",
    [
        ["--create_flags=--internal-ips"],
        ["--create_flags=--internal-ips --labels=a=b", "--version=other", "--project=mine"],
    ],
)
def test_what_is_told_to_create_makes_what_was_asked_for(pod, where, options):
    if where == "made again":
        pod.says(fail=["*queued-resources create*"], refusal=["ERROR: (gcloud) INVALID_ARGUMENT"])
        pod.jobs([f"{PREEMPTED}; exit 75"], ["exit 75"])
    else:
        pod.says(queued=["ABSENT"])
    result = pod("tpu.sh", "run", *POD, *options, *QUICK, *JOB)
    assert result.status == 1
    told = result.errors[-1].partition("bash launch/tpu.sh ")[2].removesuffix(", and run again")
    told = shlex.split(told)
    assert told[0] == "create" and sorted(told[1:]) == sorted([*POD, *options])
    pod.says(queued=["ABSENT"], calls=[])
    assert pod("tpu.sh", *told, *QUICK).status == 0
    assert "--internal-ips" in next(x for x in pod.calls if short(x) == "create")


@linux_only
@pytest.mark.parametrize("call", ["delete", "create"])
def test_a_call_that_fails_and_was_done_all_the_same(pod, call):
    """Each try begins with what is there: nothing is deleted or made twice."""
    pod.jobs([f"{PREEMPTED}; exit 75", "exit 0"], ["exit 75", "exit 0"])
    pod.says(late=[f"*queued-resources {call}*"])
    result = pod("tpu.sh", *RUN)
    assert result.status == 0, result.err
    assert [x for x in pod.steps if x != "pip"] == ["start all", *AGAIN_STEPS]
    assert sum("trying again (1 of 10)" in x for x in result.told) == 1


@linux_only
def test_each_call_of_a_re_creation_has_tries_of_its_own(pod):
    fails = "for i in {1..7}; do printf '%s\\n' '*resources delete*' '*resources create*'; done"
    first = f"{{ {fails}; }} >>$CLOUD/fail; {PREEMPTED}; exit 75"
    pod.jobs([first, "exit 0"], ["exit 75", "exit 0"])
    result = pod("tpu.sh", *RUN)
    assert result.status == 0, result.err
    assert pod.steps.count("delete") == pod.steps.count("create") == 8


@linux_only
def test_requests_that_fail_and_leave_what_is_to_be_deleted_end(pod):
    gcloud = pod.folder / "bin" / "gcloud"
    gcloud.write_text(gcloud.read_text().replace("WAITING_FOR_RESOURCES ACTIVE", "FAILED"))
    pod.jobs([f"{PREEMPTED}; exit 75"], ["exit 75"])
    pod.says(late=["*queued-resources create*"] * 99)
    result = pod("tpu.sh", *RUN)
    assert result.status == 1
    assert "pod could not be made again, tried 10 times" in result.errors[-1]
    assert pod.steps == ["start all", *10 * ["delete", "create"]]


@linux_only
def test_a_deletion_under_way_is_waited_for(pod):
    states = "printf '%s\\n' SUSPENDED DELETING DELETING ABSENT >$CLOUD/queued"
    pod.jobs([f"{states}; exit 75", "exit 0"], ["exit 75", "exit 0"])
    pod.says(fail=["*delete*"])
    result = pod("tpu.sh", *RUN)
    assert result.status == 0, result.err
    assert "pod: DELETING" in result.told
    assert [x for x in pod.steps if x in ("delete", "create")] == ["delete", "create"]


@linux_only
def test_a_start_that_fails_where_the_node_stays_is_borne(pod):
    """After maintenance, with no re-creation: the workers that did start are not taken for a job
    that somebody stopped."""
    fails = "echo '*worker.sh start*' >>$CLOUD/late"
    third = "until [ $(grep -c 'worker.sh. start' $CLOUD/calls) -ge 3 ]; do sleep 0.05; done"
    pod.jobs([f"{fails}; exit 75", third], ["exit 75", third])
    result = pod("tpu.sh", *RUN)
    assert result.status == 0, result.err
    for worker in "01":
        assert f"worker-{worker}: told to save and leave" in result.out
    # One that is still leaving is stopped and started once more.
    assert pod.steps[:4] == ["start all", "start all", "stop all", "start all"]
    assert pod.steps[-1] == "start all"
    assert sum("of 20)" in x for x in result.told) == 1


@linux_only
def test_a_job_that_is_still_leaving_is_not_started_nor_hurried(pod):
    """Told to stop by somebody, it saves in peace."""
    saves = "until [ -e $CLOUD/saved ]; do sleep 0.05; done; exit 75"
    leave = f"trap '{saves}' TERM; echo step 7; while true; do sleep 0.05; done"
    pod.jobs([leave], [leave])
    assert pod("tpu.sh", "run", *POD, *QUICK, "--nowatch", *JOB).status == 0
    deadline = time.monotonic() + 60
    jobs = [pod.folder / "worker" / n / "cfg_jax_job" for n in "01"]
    while not all("step 7" in (job / "log").read_text() for job in jobs):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert pod("tpu.sh", "stop", *POD).status == 0
    result = pod("tpu.sh", *RUN)
    assert result.status == 1 and "did not start on every worker of pod" in result.errors[-1]
    assert "error: the job on worker-0 was told to stop, and is still leaving" in result.errors
    assert "worker-0: was told before" in result.out
    ends = [job / "status" for job in jobs]
    assert not any(end.exists() for end in ends)
    (pod.folder / "saved").touch()
    while not all(end.exists() for end in ends):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert [end.read_text() for end in ends] == ["75\n", "75\n"]


@pytest.mark.parametrize(
    "states, verb, wanted",
    [
        ({"queued": ["ABSENT", "FAILED"]}, "create", "is FAILED, and will not come"),
        ({"queued": ["ACTIVE"], "node": ["READY"]}, "create", "is there already, READY"),
        ({"queued": ["ABSENT"]}, "setup", "is not there: bash launch/tpu.sh create --name=pod"),
        ({"queued": ["ABSENT"]}, "run", "is not there: bash launch/tpu.sh create --name=pod"),
        ({"queued": ["ACTIVE"], "node": ["STOPPED"]}, "run", "is STOPPED, by somebody's hand"),
        ({"queued": ["SUSPENDED"]}, "setup", "is SUSPENDED, and will not come"),
    ],
)
def test_states_in_which_a_verb_can_do_nothing(cloud, states, verb, wanted):
    if verb == "create" and states["queued"][-1] == "FAILED":
        created = (cloud.folder / "bin" / "gcloud").read_text()
        plain = "WAITING_FOR_RESOURCES ACTIVE"
        (cloud.folder / "bin" / "gcloud").write_text(created.replace(plain, "FAILED"))
    cloud.says(**states)
    result = cloud("tpu.sh", verb, *POD, *QUICK, *(JOB if verb == "run" else []))
    assert result.status == 1
    (line,) = result.errors
    assert wanted in line
    assert set(cloud.steps) <= {"create"}


def test_logs_status_and_delete(pod):
    result = pod("tpu.sh", "status", *POD)
    assert result.out.splitlines()[-1] == "job: none on worker-0: "
    for worker in "01":
        job = pod.folder / "worker" / worker / "cfg_jax_job"
        job.mkdir()
        (job / "log").write_text(f"one\nlog of {worker}\n")
    result = pod("tpu.sh", "logs", *POD, "--worker=1", "--lines=1", "--nofollow")
    assert result.out == "log of 1\n"
    assert pod("tpu.sh", "delete", *POD).status == 0
    result = pod("tpu.sh", "status", *POD)
    assert result.out.splitlines() == ["queued resource: not there", "node: not there"]
    result = pod("tpu.sh", "delete", *POD)
    assert result.status == 0 and "nothing to delete" in result.told[-1]
    assert pod.steps == ["tail 1", "delete"]
    pod.says(node=["READY"])  # made without a queue
    assert pod("tpu.sh", "delete", *POD).status == 0
    assert pod.calls[-1][:5] == ["gcloud", "compute", "tpus", "tpu-vm", "delete"]


# The workers, and what is shipped


@linux_only
def test_a_worker_without_a_new_python_gets_one(cloud):
    home = cloud.folder / "worker" / "0"
    (home / "cfg_jax.next").mkdir(parents=True)
    bare = cloud.folder / "bare"
    bare.mkdir()
    for name in ("bash", "cp", "rm", "mv", "mkdir", "cat", "grep", "tail", "dirname"):
        (bare / name).symlink_to(shutil.which(name))
    (bare / "gcloud").symlink_to(cloud.folder / "bin" / "recorder")
    (bare / "hostname").symlink_to(cloud.folder / "bin" / "hostname")
    python = bare / "python3"  # 3.10: what is asked of it fails, but for its modules
    uv = 'mkdir -p cfg_jax_env/bin && cp "$CLOUD/bin/pip" cfg_jax_env/bin'
    python.write_text(
        '#!/bin/bash\nprintf "%s " python3 "$@" >>"$CLOUD/calls"; echo >>"$CLOUD/calls"\n'
        f'case "$*" in -c*) exit 1 ;; *"uv venv"*) {uv} ;; esac\n'
    )
    python.chmod(0o755)
    env = cloud.env(HOME=str(home), PATH=str(bare))
    setup = ["bash", str(ROOT / "launch" / "worker.sh"), "setup", "--data=gs://bucket/data"]
    done = subprocess.run(setup, env=env, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    calls = [shlex.join(x) for x in cloud.calls if "-c" not in x[:2]]
    assert calls[0].endswith("-m pip install --quiet --disable-pip-version-check --user uv")
    assert calls[1].endswith("-m uv venv --quiet --clear --seed --python 3.11 cfg_jax_env")
    assert calls[2].startswith("pip install")
    assert calls[3] == "gcloud storage rsync --recursive gs://bucket/data tensorflow_datasets"
    (home / "cfg_jax.next").mkdir()
    cloud.says(**{"status.gcloud": ["1"]})
    done = subprocess.run(setup, env=env, text=True, capture_output=True)
    assert done.returncode == 1 and "error: the data did not come to worker-0" in done.stderr


def test_what_is_packed_is_the_checkout_as_it_stands(cloud, tmp_path):
    work = tmp_path / "work"
    shutil.copytree(cloud.checkout, work)
    git(work, "add", "--all")
    git(work, "-c", "user.name=x", "-c", "user.email=x@x", "commit", "--quiet", "-m", "x")
    (work / "code.py").write_text("changed\n")
    (work / "staged.py").write_text("staged\n")
    git(work, "add", "staged.py")
    (work / "new.py").write_text("new\n")
    (work / "launch" / "test.sh").unlink()
    (work / "runs").mkdir()
    (work / "runs" / "big").write_text("ignored\n")

    def status():
        command = ["git", "-C", work, "status", "--porcelain"]
        return subprocess.run(command, capture_output=True, check=True).stdout

    before = status()
    pack = ["bash", "launch/pack.sh", "runs/launch/pod.tar.gz"]
    subprocess.run(pack, cwd=work, env=cloud.env(), check=True)
    with tarfile.open(work / "runs" / "launch" / "pod.tar.gz") as tar:
        names = set(tar.getnames())
        assert tar.extractfile("code.py").read() == b"changed\n"
    assert {"staged.py", "new.py", "launch/pack.sh"} <= names
    assert not {"launch/test.sh", "runs", "runs/big"} & names
    assert status() == before
    shutil.rmtree(work / ".git")
    done = subprocess.run(pack, cwd=work, env=cloud.env(), text=True, capture_output=True)
    assert done.returncode == 2 and "not a git checkout" in done.stderr


# Slurm


def test_slurm_submits(cloud):
    args = ["--nodes=4", "--gpus_per_node=8", "--", "--config=imagenet64", "--workdir=DIR"]
    assert cloud("slurm.sh", *args).status == 0
    (call,) = cloud.calls
    dry = cloud("slurm.sh", "--dry_run", *args).out.splitlines()
    assert shlex.split(dry[1]) == call
    # A task a GPU, all GPUs of the node in sight of each, and SIGTERM for the steps alone.
    assert {"--ntasks-per-node=8", "--gpus-per-node=8", "--requeue", "--signal=TERM@120"} <= set(
        call
    )
    cloud.says(**{"status.sbatch": ["1"]})
    result = cloud("slurm.sh", *args)
    assert result.status == 1 and "was not submitted" in result.errors[0]


@pytest.mark.parametrize(
    "srun, restarts, calls, status, wanted",
    [
        (0, "0", ["srun"], 0, ""),
        (75, "0", ["srun", "scontrol", "sleep"], 0, "queued again (1 of 20)"),
        (143, "19", ["srun", "scontrol", "sleep"], 0, "queued again (20 of 20)"),
        (75, "20", ["srun"], 1, "--max_reruns=20 are used up"),
        (2, "0", ["srun"], 2, "ended with status 2, by itself"),
        (137, "0", ["srun"], 137, "ended with status 137, by itself"),
    ],
)
def test_slurm_in_the_job(cloud, tmp_path, srun, restarts, calls, status, wanted):
    """As Slurm runs it: a copy far from the checkout."""
    copy = tmp_path / "slurm_script"
    shutil.copy(ROOT / "launch" / "slurm.sh", copy)
    (cloud.folder / "bin" / "sleep").symlink_to("recorder")
    cloud.says(**{"status.srun": [str(srun)]})
    job = ["--in_job", "20", "python", "train", "--config=digits", "--workdir=a b"]
    env = cloud.env(SLURM_JOB_ID="7", SLURM_RESTART_COUNT=restarts, SLURM_CPUS_PER_TASK="12")
    done = subprocess.run(["bash", copy, *job], env=env, text=True, capture_output=True)
    assert done.returncode == status, done.stderr
    assert [x[0] for x in cloud.calls] == calls and wanted in done.stderr
    assert cloud.calls[0] == [
        *("srun", "--cpus-per-task=12", "--kill-on-bad-exit=0", "python", "-m", "cfg_jax.train"),
        *("--config=digits", "--workdir=a b"),
    ]
    if "scontrol" in calls:
        assert cloud.calls[1] == ["scontrol", "requeue", "7"]


@pytest.mark.parametrize("failures, status", [(2, 0), (99, 1)])
def test_slurm_that_does_not_queue_again(cloud, failures, status):
    (cloud.folder / "bin" / "sleep").symlink_to("recorder")
    cloud.says(**{"status.srun": ["75"], "status.scontrol": ["1"] * failures + ["0"]})
    result = cloud("slurm.sh", "--in_job", "20", "python", "train", "--x=1", SLURM_JOB_ID="7")
    assert result.status == status, result.err
    slept = [float(x[1]) for x in cloud.calls if x[0] == "sleep"]
    asked = sum(x[0] == "scontrol" for x in cloud.calls)
    if status:
        assert "asked 10 times: submit it again" in result.errors[0] and asked == 10
        assert sum(slept) < 120, "--leave, of which saving has had its part"
    else:
        assert slept == [10, 10, 300] and asked == 3 and not result.errors
    # Slurm may end it at any of them: each says by itself what to do.
    refused = [x for x in result.told if "trying again" in x]
    assert len(refused) == min(failures, 9)
    assert all(x.endswith("submit it again if nothing follows this line") for x in refused)


# Kubernetes

JOBSET = ["--name=cfg", "--image=i:1", "--topology=v5e:4x8"]


def manifest(text):
    (document,) = yaml.safe_load_all(text)
    return document


def test_jobset_yaml_is_yaml_before_it_is_filled_in():
    assert manifest((ROOT / "launch" / "jobset.yaml").read_text())["kind"] == "JobSet"


def test_jobset_is_applied(cloud):
    odd = ["--config.x=a: 'b' \"c\" \\d ${NAME} & #e", "--config.y=[1, 2]"]
    env = ["--env=ONE=1", '--env=TWO=say "2"']
    result = cloud("jobset.sh", *JOBSET, *env, "--workdir=gs://bucket/run", "--", *odd)
    assert result.status == 0, result.err
    assert cloud.calls == [["kubectl", "apply", "--filename=-"]]
    text = (cloud.folder / "fed.kubectl").read_text()
    dry = cloud("jobset.sh", *JOBSET, *env, "--workdir=gs://bucket/run", "--dry_run", "--", *odd)
    assert dry.out == f"kubectl apply --filename=- <<'EOF'\n{text}EOF\n"

    spec = manifest(text)["spec"]
    assert spec["failurePolicy"]["maxRestarts"] == 20
    job = spec["replicatedJobs"][0]["template"]["spec"]
    assert job["completions"] == job["parallelism"] == 8
    assert job["backoffLimit"] == 0 and job["completionMode"] == "Indexed"
    pod = job["template"]["spec"]
    assert pod["restartPolicy"] == "Never"
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5-lite-podslice",
        "cloud.google.com/gke-tpu-topology": "4x8",
    }
    assert not {"tolerations", "initContainers", "volumes"} & set(pod)
    (container,) = pod["containers"]
    (rule,) = job["podFailurePolicy"]["rules"]
    assert rule["onExitCodes"]["containerName"] == container["name"]
    assert container["image"] == "i:1" and container["command"] == ["python", "-m", "cfg_jax.train"]
    assert container["args"] == ["--workdir=gs://bucket/run", *odd, "--unfinished_status=75"]
    assert container["env"] == [
        {"name": "ONE", "value": "1"},
        {"name": "TWO", "value": 'say "2"'},
    ]
    chips = {"google.com/tpu": 4}
    assert container["resources"] == {"requests": chips, "limits": chips}

    cloud.says(**{"status.kubectl": ["1"]})
    result = cloud("jobset.sh", *JOBSET, *JOB)
    assert result.status == 1 and "cfg was not applied" in result.errors[0]


def test_jobset_on_spot_with_data(cloud):
    result = cloud("jobset.sh", *JOBSET, "--spot", "--data=gs://bucket/data", *JOB)
    assert result.status == 0, result.err
    text = (cloud.folder / "fed.kubectl").read_text()
    pod = manifest(text)["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    assert pod["nodeSelector"]["cloud.google.com/gke-spot"] == "true"
    assert pod["tolerations"][0]["key"] == "cloud.google.com/gke-spot"
    assert "gs://bucket/data" in pod["initContainers"][0]["command"]
    assert pod["containers"][0]["env"] == [{"name": "TFDS_DATA_DIR", "value": "/data"}]
    mounts = [x["volumeMounts"] for x in (pod["initContainers"][0], pod["containers"][0])]
    assert mounts[0] == mounts[1] == [{"name": "data", "mountPath": "/data"}]


@pytest.mark.parametrize(
    "topology, more, hosts, chips, accelerator",
    [
        ("v5e:1x1", [], 1, 1, "tpu-v5-lite-podslice"),
        ("v5e:2x4", ["--chips_per_host=8"], 1, 8, "tpu-v5-lite-podslice"),
        ("v5e:16x16", [], 64, 4, "tpu-v5-lite-podslice"),
        ("v4:4x4x4", [], 16, 4, "tpu-v4-podslice"),
        ("v5p:4x4x4", [], 16, 4, "tpu-v5p-slice"),
        ("v6e:4x4", [], 4, 4, "tpu-v6e-slice"),
    ],
)
def test_jobset_hosts_and_chips(cloud, topology, more, hosts, chips, accelerator):
    args = ["--name=cfg", "--image=i", f"--topology={topology}", *more, "--dry_run", *JOB]
    text = cloud("jobset.sh", *args).out
    job = manifest(text.split("\n", 1)[1].removesuffix("EOF\n"))
    job = job["spec"]["replicatedJobs"][0]["template"]["spec"]
    pod = job["template"]["spec"]
    assert job["completions"] == hosts
    assert pod["containers"][0]["resources"]["limits"] == {"google.com/tpu": chips}
    assert pod["nodeSelector"]["cloud.google.com/gke-tpu-accelerator"] == accelerator
    assert pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"] == topology.split(":")[1]


# Bad input

TPU = ["--name=pod", "--zone=us-west4-a", "--type=v4-8"]
BAD = {
    "tpu.sh": {
        "verb": (["crate"], ["'crate'", "create, setup, run"]),
        "option": (["create", "--nmae=pod"], ["--nmae", "--name"]),
        "no name": (["create"], ["--name is missing"]),
        "name": (["create", "--name=Pod_1"], ["--name=Pod_1", "a-z"]),
        "no value": (["create", "--name"], ["--name=value"]),
        "empty": (["create", "--name="], ["--name is empty"]),
        "no zone": (["create", "--name=pod"], ["--zone is missing"]),
        "zone": (["create", "--name=pod", "--zone=us-west4"], ["--zone=us-west4", "us-west4-a"]),
        "no type": (["create", *TPU[:2]], ["--type is missing"]),
        "type by plan's name": (["create", *TPU[:2], "--type=v5e-16"], ["v5litepod-16"]),
        "type": (["create", *TPU[:2], "--type=h100-8"], ["--type=h100-8", "v5p-N"]),
        "switch": (["create", *TPU, "--spot=1"], ["--spot takes no value"]),
        "stray word": (["create", *TPU, "now"], ["'now'", "--name=value"]),
        "another verb's option": (["create", *TPU, "--worker=1"], ["--worker"]),
        "data": (["setup", *TPU, "--data=/data"], ["--data=/data", "gs://"]),
        "worker": (["logs", *TPU, "--worker=first"], ["--worker=first", "all"]),
        "lines": (["logs", *TPU, "--lines=-1"], ["--lines=-1"]),
        "poll": (["run", *TPU, "--poll=1m", *JOB], ["--poll=1m", "seconds"]),
        "reruns": (["run", *TPU, "--max_reruns=x", *JOB], ["--max_reruns=x"]),
        "env": (["run", *TPU, "--env=X", *JOB], ["--env=X", "NAME=VALUE"]),
        "job": (["run", *TPU, "--job=trian", *JOB], ["--job=trian", "train"]),
        "no workdir": (["run", *TPU], ["--workdir", "gs://BUCKET/FOLDER"]),
        "workdir on a disk": (["run", *TPU, "--", "--workdir=run"], ["--workdir=run", "gs://"]),
        "workdir twice": (["run", *TPU, "--workdir=gs://a/b", *JOB], ["twice", "gs://a/b"]),
        "the job's flag": (["run", *TPU, "--config=digits"], ["--config=digits", "after --"]),
        "the job's word": (["run", *TPU, *JOB, "digits"], ["'digits'"]),
        "flags for delete": (["delete", *TPU, *JOB], ["delete takes no flags"]),
    },
    "slurm.sh": {
        "option": (["--gpus=8", "--", "--workdir=x"], ["--gpus", "--gpus_per_node"]),
        "nodes": (["--nodes=0", "--", "--workdir=x"], ["--nodes=0"]),
        "gpus": (["--gpus_per_node=all", "--", "--workdir=x"], ["--gpus_per_node=all"]),
        "cpus": (["--cpus_per_gpu=x", "--", "--workdir=x"], ["--cpus_per_gpu=x"]),
        "leave": (["--leave=2m", "--", "--workdir=x"], ["--leave=2m"]),
        "no workdir": (["--nodes=2", "--", "--config=digits"], ["--workdir=FOLDER"]),
        "job": (["--job=plan", "--", "--workdir=x"], ["--job=plan"]),
        "the job's flag": (["--config=digits"], ["after --"]),
    },
    "jobset.sh": {
        "no name": (["--image=i"], ["--name is missing"]),
        "name": (["--name=Cfg", "--image=i"], ["--name=Cfg"]),
        "no image": (["--name=cfg"], ["--image is missing", "docker build"]),
        "no topology": (["--name=cfg", "--image=i"], ["--topology is missing"]),
        "topology": (["--name=cfg", "--image=i", "--topology=4x4"], ["--topology=4x4", "v5e:AxB"]),
        "dimensions": (["--name=cfg", "--image=i", "--topology=v4:4x4"], ["v4:4x4", "AxBxC"]),
        "sides": (["--name=cfg", "--image=i", "--topology=v5e:0x4"], ["v5e:0x4"]),
        "chips": ([*JOBSET, "--chips_per_host=3", *JOB], ["--chips_per_host=3", "1, 4 or 8"]),
        "chips that do not divide": (
            ["--name=cfg", "--image=i", "--topology=v5e:2x2", "--chips_per_host=8", *JOB],
            ["must divide the 4 chips"],
        ),
        "workdir on a disk": ([*JOBSET, "--", "--workdir=run"], ["--workdir=run", "gs://"]),
        "data": ([*JOBSET, "--data=/data", *JOB], ["--data=/data", "gs://"]),
        "option": ([*JOBSET, "--zone=x", *JOB], ["--zone", "--namespace"]),
    },
}


@pytest.mark.parametrize("script, case", [(s, c) for s, cases in BAD.items() for c in cases])
def test_bad_input(script, case, cloud):
    args, wanted = BAD[script][case]
    result = cloud(script, *args)
    assert result.status == 2, result.err
    assert result.out == "" and cloud.calls == []
    (line,) = result.err.splitlines()
    assert line.startswith("error: ")
    for word in wanted:
        assert word in line


@pytest.mark.parametrize("script", BAD)
def test_help_is_the_head_of_the_script(script, cloud):
    for args in ([], ["--help"]):
        result = cloud(script, *args)
        assert result.status == 0 and result.err == ""
        assert f"bash launch/{script}" in result.out and "--dry_run" in result.out
        assert "set -euo" not in result.out and not result.out.startswith("#")


def test_shells_are_clean():
    """shellcheck, of the extra [test]."""
    beside = Path(sys.executable).with_name("shellcheck")
    command = str(beside) if beside.exists() else shutil.which("shellcheck")
    assert command, 'pip install -e ".[test]" brings shellcheck'
    shells = [*(ROOT / "launch").glob("*.sh"), ROOT / ".ci" / "run", *(FIXTURES / "bin").iterdir()]
    subprocess.run([command, *shells], cwd=ROOT, check=True)
