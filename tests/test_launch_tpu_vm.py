"""launch/tpu_vm.sh against a gcloud that acts out a slice of three workers: their home directories and processes are of this machine."""

import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.launching import ROOT, Cloud, interrupt, until

GCLOUD = r"""
product=$3 verb=$4
for argument in "$@"; do
    case $argument in
        --zone=*) zone=${argument#--zone=} ;;
        --worker=*) worker=${argument#--worker=} ;;
        --command=*) command=${argument#--command=} ;;
    esac
done
refuse() { echo "ERROR: (gcloud.compute.tpus.$product.$verb) $1" >&2; exit 1; }
[ "$1" = compute ] || exit 1
[ "$zone" = here ] || refuse "PERMISSION_DENIED: Permission denied on 'locations/$zone' (or it may not exist)."
unseen() { # whether this look is one of as many as "flaky" says that fail
    left=$(cat "$CLOUD/flaky" 2>/dev/null) && [ "$left" -gt 0 ] || return 1
    echo $((left - 1)) > "$CLOUD/flaky"
    echo "ERROR: (gcloud.compute.tpus.$product.$verb) UNAVAILABLE: The service is currently unavailable." >&2
}
gone() {
    for pid in "$CLOUD"/workers/*/.ldm_jax_jobs/*/pid; do if [ -e "$pid" ]; then kill -KILL -- "-$(cat "$pid")" 2>/dev/null; fi; done
    rm -rf "$CLOUD/slice" "$CLOUD/queue" "$CLOUD/workers" "$CLOUD/dead"
}
machines() { for i in 0 1 2; do mkdir -p "$CLOUD/workers/$i"; done; echo "$1" > "$CLOUD/slice"; }
case "$product $verb" in
    "queued-resources describe")
        [ -e "$CLOUD/queue" ] || refuse "NOT_FOUND: Resource was not found"
        if unseen; then exit 1; fi
        cat "$CLOUD/queue"
        case $(cat "$CLOUD/queue") in
            WAITING_FOR_RESOURCES) echo PROVISIONING > "$CLOUD/queue" ;;
            PROVISIONING) echo ACTIVE > "$CLOUD/queue"; machines READY ;;
        esac ;;
    "queued-resources create") echo WAITING_FOR_RESOURCES > "$CLOUD/queue" ;;
    "tpu-vm describe")
        [ -e "$CLOUD/slice" ] || refuse "NOT_FOUND: Resource was not found"
        if unseen; then exit 1; fi
        cat "$CLOUD/slice"
        if [ "$(cat "$CLOUD/slice")" = CREATING ]; then echo READY > "$CLOUD/slice"; fi ;;
    "tpu-vm create")
        if [ -e "$CLOUD/quota" ]; then
            rm "$CLOUD/quota"
            refuse "RESOURCE_EXHAUSTED: Quota limit 'TPUV5sLitepodPerProjectPerZone' has been exceeded. Limit: 0"
        fi
        machines CREATING ;;
    "queued-resources delete")
        [ -e "$CLOUD/queue" ] || refuse "NOT_FOUND: Resource was not found"
        gone ;;
    "tpu-vm delete")
        [ ! -e "$CLOUD/queue" ] || refuse "FAILED_PRECONDITION: the node belongs to a queued resource"
        [ -e "$CLOUD/slice" ] || refuse "NOT_FOUND: Resource was not found"
        gone ;;
    "tpu-vm scp") for i in 0 1 2; do cp "$5" "$CLOUD/workers/$i/${6#*:}"; done ;;
    "tpu-vm ssh")
        [ "$(cat "$CLOUD/slice")" = READY ] || { echo "ssh: connect to host: Connection timed out" >&2; exit 255; }
        for i in 0 1 2; do
            if [ "$worker" = all ] || [ "$worker" = $i ]; then
                if grep -qs $i "$CLOUD/dead"; then
                    echo "ssh: connect to host: Connection timed out" >&2
                    failed=255
                    continue
                fi
                # The connection is lost, and the command runs on.
                if [ -e "$CLOUD/lose" ] && [[ $command = *"worker.sh $(cat "$CLOUD/lose")"* ]]; then
                    cd "$CLOUD/workers/$i" && HOME=$PWD PATH=$CLOUD/on_worker:$PATH setsid bash -c "$command" > /dev/null 2>&1 &
                    lost=1
                    continue
                fi
                # Through a pipe, as ssh ends when nothing holds the other end of it any more.
                (
                    cd "$CLOUD/workers/$i" && HOME=$PWD PATH=$CLOUD/on_worker:$PATH bash -c "$command" 3>&- | cat
                    exit ${PIPESTATUS[0]}
                ) || failed=$?
            fi
        done
        if [ -n "$lost" ]; then rm "$CLOUD/lose"; exit 255; fi
        if [ -e "$CLOUD/drop" ] && [[ $command = *"worker.sh $(cat "$CLOUD/drop")"* ]]; then rm "$CLOUD/drop"; exit 255; fi
        exit ${failed:-0} ;;
    *) exit 1 ;;
esac
"""
# Each worker of the job notes that it was started, as the which-th one there, and does what the test says for this attempt.
JOB = """#!/bin/bash
me=$(basename "$HOME")
echo "$me" >> "$CLOUD/started"
attempt=$(grep -c "^$me$" "$CLOUD/started")
echo "attempt $attempt of worker $me: $*"
act() { eval "$1"; }
trap 'exit 75' TERM
while [ ! -e "$CLOUD/go" ]; do sleep 0.02; done
"""
WATCHED = 'until grep -q "worker.sh log" "$CLOUD/calls"; do sleep 0.02; done; '
RUN = ("run", "job", "--workdir", "gs://bucket/run")


