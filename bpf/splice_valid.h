/*
 * Checks of a packet before it changes a record, or is forwarded: would its receiver accept it?
 * These programs run in front of the receiver's own checks, and disable some of them (addresses
 * that strict reverse path filtering would refuse, timestamps), so they make the same checks first.
 *
 * RFC 9293, 3.10.7.4  sequence numbers, acknowledgements
 * RFC 5961, 3 4 5	resets, SYNs, the range of acknowledgements
 * RFC 7323, 5		timestamps (PAWS)
 * RFC 5927, 4		ICMP errors must quote what is not acknowledged yet
 *
 * An invalid packet is dropped, as the receiver would do, and counted by its kind.
 */
#pragma once

#include "maps.h"
#include "splice.h"
#include "splice_packet.h"

#define HOST_PACKET 0 /* PACKET_HOST of linux/if_packet.h */

#define LEVEL_QUERY 0 /* BPF_CSUM_LEVEL_QUERY */

/*
 * A checksum is computed over SUM_BYTES at once, in so many steps at most: the longest packets that
 * are no aggregates are jumbo frames. Longer packets, which only a program on this host can make,
 * are accepted without a check.
 */
#define SUM_STEPS 20

/*
 * The least that is assumed as a peer's largest window: how far behind a packet may be, at least.
 */
#define MIN_LARGEST_WINDOW 65536

/*
 * After so long without a packet the timestamp clock may have wrapped (RFC 7323, 5.5): 36 minutes
 * with a clock of microseconds, as Linux may have one (TCP_PAWS_WRAP).
 */
#define TS_RECENT_VALID_S (0x7fffffff / 1000000)

#define NS_PER_S 1000000000

/* The unit of last_received_tick: 64 jiffies, 0.6 s with HZ=100. */
#define TICK_BITS 6

/* The time as last_received_tick has it. */
inlined __u32 current_tick(void)
{
	return (__u32)(bpf_jiffies64() >> TICK_BITS);
}

/* The parts of a segment that are checked. Numbers are those of its sender. */
struct segment {
	__u32 seq, end, ack; /* `end` counts the FIN, too */
	__u32 tsval;
	__u8 flags, has_timestamp;
};

enum segment_check {
	SEGMENT_VALID,
	SEGMENT_OLD,	 /* it has nothing new (a keepalive): the other end answers it */
	SEGMENT_INVALID, /* and above: SEGMENT_INVALID plus enum pf_invalid */
};

/* Count an invalid packet by its kind, in the counters of the pair's worker. */
inlined void count_invalid(const struct splice *splice, __u32 kind)
{
	__u32 word = splice->worker * BLOCK_WORDS + INVALID_FIRST + kind;
	__u64 *count = map_lookup(MAP_COUNTERS_FD, &word);

	if (count)
		__sync_fetch_and_add(count, 1);
}

/* Advance a sequence number, never back, even if another processor does so at the same moment. */
inlined void advance(__u64 *number, __u32 to)
{
	__u64 seen;
	int i;

#pragma unroll
	for (i = 0; i < 2; i++) {
		seen = READ_ONCE(*number);
		if (!after(to, (__u32)seen))
			return;
		if (__sync_val_compare_and_swap(number, seen, (__u64)to) == seen)
			return;
	}
}

/* Whether packets of this peer may arrive by this interface. */
inlined int may_arrive_by(const struct splice_direction *from_peer, __u32 interface)
{
	return from_peer->from_interfaces[0] == interface ||
	       from_peer->from_interfaces[1] == interface ||
	       !(from_peer->from_interfaces[0] | from_peer->from_interfaces[1]);
}

/* Whether the checksum of an IPv4 header of 20 bytes is right. */
inlined int is_ipv4_header_valid(const void *ip)
{
	const __u32 *word = ip;

	return csum_fold((__u64)word[0] + word[1] + word[2] + word[3] + word[4]) == 0xffff;
}

