"""TRL's trainers and PEFT's adapters, attached: their collators put chosen beside rejected, or all in one row."""

import pytest
import torch

import autoaccum
from autoaccum.errors import SetupError
from autoaccum.training.events import WindowReplayed
from tests.trainer_models import TINY, flat, moved
from tests.versions import peer

trl, peft, transformers = peer("trl"), peer("peft"), peer("transformers")
datasets = pytest.importorskip("datasets")

EXACT, SINGLE = 1e-10, 1e-6  # TRL takes the logarithms of SFT and DPO in float32


def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["[PAD]", "[UNK]", "[EOS]", *(f"w{number}" for number in range(47))]
    made = Tokenizer(models.WordLevel({word: place for place, word in enumerate(words)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="[PAD]", unk_token="[UNK]", eos_token="[EOS]"
    )


def rows(kind):
    draw = torch.Generator().manual_seed(0)

    def text(count):
        return " ".join(f"w{int(number)}" for number in torch.randint(0, 47, (count,), generator=draw))

    made = [(text(3 + n % 4), " " + text(2 + n % 7), " " + text(3 + n % 5)) for n in range(22)]
    names = ("prompt", "completion") if kind == "sft" else ("prompt", "chosen", "rejected")
    return datasets.Dataset.from_list([dict(zip(names, each)) for each in made])


def trainer(kind, folder, lora=False, **settings):
    config = transformers.LlamaConfig(
        **TINY,
        max_position_embeddings=64,
        pad_token_id=0,
        eos_token_id=2,
        **({"num_labels": 1} if kind == "reward" else {}),
    )
    net = transformers.LlamaForSequenceClassification if kind == "reward" else transformers.LlamaForCausalLM
    torch.manual_seed(0)
    model = net(config).double()
    torch.manual_seed(1)
    other = net(config).double()
    common = {
        "output_dir": str(folder), "num_train_epochs": 1, "learning_rate": 0.1, "optim": "sgd", "report_to": [],
        "save_strategy": "no", "logging_steps": 1, "max_grad_norm": 0, "use_cpu": True, "disable_tqdm": True,
        "log_level": "error", "bf16": False, "max_length": 32, **settings,
    }  # fmt: skip
    kinds = {"sft": (trl.SFTTrainer, trl.SFTConfig), "dpo": (trl.DPOTrainer, trl.DPOConfig),
             "reward": (trl.RewardTrainer, trl.RewardConfig)}  # fmt: skip
    made, arguments = kinds[kind]
    adapter = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.0) if lora else None
    more = {"ref_model": other} if kind == "dpo" and not lora else {}
    made = made(
        model,
        args=arguments(**common),
        train_dataset=rows(kind),
        processing_class=tokenizer(),
        peft_config=adapter,
        **more,
    )
    for parameter in made.model.parameters():
        parameter.data = parameter.data.double()
    return made


@pytest.mark.parametrize(
    ("kind", "lora", "within"),
    [
        ("sft", False, SINGLE),
        ("sft", True, SINGLE),
        ("dpo", False, SINGLE),
        ("dpo", True, EXACT),
        ("reward", False, EXACT),
    ],
)
def test_the_update_is_that_of_the_trainer_alone_at_the_whole_batch(kind, lora, within, tmp_path):
    alone = trainer(kind, tmp_path, lora, per_device_train_batch_size=16)
    before = flat(alone.model)
    alone.train()
    ours = trainer(kind, tmp_path, lora, per_device_train_batch_size=4, gradient_accumulation_steps=2)
    autoaccum.attach(ours, target_batch=16, micro_batch=3, progress=False).train()
    assert moved(flat(ours.model), before, flat(alone.model)) <= within
    assert ours.state.global_step == alone.state.global_step == 2


@pytest.mark.parametrize(
    "settings",
    [
        {"padding_free": True, "max_length": None},
        pytest.param({"packing": True, "packing_strategy": "bfd"}, marks=pytest.mark.slow),
        pytest.param({"packing": True, "packing_strategy": "wrapped"}, marks=pytest.mark.slow),
    ],
)
def test_packed_samples_and_ones_without_padding_are_cut_before_they_are_one_row(settings, tmp_path):
    alone = trainer("sft", tmp_path, per_device_train_batch_size=6, max_steps=2, **settings)
    before = flat(alone.model)
    alone.train()
    ours = trainer("sft", tmp_path, per_device_train_batch_size=2, max_steps=2, **settings)
    autoaccum.attach(ours, target_batch=6, micro_batch=2, progress=False).train()
    assert moved(flat(ours.model), before, flat(alone.model)) <= SINGLE


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "lora", "within"),
    [("sft", False, SINGLE), ("sft", True, SINGLE), ("dpo", False, SINGLE), ("reward", False, EXACT)],
)
def test_twenty_out_of_memory_errors_are_replayed_and_change_neither_update_nor_counts(kind, lora, within, tmp_path):
    alone = trainer(kind, tmp_path, lora, per_device_train_batch_size=22, max_steps=12)
    before = flat(alone.model)
    alone.train()
    ours = trainer(kind, tmp_path, lora, per_device_train_batch_size=4, max_steps=12)
    step = ours.compute_loss

    def replays():
        return sum(isinstance(event, WindowReplayed) for event in heard)

    def scarce(model, inputs, *rest, **named):
        loss = step(model, inputs, *rest, **named)
        if replays() < 20 and len(inputs["input_ids"]) > least and torch.rand((), generator=draw) < 0.7:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
        return loss

    draw, heard, ours.compute_loss = torch.Generator().manual_seed(1), [], scarce
    least = 1 if kind == "sft" else 2  # a sample is a chosen and a rejected one
    autoaccum.attach(
        ours, target_batch=22, micro_batch=22, check=False, regrow_after=1, progress=False, callbacks=[heard.append]
    )
    with pytest.warns(UserWarning, match="out of memory in step"):
        ours.train()
    assert replays() == 20
    assert moved(flat(ours.model), before, flat(alone.model)) <= within
    # What ran in vain is not counted, nor what was run to find out what the loss divides by.
    counted = [[entry.get("num_tokens") for entry in made.state.log_history] for made in (ours, alone)]
    assert counted[0] == counted[1]


def test_a_trainer_that_makes_its_own_samples_is_refused(tmp_path):
    config = transformers.LlamaConfig(**TINY, max_position_embeddings=64, pad_token_id=0, eos_token_id=2)
    made = trl.GRPOTrainer(
        transformers.LlamaForCausalLM(config),
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=trl.GRPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to=[]),
        train_dataset=rows("sft").select_columns(["prompt"]),
        processing_class=tokenizer(),
    )
    with pytest.raises(SetupError, match="makes its own batches"):
        autoaccum.attach(made, target_batch=16)
