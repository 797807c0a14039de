"""``vla doctor``."""

import sys
from typing import Annotated, Any

import typer

from .output import print_json, print_table


def doctor(
    overrides: Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Changes to the recipe.")] = None,
    data: Annotated[str | None, typer.Option(help="A dataset: folder, file or hub id; the recipe's unless given.")] = None,
    robot: Annotated[str | None, typer.Option(help="Its mapping: a name in configs/robot or a YAML file.")] = None,
    recipe: Annotated[str | None, typer.Option(help="A policy recipe: a name in configs/train or a YAML file.")] = None,
    policy: Annotated[str | None, typer.Option(help="Checkpoint or run folder, or a policy as lerobot saved it.")] = None,
    world: Annotated[str | None, typer.Option(help="A world, such as cubes/lift-red.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """Say what does not fit together and how to mend it, and what this machine can do. Exit code 1 when something conflicts."""
    from ..errors import UserError
    from ..eval.doctor import examine

    if overrides and recipe is None:
        raise UserError(f"{overrides[0]} changes a recipe, and none is given; name one by --recipe")
    found = examine(data=data, robot=robot, recipe=recipe, overrides=overrides or (), policy=policy, world=world)
    if json:
        print_json(found)
    else:
        _print(found)
    if not found["passed"]:
        sys.exit(1)


def _print(found: dict[str, Any]) -> None:
    print_table("Environment", ("fact", "value"), found["environment"].items())
    if found["contracts"]:
        described = {part: _describe(contract) for part, contract in found["contracts"].items()}
        rows = ((field, *(side[field] for side in described.values())) for field in next(iter(described.values())))
        print_table("Conventions", ("", *described), rows)
    for part, features in found["statistics"].items():
        for key, compared in features.items():
            columns = ("dimension", "shift", "width", "outside q01-q99", "verdict")
            lines = compared["dimensions"]
            rows = ((row["name"], row["shift"], row["width"], f"{row['outside']:.1%}", row["doubt"] or "fits") for row in lines)
            print_table(f"{key} of the data, in ranges of {part}", columns, rows)
    print("Findings:" if found["findings"] else "Findings: none")
    for row in found["findings"]:
        print(f"* {row['level']}, {row['between']}: {row['sentence']}\n    -> {row['mend']}")
    print("Nothing conflicts." if found["passed"] else "Something conflicts.")


def _describe(contract: dict[str, Any]) -> dict[str, str]:
    """A contract as fields and words."""
    cameras = [f"{c['name']} {c['height'] or '?'}x{c['width'] or '?'}, flip {c['flip'] or 'unknown'}" for c in contract["cameras"]]
    said = {"cameras": "\n".join(cameras)}
    for part in ("state", "action"):
        vector = contract[part]
        said[part] = f"{len(vector['names'])}: {', '.join(vector['names'])}"
        said |= {f"{part} {name}": str(vector[name] or "unknown") for name in ("frame", "rotation", "gripper", "mode", "normalisation")}
    return said | {name: str(contract[name] or "unknown") for name in ("rate", "chunk", "executed", "prompt", "render")}
