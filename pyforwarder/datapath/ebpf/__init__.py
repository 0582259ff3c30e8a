"""BPF: its system calls, compiling and loading programs, and the maps we share with them."""
