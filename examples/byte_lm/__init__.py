# SPDX-License-Identifier: Apache-2.0
"""The parts of ``examples/train_lm.py``: a byte-level language model whose feed-forward layers are ``DynamicMoE``."""

import os

# GNU OpenMP lets threads that wait for one another spin for milliseconds. Where another process takes a core, that is
# the time that the last thread needs: beside three compilers, training was several times as fast with a short spin.
# OpenMP reads this when torch is imported, so it must come first.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")
