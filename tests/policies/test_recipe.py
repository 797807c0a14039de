"""Recipes: from a name to a run, and every mistake in one sentence."""

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Literal

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from triune.config import Strict
from triune.errors import UserError
from triune.policies.train import recipe as recipes
from triune.policies.train.loop import Part, TrainConfig, step_seed
from triune.policies.train.recipe import run


class Recipe(Strict):
    """A linear regression as a kind of recipe."""

    kind: Literal["line"]
    width: int = 3
    train: TrainConfig


class Line:
    """Its task."""

    def __init__(self, recipe: Recipe) -> None:
        torch.manual_seed(recipe.train.seed)
        self.recipe = recipe
        self.module = nn.Linear(recipe.width, 1)

    def batch(self, part: Part) -> Tensor:
        generator = torch.Generator().manual_seed(step_seed(self.recipe.train.seed, part.index))
        return torch.randn(self.recipe.train.batch_size, self.recipe.width, generator=generator)

    def losses(self, batch: Tensor) -> dict[str, Tensor]:
        return {"loss": (self.module(batch) - batch.sum(1, keepdim=True)).square().mean()}

    def validate(self) -> dict[str, float]:
        return {}

    def save(self, folder: Path, weights: dict[str, Tensor]) -> None:
        save_file(weights, folder / "model.safetensors")


def build(recipe: Recipe, out: Path) -> Line:
    return Line(recipe)


@pytest.fixture
def line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A recipe file of kind ``line``."""
    module = ModuleType("line_kind")
    module.Recipe, module.build = Recipe, build  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "line_kind", module)
    monkeypatch.setitem(recipes.KINDS, "line", "line_kind")
    path = tmp_path / "line.yaml"
    path.write_text("kind: line\ntrain: {steps: 6, save_every: 3, precision: fp32, device: cpu, lr: 0.1}\n")
    return path


def test_a_recipe_trains_and_its_resolved_copy_repeats_it(line: Path, tmp_path: Path) -> None:
    first = run(str(line), ["train.lr=0.05", "width=4"], tmp_path / "first", resume=False)
    kept = tmp_path / "first" / "recipe.yaml"
    assert "lr: 0.05" in kept.read_text()
    assert "width: 4" in kept.read_text()
    again = run(str(kept), [], tmp_path / "again", resume=False)
    weights = [load_file(folder / "model.safetensors") for folder in (first, again)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_resuming_a_recipe(line: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    with pytest.raises(UserError, match="there is no run to resume"):
        run(str(line), [], out, resume=True)
    assert not out.exists()
    run(str(line), ["train.schedule=constant", "train.steps=3"], out, resume=False)
    with pytest.raises(UserError, match="already holds a run"):
        run(str(line), [], out, resume=False)
    with pytest.raises(UserError, match="width was 3 and is 5"):
        run(str(line), ["train.schedule=constant", "width=5"], out, resume=True)
    assert run(str(line), ["train.schedule=constant", "train.log_every=1"], out, resume=True).name == "step-000006"


def test_a_run_killed_before_its_first_checkpoint_begins_anew(line: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    out.mkdir()
    (out / "recipe.yaml").write_text(line.read_text())
    (out / "log.jsonl").write_text('{"step": 1, "loss": 0.5}\n{"step": 2, "lo')
    assert run(str(line), [], out, resume=True).name == "step-000006"
    assert len((out / "log.jsonl").read_text().splitlines()) == 1


@pytest.mark.parametrize(
    ("text", "overrides", "said"),
    [
        ("train: {steps: 1}", [], "'kind' is required"),
        ("kind: lines", [], "kind 'lines' is unknown; did you mean 'line'"),
        ("kind: [1]", [], "kind '[1]' is unknown"),
        ("kind: line\ntrain: {steps: 1}\nwidht: 3", [], "unknown key 'widht'; did you mean 'width'"),
        ("kind: line\ntrain: {steps: 1, warm_up: 3}", [], "unknown key 'train.warm_up'; did you mean 'warmup'"),
        ("kind: line\ntrain: {steps: 0}", [], "'train.steps'"),
        ("kind: line\ntrain: {steps: 2}", ["train.precision=fp16"], "'train.precision'"),
        ("kind: line", [], "'train' is required"),
    ],
)
def test_mistakes_are_one_sentence(line: Path, tmp_path: Path, text: str, overrides: list[str], said: str) -> None:
    line.write_text(text)
    with pytest.raises(UserError) as error:
        run(str(line), overrides, tmp_path / "run", resume=False)
    assert said in str(error.value)
    assert str(line) in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()
