"""A GPT assembled from the block: configuration, model, generation, cost, freezing, LoRA adapters."""
