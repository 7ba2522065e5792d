"""Array operations with static shapes: sampling, RoIAlign, attention, convolution, NMS, boxes.

All are pure functions without parameters; `dispatch.py` chooses between XLA and the Pallas kernels.
May import kernels, and nothing else of the package.
"""
