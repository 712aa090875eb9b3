"""What an edit does to the circuit of its fact, and whether the account of Knowledge Circuits holds."""
