/*
 * Every packet that leaves an interface gets a tag of VLAN 0: a priority, as a sender may give one
 * (IEEE 802.1Q, 6.9.1). Attached by tests/kernel/splice/test_walls_ends.py.
 */
#include <uapi/linux/bpf.h>

#define NEXT	 -1 /* TCX_NEXT */
#define PRIORITY (5 << 13)

int tag(struct __sk_buff *skb)
{
	bpf_skb_vlan_push(skb, bpf_htons(0x8100), PRIORITY);
	return NEXT;
}