@pytest.fixture
def cloud(tmp_path: Path) -> Iterator[Cloud]:
    made = Cloud(tmp_path / "cloud", {"gcloud": GCLOUD})
    (made.path / "on_worker").mkdir()
    made.script("on_worker/make", '#!/bin/bash\necho "make $*" >> "$CLOUD/installed"\n')
    made.script("on_worker/python3", '#!/bin/bash\necho "python3 $*" >> "$CLOUD/installed"\n')
    (made.path / "go").touch()
    yield made
    made.run("tpu_vm.sh", "delete", TPU="pod", ZONE="here")  # and its processes


def does(cloud: Cloud, *attempts: str) -> dict[str, str]:
    """The job does `attempts[i]` in its i-th attempt, the last in all further ones; the variables to run it with."""
    cases = "".join(f"{i}) {text} ;;\n" for i, text in enumerate(attempts[:-1], 1))
    cloud.script("bin/job", f"{JOB}case $attempt in\n{cases}*) {attempts[-1]} ;;\nesac\n")
    return {"TPU": "pod", "ZONE": "here", "TYPE": "v5litepod-16"}


def verbs(cloud: Cloud) -> list[str]:
    """What gcloud was asked to do, but for looks."""
    said = [call[4] for call in cloud.calls() if call[1] == "compute"]
    return [verb for verb in said if verb not in ("describe", "ssh")]


def looks_at_all(cloud: Cloud) -> list[list[str]]:
    """The calls that ask all workers how their job is."""
    return [call for call in cloud.calls() if call[-1].endswith("worker.sh status") and "--worker=all" in call]


def test_a_slice_is_made_preempted_made_again_and_deleted(cloud: Cloud) -> None:
    preempted = 'if [ $me = 1 ]; then echo PREEMPTED > "$CLOUD/slice"; fi; sleep 100'
    done = cloud.run("tpu_vm.sh", *RUN, **does(cloud, preempted, "exit 0"), DELETE="1", SPOT="1")
    assert done.returncode == 0, done.stderr
    assert verbs(cloud) == ["create", "scp", "delete", "create", "scp", "delete"]
    assert sorted(cloud.lines("started")) == ["0", "0", "1", "1", "2", "2"]
    assert "PREEMPTED" in done.stderr and "attempt 2 of worker 0: --workdir gs://bucket/run --coordinator auto" in done.stdout
    created = next(call for call in cloud.calls() if "create" in call)
    assert created[3:6] == ["tpu-vm", "create", "pod"]
    assert created[6:] == ["--zone=here", "--version=v2-alpha-tpuv5-lite", "--accelerator-type=v5litepod-16", "--spot"]
    assert cloud.lines("installed").count("make ACCELERATOR=tpu .venv/.tpu") == 6
    assert not (cloud.path / "slice").exists()


