# SPDX-License-Identifier: Apache-2.0
"""Both names of the cache of keys and values: ``past_key_values``, and since transformers 5.24 ``cache``."""

import inspect
from typing import Any

from transformers.cache_utils import Cache
from transformers.models.llama.modeling_llama import LlamaAttention

NAMES = ("past_key_values", "cache")
# The one that the installed transformers passes on, from generate down to the attention, and back in the outputs.
CACHE_NAME = NAMES["cache" in inspect.signature(LlamaAttention.forward).parameters]


def one_cache(past_key_values: Cache | None, cache: Cache | None) -> Cache | None:
    """Return the cache that was given under either name.

    Raises
    ------
    ValueError
        If both are given.
    """
    if past_key_values is not None and cache is not None:
        raise ValueError("past_key_values and cache are two names of one argument: only one may be given, got both")
    return cache if past_key_values is None else past_key_values


def with_one_cache(arguments: dict[str, Any]) -> dict[str, Any]:
    """Return keyword arguments with the cache, if there is one, under the name that transformers knows; see above."""
    cache = one_cache(*(arguments.get(name) for name in NAMES))
    others = {name: value for name, value in arguments.items() if name not in NAMES}
    return others if cache is None else {**others, CACHE_NAME: cache}


class BothCacheNames:
    """An output whose cache is the attribute ``cache`` where transformers calls it ``past_key_values``, too."""

    def __getattr__(self, name: str) -> Any:
        if name == "cache":
            return self.past_key_values
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
