"""One call that tells how this project does on a GPU: `python scripts/gpu_report`."""
