/*
 * Opening of a connection to a server: a place is taken from the queue and filled, and the client's
 * packet becomes a SYN to the server.
 */
#pragma once

#include <uapi/linux/bpf.h>

#include "express_begin.h"
#include "express_connect.h"
#include "express_make.h"
#include "express_numbers.h"
#include "express_places.h"
#include "maps.h"
#include "splice.h"
#include "splice_packet.h"
#include "splice_ports.h"
#include "splice_verdicts.h"

#define EEXIST 17 /* errno.h */

static long (*queue_pop)(void *map, void *value) = (void *)BPF_FUNC_map_pop_elem;

#define update_new(fd, key, value) \
	bpf_map_update_elem_((uintptr_t)bpf_pseudo_fd(1, fd), key, value, BPF_NOEXIST)

/*
 * Read a byte of each cache line of an object that was used long ago, and is in no cache: so the
 * lines are loaded at once, and not one after the other.
 */
#define prefetch(start, bytes)                                                       \
	do {                                                                         \
		__u32 line;                                                          \
		_Pragma("unroll") for (line = 0; line < (bytes); line += 64)(void) * \
			(volatile __u8 *)((void *)(start) + line);                   \
	} while (0)

/*
 * Turn any packet into the SYN to the server, and forward it. Returns the verdict of the redirect,
 * or DROP if memory is short: the client repeats its bytes.
 */
inlined int send_syn(struct __sk_buff *skb, struct splice *splice, struct express_ask *ask,
		     __u32 tsval, __u32 csum_state, const int v6)
{
	struct new_packet *packet = new_packet(csum_state);

	if (!packet)
		return DROP; /* never */
	address_to_server(packet, splice);
	packet->seq = ask->own_isn;
	packet->flags = SYN;
	packet->option_words = 5;
	packet->window = ask->client_window > 65535 ? 65535 : ask->client_window;
	packet->option[0] = bpf_htonl(0x02040000 | ask->mss);
	packet->option[1] = bpf_htonl(ask->has_sack ? 0x04020101 : NO_OP_WORD);
	packet->option[2] = packet->option[3] = bpf_htonl(NO_OP_WORD);
	packet->option[4] =
		bpf_htonl(ask->has_scale ? 0x01030300u | (ask->client_scale & 15) : NO_OP_WORD);
	if (ask->has_timestamps) {
		packet->option[1] = bpf_htonl(ask->has_sack ? 0x0402080a : TIMESTAMP_WORD);
		packet->option[2] = bpf_htonl(tsval + splice->direction[PF_UP].tsval_delta);
		packet->option[3] = 0;
	}
	if (build_packet(skb, packet, v6)) {
		count_event(PF_COUNT_FAILED);
		return DROP; /* the client repeats its bytes, which become a SYN then */
	}
	return forward_by(splice->direction[PF_UP].interface);
}

/*
 * Save the client's first bytes, and their sums. `segment` of them fit into the first packet to the
 * server. Returns 0, or an error of the helper.
 */
inlined int save_first_bytes(struct __sk_buff *skb, struct express_ask *ask, __u8 *saved,
			     const struct parsed_segment *parsed, __u32 segment, const int v6)
{
	__u32 last = (parsed->bytes - 1) & (PF_EXPRESS_SAVED - 1) & ~3;
	int result;

	/* Zero the rest of the last word, so that csum_saved() can sum whole words. */
	ask->saved_bytes = parsed->bytes;
	barrier_var(last);
	last &= PF_EXPRESS_SAVED - 4;
	*(__u32 *)(saved + last) = 0;
	result = bpf_skb_load_bytes(skb, TCP_OFFSET(v6) + parsed->header, saved,
				    bound_from_one(parsed->bytes, PF_EXPRESS_SAVED));
	ask->saved_sum = ask->first_segment_sum = csum_saved(saved, parsed->bytes);
	ask->first_segment_bytes = segment;
	if (ask->first_segment_bytes < parsed->bytes)
		ask->first_segment_sum = csum_saved(saved, ask->first_segment_bytes);
	else
		ask->first_segment_bytes = parsed->bytes;
	return result;
}

