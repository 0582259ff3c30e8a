"""The processes that speak to a fleet's store, and what the supervisor makes of their words."""
