"""A fine-tuned checkpoint and what it was fine-tuned from, as one that stands alone."""

import shutil
from pathlib import Path

from ..config import dump, parse
from ..data.files import atomic_folder
from ..errors import UserError
from ..vla import Spec
from ..vla.weights import anchor, digest
from .checkpoint import Checkpoint, read_checkpoint, write_checkpoint, write_golden
from .triune import from_checkpoint, graph_info, load_model, spec_of


def merge_checkpoint(source: Path, out: Path) -> None:
    """Write a checkpoint with all weights of ``source``, adapters added to theirs; it appears whole or not at all. Folders of frozen
    weights that lie in the checkpoints before come along; others stay references.

    Raises:
        UserError: ``out`` is there already, or the checkpoint stands on no other.
    """
    if out.exists():
        raise UserError(f"{out} is there already; give a new folder, or remove it first")
    checkpoint = read_checkpoint(source)
    lineage = checkpoint.lineage()
    adapted = {name for part in lineage for name, tuning in part.info.experts.items() if tuning.lora is not None}
    if len(lineage) == 1 and not adapted:
        raise UserError(f"{checkpoint.folder} holds all that it was trained to; there is nothing to merge")
    spec = spec_of(checkpoint)
    tree = spec.model_dump(mode="json")
    for name in adapted & {name for name, expert in tree["experts"].items() if expert["frozen"]}:
        tree["experts"][name] |= {"frozen": False, "weights": f"random:{spec.experts[name].weights.removeprefix('random:')}"}  # type: ignore[union-attr]
    model = load_model(checkpoint, spec)
    with atomic_folder(out) as folder:
        references = {}
        for name, reference in checkpoint.info.weights.items():
            held = _inside(lineage, anchor(reference.ref, checkpoint.folder))
            if held is not None:
                shutil.copytree(held, folder / held.name, dirs_exist_ok=True)
                reference = reference.model_copy(update={"ref": f"path:{held.name}", "sha256": digest(folder / held.name)})
                part = tree["experts"].get(name) or tree["heads"][name]
                word = "weights" if "weights" in part else "autoencoder"
                part[word] = f"{'random:' if part[word].startswith('random:') else ''}path:{held.name}"
            references[name] = reference
        whole = parse(Spec, tree, checkpoint.spec)
        frozen = tuple(f"mot.experts.{name}." for name, expert in whole.experts.items() if expert.frozen)
        write_checkpoint(
            folder,
            spec=dump(whole),
            contract=checkpoint.contract,
            statistics=checkpoint.statistics,
            weights={n: p.detach().contiguous() for n, p in model.named_parameters() if not n.startswith(frozen)},
            references=references,
            settings=checkpoint.info.settings,
            source=lineage[0].info.source,
            graph=graph_info(whole),
        )
        write_golden(folder, from_checkpoint(read_checkpoint(folder), precision="fp32", device="cpu"), checkpoint.observations())


def _inside(lineage: list[Checkpoint], ref: str) -> Path | None:
    """The folder that ``ref`` names, if it lies in one of the checkpoints."""
    scheme, _, name = ref.partition(":")
    held = Path(name)
    return held if scheme == "path" and any(held.is_relative_to(part.folder) for part in lineage) else None
