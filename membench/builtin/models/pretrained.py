"""Models that somebody trained: a local folder or a hub id."""

from __future__ import annotations

import fnmatch
import functools
import itertools
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field, PrivateAttr

from membench.builtin.models.config import Config
from membench.builtin.techniques.mapped_checkpoint import own_copy
from membench.errors import PluginError
from membench.plugins import Context, Model, Workload

if TYPE_CHECKING:
    from torch import nn

_MOST_NAMES = 5

_WANTED_FILES = ["*.safetensors", "*.json", "*.model", "*.txt", "*.py"]


class Pretrained(Model):
    """A model of transformers from a folder or a hub id, safetensors only; of the class that its config.json names.

    Encoders and encoder–decoders run what makes sense, as those of ``config`` do; the held-out loss is told of models
    that predict next tokens alone. Class and weights are checked before anything is measured.

    Attributes:
        architecture: another class to load the weights into, such as 'BertForMaskedLM'.
        allow_missing: patterns of weights that the checkpoint may lack, or have in another shape; they are random then.
        allow_unexpected: patterns of tensors in the checkpoint for which the model has no place.
    """

    imports: ClassVar[tuple[str, ...]] = (*Config.imports, "transformers.models.auto.tokenization_auto")
    quality: ClassVar[bool] = True
    source: str = Field(min_length=1)
    architecture: str | None = Field(default=None, min_length=1)
    trust_remote_code: bool = False
    allow_missing: tuple[str, ...] = ()
    allow_unexpected: tuple[str, ...] = ()

    def check(self) -> str | None:
        said = f"source = '{self.source}'"
        try:
            folder = Path(self.source).expanduser()
            exists, is_folder = folder.exists(), folder.is_dir()
        except (RuntimeError, OSError) as error:  # ~ of a user that is not known; a name that is too long
            return f"{said[:80]}: {error.strerror if isinstance(error, OSError) else error}"
        if is_folder:
            missing = [name for name in ("config.json", "*.safetensors") if not any(folder.glob(name))]
            return f"{said}: there is no {missing[0]} in that folder" if missing else None
        if exists:
            return f"{said} is a file; name the folder that it lies in"
        # A hub id is a name, or an organisation and a name.
        if self.source.startswith((".", "/", "~")) or self.source.count("/") > 1:
            return f"{said}: there is no such folder"
        return None

    def prepare(self, progress: Callable[[int, int, str], None]) -> None:
        """Download a hub id once, so that no measured phase does."""
        if Path(self.source).expanduser().is_dir():
            self.folder()
            return
        from huggingface_hub import snapshot_download

        progress(0, 1, f"downloading {self.source}")
        try:
            snapshot_download(self.source, allow_patterns=_WANTED_FILES)
        except Exception as error:
            reason = str(error).strip().partition("\n")[0]
            raise RuntimeError(
                f"source = '{self.source}' is no folder here and cannot be had from the hub: {reason}"
            ) from None
        progress(1, 1, f"downloading {self.source}")

    def folder(self) -> Path:
        """Where the files are.

        Raises:
            FileNotFoundError: if there are no safetensors in it.
        """
        folder = Path(self.source).expanduser()
        if not folder.is_dir():
            from huggingface_hub import snapshot_download

            folder = Path(snapshot_download(self.source, allow_patterns=_WANTED_FILES, local_files_only=True))
        if not any(folder.glob("*.safetensors")):
            raise FileNotFoundError(f"source = '{self.source}': there is no .safetensors file in {folder}")
        return folder

    def verify(self) -> str | None:
        from membench.builtin.models import architectures

        try:
            self.folder()
        except Exception:  # it is downloaded when it is prepared
            return None
        try:
            architectures.refuse_without_token_ids(self._architecture())
            self._refuse_other_weights(self._loaded("meta")[1])
        except (PluginError, ValueError) as error:
            return str(error)
        return None

    def unsuitable(self, workload: Workload) -> str | None:
        from membench.builtin.models import architectures

        return architectures.unsuitable(self._architecture(), workload)

    def unjudged(self) -> str | None:
        from membench.builtin.models import architectures

        if (reason := architectures.unjudged(self._architecture(), self.skeleton())) is not None:
            return reason
        if not self.allow_missing:
            return None
        loaded = self._loaded("meta")[1]
        random = sorted({*loaded["missing_keys"], *(name for name, _, _ in loaded["mismatched_keys"])})
        return f"weights that the checkpoint lacks are random: {_first(random)}" if random else None

    @property
    def gives_logits(self) -> bool:  # type: ignore[override]  # known once the class is
        from membench.builtin.models import architectures

        return architectures.predicts(self._architecture()) is not None

    def _architecture(self) -> Any:
        """The class of the model: the one that is asked for, or that config.json names, or transformers' choice.

        Raises:
            PluginError: if transformers does not have it.
        """
        from membench.builtin.models import architectures

        config = self._config()
        if self.architecture is not None:
            return architectures.class_named(self.architecture)
        named = next(iter(config.architectures or ()), None)
        if self.trust_remote_code and getattr(config, "auto_map", None):
            return _remote_class(config, str(self.folder()))
        return architectures.default_class(config) if named is None else architectures.class_named(named)

    def build(self, context: Context) -> nn.Module:
        return self._read().to(context.device)

    def _loaded(self, device: str) -> tuple[Any, dict[str, Any]]:
        """The model and transformers' account of loading; on the meta device no weight is read."""
        import torch

        return self._architecture().from_pretrained(
            self.folder(), dtype=torch.float32, use_safetensors=True, trust_remote_code=self.trust_remote_code,
            local_files_only=True, output_loading_info=True, ignore_mismatched_sizes=True,
            **({} if device == "cpu" else {"device_map": device}),
        )  # fmt: skip

    def _read(self) -> nn.Module:
        from membench.builtin.models import architectures

        module, loaded = self._loaded("cpu")
        self._refuse_other_weights(loaded)
        for parameter in module.parameters():
            # transformers maps the file: the weights would be file pages in the reference and live memory elsewhere.
            parameter.data = own_copy(parameter.data)
        return architectures.taking_token_ids(module)

    def _refuse_other_weights(self, loaded: dict[str, Any]) -> None:
        """Refuse a checkpoint that does not have the model's weights: transformers fills in random ones.

        Args:
            loaded: transformers' account of loading, in which tied weights are not missing.

        Raises:
            ValueError: if weights are missing, unexpected or of another shape, and not allowed to be.
        """
        mismatched = [
            f"{name} ({list(there)}, not {list(expected)})"
            for name, there, expected in sorted(loaded["mismatched_keys"])
            if not _matches(name, self.allow_missing)
        ]
        missing = [name for name in sorted(loaded["missing_keys"]) if not _matches(name, self.allow_missing)]
        unexpected = [name for name in sorted(loaded["unexpected_keys"]) if not _matches(name, self.allow_unexpected)]
        wrong = [
            f"{what} {_first(names)}"
            for what, names in (
                ("lacks", missing),
                ("has another shape of", mismatched),
                ("has in addition", unexpected),
            )
            if names
        ]
        if not wrong:
            return
        options = [
            option
            for option, names in (("allow_missing", [*missing, *mismatched]), ("allow_unexpected", unexpected))
            if names
        ]
        raise ValueError(
            f"source = '{self.source}': the checkpoint {'; '.join(wrong)}; if the task does not need that, list names"
            f" or patterns in {' and '.join(options)}"
        )

    def _config(self) -> Any:
        from transformers import AutoConfig

        return AutoConfig.from_pretrained(
            self.folder(), trust_remote_code=self.trust_remote_code, local_files_only=True
        )

    def skeleton(self) -> nn.Module:
        import torch

        from membench.builtin.models import architectures

        with torch.device("meta"):
            return architectures.made(self._architecture(), self._config())

    def vocabulary(self, module: nn.Module) -> int:
        config: Any = module.config
        return int(config.get_text_config().vocab_size)

    def miniature(self) -> Model | None:
        from membench.builtin.models import architectures

        small = architectures.shrunk(self._architecture(), self._config())
        if small is None:
            return None
        made = _Shrunk.model_validate(self.model_dump(exclude_unset=True))
        made._small = small
        return made

    def needed_bytes(self) -> int | None:
        return sum(parameter.numel() * 4 for parameter in self.skeleton().parameters())

    def encode(self, text: bytes) -> Sequence[int] | None:
        return _encoded(str(self.folder()), self.trust_remote_code, text)[0]

    def token_ends(self, text: bytes) -> Sequence[int] | None:
        return _encoded(str(self.folder()), self.trust_remote_code, text)[1]


