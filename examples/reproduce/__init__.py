# SPDX-License-Identifier: Apache-2.0
"""Huang et al. 2024 at a size that a CPU trains: dense, top-1, top-2, dynamic; on tasks of known difficulty."""
