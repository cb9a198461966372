"""A checkpoint and what builds its network, as a model source of one component: what `qexp.load(path)` loads.

The network is the caller's, or the class that config.json names: `_class_name` of diffusers, `architectures` of
transformers. It is built while new parameters land on the meta device.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from typing_extensions import override

from qexp.config.model import ModelConfig
from qexp.errors import ConfigError, LoadError
from qexp.models.base import ModelSource
from qexp.system.imports import quiet

if TYPE_CHECKING:
    from torch import nn

    from qexp.checkpoints.checkpoint import Checkpoint
    from qexp.checkpoints.conversion import Conversion


NOT_THE_NETWORKS = ("quantization_config", "torch_dtype", "dtype")  # entries of config.json about the weights


class FolderSource(ModelSource):
    """A checkpoint, with one component, "model"."""

    def __init__(self, path: Path, build: Callable[[dict[str, Any]], nn.Module] | type[nn.Module] | None) -> None:
        super().__init__(ModelConfig(path=str(path)))
        self.path, self.build = path, build

    @override
    def checkpoints(self) -> dict[str, Path]:
        return {"model": self.path}

    @override
    def skeleton(self, component: str, config: dict[str, Any]) -> nn.Module:
        """Return the network of a parsed config.json.

        Raises: ConfigError or LoadError if nothing says how to build it.
        """
        fields = {name: value for name, value in config.items() if name not in NOT_THE_NETWORKS}
        if isinstance(self.build, type):
            return self._built_by_class(self.build, {n: v for n, v in fields.items() if not n.startswith("_")})
        if self.build is not None:
            return self.build(config)
        if fields.get("_class_name") == "DigitsTransformer":
            from qexp.models.digits import DigitsModelConfig, Source

            return Source(DigitsModelConfig()).skeleton("transformer", config)
        if "_class_name" in fields:
            return _from_diffusers(fields, self.path)
        if "architectures" in fields:
            from qexp.models.transformers_networks import network, with_generation_config

            return with_generation_config(network(fields, self.path), self.path)
        raise ConfigError(
            f"'{self.path}': its config.json names no class of diffusers (_class_name) or transformers "
            "(architectures), so nothing says how to build the network; pass skeleton=, a class or a function"
        )

    @override
    def skip_modules(self, component: str, model: Any) -> tuple[str, ...]:
        """Return the modules left unquantized unless the caller built the network.

        An error of the last layer goes straight into the output.
        """
        if self.build is not None:
            return ()
        if type(model).__name__ == "DigitsTransformer":
            from qexp.config.backend_options import model_skip_modules

            return model_skip_modules("digits")
        if not isinstance(getattr(model, "base_model_prefix", None), str):
            return ()
        from qexp.models.transformers_networks import output_embedding

        return output_embedding(model)

    @override
    def carried_files(self) -> tuple[str, ...]:
        """Return a tokenizer's files, if there are any."""
        from qexp.models.causal_lm import CARRIED_FILES

        return CARRIED_FILES

    @override
    def conversion(self, component: str, model: nn.Module, checkpoint: Checkpoint) -> Conversion | None:
        return library_conversion(model, checkpoint)

    def _built_by_class(self, kind: type[nn.Module], fields: Mapping[str, Any]) -> nn.Module:
        try:
            return kind(**fields)
        except TypeError as error:
            raise ConfigError(
                f"skeleton={kind.__name__} cannot be built from the fields of '{self.path}/config.json': {error}; pass "
                "a function of the parsed config.json instead"
            ) from error


def library_conversion(model: nn.Module, checkpoint: Checkpoint) -> Conversion | None:
    """Return the conversion of tensor names by transformers' rules, or diffusers' for a single file."""
    if hasattr(model, "base_model_prefix"):
        from qexp.models.transformers_networks import renaming

        return renaming(model)
    if type(model).__module__.partition(".")[0] == "diffusers":
        from qexp.models.single_file import diffusers_conversion

        return diffusers_conversion(model, checkpoint)
    return None


def _from_diffusers(fields: Mapping[str, Any], path: Path) -> nn.Module:
    """Build the class that config.json names. Raises LoadError if the library has none so called."""
    import diffusers

    from qexp.models.skeletons import as_from_pretrained

    name = fields["_class_name"]
    with quiet():  # it imports the module of the class, and all that this one may need
        kind: Any = getattr(diffusers, str(name), None)
    is_model = isinstance(kind, type) and issubclass(kind, diffusers.ModelMixin)
    if not is_model:
        raise LoadError(
            f"'{path}': config.json has _class_name={name!r}, which diffusers {diffusers.__version__} has not; install "
            "a version that has it, or pass skeleton=, a class or a function that builds the network"
        )
    with as_from_pretrained():
        return kind.from_config(dict(fields))
