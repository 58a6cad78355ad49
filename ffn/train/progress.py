"""The progress of a run: its losses, its best checkpoint, and when it stops early."""

from dataclasses import dataclass


@dataclass
class Progress:
    """The progress of a run; with weights, optimizer and random state it determines the next step."""

    step: int = 0
    train_seconds: float = 0.0  # with compilation, without evaluation, sampling and saving
    val_loss: float | None = None
    best_loss: float | None = None
    best: str | None = None  # name of the best checkpoint
    stale: int = 0  # evaluations since the best one
    stopped: str = ""  # "", "finished" or "early"
    val_before: float | None = None  # of the base, before the first step
    base_loss: float | None = None  # on the base's validation text
    base_before: float | None = None

    def evaluated(self, val_loss: float, checkpoint: str, steps: int, patience: int) -> bool:
        """Record a validation loss and decide whether to stop; return True if it is the best so far.

        Args:
            checkpoint: the name that a checkpoint of this step has.
            steps: of the whole run.
            patience: evaluations without a better loss before the run stops; 0 for any number.
        """
        self.val_loss = val_loss
        improved = self.best_loss is None or val_loss < self.best_loss
        if improved:
            self.best_loss, self.best = val_loss, checkpoint
        self.stale = 0 if improved else self.stale + 1
        if self.step == steps:
            self.stopped = "finished"
        elif patience and self.stale >= patience:
            self.stopped = "early"
        return improved
