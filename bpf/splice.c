/*
 * The splice datapath (sched_cls at tcx, on both sides of every interface): packets of a joined
 * pair get the addresses, ports, sequence and acknowledgement numbers, timestamps and windows of
 * the other connection, and go on. The two ends talk TCP end to end; nothing is buffered here,
 * nothing acknowledged and nothing resent. ../README.md tells how a pair gets here.
 *
 * ingress  what the two peers send to us
 * egress   what our own two sockets of a pair send: nothing any more
 * control  run by the keeper (BPF_PROG_TEST_RUN): looks whether both sockets are at rest, and if
 *	    so lets the pair begin, in one go
 *
 * A forwarder copies bytes one to one. So at a moment when both sockets have been read empty and
 * all they ever sent has been acknowledged, one constant for each direction takes the numbers of
 * the one connection to those of the other, for all time.
 *
 * Why no packet can be lost or counted twice at that moment: `control` first makes our sockets mute
 * (egress drops all they send), then looks at them. A packet that had passed `ingress` before it
 * knew the pair is either seen by that look, and the pair does not begin, or its acknowledgement is
 * dropped: then its sender sends it again, and that goes through. It is as if it had been lost.
 */
#include <uapi/linux/bpf.h>

#include "abi.h"
#include "maps.h"
#include "splice.h"

#define NEXT -1 /* TCX_NEXT: whatever else looks at packets here, then the stack */
#define DROP 2	/* TCX_DROP */

#define ETHERNET_BYTES 14
#define IP_BYTES       20
#define TCP_AT	       (ETHERNET_BYTES + IP_BYTES)
#define OPTIONS_AT     (TCP_AT + 20)
#define HEADERS_BYTES  OPTIONS_AT

/* How far behind the last acknowledgement a reset is believed: more than any window in use. */
#define RESET_REACH (1 << 26)

#define FIN 0x01
#define SYN 0x02
#define RST 0x04
#define ACK 0x10
#define URG 0x20

#define TIMESTAMP_WORD 0x0101080a /* no-op, no-op, kind 8, 10 bytes: as everybody writes it */
#define SACK_WORD      0x01010500 /* no-op, no-op, kind 5, and the length in the last byte */

struct ipv4 {
	__u8 version, tos;
	__be16 total_bytes, id, fragment;
	__u8 ttl, protocol;
	__u16 checksum;
	__be32 source, target;
};

struct tcp {
	__be16 sport, dport;
	__be32 seq, ack;
	__u8 offset, flags;
	__be16 window;
	__u16 checksum;
	__be16 urgent;
};

/* bcc 0.26 declares it with three parameters; the kernel has four. */
static int (*redirect_neigh)(__u32 interface, void *next_hop, int bytes,
			     __u64 flags) = (void *)BPF_FUNC_redirect_neigh;

#define volatile_read(field) (*(volatile typeof(field) *)&(field))

static inline __attribute__((always_inline)) __u16 fold(__u64 sum)
{
	sum = (sum & 0xffffffff) + (sum >> 32);
	sum = (sum & 0xffff) + (sum >> 16);
	sum = (sum & 0xffff) + (sum >> 16);
	sum = (sum & 0xffff) + (sum >> 16);
	return (__u16)sum;
}

static inline __attribute__((always_inline)) void tell(struct splice *splice, __u32 index)
{
	struct splice_event event = { .index = index, .worker = splice->worker, .id = splice->id };
	__u32 worker = splice->worker;
	void *ring = map_lookup(MAP_RINGS_FD, &worker);

	if (ring)
		bpf_ringbuf_output(ring, &event, sizeof(event), 0);
}

/* Move a number in the packet on, and keep count of what that does to the checksum. */
static inline __attribute__((always_inline)) void shift(__be32 *field, __u32 delta, __u64 *sum)
{
	__u32 before = *field, after = bpf_htonl(bpf_ntohl(before) + delta);

	*sum += (__u32)~before;
	*sum += after;
	*field = after;
}

