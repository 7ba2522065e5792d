"""Array operations with static shapes: sampling, RoIAlign, attention, convolution, NMS, boxes.

Pure functions without parameters; `dispatch.py` chooses between XLA and kernels.
May import kernels alone.
"""
