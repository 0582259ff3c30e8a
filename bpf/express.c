/*
 * Rules that are decided in the kernel, by a connection's first packet. This file has the decision
 * alone, for tests (BPF_PROG_TEST_RUN): it is attached nowhere.
 *
 * judge    which rule of a listener's table takes a connection with these first bytes: the rule's
 *          index, or -1
 */
#include <uapi/linux/bpf.h>

#include "express_rules.h"

/* Precedes the first bytes in a packet for `judge`. */
struct question {
	__u32 table;
	__u8 family, padding[3];
	__u8 client[16];
};

/* Run `decide` on a packet that a test gives. Returns the rule's index, or -1. */
int judge(struct __sk_buff *skb)
{
	struct express_network_key network = {};
	struct question question;
	const __u32 at = ETHERNET_BYTES + sizeof(question);

	if (skb->len <= at || bpf_skb_load_bytes(skb, ETHERNET_BYTES, &question, sizeof(question)))
		return -1;
	network.prefix_bits = (4 + 1 + 16) * 8;
	network.table = question.table;
	network.family = question.family;
	__builtin_memcpy(network.address, question.client, 16);
	return decide(skb, question.table, &network, at, skb->len - at);
}
