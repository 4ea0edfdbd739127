"""A base with a ControlNet of its own, and versions that are ControlNets."""

from servers.platform import MODEL_VERSION, NATIVE_SIZE, PARENT, Platform
from toile.core.artifacts import publish, read_manifest
from toile.core.catalog.models import BaseRow, ModelRow, ModelVersionRow

HELD_BASE = "bases/held"
CONTROLNET = f"{PARENT}/models/folds/versions/1"
CONTROLNET_ARTIFACT = f"{CONTROLNET}/job"
OTHERS_CONTROLNET = f"{PARENT}/models/folds/versions/2"


def add_held_base(platform: Platform) -> None:
    """The base `tiny` under another name, with a ControlNet for edges."""
    tiny = "bases/tiny/0123"
    files = {
        path: platform.store.get(f"{tiny}/{path}")
        for path in read_manifest(platform.store, tiny).files
    }
    own = {"config.json": b"{}", "diffusion_pytorch_model.safetensors": b"weights"}
    files |= {f"controlnet/edges/{name}": data for name, data in own.items()}
    publish(platform.store, f"{HELD_BASE}/0123", files)
    with platform.catalog.transaction() as session:
        session.add(
            BaseRow(
                name=HELD_BASE,
                artifact=f"{HELD_BASE}/0123",
                digest="b" * 64,
                native_size=NATIVE_SIZE,
            )
        )


def add_controlnets(platform: Platform) -> None:
    """A ControlNet for the base `held` and one for `other`, trained as the platform's LoRA was."""
    with platform.catalog.transaction() as session:
        lora = session.get_one(ModelVersionRow, MODEL_VERSION)
        columns = {column.key: getattr(lora, column.key) for column in lora.__table__.columns}
        model = f"{PARENT}/models/folds"
        session.add(ModelRow(name=model, project=lora.name.split("/")[1]))
        session.flush()
        bases = ((CONTROLNET, HELD_BASE), (OTHERS_CONTROLNET, "bases/other"))
        for number, (name, base) in enumerate(bases, start=1):
            changed = {
                "name": name,
                "model": model,
                "number": number,
                "adapter_type": "controlnet",
                "artifact": f"{name}/job",
                "digest": str(number) * 64,
                "base": base,
            }
            session.add(ModelVersionRow(**{**columns, **changed}))
