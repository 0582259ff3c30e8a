/*
 * A packet's headers: where things are in them, and how they are changed so that checksums follow.
 */
#pragma once

#include <uapi/linux/bpf.h>

#define ETHERTYPE_IPV4 0x0800
#define ETHERTYPE_IPV6 0x86dd

/* Where things are. `v6` is a constant wherever these are used: every function has two forms. */
#define ETHERNET_BYTES	  14
#define IP_BYTES(v6)	  ((v6) ? 40 : 20)
#define HOPS_AT(v6)	  (ETHERNET_BYTES + ((v6) ? 7 : 8))
#define TCP_AT(v6)	  (ETHERNET_BYTES + IP_BYTES(v6))
#define OPTIONS_AT(v6)	  (TCP_AT(v6) + 20)
#define HEADERS_BYTES(v6) OPTIONS_AT(v6)

#define LOOPBACK 1 /* the index of `lo` in every network namespace */

#define PROTOCOL_ICMP	1
#define PROTOCOL_TCP	6
#define PROTOCOL_ICMPV6 58

#define FIN 0x01
#define SYN 0x02
#define RST 0x04
#define PSH 0x08
#define ACK 0x10
#define URG 0x20

#define ECN_OF_TOS   3		/* of the second byte of IPv4 */
#define ECN_OF_V6    0x00300000 /* of the first word of IPv6 */
#define ECN_OF_TCP   0x01c00000 /* AE, CWR and ECE, of the fourth word of TCP */
#define FLAGS_OF_TCP 0x00ff0000
#define FIN_OF_TCP   0x00010000
#define SYN_OF_TCP   0x00020000
#define ACK_OF_TCP   0x00100000
#define RST_OF_TCP   0x00040000
#define URG_OF_TCP   0x00200000

#define NO_OP_WORD     0x01010101
#define TIMESTAMP_WORD 0x0101080a /* no-op, no-op, kind 8, 10 bytes: as everybody writes it */
#define SACK_WORD      0x01010500 /* no-op, no-op, kind 5, and the length in the last byte */

#define F_PSEUDO BPF_F_PSEUDO_HDR
#define F_IPV6	 (1 << 7) /* BPF_F_IPV6: newer than some kernels, and than bcc's header */

struct ipv4 {
	__u8 version, tos;
	__be16 total_bytes, id, fragment;
	__u8 ttl, protocol;
	__u16 checksum;
	__be32 source, target;
};

struct ipv6 {
	__be32 version;
	__be16 payload_bytes;
	__u8 next, hops;
	__be32 source[4], target[4];
};

struct tcp {
	__be16 sport, dport;
	__be32 seq, ack;
	__u8 offset, flags;
	__be16 window;
	__u16 checksum;
	__be16 urgent;
};

struct icmp {
	__u8 type, code;
	__u16 checksum;
	__be32 rest;
};

#define volatile_read(field) (*(volatile typeof(field) *)&(field))
#define inlined		     static inline __attribute__((always_inline))

/*
 * A number that the compiler must not know more about than the verifier does. In loops: the
 * compiler would ask whether two bounds are met at once by another comparison, of which the
 * verifier learns neither.
 */
#define hide(number) asm volatile("" : "+r"(number))

/* Of two sequence numbers, as TCP compares them. */
#define before(one, other) ((__s32)((one) - (other)) < 0)
#define after(one, other)  ((__s32)((one) - (other)) > 0)

inlined __u16 fold(__u64 sum)
{
	sum = (sum & 0xffffffff) + (sum >> 32);
	sum = (sum & 0xffff) + (sum >> 16);
	sum = (sum & 0xffff) + (sum >> 16);
	sum = (sum & 0xffff) + (sum >> 16);
	return (__u16)sum;
}

/* Move a number in the packet on, and keep count of what that does to the checksum. */
inlined void shift(__be32 *field, __u32 delta, __u64 *sum)
{
	__u32 before = *field, after = bpf_htonl(bpf_ntohl(before) + delta);

	*sum += (__u32)~before;
	*sum += after;
	*field = after;
}

/* Put another number in its place, likewise. */
inlined void put(__be32 *field, __u32 after, __u64 *sum)
{
	*sum += (__u32) ~*field;
	*sum += after;
	*field = after;
}

/* Addresses of a packet as they stand in a key. */
inlined void take_addresses(__u32 *key_source, __u32 *key_target, void *ip, const int v6)
{
	struct ipv4 *four = ip;
	struct ipv6 *six = ip;
	int i;

	if (v6) {
#pragma unroll
		for (i = 0; i < 4; i++) {
			key_source[i] = six->source[i];
			key_target[i] = six->target[i];
		}
		return;
	}
	key_source[0] = key_source[1] = key_target[0] = key_target[1] = 0;
	key_source[2] = key_target[2] = bpf_htonl(0xffff);
	key_source[3] = four->source;
	key_target[3] = four->target;
}

/* And the other way round. */
inlined void give_addresses(void *ip, const __u32 *source, const __u32 *target, const int v6)
{
	struct ipv4 *four = ip;
	struct ipv6 *six = ip;
	int i;

	if (v6) {
#pragma unroll
		for (i = 0; i < 4; i++) {
			six->source[i] = source[i];
			six->target[i] = target[i];
		}
		return;
	}
	four->source = source[3];
	four->target = target[3];
}

/* Let a checksum in the packet follow changed addresses of the pseudo-header. */
inlined void replace_pseudo(struct __sk_buff *skb, __u32 at, __u16 sum, const int v6)
{
	/* IPv6 has no checksum of its own that would make up for it: newer kernels want to know. */
	if (v6 && !bpf_l4_csum_replace(skb, at, 0, sum, F_PSEUDO | F_IPV6))
		return;
	bpf_l4_csum_replace(skb, at, 0, sum, F_PSEUDO);
}

/* What an ICMP packet's pseudo-header adds to its checksum, but for the length. */
inlined __u64 pseudo_sum(const struct ipv6 *six)
{
	__u64 sum = bpf_htons(PROTOCOL_ICMPV6);
	int i;

#pragma unroll
	for (i = 0; i < 4; i++)
		sum += (__u64)six->source[i] + six->target[i];
	return sum;
}

/* The field of a header for a window of so many bytes. */
inlined __u32 window_field(__u32 bytes, __u8 scale)
{
	bytes >>= scale & 15;
	return bytes > 65535 ? 65535 : bytes;
}
