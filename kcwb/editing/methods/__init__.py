"""The editors: ROME, MEMIT, fine-tuning of one matrix."""
