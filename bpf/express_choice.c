/*
 * Which server of an upstream gets a connection. This file has the choice alone, for tests
 * (BPF_PROG_TEST_RUN): it is attached nowhere.
 *
 * judge_choice  which target a choice gives to a client: its index, or 0
 */
#include <uapi/linux/bpf.h>

#include "express_choosing.h"

struct question {
	__u32 choice;
	__u8 family, padding[3];
	__u8 client[16];
};

/* Run `choose` for a client that a test gives. Returns the target's index, or 0. */
int judge_choice(struct __sk_buff *skb)
{
	struct question question;
	__u32 client[4] = {};

	if (bpf_skb_load_bytes(skb, ETHERNET_BYTES, &question, sizeof(question)))
		return 0;
	if (question.family == 6)
		__builtin_memcpy(client, question.client, 16);
	else
		__builtin_memcpy(&client[3], question.client, 4);
	return choose(question.choice, client, question.family == 6);
}
