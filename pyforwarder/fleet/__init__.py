"""Many machines with one configuration: what they share, in a store that all of them watch."""
