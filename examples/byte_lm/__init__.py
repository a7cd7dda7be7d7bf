# SPDX-License-Identifier: Apache-2.0
"""The parts of ``examples/train_lm.py``: a byte-level language model whose feed-forward layers are ``DynamicMoE``."""
