"""`toile models …` in front of the real train service."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from toile.core.artifacts import ArtifactStore
from toile.v1 import train_pb2, train_pb2_grpc

Toile = Callable[..., Any]


def test_promote_list_show_and_delete(toile: Toile, publish_version: Callable[..., str]) -> None:
    one, two = publish_version(), publish_version()
    toile("promote", "lace/1", "--as", "production")
    assert toile("show", "lace@production")["name"] == one
    assert "is in use (aliases: 1)" in toile("delete", "lace/1")
    assert toile("promote", "lace/2", "--as", "production")["version"] == two
    toile("deprecate", "lace/2", "--reason", "draws seams")

    (model,) = toile("list")
    assert model["latest_version"] == one
    assert [a["version"] for a in model["aliases"]] == [two]
    shown = toile("versions", "lace")
    assert [v["name"] for v in shown] == [two, one]
    assert shown[0]["deprecation_reason"] == "draws seams"

    assert "is deprecated" in toile("promote", "lace/2", "--as", "next")
    toile("deprecate", "lace/1", "--reason", "old")
    assert "all versions" in toile("show", "lace")
    for name in ("lace@production", "lace/2", "lace/1", "lace"):
        toile("delete", name)
    assert toile("list") == []


def test_tables_can_be_read(
    train: train_pb2_grpc.TrainServiceStub, toile: Toile, publish_version: Callable[..., str]
) -> None:
    from toile.cli.main import app

    name = publish_version()
    toile("promote", "lace/1", "--as", "production")
    request = train_pb2.DeprecateModelVersionRequest(name=name, reason="draws seams")
    train.DeprecateModelVersion(request)
    run = CliRunner()
    listed = run.invoke(app, ["models", "list"]).stdout
    assert "production = lace/1" in " ".join(listed.split())
    versions = run.invoke(app, ["models", "versions", "lace"]).stdout
    assert all(word in versions for word in ("lace/1", "production", "draws seams"))
    shown = run.invoke(app, ["models", "show", "lace/1"]).stdout
    assert all(word in shown for word in ("lace/2", "final loss", "draws seams"))
    found = " ".join(shown.split())
    assert "60 of 90" in found
    assert "validation loss 0.2500" in found.replace("│ ", "")
    assert all(figure in found for figure in ("0.750", "0.625, without control 0.125"))
    (version,) = toile("versions", "lace")
    assert version["metrics"]["sample_scores"] == {"prompt": 0.75}


def test_a_file_is_imported(
    toile: Toile, store: ArtifactStore, bundle_path: Path, tmp_path: Path
) -> None:
    torch = pytest.importorskip("torch", reason="the compute extra is not installed")
    from safetensors.torch import save_file

    from toile.diffusion.adapters import linear_targets
    from toile.diffusion.triton.packed import empty_unet

    targets = linear_targets(empty_unet(bundle_path)).items()
    path, (inputs, outputs) = next(one for one in targets if one[0].endswith("attn1.to_q"))
    file = tmp_path / "lora.safetensors"
    save_file(
        {
            f"unet.{path}.lora_A.weight": torch.ones(2, inputs),
            f"unet.{path}.lora_B.weight": torch.ones(outputs, 2),
        },
        file,
    )
    made = toile("import", str(file), "--name", "found", "--base", "tiny", "--trigger-word", "<l>")
    assert (made["name"], made["base"]) == ("projects/p/models/found/versions/1", "bases/tiny")
    assert toile("show", "found")["trigger_word"] == "<l>"
    assert toile("versions", "found")[0]["imported_digest"] == made["imported_digest"]
    file.write_bytes(b"something else")
    assert "not a safetensors file" in toile("import", str(file), "--name", "found")
