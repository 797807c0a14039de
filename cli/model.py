"""``vla model``: look at specs, prove them, score pretrained parts, convert released policies."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from .output import print_json, print_renderable, print_table

app = typer.Typer(name="model", no_args_is_help=True, help="Look at model specs, prove them, score and convert weights.")


@app.command()
def show(
    spec: Annotated[str, typer.Argument(help="A name in configs/model, or a path to a YAML file.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Changes to the spec.")] = None,
    png: Annotated[Path | None, typer.Option(help="Draw the attention graph into this file.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """Print a spec's streams, attention matrix, order, cache plan and parameter counts."""
    from ..vla import load_spec
    from ..vla.show import facts
    from ..vla.show import show as run

    drawn = run(spec, png, overrides)
    if json:
        print_json(facts(load_spec(spec, overrides)))
    else:
        print_renderable(drawn)


def _short(value: object) -> object:
    return f"{value:.0e}" if isinstance(value, float) else value


@app.command()
def check(
    specs: Annotated[list[str], typer.Argument(help="Names in configs/model, or paths to YAML files.")],
    json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """Prove specs: gradient routes, cached execution, expert parity, frozen experts. Exit code 1 when a proof fails."""
    from ..vla.proofs import check as run

    result = run(specs)
    if json:
        print_json(result)
    else:
        columns = {"spec": "spec", "gradient_probe": "gradients", "cache_equivalence": "caches", "expert_parity": "parity"}
        columns |= {name: name for name in ("frozen", "overfit", "passed")}
        rows = ([_short(row[column]) for column in columns] for row in result["rows"])
        print_table("Proofs", list(columns.values()), rows)
    if not all(row["passed"] for row in result["rows"]):
        sys.exit(1)


@app.command()
def score(
    folder: Annotated[
        Path, typer.Argument(help="Folder of a VLM (transformers) or an autoencoder (diffusers), such as vla/assets/embedded_vlm/v1.")
    ],
    scenes: Annotated[Path, typer.Option(help="Recorded scenes (vla data record scenes:...) of seeds that it was not trained on.")],
    limit: Annotated[int, typer.Option(min=1, help="Scenes of each kind.")] = 300,
    json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """Score a VLM on scenes: where it points, what it answers, what it answers without the images. Or an autoencoder: what it keeps."""
    from ..eval import grounding, reconstruction

    rows = (reconstruction if reconstruction.is_autoencoder(folder) else grounding).score(folder, scenes, limit)
    result = {"model": str(folder), "scenes": str(scenes), "rows": rows}
    if json:
        print_json(result)
        return
    columns = list(result["rows"][0])
    print_table(str(folder), columns, ([row[column] for column in columns] for row in result["rows"]))


@app.command()
def convert(
    source: Annotated[
        Path, typer.Argument(metavar="SRC", help="Folder of a released policy: of lerobot, openpi's PyTorch or Isaac-GR00T N1.5 to N1.7.")
    ],
    out: Annotated[Path, typer.Argument(help="The checkpoint to write; must not be there yet.")],
    changes: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="What a folder of openpi or GR00T N1.5 does not tell.")
    ] = None,
    config: Annotated[str | None, typer.Option(help="The same from configs/openpi, configs/groot or a YAML file.")] = None,
    embodiment: Annotated[str | None, typer.Option(help="Which robot of a GR00T.")] = None,
    tokenizer: Annotated[Path | None, typer.Option(help="Folder with the tokenizer, where the hub's cache does not hold it.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """Write a released policy as a checkpoint that gives the same actions from the same noise."""
    from ..policies.convert import convert as run

    contract = run(source, out, tokenizer, config, changes, embodiment)
    if json:
        print_json({"checkpoint": str(out), "contract": contract.model_dump(mode="json")})
    else:
        sizes = (", ".join(contract.camera_names), contract.state.size, contract.action.size, contract.chunk, contract.executed)
        said = (contract.action.mode or "unknown", contract.rate or "unknown")
        print_table(str(out), ["cameras", "state", "action", "chunk", "executed", "actions are", "Hz"], [(*sizes, *said)])


@app.command()
def merge(
    checkpoint: Annotated[Path, typer.Argument(help="A fine-tuned checkpoint, or its run's folder.")],
    out: Annotated[Path, typer.Argument(help="The checkpoint to write; must not be there yet.")],
) -> None:
    """Write a fine-tuned checkpoint as one that stands alone: adapters become part of the weights they were trained beside."""
    from ..policies.merge import merge_checkpoint

    merge_checkpoint(checkpoint, out)
    print(f"checkpoint: {out}")
