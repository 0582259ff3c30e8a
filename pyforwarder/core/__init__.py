"""What needs neither sockets nor a kernel: values, rules, first packets, limits."""