def test_a_queued_resource_is_waited_for_and_made_anew_after_its_suspension(cloud: Cloud) -> None:
    suspended = 'if [ $me = 0 ]; then echo SUSPENDED > "$CLOUD/queue"; echo PREEMPTED > "$CLOUD/slice"; fi; sleep 100'
    done = cloud.run("tpu_vm.sh", *RUN, **does(cloud, suspended, "exit 0"), QUEUED="1", RESERVED="1", DELETE="1", PROJECT="mine")
    assert done.returncode == 0, done.stderr
    asked = [call[3:5] for call in cloud.calls() if "queued-resources" in call and "describe" not in call]
    assert asked == [["queued-resources", verb] for verb in ("create", "delete", "create", "delete")]
    created = next(call for call in cloud.calls() if "create" in call)
    assert {"--node-id=pod", "--runtime-version=v2-alpha-tpuv5-lite", "--reserved", "--project=mine"} < set(created)
    assert "PROVISIONING" in done.stderr


def test_a_wrong_zone_shows_the_tools_own_error(cloud: Cloud) -> None:
    done = cloud.run("tpu_vm.sh", *RUN, **does(cloud, "exit 0") | {"ZONE": "nowhere"})
    assert done.returncode == 1 and len(cloud.calls()) == 1
    assert "Permission denied on 'locations/nowhere' (or it may not exist)" in done.stderr


def test_missing_quota_shows_the_tools_own_error(cloud: Cloud) -> None:
    (cloud.path / "quota").touch()
    done = cloud.run("tpu_vm.sh", *RUN, **does(cloud, "exit 0"))
    assert done.returncode == 1 and "Quota limit 'TPUV5sLitepodPerProjectPerZone' has been exceeded" in done.stderr
    assert [call[4] for call in cloud.calls()] == ["describe", "create", "describe"] and "costs money" not in done.stderr


def test_no_capacity_after_a_preemption_is_waited_for(cloud: Cloud) -> None:
    preempted = 'if [ $me = 0 ]; then touch "$CLOUD/quota"; echo PREEMPTED > "$CLOUD/slice"; fi; sleep 100'
    done = cloud.run("tpu_vm.sh", *RUN, **does(cloud, preempted, "exit 0"))
    assert done.returncode == 0 and verbs(cloud).count("create") == 3 and "Quota limit" in done.stderr, done.stderr


@pytest.mark.parametrize("queued", ["", "1"], ids=["slice", "queued"])
def test_looks_that_fail_lose_nothing_that_was_asked_for(cloud: Cloud, queued: str) -> None:
    (cloud.path / "flaky").write_text("20")
    done = cloud.run("tpu_vm.sh", *RUN, **does(cloud, "exit 0"), QUEUED=queued)
    assert done.returncode == 0 and sorted(cloud.lines("started")) == ["0", "1", "2"], done.stderr
    (cloud.path / "flaky").write_text("1000")
    done = cloud.run("tpu_vm.sh", "up", **does(cloud, "exit 0"), QUEUED=queued, POLL="0")
    assert done.returncode == 1 and "UNAVAILABLE" in done.stderr and len(verbs(cloud)) == 2
    (cloud.path / "flaky").unlink()


def test_a_request_in_the_queue_is_neither_forgotten_nor_left(cloud: Cloud) -> None:
    cloud.script("bin/sleep", '#!/bin/bash\nif [ -e "$CLOUD/queue" ]; then echo 1000 > "$CLOUD/flaky"; fi\n')
    done = cloud.run("tpu_vm.sh", *RUN, **does(cloud, "exit 0"), QUEUED="1", POLL="0")
    assert done.returncode == 1 and (cloud.path / "queue").exists()
    hint = done.stderr.splitlines()[-1]
    assert f"costs money until `env TPU=pod ZONE=here {ROOT}/launch/tpu_vm.sh delete`" in hint
    (cloud.path / "flaky").unlink()
    assert cloud.run("tpu_vm.sh", "status", TPU="pod", ZONE="here").stdout == "PROVISIONING\n"
    assert cloud.run("tpu_vm.sh", "delete", TPU="pod", ZONE="here").returncode == 0 and not (cloud.path / "queue").exists()


