"""A real S3 server in one process: OpenStack Swift with its `s3api`, storing in a folder.

Run as a program it serves until it is stopped: `swift_s3.py FOLDER PORT ACCESS_KEY SECRET_KEY`.
An access key has the form `account:user`. It has no `If-Match`, tags or bucket policies.

S3 tests `If-None-Match: *` at the moment an object appears, Swift when the request begins. Here
such requests take turns, which makes the two the same.
"""

import contextlib
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ACCESS_KEY = "test:tester"
SECRET_KEY = "testing-secret"
_READY = "ready"

# What the proxy's pipeline consists of, outermost first, and the options of each.
_FILTERS = {
    "catch_errors": {},
    "gatekeeper": {},
    # No memcached: fail at once instead of waiting for it.
    "cache": {
        "use": "egg:swift#memcache",
        "memcache_servers": "127.0.0.1:1",
        "error_suppression_limit": "1",
        "connect_timeout": "0.01",
    },
    "listing_formats": {},
    "bulk": {},
    "s3api": {"location": "us-east-1", "s3_acl": "false", "check_bucket_owner": "false"},
    "tempauth": {},
    "copy": {},
    "slo": {},
    "dlo": {},
    "versioned_writes": {"allow_object_versioning": "true"},
    "symlink": {},
}
_STORAGE = ("object", "container", "account")


class SwiftServer:
    """The server as a child process. It can be stopped and started again with its data."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._process: subprocess.Popen[str] | None = None
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self._port: int = probe.getsockname()[1]

    @property
    def endpoint(self) -> str:
        """host:port."""
        return f"127.0.0.1:{self._port}"

    def start(self) -> None:
        """Start and wait until requests are answered."""
        self._process = subprocess.Popen(
            [sys.executable, "-P", __file__, self._folder, str(self._port), ACCESS_KEY, SECRET_KEY],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if line.strip() != _READY:
            self.stop()
            raise RuntimeError(f"swift did not start: {line!r}")

    def stop(self) -> None:
        """Stop at once, as if the machine had gone away."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            assert self._process.stdout is not None
            self._process.stdout.close()
            self._process = None


@contextlib.contextmanager
def running_swift() -> Iterator[SwiftServer]:
    """Start a server with an empty store, and remove all of it afterwards."""
    with tempfile.TemporaryDirectory(prefix="toile-swift-") as folder:
        server = SwiftServer(Path(folder))
        server.start()
        try:
            yield server
        finally:
            server.stop()


def _write_conf(path: Path, sections: dict[str, dict[str, str]]) -> None:
    lines: list[str] = []
    for name, options in sections.items():
        lines += [f"[{name}]", *(f"{key} = {value}" for key, value in options.items()), ""]
    path.write_text("\n".join(lines))


def _write_confs(folder: Path, access_key: str, secret_key: str) -> None:
    account, user = access_key.split(":")
    common = {
        "devices": f"{folder}/node",
        "mount_check": "false",
        "disable_fallocate": "true",
        "fallocate_reserve": "0",
        "swift_dir": str(folder),
        "log_level": "ERROR",
    }
    for kind in _STORAGE:
        application = {"use": f"egg:swift#{kind}", "recon_cache_path": str(folder)}
        _write_conf(
            folder / f"{kind}.conf",
            {
                "DEFAULT": common,
                "pipeline:main": {"pipeline": f"{kind}-server"},
                f"app:{kind}-server": application,
            },
        )
    filters = {
        f"filter:{name}": {"use": f"egg:swift#{name}"} | options
        for name, options in _FILTERS.items()
    }
    filters["filter:tempauth"][f"user_{account}_{user}"] = f"{secret_key} .admin"
    proxy = {
        "use": "egg:swift#proxy",
        "account_autocreate": "true",
        "allow_account_management": "true",
    }
    _write_conf(
        folder / "proxy.conf",
        {
            "DEFAULT": common,
            "pipeline:main": {"pipeline": f"{' '.join(_FILTERS)} proxy-server"},
            **filters,
            "app:proxy-server": proxy,
        },
    )


def _load_swift(folder: Path) -> None:
    """Make swift read its global configuration from `folder` instead of /etc."""
    conf = folder / "swift.conf"
    _write_conf(
        conf,
        {
            "swift-hash": {"swift_hash_path_suffix": "test"},
            "storage-policy:0": {"name": "gold", "default": "yes"},
        },
    )
    os.environ["SWIFT_CONF"] = str(conf)
    from swift.common import storage_policy, utils

    for module in (utils, storage_policy, sys.modules.get("swift.common.utils.config")):
        if module is not None and hasattr(module, "SWIFT_CONF_FILE"):
            module.SWIFT_CONF_FILE = str(conf)
    storage_policy.reload_storage_policies()
    utils.validate_hash_conf()


def _write_ring(folder: Path, kind: str, port: int) -> None:
    from swift.common.ring import RingBuilder

    builder = RingBuilder(part_power=4, replicas=1, min_part_hours=0)
    builder.add_dev(
        {
            "id": 0,
            "region": 1,
            "zone": 1,
            "ip": "127.0.0.1",
            "port": port,
            "replication_ip": "127.0.0.1",
            "replication_port": port,
            "device": "d1",
            "weight": 1.0,
            "meta": "",
        }
    )
    builder.rebalance()
    builder.get_ring().save(f"{folder}/{kind}.ring.gz")


def _taking_turns(application: Any) -> Any:
    """Wrap a WSGI application so that conditional writes follow one another."""
    from eventlet.semaphore import Semaphore

    turn = Semaphore()

    def wrapped(environ: dict[str, Any], start_response: Any) -> Any:
        if "HTTP_IF_NONE_MATCH" not in environ or environ["REQUEST_METHOD"] == "GET":
            return application(environ, start_response)
        with turn:
            return list(application(environ, start_response))

    return wrapped


def _serve(folder: Path, port: int, access_key: str, secret_key: str) -> None:
    import eventlet

    eventlet.monkey_patch(all=False, socket=True, select=True, thread=True)
    from eventlet import wsgi
    from swift.common.wsgi import SwiftHttpProtocol, loadapp

    (folder / "node" / "d1").mkdir(parents=True, exist_ok=True)
    _load_swift(folder)
    sockets = {kind: eventlet.listen(("127.0.0.1", 0)) for kind in _STORAGE}
    for kind, listener in sockets.items():
        _write_ring(folder, kind, listener.getsockname()[1])
    sockets["proxy"] = eventlet.listen(("127.0.0.1", port))
    _write_confs(folder, access_key, secret_key)
    applications = {
        kind: loadapp(f"{folder}/{kind}.conf", global_conf={"log_name": kind}) for kind in sockets
    }
    applications["proxy"] = _taking_turns(applications["proxy"])
    threads = [
        eventlet.spawn(
            wsgi.server,
            listener,
            applications[kind],
            protocol=SwiftHttpProtocol,
            log_output=False,
            capitalize_response_headers=False,
            socket_timeout=60,
        )
        for kind, listener in sockets.items()
    ]
    print(_READY, flush=True)
    threads[-1].wait()


if __name__ == "__main__":
    import warnings

    warnings.simplefilter("ignore")
    _serve(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4])
