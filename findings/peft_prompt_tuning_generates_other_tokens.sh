#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# peft 0.21.2 with transformers 5.24.0 (torch 2.13.0, CPU): generate() of a LLaMA with prompt tuning gives other tokens
# than the same model asked token by token, from the second one on, without an error. 5.24 calls the cache `cache`,
# where peft looks for `past_key_values`. With transformers 5.23.0 both ways agree.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/compare.py" <<'PYTHON'
import sys

import peft
import torch
import transformers

torch.manual_seed(0)
config = transformers.LlamaConfig(
    vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, initializer_range=0.5
)
options = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
model = peft.get_peft_model(transformers.LlamaForCausalLM(config).eval(), options).eval()
start = torch.tensor([[5, 6, 7, 8]])
one_by_one = start
with torch.no_grad():
    for _ in range(8):
        logits = model(input_ids=one_by_one, attention_mask=torch.ones_like(one_by_one)).logits
        one_by_one = torch.cat([one_by_one, logits[:, -1:].argmax(-1)], dim=1)
    generated = model.generate(
        input_ids=start,
        attention_mask=torch.ones_like(start),
        max_new_tokens=8,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
a, b = one_by_one[0, 4:].tolist(), generated[0, 4:].tolist()
print(f"transformers {transformers.__version__}, peft {peft.__version__}: token by token {a}, generate {b}")
assert a[0] == b[0] and (a == b) == (sys.argv[1] == "same"), "the behaviour has changed"
PYTHON
for pair in "5.23.0 same" "5.24.0 other"; do
  version=${pair% *}
  python3 -m venv "$folder/$version"
  "$folder/$version/bin/python" -m pip install --quiet --disable-pip-version-check \
    torch==2.13.0 numpy "transformers==$version" peft==0.21.2
  "$folder/$version/bin/python" -W ignore "$folder/compare.py" "${pair#* }"
done
