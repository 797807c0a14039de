"""Scores of a VLM on annotated scenes: where it points and what it answers, and what it answers without the images.

Rows are kinds of scenes (``envs.scenes``): those of training, drawn from other seeds, and those that training never
shows. A question counts only when every word of the greedy answer is right. A pointing error is the distance between
the place said by the location tokens and the true one, as a share of the image width.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..data.questions import LOCATIONS, Asker, Turn, colour, instruct, relation
from ..data.readers.scenes import Scenes, open_scenes
from ..errors import UserError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

BATCH = 32
HELD_OUT = {"scenes:heldout-colour": ("colour", "purple"), "scenes:heldout-shape": ("shape", "capsule")}
"""Kinds of scenes -> what marks the thing that is pointed at there."""

Row = dict[str, Any]


def score(folder: str | Path, scenes: str | Path, limit: int = 300, seed: int = 0) -> list[Row]:
    """One row per kind of scene, one over all kinds that training shows, and a last one over all with blank images.

    Args:
        folder: a transformers folder with model and processor, such as ``vla/assets/embedded_vlm/v1``.
        scenes: folder of recorded scenes, of seeds that the model was not trained on.
        limit: scenes of each kind.
        seed: of the questions.

    Returns:
        rows of ``name``, ``scenes``, ``questions``, ``colour`` and ``relation`` (exact match), ``points``, ``median`` and
        ``p90`` (pointing error in image 1), ``wrist_median`` (in image 2), ``absent`` (share of points outside an image that
        were said to be outside).

    Raises:
        UserError: there are no scenes, or the folder holds no such model.
    """
    found = open_scenes(scenes, limit)
    scorer = Scorer(folder)
    worlds = list(dict.fromkeys(annotation["world"] for annotation in found.annotations))
    marks = {}
    for world in worlds:
        chosen = [i for i, annotation in enumerate(found.annotations) if annotation["world"] == world]
        marks[world] = scorer.mark(Scenes(found.images[chosen], [found.annotations[i] for i in chosen]), world, seed)
    rows = [{"name": world, **mark.row()} for world, mark in marks.items()]
    shown = [mark for world, mark in marks.items() if not world.startswith("scenes:heldout")]
    if len(shown) > 1:
        rows.append({"name": "kinds of training together", **sum(shown[1:], shown[0]).row()})
    blank = Scenes(np.zeros_like(found.images), found.annotations)
    rows.append({"name": "text only (images blank)", **scorer.mark(blank, "", seed).row()})
    return rows


@dataclass(frozen=True)
class Mark:
    """What was answered on some scenes: per kind of question whether it was right, pointing errors in image 1 and 2, and of points
    outside an image whether that was said."""

    scenes: int
    right: dict[str, list[bool]]
    one: list[float]
    two: list[float]
    absent: list[bool]

    def __add__(self, other: "Mark") -> "Mark":
        right = {kind: values + other.right[kind] for kind, values in self.right.items()}
        return Mark(self.scenes + other.scenes, right, self.one + other.one, self.two + other.two, self.absent + other.absent)

    def row(self) -> Row:
        """The figures."""
        return {
            "scenes": self.scenes,
            "questions": sum(map(len, self.right.values())),
            **{kind: float(np.mean(values)) if values else None for kind, values in self.right.items()},
            "points": len(self.one) + len(self.two),
            "median": float(np.median(self.one)) if self.one else None,
            "p90": _quantile(self.one, 0.9),
            "wrist_median": float(np.median(self.two)) if self.two else None,
            "absent": float(np.mean(self.absent)) if self.absent else None,
        }


class Scorer:
    """A VLM that is asked packed turns in fp32.

    Raises:
        UserError: the folder holds no model and processor of transformers.
    """

    def __init__(self, folder: str | Path) -> None:
        import torch
        from transformers import AutoModelForImageTextToText, AutoProcessor

        from ..policies.train.vlm import Packer, Reader

        if not (Path(folder) / "config.json").is_file():
            raise UserError(f"{folder} holds no model (there is no config.json); give a folder such as vla/assets/embedded_vlm/v1")
        processor = AutoProcessor.from_pretrained(folder)
        vlm = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
        self.packer = Packer(processor, 2, 1.0)
        self.reader = Reader(vlm, ())

    def mark(self, scenes: Scenes, world: str, seed: int) -> Mark:
        """What it answers on some scenes of one kind."""
        asked = [_questions(annotation, world, np.random.default_rng((seed, index))) for index, annotation in enumerate(scenes.annotations)]
        right: dict[str, list[bool]] = {"colour": [], "relation": []}
        errors: dict[str, list[float]] = {"<x1>": [], "<x2>": []}
        absent: list[bool] = []
        for turn, said in zip((turn for turns in asked for turn in turns), self.answers(scenes.images, asked), strict=True):
            if turn.slots:
                for first in errors:
                    (_, x), (_, y) = (slot for slot in turn.slots if slot[0] in (first, first.replace("x", "y")))
                    sx, sy = (said[[name for name, _ in turn.slots].index(name)] for name in (first, first.replace("x", "y")))
                    if x is None or y is None:
                        absent.append(sx is None and sy is None)
                    else:
                        errors[first].append(float("inf") if sx is None or sy is None else float(np.hypot(sx - x, sy - y)))
            else:
                right[turn.kind].append(bool(said[0]))
        return Mark(len(scenes), right, errors["<x1>"], errors["<x2>"], absent)

    def answers(self, images: np.ndarray, asked: list[list[Turn]]) -> Iterator[list[Any]]:
        """For every turn in order: coordinates (or ``None``) of its slots, or ``[whether the greedy answer is exactly right]``."""
        import torch

        for start in range(0, len(asked), BATCH):
            turns = asked[start : start + BATCH]
            packed = self.packer.pack(turns)
            pixels = torch.from_numpy(images[start : start + BATCH]).permute(0, 1, 4, 2, 3).float() / 127.5 - 1
            with torch.inference_mode():
                logits = self._logits(pixels, packed)
            at = 0
            for turn in (turn for scene in turns for turn in scene):
                count = len(turn.slots) or len(self.packer.tokenizer(turn.answer).input_ids) + 1
                part, words = logits[at : at + count], packed["word"][at : at + count]
                at += count
                # greedy decoding gives exactly this answer just when each token is the likeliest after those before it
                said = part.argmax(-1)
                yield [self._place(token) for token in said.tolist()] if turn.slots else [bool((said == words).all())]

    def _logits(self, pixels: "Tensor", packed: "dict[str, torch.Tensor]") -> "Tensor":
        import torch

        from ..policies.train.vlm import turn_mask

        mask = turn_mask(packed["turn"], torch.float32)
        _, (final,) = self.reader(pixels, packed["ids"], mask, packed["positions"], packed["where"])
        return final

    def _place(self, token: int) -> float | None:
        """The centre of a location token's interval."""
        k = token - self.packer.first
        return (k + 0.5) / LOCATIONS if 0 <= k < LOCATIONS else None


def _questions(annotation: dict[str, Any], world: str, generator: np.random.Generator) -> list[Turn]:
    """Two things to point at (of held-out scenes the held-out thing), and where the scene allows a colour and a relation question."""
    asker = Asker(annotation, generator)
    if world in HELD_OUT:
        key, value = HELD_OUT[world]
        turns = [instruct(asker, thing) for thing in asker.things if thing[key] == value][:2]
    else:
        turns = [instruct(asker, asker.things[i]) for i in generator.permutation(len(asker.things))[:2]]
    return turns + [turn for maker in (colour, relation) if (turn := _try(maker, asker)) is not None]


def _try(maker: Any, asker: Asker, tries: int = 4) -> Turn | None:
    for _ in range(tries):
        turn: Turn | None = maker(asker)
        if turn is not None:
            return turn
    return None


def _quantile(values: list[float], q: float) -> float | None:
    return float(np.sort(values)[min(len(values) - 1, int(q * len(values)))]) if values else None