/* The edges of a selective acknowledgement at a place in the header that the compiler knows. */
static inline __attribute__((always_inline)) int shift_edges(__be32 *option, void *data_end,
							     __u32 bytes, __u32 delta, __u64 *sum)
{
	__u32 i, edges = 0;

	if ((void *)(option + 1) > data_end)
		return -1;
	edges = bpf_ntohl(option[0]) - SACK_WORD;
	/* Two bytes of kind and length, and at most four blocks of two edges. */
	if (edges < 2 || edges > 34 || edges + 2 > bytes)
		return -1;
	edges = (edges - 2) / 4;
#pragma unroll
	for (i = 0; i < 8; i++) {
		if (i < edges) {
			if ((void *)(option + i + 2) > data_end)
				return -1;
			shift(&option[i + 1], delta, sum);
		}
	}
	return 0;
}

/*
 * The options as Linux, BSD and Windows write them once a connection stands: timestamps, edges or
 * both, each behind two no-ops. Not 0: they are something else.
 */
static inline __attribute__((always_inline)) int
shift_options(__be32 *option, void *data_end, __u32 bytes, struct splice_direction *way, __u64 *sum)
{
	if (bytes >= 12 && (void *)(option + 3) <= data_end &&
	    option[0] == bpf_htonl(TIMESTAMP_WORD)) {
		shift(&option[1], way->tsval_delta, sum);
		if (option[2])
			shift(&option[2], way->tsecr_delta, sum);
		if (bytes == 12)
			return 0;
		return shift_edges(option + 3, data_end, bytes - 12, way->ack_delta, sum);
	}
	return shift_edges(option, data_end, bytes, way->ack_delta, sum);
}

static inline __attribute__((always_inline)) void forget(struct splice *splice)
{
	struct splice_key key = splice->way[PF_UP].from;

	map_delete(MAP_FLOWS_FD, &key);
	key = splice->way[PF_DOWN].from;
	map_delete(MAP_FLOWS_FD, &key);
}

