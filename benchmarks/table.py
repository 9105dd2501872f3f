"""Prints the table of docs/performance.md from the newest results of benchmarks/run.py: `python benchmarks/table.py`."""

import itertools
import json
import pathlib
import statistics

RESULTS = pathlib.Path(__file__).parent / "results"


def lines() -> list[str]:
    """Makes the table, in Markdown: a line a case, whose first row is ours and the rest its peers."""
    rows: list[dict] = []
    for kind in ("input", "step", "loss"):
        whole = RESULTS.glob(f"{kind}-[0-9][0-9][0-9][0-9]-[0-9][0-9]-[0-9][0-9].json")
        rows += json.loads(max(whole).read_text())["rows"]
    found = ["| | simclr_jax | beside | times as fast |", "| --- | --- | --- | --- |"]
    for case, group in itertools.groupby(rows, lambda row: row["name"].rpartition(", ")[0]):
        ours, *peers = group
        beside = "; ".join(f"{_name(row)} {_measured(row)}" for row in peers)
        timed = [row for row in peers if "failed" not in row and "failed" not in ours]
        ratios = ", ".join(_ratios(ours, row) for row in timed)
        found.append(f"| {case} | {_measured(ours)} | {beside} | {ratios} |")
    return found


def _name(row: dict) -> str:
    return row["name"].rpartition(", ")[2]


def _measured(row: dict) -> str:
    """Says the median of the turns, and the least and the most."""
    if "failed" in row:
        return row["failed"]
    rate = "images_per_second" in row
    values = row["images_per_second"] if rate else [1000 * x for x in row["seconds"]]
    middle, least, most = (
        f"{x:,.0f}" if x >= 100 else f"{x:.3g}"
        for x in (statistics.median(values), min(values), max(values))
    )
    return f"{middle} ({least} to {most}) {'images/s' if rate else 'ms'}"


def _ratios(ours: dict, peer: dict) -> str:
    """Says how many times as fast ours is by the clock and, in brackets, by CPU time."""
    if "seconds" in ours:
        pairs = [(peer[key], ours[key]) for key in ("seconds", "cpu_seconds")]
    else:
        pairs = [(ours[k], peer[k]) for k in ("images_per_second", "images_per_cpu_second")]
    clock, cpu = (statistics.median(a) / statistics.median(b) for a, b in pairs)
    return f"{_short(clock)} ({_short(cpu)})"


def _short(ratio: float) -> str:
    return f"{ratio:.2g}" if ratio < 100 else "over 100"


if __name__ == "__main__":
    print("\n".join(lines()))
