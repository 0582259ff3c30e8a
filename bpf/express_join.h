/*
 * The server has answered: from here on the two ends are a pair as any other, and the saved bytes
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

/* A byte of the SYN-ACK's options. */
inlined __u32 option_at(const struct new_packet *packet, __u32 at, const int v6)
{
	barrier_var(at);
	at &= 63; /* the bound for the verifier: `packet` is larger than that */
	return ((const __u8 *)(packet->old + TCP_WORD(v6) + 5))[at];
}

/*
 * Read the options of a SYN-ACK, which load_options() has put into `packet->old`. The state of the
 * loop is in `packet`, too, as it is a map's value (see README.md).
 */
inlined void read_options(struct new_packet *packet, __u32 header, const int v6)
{
	__u32 end = header - 20, i, kind, length, at;

	WRITE_ONCE(packet->at, 0);
	packet->server_mss = MIN_MSS;
#pragma clang loop unroll(disable)
	for (i = 0; i < 24; i++) {
		at = READ_ONCE(packet->at);
		if (at >= end || at >= 36)
			break;
		kind = option_at(packet, at, v6);
		if (kind == 0)
			break;
		length = 1;
		if (kind != 1) {
			length = option_at(packet, at + 1, v6);
			if (length < 2)
				break;
		}
		if (kind == 2)
			packet->server_mss =
				option_at(packet, at + 2, v6) << 8 | option_at(packet, at + 3, v6);
		if (kind == 3) {
			packet->has_scale = 1;
			packet->scale = option_at(packet, at + 2, v6);
		}
		if (kind == 8) {
			packet->has_timestamps = 1;
			packet->server_tsval = option_at(packet, at + 2, v6) << 24 |
					       option_at(packet, at + 3, v6) << 16 |
					       option_at(packet, at + 4, v6) << 8 |
					       option_at(packet, at + 5, v6);
		}
		WRITE_ONCE(packet->at, at + length);
	}
}

/*
 * Set the state of a direction that becomes ACTIVE: the next number that its peer sends, the number
 * that it has acknowledged, its window, the window that it was told, its timestamp.
 */
inlined void init_joined_direction(struct splice_direction *direction, __u32 next_seq, __u32 acked,
				   __u32 window, __u32 room, __u32 tsval, __u32 now_s)
{
	direction->last_ack = acked;
	direction->last_end = direction->contiguous_end = direction->begin_seq =
		direction->socket_expected_seq = next_seq;
	direction->window_edge = acked + window;
	direction->max_edge = next_seq + room;
	direction->max_window = room > MIN_LARGEST_WINDOW ? room : MIN_LARGEST_WINDOW;
	direction->tail_end = acked;
	direction->socket_sent_end = acked;
	direction->ts_recent = tsval;
	direction->ts_recent_s = direction->last_received_s = now_s;
	direction->last_received_tick = current_tick();
}

/* Swap the Ethernet addresses, for a packet that goes back by the interface by which it came. */
inlined void swap_macs(struct __sk_buff *skb)
{
	__u8 macs[12], swapped[12];

	bpf_skb_load_bytes(skb, 0, macs, 12);
	__builtin_memcpy(swapped, macs + 6, 6);
	__builtin_memcpy(swapped + 6, macs, 6);
	bpf_skb_store_bytes(skb, 0, swapped, 12, 0);
}

/*
 * Whether our stack has made a socket of the client's handshake all the same. A packet behind the
 * handshake may have passed `check_first_bytes` on another processor, before the first bytes were
 * taken.
 */
inlined int has_become_socket(struct __sk_buff *skb, const struct splice *splice, const int v6)
{
	struct splice_key from = splice->direction[PF_UP].from;
	__u32 state = socket_state(skb, &from, v6);

	return state && state != BPF_TCP_NEW_SYN_RECV && state != BPF_TCP_LISTEN &&
	       state != BPF_TCP_TIME_WAIT;
}

/*
 * Reset the server's connection, which has answered with the packet at hand.
 *
 * Returns 0; or DROP if memory is short: the server repeats its SYN-ACK.
 */
inlined int reset_server(struct __sk_buff *skb, struct new_packet *packet,
			 const struct splice *splice, const struct express_ask *ask, const int v6)
{
	address_to_server(packet, splice);
	packet->seq = ask->own_isn + 1;
	packet->flags = RST;
	if (build_packet(skb, packet, v6))
		return DROP;
	if (splice->direction[PF_UP].interface) {
		swap_macs(skb);
		bpf_clone_redirect(skb, splice->direction[PF_UP].interface, 0);
		swap_macs(skb);
	} else {
		bpf_clone_redirect(skb, LOOPBACK, 0);
	}
	return 0;
}

