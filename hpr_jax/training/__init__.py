"""How weights change: the step, the loop around it, the optimizer, checkpoints to resume from.

`build.py` reads the sections `train` and `optimizer` of a config.
May import evaluation and all wings below it.
"""
