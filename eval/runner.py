"""``evaluate``: a suite, a policy, seeds -> ``episodes.jsonl`` and ``results.json``."""

import hashlib
import json
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from ..data import Contract
from ..data.files import sha256, write_file
from ..data.statistics import load_statistics
from ..envs import View, build_world, camera_names
from ..envs.vector import WorldPool
from ..envs.view import choose, describe
from ..errors import UserError
from ..policies import find_checkpoint, open_policy
from ..policies.lerobot import is_lerobot
from ..policies.remote import RemotePolicy, is_remote, open_remote
from .controls import Change, Control
from .episodes import Job, Ledger, Row
from .film import Cinema
from .provenance import command, hardware, versions
from .rollout import rollout
from .statistics import wilson
from .suite import EVALUATION, Suite, check_seeds, load_suite, suite_name

EXPERT = "expert"  # the policy name under which the worlds' scripted experts act
Cuts = tuple[tuple[str, str], ...]
OnEpisode = Callable[[Row, int, int], None]


@dataclass(frozen=True)
class Facts:
    """What must be known of a world, as it is seen in this evaluation, before its first episode."""

    view: View
    instruction: str
    rate: float
    contract: Contract


def evaluate(
    suite: str,
    policy: str,
    *,
    out: Path,
    episodes: int | None = None,
    seed: int = EVALUATION,
    workers: int = 2,
    overrides: list[str] | None = None,
    on_episode: OnEpisode | None = None,
) -> dict[str, Any]:
    """Evaluate a policy in closed loop; returns what ``results.json`` holds.

    An interrupted evaluation goes on where it stopped when it is called again with the same arguments; more episodes
    may then be asked for. Outcomes depend on suite, policy and seeds, not on ``workers``.

    Args:
        suite: name in ``configs/suite/``, or path of a YAML file.
        policy: checkpoint folder, ours or lerobot's; the address of a server, ``ws://host:port`` or ``wss://...`` (its token in
            ``TRIUNE_TOKEN``); or ``expert`` for the scripted experts of the worlds.
        out: folder for ``results.json``, ``episodes.jsonl``, ``videos/`` and ``foresight/``.
        episodes: per task, instead of the suite's numbers.
        seed: first seed; episode i of each task has seed ``seed + i``.
        workers: processes that step worlds.
        overrides: dotted ``key=value`` changes of the suite.
        on_episode: called with each new row, the number of episodes done and their total.

    Raises:
        UserError: an unknown suite, task or checkpoint; a policy whose contract does not fit a world; training seeds;
            ``out`` holds another evaluation; or no episode could be played.
    """
    began = time.perf_counter()
    spec = load_suite(suite, overrides)
    remote = is_remote(policy)
    checkpoint = None if policy == EXPERT or remote else find_checkpoint(policy)
    controls = {} if policy == EXPERT else spec.controls
    cutting = [name for name, control in controls.items() if control.cut is not None]
    if checkpoint is not None and is_lerobot(checkpoint) and cutting:
        raise UserError(
            f"{policy} is a policy of lerobot, which has no edges to cut; drop the control '{cutting[0]}' (controls=null drops all)"
        )
    if remote and (within := [name for name, control in controls.items() if control.cut is not None or control.state == "blank"]):
        raise UserError(
            f"the control '{within[0]}' needs the checkpoint itself, and {policy} is a server; drop it (controls=null drops all)"
        )
    check_seeds(seed, max(spec.count(task, None, episodes) for task in spec.tasks))
    offers = {task: camera_names(spec.world(task)) for task in spec.tasks}
    cinema = Cinema(out, spec.videos.first, spec.videos.failures)
    acting = open_remote(policy, foresight=cinema.open) if remote else None if checkpoint is None else open_policy(checkpoint)
    facts = {task: _facts(spec, task, offers[task], None if acting is None else acting.contract, policy) for task in spec.tasks}
    fingerprint = _served(acting) if isinstance(acting, RemotePolicy) else None
    if checkpoint is not None:
        fingerprint = sha256(checkpoint / identity_file(checkpoint))
    _claim(out, spec, suite, fingerprint)
    ledger = Ledger(out / "episodes.jsonl")
    batches = _batches(spec, controls, checkpoint, facts, seed, episodes)
    keys = [job.key for jobs in batches.values() for job in jobs]
    fresh = 0
    with one_thread(), WorldPool(workers) as pool, closing(acting.client) if isinstance(acting, RemotePolicy) else nullcontext():
        for cuts, jobs in batches.items():
            left = [job for job in jobs if job.key not in ledger.rows]
            if cuts and left and checkpoint is not None:
                acting = open_policy(checkpoint, cuts)
            for row in rollout(left, acting, pool, cinema, slots=spec.slots, settle=spec.settle):
                ledger.append(row)
                fresh += 1
                if on_episode is not None:
                    on_episode(row, sum(key in ledger.rows for key in keys), len(keys))
    ledger.sort(keys)
    rows = [ledger.rows[key] for key in keys]
    if all(row.error for row in rows):
        raise UserError(f"none of the {len(rows)} episodes could be played; the first says: {rows[0].error} (all: {ledger.path})")
    results = summarise(spec, controls, facts, rows)
    path = out / "results.json"
    earlier = json.loads(path.read_text())["minutes"] if path.exists() else 0.0
    results |= {
        "policy": policy,
        "checkpoint": None if checkpoint is None else {"step": checkpoint.name, "manifest_sha256": fingerprint},
        "suite": suite_name(suite),
        "title": spec.title,
        "seeds": {"first": seed, "last": max(row.seed for row in rows)},
        "hardware": hardware(),
        "versions": versions(),
        "command": command(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "minutes": round(earlier + (time.perf_counter() - began) / 60, 2) if fresh or not earlier else earlier,
    }
    write_file(path, json.dumps(results, indent=1))
    return results


@contextmanager
def one_thread() -> Iterator[None]:
    """Torch computes in one thread: sums, and so outcomes, do not depend on the machine's cores, and the worlds need the others.

    Two threads beside two worlds on two cores waited for each other: 0.4 to 0.9 s for four plans instead of 0.27 s.
    """
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def summarise(spec: Suite, controls: dict[str, Control], facts: dict[str, Facts], rows: list[Row]) -> dict[str, Any]:
    """``tasks``, ``controls`` and ``overall`` of ``results.json``."""
    tasks = []
    for name, task in spec.tasks.items():
        mine = [row for row in rows if row.control is None and row.task == name]
        extra = {"instruction": facts[name].instruction, "world": spec.world(name), "view": describe(facts[name].contract)}
        tasks.append(_row(name, task.scored, mine) | extra)
    scored = [row for row in rows if row.control is None and spec.tasks[row.task].scored]
    overall = _row("overall", True, scored) if scored else None
    if overall is not None and spec.gate is not None:
        overall |= {"gate": f">= {spec.gate:g}", "passed": overall["rate"] >= spec.gate}
    out = []
    for name, control in controls.items():
        mine = [row for row in rows if row.control == name]
        line = _row(name, False, mine)
        line["tasks"] = [_row(task, False, [row for row in mine if row.task == task]) for task in spec.tasks_of(control)]
        if control.below is not None:
            line |= {"gate": f"< {control.below:g}", "passed": line["rate"] < control.below}
        out.append(line)
    return {"tasks": tasks, "controls": out, "overall": overall}


def _row(name: str, scored: bool, rows: list[Row]) -> dict[str, Any]:
    wins = sum(row.success_any for row in rows)
    took = [row.first_success_step for row in rows if row.success_any and row.first_success_step is not None]
    thought = [row.policy_ms for row in rows if row.policy_ms is not None]
    return {
        "name": name,
        "scored": scored,
        "episodes": len(rows),
        "successes": wins,
        "rate": wins / len(rows),
        "ci95": [round(bound, 4) for bound in wilson(wins, len(rows))],
        "successes_end": sum(row.success_end for row in rows),
        "median_steps": float(np.median(took)) if took else None,
        "policy_ms": round(float(np.mean(thought)), 1) if thought else None,
        "errors": sum(row.error is not None for row in rows),
    }


def _facts(spec: Suite, task: str, offers: tuple[str, ...], wanted: Contract | None, policy: str) -> Facts:
    """A task's world, seen as the suite says and else as the policy's contract wants it.

    Raises:
        UserError: the world cannot be seen so, or the contract wants it otherwise.
    """
    name, like = spec.world(task), wanted
    if like is not None:
        like = like.model_copy(update={"cameras": tuple(c for c in like.cameras if c.name in offers or not c.optional)})
    view = choose(render=spec.render, size=spec.size, cameras=spec.cameras, rate=spec.rate, like=like)
    try:
        world = build_world(name, view)
    except UserError as error:
        raise error if wanted is None else UserError(f"policy {policy} does not fit world {name}: {error}") from None
    world.close()
    if wanted is not None:
        wanted.require(world.contract, f"policy {policy}", f"world {name}")
    return Facts(view, world.task_description, world.rate, world.contract)


def _served(policy: RemotePolicy) -> str:
    """What tells served policies apart, as far as a server says it: the policy's name and contract."""
    welcome = policy.client.welcome
    return f"served {hashlib.sha256(json.dumps([welcome.policy, welcome.contract], sort_keys=True).encode()).hexdigest()}"


def identity_file(checkpoint: Path) -> str:
    """The file whose hash tells checkpoints apart: the manifest names every other one with its own; lerobot has only weights."""
    return "model.safetensors" if is_lerobot(checkpoint) else "manifest.json"


def _batches(
    spec: Suite, controls: dict[str, Control], checkpoint: Path | None, facts: dict[str, Facts], seed: int, episodes: int | None
) -> dict[Cuts, list[Job]]:
    """Jobs by the edges that are cut: each group needs the policy loaded once."""

    def jobs(task: str, name: str | None, control: Control | None, change: Change | None) -> list[Job]:
        fact = facts[task]
        count = spec.count(task, control, episodes)
        names, world = fact.contract.action.names, spec.world(task)
        return [Job(task, world, seed + i, fact.rate, names, i, name, change, fact.view) for i in range(count)]

    batches: dict[Cuts, list[Job]] = {(): [job for task in spec.tasks for job in jobs(task, None, None, None)]}
    words = {task: fact.instruction for task, fact in facts.items()}
    for name, control in controls.items():
        tasks = spec.tasks_of(control)
        mean = mean_state(checkpoint) if control.state == "blank" and checkpoint is not None else None
        cuts = (control.cut,) if control.cut is not None else ()
        for task in tasks:
            batches.setdefault(cuts, []).extend(jobs(task, name, control, control.change(task, tasks, words, mean)))
    return batches


def mean_state(checkpoint: Path) -> np.ndarray:
    """(S,) mean proprioception of the training data, from the checkpoint's statistics.

    Raises:
        UserError: ``checkpoint`` holds no statistics of ``observation.state``.
    """
    statistics = load_statistics(checkpoint / "statistics.json")
    if "observation.state" not in statistics:
        raise UserError(f"{checkpoint}/statistics.json has no observation.state, so its mean cannot stand in; drop that control")
    return np.asarray(statistics["observation.state"].mean, np.float32)


def _claim(out: Path, spec: Suite, suite: str, fingerprint: str | None) -> None:
    """Mark ``out`` as this evaluation's; the numbers of episodes and the seeds may differ between calls."""
    said = spec.model_dump(mode="json", exclude={"episodes", "videos", "gate", "title"})
    for part in (*said["tasks"].values(), *said["controls"].values()):
        part.pop("episodes")
    identity = {"suite": suite_name(suite), "policy": fingerprint or EXPERT, "settings": said}
    path = out / "evaluation.json"
    if path.exists():
        before = json.loads(path.read_text())
        changed = [key for key in identity if before.get(key) != identity[key]]
        if changed:
            raise UserError(f"{out} holds an evaluation with another {' and '.join(changed)}; choose another --out, or delete that folder")
    write_file(path, json.dumps(identity, indent=1))
