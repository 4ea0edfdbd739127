"""The part of Kubernetes' API that RayJobs need, without a cluster: what is made never runs.

Answers have the codes and the `Status` objects of a real API server.
"""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import parse_qs, urlsplit

import yaml

from toile.core.settings import KubeRaySettings, Settings

TEMPLATE = Path(__file__).parents[4] / "examples" / "kuberay" / "rayjob.yaml"
NAMESPACE = "studio"
SECRET = "toile-settings"
CATALOG_URL = "postgresql+psycopg://toile:hush-catalog@database/toile"
_RAYJOBS = f"/apis/ray.io/v1/namespaces/{NAMESPACE}/rayjobs"
_PODS = f"/api/v1/namespaces/{NAMESPACE}/pods"
_DEPLOYMENT_STATUS = {"FAILED": "Failed", "SUCCEEDED": "Complete", "STOPPED": "Complete"}


@dataclass
class FakeKubernetes:
    """The cluster: RayJobs by their name, and what was asked of it.

    Attributes:
        objects: As they were made, and the status that they were given.
        logs: For each RayJob, what its submitters printed; None of one that has not started.
        asked: API group, resource and verb of each request, as RBAC has them.
        status_code: Answer everything with this.
        cuts_logs: Break off within a log.
    """

    forgotten: ClassVar[str] = "its RayJob was deleted"

    folder: Path
    url: str = ""
    refuse: bool = False
    stopped: list[str] = field(default_factory=list)
    objects: dict[str, dict[str, Any]] = field(default_factory=dict)
    logs: dict[str, list[str | None]] = field(default_factory=dict)
    asked: set[tuple[str, str, str]] = field(default_factory=set)
    status_code: int = 0
    cuts_logs: bool = False

    def pointed_at(self, settings: Settings, **kuberay: Any) -> Settings:
        write_kubeconfig(self.folder / "kubeconfig", self.url)
        return settings.model_copy(
            update={
                "job_launcher": "kuberay",
                "catalog_url": CATALOG_URL,
                "kuberay": KubeRaySettings(
                    **{
                        "template": TEMPLATE,
                        "namespace": NAMESPACE,
                        "context": "fake",
                        "secret": SECRET,
                        **kuberay,
                    }
                ),
            }
        )

    def away(self, settings: Settings) -> Settings:
        settings = self.pointed_at(settings)
        write_kubeconfig(self.folder / "kubeconfig", "http://127.0.0.1:9")
        return settings

    def submitted(self) -> list[str]:
        return [name.removeprefix("toile-") for name in self.objects]

    def object(self, submission_id: str) -> dict[str, Any]:
        return self.objects[f"toile-{submission_id}"]

    def command(self, submission_id: str) -> str:
        return str(self.object(submission_id)["spec"]["entrypoint"])

    def variables(self, submission_id: str) -> dict[str, str]:
        cluster = self.object(submission_id)["spec"]["rayClusterSpec"]
        (container,) = cluster["headGroupSpec"]["template"]["spec"]["containers"]
        return {entry["name"]: entry["value"] for entry in container["env"]}

    def say(self, submission_id: str, status: str, message: str = "") -> None:
        deployment = _DEPLOYMENT_STATUS.get(status, "Running")
        self.object(submission_id)["status"] = {
            "jobStatus": status,
            "jobDeploymentStatus": deployment,
            "message": message,
        }

    def write_log(self, submission_id: str, text: str) -> None:
        (before,) = self.logs.get(f"toile-{submission_id}", [""])
        self.logs[f"toile-{submission_id}"] = [(before or "") + text]

    def restart(self) -> None:
        self.objects.clear()


def write_kubeconfig(path: Path, url: str) -> None:
    """Name the server as the context `fake`."""
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "fake", "cluster": {"server": url}}],
        "users": [{"name": "fake", "user": {"token": "a-token"}}],
        "contexts": [{"name": "fake", "context": {"cluster": "fake", "user": "fake"}}],
        "current-context": "fake",
    }
    path.write_text(yaml.safe_dump(config), encoding="utf-8")


