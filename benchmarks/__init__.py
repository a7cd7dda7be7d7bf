# SPDX-License-Identifier: Apache-2.0
"""Speed of this library beside its peers', as fractions of what the machine can do. See ``README.md``."""
