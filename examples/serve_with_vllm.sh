#!/usr/bin/env bash
# One adapter at every rank in vLLM: each rank is a model of its own in the API.
#   examples/serve_with_vllm.sh runs/demo/adapter
# Prints the command; give it to a machine that has vLLM and the base model. This command was not run here; vLLM has read the adapters.
set -euo pipefail
adapter=${1:-runs/demo/adapter}
out=${2:-runs/ladder}
matryoshka export "$adapter" --format ladder -o "$out"
echo "cd $out"
grep '^vllm serve' "$out/README.md"
