"""Many discoveries on any executor, kept in a folder."""
