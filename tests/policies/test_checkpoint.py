"""The checkpoint folder: written, read, verified; damage, lost files and wrong references refused in one sentence."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from triune.data import ActionChunk, Camera, Contract, Observation, Vector
from triune.data.files import atomic_folder
from triune.errors import UserError
from triune.policies.base import Plan, Policy, Request
from triune.policies.checkpoint import Checkpoint, find_checkpoint, read_checkpoint, verify, write_checkpoint, write_golden
from triune.vla.weights import digest, make_reference, references, resolve_weights

CONTRACT = Contract(
    cameras=(Camera(name="agentview", height=8, width=8),), state=Vector(names=("x", "y")), action=Vector(names=("dx", "dy"))
)


class Linear(Policy):
    """Actions from pixels, state, seed and one weight matrix."""

    def __init__(self, weight: np.ndarray) -> None:
        self.contract, self.weight = CONTRACT, weight
        self.seeds: dict[str, int] = {}

    def reset(self, session: str, seed: int) -> None:
        self.seeds[session] = seed

    def plan(self, requests: list[Request]) -> list[Plan]:
        plans = []
        for request in requests:
            noise = np.random.default_rng(self.seeds[request.session]).normal(size=(4, 2))
            seen = request.observation.images["agentview"].mean() / 255 + len(request.observation.instruction)
            plans.append(Plan(ActionChunk(self.weight @ request.observation.state * seen + noise, 20.0)))
        return plans


def observations(count: int = 4) -> list[Observation]:
    draw = np.random.default_rng(0)
    return [
        Observation({"agentview": draw.integers(0, 256, (8, 8, 3), np.uint8)}, draw.normal(size=2), f"lift cube {i}", 0.05 * i)
        for i in range(count)
    ]


@pytest.fixture
def pretrained(tmp_path: Path) -> Path:
    folder = tmp_path / "pretrained"
    (folder / "nested").mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "nested" / "model.safetensors").write_bytes(bytes(range(100)))
    (folder / "README.md").write_text("a card")
    return folder


@pytest.fixture
def written(tmp_path: Path, pretrained: Path) -> Path:
    """A checkpoint as a task's ``save`` writes it."""
    weight = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    path = tmp_path / "run" / "checkpoints" / "step-000010"
    with atomic_folder(path) as folder:
        write_checkpoint(
            folder,
            spec="experts: {}\n",
            contract=CONTRACT,
            statistics={"action": {"mean": [0.0, 0.5], "std": [1.0, 2.0]}},
            weights={"weight": weight},
            references={"vlm": make_reference(f"path:{pretrained}", "vlm")},
            settings={"denoise_steps": 10},
        )
        write_golden(folder, Linear(weight.numpy()), observations())
        (folder / "training").mkdir()
        (folder / "training" / "state.json").write_text("{}")
    (path.parent / "last").symlink_to(path.name)
    return path


def policy_of(checkpoint: Checkpoint) -> Policy:
    return Linear(load_file(checkpoint.weights)["weight"].numpy())


def test_what_is_written_is_read(written: Path, pretrained: Path) -> None:
    checkpoint = read_checkpoint(written)
    assert checkpoint.contract == CONTRACT
    assert checkpoint.statistics["action"]["mean"] == [0.0, 0.5]
    assert checkpoint.info.settings == {"denoise_steps": 10}
    assert {"triune-vla", "torch", "transformers"} <= checkpoint.info.versions.keys()
    assert checkpoint.spec.read_text() == "experts: {}\n"
    assert checkpoint.reference("vlm") == pretrained
    assert {path.suffix for path in written.rglob("*") if path.is_file()} == {".yaml", ".json", ".safetensors", ".png"}
    assert not any(name.startswith("training") for name in checkpoint.manifest.files)
    with pytest.raises(UserError, match="names no weights 'autoencoder'.*there are: vlm"):
        checkpoint.reference("autoencoder")


def test_verify_tells_the_trained_policy_from_another(written: Path) -> None:
    checkpoint = read_checkpoint(written)
    rows = verify(checkpoint, policy_of(checkpoint))
    assert [row.case for row in rows] == [0, 1, 2, 3]
    assert all(row.passed and row.error < 1e-5 for row in rows)
    assert verify(checkpoint, policy_of(checkpoint), "bfloat16")[0].tolerance > rows[0].tolerance
    assert not any(row.passed for row in verify(checkpoint, Linear(np.array([[1.0, 2.0], [3.0, 4.1]]))))


def test_a_checkpoint_without_golden_observations_cannot_be_verified(written: Path) -> None:
    for name in ("golden/golden.json",):
        manifest = json.loads((written / "manifest.json").read_text())
        del manifest["files"][name]
        (written / "manifest.json").write_text(json.dumps(manifest))
    checkpoint = read_checkpoint(written)
    with pytest.raises(UserError, match="holds no golden observations"):
        verify(checkpoint, policy_of(checkpoint))
    with pytest.raises(ValueError, match="at least 4"):
        write_golden(written, policy_of(checkpoint), observations(3))


