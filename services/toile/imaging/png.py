"""PNG with metadata: the `parameters` text that other tools read, and Toile's own JSON.

`parameters` is the text of AUTOMATIC1111's web UI: the prompt, a line `Negative prompt: …`, and a
last line of settings `Steps: …, Sampler: …, CFG scale: …, Seed: …, Size: WxH, …`, where a value
with a comma, colon, quote or line break is written as a JSON string. The text is ambiguous, in
that UI as here, for a prompt that itself has a line beginning `Negative prompt:`; the key `toile`
holds lineage and whatever must be read back exactly.
"""

import io
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image, PngImagePlugin

PARAMETERS_KEY = "parameters"
TOILE_KEY = "toile"

_NEGATIVE = "Negative prompt: "
_SETTING = re.compile(r'\s*(\w[\w \-/]*):\s*("(?:\\.|[^\\"])*"|[^,]*)(?:,|$)')
_NEEDS_QUOTES = re.compile(r'[,:"\\\r\n]|^\s|\s$')
_SIZE = re.compile(r"(\d+)x(\d+)")


@dataclass(frozen=True)
class Parameters:
    """How an image was drawn. Sizes in pixels; `extra` are further settings, in order."""

    prompt: str
    negative_prompt: str = ""
    steps: int = 0
    sampler: str = ""
    cfg_scale: float = 0.0
    seed: int = 0
    width: int = 0
    height: int = 0
    model_hash: str = ""
    model: str = ""
    version: str = ""
    extra: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Metadata:
    """What an image file says of itself; None for what it does not have."""

    parameters: Parameters | None = None
    toile: dict[str, Any] | None = None


def encode(
    image: Image.Image,
    *,
    parameters: Parameters | None = None,
    toile: Mapping[str, Any] | None = None,
) -> bytes:
    """Encode an image as PNG with its metadata. Equal input gives equal bytes."""
    info = PngImagePlugin.PngInfo()
    if parameters is not None:
        info.add_text(PARAMETERS_KEY, format_parameters(parameters))
    if toile is not None:
        info.add_text(TOILE_KEY, json.dumps(toile, sort_keys=True, separators=(",", ":")))
    buffer = io.BytesIO()
    bare = image.copy()
    bare.info.clear()
    bare.save(buffer, "PNG", pnginfo=info, compress_level=6)
    return buffer.getvalue()


def read(data: bytes | Path) -> Metadata:
    """Read the metadata of a PNG; text that is not what it should be counts as absent."""
    with Image.open(data if isinstance(data, Path) else io.BytesIO(data), formats=["PNG"]) as image:
        image.load()  # text may stand behind the pixels
        text = {key: value for key, value in image.info.items() if isinstance(value, str)}
    parameters = text.get(PARAMETERS_KEY)
    return Metadata(
        parameters=None if parameters is None else parse_parameters(parameters),
        toile=parse_json(text.get(TOILE_KEY, "")),
    )


def format_parameters(parameters: Parameters) -> str:
    """Return the `parameters` text."""
    settings: dict[str, str] = {
        "Steps": str(parameters.steps),
        "Sampler": parameters.sampler,
        "CFG scale": format(parameters.cfg_scale, ".15g"),
        "Seed": str(parameters.seed),
        "Size": f"{parameters.width}x{parameters.height}",
        "Model hash": parameters.model_hash,
        "Model": parameters.model,
        **parameters.extra,
        "Version": parameters.version,
    }
    last = ", ".join(f"{key}: {_quote(value)}" for key, value in settings.items() if value)
    negative = f"\n{_NEGATIVE}{parameters.negative_prompt}" if parameters.negative_prompt else ""
    return f"{parameters.prompt}{negative}\n{last}"


def parse_parameters(text: str) -> Parameters:
    """Read a `parameters` text, of Toile or of another tool that writes the format.

    A text without a line of settings is all prompt; a setting that is not a number where one is
    expected counts as 0.
    """
    head, _, last = text.rstrip("\n").rpartition("\n")
    if not last.startswith("Steps:"):
        head, last = text, ""
    settings = {key: _unquote(value) for key, value in _SETTING.findall(last)}
    if head.startswith(_NEGATIVE):
        prompt, negative = "", head.removeprefix(_NEGATIVE)
    else:
        prompt, _, negative = head.partition(f"\n{_NEGATIVE}")
    size = _SIZE.fullmatch(settings.pop("Size", ""))
    return Parameters(
        prompt=prompt,
        negative_prompt=negative,
        steps=_integer(settings.pop("Steps", "")),
        sampler=settings.pop("Sampler", ""),
        cfg_scale=_number(settings.pop("CFG scale", "")),
        seed=_integer(settings.pop("Seed", "")),
        width=int(size[1]) if size else 0,
        height=int(size[2]) if size else 0,
        model_hash=settings.pop("Model hash", ""),
        model=settings.pop("Model", ""),
        version=settings.pop("Version", ""),
        extra=settings,
    )


def _quote(value: str) -> str:
    return json.dumps(value, ensure_ascii=False) if _NEEDS_QUOTES.search(value) else value


def _unquote(value: str) -> str:
    if value.startswith('"'):
        try:
            return str(json.loads(value))
        except ValueError:
            return value
    return value


def _integer(text: str) -> int:
    return int(text) if re.fullmatch(r"-?\d{1,20}", text) else 0


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return 0.0


def parse_json(text: str) -> dict[str, Any] | None:
    """Return the JSON object that a text is; None if it is none."""
    try:
        value = json.loads(text)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None
