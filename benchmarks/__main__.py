# SPDX-License-Identifier: Apache-2.0
"""See `benchmarks.cli`."""

from benchmarks.cli import main

if __name__ == "__main__":
    main()
