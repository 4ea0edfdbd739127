"""`python -m toile.serving deploy|status|engines`: models on a Ray cluster, engines in Triton."""

import argparse
import json
import sys
from pathlib import Path

from toile.core import logging as logs
from toile.core.errors import ToileError
from toile.core.settings import Settings
from toile.serving.deploy import deploy, status
from toile.serving.engines import serve_engines


def main() -> None:
    """Run one command; the result is one line of JSON on standard output."""
    parser = argparse.ArgumentParser(prog="python -m toile.serving", description=__doc__)
    parser.add_argument("command", choices=("deploy", "status", "engines"))
    parser.add_argument("--ray-address", default="auto", help="host:port of the Ray cluster")
    parser.add_argument("--port", type=int, default=0, help="gRPC port; 0 takes a free one")
    parser.add_argument("--repository", type=Path, help="Triton's model repository, for engines")
    arguments = parser.parse_args()
    if arguments.command == "engines" and arguments.repository is None:
        parser.error("engines needs --repository")
    settings = Settings()
    logs.configure(settings, "serving")
    try:
        if arguments.command == "deploy":
            port = deploy(settings, ray_address=arguments.ray_address, port=arguments.port)
            result = {"event": "ready", "port": port}
            healthy = True
        elif arguments.command == "engines":
            loaded = serve_engines(settings, arguments.repository)
            result = {"event": "ready", "models": loaded}
            healthy = True
        else:
            report = status(ray_address=arguments.ray_address)
            result = {
                "state": report.state,
                "message": report.message,
                "replicas": report.replicas,
            }
            healthy = report.healthy
    except ToileError as error:
        sys.exit(f"{error.reason}: {error.message}")
    sys.stdout.write(json.dumps(result) + "\n")
    sys.exit(0 if healthy else 1)


if __name__ == "__main__":
    main()
