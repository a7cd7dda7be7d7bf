# SPDX-License-Identifier: Apache-2.0
"""What Huang et al. 2024 publish, to stand beside our figures; nothing here was reproduced.

From the figures in the README of their repository (github.com/ZhenweiAn/Dynamic_MoE).
"""

# Mean accuracy in percent over PIQA, Hellaswag, ARC-e, CommonsenseQA and BBH.
AVERAGE_ACCURACY = {"dense": "39.4 (Dense, 570M)", "top-1": "40.5", "top-2": "41.6", "dynamic": "42.3"}
# Experts per token at inference.
EXPERTS = {"PIQA": 1.72, "Hellaswag": 1.76, "ARC-e": 1.73, "CommonsenseQA": 1.74, "BBH": 1.87}
MEAN_EXPERTS = 1.76
# (billions of tokens, experts per token) over training, read off a plot: +- 0.01.
TRAINING = ((8, 2.42), (24, 2.40), (40, 2.30), (64, 2.09), (80, 2.00), (100, 1.82))
TRAINING_TOKENS = 100e9
