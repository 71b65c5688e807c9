"""Four small LoRA adapters for SmolLM2-135M-Instruct: their data, training and evaluation."""
