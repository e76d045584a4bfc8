"""Checking what a case's model takes and returns before anything is measured, on shapes alone where that is possible.

B, T, V: batch, tokens, vocabulary.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from membench import plugins
from membench.data import corpus
from membench.errors import summary
from membench.host.device import Device
from membench.host.environment import available_bytes
from membench.host.out_of_memory import is_out_of_memory
from membench.worker import allocator
from membench.worker.child_process import run_in_child
from membench.worker.evaluating import evaluating
from membench.worker.rehearsal_model import RehearsalModel

if TYPE_CHECKING:
    import torch
    from torch import nn

_MOST_REHEARSED_TOKENS = 16
_LARGEST_SHARE_OF_FREE_MEMORY = 0.5
_FIRST_POSITION = 2
"""Where the positions of some models begin, such as RoBERTa's: rows before that are not for tokens."""

_vocabularies: dict[plugins.Model, int] = {}
"""The token ids that models were found to know, for those whose options do not say it."""


@dataclass(frozen=True)
class _Counts:
    """How many tokens a module knows.

    Attributes:
        predicted: the vocabulary of its logits.
        embedded: the rows of the embedding that it looks token ids up in; ``None`` if no embedding gets them.
        has_short_table: whether another embedding has fewer rows than there are tokens, as one of positions may.
    """

    predicted: int
    embedded: int | None
    has_short_table: bool

    @property
    def known(self) -> int:
        return self.predicted if self.embedded is None else min(self.predicted, self.embedded)


def found_vocabulary(model: plugins.Model, module: nn.Module) -> int:
    """Return the number of token ids that a module knows, for a model whose options do not say it.

    A module whose model was not checked is run on two tokens.

    Raises:
        NotImplementedError: if it cannot be run.
    """
    if model not in _vocabularies:
        device = next((tensor.device for tensor in (*module.parameters(), *module.buffers())), "cpu")
        ids = _ids(2, device)
        try:
            with evaluating(module):
                counts = _counted(module, ids, lambda: plugins.logits_of(module(ids), ids).shape[-1])
        except Exception as error:
            raise NotImplementedError(f"the model does not say how many tokens it knows: {summary(error)}") from error
        _vocabularies[model] = counts.known
    return _vocabularies[model]


def refuse_wrong_output(workload: plugins.Workload, context: plugins.Context, name: str | None) -> None:
    """Refuse a case whose workload cannot run the model, or whose model does not return what the workload needs.

    The model's skeleton is run on shapes alone. If that is not possible, the model is built in a process of its own, so
    that none of its memory remains here. A model with a miniature is run when it is rehearsed, and before that in the
    workload's whole length if positions may not suffice.

    Args:
        name: the name of the model in the suite.

    Raises:
        plugins.WrongOutput: if it does not take the token ids, or returns no logits for them.
        plugins.Unsuitable: if the workload cannot run the model.
    """
    model, tokens = context.model, workload.longest_sequence()
    if (reason := model.unsuitable(workload)) is not None:
        raise plugins.Unsuitable(reason)
    if not model.gives_logits or tokens < 1:
        return
    with contextlib.suppress(NotImplementedError):
        _refuse_unknown_tokens(model, name)
    if (miniature := model.miniature()) is not None:
        rows = _rows_of_short_tables(model, tokens)
        if rows:  # a miniature has the same positions, as a rule
            alike = rows <= _rows_of_short_tables(miniature, tokens)
            checked = dataclasses.replace(context, model=miniature) if alike else context
            _check_in_child(workload, checked, tokens, name, in_one_thread=alike)
        return
    try:
        counts = _checked(model, workload, model.skeleton(), _ids(tokens, "meta"), name)
    except (plugins.WrongOutput, plugins.Unsuitable):
        raise
    except Exception:  # the model cannot be made or run on shapes alone
        _check_in_child(workload, context, tokens, name)
    else:
        if counts.has_short_table:  # shapes do not tell whether there is a position for every token
            _check_in_child(workload, context, tokens, name)


def refusal_of_rehearsed(
    module: nn.Module, workload: plugins.Workload, context: plugins.Context, name: str | None
) -> Exception | None:
    """Return why the workload cannot use what a model's own miniature returns; ``None`` if it can.

    Args:
        module: the miniature.
        context: that of the rehearsal.
    """
    model, tokens = context.model, min(workload.longest_sequence(), _MOST_REHEARSED_TOKENS)
    if model.gives_logits and tokens and not isinstance(model, RehearsalModel):
        try:
            _checked(model, workload, module, _ids(tokens, context.device), name)
        except (plugins.WrongOutput, plugins.Unsuitable) as error:
            return error
    return None


def _rows_of_short_tables(model: plugins.Model, tokens: int) -> set[int]:
    """Return the numbers of rows of embeddings that may be of positions, and have too few; none if it is not known."""
    from torch import nn

    try:
        layers = list(model.skeleton().modules())
    except Exception:  # a model without skeleton
        return set()
    found = {layer.num_embeddings for layer in layers if isinstance(layer, nn.Embedding)}
    return {rows for rows in found if rows < tokens + _FIRST_POSITION}


