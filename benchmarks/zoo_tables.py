"""Fill the tables of docs/results/zoo.md from the JSON files beside it.

python -m benchmarks.zoo_tables
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from typing import Any

from benchmarks.markers import RESULTS, fill
from benchmarks.zoo_models import LIBRARIES

__all__ = ["families", "random_networks", "reason_of", "reasons", "summary", "tools"]

Record = dict[str, Any]
_NOT_MEASURED = ("build failed", "timeout", "memory", "crashed")
_ACTIONS = ("fold", "forward", "affine", "drop", "keep")
_REASONS = (
    ("has no number `eps`", "a frozen norm whose eps is not an attribute"),
    ("called neither in eval nor", "a norm that is never called"),
    ("called as a function", "F.batch_norm called as a function"),
    ("nothing can be proved in float64", "the original itself differs from its float64 run"),
    ("the original repeats itself", "the original differs from itself"),
)
_REFUSED = "refused as they must be"
_KINDS = {"CaptureError": "no capture"}


def _documents() -> Iterator[tuple[str, Record]]:
    for library in LIBRARIES:
        path = RESULTS / f"zoo-{library}.json"
        if path.exists():
            yield library, json.loads(path.read_text())


def reason_of(result: Record) -> str:
    """Return the class of a refusal, with module names left out."""
    text = " ".join([*result.get("whats", ()), result.get("reason", "")])
    for mark, reason in _REASONS:
        if mark in text:
            return reason
    if result.get("reason", "").startswith("float32"):
        return "its float32 check fails, its float64 check passes"
    if (kind := _KINDS.get(result.get("kind", ""))) is not None:
        causes = [re.split(r"[:;(]", what)[0].strip() for what in result.get("whats", ())]
        return f"{kind}: {', '.join(dict.fromkeys(causes))}"
    what = next(iter(result.get("whats", ())), result.get("reason", "no reason"))
    return re.sub(r"\b\w+(\.\w+)+\b", "…", str(what).splitlines()[0])[:90]


def _results(records: Iterable[Record], target: str) -> list[Record]:
    return [record["targets"][target] for record in records if target in record.get("targets", {})]


def _worst(results: Iterable[Record], dtype: str) -> str:
    """Return the worst error that was let through, and in float32 how much of its bound that is."""
    passed = [r[dtype] for r in results if r.get("status") == "converted"]
    errors = [float(said["error"]) for said in passed if not said.get("unprovable")]
    if not errors:
        return ""
    if dtype == "float64":
        return f"{max(errors):.1e}"
    ratios = [float(s["error"]) / float(s["bound"]) for s in passed if not s.get("unprovable")]
    return f"{max(errors):.1e} ({max(r for r in ratios if math.isfinite(r)):.2f})"


def _counts(results: Iterable[Record]) -> Counter[str]:
    total: Counter[str] = Counter()
    for result in results:
        total.update(result.get("actions", {}))
    return total


def _table(head: str, rows: Iterable[list[Any]]) -> list[str]:
    lines = [f"| {head} |", "|---" * (head.count("|") + 1) + "|"]
    return lines + ["| " + " | ".join(map(str, row)) + " |" for row in rows]


def _targets(document: Record) -> list[str]:
    found = (target for r in document["architectures"].values() for target in r.get("targets", {}))
    return list(dict.fromkeys(found))


def summary() -> list[str]:
    """Return a row for each library and target."""
    rows = []
    listed = json.loads((RESULTS / "zoo-listing.json").read_text())
    for library, document in _documents():
        records = [r for r in document["architectures"].values() if r["status"] != "no norms"]
        ended = Counter(record["status"] for record in records)
        for target in _targets(document):
            results = _results(records, target)
            status = Counter(result.get("status") for result in results)
            counts = _counts(r for r in results if r.get("status") == "converted")
            cells = [
                library,
                f"`{target}`",
                f"{len(records)} of {len(listed[library]['with'])}",
                f"**{status['converted']}**",
                status["refused"],
                " / ".join(str(ended[name]) for name in _NOT_MEASURED),
                status["wrong"],
                sum(bool(result.get("silent")) for result in results),
                _worst(results, "float64"),
                _worst(results, "float32"),
                *(counts[action] for action in _ACTIONS),
            ]
            rows.append(cells)
    head = (
        "library | target | measured | converted | refused | not built / time / memory / crash "
        "| wrong | of these silent | float64 error | float32 error (of its bound) | folded | forward "
        "| affine | dropped | kept"
    )
    return _table(head, rows)


def captures() -> list[str]:
    """Return how often each capture told the dataflow, and how many networks end to end is blind for."""
    rows = []
    for library, document in _documents():
        records = [r for r in document["architectures"].values() if r.get("targets")]
        used = Counter(record["capture"] for record in records if record.get("capture"))
        sights = [float(r["sight"]) for r in records if r.get("sight") is not None]
        seconds = sorted(record["seconds"]["total"] for record in records)
        cells = [
            library,
            ", ".join(f"{name} {times}" for name, times in used.most_common()),
            f"{min(sights, default=math.nan):.2g}",
            sum(bool(record.get("blind")) for record in records),
            sum(
                bool(record["targets"]["wn"].get("float32", {}).get("unprovable"))
                for record in records
            ),
            f"{seconds[len(seconds) // 2]:.0f} / {seconds[-1]:.0f}" if seconds else "",
            f"{max((r['peak MiB'] for r in records), default=0) / 1024:.1f}",
        ]
        rows.append(cells)
    head = (
        "library | captures | smallest sight | blind | float32 proves nothing "
        "| seconds, median / most | peak GiB"
    )
    return _table(head, rows)


def reasons() -> list[str]:
    """Return why what was not converted was not, with the architectures."""
    found: defaultdict[tuple[str, str, str], list[str]] = defaultdict(list)
    for library, document in _documents():
        for name, record in document["architectures"].items():
            if record["status"] in _NOT_MEASURED:
                reason = str(record.get("reason", "")).splitlines()[0][:120]
                found[library, record["status"], reason].append(name)
            elif record["status"] in ("refused", "wrong"):
                worst = [r for r in record["targets"].values() if r["status"] == record["status"]]
                found[library, record["status"], reason_of(worst[0])].append(name)
    rows = [
        [library, status, reason.replace("|", "\\|"), len(names), ", ".join(names)]
        for (library, status, reason), names in sorted(found.items(), key=lambda i: -len(i[1]))
    ]
    return _table("library | status | reason | architectures | which", rows)


def families() -> list[str]:
    """Return a row for each model file."""
    rows = []
    for library, document in _documents():
        by_family: defaultdict[str, list[Record]] = defaultdict(list)
        for record in document["architectures"].values():
            if record["status"] != "no norms":
                by_family[record["family"]].append(record)
        for family, records in sorted(by_family.items()):
            results = _results(records, "wn")
            counts = _counts(results)
            converted = sum(record["status"] == "converted" for record in records)
            cells = [
                library,
                family,
                len(records),
                converted,
                ", ".join(sorted({r["capture"] for r in records if r.get("capture")})),
                *(counts[action] for action in ("fold", "forward", "affine")),
                _worst(results, "float64"),
            ]
            rows.append(cells)
    head = (
        "library | model file | architectures | converted | capture | folded | forward | affine "
        "| float64 error"
    )
    return _table(head, rows)


def tools() -> list[str]:
    """Return a row for each tool that took the sample."""
    path = RESULTS / "other-tools.json"
    if not path.exists():
        return ["not measured yet"]
    rows = [
        [
            tool,
            total["architectures"],
            total["stopped"],
            total["norms"],
            total["handled"],
            total["left"],
            f"{total['models changed']} ({total['handled in models changed']} norms)",
            total["left and declared valid"],
            f"{total['worst error']:.1e}",
        ]
        for tool, total in json.loads(path.read_text())["totals"].items()
    ]
    head = (
        "tool | architectures | of these it stops on | norms | taken out | left in place "
        "| models that compute something else | left in place and called valid | largest error"
    )
    return _table(head, rows)


def random_networks() -> list[str]:
    """Return what became of the random networks."""
    path = RESULTS / "random-networks.json"
    if not path.exists():
        return ["not measured yet"]
    run = json.loads(path.read_text())
    actions = run["sites by action"].get("wn", {})
    rows = [
        ["command", f"`python -m benchmarks.random_networks {run['command']}`"],
        ["networks", run["networks"]],
        ["**failed**", f"**{run['failed']}**"],
        ["converted / refused as they must be", f"{run['converted']} / {run[_REFUSED]}"],
        ["norms, to `wn`", ", ".join(f"{name} {times}" for name, times in actions.items())],
        ["captures compared on", run["captures compared"]],
        ["exported and run in ONNX Runtime", sum(run["exports"].values())],
        [
            "dtypes",
            ", ".join(f"{name} {times}" for name, times in run["made of"]["dtypes"].items()),
        ],
        ["minutes", round(run["seconds"] / 60)],
    ]
    return _table("one recorded run | ", rows)


def main() -> None:
    """Put the tables between their markers."""
    tables = {
        "summary": summary,
        "captures": captures,
        "reasons": reasons,
        "families": families,
        "tools": tools,
        "random": random_networks,
    }
    fill(RESULTS / "zoo.md", tables)


if __name__ == "__main__":
    main()