/*
 * Fill in both directions from the client's first packet and the server's SYN-ACK (`parsed`,
 * `packet`), and make the pair ACTIVE. `word` is that of the place.
 */
inlined void activate_pair(struct splice *splice, struct express_ask *ask, __u64 word,
			   const struct new_packet *packet, const struct parsed_segment *parsed)
{
	struct splice_direction *up = &splice->direction[PF_UP],
				*down = &splice->direction[PF_DOWN];
	__u32 tsval = packet->server_tsval, now_s = bpf_ktime_get_ns() / NS_PER_S, room;

	up->ack_delta = parsed->seq - ask->kernel_isn;
	down->seq_delta = ask->kernel_isn - parsed->seq;
	down->ack_delta = ask->client_isn - ask->own_isn;
	/* So that the client's echo of our kernel's timestamp becomes an echo of the server's. */
	down->tsval_delta = ask->client_tsecr - tsval;
	down->tsecr_delta = -up->tsval_delta;
	up->tsecr_delta = -down->tsval_delta;
	up->peer_scale = ask->client_scale;
	up->other_scale = packet->has_scale ? ask->client_scale : 0;
	down->peer_scale = packet->has_scale && ask->has_scale ? packet->scale : 0;
	down->other_scale = ask->kernel_scale;
	splice->isn[PF_DOWN] = parsed->seq;
	room = ask->kernel_window > parsed->window ? ask->kernel_window : parsed->window;
	init_joined_direction(up, ask->client_isn + 1, ask->kernel_isn + 1, ask->client_window,
			      room, ask->client_tsval, now_s);
	init_joined_direction(down, parsed->seq + 1, ask->own_isn + 1, parsed->window,
			      ask->client_window, tsval, now_s);
	/* The saved bytes are counted as received, since this packet takes them along. */
	up->last_end = up->contiguous_end = ask->client_isn + 1 + ask->saved_bytes;
	up->bytes = ask->saved_bytes;
	up->packets = ask->first_segment_bytes < ask->saved_bytes ? 2 : 1;
	if (ask->has_fin) {
		up->last_end = up->contiguous_end + 1;
		up->fin_seq = (__u32)up->contiguous_end + 1;
		up->fin_due = up->fin = 1;
	}
	__sync_fetch_and_add(&splice->barrier, 1); /* all of the above before the state */
	WRITE_ONCE(splice->state, PF_SPLICE_ACTIVE);
	WRITE_ONCE(ask->word, (word & ~(__u64)PF_EXPRESS_STATE_MASK) | PF_EXPRESS_JOINED);
	count_event(PF_COUNT_COMMITTED);
	count_opened(ask->target);
}

/*
 * Send a reset to our own stack, which drops the request of the client's handshake. It has no
 * options: a timestamp could be too old (PAWS).
 *
 * Returns 0; or DROP if memory is short.
 */
inlined int reset_own_request(struct __sk_buff *skb, struct new_packet *packet,
			      struct splice *splice, struct express_ask *ask, const int v6)
{
	__u8 macs[12];

	address_from_client(packet, splice, ask);
	packet->flags = RST | ACK;
	/*
	 * The mark alone is not enough. If another program in front of `ingress` changes it (or
	 * makes a second packet without it), this looks like a reset by the client, at the number
	 * at which the pair would be reset; and the kernel accepts it at no other number. So window
	 * and urgent pointer mark it, too.
	 */
	packet->window = FOR_OUR_STACK >> 16;
	packet->urgent = FOR_OUR_STACK & 0xffff;
	if (build_packet(skb, packet, v6))
		return DROP;
	skb->mark = FOR_OUR_STACK;
	if (ask->client_interface == LOOPBACK) {
		bpf_clone_redirect(skb, LOOPBACK, 0);
	} else {
		/*
		 * With the Ethernet addresses of the server's packet it would not be for this host.
		 */
		bpf_skb_load_bytes(skb, 0, macs, 12);
		bpf_skb_store_bytes(skb, 0, ask->macs, 12, 0);
		bpf_clone_redirect(skb, ask->client_interface, BPF_F_INGRESS);
		bpf_skb_store_bytes(skb, 0, macs, 12, 0);
	}
	skb->mark = 0;
	packet->urgent = 0;
	return 0;
}

