"""Who moves the bytes: one interface, several implementations."""
