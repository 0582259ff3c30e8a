/*
 * The verdict program of the sockmap datapath (sk_skb, no parser): redirect each packet that a
 * pair's socket receives to the other socket, in the kernel, or pass it to userspace.
 *
 * How every byte stays in order, and memory bounded (../README.md has the details):
 * - A direction is latched (the kernel owns it) only while userspace has written everything that it
 *   was passed: then every earlier byte is in the target's TCP queue.
 * - The kernel has no flow control for redirect. The program compares what it has redirected with
 *   what the target's TCP has taken (write_seq), and gives the direction back to userspace above a
 *   limit: bytes passed to userspace stay charged to the source, whose window then closes.
 */
#include <uapi/linux/bpf.h>

#include "abi.h"
#include "maps.h"

/*
 * The most that sk_skb_adjust_room() removes at once, and how often it is called. Retransmissions
 * that arrive while the socket is in use are joined into one packet (tcp_add_backlog), of at most
 * 17 fragments of 32 KiB.
 */
#define TRIM_STEP  4095
#define TRIM_STEPS 144

/*
 * Each worker has a copy of this program, with maps of its own, and with FIRST_SLOT, where its
 * window of SLOTS pairs begins (datapath/sockmap/maps.py). So what a worker writes into its maps
 * affects no packet of another worker's pair.
 */

/* Bytes; see allowed_backlog(). */
#define SMALL_PACKET 64

/*
 * Cut off the bytes that were seen before. A retransmission may begin with them (tcp_data_queue()
 * queues such a packet whole, "Partial packet"). recv() skips them by copied_seq, but
 * tcp_read_skb() hands the packet over as it is.
 *
 * Returns the number of new bytes. 0: the packet repeats old bytes in front of a lost FIN.
 * Negative: the old bytes could not be cut off.
 */
static inline __attribute__((always_inline)) __s32 trim(struct __sk_buff *skb,
							struct kernel_direction *seen)
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
 * The longest backlog that this packet may still join. The limit counts bytes, but each queued
 * packet costs an sk_buff of some 860 bytes besides: a megabyte of single bytes took 1.1 GB. So for
 * a packet of less than SMALL_PACKET bytes the limit is reduced in proportion. The bound is not
 * larger, since the small rest of a large write follows that write's backlog.
 */
static inline __attribute__((always_inline)) __u32 allowed_backlog(__u32 limit_bytes, __u32 length)
{
	if (length >= SMALL_PACKET)
		return limit_bytes;
	return (__u32)(((__u64)limit_bytes * length) / SMALL_PACKET);
}

/*
 * Whether the target's TCP can take the bytes now. What it cannot take waits in its
 * psock->ingress_skb until its peer reads. That queue is also the way of packets that the target's
 * own direction passes to userspace: behind waiting bytes they are stuck, and no longer charged to
 * the socket (sk_psock_verdict_apply), so that its window never closes. With both peers not
 * reading, one pair took all memory.
 */
static inline __attribute__((always_inline)) int has_room(__u32 queued, __u32 send_buffer,
							  __u32 bytes)
{
	/* An eighth and a page for what tcp_sendmsg() adds to the bytes: skb->truesize. */
	return queued + bytes + bytes / 8 + 4096 <= send_buffer;
}

/*
 * The verdict on a packet that a pair's socket has received.
 *
 * Returns SK_PASS: for userspace. SK_DROP: it has no new byte, or its bytes are lost and the pair
 * is reset. Or the verdict of the redirect.
 */
int verdict(struct __sk_buff *skb)
{
	__u64 cookie = bpf_get_socket_cookie(skb);
	struct socket_owner *owner;
	struct pair *pair;
	struct kernel_direction *seen;
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
	 * A lone FIN. Redirecting an empty packet makes sendmsg return 0, which the kernel takes
	 * for a broken pipe: it disables the target for good. Passing it does the same to this
	 * socket if redirected bytes wait in its queue (sk_psock_backlog). Dropping it is safe: it
	 * carries no byte, TCP has processed the FIN before this program runs, and the worker
	 * learns of it from epoll.
	 */
	if (!length)
		return SK_DROP;

	/* A socket that belongs to no pair, or no longer: its owner reads the packet. */
	owner = map_lookup(MAP_OWNERS_FD, &cookie);
	if (!owner)
		return SK_PASS;
	/*
	 * A slot of another worker: nothing is counted there, and the socket's owner reads the
	 * packet.
	 */
	if (owner->slot >= SLOTS)
		return SK_PASS;
	slot = FIRST_SLOT + owner->slot;
	pair = map_lookup(MAP_PAIRS_FD, &slot);
	if (!pair)
		return SK_PASS;
	seen = owner->direction == PF_UP ? &pair->kernel[PF_UP] : &pair->kernel[PF_DOWN];
	told = owner->direction == PF_UP ? &pair->worker[PF_UP] : &pair->worker[PF_DOWN];
	seen->last_ns = bpf_ktime_get_ns();

	/*
	 * Old bytes that could not be cut off (no memory) must not be delivered, and the new bytes
	 * behind them are lost with them: drop the packet, and have the worker reset the pair.
	 */
	fresh = trim(skb, seen);
	if (!fresh)
		return SK_DROP; /* old bytes only, in front of a FIN: as a lone FIN */
	if (fresh < 0) {
		seen->latched = 0;
		seen->lost = 1;
		length = skb->len;
		outcome = SK_DROP;
		goto pass;
	}
	length = (__u32)fresh;

	/*
	 * Not armed, or userspace still has to write earlier bytes: this packet comes behind them.
	 */
	if (!*(volatile __u32 *)&told->armed) {
		seen->latched = 0;
		goto pass;
	}
	if (!seen->latched && *(volatile __u64 *)&told->consumed_bytes != seen->passed_bytes)
		goto pass;

	/*
	 * Look the target up before the redirect: on a miss bpf_sk_redirect_hash() drops the
	 * packet, whose bytes are acknowledged already. A passed packet still reaches userspace.
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
	 * The worker goes to sleep by writing asleep, then reading passed_bytes; here the order is
	 * reversed, with a full barrier between: an atomic exchange is one on every machine and for
	 * every compiler (an add is unordered on some machines, and one whose old value is used is
	 * refused by LLVM 21 as bcc uses it). So one of the two sees the other's write, and no
	 * packet waits for a sleeping worker. No other program writes the counter at the same time:
	 * the verdicts of a socket run one after the other.
	 */
	before = __sync_lock_test_and_set(&seen->passed_bytes, seen->passed_bytes + length);
	asm volatile("" : : "r"(before));
	if (*(volatile __u32 *)&told->asleep) {
		struct wakeup wakeup = { .slot = owner->slot,
					 .direction = owner->direction,
					 .id = pair->id };

		*(volatile __u32 *)&told->asleep = 0;
		/* The ring has room for one event per direction: it is never full. */
		bpf_ringbuf_output(map_pointer(MAP_RING_FD), &wakeup, sizeof(wakeup), 0);
	}
	return outcome;
}
