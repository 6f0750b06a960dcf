"""Lines and branches that the suite runs, by folder, from coverage's JSON; fails where less than 97 % of either run.

coverage's own total is of lines and branches together, and of both folders: a part could hide behind another."""

import json
import sys
from collections import Counter
from pathlib import Path

LEAST = 0.97

counts: dict[str, Counter[str]] = {}
for name, file in json.loads(Path(sys.argv[1]).read_text())["files"].items():
    counts.setdefault(Path(name).parts[0], Counter()).update(
        {key: value for key, value in file["summary"].items() if isinstance(value, int)}
    )
short = []
for folder, found in counts.items():
    lines = found["covered_lines"] / found["num_statements"]
    branches = found["covered_branches"] / found["num_branches"]
    print(
        f"{folder}: {lines:.1%} of {found['num_statements']} lines, {branches:.1%} of {found['num_branches']} branches"
    )
    short += [folder] if min(lines, branches) < LEAST else []
if short:
    sys.exit(f"{', '.join(short)}: less than {LEAST:.0%}")
