"""What the library does, behind widgets."""
