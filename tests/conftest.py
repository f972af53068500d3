"""What all tests share: options, external data, checked types, and a tokenizer that needs no download."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
if "PYTEST_XDIST_WORKER" in os.environ:  # the workers share the cores
    os.environ.setdefault("OMP_NUM_THREADS", "1")

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from jaxtyping import install_import_hook

# Shapes and types in signatures are checked in every test; this must come before ctxlens is imported.
install_import_hook("ctxlens", "beartype.beartype")

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

TOY_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>\\n' + message['content'] + eos_token + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)
"""A chat template in the style of zephyr and TinyLlama."""

TOY_CORPUS = [
    "What is two plus two? It is four.",
    "The best thing to do in San Francisco is eat a sandwich and sit in Dolores Park.",
    "Hello, how are you today? I am fine, thank you.",
    "Be brief and answer from the document above.",
]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also run tests that take minutes")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--slow"):
        return
    for item in items:
        if "slow" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="takes minutes; run with --slow"))


@pytest.fixture(scope="session", autouse=True)
def _few_threads() -> None:
    import torch

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))


def external_folder(variable: str, requirement: str, content: str) -> Path:
    """The folder that an environment variable names, for tests of things that are not in the repository.

    Args:
        variable: environment variable that names the folder.
        requirement: environment variable that makes a missing folder a failure; without it, the test is
            skipped. Automatic checks set it, so that they cannot pass because everything was skipped.
        content: what the folder holds, for the message.
    """
    folder = os.environ.get(variable)
    if folder and Path(folder).is_dir():
        return Path(folder)
    problem = f"{variable}={folder} is not a folder" if folder else f"{variable} is not set"
    problem += f"; it names a folder of {content}"
    if os.environ.get(requirement):
        pytest.fail(f"{problem}, which {requirement} requires", pytrace=False)
    pytest.skip(problem)


@pytest.fixture(scope="session")
def test_data() -> Path:
    """The folder of real data sets, templates and tokenizers, which are not in the repository."""
    return external_folder("CTXLENS_TEST_DATA", "CTXLENS_REQUIRE_DATA", "real data for tests")


@pytest.fixture(scope="session")
def test_models() -> Path:
    """The folder of real pretrained checkpoints, one subfolder each, which are not in the repository."""
    return external_folder("CTXLENS_TEST_MODELS", "CTXLENS_REQUIRE_MODELS", "pretrained checkpoints")


@pytest.fixture(scope="session")
def fixtures() -> Path:
    """Small files in the original layouts of SQuAD, QuAC and DROP."""
    return Path(__file__).parent / "fixtures" / "qa"


def build_toy_tokenizer(*, trim_offsets: bool = True, **options: Any) -> PreTrainedTokenizerFast:
    """A byte-level BPE of a few hundred tokens with BOS, EOS and `TOY_TEMPLATE`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(TOY_CORPUS, trainer)
    options = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"} | options
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **options)
    tokenizer.chat_template = TOY_TEMPLATE
    return tokenizer


@pytest.fixture(scope="session")
def toy_tokenizer() -> PreTrainedTokenizerFast:
    """A small byte-level tokenizer with a zephyr-like chat template. Tests share it, so do not modify it."""
    return build_toy_tokenizer()


@pytest.fixture(scope="session")
def organism_tokenizer() -> Any:
    """The tokenizer of the embedded model."""
    from transformers import AutoTokenizer

    folder = Path(__file__).parents[1] / "ctxlens" / "organism" / "base"
    if not (folder / "tokenizer.json").is_file():
        pytest.skip(f"no embedded model in {folder}")
    return AutoTokenizer.from_pretrained(folder)
