"""What circuits explain: wrong answers, learning in context, two hops, edits."""