int ingress(struct __sk_buff *skb)
{
	void *data, *data_end;
	struct splice_key key = {};
	struct splice_flow *flow;
	struct splice *splice;
	struct splice_direction *way, *back;
	struct pair *pair;
	struct verdict_direction *seen;
	struct ipv4 *ip;
	struct tcp *tcp;
	__u32 *word;
	__u32 slot, told, index, state, total, header, seq, ack, end, acked, window, change, before,
		n;
	__u64 sum = 0, addresses = 0;
	__u8 flags;
	int ring = 0;

	if (skb->protocol != bpf_htons(0x0800))
		return NEXT;
	data = (void *)(long)skb->data;
	data_end = (void *)(long)skb->data_end;
	if (data + HEADERS_BYTES > data_end) {
		if (bpf_skb_pull_data(skb, HEADERS_BYTES))
			return NEXT;
		data = (void *)(long)skb->data;
		data_end = (void *)(long)skb->data_end;
		if (data + HEADERS_BYTES > data_end)
			return NEXT;
	}
	ip = data + ETHERNET_BYTES;
	if (ip->version != 0x45 || ip->protocol != 6 || (ip->fragment & bpf_htons(0x3fff)))
		return NEXT;
	tcp = data + TCP_AT;
	key.source = ip->source;
	key.target = ip->target;
	key.sport = tcp->sport;
	key.dport = tcp->dport;
	flow = map_lookup(MAP_FLOWS_FD, &key);
	if (!flow)
		return NEXT;
	index = flow->index;
	splice = map_lookup(MAP_SPLICES_FD, &index);
	if (!splice)
		return NEXT;
	way = flow->direction == PF_UP ? &splice->way[PF_UP] : &splice->way[PF_DOWN];
	back = flow->direction == PF_UP ? &splice->way[PF_DOWN] : &splice->way[PF_UP];
	state = volatile_read(splice->state);
	total = skb->gso_size ? skb->len - ETHERNET_BYTES : bpf_ntohs(ip->total_bytes);
	header = (__u32)(tcp->offset >> 4) * 4;
	if (header < 20 || total < IP_BYTES + header)
		return NEXT;
	flags = tcp->flags;
	seq = bpf_ntohl(tcp->seq);
	ack = bpf_ntohl(tcp->ack);
	n = total - IP_BYTES - header;

	if (state == PF_SPLICE_FREE)
		return NEXT;
	if (state != PF_SPLICE_ACTIVE) {
		/*
		 * Bytes and FINs come again; acknowledgements are what our sockets wait for. When
		 * the pair is being reset, nothing that our sockets would say is right any more.
		 */
		if (state == PF_SPLICE_RESET || n || (flags & FIN))
			return DROP;
		return NEXT;
	}
	if (flags & SYN) {
		if ((way->fin_acked && back->fin_acked) || splice->reset) {
			/* The end of this pair is past, and its ports serve again. */
			forget(splice);
			return NEXT;
		}
	} else if (header > 20) {
		if (data + TCP_AT + header > data_end) {
			if (bpf_skb_pull_data(skb, TCP_AT + header))
				return DROP;
			data = (void *)(long)skb->data;
			data_end = (void *)(long)skb->data_end;
		}
		if (shift_options(data + OPTIONS_AT, data_end, header - 20, way, &sum)) {
			/* Such a pair cannot go on: it ends with a reset, unless a stranger
			 * guesses. */
			if (seq - way->last_end < RESET_REACH && !splice->reset) {
				splice->reset = PF_SPLICE_ODD;
				tell(splice, index);
			}
			return DROP;
		}
		data = (void *)(long)skb->data;
		data_end = (void *)(long)skb->data_end;
		if (data + HEADERS_BYTES > data_end)
			return DROP;
		ip = data + ETHERNET_BYTES;
		tcp = data + TCP_AT;
	}

	/* What the peers have said, for the end of the pair and for a reset of ours. */
	end = seq + n + (flags & FIN);
	acked = ack + way->ack_delta; /* in the numbers of whom it is for */
	if ((flags & ACK) && (__s32)(ack - way->last_ack) > 0)
		way->last_ack = ack;
	told = way->last_end;
	if ((__s32)(end - told) > 0)
		way->last_end = end;
	slot = splice->slot;
	pair = map_lookup(MAP_PAIRS_FD, &slot);
	/* The pair's record is another's once the worker has let go of this one. */
	if (pair && pair->id == splice->id) {
		seen = flow->direction == PF_UP ? &pair->verdict[PF_UP] : &pair->verdict[PF_DOWN];
		/* What was sent before is not counted again, nor the FIN. */
		if ((__s32)(end - told) > 0)
			__sync_fetch_and_add(&seen->redirected_bytes, end - told - (flags & FIN));
		if (n)
			__sync_fetch_and_add(&seen->redirected_packets, 1);
		seen->last_ns = bpf_ktime_get_ns();
	}
	if ((flags & FIN) && !way->fin) {
		way->fin_seq = end;
		__sync_fetch_and_add(&way->fin, 1);
		ring = 1;
	}
	if ((flags & ACK) && volatile_read(back->fin) && !back->fin_acked &&
	    (__s32)(acked - back->fin_seq) >= 0) {
		back->fin_acked = 1;
		ring = 1;
	}
	/* A reset far from what the other side expects is a stranger's guess: it is judged there.
	 */
	if ((flags & RST) && !splice->reset &&
	    seq + way->seq_delta - back->last_ack < RESET_REACH) {
		splice->reset = 1 + flow->direction;
		ring = 1;
	}

	word = (__u32 *)tcp;
	change = (__u32)way->sport | (__u32)way->dport << 16;
	sum += (__u32)~word[0];
	sum += change;
	word[0] = change;
	shift(&word[1], way->seq_delta, &sum);
	if (flags & ACK)
		shift(&word[2], way->ack_delta, &sum);
	if (!(flags & SYN)) {
		window = ((__u32)bpf_ntohs(tcp->window) << (way->shift_left & 15)) >>
			 (way->shift_right & 15);
		if (window > 65535)
			window = 65535;
		before = word[3];
		/*
		 * Urgent bytes stay where they stand in the stream, as on every datapath: a reader
		 * who knows nothing of them would lose one.
		 */
		change = bpf_htonl((bpf_ntohl(before) & ~((__u32)URG << 16) & 0xffff0000) | window);
		sum += (__u32)~before;
		sum += change;
		word[3] = change;
		sum += (__u16)~tcp->urgent;
		tcp->urgent = 0;
	}
	addresses += (__u32)~ip->source;
	addresses += (__u32)~ip->target;
	addresses += way->source;
	addresses += way->target;
	ip->checksum = (__u16)~fold((__u64)(__u16)~ip->checksum + fold(addresses));
	ip->source = way->source;
	ip->target = way->target;
	bpf_l4_csum_replace(skb, TCP_AT + 16, 0, fold(sum), 0);
	bpf_l4_csum_replace(skb, TCP_AT + 16, 0, fold(addresses), BPF_F_PSEUDO_HDR);
	if (ring)
		tell(splice, index);
	if (!way->interface)
		return NEXT;
	return redirect_neigh(way->interface, NULL, 0, 0);
}

