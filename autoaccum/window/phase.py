"""One of several optimizers that take turns over the same samples, as a GAN's discriminator and generator do."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.optim import Optimizer

from autoaccum.checks import check_counts
from autoaccum.errors import SetupError, shown
from autoaccum.model.optimizer import build_optimizer, optimizer_parameters
from autoaccum.settings import SETTINGS, Settings

__all__ = ["Phase", "check_phases"]


class Phase:
    """A window of its own within each window of samples: its step's loss, for its parameters, by its optimizer.

    ```python
    autoaccum.fit(gan, images, target_batch=256, phases=[
        autoaccum.Phase(judge_loss, gan.judge.parameters(), judge_optimizer),
        autoaccum.Phase(painter_loss, gan.painter.parameters(), painter_optimizer, every=2),
    ])
    ```

    Phases run in the order given, each over all micro-batches of the window and then its optimizer's step; all other
    parameters are frozen meanwhile. What a step draws from the global generators is drawn anew for each micro-batch, so
    that another split draws other numbers: where that matters, let the dataset give each sample its noise.

    Attributes:
        step, optimizer, every, lr, schedule, warmup_steps, clip_norm, reduction, name: as given.
        parameters: as a list.
    """

    def __init__(
        self,
        step: Callable[[nn.Module, Any], Any],
        parameters: Iterable[nn.Parameter] | nn.Module,
        optimizer: str | Optimizer | Callable[..., Optimizer] = "adamw",
        every: int = 1,
        *,
        lr: float | None = None,
        schedule: str | Callable[[Optimizer], Any] = "constant",
        warmup_steps: int = 0,
        clip_norm: float | None = None,
        reduction: Any = "auto",
        name: str | None = None,
    ) -> None:
        """Keeps the parts; nothing is made yet.

        Args:
            step: `step(model, batch)`, as in `fit`; a Coupled one too.
            parameters: what this phase trains, or the module that holds them.
            optimizer: as in `fit`; a class, factory or name is given `parameters`.
            every: the phase runs in each such window, the first included; 1 for at least one phase.
            lr, schedule, warmup_steps, clip_norm, reduction: as in `fit`, for this phase.
            name: in records and messages; None: the step's own.

        Raises:
            SetupError: no step, no parameters, or `every` below 1.
        """
        if not callable(step) or isinstance(step, type):
            raise SetupError(f"Phase got step={shown(step)}, which is no function: pass step(model, batch) -> loss")
        check_counts(every=every)
        given = parameters.parameters() if isinstance(parameters, nn.Module) else parameters
        self.parameters = list(given) if isinstance(given, Iterable) else [given]
        self.name = name or getattr(step, "__name__", type(step).__name__)
        strangers = [type(each).__name__ for each in self.parameters if not isinstance(each, nn.Parameter)]
        if strangers or not self.parameters:
            what = f"got a {strangers[0]} among its parameters" if strangers else "names no parameters"
            raise SetupError(
                f"phase {self.name!r} {what}: pass a module, or its parameters(); an iterator that was read before is "
                "empty"
            )
        self.step, self.every, self.reduction = step, every, reduction
        self.lr, self.schedule, self.warmup_steps, self.clip_norm = lr, schedule, warmup_steps, clip_norm
        self.optimizer = optimizer

    def build_optimizer(self, model: nn.Module, loss: Any, default_lr: float | None) -> Optimizer:
        """This phase's optimizer; a SetupError where it cannot be made, or holds another phase's parameters or none."""
        given = self.optimizer
        if isinstance(given, Optimizer):
            made = build_optimizer(given, model, lr=self.lr, loss=loss)
        else:
            rate = self.lr if self.lr is not None else default_lr
            made = build_optimizer(given, nn.ParameterList(self.parameters), lr=rate)
            build_optimizer(made, model, lr=None, loss=loss)  # refuses parameters that are not the model's
        foreign = len({*optimizer_parameters(made)} - {*self.parameters})
        if foreign:
            raise SetupError(
                f"the optimizer of phase {self.name!r} holds {foreign} parameters that the phase does not name: make "
                "it from the same parameters"
            )
        return made

    @contextmanager
    def alone(self, model: nn.Module) -> Iterator[None]:
        """Everything else in `model` is frozen inside."""
        own = {*self.parameters}
        frozen = [each for each in model.parameters() if each.requires_grad and each not in own]
        for parameter in frozen:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter in frozen:
                parameter.requires_grad_(True)


_OF_EACH = ("loss", "step", "optimizer", "reduction", "schedule", "warmup_steps", "clip_norm")


def check_phases(asked: Settings) -> Sequence[Phase]:
    """The phases among `fit`'s settings; none where they are None.

    A SetupError for something that is no Phase, parameters in two of them, nothing that runs in every window, or a
    setting of `fit` beside them that each phase has for itself.
    """
    phases = asked.phases
    if phases is None:
        return ()
    if not isinstance(phases, (list, tuple)) or not phases or not all(isinstance(each, Phase) for each in phases):
        raise SetupError(
            f"phases={shown(phases)}: give a list of autoaccum.Phase(step, parameters, optimizer), in the order in "
            "which they run"
        )
    for name in _OF_EACH:
        if asked[name] != SETTINGS[name].default:
            raise SetupError(f"{name} is given beside phases, each of which has its own: leave {name} away")
    owners: dict[nn.Parameter, Phase] = {}
    for phase in phases:
        for parameter in phase.parameters:
            other = owners.setdefault(parameter, phase)
            if other is not phase:
                raise SetupError(
                    f"phases {other.name!r} and {phase.name!r} share a parameter of shape {tuple(parameter.shape)}: "
                    "each parameter is trained by one phase"
                )
    if all(phase.every > 1 for phase in phases):
        least = min(phase.every for phase in phases)
        raise SetupError(f"no phase runs in every window, the most frequent every {least}: give every=1 to one of them")
    return tuple(phases)
