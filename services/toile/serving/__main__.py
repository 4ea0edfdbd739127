"""`python -m toile.serving deploy|status`: put the models on a Ray cluster, and look at them."""

import argparse
import json
import sys

from toile.core import logging as logs
from toile.core.errors import ToileError
from toile.core.settings import Settings
from toile.serving.deploy import deploy, status


def main() -> None:
    """Run one command; the result is one line of JSON on standard output."""
    parser = argparse.ArgumentParser(prog="python -m toile.serving", description=__doc__)
    parser.add_argument("command", choices=("deploy", "status"))
    parser.add_argument("--ray-address", default="auto", help="host:port of the Ray cluster")
    parser.add_argument("--port", type=int, default=0, help="gRPC port; 0 takes a free one")
    arguments = parser.parse_args()
    settings = Settings()
    logs.configure(settings, "serving")
    try:
        if arguments.command == "deploy":
            port = deploy(settings, ray_address=arguments.ray_address, port=arguments.port)
            result = {"event": "ready", "port": port}
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
