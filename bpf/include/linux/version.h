/* No program of ours depends on the kernel's version: what it needs is probed at start. */
#pragma once
#define LINUX_VERSION_CODE	0
#define KERNEL_VERSION(a, b, c) (((a) << 16) + ((b) << 8) + (c))
