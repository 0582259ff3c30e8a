"""UDP: sessions that workers copy, and those whose datagrams the kernel sends on."""
