"""The machine: devices, processes, memory, the compilation cache, the console, logs, files.

Nothing here knows of detectors or data.
May import errors alone.
"""
