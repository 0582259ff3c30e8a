/*
 * The server has answered: the two ends are a pair as any other from here on, and the saved bytes
 * go to the server.
 */
#pragma once

#include <uapi/linux/bpf.h>

#include "express_begin.h"
#include "express_connect.h"
#include "express_make.h"
#include "express_places.h"
#include "express_read.h"
#include "express_wait.h"
#include "splice.h"
#include "splice_packet.h"
#include "splice_socket.h"
#include "splice_valid.h"
#include "splice_verdicts.h"

inlined __u32 option_at(const struct made *made, __u32 at, const int v6)
{
	hide(at);
	at &= 63; /* all of it is in `made` */
	return ((const __u8 *)(made->old + TCP_WORD(v6) + 5))[at];
}

/* What a SYN-ACK agrees to. Its options are in `made->old`; the loop's state is, too (README.md).
 */
inlined void read_options(struct made *made, __u32 header, const int v6)
{
	__u32 end = header - 20, i, kind, length, at;

	*(volatile __u32 *)&made->at = 0;
	made->server_mss = LEAST_MSS;
#pragma clang loop unroll(disable)
	for (i = 0; i < 24; i++) {
		at = volatile_read(made->at);
		if (at >= end || at >= 36)
			break;
		kind = option_at(made, at, v6);
		if (kind == 0)
			break;
		length = 1;
		if (kind != 1) {
			length = option_at(made, at + 1, v6);
			if (length < 2)
				break;
		}
		if (kind == 2)
			made->server_mss =
				option_at(made, at + 2, v6) << 8 | option_at(made, at + 3, v6);
		if (kind == 3) {
			made->has_scale = 1;
			made->scale = option_at(made, at + 2, v6);
		}
		if (kind == 8) {
			made->has_timestamps = 1;
			made->server_tsval = option_at(made, at + 2, v6) << 24 |
					     option_at(made, at + 3, v6) << 16 |
					     option_at(made, at + 4, v6) << 8 |
					     option_at(made, at + 5, v6);
		}
		*(volatile __u32 *)&made->at = at + length;
	}
}

/* A direction as it begins. */
inlined void start_direction(struct splice_direction *way, __u32 said, __u32 heard, __u32 window,
			     __u32 room, __u32 tsval, __u32 now_s)
{
	way->last_ack = heard;
	way->last_end = way->next = way->begin = way->ours = said;
	way->edge = heard + window;
	way->limit = said + room;
	way->reach = room > LEAST_REACH ? room : LEAST_REACH;
	way->tail = heard;
	way->sent = heard;
	way->recent = tsval;
	way->recent_s = way->heard_s = now_s;
	way->heard_tick = (__u32)(bpf_jiffies64() >> 6);
}

inlined void swap_macs(struct __sk_buff *skb)
{
	__u8 macs[12], swapped[12];

	bpf_skb_load_bytes(skb, 0, macs, 12);
	__builtin_memcpy(swapped, macs + 6, 6);
	__builtin_memcpy(swapped + 6, macs, 6);
	bpf_skb_store_bytes(skb, 0, swapped, 12, 0);
}

/*
 * Whether our stack has made a socket of the client's handshake all the same. What came behind the
 * handshake may have passed `begin` on another processor, before the first bytes were taken there.
 */
inlined int has_become_socket(struct __sk_buff *skb, const struct splice *splice, const int v6)
{
	struct splice_key from = splice->way[PF_UP].from;
	__u32 state = state_of_socket(skb, &from, v6);

	return state && state != BPF_TCP_NEW_SYN_RECV && state != BPF_TCP_LISTEN &&
	       state != BPF_TCP_TIME_WAIT;
}

