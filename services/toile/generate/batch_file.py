"""Files of prompts: JSON, CSV and YAML, read row by row into requests.

A JSON or YAML file is a list of prompts, or of objects with `GenerateRequest`'s fields as protobuf
writes them in JSON. A CSV file has a header with those fields; a cell of a field that holds a
message or a list is JSON, and an empty cell says nothing.
"""

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import yaml
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.json_format import ParseDict, ParseError

from toile.core.errors import InvalidArgumentError
from toile.generate.checks import known
from toile.v1 import common_pb2, generate_pb2

MOST_ROWS = 1000
MOST_FILE_BYTES = 4 << 20

_FIELDS = generate_pb2.GenerateRequest.DESCRIPTOR
_NOT_IN_ROWS = ("parent", "request_id")
# What a row says in one way replaces what the defaults say in the other.
_INSTEAD = {
    "seeds": ("seed", "count"),
    "seed": ("seeds",),
    "count": ("seeds",),
    "aspect_ratio": ("width", "height"),
    "width": ("aspect_ratio",),
    "height": ("aspect_ratio",),
}


@dataclass(frozen=True)
class BadRow:
    """Why a row is no request."""

    message: str


def read_rows(
    request: generate_pb2.GenerateBatchRequest,
) -> list[generate_pb2.GenerateRequest | BadRow]:
    """Return what each row asks for, on top of the defaults.

    A row without a priority has that of a batch. The request id of row n is `{id}/{n}`.

    Raises:
        InvalidArgumentError: The file as a whole cannot be read (`BAD_PROMPT_FILE`), is empty
            (`NO_ROWS`) or has too many rows (`TOO_MANY_ROWS`).
    """
    known("format", request.format, generate_pb2.PromptFileFormat)
    if len(request.file) > MOST_FILE_BYTES:
        raise _bad_file(
            f"the file has {len(request.file):,} bytes, {MOST_FILE_BYTES:,} are allowed"
        )
    try:
        text = request.file.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise _bad_file("the file is not UTF-8") from error
    if request.format == generate_pb2.PROMPT_FILE_FORMAT_CSV:
        rows = _csv_rows(text)
    elif request.format == generate_pb2.PROMPT_FILE_FORMAT_JSON:
        rows = _list(_json(text))
    elif request.format == generate_pb2.PROMPT_FILE_FORMAT_YAML:
        rows = _list(_yaml(text))
    else:
        raise InvalidArgumentError("say how the file is written: JSON, CSV or YAML", field="format")
    if not rows:
        raise InvalidArgumentError("the file has no rows", field="file", reason="NO_ROWS")
    if len(rows) > MOST_ROWS:
        raise InvalidArgumentError(
            f"the file has {len(rows)} rows; {MOST_ROWS} are the most",
            field="file",
            reason="TOO_MANY_ROWS",
        )
    return [_request(row, number, request.defaults) for number, row in enumerate(rows)]


def _request(
    row: object, number: int, defaults: generate_pb2.GenerateRequest
) -> generate_pb2.GenerateRequest | BadRow:
    said = {"prompt": row} if isinstance(row, str) else row
    if isinstance(said, BadRow):
        return said
    if not isinstance(said, dict):
        return BadRow(f"row {number} is neither a prompt nor an object")
    fields: dict[str, object] = {}
    for key, value in said.items():
        field = _field(str(key))
        if field is None or field.name in _NOT_IN_ROWS:
            return BadRow(f"row {number}: a row has no field {str(key)[:80]!r}")
        fields[field.name] = value
    request = generate_pb2.GenerateRequest()
    request.CopyFrom(defaults)
    for name in fields:
        for replaced in (name, *_INSTEAD.get(name, ())):
            request.ClearField(replaced)  # type: ignore[arg-type]
    for name, value in fields.items():
        try:
            ParseDict({name: value}, request)
        except (ParseError, RecursionError) as error:
            return BadRow(f"row {number}, {name}: {str(error)[:200]}")
    if request.request_id:
        request.request_id = f"{request.request_id}/{number}"
    if request.priority == common_pb2.PRIORITY_UNSPECIFIED:
        request.priority = common_pb2.PRIORITY_BATCH
    return request


def _field(name: str) -> FieldDescriptor | None:
    found = _FIELDS.fields_by_name.get(name) or _FIELDS.fields_by_camelcase_name.get(name)
    return found if found is None or isinstance(found, FieldDescriptor) else None


def _list(content: object) -> Sequence[object]:
    if not isinstance(content, list):
        raise _bad_file("the file is not a list of prompts")
    return content


def _json(text: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _bad_file(f"the file is not JSON: {str(error)[:200]}") from error


def _yaml(text: str) -> object:
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        # A few aliases can unfold to gigabytes, and prompts need none.
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, Loader=loader)):
            raise _bad_file("the file has YAML aliases, which are not read")
        return yaml.load(text, Loader=loader)  # noqa: S506 - a safe loader
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise _bad_file(f"the file is not YAML: {' '.join(str(error).split())[:200]}") from error


def _csv_rows(text: str) -> Sequence[object]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        lines = [line for line in reader if line]
    except csv.Error as error:
        raise _bad_file(f"the file is not CSV: line {reader.line_num}: {error}") from error
    if not lines:
        return []
    header = [name.strip() for name in lines[0]]
    for name in header:
        if _field(name) is None or header.count(name) > 1:
            raise _bad_file(f"the header names {name[:80]!r}, which is no field of its own")
    return [_csv_row(header, cells, number) for number, cells in enumerate(lines[1:])]


def _csv_row(header: Sequence[str], cells: Sequence[str], number: int) -> dict[str, Any] | BadRow:
    if len(cells) > len(header):
        return BadRow(f"row {number} has {len(cells)} cells; the header has {len(header)}")
    row: dict[str, Any] = {}
    for name, cell in zip(header, cells, strict=False):
        if not cell.strip():
            continue
        field = _field(name)
        holds_more = field is not None and (field.message_type is not None or field.is_repeated)
        try:
            row[name] = json.loads(cell) if holds_more else cell
        except (ValueError, RecursionError):
            return BadRow(f"row {number}, {name}: {cell[:80]!r} is not JSON")
    return row


def _bad_file(message: str) -> InvalidArgumentError:
    return InvalidArgumentError(message, field="file", reason="BAD_PROMPT_FILE")
