"""Jobs as RayJob objects: what they say, what is read from them, and what is asked of the API."""

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from toile.core.catalog.engine import Catalog
from toile.core.errors import ComputeUnavailableError, InvalidArgumentError
from toile.core.jobs import JobKind, JobState, JobStore
from toile.core.jobs.launcher import JobLauncher, open_launcher
from toile.core.jobs.rayjob import STOP_SECONDS, fill, object_name, read_template
from toile.core.jobs.supervisor import JobSupervisor, submission_id
from toile.core.settings import Settings
from unit.core.jobs.fake_kubernetes import SECRET, TEMPLATE, FakeKubernetes
from unit.core.jobs.test_supervisor import run

pytest.importorskip("kubernetes", reason="the kubernetes extra is not installed")

# A checker of custom resources, with the schemas of KubeRay v1.7, beside the checkout.
CRD_CHECK = Path(__file__).parents[5] / "shared" / "tools" / "crdcheck.py"
ID = "0123abcd-1"
# Those beside the URL of the catalog, which `pointed_at` sets.
SECRETS = {
    "ray_auth_token": "hush-token",
    "s3": {"access_key": "hush-access", "secret_key": "hush-key", "endpoint": "store:9000"},
}


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(home=tmp_path / "home", job_max_attempts=2, **SECRETS)  # type: ignore[arg-type]


@pytest.fixture
def launcher(settings: Settings, kubernetes: FakeKubernetes) -> Iterator[JobLauncher]:
    launcher = open_launcher(kubernetes.pointed_at(settings))
    yield launcher
    launcher.close()


def submit(launcher: JobLauncher, **environment: str) -> None:
    launcher.submit(
        ID,
        "toile.training",
        ["projects/p/jobs/0123abcd", "1"],
        environment=environment,
        labels={"project": "p", "job": "0123abcd", "kind": "TRAINING"},
    )


def pods(body: dict[str, Any]) -> list[dict[str, Any]]:
    cluster = body["spec"]["rayClusterSpec"]
    return [group["template"] for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])]


def reconcile_once(settings: Settings, catalog: Catalog) -> None:
    JobSupervisor(settings, catalog, JobKind.TRAINING, "toile.training").reconcile()


def test_object_is_one_start_of_a_job_on_a_cluster_of_its_own(
    launcher: JobLauncher, kubernetes: FakeKubernetes
) -> None:
    submit(launcher, TOILE_LOG_LEVEL="debug")
    body = kubernetes.object(ID)
    spec = body["spec"]
    assert body["metadata"]["name"] == f"toile-{ID}"
    assert body["metadata"]["labels"] == {
        "app.kubernetes.io/managed-by": "toile",
        "toile/project": "p",
        "toile/job": "0123abcd",
        "toile/kind": "TRAINING",
    }
    assert "ownerReferences" not in body["metadata"]
    assert spec["entrypoint"] == "python -P -m toile.training projects/p/jobs/0123abcd 1"
    assert (spec["submissionMode"], spec["backoffLimit"]) == ("K8sJobMode", 0)
    assert spec["shutdownAfterJobFinishes"] is True
    assert "suspend" not in spec
    for pod in pods(body):
        assert pod["metadata"]["labels"]["toile/job"] == "0123abcd"
        (container,) = pod["spec"]["containers"]
        assert container["envFrom"] == [{"secretRef": {"name": SECRET}}]
        assert {"name": "TOILE_LOG_LEVEL", "value": "debug"} in container["env"]
        farewell = [
            "python",
            "-P",
            "-m",
            "toile.core.jobs.leaving",
            "projects/p/jobs/0123abcd",
            "1",
        ]
        assert container["lifecycle"] == {"preStop": {"exec": {"command": farewell}}}


def test_a_template_may_have_its_own_way_of_ending_pods(tmp_path: Path) -> None:
    template = yaml.safe_load(TEMPLATE.read_text(encoding="utf-8"))
    own = {"exec": {"command": ["sleep", "5"]}}
    lifecycles = [{"preStop": own}, {"postStart": own}]
    for pod, lifecycle in zip(pods(template), lifecycles, strict=True):
        pod["spec"]["containers"][0]["lifecycle"] = lifecycle
    file = tmp_path / "rayjob.yaml"
    file.write_text(yaml.safe_dump(template), encoding="utf-8")
    filled = fill(
        read_template(file),
        name="toile-a",
        entrypoint="true",
        farewell=["bye"],
        environment={},
        labels={},
        secret="",
        queue="",
    )
    head, worker = (pod["spec"]["containers"][0]["lifecycle"] for pod in pods(filled))
    assert head == {"preStop": own}
    assert worker == {"preStop": {"exec": {"command": ["bye"]}}, "postStart": own}


