"""What the program can do: one file for each command, with `add_arguments` and `run`.

A command puts parts of the other wings together and holds no logic of theirs.
May import every wing below: analysis, training, evaluation, inference, weights, models, losses, data, runtime.
"""
