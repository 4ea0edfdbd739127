"""Ray's Jobs REST API, without Ray: what is submitted never runs."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar

from toile.core.settings import Settings


@dataclass
class FakeRay:
    """The cluster: submissions by id, and what was stopped."""

    forgotten: ClassVar[str] = "Ray was restarted"

    url: str = ""
    jobs: dict[str, dict[str, Any]] = field(default_factory=dict)
    stopped: list[str] = field(default_factory=list)
    obeys: bool = False  # whether what is stopped ends
    refuse: bool = False
    logs: dict[str, str] = field(default_factory=dict)
    lost_machines: set[str] = field(default_factory=set)  # ids of what ran there

    def pointed_at(self, settings: Settings) -> Settings:
        return settings.model_copy(update={"ray_jobs_url": self.url})

    def away(self, settings: Settings) -> Settings:
        return settings.model_copy(update={"ray_jobs_url": "http://127.0.0.1:9"})

    def submitted(self) -> list[str]:
        return list(self.jobs)

    def command(self, submission_id: str) -> str:
        return str(self.jobs[submission_id]["entrypoint"])

    def variables(self, submission_id: str) -> dict[str, str]:
        return dict(self.jobs[submission_id]["runtime_env"]["env_vars"])

    def say(self, submission_id: str, status: str, message: str = "") -> None:
        self.jobs[submission_id].update(status=status, message=message)

    def listed(self) -> list[dict[str, Any]]:
        """All jobs, and a process that connected by itself."""
        driver = {"type": "DRIVER", "submission_id": None, "status": "RUNNING"}
        submitted = [
            {"type": "SUBMISSION", "submission_id": name, "status": job["status"]}
            for name, job in self.jobs.items()
        ]
        return [driver, *submitted]

    def write_log(self, submission_id: str, text: str) -> None:
        self.logs[submission_id] = self.logs.get(submission_id, "") + text

    def restart(self) -> None:
        self.jobs.clear()


@contextmanager
def fake_ray() -> Iterator[FakeRay]:
    """Serve the API on a free port."""
    ray = FakeRay()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            name = self.path.rpartition("/")[2]
            asked = self.path.split("/")[-2]
            if self.path == "/api/jobs/":
                self.answer(200, ray.listed())
            elif name == "version":
                self.answer(200, {"ray_version": "0"})
            elif name == "logs" and asked in ray.lost_machines:
                self.answer(500, {"error": "Traceback"})
            elif name == "logs" and asked in ray.jobs:
                self.answer(200, {"logs": ray.logs.get(asked, "")})
            elif name in ray.jobs:
                self.answer(200, ray.jobs[name])
            else:
                self.answer(404, {})

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            if self.path.endswith("/stop"):
                ray.stopped.append(self.path.split("/")[-2])
                if ray.obeys:
                    ray.say(ray.stopped[-1], "STOPPED")
                self.answer(200, {"stopped": True})
                return
            request = json.loads(body)
            if ray.refuse or request["submission_id"] in ray.jobs:
                self.answer(500, {"error": "refused"})
                return
            ray.jobs[request["submission_id"]] = {**request, "status": "PENDING", "message": ""}
            self.answer(200, {})

        def answer(self, status: int, body: dict[str, Any] | list[dict[str, Any]]) -> None:
            self.send_response(status)
            self.end_headers()
            self.wfile.write(json.dumps(body).encode())

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    ray.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield ray
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