def test_what_the_template_says_stays(launcher: JobLauncher, kubernetes: FakeKubernetes) -> None:
    submit(launcher, TOILE_HOME="/home/of/the/service")
    template = yaml.safe_load(TEMPLATE.read_text(encoding="utf-8"))
    body = kubernetes.object(ID)
    for pod, said in zip(pods(body), pods(template), strict=True):
        (container,), (theirs,) = pod["spec"]["containers"], said["spec"]["containers"]
        assert {key: container[key] for key in theirs if key != "env"} == {
            key: value for key, value in theirs.items() if key != "env"
        }
        homes = [entry for entry in container["env"] if entry["name"] == "TOILE_HOME"]
        assert homes == [{"name": "TOILE_HOME", "value": "/scratch"}]
    assert body["spec"]["ttlSecondsAfterFinished"] == template["spec"]["ttlSecondsAfterFinished"]


@pytest.mark.parametrize("queue", ["", "designers"])
def test_object_follows_the_schema_of_kuberay(
    settings: Settings, kubernetes: FakeKubernetes, catalog: Catalog, job: str, queue: str
) -> None:
    if not CRD_CHECK.is_file():
        pytest.skip(f"no checker of custom resources at {CRD_CHECK}")
    reconcile_once(kubernetes.pointed_at(settings, queue=queue), catalog)
    (body,) = kubernetes.objects.values()
    found = importlib.util.spec_from_file_location("crdcheck", CRD_CHECK)
    assert found is not None
    assert found.loader is not None
    crdcheck = importlib.util.module_from_spec(found)
    found.loader.exec_module(crdcheck)
    assert list(crdcheck.errors(body)) == []
    assert list(crdcheck.errors({**body, "spec": {**body["spec"], "entripoint": "x"}}))


def test_what_is_secret_is_not_in_the_object(
    settings: Settings, kubernetes: FakeKubernetes, catalog: Catalog, job: str
) -> None:
    settings = kubernetes.pointed_at(settings)
    assert sum("hush" in value for value in settings.environment().values()) == 4
    reconcile_once(settings, catalog)
    (body,) = kubernetes.objects.values()
    assert "hush" not in json.dumps(body)
    given = kubernetes.variables(submission_id(job, 1))
    assert given["TOILE_S3__ENDPOINT"] == "store:9000"
    assert not given.keys() & settings.secret_names()


def test_variables_are_not_replaced_by_others(
    launcher: JobLauncher, kubernetes: FakeKubernetes
) -> None:
    submit(launcher, TOILE_PROJECT="$(HOME)")
    assert kubernetes.variables(ID)["TOILE_PROJECT"] == "$$(HOME)"


