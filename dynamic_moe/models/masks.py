# SPDX-License-Identifier: Apache-2.0
"""What an attention mask says to the attention, and what to the experts."""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache
from transformers.utils.import_utils import is_tracing


def split_mask(attention_mask: Any, inputs_embeds: Tensor, cache: Cache | None) -> tuple[Any, Tensor | None]:
    """Return the mask for the attention, and bool ``[B, S]``, False for padding, for the experts.

    Columns of a mask ``[B, W]`` are positions of the cache: the S tokens of ``inputs_embeds`` have those behind the
    tokens that the cache holds. Later columns, as a mask for a whole static cache has them, belong to no token yet.
    A mask of another form (4 dimensions, or what an attention backend made) is for the attention; the experts get None.

    Raises
    ------
    ValueError
        If the mask is a tensor that has neither 2 nor 4 dimensions, is for another batch, or lacks columns.
    """
    if not isinstance(attention_mask, Tensor) or attention_mask.dim() == 4:
        return attention_mask, None
    batch, num_tokens = inputs_embeds.shape[:2]
    past = 0 if cache is None else cache.get_seq_length()
    if isinstance(past, Tensor) and not is_tracing(past):
        past = int(past)
    end = num_tokens if isinstance(past, Tensor) else past + num_tokens
    if attention_mask.dim() != 2 or attention_mask.shape[0] not in (1, batch) or attention_mask.shape[1] < end:
        raise ValueError(
            f"attention_mask must have shape {[batch, end]}, a column for each of {end - num_tokens} cached and "
            f"{num_tokens} new tokens, or have more columns or 4 dimensions; got {list(attention_mask.shape)}"
        )
    mask = attention_mask.to(inputs_embeds.device, torch.bool).expand(batch, -1)
    if not isinstance(past, Tensor):
        return mask[:, :end], mask[:, past:end]
    # While tracing, how much a static cache holds is known to the device alone.
    columns = past.to(mask.device) + torch.arange(num_tokens, device=mask.device)
    token_mask = mask.index_select(1, columns.clamp(max=mask.shape[1] - 1))
    return mask, token_mask & (columns < mask.shape[1])
