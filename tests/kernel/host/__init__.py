"""What a host and its kernel must have, and what is said where they refuse."""
