"""The RayJob object of one start of a job: a template, filled in.

The template is a RayJob (`ray.io/v1`) as one would give it to kubectl, less what is different for
each job: images, resources, GPUs, nodes, volumes and times to live are said in Kubernetes' own
words. https://docs.ray.io/en/latest/cluster/kubernetes/getting-started/rayjob-quick-start.html
"""

import copy
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from toile.core.errors import InvalidArgumentError

STOP_SECONDS = 30
"""What Ray gives the processes of a job that is stopped, before it kills them."""
GRACE_SECONDS = STOP_SECONDS + 15
"""What Kubernetes gives their pods: the same, and Ray its own end."""
QUEUE_LABEL = "kueue.x-k8s.io/queue-name"
LABEL_PREFIX = "toile/"
_NAME = re.compile(r"[a-z]([a-z0-9-]{0,45}[a-z0-9])?")
# What is filled in; a template that says something else would be ignored silently.
_FILLED_METADATA = frozenset({"name", "generateName", "namespace"})
_FILLED_SPEC = frozenset(
    {
        "backoffLimit",
        "clusterSelector",
        "entrypoint",
        "jobId",
        "metadata",
        "shutdownAfterJobFinishes",
        "submissionMode",
        "suspend",
    }
)


def object_name(submission_id: str) -> str:
    """Return the name of the object for a submission; the same for the same submission.

    KubeRay takes at most 47 characters that begin with a letter: it makes a Service of the name.

    Raises:
        InvalidArgumentError: The id does not fit.
    """
    name = f"toile-{submission_id}"
    if not _NAME.fullmatch(name):
        raise InvalidArgumentError(
            f"{submission_id!r} makes no name of a RayJob", field="submission_id"
        )
    return name


def read_template(path: Path) -> dict[str, Any]:
    """Read a template, and make sure that it can be filled in.

    Raises:
        InvalidArgumentError: It is no RayJob, or says what is filled in (`BAD_RAYJOB_TEMPLATE`).
    """
    try:
        template = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise _bad(path, f"cannot be read: {error}") from error
    if not isinstance(template, dict) or (
        (template.get("apiVersion"), template.get("kind")) != ("ray.io/v1", "RayJob")
    ):
        raise _bad(path, "is no RayJob of ray.io/v1")
    for section, filled in (("metadata", _FILLED_METADATA), ("spec", _FILLED_SPEC)):
        content = template.setdefault(section, {})
        if not isinstance(content, dict):
            raise _bad(path, f"has a {section} that is no mapping")
        if taken := sorted(filled & content.keys()):
            raise _bad(path, f"must not have {section}.{taken[0]}, which is filled in")
    try:
        for pod in _pods(template["spec"]):
            _fill_pod(copy.deepcopy(pod), {}, {}, "", [])
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        raise _bad(path, "needs rayClusterSpec with a container in each group") from error
    return template


def fill(
    template: Mapping[str, Any],
    *,
    name: str,
    entrypoint: str,
    farewell: Sequence[str],
    environment: Mapping[str, str],
    labels: Mapping[str, str],
    secret: str,
    queue: str,
) -> dict[str, Any]:
    """Return the object that starts one attempt, and no other: those are the supervisor's.

    Args:
        template: As `read_template` returns it.
        name: Of the object.
        entrypoint: Command that Ray runs on the head.
        farewell: Command that each pod runs before it is ended, unless the template has one.
        environment: Variables of head and workers. One that the template sets stays as it is.
        labels: For object and pods, under `toile/`.
        secret: Kubernetes Secret with more variables; none when empty.
        queue: LocalQueue of Kueue; none when empty.
    """
    body: dict[str, Any] = copy.deepcopy(dict(template))
    ours = {LABEL_PREFIX + key: value for key, value in labels.items()}
    ours["app.kubernetes.io/managed-by"] = "toile"
    metadata, spec = body["metadata"], body["spec"]
    metadata["name"] = name
    metadata["labels"] = {**(metadata.get("labels") or {}), **ours}
    spec |= {
        "entrypoint": entrypoint,
        # A pod of its own follows the job, whose log is the job's.
        "submissionMode": "K8sJobMode",
        "backoffLimit": 0,
        "shutdownAfterJobFinishes": True,
        "metadata": dict(labels),
    }
    if queue:
        # Kueue takes no other RayJobs than those that make and end their own cluster, and sets
        # them going: https://kueue.sigs.k8s.io/docs/tasks/run/rayjobs/
        metadata["labels"][QUEUE_LABEL] = queue
        spec["suspend"] = True
    environment = {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_SECONDS), **environment}
    for pod in _pods(spec):
        _fill_pod(pod, environment, ours, secret, farewell)
    return body


def _pods(spec: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The pod templates of head and workers."""
    cluster = spec["rayClusterSpec"]
    groups = [cluster["headGroupSpec"], *(cluster.get("workerGroupSpecs") or [])]
    return [group["template"] for group in groups]


def _fill_pod(
    pod: dict[str, Any],
    environment: Mapping[str, str],
    labels: Mapping[str, str],
    secret: str,
    farewell: Sequence[str],
) -> None:
    metadata = pod.setdefault("metadata", {})
    metadata["labels"] = {**(metadata.get("labels") or {}), **labels}
    pod["spec"].setdefault("terminationGracePeriodSeconds", GRACE_SECONDS)
    # A Service named `toile` would set TOILE_PORT, which is a setting, to something else.
    pod["spec"].setdefault("enableServiceLinks", False)
    container = pod["spec"]["containers"][0]  # KubeRay runs Ray in the first
    container["lifecycle"] = {
        "preStop": {"exec": {"command": list(farewell)}},
        **(container.get("lifecycle") or {}),
    }
    own = container.get("env") or []
    theirs = {entry["name"] for entry in own}
    container["env"] = own + [
        # Kubernetes would put another variable in the place of $(NAME).
        {"name": key, "value": value.replace("$", "$$")}
        for key, value in sorted(environment.items())
        if key not in theirs
    ]
    if secret:
        source = {"secretRef": {"name": secret}}
        container["envFrom"] = [*(container.get("envFrom") or []), source]


def _bad(path: Path, why: str) -> InvalidArgumentError:
    return InvalidArgumentError(
        f"the template {path} {why}", field="kuberay.template", reason="BAD_RAYJOB_TEMPLATE"
    )
