"""From a recipe's name to a trained checkpoint."""

import difflib
from importlib import import_module
from pathlib import Path
from typing import Any

from ...config import dump, find, load_tree, parse, read_yaml
from ...data.files import room, write_file
from ...errors import UserError
from .launch import is_main
from .loop import train
from .state import refuse_changes, step_folders

# kind -> module with ``Recipe`` (a Strict model with ``kind`` and ``train: TrainConfig``) and ``build(recipe, out) -> Task``
KINDS = {"policy": ".policy", "vlm": ".vlm", "autoencoder": ".autoencoder"}


def run(name: str, overrides: list[str], out: Path, resume: bool) -> Path:
    """Train by the recipe ``name`` (in ``configs/train``, or a path) and return the final checkpoint's folder.

    The resolved recipe is kept in ``out/recipe.yaml``; training from that file repeats the run.

    Raises:
        UserError: the recipe does not exist or has a wrong key, ``out`` and ``resume`` do not go together, or the disk is full.
    """
    module, recipe = read_recipe(name, overrides)
    with room(out, "run the same command again, with --resume where the run had begun"):
        if is_main():
            _claim(recipe, out, resume)
        return train(module.build(recipe, out), recipe.train, out, resume)


def read_recipe(name: str, overrides: list[str]) -> tuple[Any, Any]:
    """The module of a recipe's kind, and the recipe (in ``configs/train``, or a path).

    Raises:
        UserError: there is none, its kind is unknown, or it has a wrong key.
    """
    path = find(name, "train")
    tree = load_tree(path, overrides)
    kind = tree.get("kind")
    if not isinstance(kind, str) or kind not in KINDS:
        match = difflib.get_close_matches(str(kind), KINDS, n=1)
        said = f"its kind '{kind}' is unknown" if kind is not None else "'kind' is required"
        raise UserError(f"{path}: {said}{f'; did you mean {match[0]!r}?' if match else ''} (valid: {', '.join(KINDS)})")
    module: Any = import_module(KINDS[kind], __package__)
    return module, parse(module.Recipe, tree, path)


def _claim(recipe: Any, out: Path, resume: bool) -> None:
    """Mark ``out`` as this recipe's run."""
    kept, saved = out / "recipe.yaml", step_folders(out)
    if saved and not resume:
        raise UserError(f"{out} already holds a run ({saved[-1].name}); pass --resume to continue it, or choose another --out")
    if resume and not kept.is_file():
        raise UserError(f"there is no run to resume in {out}; check --out, or leave out --resume to begin one")
    if saved:
        before = parse(type(recipe), read_yaml(kept), kept)
        refuse_changes(before.model_dump(mode="json"), recipe.model_dump(mode="json"), out)
    out.mkdir(parents=True, exist_ok=True)
    write_file(kept, dump(recipe))
