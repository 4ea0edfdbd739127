"""YAML files that a person writes: read whole, checked whole, every mistake with its line."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from toile.core.errors import InvalidArgumentError, NotFoundError
from toile.core.names import ID

Location = tuple[int | str, ...]


def _is_id(value: str) -> str:
    if not ID.fullmatch(value):
        raise ValueError("must be 1 to 63 lower-case letters, digits and inner dashes")
    return value


Name = Annotated[str, AfterValidator(_is_id)]
Text = Annotated[str, Field(min_length=1)]


class Section(BaseModel):
    """A mapping of a file; it has these fields and no others."""

    model_config = ConfigDict(frozen=True, extra="forbid")


_Content = TypeVar("_Content", bound=BaseModel)


def read_file(path: Path, content: type[_Content], *, kind: str, reason: str) -> _Content:
    """Read and check a file; `kind` is what it describes, such as "loop".

    Raises:
        NotFoundError: There is no such file.
        InvalidArgumentError: It is no YAML, or says something wrong; file, line, field and what
            would be right are named for every mistake (`reason`).
    """

    def bad(message: str) -> InvalidArgumentError:
        return InvalidArgumentError(message, field=kind, reason=reason)

    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise NotFoundError(f"there is no {kind} file {path}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise bad(f"{path} cannot be read: {error}") from error
    try:
        tree = yaml.compose(text, Loader=yaml.SafeLoader)
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise bad(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    try:
        return content.model_validate(values)
    except ValidationError as error:
        lines = [_describe(path, tree, content, detail) for detail in error.errors()]
        raise bad("; ".join(lines)) from error


def _describe(path: Path, tree: yaml.Node | None, content: type[BaseModel], detail: Any) -> str:
    location = tuple(detail["loc"])
    field = ".".join(str(part) for part in location) or "the whole file"
    message = str(detail["msg"]).removeprefix("Value error, ")
    if detail["type"] == "model_type":
        message = f"must be a mapping; {_fields(_section(content, location))}"
    elif detail["type"] in ("extra_forbidden", "missing"):
        section = _section(content, location[:-1])
        if detail["type"] == "extra_forbidden":
            message = f"there is no such field; {_fields(section)}"
        else:
            message = "is missing"
            meaning = section.model_fields[str(location[-1])].description
            message += f": {meaning}" if meaning else ""
    return f"{path}:{_line(tree, location)}: {field}: {message}"


def _section(content: type[BaseModel], location: Sequence[int | str]) -> type[BaseModel]:
    """Return the section that a location within `content` leads to."""
    for part in location:
        annotation = content.model_fields[str(part)].annotation
        content = next(
            kind
            for kind in (annotation, *get_args(annotation))
            if isinstance(kind, type) and issubclass(kind, BaseModel)
        )
    return content


def _fields(section: type[BaseModel]) -> str:
    return f"there are {', '.join(section.model_fields)}"


def _line(node: yaml.Node | None, location: Location) -> int:
    """Return the line of a field, or of the nearest thing around it that is in the file."""
    if node is None:
        return 1
    line: int = node.start_mark.line + 1
    for part in location:
        child: tuple[yaml.Node, yaml.Node] | None = None
        if isinstance(node, yaml.MappingNode):
            child = next(((k, v) for k, v in node.value if k.value == str(part)), None)
        elif isinstance(node, yaml.SequenceNode) and isinstance(part, int):
            child = (node.value[part], node.value[part]) if part < len(node.value) else None
        if child is None:
            break
        line, node = child[0].start_mark.line + 1, child[1]
    return line
