"""Change a fact in the weights, and look at what changed: ROME, MEMIT, fine-tuning, scores, circuits."""
