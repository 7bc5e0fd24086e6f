"""Causal tracing of the bundled model, drawn for its card: python benchmarks/tracing.py --to docs/atlas-tracing.png [--json]"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import errata
from errata.data import atlas
from errata.facts import Fact
from errata.metrics.tracing import PLACES, trace
from errata.report.tracing import draw


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="atlas")
    parser.add_argument("--facts", type=int, default=100)
    parser.add_argument("--to", type=Path)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    lm = errata.load(options.model)
    # Facts as the model knows them: the old object, on the prompts of the dev cases, people only (names of two words).
    known = [case.facts[0] for case in atlas.cases("dev")]
    people = [Fact(fact.prompt, fact.subject, fact.ground_truth or "") for fact in known if len(fact.subject.split()) == 2]
    found = trace(lm, people[: options.facts])
    if options.to:
        draw(found, options.to, f"{options.model}: causal tracing, {min(len(people), options.facts)} facts")
    rows = {f"layer {layer}": dict(zip(PLACES, map(float, row), strict=True)) for layer, row in enumerate(found.restored)}
    if options.json:
        print(json.dumps({"clean": found.clean, "corrupted": found.corrupted, "restored": rows}))
        return
    print(f"p(answer): {found.clean:.3f} clean, {found.corrupted:.3f} with noise on the subject; with one state restored:")
    print(f"{'':10}" + "".join(f"{place:>26}" for place in PLACES))
    for name, row in rows.items():
        print(f"{name:10}" + "".join(f"{row[place]:26.3f}" for place in PLACES))


if __name__ == "__main__":
    main()