def test_what_cannot_be_seen_of_a_work_directory_ends_nothing(cloud: Cloud) -> None:
    (cloud.path / "drop").write_text("progress")
    done = cloud.run("tpu_vm.sh", "run", "job", "--workdir=run", **does(cloud, "exit 0"))
    assert done.returncode == 0 and not (cloud.path / "drop").exists(), done.stderr


def test_a_slice_that_has_lost_a_worker_is_replaced(cloud: Cloud) -> None:
    """It stays READY; the others see that one is lost, and end."""
    lost = WATCHED + 'if [ $me = 1 ]; then echo 1 > "$CLOUD/dead"; sleep 100; fi; sleep 0.5; echo "error: process 1 is lost"; exit 1'
    done = cloud.run("tpu_vm.sh", *RUN, **does(cloud, lost, "exit 0"), DELETE="1", GRACE="1")
    assert done.returncode == 0, done.stderr
    assert verbs(cloud) == ["create", "scp", "delete", "create", "scp", "delete"]
    assert "error: process 1 is lost" in done.stdout and "not all of its workers answer" in done.stderr
    assert "costs money" not in done.stderr


def test_a_job_whose_workers_do_not_all_answer_is_left_alone_while_it_runs(cloud: Cloud) -> None:
    env = does(cloud, WATCHED + 'echo 1 > "$CLOUD/dead"; while [ ! -e "$CLOUD/end" ]; do sleep 0.02; done; rm -f "$CLOUD/dead"; exit 0')
    watcher = cloud.start("tpu_vm.sh", *RUN, **env, GRACE="1", POLL="0")
    until(lambda: len(looks_at_all(cloud)) > 35)
    assert watcher.poll() is None
    (cloud.path / "end").touch()
    said, _ = watcher.communicate(timeout=60)
    assert watcher.returncode == 0 and verbs(cloud) == ["create", "scp"], said


def test_a_slice_of_which_nobody_answers_is_left_with_a_hint(cloud: Cloud) -> None:
    done = cloud.run("tpu_vm.sh", *RUN, **does(cloud, WATCHED + 'echo 012 > "$CLOUD/dead"; sleep 100'), POLL="0")
    assert done.returncode == 1 and "cannot be reached" in done.stderr and verbs(cloud) == ["create", "scp"]
    assert "costs money" in done.stderr.splitlines()[-1]


def test_bad_input_is_final(cloud: Cloud) -> None:
    done = cloud.run("tpu_vm.sh", *RUN, **does(cloud, "if [ $me = 2 ]; then echo 'error: no such file'; exit 2; fi; exit 1"))
    assert done.returncode == 2 and cloud.lines("started").count("0") == 1
    assert "error: no such file" in done.stderr and "costs money" in done.stderr and "delete" not in verbs(cloud)


def test_a_stop_with_a_checkpoint_is_gone_on_from(cloud: Cloud) -> None:
    done = cloud.run("tpu_vm.sh", *RUN, **does(cloud, "exit 75", "if [ $me = 1 ]; then exit 75; fi; exit 1", "exit 0"))
    assert done.returncode == 0, done.stderr
    assert cloud.lines("started").count("0") == 3 and verbs(cloud).count("create") == 1


@pytest.mark.slow
def test_faults_are_tried_again_as_long_as_there_are_new_checkpoints(cloud: Cloud) -> None:
    env = does(cloud, "exit 9")
    done = cloud.run("tpu_vm.sh", *RUN, **env, RETRIES="1")
    assert done.returncode == 9 and cloud.lines("started").count("0") == 2 and "given up" in done.stderr
    (cloud.path / "started").unlink()
    steps = "if [ $attempt -lt 4 ]; then mkdir -p run/checkpoints/$attempt run/checkpoints/x.tmp$attempt; exit 9; fi; exit 0"
    done = cloud.run("tpu_vm.sh", "run", "job", "--workdir=run", **env | does(cloud, steps), RETRIES="1")
    assert done.returncode == 0 and cloud.lines("started").count("0") == 4


def test_a_repository_is_cloned_where_it_is_asked_for(cloud: Cloud) -> None:
    done = cloud.run("tpu_vm.sh", *RUN, **does(cloud, "exit 0"), GIT=str(ROOT), REPOSITORY="the repository")
    assert done.returncode == 0 and verbs(cloud) == ["create"], done.stderr
    assert (cloud.path / "workers" / "2" / "the repository" / "launch" / "worker.sh").exists()


