"""Every setting of a training, said once: its default, its kind, its words, who takes it and what follows from it.

The public signatures stay written out, for people and editors; a test holds them equal to this. The command line's
options, what a plan sets aside, what decides how much fits and the reference of keywords are made from here. To add a
setting: a line here, the one place that uses it, and a parameter of `prepare` (and `probe`, where it changes memory).
"""

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from autoaccum.errors import SetupError

__all__ = [
    "FIT_ARGUMENTS",
    "RUNGS",
    "SETTINGS",
    "Setting",
    "Settings",
    "alike",
    "check_arguments",
    "deciding",
    "reference",
    "taken_by",
]


@dataclass(frozen=True)
class Setting:
    """One keyword of `fit`.

    Attributes:
        default: what it is where it was not given.
        kind: "count" (a whole number of 1 or more), "steps" (0 or more), "number" (above 0), "bytes", "word" (one of
            `choices`), "flag", "switch" (yes, no, or its one choice), "seed", "folder", "file", "text"; "python" where
            it can only be given from Python.
        words: what it does, in a sentence.
        takers: the functions and commands that take it beside `fit` and `prepare`.
        decides: "memory" where it changes what a step takes or how much is looked for; "plan" where a plan fixes it.
        choices: its words.
        metavar: how its value is called on the command line; None: as others of its kind.
        ranks: "same" where all ranks must give the same value, "given" where all or none must give one, "own" where
            each has its own or it is compared in another way; None: "own" of kind "python", else "same".
    """

    default: Any
    kind: str
    words: str
    takers: tuple[str, ...] = ()
    decides: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()
    metavar: str | None = None
    ranks: str | None = None


_PROBE, _ALL, _RUN = ("probe",), ("probe", "verify"), ("probe", "verify", "search")
_PLANNED, _FOUND = ("probe", "plan"), ("probe", "search")
_MEMORY, _PLAN, _BOTH = ("memory",), ("plan",), ("memory", "plan")
_REDUCTIONS = ("auto", "coupled", "sample_mean", "token_mean", "weighted_mean", "element_mean", "sum")
_PREFERRED = ("fewest", "fastest")
_RULES = ("auto", "linear", "sqrt", "adam-sde", "none")
_AGAIN = "of the repeated blocks runs once more in the backward pass, for the same gradients"
_BUDGET = "of what the compiled model would keep for the backward pass is kept, and the rest is computed again"

RUNGS = {
    "chunked_loss": "a head's logits are computed with their loss, some rows at a time, and never held together",
    "bf16": "autocast rounds most of the forward pass to bf16; slow where the device has none of its own",
    "activation_memory_budget/0.5": f"half {_BUDGET}",
    "activation_memory_budget/0.2": f"a fifth {_BUDGET}",
    "checkpointing/4": f"each fourth {_AGAIN}",
    "checkpointing/2": f"each second {_AGAIN}",
    "selective_checkpointing": "the repeated blocks run once more in the backward pass, but for their matrix products",
    "checkpointing": f"each {_AGAIN}",
    "chunked_loss+checkpointing": f"logits are never held together, and each {_AGAIN}",
    "save_on_cpu": "activations wait in the host's memory, and travel there and back in every micro-batch",
    "checkpointing+save_on_cpu": f"each {_AGAIN}, and their inputs wait in the host's memory",
    "optimizer_on_host": "the optimizer's state waits in the host's memory, and travels there and back in every step",
    "step_in_backward": "each gradient is stepped with and freed as it comes, so that a window cannot run again",
}
"""The memory savers, and what each does and costs: by the order of that."""

