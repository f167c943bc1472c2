"""LoRA fine-tuning: adapters, draws, the loop, the run folder."""