/* Keep what the client's handshake and its first packet say, but for the bytes. */
inlined void save_handshake(struct __sk_buff *skb, struct express_ask *ask,
			    const struct request_context *context,
			    const struct parsed_segment *parsed,
			    const struct express_listener *listener,
			    const struct express_target *target)
{
	__u32 options = context->options;

	ask->client_isn = parsed->seq - 1;
	ask->kernel_isn = parsed->ack - 1;
	ask->client_tsval = ask->first_client_tsval = parsed->tsval;
	ask->client_tsecr = parsed->tsecr;
	ask->has_scale = !!(options & 0x400);
	ask->has_sack = !!(options & 0x200);
	ask->has_timestamps = parsed->has_timestamp;
	ask->client_scale = ask->has_scale ? options & 15 : 0;
	ask->kernel_scale = ask->has_scale ? options >> 4 & 15 : 0;
	ask->window_field = parsed->window;
	ask->client_window = parsed->window << (ask->client_scale & 15);
	ask->kernel_window = context->room;
	ask->mss = context->mss < target->mss ? context->mss : target->mss;
	ask->advertised_mss = listener->advertised_mss;
	ask->client_interface = skb->ifindex;
	ask->has_fin = parsed->flags & FIN;
	bpf_skb_load_bytes(skb, 0, ask->macs, 12);
}

/*
 * Fill in the addresses and the interfaces of both directions. `client` are the addresses of the
 * client's packets, `port_be` is our port towards the server, `out` is the interface towards it.
 */
inlined void init_addresses(struct __sk_buff *skb, struct splice *splice,
			    const struct splice_key *client, const struct express_target *target,
			    __be16 port_be, __u32 out, const int v6)
{
	struct splice_direction *up = &splice->direction[PF_UP],
				*down = &splice->direction[PF_DOWN];
	__u32 i, before, after;

	up->from = *client;
#pragma unroll
	for (i = 0; i < 4; i++) {
		up->source[i] = down->from.target[i] = target->source[i];
		up->target[i] = down->from.source[i] = target->server[i];
		down->source[i] = client->target[i];
		down->target[i] = client->source[i];
	}
	up->sport = down->from.dport = port_be;
	up->dport = down->from.sport = target->port;
	down->sport = client->dport;
	down->dport = client->sport;
	up->interface = skb->ifindex == LOOPBACK && out == LOOPBACK ? 0 : out;
	down->interface = skb->ifindex == LOOPBACK ? 0 : skb->ifindex;
	up->from_interfaces[0] = up->from_interfaces[1] = skb->ifindex;
	down->from_interfaces[0] = target->from_interfaces[0];
	down->from_interfaces[1] = target->from_interfaces[1];
	up->pseudo_sum = csum_fold(address_sum_of(client->source, v6) +
				   address_sum_of(client->target, v6) + bpf_htons(PROTOCOL_TCP));
	down->pseudo_sum =
		csum_fold(address_sum_of(down->from.source, v6) +
			  address_sum_of(down->from.target, v6) + bpf_htons(PROTOCOL_TCP));
	/* The change of addresses, for each direction the reverse of the other. */
	after = csum_fold(address_sum_of(target->source, v6) + address_sum_of(target->server, v6));
	before = csum_fold(address_sum_of(client->source, v6) + address_sum_of(client->target, v6));
	up->address_sum = csum_fold((__u64)(__u16)~before + after);
	down->address_sum = csum_fold((__u64)(__u16)~after + before);
	splice->family = v6 ? 6 : 4;
	splice->out[PF_UP] = skb->ifindex;
	splice->out[PF_DOWN] = out;
}

/*
 * Let the packets of server and client find the place.
 *
 * Returns 0. Or, if that is impossible, the verdict for the client's packet: DROP if another
 * processor has made the same flow, and opens this connection; else NEXT. The place is given up
 * then.
 */
inlined int enter_flows(struct splice *splice, struct express_ask *ask, __u32 place, __u64 word)
{
	struct splice_flow flow = { .index = place + FIRST_SPLICE, .direction = PF_DOWN };
	struct splice_key key = splice->direction[PF_DOWN].from;
	int error;

	mark_port(splice->direction[PF_UP].from.dport);
	mark_port(splice->direction[PF_DOWN].from.dport);
	if (update_new(MAP_FLOWS_FD, &key, &flow)) {
		free_place(ask, splice, place);
		return NEXT;
	}
	flow.direction = PF_UP;
	key = splice->direction[PF_UP].from;
	error = update_new(MAP_FLOWS_FD, &key, &flow);
	if (!error)
		return 0;
	abandon_place(ask, splice, place, word);
	return error == -EEXIST ? DROP : NEXT; /* otherwise the map is full */
}

/*
 * Open a connection to the server that the rules have chosen.
 *
 * Returns the verdict of the SYN's redirect. NEXT if that is impossible: the client's bytes go up
 * the stack, and a worker gets the connection. DROP if another processor is opening the same
 * connection.
 */
