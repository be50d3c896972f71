"""Calls transformers' callbacks at the events of a run, and keeps what they share: arguments, state and control."""

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import CallbackHandler, ExportableState

from clipmap_hf.distributed import process_index


__all__ = ["Events"]


class Events:
    """
    The events of a run.

    Args:
        handler: Holds the callbacks.
        arguments: What they read as `args`.
        steps: How many steps the run has.
        steps_per_epoch: How many make a pass over the data.
        state: What `export` returned when the run was interrupted.
    """

    def __init__(
        self,
        handler: CallbackHandler,
        arguments: TrainingArguments,
        steps: int,
        steps_per_epoch: int,
        state: Mapping[str, Any] | None = None,
    ):
        self.handler, self.arguments, self.control = handler, arguments, TrainerControl()
        self.steps_per_epoch = max(1, steps_per_epoch)
        self.state = TrainerState(**state) if state else TrainerState()
        self.state.max_steps, self.state.epoch = steps, self.state.epoch or 0.0
        self.state.num_train_epochs = math.ceil(steps / self.steps_per_epoch)
        self.state.is_world_process_zero = self.state.is_local_process_zero = process_index() == 0
        self.state.compute_steps(arguments, steps)
        for callback, found in self._kept(self.state.stateful_callbacks):
            for name, value in found["attributes"].items():
                setattr(callback, name, value)
        self.call("on_init_end")

    def call(self, event: str, **values: Any) -> None:
        """Calls an event of all callbacks; they may change `control`."""
        self.control = getattr(self.handler, event)(self.arguments, self.state, self.control, **values)

    def begin_step(self, step: int, is_first: bool) -> None:
        """
        Calls the events before a step.

        Args:
            step: How many were taken before.
            is_first: Whether nothing was trained yet since the program started.
        """
        if is_first or step % self.steps_per_epoch == 0:
            self.call("on_epoch_begin")
        self.call("on_step_begin")

    def end_step(self, step: int, is_last: bool) -> None:
        """
        Calls the events after a step.

        Args:
            step: How many are taken now.
            is_last: Whether the run is over.

        Raises:
            ValueError: If a callback wants to end an epoch before the run, which we cannot.
        """
        self.state.global_step, self.state.epoch = step, step / self.steps_per_epoch
        self.call("on_step_end")
        if self.control.should_epoch_stop:
            raise ValueError("A callback set should_epoch_stop; epochs cannot be cut short, set should_training_stop.")
        if is_last or step % self.steps_per_epoch == 0:
            self.call("on_epoch_end")

    def log(self, values: Mapping[str, float]) -> None:
        """Calls `on_log`, and adds the values to the state's `log_history`."""
        logs = {**values, "epoch": self.state.epoch}
        self.state.log_history.append({**logs, "step": self.state.global_step})
        self.call("on_log", logs=logs)

    def watched(self, batches: Iterable) -> Iterator:
        """Yields the batches of an evaluation, and calls `on_prediction_step` after each."""
        self.handler.eval_dataloader = batches
        for batch in batches:
            yield batch
            self.call("on_prediction_step")

    def export(self) -> dict[str, Any]:
        """Returns the state, with that of callbacks that have one, as JSON values."""
        exportable = [callback for callback in self.handler.callbacks if isinstance(callback, ExportableState)]
        kept = TrainerState(stateful_callbacks=exportable).stateful_callbacks
        return dataclasses.asdict(dataclasses.replace(self.state, stateful_callbacks=kept))

    def _kept(self, states: Mapping[str, Any]) -> Iterator[tuple[ExportableState, Mapping[str, Any]]]:
        """Yields the callbacks of which a state was kept, with that state."""
        for name, found in states.items():
            callbacks = [callback for callback in self.handler.callbacks if type(callback).__name__ == name]
            yield from zip(callbacks, found if isinstance(found, list) else [found], strict=False)
