"""launch/gke.sh: the JobSet that it applies, for slices and GPUs; its errors are those of kubectl."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.launching import ROOT, Cloud

COMMAND = ("python", "-m", "ldm_jax.train", "--config", 'a "quoted" & name', "--workdir", "gs://bucket/run")


@pytest.fixture
def cloud(tmp_path: Path) -> Cloud:
    refused = 'if [ -e "$CLOUD/error" ]; then cat "$CLOUD/error" >&2; exit 1; fi\n'
    return Cloud(tmp_path / "cloud", {"kubectl": f'cat > "$CLOUD/applied"\n{refused}'})


def applied(cloud: Cloud, **env: str) -> dict[str, Any]:
    done = cloud.run("gke.sh", *COMMAND, NAME="run", IMAGE="image:tag", **env)
    assert done.returncode == 0, done.stderr
    assert [call[:4] for call in cloud.calls()] == [["kubectl", "apply", "-f", "-"]]
    text = (cloud.path / "applied").read_text()
    assert "${" not in text
    return yaml.safe_load(text)


def job_of(jobset: dict[str, Any]) -> dict[str, Any]:
    (replicated,) = jobset["spec"]["replicatedJobs"]
    return replicated["template"]["spec"]


def action(jobset: dict[str, Any], code: int | None) -> str:
    """What Kubernetes and JobSet do after a container ended with a code (None: its node was taken away), by their documentation."""
    reason, message = "BackoffLimitExceeded", "Job has reached the specified backoff limit"
    for index, rule in enumerate(job_of(jobset)["podFailurePolicy"]["rules"]):
        codes = rule.get("onExitCodes", {}).get("values", [])
        if code in codes or (code is None and "onPodConditions" in rule):
            what = "Pod has condition" if code is None else f"Container main for pod default/run-host-0-0-x failed with exit code {code}"
            reason, message = "PodFailurePolicy", f"{what} matching {rule['action']} rule at index {index}"
            break
    for rule in jobset["spec"]["failurePolicy"]["rules"]:
        patterns = rule.get("onJobFailureMessagePatterns", [""])
        if reason in rule["onJobFailureReasons"] and any(re.search(pattern, message) for pattern in patterns):
            return rule["action"]
    return "RestartJobSet"


def test_exit_codes_and_disruptions(cloud: Cloud) -> None:
    jobset = applied(cloud, SLICE="v5e:4x4")
    assert jobset["apiVersion"] == "jobset.x-k8s.io/v1alpha2" and jobset["kind"] == "JobSet" and jobset["metadata"]["name"] == "run"
    assert action(jobset, 2) == "FailJobSet"
    assert action(jobset, 75) == action(jobset, None) == "RestartJobSetAndIgnoreMaxRestarts"
    assert {action(jobset, code) for code in (1, 137, 139, 22, 27)} == {"RestartJobSet"}
    assert jobset["spec"]["failurePolicy"]["maxRestarts"] == 10
    job = job_of(jobset)
    pod = job["template"]["spec"]
    assert job["backoffLimit"] == 0 and pod["restartPolicy"] == "Never" and pod["terminationGracePeriodSeconds"] >= 60
    assert [container["name"] for container in pod["containers"]] == ["main"]  # whom the rules name


@pytest.mark.parametrize(
    ("slice_", "hosts", "chips", "kind"),
    [
        ("v5e:16x16", 64, 4, "tpu-v5-lite-podslice"),
        ("v5e:2x4", 1, 8, "tpu-v5-lite-podslice"),
        ("v5p:4x4x4", 16, 4, "tpu-v5p-slice"),
        ("v6e:8x8", 16, 4, "tpu-v6e-slice"),
    ],
)
def test_a_slice(cloud: Cloud, slice_: str, hosts: int, chips: int, kind: str) -> None:
    job = job_of(applied(cloud, SLICE=slice_, SPOT="1", LIBTPU_INIT_ARGS='--a="b"'))
    pod = job["template"]["spec"]
    assert (job["parallelism"], job["completions"]) == (hosts, hosts)
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": kind,
        "cloud.google.com/gke-tpu-topology": slice_.split(":")[1],
        "cloud.google.com/gke-spot": "true",
    }
    (main,) = pod["containers"]
    assert main["resources"]["limits"] == {"google.com/tpu": chips} and main["image"] == "image:tag"
    assert main["args"] == list(COMMAND) and {"name": "LIBTPU_INIT_ARGS", "value": '--a="b"'} in main["env"]


def test_data_are_mounted_from_a_claim(cloud: Cloud) -> None:
    pod = job_of(applied(cloud, SLICE="v5e:4x4", CLAIM="pictures"))["template"]["spec"]
    mounts = {mount["name"]: mount["mountPath"] for mount in pod["containers"][0]["volumeMounts"]}
    assert mounts == {"shm": "/dev/shm", "data": "/data"}
    shm, data = pod["volumes"]
    assert shm == {"name": "shm", "emptyDir": {"medium": "Memory"}}
    assert data == {"name": "data", "persistentVolumeClaim": {"claimName": "pictures"}}


@pytest.mark.parametrize("slice_", ["v5e:16x16*2", "v5e:16", "v5e", "16x16", "v5e:0x4", "v5e:4x", "v5e:4x4x", "V5E:4x4"])
def test_a_slice_that_is_none_is_refused(cloud: Cloud, slice_: str) -> None:
    done = cloud.run("gke.sh", *COMMAND, NAME="run", IMAGE="image", SLICE=slice_)
    assert done.returncode == 2 and cloud.calls() == []
    assert done.stderr.count("\n") == 1 and f"SLICE={slice_}: v4, v5e" in done.stderr


@pytest.mark.parametrize("chips", ["5", "0", "x"])
def test_hosts_have_equally_many_chips(cloud: Cloud, chips: str) -> None:
    done = cloud.run("gke.sh", *COMMAND, NAME="run", IMAGE="image", SLICE="v5e:4x8", CHIPS=chips)
    assert done.returncode == 2 and cloud.calls() == [] and f"CHIPS={chips}: not a part of 32 chips" in done.stderr


def test_hosts_with_gpus_join_the_first(cloud: Cloud) -> None:
    jobset = applied(cloud, GPU="nvidia-h100-80gb", HOSTS="4", SERVICE_ACCOUNT="trainer")
    job = job_of(jobset)
    pod = job["template"]["spec"]
    (main,) = pod["containers"]
    assert job["parallelism"] == 4 and not jobset["metadata"]["annotations"] and pod["serviceAccountName"] == "trainer"
    assert main["resources"]["limits"] == {"nvidia.com/gpu": 8} and main["securityContext"]["runAsUser"] == 1000
    joined = ["--coordinator", "run-host-0-0.run:12321", "--num-processes", "4", "--process-id", "$(PROCESS_ID)"]
    assert main["args"] == [*COMMAND, *joined]
    index = {"fieldRef": {"fieldPath": "metadata.annotations['batch.kubernetes.io/job-completion-index']"}}
    assert {"name": "PROCESS_ID", "valueFrom": index} in main["env"]


def test_errors_are_those_of_kubectl_and_what_is_missing_is_said(cloud: Cloud) -> None:
    (cloud.path / "error").write_text('error: resource mapping not found for name: "run": no matches for kind "JobSet"\n')
    done = cloud.run("gke.sh", *COMMAND, NAME="run", IMAGE="image", SLICE="v5e:4x4")
    assert done.returncode == 1 and 'no matches for kind "JobSet"' in done.stderr and "started" not in done.stderr
    assert "IMAGE is not set" in cloud.run("gke.sh", *COMMAND, NAME="run").stderr
    assert "give SLICE" in cloud.run("gke.sh", *COMMAND, NAME="run", IMAGE="image").stderr
    assert "SLICE=v9:2x2" in cloud.run("gke.sh", *COMMAND, NAME="run", IMAGE="image", SLICE="v9:2x2").stderr


def test_a_dry_run_prints_the_manifest_and_calls_nothing(cloud: Cloud) -> None:
    done = cloud.run("gke.sh", *COMMAND, NAME="run", IMAGE="image", SLICE="v5e:4x4", DRY_RUN="1")
    first, manifest = done.stdout.split("\n", 1)
    assert first == "kubectl apply -f -" and yaml.safe_load(manifest)["kind"] == "JobSet" and cloud.calls() == []


def test_the_file_itself_is_yaml_with_a_command_of_xpk() -> None:
    text = (ROOT / "launch" / "gke_jobset.yaml").read_text()
    assert yaml.safe_load(text)["kind"] == "JobSet"
    assert "xpk workload create" in text and "--restart-on-exit-codes=75" in text
