"""Where a training step's time goes, operator by operator; and PyTorch's time for the same kinds of work
beside it.

    python scripts/bench/profile_step.py --preset tiny
    python scripts/bench/profile_step.py --preset medium --shapes --side ours --json profile.json

UNet only, latents cached, clipping, AdamW: the work of scripts/bench/bench.py's `step_cached`, which explains
the presets. Ours is measured by MindSpore's CPU profiler, the other side by torch.profiler, each in a process
of its own. A step profiled is slower than one that is not; "outside operators" is the rest of the profiled
step's time on the clock. Where operators run side by side it can be negative.
"""

import argparse
import json
import statistics
import tempfile
from collections import defaultdict
from pathlib import Path

import bench


def totals(operators: list[dict], *keys: str) -> list[dict]:
    """Calls and ms a step, summed over the operators that agree in `keys`, largest first."""
    sums = defaultdict(lambda: [0.0, 0.0])
    for row in operators:
        cell = sums[tuple(row[key] for key in keys)]
        cell[0] += row["calls"]
        cell[1] += row["ms"]
    rows = [
        dict(zip(keys, key)) | {"calls": round(calls, 1), "ms": round(ms, 3)}
        for key, (calls, ms) in sums.items()
    ]
    return sorted(rows, key=lambda row: -row["ms"])


def print_kinds(result: dict, keys: list[str], rows: int) -> None:
    table, whole = totals(result["operators"], *keys), result["profiled_ms"]
    table.append(
        dict.fromkeys(keys, "")
        | {"kind": "outside operators", "calls": 0, "ms": whole - sum(r["ms"] for r in table)}
    )
    print(f"{'operator':<44} {'calls':>7} {'ms':>9} {'share':>6}  {keys[-1]}")
    for row in [*table[:rows], *table[max(rows, len(table) - 1) :]]:
        print(
            f"{row['kind'][:44]:<44} {row['calls']:>7.0f} {row['ms']:>9.2f} {100 * row['ms'] / whole:>5.1f}% "
            f" {row[keys[-1]]}"
        )


def print_groups(results: dict[str, dict]) -> None:
    sides = {
        side: {row["group"]: row["ms"] for row in totals(result["operators"], "group")}
        for side, result in results.items()
    }
    for side, groups in sides.items():
        groups["outside operators"] = results[side]["profiled_ms"] - sum(groups.values())
        groups["step, profiled"], groups["step"] = results[side]["profiled_ms"], results[side]["step_ms"]
    print(f"{'ms a step':<22}" + "".join(f" {side:>9}" for side in sides) + "  ratio")
    for group in dict.fromkeys(group for groups in sides.values() for group in groups):
        values = [groups.get(group, 0.0) for groups in sides.values()]
        ratio = f" {values[0] / values[1]:>6.2f}" if len(values) == 2 and min(values) > 0 else ""
        print(f"{group:<22}" + "".join(f" {value:>9.1f}" for value in values) + ratio)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", choices=bench.presets(), default="tiny", help="sizes [%(default)s]")
    parser.add_argument("--steps", type=int, default=3, help="steps profiled [%(default)s]")
    parser.add_argument(
        "--side", choices=("ours", "peer", "both"), default="both", help="what to measure [%(default)s]"
    )
    parser.add_argument(
        "--shapes", action="store_true", help="tell apart operators of one kind by the shapes of their inputs"
    )
    parser.add_argument("--rows", type=int, default=30, help="rows of a table [%(default)s]")
    parser.add_argument(
        "--lora", action="store_true", help="bench.py's `lora` instead: rank 16, with the text encoder"
    )
    parser.add_argument("--json", type=Path, help="write everything to this file, operator by operator")
    options = parser.parse_args()
    preset, results = bench.presets()[options.preset], {}
    work = bench.LORA if options.lora else {}
    with tempfile.TemporaryDirectory() as cache:
        for side in ("ours", "peer") if options.side == "both" else (options.side,):
            result = bench.run_job(side, preset, Path(cache), task="profile", steps=options.steps, **work)
            if "error" in result:
                print(f"{side}: {result['error']}")
                continue
            result["step_ms"] = 1000 * statistics.median(result["seconds"])
            results[side] = result
            print(
                f"\n{side}: {options.preset}, a step {result['step_ms']:.1f} ms, profiled "
                f"{result['profiled_ms']:.1f} ms"
            )
            print_kinds(result, ["kind", "group"] + ["shapes"] * options.shapes, options.rows)
    print()
    print_groups(results)
    if options.json:
        options.json.write_text(json.dumps({"preset": options.preset} | results, indent=1) + "\n")


if __name__ == "__main__":
    main()
