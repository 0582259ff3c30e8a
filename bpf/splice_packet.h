/*
 * Headers of packets: offsets of fields, and changes of fields that keep the checksums right.
 */
#pragma once

#include <uapi/linux/bpf.h>

#define ETHERTYPE_IPV4 0x0800
#define ETHERTYPE_IPV6 0x86dd

/*
 * Offsets. `v6` is a constant wherever these are used: every function is compiled once for IPv4 and
 * once for IPv6.
 */
#define ETHERNET_BYTES	   14
#define IP_BYTES(v6)	   ((v6) ? 40 : 20)
#define HOPS_OFFSET(v6)	   (ETHERNET_BYTES + ((v6) ? 7 : 8))
#define TCP_OFFSET(v6)	   (ETHERNET_BYTES + IP_BYTES(v6))
#define OPTIONS_OFFSET(v6) (TCP_OFFSET(v6) + 20)
#define HEADERS_BYTES(v6)  OPTIONS_OFFSET(v6)

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

#define ECN_OF_TOS   3		/* in the second byte of the IPv4 header */
#define ECN_OF_V6    0x00300000 /* in the first word of the IPv6 header */
#define ECN_OF_TCP   0x01c00000 /* AE, CWR and ECE in the fourth word of the TCP header */
#define FLAGS_OF_TCP 0x00ff0000
#define FIN_OF_TCP   0x00010000
#define SYN_OF_TCP   0x00020000
#define ACK_OF_TCP   0x00100000
#define RST_OF_TCP   0x00040000
#define URG_OF_TCP   0x00200000

#define NO_OP_WORD     0x01010101
#define TIMESTAMP_WORD 0x0101080a /* no-op, no-op, kind 8, 10 bytes: the usual layout */
#define SACK_WORD      0x01010500 /* no-op, no-op, kind 5, and the length in the last byte */

#define F_PSEUDO BPF_F_PSEUDO_HDR
#define F_IPV6	 (1 << 7) /* BPF_F_IPV6, which older kernels and bcc's header do not have */

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

#define READ_ONCE(field)	 (*(volatile typeof(field) *)&(field))
#define WRITE_ONCE(field, value) (*(volatile typeof(field) *)&(field) = (value))
#define inlined			 static inline __attribute__((always_inline))

/* Fields of the kernel's structures, at an offset that Python reads from its BTF. */
#define read8(structure, offset)  (*(volatile __u8 *)((void *)(structure) + (offset)))
#define read16(structure, offset) (*(volatile __u16 *)((void *)(structure) + (offset)))
#define read32(structure, offset) (*(volatile __u32 *)((void *)(structure) + (offset)))
#define read64(structure, offset) (*(volatile __u64 *)((void *)(structure) + (offset)))

/* Another program of the PROG_ARRAY continues. Returns only if no program is at this index. */
inlined void tail_call(struct __sk_buff *skb, void *programs, __u32 index)
{
	static long (*const helper)(void *context, void *map, __u32 index) =
		(void *)BPF_FUNC_tail_call;

	helper(skb, programs, index);
}

/*
 * Hide the value of a variable from the compiler. Otherwise it replaces the comparison of a loop
 * bound by one from which the verifier learns no bound: for instance it merges two bounds into one
 * comparison.
 */
#define barrier_var(number) asm volatile("" : "+r"(number))

/* Compare two sequence numbers modulo 2^32, as TCP does. */
#define before(one, other) ((__s32)((one) - (other)) < 0)
#define after(one, other)  ((__s32)((one) - (other)) > 0)

/* Fold a sum into the 16 bits of a checksum, not inverted. */
inlined __u16 csum_fold(__u64 sum)
{
	sum = (sum & 0xffffffff) + (sum >> 32);
	sum = (sum & 0xffff) + (sum >> 16);
	sum = (sum & 0xffff) + (sum >> 16);
	sum = (sum & 0xffff) + (sum >> 16);
	return (__u16)sum;
}

/* Add to a 32-bit field of the packet; the change of the checksum is added to `sum`. */
inlined void add_to_field(__be32 *field, __u32 delta, __u64 *sum)
{
	__u32 before = *field, after = bpf_htonl(bpf_ntohl(before) + delta);

	*sum += (__u32)~before;
	*sum += after;
	*field = after;
}

/* Overwrite a 32-bit field of the packet; the change of the checksum is added to `sum`. */
inlined void set_field(__be32 *field, __u32 after, __u64 *sum)
{
	*sum += (__u32) ~*field;
	*sum += after;
	*field = after;
}

/* Read the addresses of a packet into a key. */
inlined void read_addresses(__u32 *key_source, __u32 *key_target, void *ip, const int v6)
{
	struct ipv4 *iph = ip;
	struct ipv6 *ip6h = ip;
	int i;

	if (v6) {
#pragma unroll
		for (i = 0; i < 4; i++) {
			key_source[i] = ip6h->source[i];
			key_target[i] = ip6h->target[i];
		}
		return;
	}
	key_source[0] = key_source[1] = key_target[0] = key_target[1] = 0;
	key_source[2] = key_target[2] = bpf_htonl(0xffff);
	key_source[3] = iph->source;
	key_target[3] = iph->target;
}

/* Write the addresses of a key into a packet; checksums are the caller's. */
inlined void write_addresses(void *ip, const __u32 *source, const __u32 *target, const int v6)
{
	struct ipv4 *iph = ip;
	struct ipv6 *ip6h = ip;
	int i;

	if (v6) {
#pragma unroll
		for (i = 0; i < 4; i++) {
			ip6h->source[i] = source[i];
			ip6h->target[i] = target[i];
		}
		return;
	}
	iph->source = source[3];
	iph->target = target[3];
}

/* Adjust the checksum field at `at` for changed addresses of the pseudo-header. */
inlined void replace_pseudo_csum(struct __sk_buff *skb, __u32 at, __u16 sum, const int v6)
{
	/*
	 * In IPv4 the header checksum changes by the opposite amount; IPv6 has none. Newer kernels
	 * must be told which it is.
	 */
	if (v6 && !bpf_l4_csum_replace(skb, at, 0, sum, F_PSEUDO | F_IPV6))
		return;
	bpf_l4_csum_replace(skb, at, 0, sum, F_PSEUDO);
}

/* The sum over an ICMPv6 packet's pseudo-header, without the length. */
inlined __u64 icmpv6_pseudo_sum(const struct ipv6 *ip6h)
{
	__u64 sum = bpf_htons(PROTOCOL_ICMPV6);
	int i;

#pragma unroll
	for (i = 0; i < 4; i++)
		sum += (__u64)ip6h->source[i] + ip6h->target[i];
	return sum;
}

/* The window field of a header for a window of `bytes`, rounded down to the window scale. */
inlined __u32 window_field(__u32 bytes, __u8 scale)
{
	bytes >>= scale & 15;
	return bytes > 65535 ? 65535 : bytes;
}
