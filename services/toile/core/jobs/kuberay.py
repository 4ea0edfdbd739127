"""Jobs as KubeRay's RayJob objects: a Ray cluster for each start of a job, gone with its end.

KubeRay makes the cluster, sends the entrypoint to it from a pod of its own, the submitter, which
prints the job's log, and takes the cluster down. Its states are those of `RayJobStatus` in
https://ray-project.github.io/kuberay/reference/api/
"""

import json
import shlex
from collections.abc import Callable, Collection, Mapping, Sequence
from http import HTTPStatus
from typing import Any, ClassVar, Self

import urllib3
from kubernetes import client, config
from kubernetes.client.exceptions import ApiException

from toile.core.errors import ComputeUnavailableError, InvalidArgumentError
from toile.core.jobs.launcher import Submission
from toile.core.jobs.rayjob import fill, object_name, read_template
from toile.core.settings import KubeRaySettings, Settings

_TIMEOUT_SECONDS = 10.0
_PYTHON = ("python", "-P", "-m")
_RAYJOBS = ("ray.io", "v1")
_ENDED = frozenset({"STOPPED", "SUCCEEDED", "FAILED"})
_DEPLOYMENT_ENDED = frozenset({"Complete", "Failed", "ValidationFailed"})
_SUSPENDED = frozenset({"Suspending", "Suspended"})


class KubeRayJobs:
    """The launcher of jobs that get a Ray cluster each."""

    compute: ClassVar[str] = "Kubernetes"
    forgotten: ClassVar[str] = "its RayJob was deleted"
    # KubeRay itself looks every three seconds, and a cluster takes longer to come.
    poll_interval_seconds: ClassVar[float] = 3.0

    def __init__(
        self,
        api: client.ApiClient,
        settings: KubeRaySettings,
        template: Mapping[str, Any],
        secret_names: frozenset[str],
    ) -> None:
        """Use an API server.

        Args:
            api: The server, and who asks.
            settings: Where the objects are made, and with what.
            template: As `rayjob.read_template` returns it.
            secret_names: Variables that must not stand in an object.
        """
        self._api = api
        self._rayjobs = client.CustomObjectsApi(api)
        self._core = client.CoreV1Api(api)
        self._settings = settings
        self._place = (*_RAYJOBS, settings.namespace, "rayjobs")
        self._template = template
        self._secret_names = secret_names

    @classmethod
    def of(cls, settings: Settings) -> Self:
        """Use the API server, the namespace and the template of the settings.

        Raises:
            InvalidArgumentError: A setting is missing or wrong.
        """
        kuberay = settings.kuberay
        if kuberay.template is None:
            raise InvalidArgumentError(
                "jobs are to be RayJobs, but no template of them is set",
                field="kuberay.template",
                reason="BAD_RAYJOB_TEMPLATE",
            )
        if settings.resolved_catalog_url.startswith("sqlite"):
            raise InvalidArgumentError(
                "jobs in pods of their own need a catalog that they reach, not a file of SQLite",
                field="catalog_url",
                reason="CATALOG_NOT_SHARED",
            )
        if not kuberay.secret:
            raise InvalidArgumentError(
                "name the Kubernetes Secret that gives jobs TOILE_CATALOG_URL and what else must "
                "not stand in a RayJob",
                field="kuberay.secret",
                reason="SECRET_MISSING",
            )
        return cls(
            _connect(kuberay.context),
            kuberay,
            read_template(kuberay.template),
            settings.secret_names(),
        )

    def check(self) -> None:
        """Make sure that RayJobs may be listed.

        Raises:
            ComputeUnavailableError: They may not.
        """
        self._ask(self._rayjobs.list_namespaced_custom_object, *self._place, limit=1)

    def submit(
        self,
        submission_id: str,
        module: str,
        arguments: Sequence[str],
        *,
        environment: Mapping[str, str],
        labels: Mapping[str, str],
    ) -> None:
        """Make the RayJob; nothing happens when there is one of the name.

        Raises:
            ComputeUnavailableError: Kubernetes does not answer, or does not take the object.
        """
        body = fill(
            self._template,
            name=object_name(submission_id),
            entrypoint=shlex.join([*_PYTHON, module, *arguments]),
            farewell=[*_PYTHON, "toile.core.jobs.leaving", *arguments],
            environment=self._public(environment),
            labels=labels,
            secret=self._settings.secret,
            queue=self._settings.queue,
        )
        create = self._rayjobs.create_namespaced_custom_object
        self._ask(create, *self._place, body, but={HTTPStatus.CONFLICT})

    def get(self, submission_id: str) -> Submission | None:
        """Look the RayJob up; None if there is none.

        Raises:
            ComputeUnavailableError: Kubernetes does not answer.
        """
        get = self._rayjobs.get_namespaced_custom_object
        found = self._ask(get, *self._place, object_name(submission_id), but={HTTPStatus.NOT_FOUND})
        return None if found is None else submission_of(found.get("status") or {})

    def logs(self, submission_id: str) -> str | None:
        """Return what the submitter printed; None once the RayJob is deleted.

        Raises:
            ComputeUnavailableError: Kubernetes does not answer.
        """
        pods = self._ask(
            self._core.list_namespaced_pod,
            self._settings.namespace,
            label_selector=f"batch.kubernetes.io/job-name={object_name(submission_id)}",
        ).items
        # More than one: a submitter that died is started again, and follows the same job.
        pods.sort(key=lambda pod: pod.metadata.creation_timestamp)
        return "".join(self._log(pod) for pod in pods) if pods else None

    def stop(self, submission_id: str) -> None:
        """Delete the RayJob: KubeRay stops its job, and what belongs to it goes with it.

        Raises:
            ComputeUnavailableError: Kubernetes does not answer.
        """
        self._ask(
            self._rayjobs.delete_namespaced_custom_object,
            *self._place,
            object_name(submission_id),
            propagation_policy="Background",
            but={HTTPStatus.NOT_FOUND},
        )

    def close(self) -> None:
        """Close the connections."""
        self._api.close()

    def _public(self, environment: Mapping[str, str]) -> dict[str, str]:
        """Those variables that anybody who may read a RayJob may read."""
        return {
            name: value for name, value in environment.items() if name not in self._secret_names
        }

    def _log(self, pod: Any) -> str:
        def read(**options: Any) -> bytes:
            # As bytes: the log may begin or end within a character.
            response = self._core.read_namespaced_pod_log(
                pod.metadata.name,
                self._settings.namespace,
                container=pod.spec.containers[0].name,
                _preload_content=False,
                **options,
            )
            return bytes(response.data)

        gone_or_not_started = {HTTPStatus.NOT_FOUND, HTTPStatus.BAD_REQUEST}
        log: bytes | None = self._ask(read, but=gone_or_not_started)
        return (log or b"").decode("utf-8", "replace")

    def _ask(
        self,
        call: Callable[..., Any],
        *arguments: Any,
        but: Collection[int] = (),
        **options: Any,
    ) -> Any:
        """Call the API; None where it answers with a status that is expected."""
        try:
            return call(*arguments, _request_timeout=_TIMEOUT_SECONDS, **options)
        except ApiException as error:
            if error.status in but:
                return None
            if not error.status:  # TLS failed
                raise self._silence(str(error.reason)) from error
            raise ComputeUnavailableError(
                f"Kubernetes answered {error.status}: {_message(error)}"
            ) from error
        except (urllib3.exceptions.HTTPError, config.ConfigException) as error:
            raise self._silence(type(error).__name__) from error

    def _silence(self, why: str) -> ComputeUnavailableError:
        host = self._api.configuration.host
        return ComputeUnavailableError(f"Kubernetes does not answer at {host}: {why}")


