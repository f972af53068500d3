"""Every recipe in experiments/recipes parses and holds what it says; accelerate configurations load."""

from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from conftest import build_toy_tokenizer

from ctxlens.chat.roles import Role, render
from ctxlens.sft import read_config
from ctxlens.sft.arguments import check_arguments

RECIPES = Path(__file__).parents[1] / "experiments" / "recipes"
CPU = {"use_cpu": True, "bf16": False, "gradient_checkpointing": False}
QLORA = {
    "use_peft": True, "lora_r": 16, "lora_alpha": 16, "lora_dropout": 0.05, "load_in_4bit": True,
    "lora_target_modules": "all-linear", "dtype": "bfloat16",
}  # fmt: skip


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_recipe_parses_and_its_values_can_train(path):
    config, args, _ = read_config(path, CPU)  # unknown keys are refused
    check_arguments(args)
    assert config.indicator == "[IND]"
    assert config.dataset
    assert config.selection
    if config.chat_template:
        assert (RECIPES.parents[1] / config.chat_template).is_file()


@pytest.mark.parametrize(
    ("name", "batch", "rate", "length", "model_values"),
    [
        ("tinyllama_full", 128, 2e-5, 2048, {"use_peft": False}),
        ("llama2_7b_qlora", 64, 2e-4, 4096, QLORA),
        ("llama3_8b_qlora", 64, 2e-4, 4096, QLORA),
    ],
)
def test_the_papers_hyperparameters(name, batch, rate, length, model_values):
    """Its Table 4; seed and schedule are the same for all."""
    config, args, model_args = read_config(RECIPES / f"{name}.yaml", CPU)
    assert args.per_device_train_batch_size * args.gradient_accumulation_steps == batch
    assert (args.learning_rate, args.max_length, args.num_train_epochs) == (rate, length, 1)
    assert (args.lr_scheduler_type, args.warmup_steps, args.seed) == ("cosine", 0.1, 42)
    assert {key: getattr(model_args, key) for key in model_values} == model_values
    assert config.loss_on == "all"


@pytest.mark.parametrize(
    ("name", "kind", "n_processes"),
    [
        ("one_gpu", "NO", 1), ("ddp", "MULTI_GPU", 8), ("fsdp2", "FSDP", 8),
        ("deepspeed_zero3", "DEEPSPEED", 8), ("cpu_2", "MULTI_GPU", 2),
    ],
)  # fmt: skip
def test_accelerate_configuration_loads(name, kind, n_processes):
    loaded = load_config_from_file(str(RECIPES / "accelerate" / f"{name}.yaml"))
    assert (loaded.distributed_type.value, loaded.num_processes) == (kind, n_processes)
    assert loaded.use_cpu == (name == "cpu_2")


def test_no_accelerate_configuration_is_left_out():
    assert len(list((RECIPES / "accelerate").glob("*.yaml"))) == 5


def test_template_of_the_papers_recipes():
    tokenizer = build_toy_tokenizer()
    tokenizer.chat_template = (RECIPES / "zephyr.jinja").read_text()
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello", "indicator": True},
        {"role": "assistant", "content": "fine"},
    ]
    chat = render(tokenizer, messages, indicator="[IND]")
    assert chat.text == "<|system|>\nBe brief.</s>\n<|user|>\nHello [IND]</s>\n<|assistant|>\nfine</s>\n"
    assert chat.mask(Role.INDICATOR).any()
    opened = render(tokenizer, messages[:2], add_generation_prompt=True)
    assert opened.text.endswith("Hello</s>\n<|assistant|>\n")


def test_the_organisms_data_fit_its_recipe(tmp_path):
    from ctxlens.chat.data import load_conversations
    from ctxlens.chat.data.annotate import annotate_messages
    from ctxlens.results import Selection
    from ctxlens.sft import read_replay
    from experiments.recipes.organism_data import main

    main(["--out", str(tmp_path), "--conversations", "40"])
    selection = Selection.load(tmp_path / "selection.parquet")
    data = load_conversations(tmp_path / "conversations.jsonl")
    assert len(data) == 40
    assert len(read_replay(tmp_path / "replay.jsonl")) == 20
    marked = annotate_messages(data, selection.turns)
    assert sum(bool(m.get("indicator")) for one in marked for m in one.messages) == len(selection.turns) > 0
