/*
 * Somebody else's program at an interface, which gives packets other marks: attached by
 * helpers/foreign.py.
 */
#include <uapi/linux/bpf.h>

#include "maps.h"

#define NEXT -1 /* TCX_NEXT */
#define DROP 2	/* TCX_DROP */

struct foreign {
	__u32 mark;   /* that each packet gets */
	__u32 all;    /* not 0: and all else that is not in the packet itself */
	__u64 most;   /* marked packets are dropped from then on, so that no loop is endless */
	__u64 marked; /* packets that somebody else has marked, so far */
};

int rewrite(struct __sk_buff *skb)
{
	__u32 zero = 0;
	struct foreign *foreign = map_lookup(MAP_FOREIGN_FD, &zero);

	if (!foreign)
		return NEXT; /* never */
	if (skb->mark && skb->mark != foreign->mark &&
	    __sync_fetch_and_add(&foreign->marked, 1) >= foreign->most)
		return DROP;
	skb->mark = foreign->mark;
	if (foreign->all) {
		bpf_set_hash_invalid(skb);
		skb->priority = 7;
		skb->tc_index = 7;
	}
	return NEXT;
}