def submission_of(status: Mapping[str, Any]) -> Submission:
    """Read the status of a RayJob; it is empty until KubeRay has seen the object."""
    deployment = status.get("jobDeploymentStatus", "")
    said = (status.get(key) for key in ("message", "reason", "jobStatus"))
    message = next(filter(None, said), deployment)
    if deployment in _SUSPENDED:
        return Submission(ended=False, message="its RayJob was suspended", suspended=True)
    ended = deployment in _DEPLOYMENT_ENDED or status.get("jobStatus") in _ENDED
    return Submission(ended=ended, message=message)


def _connect(context: str) -> client.ApiClient:
    configuration = client.Configuration()
    try:
        if context:
            config.load_kube_config(context=context, client_configuration=configuration)
        else:
            try:
                config.load_incluster_config(client_configuration=configuration)
            except config.ConfigException:  # this is no pod
                config.load_kube_config(client_configuration=configuration)
    except config.ConfigException as error:
        raise InvalidArgumentError(
            f"no Kubernetes cluster is known: {error}",
            field="kuberay.context",
            reason="NO_KUBERNETES_CLUSTER",
        ) from error
    configuration.retries = False  # who asks asks again, and should know soon that none answers
    return client.ApiClient(configuration)


def _message(error: ApiException) -> str:
    """What the server says of an error, which is a `Status` object in JSON."""
    try:
        return str(json.loads(error.body)["message"])[:300]
    except (KeyError, TypeError, ValueError):
        return str(error.reason)