@pytest.mark.parametrize("during", ["start", "status", "install"])
def test_a_dropped_connection_starts_nothing_twice(cloud: Cloud, during: str) -> None:
    (cloud.path / "drop").write_text(during)
    done = cloud.run("tpu_vm.sh", *RUN, **does(cloud, "exit 0"))
    assert done.returncode == 0 and sorted(cloud.lines("started")) == ["0", "1", "2"]
    assert not (cloud.path / "drop").exists()


def test_ctrl_c_leaves_the_job_alone_and_the_same_command_attaches(cloud: Cloud) -> None:
    env = does(cloud, "exit 0")
    (cloud.path / "go").unlink()
    watcher = cloud.start("tpu_vm.sh", *RUN, **env)
    until(lambda: len(cloud.lines("started")) == 3)
    until(lambda: looks_at_all(cloud))
    interrupt(watcher)
    said, _ = watcher.communicate(timeout=60)
    assert watcher.returncode == 130 and "runs on" in said
    other = cloud.run("tpu_vm.sh", "run", "job", "--workdir", "gs://bucket/other", **env)
    assert other.returncode == 2 and "another job runs on pod: job --workdir gs://bucket/run" in other.stderr
    looks = len(looks_at_all(cloud))
    (cloud.path / "drop").write_text("status")  # the first look fails, and must not be taken for a slice without a job
    again = cloud.start("tpu_vm.sh", *RUN, **env)
    until(lambda: len(looks_at_all(cloud)) > looks)
    (cloud.path / "go").touch()
    said, _ = again.communicate(timeout=60)
    assert again.returncode == 0 and "attached" in said and sorted(cloud.lines("started")) == ["0", "1", "2"]


def test_stop_reaches_every_worker_and_is_not_taken_for_a_preemption(cloud: Cloud) -> None:
    env = does(cloud, "exit 0")
    (cloud.path / "go").unlink()
    watcher = cloud.start("tpu_vm.sh", *RUN, **env)
    until(lambda: len(cloud.lines("started")) == 3)
    until(lambda: any("worker.sh log" in call[-1] for call in cloud.calls()))
    assert cloud.run("tpu_vm.sh", "stop", **env).returncode == 0
    said, _ = watcher.communicate(timeout=60)
    assert watcher.returncode == 75 and "the job was stopped\n" in said and "costs money" in said and len(cloud.lines("started")) == 3
    assert cloud.run("tpu_vm.sh", "status", **env).stdout.split()[:2] == ["READY", "stopped:75"]


@pytest.mark.parametrize(("trap", "code"), [("exit 1", 1), pytest.param("", 137, marks=pytest.mark.slow)], ids=["fails", "deaf"])
def test_a_stop_without_a_checkpoint_is_told_from_one_with(cloud: Cloud, trap: str, code: int) -> None:
    env = does(cloud, f"trap '{trap}' TERM; touch \"$CLOUD/ready$me\"; while :; do sleep 0.05; done") | {"GRACE": "3"}
    watcher = cloud.start("tpu_vm.sh", *RUN, **env)
    until(lambda: len(list(cloud.path.glob("ready?"))) == 3)
    until(lambda: any("worker.sh log" in call[-1] for call in cloud.calls()))
    assert cloud.run("tpu_vm.sh", "stop", **env).returncode == code
    said, _ = watcher.communicate(timeout=60)
    assert watcher.returncode == code and f"stopped, and ended with exit code {code}" in said and len(cloud.lines("started")) == 3


def test_an_installation_that_outlives_its_connection_is_waited_for(cloud: Cloud) -> None:
    noted = 'echo "$1 $(basename "$HOME")" >> "$CLOUD/made"'
    cloud.script("on_worker/make", f"#!/bin/bash\nnote() {{ {noted}; }}\nnote begins\nsleep 1\nnote ends\n")
    (cloud.path / "lose").write_text("install")
    done = cloud.run("tpu_vm.sh", *RUN, **does(cloud, "exit 0"))
    assert done.returncode == 0 and not (cloud.path / "lose").exists(), done.stderr
    for worker in range(3):
        assert [line.split()[0] for line in cloud.lines("made") if line.endswith(str(worker))] == ["begins", "ends"] * 2


