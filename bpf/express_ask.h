/*
 * A server is asked: a place is taken and filled, and the client's packet becomes a SYN.
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
 * Read a byte of each of its lines. It was used long ago, and is in no cache: so the lines come all
 * at once, and not one after the other.
 */
#define prefetch(start, bytes)                                                       \
	do {                                                                         \
		__u32 line;                                                          \
		_Pragma("unroll") for (line = 0; line < (bytes); line += 64)(void) * \
			(volatile __u8 *)((void *)(start) + line);                   \
	} while (0)

/* A SYN to the server, out of any packet. */
inlined int send_syn(struct __sk_buff *skb, struct splice *splice, struct express_ask *ask,
		     __u32 tsval, __u32 known, const int v6)
{
	struct made *made = to_make(known);

	if (!made)
		return DROP; /* never */
	to_server(made, splice);
	made->seq = ask->i0;
	made->flags = SYN;
	made->option_words = 5;
	made->window = ask->window > 65535 ? 65535 : ask->window;
	made->option[0] = bpf_htonl(0x02040000 | ask->mss);
	made->option[1] = bpf_htonl(ask->has_sack ? 0x04020101 : NO_OP_WORD);
	made->option[2] = made->option[3] = bpf_htonl(NO_OP_WORD);
	made->option[4] =
		bpf_htonl(ask->has_scale ? 0x01030300u | (ask->client_scale & 15) : NO_OP_WORD);
	if (ask->has_timestamps) {
		made->option[1] = bpf_htonl(ask->has_sack ? 0x0402080a : TIMESTAMP_WORD);
		made->option[2] = bpf_htonl(tsval + splice->way[PF_UP].tsval_delta);
		made->option[3] = 0;
	}
	if (make(skb, made, v6)) {
		count(PF_COUNT_FAILED);
		return DROP; /* the client sends its bytes again, and they become a SYN then */
	}
	return send_on(splice->way[PF_UP].interface);
}

