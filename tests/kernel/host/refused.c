// SPDX-License-Identifier: MIT OR GPL-2.0-only
// Programs for tests of what is said of a refused load.

#include <uapi/linux/bpf.h>

// The verifier refuses it: the context has no such place.
int reads_beyond_its_context(struct __sk_buff *skb)
{
	return *(volatile int *)((char *)skb + 4096);
}

int returns(void *context)
{
	(void)context;
	return 0;
}

#ifdef BROKEN
this is no C
#endif