def _remote_class(config: Any, folder: str) -> Any:
    """The class that a folder brings along: the one that it has for causal language models, or for none."""
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    kinds = ("AutoModelForCausalLM", "AutoModelForSeq2SeqLM", "AutoModelForMaskedLM", "AutoModel")
    named = next(config.auto_map[kind] for kind in kinds if kind in config.auto_map)
    return get_class_from_dynamic_module(named, folder)


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _first(names: Sequence[str]) -> str:
    more = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
    return ", ".join(names[:_MOST_NAMES]) + more


@functools.cache
def _encoded(folder: str, trust_remote_code: bool, text: bytes) -> tuple[list[int] | None, list[int] | None]:
    """Token ids by the tokenizer that came with the model, and the byte at which each ends.

    ``None`` for both if no tokenizer came, and for the second if it does not know.
    """
    if not any(Path(folder).glob("tokenizer*")):
        return None, None
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code, local_files_only=True)
    characters = text.decode(errors="replace")
    if not tokenizer.is_fast:
        return tokenizer.encode(characters, add_special_tokens=False), None
    encoded = tokenizer(characters, add_special_tokens=False, return_offsets_mapping=True)
    byte_at = [0, *itertools.accumulate(len(character.encode()) for character in characters)]
    return encoded["input_ids"], [byte_at[end] for _, end in encoded["offset_mapping"]]


class _Shrunk(Pretrained):
    """A model of the same class, of two narrow layers and with random weights."""

    quality: ClassVar[bool] = False
    _small: Any = PrivateAttr(None)

    def build(self, context: Context) -> nn.Module:
        from membench.builtin.models import architectures

        module: Any = architectures.made(self._architecture(), self._small)
        with tempfile.TemporaryDirectory(dir=context.scratch) as folder:
            module.save_pretrained(folder)
            return Pretrained(source=folder, architecture=self._architecture().__name__).build(context)

    def skeleton(self) -> nn.Module:
        import torch

        from membench.builtin.models import architectures

        with torch.device("meta"):
            return architectures.made(self._architecture(), self._small)

    def miniature(self) -> Model:
        return self

    def encode(self, text: bytes) -> Sequence[int] | None:
        return None

    def token_ends(self, text: bytes) -> Sequence[int] | None:
        return None