/* State of a packet's checksum. */
enum sum {
	PF_SUM_WRONG,
	PF_SUM_PARTIAL, /* the field has the sum of the pseudo-header only (CHECKSUM_PARTIAL) */
	PF_SUM_KNOWN,	/* verified by the interface or GRO; only the packet's field holds it */
	PF_SUM_OTHER,	/* right, or not computed yet: changes must go through kernel helpers */
};

/*
 * Read a 16-bit field of a packet at a constant offset, in the linear part. Written in assembly:
 * the compiler would keep the offset of `data_end` in a register, and the verifier requires it in
 * the instruction.
 *
 * Returns 0; not 0: the field is not in the linear part.
 */
inlined int read_field(struct __sk_buff *skb, const __u32 at, __u16 *field)
{
	void *data, *data_end;

	asm volatile("%0 = *(u32 *)(%1 + %2)"
		     : "=r"(data)
		     : "r"(skb), "i"(__builtin_offsetof(struct __sk_buff, data)));
	asm volatile("%0 = *(u32 *)(%1 + %2)"
		     : "=r"(data_end)
		     : "r"(skb), "i"(__builtin_offsetof(struct __sk_buff, data_end)));
	if (data + at + 2 > data_end)
		return -1;
	*field = *(__u16 *)(data + at);
	return 0;
}

/*
 * Whether a packet's checksum is still to be computed (CHECKSUM_PARTIAL): then
 * `bpf_l4_csum_replace` leaves its field as it is. Pointers into the packet are invalid afterwards;
 * the packet itself is unchanged.
 *
 * Returns 1 or 0; negative: no memory.
 */
inlined int is_csum_partial(struct __sk_buff *skb, const __u32 field_offset, __u16 field)
{
	__u16 changed;

	if (bpf_l4_csum_replace(skb, field_offset, 0, 1, 0) ||
	    read_field(skb, field_offset, &changed))
		return -1;
	if (changed == field)
		return 1;
	return bpf_skb_store_bytes(skb, field_offset, &field, 2, 0) ? -1 : 0;
}

#ifdef SK_BUFF_CSUM_START
/* By its number: where bcc cannot read kallsyms, it replaces a call by name with bpf_probe_read. */
static long (*read_kernel)(void *to, __u32 bytes,
			   const void *from) = (void *)BPF_FUNC_probe_read_kernel;
#endif

/*
 * Whether the checksum of a CHECKSUM_PARTIAL packet will be written before its checksum field.
 *
 * The start of the sum and the place of the result are chosen by the sender, if that is the guest
 * of a virtual machine on this host, or uses a packet socket behind a veth (struct virtio_net_hdr:
 * csum_start, csum_offset; skb_partial_csum_set). The sum is written when the packet leaves
 * (skb_checksum_help, or the interface does it): after all checks here, and after `rewrite`. So the
 * two bytes must not be among the addresses, ports, sequence numbers and flags: the packet would
 * become one of another connection than the one for which it was checked. Behind the field is only
 * what the sender may choose anyway: the urgent pointer (whose flag is removed), options, payload.
 * No byte is received that the sender has not chosen; a sum that starts elsewhere is wrong, or its
 * sender has made it right.
 *
 * struct __sk_buff has neither number, so they are read from struct sk_buff. (Only some kernels
 * show it by a refusal of bpf_skb_change_tail to cut that part off: 7.3 and Debian's 6.1.192 cut it
 * off.) Where programs must not read kernel memory (lockdown=confidentiality), this is not checked.
 */
inlined int is_csum_written_before_field(struct __sk_buff *skb, const __u32 field_offset)
{
#ifdef SK_BUFF_CSUM_START
	__u32 zero = 0;
	__u16 *read = map_lookup(MAP_SCRATCH_FD, &zero);

	/* csum_start and csum_offset */
	if (!read || read_kernel(read, 4, (void *)skb + SK_BUFF_CSUM_START) ||
	    read_kernel(read + 2, 2, (void *)skb + SK_BUFF_NETWORK_HEADER))
		return 1; /* never */
	return (__u32)read[0] + read[1] < read[2] + field_offset - ETHERNET_BYTES;
#else
	(void)skb;
	(void)field_offset;
	return 0;
#endif
}

