"""How a training may end, other than with its last epoch."""


class StopRun(Exception):
    """Raised by an epoch hook to end a run that is not worth going on with."""


class DivergedError(ArithmeticError):
    """The loss is not a finite number.

    Attributes:
        epoch: In which it happened, from 1.
    """

    def __init__(self, epoch: int, loss: float) -> None:
        super().__init__(epoch, loss)
        self.epoch, self.loss = epoch, loss

    def __str__(self) -> str:
        return f"the training diverged in epoch {self.epoch}: the loss is {self.loss}."
