/*
 * While the server has not answered: what its client says, and how all is undone, so that a worker
 * gets the client.
 */
#pragma once

#include <uapi/linux/bpf.h>

#include "express_ask.h"
#include "express_connect.h"
#include "express_make.h"
#include "express_places.h"
#include "express_read.h"
#include "maps.h"
#include "splice.h"
#include "splice_packet.h"
#include "splice_verdicts.h"

/* A server that has refused is not asked again for so long: the worker sees to it meanwhile. */
#define REFUSED_FOR_NS (1 * (__u64)NS_PER_S)
/* Nor one that could not understand the client: it will not be another in a second. */
#define MISMATCHED_FOR_NS (10 * (__u64)NS_PER_S)

/* On a packet that is for our own stack: it has been looked at already. */
#ifndef FOR_OUR_STACK
#define FOR_OUR_STACK 0x5047
#endif

/* A packet of the client's while its server is asked for. */
inlined int wait(struct __sk_buff *skb, struct splice *splice, struct express_ask *ask, __u32 place,
		 __u64 word, const struct seen *seen, const int v6)
{
	if (seen->flags & SYN)
		return NEXT; /* the request is still there */
	if (seen->flags & RST) {
		/*
		 * At the number that comes next, or would if all that was sent had come; other ones
		 * our kernel judges, which takes them for the end of the request or does not. If
		 * that was the client's end, it says so again when it hears from the server.
		 */
		__u32 ahead = seen->seq - ask->c0 - 1;

		if ((ahead && ahead != ask->saved && ahead != ask->saved + !!ask->has_fin) ||
		    !change(ask, word, PF_EXPRESS_FILLING))
			return NEXT;
		leave_at_once(ask, splice, place, word);
		count(PF_COUNT_ENDED);
		return NEXT;
	}
	if (seen->bytes && seen->seq == ask->c0 + 1 && seen->bytes <= PF_EXPRESS_SAVED &&
	    seen->has_timestamp == ask->has_timestamps && seen->ack == ask->k0 + 1) {
		/*
		 * It waits: so does the server, perhaps. What has grown meanwhile comes again.
		 *
		 * The server must not see anything older afterwards; so not either because an old
		 * packet comes late. What the newest one echoes is what the client has heard last:
		 * it takes nothing older than that, and echoes nothing else.
		 */
		if (!before(seen->tsval, ask->tc)) {
			ask->tc = seen->tsval;
			ask->tk = seen->tsecr;
		}
		if (seen->bytes != ask->saved && seen->bytes != ask->segment) {
			/* It has grown meanwhile: our stack takes it as it is, and a worker. */
			if (!change(ask, word, PF_EXPRESS_FILLING))
				return DROP;
			leave_at_once(ask, splice, place, word);
			count(PF_COUNT_LONG);
			return NEXT;
		}
		count(PF_COUNT_ASKED_AGAIN);
		return send_syn(skb, splice, ask, ask->tc, seen->sum, v6);
	}
	return DROP; /* as if it had been lost: it is sent again */
}

/* A packet for our own stack as if it came from the client. */
inlined int to_our_stack(struct __sk_buff *skb, struct express_ask *ask)
{
	__u32 interface = ask->client_interface;

	if (skb->ifindex == interface)
		return NEXT;
	skb->mark = FOR_OUR_STACK;
	if (bpf_skb_store_bytes(skb, 0, ask->macs, 12, 0))
		return DROP;
	return bpf_redirect(interface, BPF_F_INGRESS);
}

/*
 * No server, or a worker has the client: the bytes go to our own stack after all, and a worker sees
 * to it.
 */
inlined int fall_back(struct __sk_buff *skb, struct splice *splice, struct express_ask *ask,
		      __u32 place, __u64 word, __u32 known, int is_workers, const int has_failed,
		      const int v6)
{
	struct made *made = to_make(known);
	struct express_target *target;
	__u32 number = ask->target;
	int verdict;

	if (!made || !change(ask, word, PF_EXPRESS_FILLING))
		return DROP; /* the client has ended it just now */
	target = map_lookup(MAP_EXPRESS_TARGETS_FD, &number);
	if (target && !is_workers)
		*(volatile __u64 *)&target->not_before_ns =
			bpf_ktime_get_ns() + (has_failed ? REFUSED_FOR_NS : MISMATCHED_FOR_NS);
	count(is_workers ? PF_COUNT_NO_REQUEST : PF_COUNT_REFUSED);
	if (has_failed)
		failed(number);
	from_client(made, splice, ask);
	made->flags = ACK | PSH | (ask->has_fin ? FIN : 0);
	made->window = ask->window_field;
	made->bytes = ask->saved;
	made->sum = ask->sum;
	if (ask->has_timestamps) {
		made->option_words = 3;
		made->option[0] = bpf_htonl(TIMESTAMP_WORD);
		made->option[1] = bpf_htonl(ask->tc);
		made->option[2] = bpf_htonl(ask->tk);
	}
	verdict = DROP; /* the client sends it again, and the target is not asked then */
	if (make(skb, made, v6) || store_saved(skb, ask, made, v6))
		count(PF_COUNT_FAILED);
	else
		verdict = to_our_stack(skb, ask);
	leave_at_once(ask, splice, place, word);
	return verdict;
}
