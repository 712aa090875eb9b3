"""Is a circuit the model: completeness, faithfulness, stability, and what circuits share."""
