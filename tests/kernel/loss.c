/*
 * One packet in so many, chosen at random, is lost: for tests of what TCP makes of it.
 */
#include <uapi/linux/bpf.h>

#define NEXT -1 /* TCX_NEXT */
#define DROP 2	/* TCX_DROP */

int lose(struct __sk_buff *skb __attribute__((unused)))
{
	return bpf_get_prandom_u32() % ONE_IN ? NEXT : DROP;
}
