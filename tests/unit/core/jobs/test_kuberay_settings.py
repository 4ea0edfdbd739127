"""What the launcher of RayJobs needs before it can start any, and how it says what is missing."""

import builtins
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from toile.core.errors import (
    ComputeUnavailableError,
    FailedPreconditionError,
    InvalidArgumentError,
    ToileError,
)
from toile.core.jobs.launcher import open_launcher
from toile.core.settings import Settings
from unit.core.jobs.fake_kubernetes import TEMPLATE, FakeKubernetes


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"kind": "RayCluster"}, "is no RayJob"),
        ({"spec": None}, "spec that is no mapping"),
        ({"spec": {}}, "needs rayClusterSpec"),
        ({"spec": {"rayClusterSpec": {"headGroupSpec": {"template": {}}}}}, "needs rayClusterSpec"),
        ({"spec": {"entrypoint": "python x.py"}}, "must not have spec.entrypoint"),
        ({"spec": {"shutdownAfterJobFinishes": False}}, "must not have spec.shutdown"),
        ({"metadata": {"name": "mine"}}, "must not have metadata.name"),
        (None, "cannot be read"),
    ],
)
def test_a_template_that_cannot_be_filled_in_is_refused(
    settings: Settings,
    kubernetes: FakeKubernetes,
    tmp_path: Path,
    change: dict[str, Any] | None,
    why: str,
) -> None:
    path = tmp_path / "rayjob.yaml"
    if change is not None:
        template = yaml.safe_load(TEMPLATE.read_text(encoding="utf-8"))
        path.write_text(yaml.safe_dump({**template, **change}), encoding="utf-8")
    with pytest.raises(InvalidArgumentError, match=why) as caught:
        open_launcher(kubernetes.pointed_at(settings, template=path))
    assert caught.value.reason == "BAD_RAYJOB_TEMPLATE"
    assert caught.value.metadata["field"] == "kuberay.template"


@pytest.mark.parametrize(
    ("kuberay", "others", "field"),
    [
        ({"template": None}, {}, "kuberay.template"),
        ({"secret": ""}, {}, "kuberay.secret"),
        ({"context": "another"}, {}, "kuberay.context"),
        ({}, {"catalog_url": ""}, "catalog_url"),
    ],
)
def test_settings_that_cannot_work_are_named(
    settings: Settings,
    kubernetes: FakeKubernetes,
    kuberay: dict[str, Any],
    others: dict[str, Any],
    field: str,
) -> None:
    settings = kubernetes.pointed_at(settings, **kuberay).model_copy(update=others)
    with pytest.raises(ToileError) as caught:
        open_launcher(settings)
    assert caught.value.metadata["field"] == field


def test_without_the_client_of_kubernetes_the_extra_is_named(
    settings: Settings, kubernetes: FakeKubernetes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "toile.core.jobs.kuberay", raising=False)
    importing = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name == "kubernetes":
            raise ModuleNotFoundError(name)
        return importing(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(FailedPreconditionError, match=r"toile\[kubernetes\]"):
        open_launcher(kubernetes.pointed_at(settings))


def test_a_pod_uses_its_own_account(
    settings: Settings,
    kubernetes: FakeKubernetes,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from kubernetes.config import incluster_config

    host, _, port = kubernetes.url.removeprefix("http://").partition(":")
    token = tmp_path / "token"
    token.write_text("a-token", encoding="utf-8")
    monkeypatch.setattr(incluster_config, "SERVICE_TOKEN_FILENAME", str(token))
    monkeypatch.setattr(incluster_config, "SERVICE_CERT_FILENAME", str(token))
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", host)
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", port)
    launcher = open_launcher(kubernetes.pointed_at(settings, context=""))
    # It is asked over TLS, which the fake does not speak.
    with pytest.raises(ComputeUnavailableError, match=f"at https://{host}:{port}"):
        launcher.check()
