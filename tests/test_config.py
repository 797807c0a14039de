"""The config loader: bases, deletions, overrides, and errors that name the nearest valid key."""

from pathlib import Path

import pytest

from triune import UserError
from triune.config import CONFIGS, Strict, dump, find, load, load_tree, merge, parse


class Optim(Strict):
    lr: float = 1e-3
    warmup: int = 0


class Recipe(Strict):
    name: str
    optim: Optim = Optim()
    parts: dict[str, Optim] = {}
    steps: int | None = None


def write(folder: Path, **files: str) -> Path:
    for name, text in files.items():
        (folder / f"{name}.yaml").write_text(text)
    return folder


def test_a_base_is_merged_below(tmp_path: Path) -> None:
    write(tmp_path, a="name: a\nparts: {x: {lr: 1, warmup: 5}, y: {lr: 2}}\n", b="base: a\nname: b\nparts: {x: {lr: 3}, y: null}\n")
    recipe = load(Recipe, tmp_path / "b.yaml")
    assert recipe == Recipe(name="b", parts={"x": Optim(lr=3, warmup=5)})


def test_bases_chain_and_order_is_kept(tmp_path: Path) -> None:
    write(tmp_path, a="name: a\nparts: {x: {}, y: {}}\n", b="base: a\nparts: {z: {}}\n", c="base: b\nparts: {x: {lr: 9}}\n")
    assert list(load(Recipe, tmp_path / "c.yaml").parts) == ["x", "y", "z"]


def test_a_base_may_be_a_path(tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    write(tmp_path, a="name: a\n")
    write(tmp_path / "inner", b="base: ../a.yaml\nsteps: 3\n")
    assert load(Recipe, tmp_path / "inner" / "b.yaml") == Recipe(name="a", steps=3)


def test_a_missing_base_is_named(tmp_path: Path) -> None:
    write(tmp_path, b="base: gone\n")
    with pytest.raises(UserError, match=r"its base .*gone\.yaml does not exist"):
        load_tree(tmp_path / "b.yaml")


@pytest.mark.parametrize("files", [{"a": "base: a\n"}, {"a": "base: b\n", "b": "base: c\n", "c": "base: a\n"}])
def test_a_cycle_of_bases_is_refused(tmp_path: Path, files: dict[str, str]) -> None:
    with pytest.raises(UserError, match="leads back"):
        load_tree(write(tmp_path, **files) / "a.yaml")


def test_a_base_is_one_name(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="must be the name of one YAML file"):
        load_tree(write(tmp_path, a="base: [b, c]\n") / "a.yaml")


def test_overrides_are_yaml_values_under_dotted_keys(tmp_path: Path) -> None:
    write(tmp_path, a="name: a\nparts: {x: {lr: 1}}\nsteps: 5\n")
    tree = load_tree(tmp_path / "a.yaml", ["optim.lr=0.5", "parts.x=null", "parts.y.warmup=7", "steps=", "name='1'"])
    assert parse(Recipe, tree, "here") == Recipe(name="1", optim=Optim(lr=0.5), parts={"y": Optim(warmup=7)})


def test_numbers_in_scientific_notation_are_numbers(tmp_path: Path) -> None:
    write(tmp_path, a="name: a\n")
    assert load_tree(tmp_path / "a.yaml", ["optim.lr=1e-3", "big=2E5", "text=1e"]) == {
        "name": "a",
        "optim": {"lr": 1e-3},
        "big": 2e5,
        "text": "1e",
    }


@pytest.mark.parametrize("override", ["lr", "=3", "optim..lr=3"])
def test_a_malformed_override_is_refused(tmp_path: Path, override: str) -> None:
    write(tmp_path, a="name: a\n")
    with pytest.raises(UserError, match="must have the form"):
        load_tree(tmp_path / "a.yaml", [override])


@pytest.mark.parametrize("override", ["name=[1", "name=a: b: c"])
def test_an_override_that_is_not_yaml_is_refused(tmp_path: Path, override: str) -> None:
    write(tmp_path, a="name: a\n")
    with pytest.raises(UserError, match="is not valid YAML"):
        load_tree(tmp_path / "a.yaml", [override])


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("stesp=3", r"unknown key 'stesp'; did you mean 'steps'\?"),
        ("optim.warmpu=3", r"unknown key 'optim.warmpu'; did you mean 'warmup'\? \(valid: lr, warmup\)"),
        ("parts.x.lrr=3", r"unknown key 'parts.x.lrr'; did you mean 'lr'\?"),
        ("optim.lr=fast", r"'optim.lr': Input should be a valid number"),
        ("name=", "'name' is required"),
    ],
)
def test_a_wrong_value_says_what_and_where(tmp_path: Path, override: str, sentence: str) -> None:
    write(tmp_path, a="name: a\n")
    with pytest.raises(UserError, match=sentence) as caught:
        load(Recipe, tmp_path / "a.yaml", [override])
    assert str(tmp_path / "a.yaml") in str(caught.value)


@pytest.mark.parametrize(
    ("text", "sentence"), [("a: [", "not valid YAML"), ("- a\n", "must hold a YAML mapping"), ("", "must hold a YAML mapping")]
)
def test_a_file_that_is_no_mapping_is_refused(tmp_path: Path, text: str, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        load_tree(write(tmp_path, a=text) / "a.yaml")


def test_find_knows_names_and_paths(tmp_path: Path) -> None:
    write(tmp_path, a="name: a\n")
    assert find(str(tmp_path / "a.yaml"), "model") == tmp_path / "a.yaml"
    with pytest.raises(UserError, match="there is no suite config 'qickstart'"):
        find("qickstart", "suite")


def test_merge_never_changes_its_inputs() -> None:
    base, over = {"a": {"b": 1, "c": 2}}, {"a": {"b": None, "d": {"e": 3}}}
    assert merge(base, over) == {"a": {"c": 2, "d": {"e": 3}}}
    assert (base, over) == ({"a": {"b": 1, "c": 2}}, {"a": {"b": None, "d": {"e": 3}}})


def test_a_dumped_config_loads_again(tmp_path: Path) -> None:
    recipe = Recipe(name="a", parts={"x": Optim(lr=0.25)}, steps=None)
    (tmp_path / "a.yaml").write_text(dump(recipe))
    assert load(Recipe, tmp_path / "a.yaml") == recipe


def test_configs_are_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Optim().lr = 3  # type: ignore[misc]


def test_every_config_reads_with_its_bases() -> None:
    for path in CONFIGS.rglob("*.yaml"):
        load_tree(path)
