"""Training mode, with what its owner froze."""

from torch import nn

__all__ = ["TrainingMode"]


class TrainingMode:
    """Puts a model into training mode and back.

    Modules that stand in evaluation mode inside a model that is in training mode were put there by their owner, to
    freeze their statistics, and stay so. A model that is in evaluation mode as a whole, as pretrained ones come, is
    trained as a whole.
    """

    def __init__(self, model: nn.Module) -> None:
        """Looks at the modes as they are; changes none."""
        self._model = model
        resting = [module for module in model.modules() if not module.training]
        self._frozen, self._asleep = (resting, []) if model.training else ([], resting)

    def on(self) -> None:
        """Training mode; a model's own `train` has its say."""
        self._model.train()
        for module in self._frozen:
            module.training = False

    def keep(self) -> None:
        """Puts training mode on again, where somebody has put the whole model into evaluation mode meanwhile."""
        if not self._model.training:
            self.on()

    def back(self) -> None:
        """Evaluation mode for what was in it when the whole model was."""
        for module in self._asleep:
            module.training = False
