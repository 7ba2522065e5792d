"""The machine: devices, processes, memory, the compilation cache, logs.

Nothing here knows of detectors or data.
May import errors alone.
"""