def _checked(
    model: plugins.Model, workload: plugins.Workload, module: nn.Module, ids: torch.Tensor, name: str | None
) -> _Counts:
    """Return how many tokens a module knows, and keep it for ``found_vocabulary``.

    Raises:
        plugins.WrongOutput: also if the model's options name more than those.
    """
    try:
        with evaluating(module):
            counts = _counted(module, ids, lambda: workload.check_output(module, ids))
        _vocabularies[model] = counts.known
        vocabulary = model.vocabulary(module)
        short = [
            f"{what} {count:,} tokens"
            for what, count in (("embeddings of", counts.embedded), ("logits for", counts.predicted))
            if count is not None and count < vocabulary
        ]
        if short:
            option = "vocabulary_size =" if "vocabulary_size" in type(model).model_fields else "its vocabulary of"
            raise plugins.WrongOutput(f"has {' and '.join(short)}, fewer than {option} {vocabulary}")
    except plugins.WrongOutput as error:
        raise plugins.WrongOutput(error.problem, name) from None
    return counts


def _refuse_unknown_tokens(model: plugins.Model, name: str | None) -> None:
    """Refuse a tokenizer that gives ids which the model does not know; they would be taken for others."""
    encoded = model.encode(corpus.split()[0])
    if encoded is None:
        return
    largest, vocabulary = max(encoded, default=0), model.vocabulary(model.skeleton())
    if largest >= vocabulary:
        raise plugins.WrongOutput(f"has a tokenizer that gives token id {largest}, and knows {vocabulary} tokens", name)


def _check_in_child(
    workload: plugins.Workload, context: plugins.Context, tokens: int, name: str | None, *, in_one_thread: bool = False
) -> None:
    """Check the model as it is built, on the CPU. One that cannot be built there is reported when it is loaded.

    Args:
        in_one_thread: for small models, which gain nothing by more; threads do not outlive a fork.
    """
    needed_bytes = context.model.needed_bytes()
    if needed_bytes is not None and needed_bytes > _LARGEST_SHARE_OF_FREE_MEMORY * available_bytes():
        return
    try:
        found = run_in_child(lambda: _check_built(workload, context, tokens, in_one_thread=in_one_thread))
    except (RuntimeError, MemoryError):
        return
    if found["problem"]:
        raise plugins.WrongOutput(found["problem"][0], name)
    if found["known"]:
        _vocabularies[context.model] = found["known"][0]


def _check_built(
    workload: plugins.Workload, context: plugins.Context, tokens: int, *, in_one_thread: bool
) -> dict[str, list[Any]]:
    """Build and check the model: ``problem`` has what is wrong, or ``known`` the number of token ids that it knows."""
    import torch

    allocator.unpin()
    if in_one_thread:
        torch.set_num_threads(1)
    model = context.model
    module = model.build(dataclasses.replace(context, device="cpu"))
    try:
        return {"problem": [], "known": [_checked(model, workload, module, _ids(tokens, "cpu"), None).known]}
    except plugins.WrongOutput as error:
        return {"problem": [error.problem], "known": []}
    except plugins.Unsuitable:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        if Device.parse(context.device).on_gpu and not isinstance(error, IndexError):
            # It may have kernels for that device alone.
            return {"problem": [], "known": []}
        return {"problem": [f"cannot be run on 1 × {tokens} token ids: {summary(error)}"], "known": []}


def _counted(module: nn.Module, ids: torch.Tensor, run: Callable[[], int]) -> _Counts:
    """Run a module on token ids and count the tokens that it knows.

    Args:
        run: runs it and returns the vocabulary of its logits.
    """
    import torch
    from torch import nn

    of_ids: list[nn.Embedding] = []
    of_same_shape: list[nn.Embedding] = []
    others: list[nn.Embedding] = []

    def hear(layer: nn.Module, given: tuple[Any, ...]) -> None:
        assert isinstance(layer, nn.Embedding)
        found = given[0] if given else None
        if isinstance(found, torch.Tensor):
            is_view = found.untyped_storage()._cdata == ids.untyped_storage()._cdata
            (of_ids if is_view else of_same_shape if found.shape == ids.shape else others).append(layer)

    handles = [
        layer.register_forward_pre_hook(hear) for layer in module.modules() if isinstance(layer, nn.Embedding)
    ]  # fmt: skip
    try:
        predicted = run()
    finally:
        for handle in handles:
            handle.remove()
    # A copy of the ids has their shape; positions may have it, too, but come later.
    embedding = next(iter(of_ids or of_same_shape), None)
    is_short = any(
        layer is not embedding and layer.num_embeddings < ids.shape[1] + _FIRST_POSITION
        for layer in (*of_same_shape, *others)
    )
    return _Counts(predicted, None if embedding is None else embedding.num_embeddings, is_short)


def _ids(tokens: int, device: Any) -> torch.Tensor:
    """Return token ids (1, T) that every vocabulary has."""
    import torch

    return torch.zeros(1, tokens, dtype=torch.long, device=device)
