"""Any architecture of transformers from its configuration, with random weights."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field, JsonValue, PrivateAttr

from membench.errors import PluginError
from membench.plugins import Context, Model, Workload

if TYPE_CHECKING:
    from torch import nn

_NAME = re.compile(r"[A-Za-z0-9_.-]+")
_LENGTHS = ("max_position_embeddings", "n_positions")
_OF_RELATIVE = frozenset({"relative_attention_num_buckets", "d_kv"})
"""Settings of T5 and its kin, whose positions are relative: the ``n_positions`` in their files limits nothing."""


class Config(Model):
    """Any architecture of transformers from its configuration, in fp32 with random weights, without network.

    Encoders run ``forward``, and those with a head for masked tokens also ``train``: then every seventh token is masked
    and predicted. Encoder–decoders run ``forward``, ``train`` and ``generate``; but for generating, the decoder reads
    the same ids as the encoder. What makes no sense is skipped with the reason. Source, class and overrides are checked
    before anything is measured.

    Attributes:
        source: a config.json, its folder, a model type ('llama') or a class ('LlamaForCausalLM'); of the last two, the
            defaults of transformers.
        architecture: the class to build; by default, what the file names, or that with a head for tokens.
        overrides: settings to replace, by transformers' names.
    """

    imports = ("torch", "transformers.models.auto.modeling_auto", "transformers.modeling_layers")
    source: str = Field(min_length=1)
    architecture: str | None = Field(default=None, min_length=1)
    overrides: dict[str, JsonValue] = Field(default_factory=dict)
    _known: tuple[Any, Any] | None = PrivateAttr(None)

    def __hash__(self) -> int:
        return hash((self.source, self.architecture, json.dumps(self.overrides, sort_keys=True)))

    def check(self) -> str | None:
        said = f"source = '{self.source}'"
        try:
            path = self._path()
            if path is None:
                return None if _NAME.fullmatch(self.source) else f"{said}: there is no such file or folder"
            settings = _read(path)
        except (OSError, RuntimeError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) and error.strerror else error
            return f"{said[:100]}: {reason}"
        if "model_type" not in settings and not self.architecture and not settings.get("architectures"):
            return f"{said}: {path} has neither 'model_type' nor 'architectures'; give 'architecture'"
        return None

    def verify(self) -> str | None:
        import torch

        from membench.builtin.models import architectures

        try:
            architecture, config = self._architecture()
            architectures.refuse_without_token_ids(architecture)
            with torch.device("meta"):
                architectures.made(architecture, config)
        except PluginError as error:
            return str(error)
        return None

    def unsuitable(self, workload: Workload) -> str | None:
        from membench.builtin.models import architectures

        return architectures.unsuitable(self._architecture()[0], workload)

    @property
    def gives_logits(self) -> bool:  # type: ignore[override]  # known once the class is
        from membench.builtin.models import architectures

        return architectures.predicts(self._architecture()[0]) is not None

    def max_tokens(self) -> int | None:
        path = self._path()
        settings = {**(_read(path) if path else {}), **self.overrides}
        said = f"{settings.get('model_type', '')} {settings.get('architectures', '')}".lower()
        is_relative = "t5" in said or not _OF_RELATIVE.isdisjoint(settings)
        names = [name for name in _LENGTHS if not (is_relative and name == "n_positions")]
        return next((length for name in names if isinstance(length := settings.get(name), int)), None)

    def vocabulary(self, module: nn.Module) -> int:
        config: Any = module.config
        return int(config.get_text_config().vocab_size)

    def skeleton(self) -> nn.Module:
        import torch

        from membench.builtin.models import architectures

        with torch.device("meta"):
            return architectures.made(*self._architecture())

    def needed_bytes(self) -> int | None:
        return sum(parameter.nbytes for parameter in self.skeleton().parameters())

    def build(self, context: Context) -> nn.Module:
        import torch

        from membench.builtin.models import architectures

        torch.manual_seed(context.seed)
        with torch.device(context.device):
            return architectures.made(*self._architecture())

    def miniature(self) -> Model | None:
        from membench.builtin.models import architectures

        architecture, config = self._architecture()
        small = architectures.shrunk(architecture, config)
        if small is None:
            return None
        return self._of(architecture, small)

    def depth(self) -> int | None:
        from membench.builtin.models import depth

        return depth.of(self._architecture()[1])

    def with_depth(self, layers: int) -> Model:
        from membench.builtin.models import depth

        architecture, config = self._architecture()
        return self._of(architecture, depth.cut(config, layers))

    def _of(self, architecture: Any, config: Any) -> Model:
        """A model of the same source with another configuration."""
        made = type(self).model_validate({"source": self.source})
        made._known = (architecture, config)
        return made

    def _path(self) -> Path | None:
        """The file of the configuration; ``None`` if the source is a name.

        Raises:
            OSError, RuntimeError: if there is no such file.
        """
        path = Path(self.source).expanduser()
        if (path / "config.json").is_file():
            return path / "config.json"
        if path.is_file():
            return path
        if path.is_dir() and not _NAME.fullmatch(self.source):
            raise FileNotFoundError(0, "there is no config.json in that folder")
        if "/" in self.source or path.suffix == ".json":
            raise FileNotFoundError(0, "there is no such file or folder")
        return None

    def _architecture(self) -> tuple[Any, Any]:
        """The class and the configuration.

        Raises:
            PluginError: if source, architecture or overrides are wrong.
        """
        if self._known is None:
            self._known = self._found()
        return self._known

    def _found(self) -> tuple[Any, Any]:
        from membench.builtin.models import architectures

        path = self._path()
        settings = _read(path) if path else {}
        named, model_type = next(iter(settings.get("architectures") or ()), None), settings.get("model_type")
        if path is None and self.source[:1].isupper():  # transformers names classes so, and model types in lower case
            named = self.source
        elif path is None:
            model_type = self.source
        # Where there is no model type, the class tells the kind of configuration.
        if model_type is not None:
            make = functools.partial(architectures.config_of_type, model_type)
        else:
            class_named = architectures.class_named(named or str(self.architecture))
            make = functools.partial(architectures.config_of_class, class_named.config_class)
        plain = make(settings)
        architectures.refuse_unknown_settings(plain, self.overrides, "overrides")
        overrides = {plain.attribute_map.get(name, name): value for name, value in self.overrides.items()}
        config = make(architectures.overridden(settings, overrides))
        wanted = self.architecture or named
        architecture = architectures.default_class(config) if wanted is None else architectures.class_named(wanted)
        if not isinstance(config, architecture.config_class):
            raise PluginError(
                f"{architecture.__name__} is built from a {architecture.config_class.__name__}, and source ="
                f" '{self.source}' is a {type(config).__name__}"
            )
        return architecture, config


def _read(path: Path) -> Mapping[str, Any]:
    """The settings in a file.

    Raises:
        ValueError: if they are not a JSON object.
        OSError: if it cannot be read.
    """
    try:
        found = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path} is not a JSON object")
    return found
