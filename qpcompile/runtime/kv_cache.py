"""The KV cache of a compiled model: the cache tensors of the graphs, with a length per layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers.cache_utils import Cache

from qpcompile.ir.names import CROSS_ALIVE, CROSS_KEPT, Name


class CompiledCache(Cache):
    """The cache tensors that the prefill graph returns and the decode graph takes, by name.

    `tensors` holds the graphs' cache tensors; their token axes may differ from layer to layer. `kept[l]` holds the
    original positions of the tokens kept by the cut after layer l, new tokens included: i64[B, N_l]; `alive[l]` marks
    the slots that hold a token and not padding: bool[B, N_l]. To transformers the cache has the length of the unpruned
    sequence, so that new tokens continue from the original positions.

    While decode steps keep their tokens in other buffers (static_decode.py), `bring` copies them back; every access to
    one of the three properties calls it first.
    """

    def __init__(self, layer_count: int) -> None:
        super().__init__(layers=[])
        self.layer_count = layer_count
        self.parts: tuple[dict[str, torch.Tensor], dict[int, torch.Tensor], dict[int, torch.Tensor]] = {}, {}, {}
        self.bring: Callable[[CompiledCache], None] | None = None
        self.seen = 0

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """Keys, values and their scales by the graphs' names."""
        self.come_back()
        return self.parts[0]

    @property
    def kept(self) -> dict[int, torch.Tensor]:
        """Layer of a cut -> original positions of the tokens after it."""
        self.come_back()
        return self.parts[1]

    @property
    def alive(self) -> dict[int, torch.Tensor]:
        """Layer of a cut -> which slots hold a token."""
        self.come_back()
        return self.parts[2]

    @property
    def states(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """The numbers i64[B, N] of the states that cross-attention reads, and which slots hold one; None if all."""
        parts = {Name(path).part: tensor for path, tensor in self.tensors.items()}
        return (parts[CROSS_KEPT], parts[CROSS_ALIVE]) if CROSS_KEPT in parts else None

    def come_back(self) -> None:
        """Copy all tokens back into this cache."""
        if self.bring is not None:
            bring, self.bring = self.bring, None
            bring(self)

    def clear(self) -> None:
        """Release all tensors."""
        for part in self.parts:
            part.clear()

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Number of tokens seen, pruned ones included."""
        return self.seen

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Length and offset of a mask over all tokens seen."""
        return self.seen + query_length, 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """No limit."""
        return -1

    @property
    def is_sliding(self) -> list[bool]:
        """No layer truncates its cache to a window: masks apply windows."""
        return [False] * self.layer_count

    @property
    def is_compileable(self) -> bool:
        """The cache grows, so it cannot serve a compiled static loop."""
        return False

    @property
    def is_initialized(self) -> bool:
        """Whether a prefill has run."""
        return self.seen > 0

    def __len__(self) -> int:
        return self.layer_count

    def update(self, *args: Any, **kwargs: Any) -> Any:
        """Not used: the graphs return the updated cache themselves."""
        raise TypeError("a compiled model updates its cache inside its graphs")

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Follow beam search: row i becomes row beam_idx[i]."""
        self._each(lambda tensor: tensor.index_select(0, beam_idx))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row, for several answers to one prompt."""
        self._each(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the given rows."""
        self._each(lambda tensor: tensor[indices])

    def reset(self) -> None:
        """Forget everything."""
        self.bring, self.seen = None, 0
        self.clear()

    def append(self, layer: int, new: int) -> None:
        """Add the next `new` tokens to those kept by the cut after `layer`."""
        kept, alive = self.kept[layer], self.alive[layer]
        positions = torch.arange(self.seen, self.seen + new, device=kept.device).expand(kept.shape[0], new)
        self.kept[layer] = torch.cat([kept, positions], dim=1)
        self.alive[layer] = torch.cat([alive, alive.new_ones(kept.shape[0], new)], dim=1)

    def nbytes(self) -> int:
        """Bytes of keys, values and their scales."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors.values())

    def _each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        for group in (self.tensors, self.kept, self.alive):
            for name, tensor in group.items():
                group[name] = change(tensor)  # type: ignore[index]