inlined int ask_server(struct __sk_buff *skb, const int v6)
{
	struct request_context *context = get_context();
	struct splice_key key;
	struct parsed_segment parsed;
	struct express_listener *listener;
	struct express_target *target;
	struct express_ask *ask;
	__u8 *saved;
	struct splice *splice;
	__u32 place = 0, index, number, rule, out, segment;
	__u64 now_ns, word, secret;
	int verdict;

	if (!context)
		return NEXT; /* never */
	listener = map_lookup(MAP_EXPRESS_LISTENERS_FD, &context->listener);
	if (!listener || listener->table != context->table)
		return NEXT; /* its rules have just been replaced */
	key = context->key;
	parsed = context->parsed;
	rule = context->rule;
	barrier_var(rule);
	rule &= PF_EXPRESS_RULES - 1;
	/* The listener's MSS may have changed since `check_first_bytes` has read it. */
	segment = max_saved_segment(listener);
	if (!fits(parsed.bytes, segment)) {
		count_event(PF_COUNT_LONG);
		return NEXT;
	}
	number = context->target;
	target = map_lookup(MAP_EXPRESS_TARGETS_FD, &number);
	if (!target)
		return NEXT; /* never */
	now_ns = bpf_ktime_get_ns();
	/*
	 * Read once: the keeper may remove the target meanwhile, and interface 0 would mean `lo`.
	 */
	out = READ_ONCE(target->out);
	/*
	 * A client on `lo` with a server elsewhere: our stack would not accept the answers that had
	 * to be redirected to `lo`.
	 */
	if (!out || READ_ONCE(target->not_before_ns) > now_ns ||
	    (skb->ifindex == LOOPBACK && out != LOOPBACK) || context->mss < MIN_MSS ||
	    listener->advertised_mss > target->mss) {
		count_event(PF_COUNT_NO_TARGET);
		return NEXT;
	}
	if (queue_pop(map_pointer(MAP_EXPRESS_PLACES_FD), &place)) {
		count_event(PF_COUNT_NO_PORT);
		return NEXT;
	}
	index = place + FIRST_SPLICE;
	ask = map_lookup(MAP_EXPRESS_ASKS_FD, &place);
	saved = map_lookup(MAP_EXPRESS_SAVED_FD, &place);
	splice = map_lookup(MAP_SPLICES_FD, &index);
	if (!ask || !saved || !splice)
		return NEXT; /* never */
	prefetch(splice, sizeof(*splice));
	prefetch(ask, sizeof(*ask));
	prefetch(saved, 256);
	/* From here on no other program changes the place, as long as no packet finds it. */
	word = (ask->word & ~(__u64)PF_EXPRESS_STATE_MASK) + PF_EXPRESS_STATE_MASK + 1;
	WRITE_ONCE(ask->word, word | PF_EXPRESS_FILLING);
	ask->begun_ns = now_ns;
	ask->target = number;
	ask->rule = rule;
	ask->answer_ms = listener->answer_ms[rule];
	ask->listener_table = listener->table;
	secret = siphash_addresses(target->source, target->server,
				   bpf_htons((__u16)(FIRST_PORT + place)), target->port);
	ask->own_isn = (__u32)(now_ns >> 6) + (__u32)secret;
	save_handshake(skb, ask, context, &parsed, listener, target);

	__builtin_memset(splice->direction, 0, sizeof(splice->direction));
	init_addresses(skb, splice, &key, target, bpf_htons((__u16)(FIRST_PORT + place)), out, v6);
	splice->direction[PF_UP].seq_delta = ask->own_isn - ask->client_isn;
	splice->direction[PF_UP].tsval_delta =
		(__u32)(now_ns / NS_PER_MS) + (__u32)(secret >> 32) - parsed.tsval;
	splice->barrier = 0;
	splice->worker = PF_EXPRESS_NO_WORKER;
	splice->slot = splice->last_slot = PF_NO_SLOT;
	splice->reset = 0;
	splice->isn[PF_UP] = ask->client_isn;
	splice->owner = listener->owner;
	splice->keep_idle_s = splice->keep_interval_s = splice->keep_count = 0;
	/*
	 * Below 2^53, so that a browser represents it exactly; no worker numbers its pairs so high.
	 */
	splice->id = 1ull << PF_EXPRESS_ID_BIT | (__u64)index << 30 | ((word >> 3) & 0x3fffffff);
	WRITE_ONCE(splice->state, PF_SPLICE_ASKED);

	if (save_first_bytes(skb, ask, saved, &parsed, segment, v6)) {
		free_place(ask, splice, place);
		verdict = NEXT;
	} else {
		verdict = enter_flows(splice, ask, place, word);
	}
	if (verdict) {
		count_event(PF_COUNT_TAKEN_PORT);
		return verdict;
	}
	/*
	 * A barrier: the record is complete before the place is ASKED. From here on packets of
	 * client and server are handled; earlier ones are dropped.
	 */
	__sync_fetch_and_add(&splice->barrier, 1);
	WRITE_ONCE(ask->word, word | PF_EXPRESS_ASKED);
	count_event(PF_COUNT_TAKEN);
	return send_syn(skb, splice, ask, parsed.tsval, parsed.sum, v6);
}
