"""One small world of invented facts, and tiny models of several architectures that learnt it."""