def test_find_checkpoint(written: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    for path in (written, run, run / "checkpoints", run / "checkpoints" / "last", str(run)):
        assert find_checkpoint(path) == written
    (tmp_path / "young").mkdir()
    with pytest.raises(UserError, match="neither policy.json nor checkpoints/last"):
        find_checkpoint(tmp_path / "young")
    (tmp_path / "young" / "recipe.yaml").touch()
    with pytest.raises(UserError, match=r"no policy checkpoint yet.*--resume"):
        find_checkpoint(tmp_path / "young")
    with pytest.raises(UserError, match="there is no checkpoint"):
        find_checkpoint(tmp_path / "nowhere")
    with pytest.raises(UserError, match="is a file"):
        find_checkpoint(written / "spec.yaml")


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize("damage", [flip, truncate, Path.unlink])
@pytest.mark.parametrize("name", ["model.safetensors", "spec.yaml", "statistics.json", "golden/00-agentview.png"])
def test_damage_is_refused(written: Path, name: str, damage: Callable[[Path], None]) -> None:
    damage(written / name)
    with pytest.raises(UserError, match=f"{name} (is missing|is damaged).*copy the checkpoint again"):
        read_checkpoint(written)


def test_a_broken_manifest_is_refused(written: Path) -> None:
    manifest = written / "manifest.json"
    whole = manifest.read_text()
    manifest.write_text(whole[:-20])
    with pytest.raises(UserError, match="manifest.json cannot be read"):
        read_checkpoint(written)
    tree = json.loads(whole)
    manifest.write_text(json.dumps({**tree, "files": {**tree["files"], "../../../secret": "0"}}))
    with pytest.raises(UserError, match="outside the checkpoint"):
        read_checkpoint(written)
    del tree["files"]["policy.json"]
    manifest.write_text(json.dumps(tree))
    with pytest.raises(UserError, match=r"does not list policy\.json"):
        read_checkpoint(written)
    manifest.unlink()
    with pytest.raises(UserError, match=r"has no manifest\.json, so it was not copied whole"):
        read_checkpoint(written)


def test_other_pretrained_weights_are_refused(written: Path, pretrained: Path) -> None:
    checkpoint = read_checkpoint(written)
    (pretrained / "README.md").write_text("a better card")
    (pretrained / ".cache").write_text("left by a tool")
    assert checkpoint.reference("vlm") == pretrained
    flip(pretrained / "nested" / "model.safetensors")
    with pytest.raises(UserError, match=r"not those that were trained with: sha256 .* instead of .*train anew"):
        checkpoint.reference("vlm")
    pretrained.rename(pretrained.with_name("moved"))
    with pytest.raises(UserError, match="there is no folder"):
        checkpoint.reference("vlm")


def test_digest_is_of_names_and_content(pretrained: Path) -> None:
    before = digest(pretrained)
    for note in ("README.md", "training.json"):
        (pretrained / note).write_text("told afterwards")
    assert digest(pretrained) == before
    (pretrained / "config.json").rename(pretrained / "settings.json")
    assert digest(pretrained) != before


def test_resolve_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(references, "ASSETS", tmp_path)
    (tmp_path / "embedded_vlm" / "v1").mkdir(parents=True)
    (tmp_path / "autoencoder" / "v2").mkdir(parents=True)
    assert resolve_weights("embedded:v1", "vlm") == tmp_path / "embedded_vlm" / "v1"
    assert resolve_weights("embedded:v2", "autoencoder") == tmp_path / "autoencoder" / "v2"
    for wrong in ("embedded:v3", "embedded:../autoencoder/v2"):
        with pytest.raises(UserError, match=r"there are: embedded:v1"):
            resolve_weights(wrong, "vlm")
    for wrong in ("v1", "embedded:", "hf:owner/name", "hf:@main", "s3:bucket", ""):
        with pytest.raises(UserError, match="write embedded:<version>, path:<folder> or hf:<id>@<revision>"):
            resolve_weights(wrong, "vlm")


def test_hub_references(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the cache without the network; what is not cached is a sentence when the network is off."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    snapshot = tmp_path / "models--owner--name" / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert resolve_weights(f"hf:owner/name@{commit}", "vlm").samefile(snapshot)
    with pytest.raises(UserError, match=r"'hf:owner/other@main' could not be downloaded .*path:<folder>"):
        resolve_weights("hf:owner/other@main", "vlm")
    with pytest.raises(UserError, match="is not a hub reference"):
        resolve_weights("hf:a/b/c@main", "vlm")
