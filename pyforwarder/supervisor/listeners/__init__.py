"""The listening sockets of an instance: bound, or opened and kept by the service manager."""
