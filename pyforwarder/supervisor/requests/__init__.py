"""What a running daemon is asked, over its control socket or by its files, and its answers."""
