/*
 * TCP options of forwarded packets: timestamps and selective acknowledgements (SACK) are
 * translated; all others are overwritten, as the two ends have not negotiated them with each other.
 */
#pragma once

#include "maps.h"
#include "splice.h"
#include "splice_packet.h"

/* Count the edges of the SACK option at `option`. Negative: it is no SACK option. */
inlined int count_sack_edges(__be32 *option, void *data_end, __u32 bytes)
{
	__u32 size;

	if ((void *)(option + 1) > data_end)
		return -1;
	size = bpf_ntohl(option[0]) - SACK_WORD;
	/* Kind and length are two bytes, followed by at most four blocks of two edges each. */
	if (size < 2 || size > 34 || size + 2 > bytes)
		return -1;
	return (int)(size - 2) / 4;
}

/*
 * Translate the edges of a SACK option. Returns its length in words; negative: it is no SACK
 * option.
 */
inlined int translate_sack(__be32 *option, void *data_end, __u32 bytes, __u32 delta, __u64 *sum)
{
	int i, edges = count_sack_edges(option, data_end, bytes);

	if (edges < 0)
		return -1;
#pragma unroll
	for (i = 0; i < 8; i++) {
		if (i < edges) {
			if ((void *)(option + i + 2) > data_end)
				return -1;
			add_to_field(&option[i + 1], delta, sum);
		}
	}
	return 1 + edges;
}

/*
 * The timestamp to send to a peer, never older than one that was sent before: the peer would
 * discard the packet (PAWS, RFC 7323). Until it has the tail, it gets timestamps of two clocks, our
 * socket's and the other end's.
 */
inlined __u32 monotonic_tsval(struct splice_direction *peer, __u32 tsval, const int ours)
{
	if (READ_ONCE(peer->has_last_tsval) && before(tsval, peer->last_tsval))
		return peer->last_tsval;
	if (READ_ONCE(peer->tail_open)) {
		peer->last_tsval = tsval;
		peer->has_last_tsval = 1;
	} else if (!ours && peer->has_last_tsval) {
		peer->has_last_tsval = 0; /* the other end's clock is ahead from here on */
	}
	return tsval;
}

/*
 * The timestamp to send with a packet of our own socket. Once the peer has the tail, it is the
 * other end's latest: a timestamp of our clock, which may run ahead, would make those of the other
 * end look old. (A retransmission must not look old either: not every TCP answers one that does.)
 */
inlined __u32 own_tsval(struct splice_direction *peer, const struct splice_direction *other,
			__u32 tsval)
{
	if (!READ_ONCE(peer->tail_open) && other->ts_recent)
		tsval = other->ts_recent + other->tsval_delta;
	return monotonic_tsval(peer, tsval, 1);
}

/*
 * Translate the options as Linux, BSD and Windows write them in an established connection:
 * timestamps, SACK or both, each behind two no-ops.
 *
 * Returns the word at which other options begin; negative: there are none.
 */
inlined int translate_options(__be32 *option, void *data_end, __u32 bytes,
			      struct splice_direction *from_peer, struct splice_direction *to_peer,
			      __u64 *sum)
{
	int took;

	if (bytes >= 12 && (void *)(option + 3) <= data_end &&
	    option[0] == bpf_htonl(TIMESTAMP_WORD)) {
		set_field(&option[1],
			  bpf_htonl(monotonic_tsval(
				  to_peer, bpf_ntohl(option[1]) + from_peer->tsval_delta, 0)),
			  sum);
		if (option[2])
			add_to_field(&option[2], from_peer->tsecr_delta, sum);
		if (bytes == 12)
			return -1;
		took = translate_sack(option + 3, data_end, bytes - 12, from_peer->ack_delta, sum);
		if (took < 0)
			return 3;
		return 12 + 4 * took < (int)bytes ? 3 + took : -1;
	}
	took = translate_sack(option, data_end, bytes, from_peer->ack_delta, sum);
	if (took < 0)
		return 0;
	return 4 * took < (int)bytes ? took : -1;
}

/*
 * Overwrite options by no-ops, from offset `at` of the packet on. Pointers into the packet are
 * invalid afterwards. (A loop over the words would cost the verifier as much as all the rest.)
 *
 * Returns 0; not 0: it failed, and the caller drops the packet.
 */
inlined int overwrite_options(struct __sk_buff *skb, __u32 at, __u64 bytes, __u64 *sum)
{
	__u32 zero = 0;
	__be32 *scratch = map_lookup(MAP_SCRATCH_FD, &zero), *no_ops;
	int i;

	if (!scratch)
		return -1; /* never */
	no_ops = scratch + 16;
#pragma unroll
	for (i = 0; i < 16; i++)
		no_ops[i] = bpf_htonl(NO_OP_WORD);
	/* A bound that the verifier can follow: 1 to 64. The number is 4 to 40. */
	bytes = ((bytes - 1) & 63) + 1;
	if (bpf_skb_load_bytes(skb, at, scratch, bytes) ||
	    bpf_skb_store_bytes(skb, at, no_ops, bytes, 0))
		return -1;
	bytes = ((bytes - 1) | 3) + 1;
	*sum += (__u32)bpf_csum_diff(scratch, bytes, no_ops, bytes, 0);
	return 0;
}

/* Limit the edges of a SACK option to `known`, the end of what our socket has sent. */
inlined void clip_sack(__be32 *option, void *data_end, __u32 bytes, __u32 known, __u64 *sum)
{
	int i, edges = count_sack_edges(option, data_end, bytes);

#pragma unroll
	for (i = 0; i < 8; i++) {
		if (i < edges) {
			if ((void *)(option + i + 2) > data_end)
				return; /* never: the header is in the linear part */
			/* A block that begins behind `known` becomes empty, and is ignored. */
			if (after(bpf_ntohl(option[i + 1]), known))
				set_field(&option[i + 1], bpf_htonl(known), sum);
		}
	}
}
