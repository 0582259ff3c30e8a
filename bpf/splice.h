/*
 * What splice.c and its keeper share. Data only; pyforwarder/datapath/splice/abi.py mirrors it.
 *
 * The maps with these records outlive the daemon: a change of one of them needs a new
 * PF_SPLICE_VERSION, too, so that the next daemon does not take the old ones for its own.
 */
#pragma once

#define PF_SPLICE_VERSION 10

enum pf_splice_state {
	PF_SPLICE_FREE = 0,
	PF_SPLICE_ARMED,     /* the programs know of it, and do nothing */
	PF_SPLICE_BEGINNING, /* our sockets acknowledge nothing new: for the run of `control` */
	PF_SPLICE_ACTIVE,    /* end to end */
	PF_SPLICE_RESET,     /* our sockets may send their last word, a RST */
};

/* Why a packet that bears the addresses of a pair was not believed; counted by these kinds. */
enum pf_invalid {
	PF_INVALID_NOT_FOR_US = 0, /* a frame for another host, or for many */
	PF_INVALID_INTERFACE,	   /* it came by another than that peer's packets come by */
	PF_INVALID_HEADER,	   /* lengths, or the checksum of IPv4's header */
	PF_INVALID_CHECKSUM,	   /* of TCP or ICMP */
	PF_INVALID_FRAGMENT,
	PF_INVALID_FLAGS,	    /* neither ACK nor SYN nor RST */
	PF_INVALID_SYN,		    /* for a connection that stands */
	PF_INVALID_RESET,	    /* not at the number that is expected next */
	PF_INVALID_SEQUENCE,	    /* outside of the window */
	PF_INVALID_ACKNOWLEDGEMENT, /* of what was not sent, or long ago */
	PF_INVALID_TIMESTAMP,	    /* older than one before */
	PF_INVALID_OPTION,	    /* taken out of the packet, which goes on */
	PF_INVALID_ERROR,	    /* a router's, about what was not sent */
	PF_INVALID_KINDS,
};

/* The cause of the end of a pair that its ends have not closed (`reset`). */
enum pf_reset {
	PF_RESET_NOBODY = 0,
	PF_RESET_CLIENT, /* it has sent a reset that was believed */
	PF_RESET_SERVER,
	PF_RESET_NO_ROUTE,	 /* the keeper: no way leads to a peer any more */
	PF_RESET_CLIENT_TIMEOUT, /* the keeper: that peer does not answer (`keepalive`) */
	PF_RESET_SERVER_TIMEOUT,
	PF_RESET_MOVED, /* the keeper: it goes through another machine now */
};

/* What our mute socket, or the keeper in its name, may say to a peer (`answer`). */
#define PF_ANSWER	1 /* an acknowledgement */
#define PF_ANSWER_PROBE 2 /* one that the peer answers: is it still there? */

/* How our socket's packets find their way, beside their addresses (`routing`), as bits. */
#define PF_ROUTING_BOUND   1 /* by the interface that the socket is bound to */
#define PF_ROUTING_FOREIGN 2 /* its own address is no address of this host's */

/* Why `control` did not let a pair begin, as bits. */
#define PF_BUSY_GONE	1
#define PF_BUSY_UNREAD	2  /* something is missing in front of bytes that have come */
#define PF_BUSY_FOREIGN 4  /* a peer is another forwarder's spliced socket on this host */
#define PF_BUSY_COARSE	8  /* a peer's whole window is less than two steps of the other's scale */
#define PF_BUSY_LATE	16 /* the moment has passed until which the worker waits for it */

/* What SO_PRIORITY of a spliced socket is, so that a forwarder behind it knows it. */
#define PF_SPLICE_PRIORITY 0x50465350

/* `slot` of a pair that nobody shows just now. */
#define PF_NO_SLOT 0xffffffff

/*
 * The addresses of packets that come from one peer, in wire order; IPv4 as ::ffff:a.b.c.d. Key of
 * the map `flows`.
 */
struct splice_key {
	__u32 source[4], target[4];
	__u16 sport, dport;
};

struct splice_flow {
	__u32 index; /* into the map `splices` */
	__u32 direction;
};

/* How the connection began whose packets come from some addresses, see splice_handshakes.h. */
struct splice_handshake {
	__u64 mark;  /* drawn from the addresses */
	__u64 began; /* the ISN, and above it the interface: written and read at once */
};

#define PF_HANDSHAKE_WAYS 4
#define PF_HANDSHAKE_SETS (1 << 14)

/* Element of the map `handshakes`; the first one's marks are two secrets, the second one odd. */
struct splice_handshakes {
	struct splice_handshake latest[PF_HANDSHAKE_WAYS];
};

/* Whether a pair may have a port of ours; both bytes are read at once, and each written alone. */
struct splice_port {
	__u8 kept;   /* not 0: the keeper has made a flow with it, or has found one */
	__u8 opened; /* not 0: express has */
};

/* The one element of the map `our_ports`, by numbers in host order. */
struct splice_ports {
	struct splice_port port[1 << 16];
};