@contextmanager
def fake_kubernetes(folder: Path) -> Iterator[FakeKubernetes]:
    """Serve the API on a free port; the kubeconfig lies in `folder`."""
    kubernetes = FakeKubernetes(folder)

    class Handler(_Handler):
        cluster = kubernetes

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    kubernetes.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield kubernetes
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    cluster: FakeKubernetes

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        query = {key: values[0] for key, values in parse_qs(url.query).items()}
        if self.is_refused():
            return
        if url.path == _RAYJOBS:
            self.note("ray.io", "rayjobs", "list")
            self.answer(200, {"items": list(self.cluster.objects.values())})
        elif url.path.startswith(_RAYJOBS):
            self.note("ray.io", "rayjobs", "get")
            self.answer_about(self.cluster.objects.get(self.last(url.path)))
        elif url.path == _PODS:
            self.note("", "pods", "list")
            self.answer(200, {"items": self.pods(query["labelSelector"])})
        elif url.path.startswith(_PODS) and url.path.endswith("/log"):
            self.note("", "pods/log", "get")
            assert query["container"] == "ray-job-submitter"
            self.answer_log(url.path.split("/")[-2])
        else:
            self.fail(404, "NotFound", f"no {url.path}")

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.note("ray.io", "rayjobs", "create")
        name = body["metadata"]["name"]
        if self.is_refused():
            return
        if urlsplit(self.path).path != _RAYJOBS:
            self.fail(404, "NotFound", f"no {self.path}")
        elif self.cluster.refuse:
            self.fail(403, "Forbidden", "exceeded quota: rayjobs")
        elif name in self.cluster.objects:
            self.fail(409, "AlreadyExists", f'rayjobs.ray.io "{name}" already exists')
        else:
            self.cluster.objects[name] = body
            self.answer(201, body)

    def do_DELETE(self) -> None:
        self.note("ray.io", "rayjobs", "delete")
        name = self.last(urlsplit(self.path).path)
        if self.is_refused():
            return
        known = self.cluster.objects.pop(name, None)
        if known is not None:
            self.cluster.stopped.append(name.removeprefix("toile-"))
            self.cluster.logs.pop(name, None)
        self.answer_about(known)

    def pods(self, selector: str) -> list[dict[str, Any]]:
        """The submitters' pods that a label selects, the newest first."""
        label, _, name = selector.partition("=")
        pods = [
            {
                "metadata": {
                    "name": f"{name}-{number}",
                    "labels": {label: name},
                    "creationTimestamp": f"2026-01-01T00:00:{number:02}Z",
                },
                "spec": {"containers": [{"name": "ray-job-submitter"}]},
            }
            for number in range(len(self.cluster.logs.get(name, [])))
        ]
        assert label == "batch.kubernetes.io/job-name"
        return pods[::-1]

    def answer_log(self, pod: str) -> None:
        name, _, number = pod.rpartition("-")
        text = self.cluster.logs[name][int(number)]
        if text is None:
            self.fail(400, "BadRequest", f'container in pod "{pod}" is waiting to start')
        else:
            missing = 1 if self.cluster.cuts_logs else 0
            self.send(200, text.encode(), "text/plain", missing)

    def answer_about(self, known: dict[str, Any] | None) -> None:
        if known is None:
            self.fail(404, "NotFound", "rayjobs.ray.io not found")
        else:
            self.answer(200, known)

    def is_refused(self) -> bool:
        if self.cluster.status_code:
            self.fail(self.cluster.status_code, "Refused", "not today")
        return bool(self.cluster.status_code)

    def note(self, group: str, resource: str, verb: str) -> None:
        assert self.headers["Authorization"] == "Bearer a-token"
        self.cluster.asked.add((group, resource, verb))

    def last(self, path: str) -> str:
        return path.rpartition("/")[2]

    def fail(self, status: int, reason: str, message: str) -> None:
        self.answer(
            status,
            {
                "kind": "Status",
                "apiVersion": "v1",
                "status": "Failure",
                "message": message,
                "reason": reason,
                "code": status,
            },
        )

    def answer(self, status: int, body: dict[str, Any]) -> None:
        self.send(status, json.dumps(body).encode(), "application/json")

    def send(self, status: int, body: bytes, content_type: str, missing: int = 0) -> None:
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body) + missing))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Say nothing."""
