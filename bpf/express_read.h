/*
 * Parsing of a packet, with the checks that a host would make.
 */
#pragma once

#include <uapi/linux/bpf.h>

#include "splice.h"
#include "splice_packet.h"
#include "splice_valid.h"

/* The parsed fields of a TCP segment. */
struct parsed_segment {
	__u32 seq, ack, header, bytes, tsval, tsecr, window;
	__u32 sum; /* enum sum */
	__u8 flags, has_timestamp;
};

/* The sum over an address, for a checksum. */
inlined __u64 address_sum_of(const __u32 *address, const int v6)
{
	if (!v6)
		return address[3];
	return (__u64)address[0] + address[1] + address[2] + address[3];
}

/*
 * Read addresses and ports of a TCP packet. Returns 0; not 0: it is a fragment, has IP options, or
 * is no TCP packet.
 */
inlined int parse_addresses(struct __sk_buff *skb, struct splice_key *key, const int v6)
{
	void *data = (void *)(long)skb->data, *data_end = (void *)(long)skb->data_end;
	struct ipv4 *iph = data + ETHERNET_BYTES;
	struct ipv6 *ip6h = data + ETHERNET_BYTES;
	struct tcp *tcp = data + TCP_OFFSET(v6);

	if (data + HEADERS_BYTES(v6) > data_end)
		return -1; /* never: `ingress` has made the headers readable */
	if (v6 ? ip6h->next != PROTOCOL_TCP
	       : iph->version != 0x45 || iph->protocol != PROTOCOL_TCP ||
			    (iph->fragment & bpf_htons(0x3fff)))
		return -1;
	read_addresses(key->source, key->target, data + ETHERNET_BYTES, v6);
	key->sport = tcp->sport;
	key->dport = tcp->dport;
	return 0;
}

/*
 * Parse and verify a packet whose addresses are known. Pointers into it are invalid afterwards.
 *
 * Returns 0; not 0: it is truncated, or a host would not accept it.
 */
inlined int parse_segment(struct __sk_buff *skb, const struct splice_key *key,
			  struct parsed_segment *parsed, const int v6)
{
	void *data = (void *)(long)skb->data, *data_end = (void *)(long)skb->data_end;
	struct ipv4 *iph = data + ETHERNET_BYTES;
	struct ipv6 *ip6h = data + ETHERNET_BYTES;
	struct tcp *tcp = data + TCP_OFFSET(v6);
	__u32 *word, total, header;

	if (skb->pkt_type != HOST_PACKET || skb->vlan_present)
		return -1;
	if (data + HEADERS_BYTES(v6) > data_end)
		return -1;
	total = v6 ? bpf_ntohs(ip6h->payload_bytes) + IP_BYTES(1) : bpf_ntohs(iph->total_bytes);
	header = (__u32)(tcp->offset >> 4) * 4;
	if (header < 20 || total < IP_BYTES(v6) + header || total > skb->len - ETHERNET_BYTES ||
	    (skb->gso_size && total != skb->len - ETHERNET_BYTES) ||
	    (!v6 && !is_ipv4_header_valid(data + ETHERNET_BYTES)))
		return -1;
	parsed->sum = check_csum(skb, TCP_OFFSET(v6), TCP_OFFSET(v6) + 16, total - IP_BYTES(v6),
				 address_sum_of(key->source, v6) + address_sum_of(key->target, v6) +
					 bpf_htons(PROTOCOL_TCP) +
					 bpf_htons((total - IP_BYTES(v6)) & 0xffff));
	if (parsed->sum == PF_SUM_WRONG)
		return -1;
	if (bpf_skb_pull_data(skb, TCP_OFFSET(v6) + header))
		return -1;
	data = (void *)(long)skb->data;
	data_end = (void *)(long)skb->data_end;
	if (data + HEADERS_BYTES(v6) > data_end)
		return -1;
	word = data + TCP_OFFSET(v6);
	parsed->seq = bpf_ntohl(word[1]);
	parsed->ack = bpf_ntohl(word[2]);
	parsed->flags = (bpf_ntohl(word[3]) >> 16) & 0xff;
	parsed->window = bpf_ntohl(word[3]) & 0xffff;
	parsed->header = header;
	parsed->bytes = total - IP_BYTES(v6) - header;
	parsed->has_timestamp = 0;
	parsed->tsval = parsed->tsecr = 0;
	if (header >= 32 && (void *)(word + 8) <= data_end &&
	    word[5] == bpf_htonl(TIMESTAMP_WORD)) {
		parsed->has_timestamp = 1;
		parsed->tsval = bpf_ntohl(word[6]);
		parsed->tsecr = bpf_ntohl(word[7]);
	}
	return 0;
}
