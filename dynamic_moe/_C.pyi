# SPDX-License-Identifier: Apache-2.0
"""Native part: the functions that take no tensor. The operators are in ``torch.ops.dynamic_moe``."""

from typing import TypedDict

class BuildInfo(TypedDict):
    version: str
    compiler: str
    cxx_standard: int
    torch_target: str
    cpu_isas: list[str]
    cuda: str | None
    cuda_architectures: list[str]

class TilePlan(TypedDict):
    """Of the grouped matmul; see csrc/grouped_matmul/tile_plan.h."""

    rows: int
    columns: int
    lanes: int
    multiplies_pairs: bool
    block_words: int
    column_block_words: int
    panel_bytes: int
    few_rows: int
    dot_rows: int
    spread_dot_rows: int

class AmxTiles(TypedDict):
    """Whether this process may use AMX tiles; see csrc/common/tile_permission.h."""

    state: str
    reason: str | None
    bfloat16_isa_when_refused: str

def build_info() -> BuildInfo: ...
def cpu_isa() -> str: ...
def cpu_isa_for(dtype: str) -> str: ...
def supported_cpu_isas(ask: bool = False) -> list[str]: ...
def amx_tiles(ask: bool = False) -> AmxTiles: ...
def set_cpu_isa(name: str | None) -> None: ...
def tile_plan(isa: str, dtype: str) -> TilePlan: ...
def take_argument_error() -> str | None: ...
def cuda_architectures() -> list[str]: ...
