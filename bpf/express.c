/*
 * Rules that are decided in the kernel, by a connection's first packet. So far this is the decision
 * alone: no datapath attaches it, and the only program is run by tests (BPF_PROG_TEST_RUN).
 *
 * judge    what the table of a listener says of first bytes: the place of a rule, or -1
 */
#include <uapi/linux/bpf.h>

#include "express_rules.h"

/* In front of the first bytes, in a packet for `judge`. */
struct question {
	__u32 table;
	__u8 family, padding[3];
	__u8 client[16];
};

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
