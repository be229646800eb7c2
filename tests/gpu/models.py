"""The parts of `make gpu` that train models: `python -m tests.gpu.models PART` prints its rows as JSON lines."""

import json
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch.nn import functional as F

import autoaccum
from autoaccum.memory.device import open_device
from autoaccum.memory.forecast import Forecast
from autoaccum.memory.nvml import gpu_info
from autoaccum.memory.oom import Verdict, out_of_memory
from autoaccum.probing.outcome import Trial
from autoaccum.probing.trial import Bench

GIB = 2**30
CEILING = 20_000
OUT = "out of memory"
Made = tuple[nn.Module, dict[str, torch.Tensor]]


def models() -> dict[str, Callable[[], Made]]:
    """Each makes a model of random weights and one sample of its batches."""
    import transformers as tf

    def text(model: Any, config: Any, length: int, words: int, *, causal: bool) -> Made:
        tokens = torch.randint(words, (length,))
        return model(config), {"input_ids": tokens, "labels": tokens if causal else torch.tensor(1)}

    def image(model: Any, config: Any) -> Made:
        return model(config), {"pixel_values": torch.randn(3, 224, 224), "labels": torch.tensor(7)}

    return {
        "resnet50": lambda: image(tf.ResNetForImageClassification, tf.ResNetConfig(num_labels=1000)),
        "gpt2": lambda: text(tf.GPT2LMHeadModel, tf.GPT2Config(use_cache=False), 512, 50_000, causal=True),
        "bert": lambda: text(tf.BertForSequenceClassification, tf.BertConfig(), 128, 30_000, causal=False),
        "vit": lambda: image(tf.ViTForImageClassification, tf.ViTConfig(num_labels=1000)),
        "convnext": lambda: image(tf.ConvNextForImageClassification, tf.ConvNextConfig(num_labels=1000)),
        "efficientnet": lambda: image(
            tf.EfficientNetForImageClassification,
            tf.EfficientNetConfig(width_coefficient=1.0, depth_coefficient=1.0, image_size=224, hidden_dim=1280,
                                  depthwise_padding=[], dropout_rate=0.2, num_labels=1000),
        ),
    }  # fmt: skip


class Repeated:
    """A data set of one sample, many times."""

    def __init__(self, sample: dict[str, torch.Tensor]) -> None:
        self.sample = sample

    def __len__(self) -> int:
        return CEILING

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if not 0 <= index < CEILING:
            raise IndexError(index)
        return self.sample


def trained(
    make: Callable[[], Made], size: int, count: int, cap: int | None, precision: str, windows: int = 3
) -> dict[str, Any]:
    """Windows of `count` micro-batches under the cap.

    Returns:
        "result": retries of the allocator, or "out of memory"; without an error peaks in bytes as well: "requested",
        "allocated" and "reserved" by the allocator, and "nvml", what the driver says of this process (None: nothing).
    """
    device = open_device("cuda")
    device.release()
    retries = device.retries()
    try:
        with device.limit(device.budget(cap)):
            model, sample = make()
            model.cuda().train()
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
            plan = autoaccum.plan(limit=size, target_batch=size * count)
            accumulator = autoaccum.Accumulator(model, optimizer, plan, precision=precision)
            batch = {key: torch.stack([value] * (size * count)) for key, value in sample.items()}
            for _ in range(windows):
                for part in accumulator.window(batch):
                    with accumulator.precision.autocast():
                        loss = model(**part).loss
                    accumulator.backward(loss)
                    del loss, part
            stats = torch.cuda.memory_stats()
            row = {name: stats[f"{name}_bytes.all.peak"] for name in ("requested", "allocated", "reserved")}
            row |= {"result": device.retries() - retries, "nvml": _of_this_process()}
    except Exception as error:
        if out_of_memory(error) is Verdict.NO:
            raise
        row = {"result": OUT}
    model = optimizer = accumulator = batch = part = loss = None  # noqa: F841 - what they hold goes before the release
    device.release()
    return row


def _of_this_process() -> int | None:
    """Bytes of the GPU that the driver says this process holds, its context included."""
    info, _ = gpu_info(str(torch.cuda.get_device_properties(0).uuid))
    return next((each.bytes for each in info.processes if each.pid == os.getpid()), None) if info else None


def probed(
    make: Callable[[], Made], memory: str | None, precision: str
) -> tuple[autoaccum.ProbeReport, dict[str, Any]]:
    """The report, and its row: what was found, how, and by how much it was forecast before its step ran."""
    torch.manual_seed(0)
    model, sample = make()
    before: dict[int, Forecast] = {}
    run = Bench.run

    def watched(bench: Bench, size: int, kind: str, length: int | None = None) -> Trial:
        known = bench.forecast() if len(bench.traces) > 1 else None
        if known is not None:
            before.setdefault(size, known)
        return run(bench, size, kind, length)

    began = time.perf_counter()
    with mock.patch.object(Bench, "run", watched):
        report = autoaccum.probe(
            model, Repeated(sample), memory=memory, device="cuda", precision=precision, cache=False, max_batch=CEILING
        )
    seconds = time.perf_counter() - began
    row: dict[str, Any] = {"precision": precision, "memory": memory, "found": report.micro_batch, "seconds": seconds}
    ran = [trial for trial in report.trials if trial.batch == report.micro_batch and trial.fits][-1]
    row |= {"requested": ran.peak_bytes, "reserved": ran.reserved_bytes, "residual": report.residual}
    if (forecast := before.get(report.micro_batch)) is not None:
        row["requested_error"] = forecast.peak(report.micro_batch) / (ran.peak_bytes or 1) - 1
        row["reserved_error"] = forecast.reserved(report.micro_batch) / (ran.reserved_bytes or 1) - 1
    row |= {"out_of_memory": report.out_of_memory_count, "notes": list(report.notes)}
    row["trials"] = [[trial.batch, trial.kind, trial.outcome] for trial in report.trials]
    return report, row


