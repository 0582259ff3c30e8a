/*
 * Until the server has answered: packets of the client, and how the connection is undone, so that a
 * worker gets the client.
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

/* A server that has refused is not asked again for so long; connections to it go to a worker. */
#define REFUSED_FOR_NS (1 * (__u64)NS_PER_S)
/*
 * Likewise a server whose options do not fit those of the client: they will not change within a
 * second.
 */
#define MISMATCHED_FOR_NS (10 * (__u64)NS_PER_S)

/* skb->mark of a packet that is for our own stack, and was checked already. */
#ifndef FOR_OUR_STACK
#define FOR_OUR_STACK 0x5047
#endif

/*
 * Handle a packet of the client while its server is asked. Returns NEXT: for our own stack. DROP:
 * the client repeats it. Or the verdict of the SYN's redirect: a repeated first packet becomes a
 * repeated SYN.
 */
inlined int handle_client_while_asked(struct __sk_buff *skb, struct splice *splice,
				      struct express_ask *ask, __u32 place, __u64 word,
				      const struct parsed_segment *parsed, const int v6)
{
	if (parsed->flags & SYN)
		return NEXT; /* our stack answers: the request still exists */
	if (parsed->flags & RST) {
		/*
		 * Accepted at the number that comes next, or would come next if all that was sent
		 * had arrived. Resets at other numbers are left to our kernel, which drops the
		 * request or does not. If such a reset was the client's end after all, the client
		 * sends another one when it gets a segment of the server.
		 */
		__u32 ahead = parsed->seq - ask->client_isn - 1;

		if ((ahead && ahead != ask->saved_bytes &&
		     ahead != ask->saved_bytes + !!ask->has_fin) ||
		    !change_state(ask, word, PF_EXPRESS_FILLING))
			return NEXT;
		abandon_place(ask, splice, place, word);
		count_event(PF_COUNT_ENDED);
		return NEXT;
	}
	if (parsed->bytes && parsed->seq == ask->client_isn + 1 &&
	    parsed->bytes <= PF_EXPRESS_SAVED && parsed->has_timestamp == ask->has_timestamps &&
	    parsed->ack == ask->kernel_isn + 1) {
		/*
		 * The client retransmits: the SYN may have been lost, too.
		 *
		 * The server must not see an older timestamp afterwards, not even because an old
		 * packet arrives late. The newest packet echoes the timestamp that the client has
		 * received last: the client accepts no older one, and echoes no other.
		 */
		if (!before(parsed->tsval, ask->client_tsval)) {
			ask->client_tsval = parsed->tsval;
			ask->client_tsecr = parsed->tsecr;
		}
		if (parsed->bytes != ask->saved_bytes &&
		    parsed->bytes != ask->first_segment_bytes) {
			/*
			 * The retransmission has more bytes: pass it to our stack, and so to a
			 * worker.
			 */
			if (!change_state(ask, word, PF_EXPRESS_FILLING))
				return DROP;
			abandon_place(ask, splice, place, word);
			count_event(PF_COUNT_LONG);
			return NEXT;
		}
		count_event(PF_COUNT_ASKED_AGAIN);
		return send_syn(skb, splice, ask, ask->client_tsval, parsed->sum, v6);
	}
	return DROP; /* a lost packet: the client repeats it */
}

/*
 * Pass a packet to our own stack as if it came from the client. Returns NEXT, the verdict of the
 * redirect to the client's interface, or DROP.
 */
inlined int send_to_own_stack(struct __sk_buff *skb, struct express_ask *ask)
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
 * Undo the connection, because the server cannot be used, or a worker has the client: the packet
 * becomes the client's first packet with the saved bytes, for our own stack, and a worker gets the
 * connection.
 *
 * Returns the verdict of send_to_own_stack(). DROP if memory is short, or the client has reset the
 * connection: the client repeats its bytes, or not.
 */
inlined int give_to_worker(struct __sk_buff *skb, struct splice *splice, struct express_ask *ask,
			   __u32 place, __u64 word, __u32 csum_state, int is_with_worker,
			   const int has_failed, const int v6)
{
	struct new_packet *packet = new_packet(csum_state);
	struct express_target *target;
	__u32 number = ask->target;
	int verdict;

	if (!packet || !change_state(ask, word, PF_EXPRESS_FILLING))
		return DROP; /* the client has just reset it */
	target = map_lookup(MAP_EXPRESS_TARGETS_FD, &number);
	if (target && !is_with_worker)
		*(volatile __u64 *)&target->not_before_ns =
			bpf_ktime_get_ns() + (has_failed ? REFUSED_FOR_NS : MISMATCHED_FOR_NS);
	count_event(is_with_worker ? PF_COUNT_NO_REQUEST : PF_COUNT_REFUSED);
	if (has_failed)
		count_failed(number);
	address_from_client(packet, splice, ask);
	packet->flags = ACK | PSH | (ask->has_fin ? FIN : 0);
	packet->window = ask->window_field;
	packet->bytes = ask->saved_bytes;
	packet->sum = ask->saved_sum;
	if (ask->has_timestamps) {
		packet->option_words = 3;
		packet->option[0] = bpf_htonl(TIMESTAMP_WORD);
		packet->option[1] = bpf_htonl(ask->client_tsval);
		packet->option[2] = bpf_htonl(ask->client_tsecr);
	}
	verdict = DROP; /* the client repeats it, and this target is not asked then */
	if (build_packet(skb, packet, v6) || store_saved(skb, place, packet, v6))
		count_event(PF_COUNT_FAILED);
	else
		verdict = send_to_own_stack(skb, ask);
	abandon_place(ask, splice, place, word);
	return verdict;
}
