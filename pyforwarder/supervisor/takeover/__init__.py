"""One daemon takes another's place, with its listeners and pairs: an upgrade, or after a drain."""
