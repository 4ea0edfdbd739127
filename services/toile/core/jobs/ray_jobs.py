"""Ray's Jobs API, spoken as REST.

Not through `ray.job_submission`: importing Ray costs a service about 200 MB and two seconds, and
five services and a slim image would carry it only to send a few small requests. The REST API is
documented and stable: https://docs.ray.io/en/latest/cluster/running-applications/job-submission/
"""

import ipaddress
import shlex
import sys
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self
from urllib.parse import urlsplit

import httpx

from toile.core.errors import ComputeUnavailableError
from toile.core.jobs.launcher import Submission
from toile.core.settings import Settings

_TIMEOUT_SECONDS = 10.0
_ENDED = frozenset({"STOPPED", "SUCCEEDED", "FAILED"})


class RayJobs:
    """The launcher of jobs on one Ray cluster."""

    compute: ClassVar[str] = "Ray"
    forgotten: ClassVar[str] = "Ray was restarted"
    poll_interval_seconds: ClassVar[float] = 0.5

    def __init__(self, url: str, token: str = "") -> None:
        """Point at a dashboard.

        Args:
            url: Such as `http://127.0.0.1:8265`; empty means that there is none.
            token: Ray's authentication token (`RAY_AUTH_TOKEN`); empty where Ray asks for none.
        """
        self._url = url.rstrip("/")
        # No proxies from the environment: a cluster's dashboard is never behind one.
        self._http = httpx.Client(
            base_url=self._url,
            timeout=_TIMEOUT_SECONDS,
            trust_env=False,
            headers={"Authorization": f"Bearer {token}"} if token else {},
        )

    @classmethod
    def of(cls, settings: Settings) -> Self:
        """Point at the cluster of the settings."""
        return cls(settings.ray_jobs_url, settings.ray_auth_token.get_secret_value())

    def check(self) -> None:
        """Make sure that Ray answers.

        Raises:
            ComputeUnavailableError: It does not.
        """
        self._request("GET", "/api/version")

    def submit(
        self,
        submission_id: str,
        module: str,
        arguments: Sequence[str],
        *,
        environment: Mapping[str, str],
        labels: Mapping[str, str],
    ) -> None:
        """Start `python -m module arguments…`; nothing happens when the id is already known.

        Raises:
            ComputeUnavailableError: Ray does not answer, or does not take the job now.
        """
        body = {
            "submission_id": submission_id,
            "entrypoint": shlex.join([self._interpreter(), "-P", "-m", module, *arguments]),
            "runtime_env": {"env_vars": dict(environment)},
            "metadata": {f"toile_{key}": value for key, value in labels.items()},
        }
        response = self._send("POST", "/api/jobs/", json=body)
        if response.is_error and self.get(submission_id) is None:
            raise ComputeUnavailableError(f"Ray did not take the job: {_last_line(response.text)}")

    def get(self, submission_id: str) -> Submission | None:
        """Look a submission up; None if Ray does not know it, as after a restart of Ray.

        Raises:
            ComputeUnavailableError: Ray does not answer.
        """
        response = self._send("GET", f"/api/jobs/{submission_id}")
        if response.status_code == httpx.codes.NOT_FOUND:
            return None
        _raise_for(response)
        details = response.json()
        return Submission(
            ended=details["status"] in _ENDED, message=str(details.get("message") or "")
        )

    def unended(self) -> list[str]:
        """Return the submission ids of the jobs whose processes are not gone.

        Raises:
            ComputeUnavailableError: Ray does not answer.
        """
        jobs = self._request("GET", "/api/jobs/").json()
        # A process that connects by itself, as the one that deploys the models, is a job, too.
        return [
            job["submission_id"]
            for job in jobs
            if job["submission_id"] and job["status"] not in _ENDED
        ]

    def logs(self, submission_id: str) -> str | None:
        """Return all that a job's process and its workers printed; None where Ray keeps none.

        Raises:
            ComputeUnavailableError: Ray does not answer.
        """
        response = self._send("GET", f"/api/jobs/{submission_id}/logs")
        # 500: the machine that ran it, where the file is, has gone.
        if response.status_code in (httpx.codes.NOT_FOUND, httpx.codes.INTERNAL_SERVER_ERROR):
            return None
        _raise_for(response)
        return str(response.json()["logs"])

    def stop(self, submission_id: str) -> None:
        """Send SIGTERM to a job's processes; SIGKILL after Ray's RAY_JOB_STOP_WAIT_TIME_S.

        Raises:
            ComputeUnavailableError: Ray does not answer.
        """
        response = self._send("POST", f"/api/jobs/{submission_id}/stop")
        if response.status_code != httpx.codes.NOT_FOUND:
            _raise_for(response)

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def _request(self, method: str, path: str) -> httpx.Response:
        response = self._send(method, path)
        _raise_for(response)
        return response

    def _send(self, method: str, path: str, **options: Any) -> httpx.Response:
        if not self._url:
            raise ComputeUnavailableError("no Ray cluster is configured (ray_jobs_url)")
        try:
            return self._http.request(method, path, **options)
        except httpx.HTTPError as error:
            raise ComputeUnavailableError(
                f"Ray does not answer at {self._url}: {type(error).__name__}"
            ) from error

    def _interpreter(self) -> str:
        """This very Python where Ray runs on this machine; elsewhere the one of Ray's image."""
        host = urlsplit(self._url).hostname or ""
        try:
            local = ipaddress.ip_address(host).is_loopback
        except ValueError:
            local = host == "localhost"
        return sys.executable if local else "python"


def _raise_for(response: httpx.Response) -> None:
    if response.is_error:
        raise ComputeUnavailableError(
            f"Ray answered {response.status_code}: {_last_line(response.text)}"
        )


def _last_line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1][:300] if lines else ""
