"""What a request is checked against: facts about a base, read from its artifact once."""

import json
import threading
from collections.abc import Mapping
from dataclasses import dataclass

from tokenizers import Tokenizer

from toile.core.artifacts import ArtifactStore, FileEntry, Manifest, read_manifest
from toile.core.errors import DataLossError
from toile.core.prompts import check_prompt
from toile.core.tokens import read_tokenizer

DESCRIPTION_FILE = "toile.json"
CONTROLNET_FOLDER = "controlnet"
"""Of a base's own ControlNets, one folder for each kind of map."""
DEFAULT_GUIDANCE_SCALE = 5.0  # of a base that names none; SDXL's own default in diffusers


@dataclass(frozen=True)
class BaseFacts:
    """What a base can do."""

    scheduler: str
    """diffusers' class name of its own sampler."""
    has_refiner: bool
    tokenizer: Tokenizer
    guidance_scale: float
    """What it draws best with."""
    controlnets: Mapping[str, str]
    """Its own ControlNets: the digest of each one's folder, by what it is shown."""

    def check_prompt(self, prompt: str, field: str) -> None:
        """Refuse a prompt that is not well formed, or whose end the base would not read.

        Raises:
            InvalidArgumentError: It has too many tokens (`PROMPT_TOO_LONG`), or emphasis that
                means nothing (`BAD_EMPHASIS`).
        """
        check_prompt(prompt, self._count_tokens, field)

    def _count_tokens(self, text: str) -> int:
        return len(self.tokenizer.encode(text, add_special_tokens=False).ids)


class BaseFactsReader:
    """Reads facts by artifact; an artifact never changes, so each is read once."""

    def __init__(self, store: ArtifactStore) -> None:
        self._store = store
        self._lock = threading.Lock()
        self._known: dict[str, BaseFacts] = {}

    def read(self, artifact: str) -> BaseFacts:
        """Return the facts of a base.

        Raises:
            StoreUnavailableError: The artifact store does not answer.
            DataLossError: The base is damaged.
        """
        with self._lock:
            if artifact not in self._known:
                self._known[artifact] = self._read(artifact)
            return self._known[artifact]

    def _read(self, artifact: str) -> BaseFacts:
        manifest = read_manifest(self._store, artifact)
        key = manifest.key(artifact, "scheduler/scheduler_config.json")
        try:
            scheduler = str(json.loads(self._store.get(key))["_class_name"])
        except (ValueError, KeyError, TypeError) as error:
            raise DataLossError(f"the scheduler of {artifact} is damaged") from error
        return BaseFacts(
            scheduler=scheduler,
            has_refiner="refiner/unet/config.json" in manifest.files,
            tokenizer=read_tokenizer(self._store, artifact),
            guidance_scale=self._guidance_scale(artifact, manifest),
            controlnets=_controlnets(manifest),
        )

    def _guidance_scale(self, artifact: str, manifest: Manifest) -> float:
        if DESCRIPTION_FILE not in manifest.files:
            return DEFAULT_GUIDANCE_SCALE
        try:
            description = json.loads(self._store.get(manifest.key(artifact, DESCRIPTION_FILE)))
            return float(description.get("guidance_scale", DEFAULT_GUIDANCE_SCALE))
        except (ValueError, TypeError, AttributeError) as error:
            raise DataLossError(f"the description of {artifact} is damaged") from error


def _controlnets(manifest: Manifest) -> dict[str, str]:
    folders: dict[str, dict[str, FileEntry]] = {}
    for path, entry in manifest.files.items():
        folder, _, rest = path.partition("/")
        kind, _, file = rest.partition("/")
        if folder == CONTROLNET_FOLDER and file:
            folders.setdefault(kind, {})[file] = entry
    return {
        kind: Manifest(files=files, metadata={}).digest
        for kind, files in folders.items()
        if "config.json" in files
    }
