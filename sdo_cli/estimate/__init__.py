"""What a job will cost, from configs alone: FLOPs and memory counted on tensors that hold no numbers."""