SETTINGS: dict[str, Setting] = {
    "target_batch": Setting(None, "count", "Samples per optimizer step, over all ranks.", _PROBE),
    "loss": Setting(None, "python", "f(outputs, targets); None: the model returns its loss.", _ALL),
    "step": Setting(
        None, "python", "f(model, batch) -> Tensor, Mean or dict of Means, instead of loss; or Coupled.", _ALL
    ),
    "phases": Setting(None, "python", "A list of Phase, instead of step, loss and optimizer.", _PROBE),
    "reduction": Setting("auto", "word", "What the loss is a mean over.", _ALL, (), _REDUCTIONS),
    "optimizer": Setting("adamw", "text", 'One of torch\'s by name: "adamw", "sgd", ...', _PLANNED, ranks="own"),
    "lr": Setting(None, "number", "Learning rate; 1e-3 if not given.", _PLANNED, metavar="LR", ranks="own"),
    "lr_batch": Setting(None, "count", "The batch that the learning rate was tuned at.", _PLANNED, _PLAN),
    "lr_rule": Setting(
        "auto", "word", "How the learning rate goes from lr-batch to target-batch.", _PLANNED, _PLAN, _RULES
    ),
    "schedule": Setting("constant", "word", "Learning rate over the steps.", (), (), ("constant", "linear", "cosine")),
    "warmup_steps": Setting(0, "steps", "Optimizer steps of warm-up."),
    "epochs": Setting(1, "count", "Passes over the data.", ("search",)),
    "max_steps": Setting(None, "count", "Optimizer steps, over as many epochs as it takes.", ("search",)),
    "val_data": Setting(None, "python", "Evaluated after each epoch, with metrics."),
    "metrics": Setting(None, "python", "{name: f(outputs, targets) -> Mean}, or objects with reset, update, compute."),
    "shuffle": Setting(True, "flag", "Shuffle a Dataset or tensors; a DataLoader keeps its own order."),
    "device": Setting(None, "text", '"cpu", "cuda:1", ...; the best there is if not given.', _RUN, ranks="own"),
    "memory": Setting(
        None, "bytes", 'A hard budget: "8GiB", bytes, or "80%" of the device.', _FOUND, _MEMORY, ranks="own"
    ),
    "precision": Setting("auto", "word", "Autocast.", _RUN, _MEMORY, ("auto", "fp32", "bf16", "fp16")),
    "accumulate": Setting(
        "fp32", "word", "What bf16 and fp16 gradients are summed in.", _PROBE, _MEMORY, ("fp32", "native")
    ),
    "clip_norm": Setting(None, "number", "Clip the window's gradient to this norm.", _PROBE, _MEMORY, metavar="NORM"),
    "log_grad_norm": Setting(False, "python", "Record the gradient's norm without clipping.", ranks="same"),
    "batch_norm": Setting(
        "pooled", "word", "BatchNorm's running statistics.", _PLANNED, _BOTH, ("pooled", "momentum", "keep")
    ),
    "tail": Setting("step", "word", "What becomes of a short last window.", _PLANNED, _PLAN, ("step", "drop")),
    "prefer": Setting(
        "fewest", "word", "Fewest micro-batches, or the fastest as measured.", _PROBE, _BOTH, _PREFERRED, ranks="own"
    ),
    "micro_batch": Setting(None, "count", "Use this size: no probe.", (), _PLAN, ranks="given"),
    "plan": Setting(None, "file", "A saved plan: neither probe nor arithmetic.", ranks="given"),
    "multiple_of": Setting(1, "count", "Prefer micro-batches that are multiples of N.", _PLANNED, _BOTH),
    "worst_case": Setting(None, "python", "A batch, or f(n) -> batch, to probe with.", _ALL),
    "max_batch": Setting(None, "count", "No micro-batch above this size.", _FOUND, _BOTH, ranks="own"),
    "isolate": Setting(False, "flag", "Run trials in a child process, which a kill may take.", _PROBE, ranks="own"),
    "cache": Setting(True, "flag", "Reuse answers of earlier probes.", _FOUND, ranks="own"),
    "check": Setting(
        True, "switch", "Check the accumulated gradient before training, or only warn.", ("search",), (), ("warn",)
    ),
    "checkpoint": Setting(None, "folder", "Folder for checkpoints.", ranks="given"),
    "checkpoint_every": Setting(None, "count", "Optimizer steps between checkpoints."),
    "resume": Setting(
        "auto", "switch", "Go on from the last checkpoint: it must be there, or only if it is.", (), (), ("auto",)
    ),
    "compile": Setting(False, "flag", "Compile the model with torch.compile.", _PROBE, _MEMORY),
    "ladder": Setting(
        None,
        "word",
        "Where not even one sample fits: take the cheapest of these that does (auto), or this one.",
        _PROBE,
        _MEMORY,
        ("auto", *RUNGS),
    ),
    "regrow_after": Setting(None, "count", "Windows after which to try larger micro-batches again."),
    "on_nonfinite": Setting(
        "raise",
        "word",
        'What to do at a loss that is not finite; "skip" looks at gradients too.',
        _PROBE,
        _MEMORY,
        ("raise", "skip"),
    ),
    "seed": Setting(None, "seed", "Seed of all random numbers.", _FOUND),
    "progress": Setting(None, "flag", "Tell on stderr what is going on.", _FOUND, ranks="own"),
    "sinks": Setting((), "python", "Functions of an event, told beside callbacks."),
    "callbacks": Setting((), "python", "Functions of an event.", _PROBE),
    "group": Setting(None, "python", "The ranks that train together, a process group; None: all.", _PROBE),
    "device_mesh": Setting(None, "python", "These ranks as a DeviceMesh, instead of group.", _PROBE),
}
"""In the order of the public signatures."""

