"""Why a model gets a fact wrong, and whether that can be seen from inside."""