/* Whether a packet without a checksum (UDP over IPv4) would get one written before its field. */
inlined int has_misplaced_csum(struct __sk_buff *skb, const __u32 field_offset)
{
	int partial = is_csum_partial(skb, field_offset, 0);

	/* In a tunnel's datagram the inner packet may be PARTIAL: its field is behind this one. */
	return partial < 0 || (partial && is_csum_written_before_field(skb, field_offset));
}

/*
 * Verify a checksum, as far as that is possible.
 *
 * An aggregate was verified by GRO, which has made it, or has no checksum yet (TSO). A
 * CHECKSUM_PARTIAL packet comes from this machine, and has none yet either: its field has the sum
 * of the pseudo-header. Nearly all others were verified by the interface or by GRO
 * (CHECKSUM_UNNECESSARY). The rest is summed up here.
 *
 * `at` is the offset of the summed bytes, `field_offset` that of their checksum, `sum` the sum of
 * the pseudo-header. Pointers into the packet are invalid afterwards. The caller drops the packet
 * if PF_SUM_WRONG is returned.
 */
inlined enum sum check_csum(struct __sk_buff *skb, __u32 at, const __u32 field_offset, __u32 bytes,
			    __u64 sum)
{
	__u64 left = bytes;
	__u32 zero = 0;
	__u16 field;
	__be32 *piece;
	int i, partial;

	if (!skb->gso_size && bpf_csum_level(skb, LEVEL_QUERY) >= 0)
		return PF_SUM_KNOWN;
	if (read_field(skb, field_offset, &field))
		return PF_SUM_WRONG; /* never: the caller has read the linear part */
	partial = is_csum_partial(skb, field_offset, field);
	if (partial < 0 || (partial && is_csum_written_before_field(skb, field_offset)))
		return PF_SUM_WRONG;
	if (skb->gso_size)
		return PF_SUM_OTHER;
	if (partial)
		return field == csum_fold(sum) ? PF_SUM_PARTIAL : PF_SUM_WRONG;
	piece = map_lookup(MAP_SCRATCH_FD, &zero);
	if (!piece)
		return PF_SUM_WRONG; /* never */
	for (i = 0; i < SUM_STEPS; i++) {
		if (left <= SUM_BYTES)
			break;
		if (bpf_skb_load_bytes(skb, at, piece, SUM_BYTES))
			return PF_SUM_WRONG;
		sum += (__u32)bpf_csum_diff(NULL, 0, piece, SUM_BYTES, 0);
		at += SUM_BYTES;
		left -= SUM_BYTES;
	}
	if (left > SUM_BYTES)
		return PF_SUM_OTHER;
	/* From 1 to SUM_BYTES: it is never 0, but the verifier needs to see it written so. */
	left = ((left - 1) & (SUM_BYTES - 1)) + 1;
	piece[(left - 1) / 4] = 0;
	if (bpf_skb_load_bytes(skb, at, piece, left))
		return PF_SUM_WRONG;
	sum += (__u32)bpf_csum_diff(NULL, 0, piece, ((left - 1) | 3) + 1, 0);
	return csum_fold(sum) == 0xffff ? PF_SUM_OTHER : PF_SUM_WRONG;
}

/* Whether a checksum is known to be wrong. */
inlined int has_bad_csum(struct __sk_buff *skb, __u32 at, const __u32 field_offset, __u32 bytes,
			 __u64 sum)
{
	return check_csum(skb, at, field_offset, bytes, sum) == PF_SUM_WRONG;
}

/*
 * Whether an ICMP error has a bad checksum. No host leaves an ICMP checksum to be computed later:
 * such a packet could have it written over the quoted packet, which says whose connection the error
 * is about.
 */