FIT_ARGUMENTS = ("model", "data", *SETTINGS)


def check_arguments(who: str, arguments: Any) -> None:
    """Refuses what a function of the user's returned, unless it is a dict of fit's arguments.

    Raises:
        SetupError: it names `who` returned it, and what is wrong.
    """
    if not isinstance(arguments, Mapping):
        raise SetupError(
            f"{who} returned {type(arguments).__name__}, but must return a dict of fit's arguments: return "
            '{"model": model, "data": data, ...}'
        )
    for key in arguments:
        if key not in FIT_ARGUMENTS:
            close = difflib.get_close_matches(str(key), FIT_ARGUMENTS, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"fit takes {', '.join(FIT_ARGUMENTS)}"
            raise SetupError(f"{who} returned the unknown key {key!r}: {hint}")
    for key in ("model", "data"):
        if key not in arguments:
            has = ", ".join(map(repr, arguments)) or "nothing"
            raise SetupError(f"{who} returned a dict without {key!r}, only with {has}: add the {key} under that key")


def taken_by(function: str) -> Iterator[str]:
    """The settings that a function or command takes, by its name; "fit" takes all."""
    return (name for name, setting in SETTINGS.items() if function in (*setting.takers, "fit"))


class Settings(dict[str, Any]):
    """The settings of one training by name, also as attributes: those given, the others at their defaults."""

    def __init__(self, given: Mapping[str, Any]) -> None:
        super().__init__({name: setting.default for name, setting in SETTINGS.items()} | dict(given))

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None

    def some(self, *names: str) -> dict[str, Any]:
        """Those of these names."""
        return {name: self[name] for name in names}


def alike(how: str) -> Iterator[str]:
    """The settings that the ranks must have alike: the "same" value, or all "given" or none."""
    usual = {name: "own" if setting.kind == "python" else "same" for name, setting in SETTINGS.items()}
    return (name for name, setting in SETTINGS.items() if (setting.ranks or usual[name]) == how)


def deciding(what: str) -> Iterator[str]:
    """The settings that decide on "memory" or that a "plan" fixes."""
    return (name for name, setting in SETTINGS.items() if what in setting.decides)


def reference() -> str:
    """All settings as a table in Markdown."""
    rows = ["| keyword | default | values | what it does |", "|---|---|---|---|"]
    for name, setting in SETTINGS.items():
        values = ", ".join(f'`"{choice}"`' for choice in setting.choices) or setting.kind
        rows.append(f"| `{name}` | `{setting.default!r}` | {values} | {setting.words} |")
    return "\n".join(rows) + "\n"
