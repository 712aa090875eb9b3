"""What becomes of an answer when outputs of nodes are taken out or put in."""
