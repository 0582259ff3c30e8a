/*
 * What splice.c and its keeper share. Data only; pyforwarder/datapath/splice_abi.py mirrors it.
 *
 * The maps with these records outlive the daemon: whoever changes one of them changes
 * PF_SPLICE_VERSION, too, so that the next daemon does not take the old ones for its own.
 */
#pragma once

#define PF_SPLICE_VERSION 7

enum pf_splice_state {
	PF_SPLICE_FREE = 0,
	PF_SPLICE_ARMED,     /* the programs know of it, and do nothing */
	PF_SPLICE_BEGINNING, /* our sockets acknowledge nothing new: for the run of `control` */
	PF_SPLICE_ACTIVE,    /* end to end */
	PF_SPLICE_RESET,     /* our sockets may send their last word, a RST */
};

#define PF_SPLICE_ODD 3

/* Why `control` did not let a pair begin, as bits. */
#define PF_BUSY_GONE	1
#define PF_BUSY_UNREAD	2 /* something is missing in front of bytes that have come */
#define PF_BUSY_FOREIGN 4 /* a peer is another forwarder's spliced socket on this host */

/* What SO_PRIORITY of a spliced socket is, so that a forwarder behind it knows it. */
#define PF_SPLICE_PRIORITY 0x50465350

/* `slot` of a pair that nobody shows just now. */
#define PF_NO_SLOT 0xffffffff

/*
 * The addresses of packets that come from one peer, in wire order; IPv4 as ::ffff:a.b.c.d. Key of
 * the maps `flows` and `handshakes`.
 */
struct splice_key {
	__u32 source[4], target[4];
	__u16 sport, dport;
};

struct splice_flow {
	__u32 index; /* into the map `splices` */
	__u32 direction;
};

/* How the connection began whose packets come from those addresses. */
struct splice_handshake {
	__u32 interface; /* by which its SYN came, or the SYN with which it was answered */
	__u32 isn;	 /* and the number of that */
};

/* What is done to packets that come from one peer: PF_UP from the client, PF_DOWN from the server.
 */
struct splice_direction {
	struct splice_key from;
	__u32 source[4], target[4]; /* the new addresses, as in a key */
	__u16 sport, dport;
	__u32 interface; /* where they go; 0: they came by `lo`, and are for this host */
	__u32 seq_delta, ack_delta, tsval_delta, tsecr_delta;
	__u32 last_ack; /* the highest acknowledgement this peer has sent, in its own numbers */
	__u32 last_end; /* the end of what this peer has sent, in its own numbers */
	__u32 fin_seq;	/* the number behind its FIN */
	__u32 fin;	/* not 0: it has sent one */
	__u32 fin_acked;
	/*
	 * What our socket still sends to this peer once the pair has begun: bytes that had come by
	 * then. That is between the two. In numbers of what this peer acknowledges.
	 */
	__u32 tail;	 /* its end */
	__u32 tail_open; /* not 0: this peer has not acknowledged it yet */
	__u32 begin;	 /* of what is sent end to end, in this peer's own numbers */
	__u32 ours;	 /* what our socket expects next of this peer, likewise */
	__u32 edge;	 /* of this peer's window, in numbers of what it acknowledges */
	__u32 unread;	 /* bytes in front of `begin` that userspace has still to read */
	__u32 pending;	 /* and that it had read, but not written, when it asked */
	__u32 answer;	 /* not 0: our socket may send an acknowledgement */
	__u32 stamp;	 /* the latest timestamp that was sent to this peer during the tail */
	__u32 stamped;	 /* not 0: there is one, and the other end's are not known to be later */
	__u8 shift_left, shift_right; /* of its windows: the peer's scale, and the other socket's */
	__u8 no_ecn;		      /* only one of the connections knows of congestion marks */
	__u8 padding;
	__u32 address_sum; /* what the new addresses add to a checksum */
	__u64 bytes, packets;
};

struct splice {
	struct splice_direction way[2]; /* index: PF_UP, PF_DOWN */
	__u64 id;			/* of the pair; 0: it has ended, and its ports linger */
	__u64 tries;
	__u32 state; /* enum pf_splice_state */
	__u32 worker;
	__u32 slot;  /* into the map `pairs`, where the bytes are counted, too */
	__u32 reset; /* 1: by the client, 2: by the server, PF_SPLICE_ODD: unknown TCP options */
	__u32 client_clock, server_clock; /* our sockets' timestamp clocks, right before control */
	__u32 family;			  /* 4 or 6 */
	__u32 last_slot;		  /* before it had none, in the table that is pinned */
	__u32 out[2]; /* interfaces by which our sockets reach the client and the server */
	__u32 isn[2]; /* with which their peers have begun */
};

struct splice_event {
	__u32 index;
	__u32 worker;
	__u64 id;
};

struct splice_look {
	__u32 rcv_nxt, unread, write_seq, snd_una, edge, ts_recent, out, isn;
};
