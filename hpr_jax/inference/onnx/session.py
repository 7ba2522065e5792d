"""An ONNX file that ONNX Runtime runs on a CPU."""

from pathlib import Path

import numpy as np

from hpr_jax.errors import UserError
from hpr_jax.inference.export_format import check_packages

# ONNX Runtime says what is wrong, and not what is unusual.
_ERRORS_ALONE = 3


class OnnxSession:
    """A model, ready to run.

    Attributes:
      metadata: the texts that it carries.
    """

    def __init__(self, path: Path):
        """Reads and arranges the model, on all cores of the machine.

        Raises:
          UserError: ONNX Runtime is missing, or cannot read the file.
        """
        check_packages("onnxruntime")
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = _ERRORS_ALONE
        try:
            self._session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        # It raises a dozen kinds of errors, which share no class of their own.
        except Exception as error:
            raise UserError(f"{path} is no ONNX file that this ONNX Runtime reads; copy or export it again.") from error
        self.metadata: dict[str, str] = dict(self._session.get_modelmeta().custom_metadata_map)
        self._inputs = [one.name for one in self._session.get_inputs()]
        self._outputs = [one.name for one in self._session.get_outputs()]

    def __call__(self, *arrays: np.ndarray) -> dict[str, np.ndarray]:
        """The results by name, of inputs in the order of the model's."""
        return dict(zip(self._outputs, self._session.run(None, dict(zip(self._inputs, arrays)))))