def test_half_an_environment_is_made_anew(cloud: Cloud) -> None:
    made = 'mkdir -p .venv/bin; touch .venv/bin/python; chmod +x .venv/bin/python; [ -e "$HOME/again" ] || { touch "$HOME/again"; exit 1; }'
    whole = "touch .venv/bin/pip; chmod +x .venv/bin/pip"
    cloud.script("on_worker/python3", f'#!/bin/bash\necho "python3 $*" >> "$CLOUD/installed"\ncase $* in *venv*) {made}; {whole} ;; esac\n')
    done = cloud.run("tpu_vm.sh", *RUN, **does(cloud, "exit 0"))
    assert done.returncode == 0, done.stderr
    assert (
        len([line for line in cloud.lines("installed") if "uv venv" in line]) == 6
        and len(list(cloud.path.glob("workers/?/ldm_jax/.venv/bin/pip"))) == 3
    )


def test_flags_of_xla_reach_the_workers(cloud: Cloud) -> None:
    env = does(cloud, 'echo "flags: $XLA_FLAGS, $LIBTPU_INIT_ARGS, $LDM_INCEPTION"; exit 0')
    given = {"XLA_FLAGS": "--xla_a=1 --xla_b='2'", "LIBTPU_INIT_ARGS": "--c=$d", "LDM_INCEPTION": "/x y"}
    done = cloud.run("tpu_vm.sh", *RUN, **env, **given)
    assert "flags: --xla_a=1 --xla_b='2', --c=$d, /x y" in done.stdout


@pytest.mark.parametrize("queued", ["", "1"], ids=["slice", "queued"])
def test_a_dry_run_prints_every_command_and_calls_nothing(cloud: Cloud, queued: str) -> None:
    done = cloud.run("tpu_vm.sh", *RUN, **does(cloud, "exit 0"), DRY_RUN="1", DELETE="1", QUEUED=queued)
    assert done.returncode == 0 and cloud.calls() == []
    words = [shlex.split(line) for line in done.stdout.splitlines()]
    resource = "queued-resources" if queued else "tpu-vm"
    shown = [call[4] for call in words if call[:3] == ["gcloud", "compute", "tpus"]]
    assert [verb for verb in shown if verb not in ("describe", "ssh")] == ["create", "scp", "delete"]
    assert next(call for call in words if "create" in call)[3] == resource
    start = next(call[-1] for call in words if "worker.sh start" in call[-1])
    assert start.endswith("job --workdir gs://bucket/run --coordinator auto")


def test_what_is_missing_is_said(cloud: Cloud) -> None:
    assert "TYPE is not set" in cloud.run("tpu_vm.sh", *RUN, TPU="pod", ZONE="here", TYPE="").stderr
    assert "ZONE is not set" in cloud.run("tpu_vm.sh", *RUN, TPU="pod", ZONE="").stderr
    said = cloud.run("tpu_vm.sh")
    assert said.returncode == 2 and "launch/tpu_vm.sh run python -m ldm_jax.train" in said.stderr
    assert cloud.calls() == []


def test_a_worker_gives_a_job_that_is_deaf_some_time(cloud: Cloud, tmp_path: Path) -> None:
    """The job that ran before is gone when the next one starts, as only one process may have the chips."""
    deaf = cloud.script("deaf", '#!/bin/bash\ntrap "" TERM\necho $$ > "$CLOUD/deaf.pid"\nwhile :; do sleep 0.1; done\n')
    env = {"HOME": str(tmp_path), "GRACE": "1"}
    assert cloud.run("worker.sh", "start", "a", deaf, **env).returncode == 0
    until(lambda: cloud.lines("deaf.pid"))
    assert cloud.run("worker.sh", "status", **env).stdout == "running a\n"
    assert cloud.run("worker.sh", "start", "b", "true", **env).returncode == 0
    stat = Path("/proc", cloud.lines("deaf.pid")[0], "stat")
    until(lambda: not stat.exists() or stat.read_text().split()[2] == "Z")
    until(lambda: cloud.run("worker.sh", "status", **env).stdout == "0 b\n")
