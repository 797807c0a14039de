"""Configs are YAML, loaded into frozen, strict pydantic models.

A YAML file may name a ``base:`` (a file beside it, without ``.yaml``, or a path). The file is merged over its base:
mappings merge key by key, ``null`` deletes a key, anything else replaces. Dotted overrides (``optim.lr=1e-3``) are
merged last, by the same rules.
"""

import difflib
import re
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from .errors import UserError

CONFIGS = Path(__file__).parent / "configs"


class Strict(BaseModel):
    """Base of every config: frozen, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


T = TypeVar("T", bound=BaseModel)


class _Loader(yaml.SafeLoader):
    """YAML's safe loader, in which ``1e-3`` is a number as in YAML 1.2."""


_Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789"))


def find(name: str, kind: str) -> Path:
    """The YAML file of ``name``: a path, or the name of a file in ``configs/<kind>/``.

    Raises:
        UserError: there is no such file; the message lists the names that exist.
    """
    path = Path(name)
    candidates = [path] if path.suffix in (".yaml", ".yml") else [CONFIGS / kind / f"{name}.yaml", path.with_suffix(".yaml")]
    for candidate in [*candidates, CONFIGS.parent / path]:
        if candidate.is_file():
            return candidate
    known = sorted(p.stem for p in (CONFIGS / kind).glob("*.yaml"))
    raise UserError(
        f"there is no {kind} config '{name}'{_nearest(Path(name).stem, known)}; known: {', '.join(known)}, or a path to a YAML file"
    )


def merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """``over`` merged into ``base``: mappings merge, ``None`` deletes, anything else replaces. Order: base first."""
    out = dict(base)
    for key, value in over.items():
        if value is None:
            out.pop(key, None)
        elif isinstance(value, dict) and isinstance(out.get(key), dict):
            out[key] = merge(out[key], value)
        else:
            out[key] = value
    return out


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in one YAML file, without its base."""
    try:
        tree = _read(path.read_text())
    except FileNotFoundError:
        raise UserError(f"there is no file {path}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path} must hold a YAML mapping at its top, not {type(tree).__name__}")
    return tree


def load_tree(path: Path, overrides: list[str] | None = None) -> dict[str, Any]:
    """The merged mapping of a YAML file, its bases and dotted ``key=value`` overrides."""
    tree = read_yaml(path)
    seen = {path.resolve()}
    while "base" in tree:
        base_name = tree.pop("base")
        if not isinstance(base_name, str):
            raise UserError(f"{path}: base must be the name of one YAML file, not {base_name!r}")
        base = path.parent / base_name
        base = base if base.suffix else base.with_suffix(".yaml")
        if base.resolve() in seen:
            raise UserError(f"{path}: base '{base_name}' leads back to a file already read")
        seen.add(base.resolve())
        tree = merge(read_yaml(base), tree) if base.is_file() else _missing_base(path, base)
    for override in overrides or []:
        key, sep, text = override.partition("=")
        parts = key.split(".")
        if not sep or not all(parts):
            raise UserError(f"override '{override}' must have the form key.subkey=value")
        try:
            node: Any = _read(text)
        except yaml.YAMLError as error:
            raise UserError(f"the value in override '{override}' is not valid YAML: {error}") from None
        for part in reversed(parts):
            node = {part: node}
        tree = merge(tree, node)
    return tree


def parse(model: type[T], tree: dict[str, Any], where: str | Path) -> T:
    """``tree`` as a validated ``model``.

    Raises:
        UserError: one sentence per problem, each with its dotted key; an unknown key names the nearest valid one.
    """
    try:
        return model.model_validate(tree)
    except ValidationError as error:
        raise UserError(f"{where}: " + "; ".join(_sentence(model, e) for e in error.errors())) from None


def load(model: type[T], path: Path, overrides: list[str] | None = None) -> T:
    """The config in ``path`` with its bases and overrides, validated as ``model``."""
    return parse(model, load_tree(path, overrides), path)


def dump(config: BaseModel) -> str:
    """The resolved config as YAML, as it is saved with every run."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def _read(text: str) -> Any:
    return yaml.load(text, _Loader)


def _missing_base(path: Path, base: Path) -> dict[str, Any]:
    raise UserError(f"{path}: its base {base} does not exist")


def _nearest(word: str, known: list[str]) -> str:
    match = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean '{match[0]}'?" if match else ""


def _sentence(model: type[BaseModel], error: Any) -> str:
    key = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        names = _fields_at(model, error["loc"][:-1])
        return f"unknown key '{key}'{_nearest(str(error['loc'][-1]), names)}" + (f" (valid: {', '.join(names)})" if names else "")
    if error["type"] == "missing":
        return f"'{key}' is required"
    message = error["msg"].removeprefix("Value error, ")
    return f"'{key}': {message}" if key else message


def _fields_at(model: type[BaseModel], loc: tuple[Any, ...]) -> list[str]:
    """Field names of the model that a pydantic error location points into."""
    models = [model]
    for part in loc:
        nested: list[type[BaseModel]] = []
        for m in models:
            if isinstance(part, str) and part in m.model_fields:
                nested += _models_in(m.model_fields[part].annotation)
        models = nested or models  # a mapping key, a list index or a union tag stays at the same models
    return sorted({name for m in models for name in m.model_fields})


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [m for arg in get_args(annotation) for m in _models_in(arg)]