int egress(struct __sk_buff *skb)
{
	void *data = (void *)(long)skb->data, *data_end = (void *)(long)skb->data_end;
	struct splice_key key = {};
	struct splice_flow *flow;
	struct splice *splice;
	struct splice_direction *way;
	struct ipv4 *ip;
	struct tcp *tcp;
	__u32 *word;
	__u32 index, state, seq, ack;
	__u64 sum = 0;

	/* Forwarded, ours or another's: not from a socket of this host. */
	if (skb->ingress_ifindex || skb->protocol != bpf_htons(0x0800))
		return NEXT;
	if (data + HEADERS_BYTES > data_end)
		return NEXT;
	ip = data + ETHERNET_BYTES;
	if (ip->version != 0x45 || ip->protocol != 6)
		return NEXT;
	tcp = data + TCP_AT;
	key.source = ip->target;
	key.target = ip->source;
	key.sport = tcp->dport;
	key.dport = tcp->sport;
	flow = map_lookup(MAP_FLOWS_FD, &key);
	if (!flow)
		return NEXT;
	index = flow->index;
	splice = map_lookup(MAP_SPLICES_FD, &index);
	if (!splice)
		return NEXT;
	state = volatile_read(splice->state);
	if (state == PF_SPLICE_FREE || state == PF_SPLICE_HOLD)
		return NEXT;
	way = flow->direction == PF_UP ? &splice->way[PF_UP] : &splice->way[PF_DOWN];
	if (state == PF_SPLICE_RESET && (tcp->flags & RST)) {
		/* The socket's numbers are those of the handover: give the peer's own. */
		word = (__u32 *)tcp;
		seq = bpf_htonl(way->last_ack);
		ack = bpf_htonl(way->last_end);
		sum += (__u32)~word[1];
		sum += seq;
		word[1] = seq;
		if (tcp->flags & ACK) {
			sum += (__u32)~word[2];
			sum += ack;
			word[2] = ack;
		}
		bpf_l4_csum_replace(skb, TCP_AT + 16, 0, fold(sum), 0);
		/* What the peer still says is answered by the kernel, which knows no such socket.
		 */
		map_delete(MAP_FLOWS_FD, &key);
		return NEXT;
	}
	if (tcp->flags & SYN) {
		/* A new connection from a port that served a pair which has ended. */
		if ((splice->way[PF_UP].fin_acked && splice->way[PF_DOWN].fin_acked) ||
		    splice->reset) {
			forget(splice);
			return NEXT;
		}
	}
	return DROP;
}

#define read32(tcp, offset) (*(volatile __u32 *)((void *)(tcp) + (offset)))
#define read64(tcp, offset) (*(volatile __u64 *)((void *)(tcp) + (offset)))

/* One socket as it is now; 0 if it is at rest: all was read, all is acknowledged, nothing is
 * missing.
 */
