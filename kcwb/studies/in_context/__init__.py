"""Which heads a model uses once it is shown examples."""
