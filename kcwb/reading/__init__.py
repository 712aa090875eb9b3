"""What is written in a run: logit lens, attribution to the logits, head roles, one node looked at."""
