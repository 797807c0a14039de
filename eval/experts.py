"""How often the scripted experts succeed: ``python -m triune.eval.experts [--episodes N] [--seed S] [--out FILE] [world ...]``.

Results are kept per world in one JSON file; a world measured again replaces its row.
"""

import argparse
import json
import shlex
import statistics
from datetime import date
from pathlib import Path
from typing import Any

from ..data.files import write_file
from ..envs import world_names
from ..envs.experts import success_rate
from .provenance import hardware, versions
from .statistics import wilson
from .suite import EVALUATION

RESULTS = Path(__file__).parent / "results" / "expert_rates.json"


def measure(name: str, episodes: int, seed: int) -> dict[str, Any]:
    """One row: successes of a world's expert on ``episodes`` consecutive seeds, with the 95 % Wilson interval."""
    rate = success_rate(name, range(seed, seed + episodes))
    return {
        "name": name,
        "episodes": rate.episodes,
        "successes": rate.successes,
        "rate": rate.successes / rate.episodes,
        "ci95": [round(bound, 4) for bound in wilson(rate.successes, rate.episodes)],
        "median_steps": statistics.median(rate.steps) if rate.steps else None,
        "max_steps": max(rate.steps, default=None),
        "failed_seeds": list(rate.failures),
        "seeds": [seed, seed + episodes - 1],
        "date": date.today().isoformat(),
    }


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Success rates of the scripted experts.")
    parser.add_argument("worlds", nargs="*", help="world names; default: all")
    parser.add_argument("--episodes", type=int, default=10)
    parser.add_argument("--seed", type=int, default=EVALUATION)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    names = options.worlds or world_names()
    rows: dict[str, dict[str, Any]] = {}
    if options.out.is_file():
        rows = {row["name"]: row for row in json.loads(options.out.read_text())["worlds"]}
    for name in names:
        command = shlex.join(
            ["python", "-m", "triune.eval.experts", "--episodes", str(options.episodes), "--seed", str(options.seed), name]
        )
        row = rows[name] = {**measure(name, options.episodes, options.seed), "command": command}
        print(f"{name:40s} {row['successes']:3d}/{row['episodes']:<3d} median {row['median_steps']} steps", flush=True)
        ordered = [rows[known] for known in world_names() if known in rows]
        write_file(options.out, json.dumps({"hardware": hardware(), "versions": versions(), "worlds": ordered}, indent=1) + "\n")


if __name__ == "__main__":
    main()
