/*
 * The verdict program of the sockmap datapath (sk_skb, no parser): for each packet that a pair's
 * socket receives, move it to the other socket in the kernel, or leave it to userspace.
 *
 * The rules that keep every byte in order, and memory bounded (../README.md tells the whole story):
 *  - A direction is latched (the kernel owns it) only at a moment when userspace has written all
 *    that it was passed: then every earlier byte is already in the target's TCP queue.
 *  - The kernel has no flow control on redirect. The program compares what it has redirected with
 *    what the target's TCP has taken (write_seq), and above the limit gives the direction back:
 *    bytes passed to userspace stay charged to the source, whose window then closes.
 */
#include <uapi/linux/bpf.h>

#include "abi.h"
#include "maps.h"

/*
 * The most that sk_skb_adjust_room() takes off at once, and how often. What came again while the
 * socket was in use has been joined to one packet (tcp_add_backlog), of at most 17 pieces of 32
 * KiB.
 */
#define TRIM_STEP  4095
#define TRIM_STEPS 144

/*
 * Each worker has a copy of this program, with maps of its own, and with FIRST_SLOT, where its
 * window of SLOTS pairs begins (datapath/kernel.py). So nothing that a worker writes into its maps
 * touches a packet of another worker's pair.
 */

/* Bytes; see allowed_backlog(). */
#define SMALL_PACKET 64

/*
 * Cut off the bytes that were seen before. A retransmission may begin with them (tcp_data_queue()
 * queues such a packet whole, "Partial packet"); recv() skips them by copied_seq, but
 * tcp_read_skb() hands the packet to us as it is.
 *
 * Returns how many bytes are new: none in front of a FIN that was lost and comes again together
 * with the bytes before it. Negative: the old ones could not be cut off.
 */
static inline __attribute__((always_inline)) __s32 trim(struct __sk_buff *skb,
							struct verdict_direction *seen)
{
	struct bpf_sock *source = skb->sk;
	struct tcp_sock *tcp;
	__u32 length = skb->len;
	/* The first word of skb->cb is tcp_skb_cb.seq; nothing clears it on the way here. */
	__u32 seq = skb->cb[0];
	__u32 old, step;
	int i;

	if (!seen->passed_bytes && !seen->redirected_bytes) {
		/* The first packet: everything before it was read, up to copied_seq. */
		if (!source)
			return -1;
		tcp = (struct tcp_sock *)bpf_skc_to_tcp_sock(source);
		if (!tcp)
			return -1;
		seen->next_seq = *(volatile __u32 *)((void *)tcp + TCP_SOCK_COPIED_SEQ);
	}
	old = seen->next_seq - seq;
	if (old == 0 || old > 0x7fffffff) {
		seen->next_seq = seq + length;
		return (__s32)length;
	}
	if (old > length)
		return -1;
	seen->next_seq = seq + length;
	seen->trimmed_bytes += old;
	length -= old;
	for (i = 0; i < TRIM_STEPS && old; i++) {
		step = old > TRIM_STEP ? TRIM_STEP : old;
		if (bpf_skb_adjust_room(skb, -(__s32)step, 0, 0))
			return -1;
		old -= step;
	}
	return old ? -1 : (__s32)length;
}

/*
 * How much backlog this packet may still join. The limit counts bytes, but a queued packet costs
 * an sk_buff of some 860 bytes besides, however few it carries: a megabyte of single bytes took
 * 1.1 GB. So a packet below SMALL_PACKET bytes may only join a backlog that is shorter by as much.
 * Not a larger bound: the small rest of a large write comes behind that write's backlog.
 */
static inline __attribute__((always_inline)) __u32 allowed_backlog(__u32 limit_bytes, __u32 length)
{
	if (length >= SMALL_PACKET)
		return limit_bytes;
	return (__u32)(((__u64)limit_bytes * length) / SMALL_PACKET);
}

/*
 * Whether the target's TCP can take the bytes now. What it cannot take waits in its
 * psock->ingress_skb for as long as its peer does not read, and that queue is also where the
 * packets pass that the target's own direction gives to userspace: behind waiting bytes they are
 * stuck, and no longer charged to the socket (sk_psock_verdict_apply), so that its window never
 * closes. With both peers not reading, one pair took all the memory there was.
 */
static inline __attribute__((always_inline)) int has_room(__u32 queued, __u32 send_buffer,
							  __u32 bytes)
{
	/* An eighth and a packet for what tcp_sendmsg() adds to the bytes: skb->truesize. */
	return queued + bytes + bytes / 8 + 4096 <= send_buffer;
}

