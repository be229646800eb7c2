"""Losses that compare samples: how they are said, and the representations that their gradient passes through.

A contrastive loss (InfoNCE, CLIP, SupCon, triplets mined in the batch) or one over the batch's covariance (Barlow
Twins, VICReg) is no mean of its parts' losses, so that micro-batches cannot be weighed and added up. But it sees the
samples only through what the model made of them, and those representations are small: with their gradient at hand
each micro-batch can run alone (Gao et al. 2021, "Scaling Deep Contrastive Learning Batch Size under Memory Limited
Setup").
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from autoaccum.checks import misfit
from autoaccum.data import tree
from autoaccum.errors import LossError, SetupError, shown
from autoaccum.loss.call import arrange, name_of

__all__ = ["Coupled", "CoupledLoss", "Representations", "coupled_of"]


class Coupled:
    """A step whose loss compares samples, as its two halves.

    ```python
    def encode(model, batch):
        return model.image(batch["pixels"]), model.text(batch["tokens"]), model.temperature.exp()

    def loss(representations, batch):
        images, texts, temperature = representations
        scores = temperature * images @ texts.T
        return cross_entropy(scores, torch.arange(len(scores), device=scores.device))

    autoaccum.fit(model, data, target_batch=1024, step=autoaccum.Coupled(encode, loss))
    ```

    Each micro-batch is encoded twice: without a graph, to have all representations of the window; and again, with the
    gradient of the loss over all of them.
    """

    def __init__(self, encode: Callable[[nn.Module, Any], Any], loss: Callable[..., Any]) -> None:
        """Keeps both halves; runs nothing.

        Args:
            encode: `encode(model, batch)` gives tensors with the micro-batch's samples along dimension 0, in any
                nesting. A tensor of another shape, such as a temperature, is shared by all samples: it must be the same
                for every micro-batch, and gets its gradient once.
            loss: `loss(representations, batch)` over the samples of a whole window, on all ranks, gives a scalar. Where
                it takes one argument it is given the representations alone, and the window's batch need not lie on the
                device. Parameters of its own (a module's, or the model's) get their gradient once.

        Raises:
            SetupError: one of them cannot be called.
        """
        for name, given, example in (
            ("encode", encode, "encode(model, batch), which gives tensors with samples along dimension 0"),
            ("loss", loss, "loss(representations, batch), which gives a scalar"),
        ):
            if not callable(given) or isinstance(given, type):
                raise SetupError(f"Coupled got {name}={shown(given)}, which is no function: pass {example}")
        self.encode, self.loss = encode, loss
        self.takes_batch = misfit(loss.forward if isinstance(loss, nn.Module) else loss, None, None) is None

    def over(self, representations: Any, batch: Any) -> Any:
        """The loss of `representations`; `batch` is passed on where the loss takes it."""
        return self.loss(representations, batch) if self.takes_batch else self.loss(representations)

    def __call__(self, model: nn.Module, batch: Any) -> Any:
        """The loss over the samples of `batch` alone, as any step gives it: for validation, and for one micro-batch."""
        return self.over(self.encode(model, batch), self.for_loss(batch))

    def for_loss(self, batch: Any) -> Any:
        """The part of a micro-batch, on the host, that the loss is given joined over the window."""
        return batch

    def __repr__(self) -> str:
        return f"Coupled({name_of(self.encode)}, {name_of(self.loss)})"


class CoupledLoss(Coupled):
    """A `loss=f(outputs, targets)` that compares samples, of a model that is called as its batch says."""

    def __init__(self, loss: Callable[[Any, Any], Any]) -> None:
        """Keeps the loss.

        Raises:
            SetupError: it cannot be called.
        """
        super().__init__(_outputs, loss)
        self.takes_batch = True

    def for_loss(self, batch: Any) -> Any:
        """The targets, which are small."""
        return arrange(batch, apart=True).targets


def _outputs(model: nn.Module, batch: Any) -> Any:
    call = arrange(batch, apart=True)
    return model(*call.args, **call.kwargs)


def coupled_of(loss: Any, step: Any, reduction: Any) -> Coupled | None:
    """The two halves of a loss that is declared to compare samples; None where none is.

    Raises:
        SetupError: `reduction` says so of a loss that cannot be taken apart, or something else of a Coupled step.
    """
    if isinstance(step, Coupled):
        if reduction not in ("auto", "coupled"):
            raise SetupError(
                f"reduction={shown(reduction)} beside a Coupled step, whose loss is computed once over the whole "
                "window and divided by nothing: leave reduction away"
            )
        return step
    if not (isinstance(reduction, str) and reduction == "coupled"):
        return None
    if loss is None:
        what = "a step, which does both at once" if step is not None else "a model that returns its own loss"
        raise SetupError(
            f'reduction="coupled" needs the representations apart from the loss over them, and this is {what}: pass '
            "loss=f(outputs, targets), or step=autoaccum.Coupled(encode, loss)"
        )
    return CoupledLoss(loss)


class Representations:
    """What `coupled.encode` gave for a whole window, detached, with one row a sample; the leaves of the loss's graph.

    Room for all samples is made when the first micro-batch is entered, so that no second copy of them ever stands
    beside the first.

    Attributes:
        shared: paths of tensors that belong to no sample. One whose first dimension was ever other than the samples is
            shared from then on, so that a vector of 64 is not taken for 64 samples because a micro-batch has as many.
        samples: of the window.
        batch: theirs, on the device; None where the loss does not take it.
        filled: samples that were entered.
        first_row: where those of this rank begin.
        leads: whether this rank gives what all samples share its gradient: the first that has samples.
    """

    def __init__(self, coupled: Coupled, shared: set[str], samples: int) -> None:
        """Makes room for nothing yet; `shared` as far as is known, `samples` are this rank's."""
        self.coupled, self.shared, self.samples = coupled, shared, samples
        self.batch: Any = None
        self._outputs: Any = None  # the first micro-batch's, whose nesting all have
        self._leaves: dict[str, Tensor] = {}
        self.filled = self.first_row = 0
        self.leads = True

    def enter(self, outputs: Any, samples: int) -> None:
        """Takes in one micro-batch's.

        Raises:
            LossError: no tensor has the samples along dimension 0, or they are not what the first micro-batch gave.
        """
        named = {path: tensor.detach() for path, tensor in tree.tensors(outputs)}
        others = {path for path, tensor in named.items() if not tensor.dim() or tensor.size(0) != samples} - self.shared
        self.shared |= others
        if named.keys() <= self.shared:
            shapes = ", ".join(f"{path or 'the output'} of shape {tuple(t.shape)}" for path, t in named.items())
            raise LossError(
                f"encode gave {shapes or 'no tensor'} for {samples} samples, and none of it has the samples along "
                "dimension 0: return one row a sample, such as model(batch['x']), without averaging or joining them"
            )
        if self._outputs is None:
            self._outputs = tree.map_tensors(Tensor.detach, outputs)
            self._leaves = {
                path: tensor.clone() if path in self.shared else tensor.new_empty((self.samples, *tensor.shape[1:]))
                for path, tensor in named.items()
            }
        if list(named) != list(self._leaves):
            raise LossError(
                f"encode gave {', '.join(path or 'one tensor' for path in named)} for one micro-batch and "
                f"{', '.join(path or 'one tensor' for path in self._leaves)} for another: return the same parts"
            )
        for path, tensor in named.items():
            if path in others:  # the size of those before was the samples' by coincidence
                self._leaves[path] = tensor.clone()
            self._write(path, tensor, samples)
        self.filled += samples

    def repeat(self) -> None:
        """Fills the rows that no micro-batch was run for with those there are, over and over: a rehearsal's window."""
        for leaf in self.rows().values():
            for start in range(self.filled, self.samples, self.filled):
                stop = min(start + self.filled, self.samples)
                leaf[start:stop] = leaf[: stop - start]

    def leaves(self) -> dict[str, Tensor]:
        """The tensors by path; those that can have a gradient ask for one."""
        for leaf in self._leaves.values():
            leaf.requires_grad_(leaf.is_floating_point() or leaf.is_complex())
        return self._leaves

    def rows(self) -> dict[str, Tensor]:
        """The tensors with one row a sample, by path."""
        return {path: leaf for path, leaf in self._leaves.items() if path not in self.shared}

    def replace(self, rows: dict[str, Tensor]) -> None:
        """Puts the rows of all ranks in the place of this one's."""
        self._leaves.update(rows)

    def loss(self) -> Any:
        """What the loss gives for all of them, nested as `encode` gave them, and the window's batch."""
        remaining = iter(self._leaves.values())
        return self.coupled.over(tree.map_tensors(lambda _: next(remaining), self._outputs), self.batch)

    def _write(self, path: str, tensor: Tensor, samples: int) -> None:
        leaf = self._leaves[path]
        if path not in self.shared:
            rows = leaf[self.filled : self.filled + samples]
            if rows.shape != tensor.shape:
                raise LossError(
                    f"encode gave {path or 'a tensor'} of shape {tuple(tensor.shape)} for {samples} samples, where "
                    f"{tuple(rows.shape)} is expected after the micro-batches before: one row a sample, all alike"
                )
            rows.copy_(tensor)
        elif leaf.shape != tensor.shape or not torch.equal(leaf, tensor):
            raise LossError(
                f"encode gave {path or 'a tensor'} of shape {tuple(tensor.shape)} for {samples} samples, and another "
                "value for the micro-batch before: what has no samples along dimension 0 is shared by the whole "
                "window, so return one row a sample, or what does not depend on the batch, such as a temperature"
            )
