"""What processes need from the system: an event loop, children, descriptors, names, privileges."""
