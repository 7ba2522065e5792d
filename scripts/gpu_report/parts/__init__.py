"""The parts of the report; each runs in a process of its own. A module's `run(recorder, small)` is one part."""