/* The server's SYN-ACK. */
inlined int join(struct __sk_buff *skb, struct splice *splice, struct express_ask *ask, __u32 place,
		 __u64 word, const struct seen *seen, const int v6)
{
	struct made *made = to_make(seen->sum);
	struct splice_direction *way = &splice->way[PF_UP], *back = &splice->way[PF_DOWN];
	__u32 options = seen->header - 20, room, tsval, rest, now_s;
	__u8 macs[12], has_scale;
	int is_workers;

	if (!made || seen->bytes)
		return DROP; /* with data in it: if it is not repeated without, the keeper gives up
			      */
	if (options && load_options(skb, made, options, v6))
		return DROP;
	read_options(made, seen->header, v6);
	has_scale = made->has_scale;
	tsval = made->server_tsval;
	is_workers = has_become_socket(skb, splice, v6);
	/*
	 * A window that is never scaled in this packet, and that the client is told of in steps of
	 * our kernel's scale: see `is_coarse`.
	 */
	if (is_workers || made->has_timestamps != ask->has_timestamps ||
	    made->server_mss < ask->told_mss || made->scale > 14 ||
	    seen->window >> (ask->kernel_scale & 15) < 2) {
		/*
		 * The ends would not understand each other, or a worker has the client, and may
		 * have said something to it: the server forgets it, too.
		 */
		to_server(made, splice);
		made->seq = ask->i0 + 1;
		made->flags = RST;
		if (make(skb, made, v6))
			return DROP; /* it comes again */
		if (splice->way[PF_UP].interface) {
			swap_macs(skb);
			bpf_clone_redirect(skb, splice->way[PF_UP].interface, 0);
			swap_macs(skb);
		} else {
			bpf_clone_redirect(skb, LOOPBACK, 0);
		}
		return fall_back(skb, splice, ask, place, word, seen->sum, is_workers, 0, v6);
	}
	if (!change(ask, word, PF_EXPRESS_FILLING))
		return DROP;

	way->ack_delta = seen->seq - ask->k0;
	back->seq_delta = ask->k0 - seen->seq;
	back->ack_delta = ask->c0 - ask->i0;
	/* So that what the client echoes is what the server has said. */
	back->tsval_delta = ask->tk - tsval;
	back->tsecr_delta = -way->tsval_delta;
	way->tsecr_delta = -back->tsval_delta;
	way->shift_left = ask->client_scale;
	way->shift_right = has_scale ? ask->client_scale : 0;
	back->shift_left = has_scale && ask->has_scale ? made->scale : 0;
	back->shift_right = ask->kernel_scale;
	splice->isn[PF_DOWN] = seen->seq;
	room = ask->room > seen->window ? ask->room : seen->window;
	now_s = bpf_ktime_get_ns() / NS_PER_S;
	start_direction(way, ask->c0 + 1, ask->k0 + 1, ask->window, room, ask->tc, now_s);
	start_direction(back, seen->seq + 1, ask->i0 + 1, seen->window, ask->window, tsval, now_s);
	/* The bytes that go with this packet. */
	way->last_end = way->next = ask->c0 + 1 + ask->saved;
	way->bytes = ask->saved;
	way->packets = ask->segment < ask->saved ? 2 : 1;
	if (ask->has_fin) {
		way->last_end = way->next + 1;
		way->fin_seq = (__u32)way->next + 1;
		way->fin_due = way->fin = 1;
	}
	__sync_fetch_and_add(&splice->tries, 1); /* a barrier: all that before the state */
	*(volatile __u32 *)&splice->state = PF_SPLICE_ACTIVE;
	*(volatile __u64 *)&ask->word = (word & ~(__u64)PF_EXPRESS_STATE_MASK) | PF_EXPRESS_JOINED;
	count(PF_COUNT_COMMITTED);
	opened(ask->target);

	/* Our stack forgets the request. Without options: nothing in it can be too old. */
	from_client(made, splice, ask);
	made->flags = RST | ACK;
	/*
	 * The mark alone is not enough. If somebody in front of `ingress` changes it (or makes a
	 * second packet without), this looks like a reset of the client's, at the number at which
	 * the pair would be reset; the kernel takes it at no other.
	 */
	made->window = FOR_OUR_STACK >> 16;
	made->urgent = FOR_OUR_STACK & 0xffff;
	if (make(skb, made, v6)) {
		count(PF_COUNT_FAILED);
		return DROP; /* the client sends its bytes again, which go to the server */
	}
	skb->mark = FOR_OUR_STACK;
	if (ask->client_interface == LOOPBACK) {
		bpf_clone_redirect(skb, LOOPBACK, 0);
	} else {
		/* With another's address it would not be for this host. */
		bpf_skb_load_bytes(skb, 0, macs, 12);
		bpf_skb_store_bytes(skb, 0, ask->macs, 12, 0);
		bpf_clone_redirect(skb, ask->client_interface, BPF_F_INGRESS);
		bpf_skb_store_bytes(skb, 0, macs, 12, 0);
	}
	skb->mark = 0;

	to_server(made, splice);
	made->urgent = 0;
	made->seq = ask->i0 + 1;
	made->ack = seen->seq + 1;
	room = ask->window >> (way->shift_right & 15);
	made->window = room > 65535 ? 65535 : room;
	rest = ask->saved - ask->segment;
	made->flags = ACK | (rest ? 0 : PSH | (ask->has_fin ? FIN : 0));
	made->bytes = ask->segment;
	made->sum = ask->segment_sum;
	if (ask->has_timestamps) {
		made->option_words = 3;
		made->option[0] = bpf_htonl(TIMESTAMP_WORD);
		/* That of the last SYN, or later: older ones are thrown away (PAWS). */
		made->option[1] = bpf_htonl(ask->tc + way->tsval_delta);
		made->option[2] = bpf_htonl(tsval);
	}
	if (make(skb, made, v6) || store_saved(skb, ask, made, v6)) {
		count(PF_COUNT_FAILED);
		return DROP; /* likewise */
	}
	/* It came from where these go to; if it did not, the client sends the rest again. */
	if (!rest || (way->interface && skb->ifindex != way->interface))
		return send_on(way->interface);
	if (way->interface)
		swap_macs(skb);
	bpf_clone_redirect(skb, skb->ifindex, 0);
	made->seq += ask->segment;
	made->flags = ACK | PSH | (ask->has_fin ? FIN : 0);
	made->bytes = rest;
	made->sum = fold((__u64)ask->sum + (__u16)~ask->segment_sum);
	if (make(skb, made, v6) || store_rest(skb, ask, made, v6)) {
		count(PF_COUNT_FAILED);
		return DROP; /* likewise */
	}
	return send_on(way->interface);
}