def test_kueue_sets_an_object_going_that_names_a_queue(
    settings: Settings, kubernetes: FakeKubernetes
) -> None:
    submit(open_launcher(kubernetes.pointed_at(settings, queue="designers")))
    body = kubernetes.object(ID)
    assert body["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "designers"
    assert body["spec"]["suspend"] is True


def test_pods_live_as_long_as_a_job_that_is_stopped_may_take(
    launcher: JobLauncher, kubernetes: FakeKubernetes
) -> None:
    submit(launcher)
    assert int(kubernetes.variables(ID)["RAY_JOB_STOP_WAIT_TIME_S"]) == STOP_SECONDS
    for pod in pods(kubernetes.object(ID)):
        assert pod["spec"]["terminationGracePeriodSeconds"] > STOP_SECONDS


# As KubeRay v1.7 writes them, less the times and the state of the cluster.
@pytest.mark.parametrize(
    ("status", "ended", "suspended", "message"),
    [
        ({}, False, False, ""),
        (
            {"jobDeploymentStatus": "Initializing", "rayClusterName": "toile-0123-x7k2p"},
            False,
            False,
            "Initializing",
        ),
        (
            {
                "jobId": "toile-0123-1-fb8s2",
                "jobDeploymentStatus": "Running",
                "jobStatus": "RUNNING",
                "message": "Job is currently running.",
            },
            False,
            False,
            "Job is currently running.",
        ),
        (
            # The submitter has not left yet.
            {"jobDeploymentStatus": "Running", "jobStatus": "SUCCEEDED"},
            True,
            False,
            "SUCCEEDED",
        ),
        (
            {
                "jobDeploymentStatus": "Complete",
                "jobStatus": "SUCCEEDED",
                "message": "Job finished successfully.",
                "succeeded": 1,
            },
            True,
            False,
            "Job finished successfully.",
        ),
        (
            {
                "jobDeploymentStatus": "Failed",
                "jobStatus": "FAILED",
                "reason": "AppFailed",
                "message": "Job entrypoint command failed with exit code 75",
            },
            True,
            False,
            "Job entrypoint command failed with exit code 75",
        ),
        (
            {"jobDeploymentStatus": "Failed", "jobStatus": "", "reason": "SubmissionFailed"},
            True,
            False,
            "SubmissionFailed",
        ),
        (
            {
                "jobDeploymentStatus": "ValidationFailed",
                "reason": "ValidationFailed",
                "message": "headGroupSpec should have at least one container",
            },
            True,
            False,
            "headGroupSpec should have at least one container",
        ),
        (
            {"jobDeploymentStatus": "Suspending", "jobStatus": "RUNNING"},
            False,
            True,
            "its RayJob was suspended",
        ),
        (
            {"jobDeploymentStatus": "Suspended", "jobStatus": ""},
            False,
            True,
            "its RayJob was suspended",
        ),
    ],
)
def test_states(
    launcher: JobLauncher,
    kubernetes: FakeKubernetes,
    status: dict[str, Any],
    ended: bool,
    suspended: bool,
    message: str,
) -> None:
    submit(launcher)
    if status:
        kubernetes.object(ID)["status"] = status
    known = launcher.get(ID)
    assert known is not None
    assert (known.ended, known.suspended, known.message) == (ended, suspended, message)


def test_job_that_kueue_preempts_goes_on_in_the_next_attempt(
    settings: Settings, kubernetes: FakeKubernetes, catalog: Catalog, jobs: JobStore, job: str
) -> None:
    settings = kubernetes.pointed_at(settings, queue="designers")
    supervisor = JobSupervisor(settings, catalog, JobKind.TRAINING, "toile.training")
    supervisor.reconcile()
    kubernetes.object(submission_id(job, 1))["status"] = {"jobDeploymentStatus": "Suspended"}
    supervisor.reconcile()
    assert jobs.get(job).attempt == 1, "it waits for its turn"
    run(jobs, job, 1, heartbeat_seconds_ago=6)
    supervisor.reconcile()
    assert kubernetes.stopped == [submission_id(job, 1)]
    row = jobs.get(job)
    assert (row.state, row.attempt) == (JobState.QUEUED, 2)
    assert "suspended" in row.progress["message"]
    supervisor.reconcile()
    assert kubernetes.submitted() == [submission_id(job, 2)]


def test_logs_of_submitters_come_in_their_order(
    launcher: JobLauncher, kubernetes: FakeKubernetes
) -> None:
    submit(launcher)
    kubernetes.logs[f"toile-{ID}"] = ["step 1\n", "step 1\nstep 2\n", None]
    assert launcher.logs(ID) == "step 1\nstep 1\nstep 2\n"


def test_a_log_that_breaks_off_is_not_taken_for_all(
    launcher: JobLauncher, kubernetes: FakeKubernetes
) -> None:
    submit(launcher)
    kubernetes.write_log(ID, "step 1\n")
    kubernetes.cuts_logs = True
    with pytest.raises(ComputeUnavailableError):
        launcher.logs(ID)


def test_the_example_of_a_role_allows_what_is_asked_and_no_more(
    launcher: JobLauncher, kubernetes: FakeKubernetes
) -> None:
    launcher.check()
    submit(launcher)
    launcher.get(ID)
    kubernetes.write_log(ID, "step 1\n")
    launcher.logs(ID)
    launcher.stop(ID)
    documents = yaml.safe_load_all(TEMPLATE.with_name("rbac.yaml").read_text(encoding="utf-8"))
    (rules,) = [one["rules"] for one in documents if one["kind"] == "Role"]
    assert kubernetes.asked == {
        (group, resource, verb)
        for rule in rules
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }


@pytest.mark.parametrize("status", [401, 403, 429, 500, 503])
def test_a_server_that_does_not_serve_is_named(
    launcher: JobLauncher, kubernetes: FakeKubernetes, status: int
) -> None:
    kubernetes.status_code = status
    for call in (
        launcher.check,
        lambda: submit(launcher),
        lambda: launcher.get(ID),
        lambda: launcher.logs(ID),
        lambda: launcher.stop(ID),
    ):
        with pytest.raises(ComputeUnavailableError, match=f"answered {status}: not today"):
            call()


def test_names_are_such_as_kuberay_takes() -> None:
    assert object_name("019a" * 8 + "-12") == "toile-" + "019a" * 8 + "-12"
    for bad in ("a" * 42, "a_b", "a-", "A"):
        with pytest.raises(InvalidArgumentError):
            object_name(bad)
