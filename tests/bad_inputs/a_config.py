"""A: config.json and the files beside it."""

from pathlib import Path

from llama_fast.config import LlamaConfig
from llama_fast.errors import ConfigError
from tests.bad_inputs.harness import refused


def A01_missing(folder: Path) -> None:
    refused(ConfigError, lambda: LlamaConfig.from_pretrained(folder), str(folder / "config.json"))
