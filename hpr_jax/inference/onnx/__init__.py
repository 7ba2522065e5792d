"""ONNX files of JAX functions: a translation of their jaxprs, an operation at a time, and ONNX Runtime, which runs them.

`model.py` is where it begins. A file for each kind of operations adds to the table of `table.py`.
"""
