"""Language models of transformers: any architecture of AutoModelForCausalLM, with its tokenizer, from a folder.

The folder is what `save_pretrained` writes and model hubs hold: config.json, safetensors (sharded or not), the
tokenizer's files, generation_config.json. The network is transformers' own class; only its weights are loaded by us.

Prompts are continued by transformers' own `generate`, in batches with padding on the left; it stops a prompt at its
end-of-sequence token. Sampling draws from torch's global generator, seeded, so that a reference and a candidate draw
the same numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from typing_extensions import override

from qexp.checkpoints.checkpoint import read_object
from qexp.config.generate import GenerateConfig, for_text
from qexp.config.model import ModelConfig
from qexp.config.text_windows import positions, window_and_stride
from qexp.errors import ConfigError, LoadError
from qexp.hub.download import local_folder
from qexp.models.base import OnStep, TextSource
from qexp.system.text_files import read_text

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from qexp.checkpoints.checkpoint import Checkpoint
    from qexp.checkpoints.conversion import Conversion

CARRIED_FILES = (  # what a model's folder holds beside config.json and weights: without it, text means nothing
    "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model",
    "chat_template.jinja", "chat_template.json",
)  # fmt: skip


# of what is read beside weights
SIDE_SUFFIXES = (".json", ".jinja", ".txt", ".model", ".spm", ".vocab", ".bpe", ".tiktoken")
TOKENIZERS = CARRIED_FILES[1:2] + CARRIED_FILES[5:11]  # one of which every tokenizer has


@dataclass(frozen=True)
class CausalLMConfig(ModelConfig):
    """path: a folder with config.json, safetensors and a tokenizer, or user/name of a hub's repository, of which
    revision is a branch, tag or commit (null: main). reference_path: the unquantized checkpoint to compare with where
    `path` is quantized already; a folder, or user/name@revision."""

    source: str = "causal_lm"


Config = CausalLMConfig


def _tokenizer_message(folder: Path, error: Exception) -> str:
    """Describe why a tokenizer cannot be opened: missing, damaged, or of another version."""
    from importlib.metadata import version

    reason = (str(error) or type(error).__name__).splitlines()[0][:300]
    found = next((name for name in TOKENIZERS if (folder / name).is_file()), None)
    if found is None:
        return (
            f"'{folder}' has no tokenizer that transformers can open: {reason}; "
            "put the model's tokenizer files (tokenizer.json, tokenizer_config.json) there"
        )
    return (
        f"'{folder / found}': transformers {version('transformers')} with tokenizers {version('tokenizers')} cannot "
        f"open this tokenizer: {reason}; download it again, or save it with these versions, or install those that "
        "wrote it"
    )


class Source(TextSource):
    """A language model with one component, "model"."""

    config: CausalLMConfig
    tasks: tuple[str, ...] = ("generate", "perplexity", "lm_eval", "forward", "roundtrip", "sensitivity")
    network_class: str | None = "AutoModelForCausalLM"  # of transformers; None is the one in config.json
    padding_side = "left"  # of prompts that are continued together
    required_packages = ("transformers", "tokenizers")
    imports = (
        *("transformers.modeling_utils", "transformers.models.auto.modeling_auto", "transformers.conversion_mapping"),
        *("transformers.models.auto.tokenization_auto", "transformers.generation", "transformers.masking_utils"),
        *("qexp.models.text_generation", "qexp.models.transformers_networks"),
    )

    @property
    def folder(self) -> Path:
        """Return the model's folder. Raises ConfigError if model.path is not set."""
        if self.config.path is None:
            raise ConfigError(
                "model.path=null, but this model needs a checkpoint; set model.path to a folder as save_pretrained "
                "writes it, or to a hub's user/name (for a quantized checkpoint, also model.reference_path to the "
                "original to compare it with)"
            )
        return local_folder(self.config.path)

    @override
    def components(self) -> tuple[str, ...]:
        return ("model",)

    @override
    def resolve_task(self, task: GenerateConfig) -> GenerateConfig:
        """Return the task with its defaults, without fields for images."""
        return for_text(task)

    @override
    def checkpoints(self) -> dict[str, Path]:
        return {"model": self.folder}

    @override
    def library_classes(self) -> tuple[str, ...]:
        """Return the classes that config.json names; none for a file that has no such list, as of GGUF."""
        file = self.folder / "config.json"
        names = read_object(file).get("architectures") if file.is_file() else None
        return tuple(f"transformers::{name}" for name in names or () if isinstance(name, str))

    @override
    def side_files(self) -> list[Path]:
        """Return the files of the tokenizer and of generation settings."""
        return side_files(self.folder)

    @override
    def skeleton(self, component: str, config: dict[str, Any]) -> nn.Module:
        """Build transformers' own network, with the folder's generation_config."""
        from qexp.models.transformers_networks import network, with_generation_config

        return with_generation_config(network(config, self.folder, self.network_class), self.folder)

    @override
    def conversion(self, component: str, model: nn.Module, checkpoint: Checkpoint) -> Conversion:
        from qexp.models.transformers_networks import renaming

        return renaming(model)

    @override
    def block_lists(self, model: nn.Module) -> list[str]:
        from qexp.models.transformers_networks import block_lists

        return block_lists(model)

    @cached_property
    def tokenizer(self) -> Any:
        """Return the folder's tokenizer. Raises LoadError if it has none."""
        from transformers import AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(
                self.folder, local_files_only=True, padding_side=self.padding_side
            )
        except Exception as error:  # the library of tokenizers raises plain ones
            raise LoadError(_tokenizer_message(self.folder, error)) from error
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token  # masked wherever it pads
        return tokenizer

    @override
    def carried_files(self) -> tuple[str, ...]:
        """Return the files that a saved model needs besides config.json and weights."""
        return CARRIED_FILES

    @override
    def check_task(self, task: Any) -> None:
        """Raise ConfigError for a task without an input that this model has no default for."""
        if task.name == "generate":
            self.prompts(task)
        if task.name == "forward" and task.is_text and not any((self.folder / name).is_file() for name in TOKENIZERS):
            raise ConfigError(
                f"task.inputs={task.inputs} is text, but '{self.folder}' has no tokenizer; put the model's tokenizer "
                "files (tokenizer.json, tokenizer_config.json) there, or give tensors (.safetensors)"
            )
        if task.name in ("perplexity", "sensitivity") or getattr(task, "text", None) is not None:
            self.text(task.text)
        if task.name in ("perplexity", "sensitivity") and (self.folder / "config.json").is_file():
            longest = positions(read_object(self.folder / "config.json"))
            stride = getattr(task, "stride", None)
            window_and_stride(longest, task.window, stride, has_begin=False)  # check_run has the tokenizer, too

    @override
    def prompts(self, task: GenerateConfig) -> list[str]:
        """Return the texts to continue. Raises ConfigError if there are none."""
        if not task.prompt:
            raise ConfigError(
                "task.prompt=null, but this model has no prompts of its own; give task.prompt='[Once upon a time]', or "
                "task.prompt=@file with one per line"
            )
        return list(task.prompt)

    @property
    @override
    def begin_token(self) -> int | None:
        """Return the token that this tokenizer puts before a text, or None."""
        tokens: list[int] = self.tokenizer("")["input_ids"]
        return tokens[0] if len(tokens) > 0 and tokens[0] == self.tokenizer.bos_token_id else None

    @override
    def text(self, path: str | None) -> str:
        """Return the text to measure perplexity on. Raises ConfigError if it cannot be read."""
        if path is None:
            raise ConfigError("task.text=null names no text to read; set task.text to a text file")
        return read_text(path, f"task.text={path}", "give a text file")

    @override
    def encode(self, text: str) -> Tensor:
        """Return the tokens of a text, [n], without special tokens, also without a begin token."""
        import torch

        tokens = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        if tokens and tokens[0] == self.begin_token:
            tokens = tokens[1:]
        return torch.tensor(tokens, dtype=torch.int64)

    @override
    def token_bytes(self, text: str) -> Tensor | None:
        """Return the bytes of the text from the end of the token before to the end of each token, [n].

        None for a tokenizer that does not say where its tokens are. Tokens that share a character (bytes of a letter
        that the vocabulary lacks) leave it to the first of them; characters between tokens are the next one's.
        """
        import torch

        if not self.tokenizer.is_fast:
            return None
        found = self.tokenizer(text, add_special_tokens=False, verbose=False, return_offsets_mapping=True)
        ends = torch.tensor([end for _, end in found["offset_mapping"]], dtype=torch.int64)
        starts_with_begin = found["input_ids"][:1] == [self.begin_token]
        upto = torch.tensor([0, *accumulate(len(letter.encode()) for letter in text)])  # characters -> bytes
        counts = torch.diff(upto[ends.cummax(0).values], prepend=torch.zeros(1, dtype=torch.int64))
        return counts[1:] if starts_with_begin else counts

    @override
    def check_run(self, models: Mapping[str, nn.Module], task: Any) -> None:
        """Raise ConfigError or LoadError for a task that model and tokenizer cannot do, before weights are read."""
        from qexp.models.prompt_tokens import check_tokens, encode_prompts
        from qexp.models.text_generation import generation_settings, string_stops

        model: Any = models["model"]
        if task.name == "generate":
            check_tokens(model, self.tokenizer, encode_prompts(self.tokenizer, self.prompts(task)), "task.prompt")
            settings = generation_settings(model.generation_config, self.resolve_task(task), self.tokenizer, model)
            string_stops(settings, self.tokenizer)
        if task.name in ("perplexity", "sensitivity") or (
            task.name == "generate" and (task.text is not None or self.has_text)
        ):
            tokens = self.encode(self.text(task.text))[: getattr(task, "max_tokens", None)].tolist()
            begin = [] if self.begin_token is None else [self.begin_token]
            check_tokens(model, self.tokenizer, [begin + tokens], f"task.text={task.text}")
        if task.name == "perplexity":
            longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
            window_and_stride(longest, task.window, task.stride, has_begin=self.begin_token is not None)

    @override
    def limit_samples(self, task: GenerateConfig, count: int) -> GenerateConfig:
        return replace(task, prompt=tuple(self.prompts(task)[:count]))

    @override
    def forward_inputs(self, model: nn.Module, lines: list[str]) -> dict[str, Tensor]:
        """Return the network's arguments for lines of text, [lines, longest], padded on the right."""
        from qexp.models.prompt_tokens import encode_lines

        return encode_lines(model, self.tokenizer, lines)

    @override
    def generate(
        self, models: dict[str, nn.Module], task: GenerateConfig, *, seed: int, device: torch.device, on_step: OnStep
    ) -> dict[str, Tensor]:
        """Continue every prompt: see `text_generation.continue_prompts`."""
        from qexp.models.text_generation import continue_prompts

        prompts, task = self.prompts(task), self.resolve_task(task)
        return continue_prompts(
            models["model"], self.tokenizer, prompts, task, seed=seed, device=device, on_step=on_step
        )

    @override
    def decode(self, tokens: Tensor) -> list[str]:
        """Return the texts of rows of tokens, [n, length]."""
        return self.tokenizer.batch_decode(tokens, skip_special_tokens=True)


def side_files(folder: Path) -> list[Path]:
    """Return the files for settings, vocabularies and templates, besides config.json and weights."""
    found = [*folder.iterdir(), *folder.glob("additional_chat_templates/*")] if folder.is_dir() else []
    named = [file for file in found if file.suffix in SIDE_SUFFIXES and file.is_file()]
    return sorted(file for file in named if file.name != "config.json" and not file.name.endswith(".index.json"))