/*
 * What is done to packets that come from one peer: PF_UP from the client, PF_DOWN from the server.
 *
 * "In its own numbers" is as this peer counts what it sends, "in numbers of what it acknowledges"
 * as it counts what it receives. The other end's numbers are these and a delta. Numbers of 64 bits
 * have a sequence number in their lower half, and only ever move forward (`advance`).
 */
struct splice_direction {
	struct splice_key from;
	__u32 source[4], target[4]; /* the new addresses, as in a key */
	__u16 sport, dport;
	__u32 interface; /* where they go; 0: they came by `lo`, and are for this host */
	__u32 by[2];	 /* where they may come from; both 0: anywhere */
	__u32 seq_delta, ack_delta, tsval_delta, tsecr_delta;
	__u64 last_ack; /* the highest acknowledgement this peer has sent, of what it acknowledges
			 */
	__u64 last_end; /* the end of what this peer has sent, in its own numbers */
	__u64 next;	/* the end of what has come without a gap, or is acknowledged; likewise */
	__u64 limit;	/* the furthest right edge of a window that it was ever told; likewise */
	__u32 reach;	/* bytes of the largest such window: nothing is older than that */
	__u32 fin_seq;	/* the number behind its FIN */
	__u32 fin_due;	/* not 0: it has sent one, but perhaps bytes in front are missing */
	__u32 fin;	/* not 0: and nothing is missing */
	__u32 fin_acked;
	__u32 recent;	/* the latest timestamp of a packet in order (RFC 7323: TS.Recent) */
	__u32 recent_s; /* when that came, in seconds since the host has started */
	/*
	 * What our socket still sends to this peer once the pair has begun: bytes that had come by
	 * then. Only our socket sends them again. In numbers of what this peer acknowledges.
	 */
	__u32 tail;	  /* its end */
	__u32 tail_open;  /* not 0: this peer has not acknowledged it yet */
	__u64 sent;	  /* how much of it our socket has sent, likewise */
	__u32 begin;	  /* of what is sent end to end, in this peer's own numbers */
	__u32 ours;	  /* what our socket expects next of this peer, likewise */
	__u32 edge;	  /* of this peer's window, in numbers of what it acknowledges */
	__u32 unread;	  /* bytes in front of `begin` that userspace has still to read */
	__u32 pending;	  /* and that it had read, but not written, when it asked */
	__u32 answer;	  /* PF_ANSWER...: our socket may send one packet */
	__u32 stamp;	  /* the latest timestamp that was sent to this peer during the tail */
	__u32 stamped;	  /* not 0: there is one, and the other end's are not known to be later */
	__u32 narrow_mtu; /* not 0: a packet was longer than this, which is what `interface` takes
			   */
	__u32 narrow_seq; /* and this was its number, in this peer's own */
	__u8 shift_left, shift_right; /* of its windows: the peer's scale, and the other socket's */
	__u8 no_ecn;		      /* the connections do not know of the same congestion marks */
	__u8 routing;		      /* PF_ROUTING... */
	__u32 address_sum;	      /* what the new addresses add to a checksum */
	__u32 pseudo_sum;	      /* of the old ones and the protocol's number */
	__u32 deaf;	  /* not 0: our socket sends the tail again, although it has come */
	__u32 heard_s;	  /* when this peer was heard last, in seconds since the host has started */
	__u32 mark;	  /* SO_MARK of our socket: its packets may be routed by that */
	__u32 heard_tick; /* and in steps of the kernel's clock, which costs less to read */
	__u32 claim;	  /* with which we go on with another machine's pair; 0: it is our own */
	__u64 again;	  /* bytes in packets that had none that were new */
	__u64 bytes, packets;
};

struct splice {
	struct splice_direction way[2]; /* index: PF_UP, PF_DOWN */
	__u64 id;			/* of the pair; 0: it has ended, and its ports linger */
	__u64 tries;
	__u32 state; /* enum pf_splice_state */
	__u32 worker;
	__u32 slot;  /* into the map `pairs`, where the bytes are counted, too */
	__u32 reset; /* enum pf_reset */
	/* Our sockets' timestamp clocks, right before control. Of a pair that no worker knows of
	 * yet both together are the moment at which something was heard of its end. */
	__u32 client_clock, server_clock;
	__u32 family;	 /* 4 or 6 */
	__u32 last_slot; /* before it had none, in the table that is pinned */
	__u32 out[2];	 /* interfaces by which our sockets reach the client and the server */
	__u32 isn[2];	 /* with which their peers have begun */
	__u32 owner;	 /* the user whose our sockets are, by whom packets may be routed, too */
	/* `keepalive`: a peer that was silent for so long is asked, and so often, before it is
	 * given up; an idle_s of 0: never. */
	__u32 keep_idle_s, keep_interval_s, keep_count;
};

struct splice_event {
	__u32 index;
	__u32 worker;
	__u64 id;
};

struct splice_look {
	__u32 rcv_nxt, unread, write_seq, snd_una, snd_nxt, edge, most_window, promised, ts_recent,
		out, isn, ecn;
};