/* The rules have said which server: ask it. */
inlined int ask_server(struct __sk_buff *skb, const int v6)
{
	struct asking *asking = asking_of();
	struct splice_key key;
	struct seen seen;
	struct splice_flow flow = {};
	struct express_listener *listener;
	struct express_target *target;
	struct express_ask *ask;
	struct splice *splice;
	struct splice_direction *way, *back;
	__u32 place = 0, index, number, i, rule, options, out, segment;
	__u64 now_ns, word, secret;
	int said;

	if (!asking)
		return NEXT; /* never */
	listener = map_lookup(MAP_EXPRESS_LISTENERS_FD, &asking->listener);
	if (!listener || listener->table != asking->table)
		return NEXT; /* it has got other rules just now */
	key = asking->key;
	seen = asking->seen;
	options = asking->options;
	rule = asking->rule;
	hide(rule);
	rule &= PF_EXPRESS_RULES - 1;
	/* It may have been told another MSS than in `begin`. */
	segment = segment_of(listener);
	if (!fits(seen.bytes, segment)) {
		count(PF_COUNT_LONG);
		return NEXT;
	}
	number = asking->target;
	target = map_lookup(MAP_EXPRESS_TARGETS_FD, &number);
	if (!target)
		return NEXT; /* never */
	now_ns = bpf_ktime_get_ns();
	/* Once: the keeper may forget the way meanwhile, and 0 would be a way to `lo`. */
	out = volatile_read(target->out);
	/* From `lo` out would need an answer to `lo` that our stack would not take. */
	if (!out || volatile_read(target->not_before_ns) > now_ns ||
	    (skb->ifindex == LOOPBACK && out != LOOPBACK) || asking->mss < LEAST_MSS ||
	    listener->told_mss > target->mss) {
		count(PF_COUNT_NO_TARGET);
		return NEXT;
	}
	if (queue_pop(map_pointer(MAP_EXPRESS_PLACES_FD), &place)) {
		count(PF_COUNT_NO_PORT);
		return NEXT;
	}
	index = place + FIRST_SPLICE;
	ask = map_lookup(MAP_EXPRESS_ASKS_FD, &place);
	splice = map_lookup(MAP_SPLICES_FD, &index);
	if (!ask || !splice)
		return NEXT; /* never */
	prefetch(splice, sizeof(*splice));
	prefetch(ask, 256);
	/* Ours alone from here on, as long as no packet finds it. */
	word = (ask->word & ~(__u64)PF_EXPRESS_STATE_MASK) + PF_EXPRESS_STATE_MASK + 1;
	*(volatile __u64 *)&ask->word = word | PF_EXPRESS_FILLING;
	ask->begun_ns = now_ns;
	ask->c0 = seen.seq - 1;
	ask->k0 = seen.ack - 1;
	secret = keyed(target->source, target->server, bpf_htons((__u16)(FIRST_PORT + place)),
		       target->port);
	ask->i0 = (__u32)(now_ns >> 6) + (__u32)secret;
	ask->tc = ask->first_tc = seen.tsval;
	ask->tk = seen.tsecr;
	ask->has_scale = !!(options & 0x400);
	ask->has_sack = !!(options & 0x200);
	ask->has_timestamps = seen.has_timestamp;
	ask->client_scale = ask->has_scale ? options & 15 : 0;
	ask->kernel_scale = ask->has_scale ? options >> 4 & 15 : 0;
	ask->window_field = seen.window;
	ask->window = seen.window << (ask->client_scale & 15);
	ask->room = asking->room;
	ask->mss = asking->mss < target->mss ? asking->mss : target->mss;
	ask->told_mss = listener->told_mss;
	ask->answer_ms = listener->answer_ms[rule];
	ask->client_interface = skb->ifindex;
	ask->target = number;
	ask->rule = rule;
	ask->listener_table = listener->table;
	ask->has_fin = seen.flags & FIN;
	bpf_skb_load_bytes(skb, 0, ask->macs, 12);

	/* What is behind the bytes is not summed up with them. */
	ask->saved = seen.bytes;
	{
		__u32 last = (seen.bytes - 1) & (PF_EXPRESS_SAVED - 1) & ~3;

		hide(last);
		last &= PF_EXPRESS_SAVED - 4;
		*(__u32 *)(ask->bytes + last) = 0;
	}
	said = bpf_skb_load_bytes(skb, TCP_AT(v6) + seen.header, ask->bytes,
				  at_least_one(seen.bytes, PF_EXPRESS_SAVED));
	ask->sum = ask->segment_sum = sum_of_saved(ask, seen.bytes);
	ask->segment = segment;
	if (ask->segment < seen.bytes)
		ask->segment_sum = sum_of_saved(ask, ask->segment);
	else
		ask->segment = seen.bytes;

	__builtin_memset(splice->way, 0, sizeof(splice->way));
	way = &splice->way[PF_UP];
	back = &splice->way[PF_DOWN];
	way->from = key;
#pragma unroll
	for (i = 0; i < 4; i++) {
		way->source[i] = back->from.target[i] = target->source[i];
		way->target[i] = back->from.source[i] = target->server[i];
		back->source[i] = key.target[i];
		back->target[i] = key.source[i];
	}
	way->sport = back->from.dport = bpf_htons((__u16)(FIRST_PORT + place));
	way->dport = back->from.sport = target->port;
	back->sport = key.dport;
	back->dport = key.sport;
	way->interface = skb->ifindex == LOOPBACK && out == LOOPBACK ? 0 : out;
	back->interface = skb->ifindex == LOOPBACK ? 0 : skb->ifindex;
	way->by[0] = way->by[1] = skb->ifindex;
	back->by[0] = target->by[0];
	back->by[1] = target->by[1];
	way->pseudo_sum = fold(sum_of_address(key.source, v6) + sum_of_address(key.target, v6) +
			       bpf_htons(PROTOCOL_TCP));
	back->pseudo_sum = fold(sum_of_address(back->from.source, v6) +
				sum_of_address(back->from.target, v6) + bpf_htons(PROTOCOL_TCP));
	/* For each of the two the other way round. */
	i = fold(sum_of_address(target->source, v6) + sum_of_address(target->server, v6));
	number = fold(sum_of_address(key.source, v6) + sum_of_address(key.target, v6));
	way->address_sum = fold((__u64)(__u16)~number + i);
	back->address_sum = fold((__u64)(__u16)~i + number);
	way->seq_delta = ask->i0 - ask->c0;
	way->tsval_delta = (__u32)(now_ns / NS_PER_MS) + (__u32)(secret >> 32) - seen.tsval;
	splice->tries = 0;
	splice->worker = PF_EXPRESS_NO_WORKER;
	splice->slot = splice->last_slot = PF_NO_SLOT;
	splice->reset = 0;
	splice->family = v6 ? 6 : 4;
	splice->out[PF_UP] = skb->ifindex;
	splice->out[PF_DOWN] = out;
	splice->isn[PF_UP] = ask->c0;
	splice->owner = listener->owner;
	splice->keep_idle_s = splice->keep_interval_s = splice->keep_count = 0;
	/* Below 2^53, so that it is exact in a browser, too; no worker counts so far. */
	splice->id = 1ull << PF_EXPRESS_ID_BIT | (__u64)index << 30 | ((word >> 3) & 0x3fffffff);
	*(volatile __u32 *)&splice->state = PF_SPLICE_ASKED;

	mark_port(way->from.dport);
	mark_port(way->sport);
	flow.index = index;
	flow.direction = PF_DOWN;
	key = back->from;
	if (said || update_new(MAP_FLOWS_FD, &key, &flow)) {
		give_back(ask, splice, place);
		count(PF_COUNT_TAKEN_PORT);
		return NEXT;
	}
	flow.direction = PF_UP;
	key = way->from;
	said = update_new(MAP_FLOWS_FD, &key, &flow);
	if (said) {
		leave_at_once(ask, splice, place, word);
		count(PF_COUNT_TAKEN_PORT);
		/* Another processor has its like, which is the one that goes on; or no room. */
		return said == -EEXIST ? DROP : NEXT;
	}
	/* From here on the answers count; what came before is none. */
	__sync_fetch_and_add(&splice->tries, 1);
	*(volatile __u64 *)&ask->word = word | PF_EXPRESS_ASKED;
	count(PF_COUNT_TAKEN);
	return send_syn(skb, splice, ask, seen.tsval, seen.sum, v6);
}