inlined int has_bad_icmp_csum(struct __sk_buff *skb, __u32 at, const __u32 field_offset,
			      __u32 bytes, __u64 sum)
{
	enum sum found = check_csum(skb, at, field_offset, bytes, sum);

	return skb->gso_size || found == PF_SUM_WRONG || found == PF_SUM_PARTIAL;
}

/*
 * The number that the other end expects next of this peer, as far as it has acknowledged: in this
 * peer's numbers.
 */
inlined __u32 expected_seq(const struct splice_direction *from_peer,
			   const struct splice_direction *to_peer)
{
	__u32 expected = (__u32)READ_ONCE(to_peer->last_ack) + to_peer->ack_delta;

	/*
	 * Bytes from before the beginning were acknowledged by our own socket, perhaps gigabytes
	 * ago.
	 */
	if (READ_ONCE(to_peer->tail_open) && before(expected, from_peer->begin_seq))
		return from_peer->begin_seq;
	return expected;
}

/* The end of what was sent to this peer: the highest number that it may acknowledge. */
inlined __u32 sent_end(const struct splice_direction *from_peer,
		       const struct splice_direction *to_peer)
{
	__u32 sent = (__u32)READ_ONCE(from_peer->socket_sent_end);

	return before(sent, from_peer->tail_end)
		       ? sent
		       : (__u32)READ_ONCE(to_peer->last_end) + to_peer->seq_delta;
}

/*
 * Whether a reset has the number that the other end expects next, or will expect once it has
 * received everything that was sent; or the number in front of a FIN that was received, as macOS
 * sends it.
 */
inlined int is_reset_seq_exact(__u32 seq, const struct splice_direction *from_peer,
			       const struct splice_direction *to_peer)
{
	return seq == expected_seq(from_peer, to_peer) ||
	       seq == (__u32)READ_ONCE(from_peer->last_end) ||
	       (READ_ONCE(from_peer->fin) && seq == from_peer->fin_seq - 1);
}

/* Whether a segment's timestamp is older than the latest one in order (PAWS). */
inlined int fails_paws(const struct segment *segment, const struct splice_direction *from_peer)
{
	/* Reordering by one tick is accepted, as in Linux. */
	return segment->has_timestamp && from_peer->ts_recent &&
	       before(segment->tsval + 1, from_peer->ts_recent) &&
	       (__u32)(bpf_ktime_get_ns() / NS_PER_S) - from_peer->ts_recent_s < TS_RECENT_VALID_S;
}

/*
 * Check a segment that is neither SYN nor RST. Returns enum segment_check, or SEGMENT_INVALID plus
 * the kind.
 */
inlined int check_segment(const struct segment *segment, const struct splice_direction *from_peer,
			  const struct splice_direction *to_peer)
{
	__u32 expected = expected_seq(from_peer, to_peer);

	/* A zero-window probe begins at the edge of the window, or right in front of it. */
	if (after(segment->seq, (__u32)READ_ONCE(from_peer->max_edge)) ||
	    before(segment->end, expected - from_peer->max_window) ||
	    (READ_ONCE(from_peer->fin) && after(segment->end, from_peer->fin_seq)))
		return SEGMENT_INVALID + PF_INVALID_SEQUENCE;
	if (after(segment->ack, sent_end(from_peer, to_peer)) ||
	    before(segment->ack, (__u32)READ_ONCE(from_peer->last_ack) - to_peer->max_window))
		return SEGMENT_INVALID + PF_INVALID_ACKNOWLEDGEMENT;
	if (fails_paws(segment, from_peer))
		return SEGMENT_INVALID + PF_INVALID_TIMESTAMP;
	return before(segment->end, expected) ? SEGMENT_OLD : SEGMENT_VALID;
}

/*
 * Set `fin` when a peer's FIN is due and no byte in front of it is missing. Returns 1 if it was set
 * now.
 */