int verdict(struct __sk_buff *skb)
{
	__u64 cookie = bpf_get_socket_cookie(skb);
	struct end *end;
	struct pair *pair;
	struct verdict_direction *seen;
	struct worker_direction *told;
	struct bpf_sock *target;
	struct tcp_sock *tcp;
	__u64 peer_cookie;
	__u32 slot, write_seq, backlog, queued, send_buffer;
	__u32 length = skb->len;
	__s32 fresh;
	__u64 before;
	int outcome = SK_PASS;

	/*
	 * A lone FIN. Redirecting nothing makes sendmsg return 0, which the kernel takes for a
	 * broken pipe, and it disables the target for good. Passing it does the same to this socket
	 * if redirected bytes wait in its queue (sk_psock_backlog). Dropping it is safe: it carries
	 * no byte, and TCP has acted on the FIN before it ran us; the worker hears of it from
	 * epoll.
	 */
	if (!length)
		return SK_DROP;

	/* A socket that is in the map but not ours, or not any more: its owner reads it. */
	end = map_lookup(MAP_ENDS_FD, &cookie);
	if (!end)
		return SK_PASS;
	/* A slot of another worker: nothing is counted there, the owner of the socket reads it. */
	if (end->slot >= SLOTS)
		return SK_PASS;
	slot = FIRST_SLOT + end->slot;
	pair = map_lookup(MAP_PAIRS_FD, &slot);
	if (!pair)
		return SK_PASS;
	seen = end->direction == PF_UP ? &pair->verdict[PF_UP] : &pair->verdict[PF_DOWN];
	told = end->direction == PF_UP ? &pair->worker[PF_UP] : &pair->worker[PF_DOWN];
	seen->last_ns = bpf_ktime_get_ns();

	/*
	 * Old bytes that cannot be cut off (no memory) may go nowhere, and the new ones behind them
	 * are lost with them: drop all, and have the worker reset the pair.
	 */
	fresh = trim(skb, seen);
	if (!fresh)
		return SK_DROP; /* a lone FIN, once the old bytes in front of it are off */
	if (fresh < 0) {
		seen->latched = 0;
		seen->lost = 1;
		length = skb->len;
		outcome = SK_DROP;
		goto pass;
	}
	length = (__u32)fresh;

	/* Not armed, or userspace still has earlier bytes in its hands: this packet is behind them.
	 */
	if (!*(volatile __u32 *)&told->armed) {
		seen->latched = 0;
		goto pass;
	}
	if (!seen->latched && *(volatile __u64 *)&told->consumed_bytes != seen->passed_bytes)
		goto pass;

	/*
	 * Look the target up before redirecting to it: bpf_sk_redirect_hash() drops on a miss, and
	 * what it drops has been acknowledged. Passed, the bytes are still there for userspace.
	 */
	peer_cookie = told->peer_cookie;
	target = map_lookup(MAP_SOCKETS_FD, &peer_cookie);
	if (!target)
		goto pass;
	tcp = (struct tcp_sock *)bpf_skc_to_tcp_sock(target);
	if (!tcp) {
		bpf_sk_release(target);
		goto pass;
	}
	write_seq = *(volatile __u32 *)((void *)tcp + TCP_SOCK_WRITE_SEQ);
	queued = *(volatile __u32 *)((void *)tcp + SOCK_SK_WMEM_QUEUED);
	send_buffer = *(volatile __u32 *)((void *)tcp + SOCK_SK_SNDBUF);
	bpf_sk_release(target);

	if (!seen->latched) {
		seen->latched = 1;
		seen->latch_write_seq = write_seq;
		seen->latch_redirected = (__u32)seen->redirected_bytes;
	}
	/* Both differences wrap together with their 32-bit counters. */
	backlog = (__u32)seen->redirected_bytes - seen->latch_redirected -
		  (write_seq - seen->latch_write_seq);
	seen->backlog_bytes = backlog;
	if (backlog > seen->peak_backlog_bytes)
		seen->peak_backlog_bytes = backlog;
	if (backlog > allowed_backlog(told->limit_bytes, length) ||
	    !has_room(queued, send_buffer, backlog + length)) {
		seen->latched = 0;
		seen->trips++;
		goto pass;
	}
	seen->redirected_bytes += length;
	seen->redirected_packets++;
	return bpf_sk_redirect_hash(skb, map_pointer(MAP_SOCKETS_FD), &peer_cookie, 0);

pass:
	/*
	 * The worker goes to sleep by writing asleep, then reading passed_bytes; here it is the
	 * other way round, with a full barrier between: an atomic exchange is one on every machine
	 * and for every compiler (an add is unordered on some machines, and one whose old value is
	 * asked for is refused by LLVM 21 as bcc uses it). So one of the two sees the other's
	 * write, and no packet waits for a worker that sleeps. Nobody else writes the counter: the
	 * verdicts of a socket run one after the other.
	 */
	before = __sync_lock_test_and_set(&seen->passed_bytes, seen->passed_bytes + length);
	asm volatile("" : : "r"(before));
	if (*(volatile __u32 *)&told->asleep) {
		struct wakeup wakeup = { .slot = end->slot,
					 .direction = end->direction,
					 .id = pair->id };

		*(volatile __u32 *)&told->asleep = 0;
		/* Room for one event of every direction there is: it is never full. */
		bpf_ringbuf_output(map_pointer(MAP_RING_FD), &wakeup, sizeof(wakeup), 0);
	}
	return outcome;
}
