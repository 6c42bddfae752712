"""Model configurations: frozen dataclasses to plain values and back, checked once at the edge."""

from dataclasses import asdict, fields, is_dataclass
from typing import Any, TypeVar

from vistok.errors import ConfigError, nearest

C = TypeVar("C")


def to_plain(config: Any) -> dict[str, Any]:
    """A config dataclass as JSON values (tuples become lists when written)."""
    return asdict(config)


def from_plain(cls: type[C], plain: dict[str, Any], where: str = "config") -> C:
    """Build the dataclass `cls` from JSON or YAML values.

    Raises ConfigError for an unknown key (naming the nearest valid one), a value of a wrong type, a version newer
    than this class knows, or whatever the dataclass itself refuses.
    """
    from pydantic import TypeAdapter, ValidationError

    if not isinstance(plain, dict):
        raise ConfigError(f"{where}: expected a mapping, got {type(plain).__name__}")
    _refuse_unknown(cls, plain, where)
    newest = next((field.default for field in fields(cls) if field.name == "version"), None)  # type: ignore[arg-type]
    if newest is not None and plain.get("version", newest) > newest:
        raise ConfigError(
            f"{where}: version {plain['version']} is newer than this vistok knows ({newest}); upgrade vistok"
        )
    try:
        return TypeAdapter(cls).validate_python(plain)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise ConfigError(f"{where}.{key}: {first['msg']}, got {first['input']!r}") from error


def _refuse_unknown(cls: type, plain: dict[str, Any], where: str) -> None:
    known = {field.name: field.type for field in fields(cls)}
    for key, value in plain.items():
        if key not in known:
            hint = nearest(str(key), list(known)) or "; known: " + ", ".join(known)
            raise ConfigError(f"{where}: unknown key {key!r}{hint}")
        inner = known[key]
        if isinstance(value, dict) and isinstance(inner, type) and is_dataclass(inner):
            _refuse_unknown(inner, value, f"{where}.{key}")