static inline __attribute__((always_inline)) __u32 look(struct __sk_buff *skb,
							struct splice_key *from,
							struct splice_look *seen)
{
	struct bpf_sock_tuple tuple = {};
	struct bpf_sock *sk;
	struct tcp_sock *tcp;
	__u32 busy = 0;

	tuple.ipv4.saddr = from->source;
	tuple.ipv4.daddr = from->target;
	tuple.ipv4.sport = from->sport;
	tuple.ipv4.dport = from->dport;
	sk = (struct bpf_sock *)bpf_skc_lookup_tcp(skb, &tuple, sizeof(tuple.ipv4), -1, 0);
	if (!sk)
		return PF_BUSY_GONE;
	tcp = (struct tcp_sock *)bpf_skc_to_tcp_sock(sk);
	if (!tcp) {
		bpf_sk_release(sk);
		return PF_BUSY_GONE;
	}
	seen->rcv_nxt = read32(tcp, TCP_SOCK_RCV_NXT);
	seen->write_seq = read32(tcp, TCP_SOCK_WRITE_SEQ);
	seen->ts_recent = read32(tcp, TCP_SOCK_RX_OPT + TCP_OPTIONS_RECEIVED_TS_RECENT);
	if (*(volatile __u8 *)((void *)tcp + SOCK_COMMON_SKC_STATE) != 1)
		busy |= PF_BUSY_GONE;
	if (read32(tcp, TCP_SOCK_COPIED_SEQ) != seen->rcv_nxt)
		busy |= PF_BUSY_UNREAD;
	if (read32(tcp, TCP_SOCK_SND_UNA) != seen->write_seq)
		busy |= PF_BUSY_UNACKED;
	if (read64(tcp, TCP_SOCK_OUT_OF_ORDER_QUEUE))
		busy |= PF_BUSY_UNREAD;
	bpf_sk_release(sk);
	return busy;
}

int control(struct __sk_buff *skb)
{
	struct splice *splice;
	struct splice_key key;
	struct splice_look client = {}, server = {};
	__u32 index, busy, up, down, client_time, server_time;

	if (bpf_skb_load_bytes(skb, ETHERNET_BYTES, &index, 4))
		return PF_BUSY_GONE;
	splice = map_lookup(MAP_SPLICES_FD, &index);
	if (!splice || splice->state != PF_SPLICE_HOLD)
		return PF_BUSY_GONE;
	*(volatile __u32 *)&splice->state = PF_SPLICE_MUTE;
	/* The look must not come before the silence: a full barrier. */
	__sync_fetch_and_add(&splice->tries, 1);
	key = splice->way[PF_UP].from;
	busy = look(skb, &key, &client);
	key = splice->way[PF_DOWN].from;
	busy |= look(skb, &key, &server);
	if (busy) {
		*(volatile __u32 *)&splice->state = PF_SPLICE_HOLD;
		return (int)busy;
	}
	up = server.write_seq - client.rcv_nxt;
	down = client.write_seq - server.rcv_nxt;
	/* One more than the clock's last reading: the socket may have spoken since. */
	server_time = splice->server_clock + 1 - client.ts_recent;
	client_time = splice->client_clock + 1 - server.ts_recent;
	splice->way[PF_UP].seq_delta = up;
	splice->way[PF_UP].ack_delta = -down;
	splice->way[PF_UP].tsval_delta = server_time;
	splice->way[PF_UP].tsecr_delta = -client_time;
	splice->way[PF_UP].last_ack = client.write_seq;
	splice->way[PF_UP].last_end = client.rcv_nxt;
	splice->way[PF_DOWN].seq_delta = down;
	splice->way[PF_DOWN].ack_delta = -up;
	splice->way[PF_DOWN].tsval_delta = client_time;
	splice->way[PF_DOWN].tsecr_delta = -server_time;
	splice->way[PF_DOWN].last_ack = server.write_seq;
	splice->way[PF_DOWN].last_end = server.rcv_nxt;
	__sync_fetch_and_add(&splice->tries, 1);
	*(volatile __u32 *)&splice->state = PF_SPLICE_ACTIVE;
	return 0;
}
