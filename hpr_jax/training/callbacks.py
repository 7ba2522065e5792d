"""What a program wants to know of a run while it trains, and how it ends one."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from hpr_jax.evaluation.evaluator import EvaluationResult


class Callback:
    """A listener to a run; subclasses say what they want to hear.

    A method that returns True ends the run: behind the step that is running it is saved, and the same command goes on from
    there. In a run of several processes, the callbacks of all must decide alike.
    """

    def on_step(self, step: int, numbers: Mapping[str, float]) -> bool | None:
        """A step was taken. The next one is running already, so that no device waits.

        Args:
          step: counted from 1.
          numbers: `loss`, `gradient_norm`, and every loss term.
        """

    def on_evaluation(self, step: int, result: EvaluationResult) -> bool | None:
        """The validation split was evaluated behind a step."""

    def on_checkpoint(self, step: int, workdir: Path) -> bool | None:
        """A checkpoint of a step was begun to be written below the workdir of the run."""


class Callbacks:
    """Several callbacks as one.

    Attributes:
      ended: whether one of them has asked to end the run.
    """

    def __init__(self, callbacks: Sequence[Callback] = ()):
        self._callbacks, self.ended = tuple(callbacks), False

    def on_step(self, step: int, numbers: Mapping[str, float]) -> None:
        self._hear([callback.on_step(step, numbers) for callback in self._callbacks])

    def on_evaluation(self, step: int, result: EvaluationResult) -> None:
        self._hear([callback.on_evaluation(step, result) for callback in self._callbacks])

    def on_checkpoint(self, step: int, workdir: Path) -> None:
        self._hear([callback.on_checkpoint(step, workdir) for callback in self._callbacks])

    def _hear(self, answers: Sequence[bool | None]) -> None:
        self.ended = self.ended or any(answer is True for answer in answers)
