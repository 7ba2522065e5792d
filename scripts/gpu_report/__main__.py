"""Measures this project on the GPU of this machine, and writes report.json and report.md.

    python scripts/gpu_report [--output DIR] [--seconds 480] [--only PART,...] [--rehearse]

Parts run one after the other, the most valuable first, each in a process with a limit of time; the report is written anew
after every part. So a part that fails, or a machine that is taken away, costs no results of other parts.
--rehearse runs every part at small sizes on the CPU, where kernels are interpreted: it shows that the parts work, and its
numbers mean nothing. It needs neither the packages that load data nor those that draw.
"""

import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
# Run as a script, Python looks for modules in this folder alone.
sys.path[:1] = [str(FOLDER.parent), str(FOLDER.parent / "benchmarks"), str(FOLDER.parent.parent)]

from gpu_report import command_line  # noqa: E402

if __name__ == "__main__":
    sys.exit(command_line.main(__doc__ or ""))
