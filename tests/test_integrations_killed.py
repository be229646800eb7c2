"""Trainers killed by SIGKILL in mid-training go on from their own checkpoint as if nothing had been."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.versions import peer

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.slow

TRANSFORMERS = """
import transformers

class Kill(transformers.TrainerCallback):
    def on_step_begin(self, args, state, control, **_):
        if KILL and state.global_step == 4:
            os.kill(os.getpid(), signal.SIGKILL)

net = model("BertForMaskedLM")
args = transformers.TrainingArguments(
    output_dir=FOLDER, per_device_train_batch_size=4, num_train_epochs=2, learning_rate=0.01, optim="adamw_torch",
    report_to=[], save_strategy="steps", save_steps=2, max_grad_norm=0.5, use_cpu=True, disable_tqdm=True,
    log_level="error", lr_scheduler_type="linear",
)
made = transformers.Trainer(net, args, train_dataset=samples("tokens"), data_collator=padded, callbacks=[Kill()])
autoaccum.attach(made, target_batch=8, memory="1MiB", cache=False, progress=False, callbacks=[heard.append])
made.train(resume_from_checkpoint=RESUME)
steps = made.state.global_step
"""

LIGHTNING = """
import lightning

class Module(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = model("BertForMaskedLM")

    def training_step(self, batch, batch_idx):
        return self.net(**batch).loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.01)

class Kill(lightning.Callback):
    def on_train_batch_start(self, trainer, *_):
        if KILL and trainer.global_step == 4:
            os.kill(os.getpid(), signal.SIGKILL)

# At the end of an epoch: Lightning keeps no place within one.
saving = lightning.pytorch.callbacks.ModelCheckpoint(FOLDER, every_n_epochs=1, save_last=True)
ours = autoaccum.integrations.lightning.TargetBatch(8, memory="1MiB", cache=False, progress=False,
                                                    callbacks=[heard.append])
made = lightning.Trainer(accelerator="cpu", devices=1, max_epochs=2, logger=False, enable_progress_bar=False,
                         enable_model_summary=False, precision="64-true", callbacks=[ours, saving, Kill()])
module = Module()
made.fit(module, torch.utils.data.DataLoader(samples("tokens"), 4, collate_fn=padded),
         ckpt_path="last" if RESUME else None)
net, steps = module.net, made.global_step
"""

SCRIPT = """
import os, signal, sys
import torch
torch.set_num_threads(1)
import autoaccum
from tests.trainer_models import flat, model, padded, samples

FOLDER, KILL, RESUME = sys.argv[1], sys.argv[2] == "kill", True if sys.argv[2] == "resume" else None
heard = []
{trainer}
torch.save([flat(net), [event.name for event in heard], steps], FOLDER + "/" + sys.argv[2] + ".pt")
"""


@pytest.mark.parametrize("name", ["transformers", "lightning"])
def test_a_killed_training_goes_on_from_the_trainers_own_checkpoint(name, tmp_path):
    peer(name)
    peer("transformers")

    def run(how, folder, code=0):
        folder.mkdir(exist_ok=True)
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            [sys.executable, "-W", "ignore", tmp_path / "script.py", folder, how],
            env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False,
        )  # fmt: skip
        assert done.returncode == code, done.stderr[-6000:]
        return None if code else torch.load(folder / f"{how}.pt", weights_only=False)

    trainer = TRANSFORMERS if name == "transformers" else LIGHTNING
    (tmp_path / "script.py").write_text(SCRIPT.format(trainer=trainer))
    whole, probed, steps = run("whole", tmp_path / "a")
    run("kill", tmp_path / "b", -signal.SIGKILL)
    again, heard, gone_on = run("resume", tmp_path / "b")
    assert "trial" in probed
    assert "trial" not in heard
    assert steps == gone_on == 6
    # Not the same bits: what the check learnt of the loss beforehand changes how its weights are rounded.
    assert float((again - whole).norm() / whole.norm()) <= 1e-12