def probe() -> None:
    """Four models under 24 GiB, in ten minutes of a GPU."""
    for name in ("resnet50", "gpt2", "bert", "vit"):
        for precision in ("fp32", "bf16"):
            _trained_as_found(name, precision, 24)


def every() -> None:
    """All models under 24 GiB, and BERT under 80."""
    for precision in ("fp32", "bf16"):
        for name in models():
            _trained_as_found(name, precision, 24)
        _trained_as_found("bert", precision, 80)


def _trained_as_found(name: str, precision: str, gib: int) -> None:
    """What is found, training at it, and the largest sizes without a retry and without an error within 15% of it."""
    make = models()[name]
    report, row = probed(make, f"{gib}GiB", precision)
    size = report.micro_batch
    tell({"model": name, **row, "windows": {k: trained(make, size, k, gib * GIB, precision) for k in (2, 4)}})
    row = {"model": name, "precision": precision, "memory": f"{gib}GiB", "found": size}
    seen: dict[int, Any] = {}
    for what, passes in (("a_retry", lambda found: found == 0), ("an_error", lambda found: found != OUT)):
        low, high = size, int(1.15 * size) + 1
        while high - low > max(1, size // 100):
            middle = (low + high) // 2
            if middle not in seen:
                seen[middle] = trained(make, middle, 2, gib * GIB, precision)["result"]
            low, high = (middle, high) if passes(seen[middle]) else (low, middle)
        row[f"largest_without_{what}"] = low
    tell(row)


def algorithms() -> None:
    """What else decides which kernels run."""
    made = models()

    def channels_last() -> Made:
        model, sample = made["resnet50"]()
        return model.to(memory_format=torch.channels_last), sample

    def benchmark() -> Made:
        torch.backends.cudnn.benchmark = True
        return made["resnet50"]()

    def tf32() -> Made:
        torch.backends.cudnn.benchmark = False
        torch.set_float32_matmul_precision("high")
        return made["vit"]()

    for name, make in (("channels_last", channels_last), ("cudnn.benchmark", benchmark), ("TF32", tf32)):
        tell({"algorithms": name, **probed(make, "24GiB", "fp32")[1]})
    for backend in ("flash", "mem_efficient", "math"):
        for each in ("flash", "mem_efficient", "math", "cudnn"):
            getattr(torch.backends.cuda, f"enable_{each}_sdp")(each == backend)
        try:
            row = probed(made["bert"], "24GiB", "bf16")[1]
        except RuntimeError as error:  # a backend that does not take this model's mask
            row = {"error": str(error)}
        tell({"algorithms": f"attention: {backend}", **row})


def whole() -> None:
    """Without memory=: what the context grows by, and ten windows at the size found."""
    make = models()["resnet50"]
    torch.zeros(1, device="cuda")
    before = open_device("cuda").beside()
    report, row = probed(make, None, "bf16")
    row |= {"budget": report.budget_reason, "beside_before": before, "beside_after": open_device("cuda").beside()}
    tell({**row, "ten_windows": trained(make, report.micro_batch, 2, None, "bf16", windows=10)})


def loop() -> None:
    """The window beside one by hand, in turns, and how often either waits for the device."""
    for count in (1, 16):
        tell(_beside_one_by_hand(count))


def _beside_one_by_hand(count: int) -> dict[str, Any]:
    """The figures of windows of `count` micro-batches."""
    ours, hand = nn.Linear(256, 256).cuda(), nn.Linear(256, 256).cuda()
    optimizers = [torch.optim.AdamW(model.parameters(), fused=True) for model in (ours, hand)]
    plan = autoaccum.plan(limit=32, target_batch=32 * count)
    accumulator = autoaccum.Accumulator(ours, optimizers[0], plan, precision="fp32")
    batch = torch.randn(32 * count, 256)

    def by_us() -> None:
        for part in accumulator.window(batch):
            accumulator.backward(F.mse_loss(ours(part), part))

    def by_hand() -> None:
        for part in batch.split(32):
            placed = part.cuda()
            (F.mse_loss(hand(placed), placed) / count).backward()
        optimizers[1].step()
        optimizers[1].zero_grad()

    row: dict[str, Any] = {"micro_batches": count}
    for _ in range(20):
        by_us()
        by_hand()
    for name, run in (("ours", by_us), ("by_hand", by_hand)):
        torch.cuda.set_sync_debug_mode("warn")
        with warnings.catch_warnings(record=True) as waits:
            warnings.simplefilter("always")
            run()
        torch.cuda.set_sync_debug_mode("default")
        row[f"waits_{name}"] = sum("synchroniz" in str(each.message) for each in waits)
    times: dict[str, list[float]] = {"ours": [], "by_hand": []}
    for _ in range(50):
        for name, run in (("ours", by_us), ("by_hand", by_hand)):
            torch.cuda.synchronize()
            began = time.perf_counter()
            run()
            torch.cuda.synchronize()
            times[name].append(time.perf_counter() - began)
    return {**row, **{f"seconds_{name}": sorted(each)[len(each) // 2] for name, each in times.items()}}


SETTINGS = (
    "expandable_segments:True",
    "max_split_size_mb:256",
    "roundup_power2_divisions:8",
    "garbage_collection_threshold:0.8",
)


def settings() -> None:
    """The allocator as people set it up, each in a process of its own."""
    for setting in SETTINGS:
        environment = {**os.environ, "PYTORCH_ALLOC_CONF": setting, "PYTORCH_CUDA_ALLOC_CONF": setting}
        done = subprocess.run([sys.executable, "-m", "tests.gpu.models", "setting"], env=environment, text=True,
                              capture_output=True, check=False)  # fmt: skip
        found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
        tell({"setting": setting, **(found[-1] if found else {"error": done.stderr[-500:]})})


def finders() -> None:
    """Time and samples of the peers' finders beside ours, under 8 GiB, where they are installed."""
    for name, find in (("autoaccum", _ours), ("lightning", _lightning), ("accelerate", _accelerate)):
        counted = _Counted(models()["resnet50"]())
        began = time.perf_counter()
        try:
            with open_device("cuda").limit(open_device("cuda").budget(8 * GIB)):
                found: Any = find(counted)
        except ImportError as error:
            found = f"not run: {error}"
        tell({"finder": name, "found": found, "seconds": time.perf_counter() - began, "samples": counted.samples})
        del counted
        open_device("cuda").release()


class _Counted:
    """A model, a data set of one sample, and how many samples its forward passes have seen."""

    def __init__(self, made: Made) -> None:
        self.model, sample = made
        self.data, self.samples = Repeated(sample), 0
        self.model.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, module: nn.Module, inputs: Any, named: dict[str, torch.Tensor]) -> None:
        self.samples += len(named["labels"])


def _ours(counted: _Counted) -> int:
    report = autoaccum.probe(
        counted.model, counted.data, memory=8 * GIB, device="cuda", precision="fp32", cache=False, max_batch=CEILING
    )
    return report.micro_batch


def _accelerate(counted: _Counted) -> int:
    from accelerate.utils import find_executable_batch_size

    @find_executable_batch_size(starting_batch_size=1024)
    def train(batch_size: int) -> int:
        model = counted.model.cuda().train()
        optimizer = torch.optim.AdamW(model.parameters())
        for _ in range(2):
            batch = torch.utils.data.default_collate([counted.data.sample] * batch_size)
            model(**{key: value.cuda() for key, value in batch.items()}).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return batch_size

    return int(train())


def _lightning(counted: _Counted) -> int:
    import lightning
    from lightning.pytorch.callbacks import BatchSizeFinder

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model, self.batch_size = counted.model, 2

        def training_step(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
            loss: torch.Tensor = self.model(**batch).loss
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters())

        def train_dataloader(self) -> torch.utils.data.DataLoader[Any]:
            return torch.utils.data.DataLoader(counted.data, batch_size=self.batch_size)  # type: ignore[arg-type]

    module = Module()
    trainer = lightning.Trainer(
        accelerator="cuda", devices=1, max_steps=1, logger=False, enable_progress_bar=False, enable_checkpointing=False,
        enable_model_summary=False, callbacks=[BatchSizeFinder("power", max_trials=12)],
    )  # fmt: skip
    trainer.fit(module)
    return module.batch_size


def setting() -> None:
    """One of these, as this process has it."""
    tell(probed(models()["resnet50"], "8GiB", "fp32")[1])


def snapshots() -> None:
    """Two windows of a small model as torch's own history tells them, beside the rows."""
    from tests.gpu.__main__ import RESULTS

    torch.cuda.memory._record_memory_history("all", context=None)
    for size in (4, 16):
        trained(models()["bert"], size, 2, None, "fp32", windows=1)
        path = RESULTS / f"snapshot-bert-{size}.pickle"
        torch.cuda.memory._dump_snapshot(str(path))
        tell({"snapshot": path.name, "bytes": path.stat().st_size})


def tell(row: dict[str, Any]) -> None:
    print(json.dumps(row), flush=True)


PARTS = (probe, every, algorithms, whole, finders, loop, settings, setting, snapshots)


def main(arguments: Sequence[str]) -> int:
    parts = {each.__name__: each for each in PARTS}
    if torch.cuda.get_device_name().startswith("Fake"):
        torch.backends.cuda.enable_cudnn_sdp(False)  # a stand-in has no attention of cuDNN's
    parts[arguments[0]]()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