inlined int update_fin(struct splice_direction *from_peer)
{
	if (!READ_ONCE(from_peer->fin_due) || READ_ONCE(from_peer->fin))
		return 0;
	if ((__u32)READ_ONCE(from_peer->contiguous_end) == from_peer->fin_seq - 1) {
		__sync_fetch_and_add(&from_peer->fin, 1);
		return 1;
	}
	/* There are bytes behind the supposed FIN: it was not sent by this peer. */
	if (after((__u32)READ_ONCE(from_peer->contiguous_end), from_peer->fin_seq - 1))
		from_peer->fin_due = 0;
	return 0;
}

/*
 * Record a valid segment: its sender's timestamp, sequence numbers and FIN. Returns 1 if the FIN is
 * complete from now on.
 *
 * `segment->end` counts the FIN, too.
 */
inlined int record_segment(const struct segment *segment, struct splice_direction *from_peer,
			   const struct splice_direction *to_peer)
{
	__u32 limit = (__u32)READ_ONCE(from_peer->max_edge),
	      expected = expected_seq(from_peer, to_peer);
	__u32 end = segment->end - (segment->flags & FIN);

	if (segment->has_timestamp && !after(segment->seq, expected) &&
	    !before(segment->tsval, from_peer->ts_recent)) {
		from_peer->ts_recent = segment->tsval;
		from_peer->ts_recent_s =
			from_peer->last_received_s; /* set by note_last_received() a moment ago */
	}
	advance(&from_peer->last_end, segment->end);
	if ((segment->flags & FIN) && !READ_ONCE(from_peer->fin) &&
	    !before(end, (__u32)READ_ONCE(from_peer->contiguous_end))) {
		from_peer->fin_seq = segment->end;
		from_peer->fin_due = 1;
	}
	/* The other end may discard bytes behind its window. */
	if (after(end, limit))
		end = limit;
	if (!after(segment->seq, (__u32)READ_ONCE(from_peer->contiguous_end)))
		advance(&from_peer->contiguous_end, end);
	return update_fin(from_peer);
}

/*
 * Record what the other end has acknowledged of this peer's bytes, in this peer's numbers. Returns
 * 1 if the FIN, or its acknowledgement, is known from now on.
 */
inlined int record_acknowledgement(struct splice_direction *from_peer, __u32 acked)
{
	int tell_worker = 0;

	if (READ_ONCE(from_peer->fin_due) && acked == from_peer->fin_seq) {
		advance(&from_peer->contiguous_end, acked - 1);
		tell_worker = update_fin(from_peer);
		if (READ_ONCE(from_peer->fin) && !from_peer->fin_acked) {
			from_peer->fin_acked = 1;
			tell_worker = 1;
		}
		return tell_worker;
	}
	advance(&from_peer->contiguous_end, acked);
	return update_fin(from_peer);
}

/* Whether more bytes were repeated than can have been lost. */
inlined int has_excess_repeats(const struct splice_direction *from_peer)
{
	return READ_ONCE(from_peer->repeated_bytes) > from_peer->bytes + PF_MAX_REPEATED_BYTES;
}

/* The bytes that a direction has carried, as `show` prints them. The number never decreases. */
inlined __u64 visible_bytes(const struct splice_direction *from_peer)
{
	return has_excess_repeats(from_peer) ? from_peer->repeated_bytes - PF_MAX_REPEATED_BYTES
					     : from_peer->bytes;
}

/*
 * Count the bytes of a peer that have arrived, for `show`. A FIN is no byte. Returns 1 if they are
 * more than before.
 */
inlined int count_bytes(struct splice_direction *from_peer)
{
	__u64 seen = READ_ONCE(from_peer->bytes), counted = seen;

	counted += (__s64)(__s32)((__u32)READ_ONCE(from_peer->contiguous_end) -
				  (from_peer->begin_seq + (__u32)seen));
	if ((__s64)(counted - seen) <= 0)
		return 0;
	/*
	 * Compare and exchange, instead of an add or a store over the count of another processor:
	 * both processors know where the bytes end, and the other one may know of more. If it does
	 * not, the next packet counts the rest.
	 */
	__sync_val_compare_and_swap(&from_peer->bytes, seen, counted);
	return 1;
}
