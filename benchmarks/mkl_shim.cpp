// SPDX-License-Identifier: Apache-2.0
// Preloaded for one row of the benchmarks: what MKL does on a CPU of the same width from the other maker.
extern "C" int mkl_serv_intel_cpu_true() { return 1; }