/*
 * Send the saved bytes to the server, in two packets if they do not fit into one. `ack` is what
 * they acknowledge.
 *
 * Returns the verdict of the redirect; DROP if memory is short.
 */
inlined int send_saved(struct __sk_buff *skb, struct new_packet *packet, struct splice *splice,
		       struct express_ask *ask, __u32 place, __u32 ack, const int v6)
{
	struct splice_direction *up = &splice->direction[PF_UP];
	__u32 room = ask->client_window >> (up->other_scale & 15);
	__u32 rest = ask->saved_bytes - ask->first_segment_bytes;

	address_to_server(packet, splice);
	packet->seq = ask->own_isn + 1;
	packet->ack = ack;
	packet->window = room > 65535 ? 65535 : room;
	packet->flags = ACK | (rest ? 0 : PSH | (ask->has_fin ? FIN : 0));
	packet->bytes = ask->first_segment_bytes;
	packet->sum = ask->first_segment_sum;
	if (ask->has_timestamps) {
		packet->option_words = 3;
		packet->option[0] = bpf_htonl(TIMESTAMP_WORD);
		/*
		 * The timestamp of the last SYN, or a later one: the server discards older ones
		 * (PAWS).
		 */
		packet->option[1] = bpf_htonl(ask->client_tsval + up->tsval_delta);
		packet->option[2] = bpf_htonl(packet->server_tsval);
	}
	if (build_packet(skb, packet, v6) || store_saved(skb, place, packet, v6))
		return DROP;
	/*
	 * The rest goes out on the interface by which the SYN-ACK came. If that is not the route to
	 * the server, the client repeats the rest.
	 */
	if (!rest || (up->interface && skb->ifindex != up->interface))
		return forward_by(up->interface);
	if (up->interface)
		swap_macs(skb);
	bpf_clone_redirect(skb, skb->ifindex, 0);
	packet->seq += ask->first_segment_bytes;
	packet->flags = ACK | PSH | (ask->has_fin ? FIN : 0);
	packet->bytes = rest;
	packet->sum = csum_fold((__u64)ask->saved_sum + (__u16)~ask->first_segment_sum);
	if (build_packet(skb, packet, v6) || store_rest(skb, ask, place, packet, v6))
		return DROP;
	return forward_by(up->interface);
}

/*
 * Handle the server's SYN-ACK: make the pair ACTIVE, reset the request of our own stack, and send
 * the saved bytes to the server.
 *
 * If the server's options do not fit those that the client was told, or a worker has the client,
 * the server is reset, and give_to_worker() undoes the connection. Returns the verdict of the
 * redirect; DROP if memory is short: the SYN-ACK or the client's bytes are repeated.
 */
inlined int join_pair(struct __sk_buff *skb, struct splice *splice, struct express_ask *ask,
		      __u32 place, __u64 word, const struct parsed_segment *parsed, const int v6)
{
	struct new_packet *packet = new_packet(parsed->sum);
	__u32 options = parsed->header - 20;
	int is_with_worker, verdict;

	if (!packet || parsed->bytes)
		return DROP; /* it carries data; the keeper gives up later */
	if (options && load_options(skb, packet, options, v6))
		return DROP;
	read_options(packet, parsed->header, v6);
	is_with_worker = has_become_socket(skb, splice, v6);
	/*
	 * The window field of a SYN-ACK is never scaled, and the client gets it in units of our
	 * kernel's scale: see is_window_coarse().
	 */
	if (is_with_worker || packet->has_timestamps != ask->has_timestamps ||
	    packet->server_mss < ask->advertised_mss || packet->scale > 14 ||
	    parsed->window >> (ask->kernel_scale & 15) < 2) {
		/*
		 * The two handshakes do not fit, or a worker has the client, and may have sent
		 * something to it.
		 */
		if (reset_server(skb, packet, splice, ask, v6))
			return DROP;
		return give_to_worker(skb, splice, ask, place, word, parsed->sum, is_with_worker, 0,
				      v6);
	}
	if (!change_state(ask, word, PF_EXPRESS_FILLING))
		return DROP; /* another processor has the place: the server repeats its SYN-ACK */
	activate_pair(splice, ask, word, packet, parsed);
	verdict = reset_own_request(skb, packet, splice, ask, v6);
	if (!verdict)
		verdict = send_saved(skb, packet, splice, ask, place, parsed->seq + 1, v6);
	if (verdict == DROP)
		count_event(PF_COUNT_FAILED); /* the client repeats its bytes, to the server then */
	return verdict;
}
