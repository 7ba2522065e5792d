"""How weights change: the step, the loop around it, the optimizer, resuming.

`build.py` reads the sections `train` and `optimizer` of a config.
May import evaluation and all wings below it.
"""
