/*
 * Records and numbers that splice.c shares with its keeper. Data only;
 * pyforwarder/datapath/splice/abi.py mirrors it.
 *
 * The maps with these records outlive the daemon: a changed record needs a new PF_SPLICE_VERSION,
 * so that the next daemon does not read the old records as its own.
 */
#pragma once

#define PF_SPLICE_VERSION 10

enum pf_splice_state {
	PF_SPLICE_FREE = 0,
	PF_SPLICE_ARMED,     /* the programs find it, and leave its packets to the stack */
	PF_SPLICE_BEGINNING, /* while `control` runs: our sockets acknowledge nothing new */
	PF_SPLICE_ACTIVE,    /* segments pass end to end */
	PF_SPLICE_RESET,     /* segments are dropped, but our sockets may send a RST */
	PF_SPLICE_ASKED, /* express: the server was asked (SYN), and has not answered (express_*.h)
			  */
};

/* Why a packet with the addresses of a pair was invalid; counted by these kinds. */
enum pf_invalid {
	PF_INVALID_NOT_FOR_US = 0, /* a frame for another host, or broadcast or multicast */
	PF_INVALID_INTERFACE,	   /* not the interface by which this peer's packets arrive */
	PF_INVALID_HEADER,	   /* lengths, or the checksum of the IPv4 header */
	PF_INVALID_CHECKSUM,	   /* of TCP or ICMP */
	PF_INVALID_FRAGMENT,
	PF_INVALID_FLAGS,	    /* neither ACK nor SYN nor RST */
	PF_INVALID_SYN,		    /* a SYN for an established connection */
	PF_INVALID_RESET,	    /* not at the sequence number that is expected next */
	PF_INVALID_SEQUENCE,	    /* outside the window */
	PF_INVALID_ACKNOWLEDGEMENT, /* of bytes that were not sent, or acknowledged long ago */
	PF_INVALID_TIMESTAMP,	    /* older than a previous one (PAWS) */
	PF_INVALID_OPTION,	    /* overwritten by no-ops; the packet is forwarded */
	PF_INVALID_ERROR,	    /* an ICMP error about bytes that are not under way */
	PF_INVALID_KINDS,
};

/* Why a pair was reset, if its ends have not closed it (`reset`). */
enum pf_reset {
	PF_RESET_NOBODY = 0,
	PF_RESET_CLIENT, /* the client has sent a valid reset */
	PF_RESET_SERVER,
	PF_RESET_NO_ROUTE,	 /* the keeper: there is no route to a peer any more */
	PF_RESET_CLIENT_TIMEOUT, /* the keeper: the client does not answer (`keepalive`) */
	PF_RESET_SERVER_TIMEOUT,
	PF_RESET_MOVED, /* the keeper: another machine forwards this pair now */
};

/* What our mute socket, or the keeper in its name, may send to a peer (`answer`). */
#define PF_ANSWER	1 /* an acknowledgement */
#define PF_ANSWER_PROBE 2 /* one at an old number, which the peer answers (a keepalive) */

/* What chooses the route of our socket's packets, besides their addresses, as bits (`routing`). */
#define PF_ROUTING_BOUND   1 /* the interface that the socket is bound to */
#define PF_ROUTING_FOREIGN 2 /* the socket's own address is none of this host (transparent) */

/* Why `control` did not let a pair begin, as bits. */
#define PF_BUSY_GONE	1
#define PF_BUSY_UNREAD	2 /* there is a gap in front of bytes that were received */
#define PF_BUSY_FOREIGN 4 /* a peer is a socket of this host that another forwarder has spliced */
#define PF_BUSY_COARSE \
	8		/* a peer's largest window is below two units of the other's window scale */
#define PF_BUSY_LATE 16 /* the worker no longer waits for it */

/*
 * So many repeated bytes, beyond as many as were new, are taken for retransmissions of lost
 * packets. More than that are counted like new bytes: the two ends may have agreed to communicate
 * in old numbers.
 */
#define PF_MAX_REPEATED_BYTES (1 << 20)

/* SO_PRIORITY of a spliced socket, by which another forwarder on this host knows it. */
#define PF_SPLICE_PRIORITY 0x50465350

/* `slot` of a pair that is in no pair table at the moment. */
#define PF_NO_SLOT 0xffffffff

/*
 * Addresses and ports of packets from one peer, in wire order; IPv4 addresses as ::ffff:a.b.c.d.
 * Key of the map `flows`.
 */
struct splice_key {
	__u32 source[4], target[4];
	__u16 sport, dport;
};

struct splice_flow {
	__u32 index; /* into the map `splices` */
	__u32 direction;
};

/* How a connection began, by the addresses of its packets: see splice_handshakes.h. */
struct splice_handshake {
	__u64 mark;  /* hashed from the addresses */
	__u64 began; /* lower half: ISN, upper half: interface; written and read at once */
};

#define PF_HANDSHAKES_PER_SET 4
#define PF_HANDSHAKE_SETS     (1 << 14)

/*
 * Element of the map `handshakes`. The marks of the first element are two secrets, the second of
 * which is odd.
 */
struct splice_handshakes {
	struct splice_handshake latest[PF_HANDSHAKES_PER_SET];
};

/*
 * Whether a pair may have a local port. Both bytes are read at once, and each is written by itself.
 */
struct splice_port {
	__u8 kept;   /* not 0: the keeper has made a flow with this port, or has found one */
	__u8 opened; /* not 0: express has made a flow with it */
};

/* The only element of the map `our_ports`; indexed by port in host order. */
struct splice_ports {
	struct splice_port port[1 << 16];
};

/*
 * How packets from one peer are checked and rewritten: PF_UP from the client, PF_DOWN from the
 * server.
 *
 * "In its own numbers" means as this peer counts what it sends, "in the numbers of what it
 * acknowledges" as it counts what it receives. The numbers of the other connection are these plus a
 * delta. Numbers of 64 bits have a sequence number in their lower half, and only move forward
 * (advance()).
 */
struct splice_direction {
	struct splice_key from;
	__u32 source[4], target[4]; /* the addresses that packets get, as in a key */
	__u16 sport, dport;
	__u32 interface; /* by which they leave; 0: both ends are on `lo`, they go up the stack */
	__u32 from_interfaces[2]; /* by which they may arrive; both 0: by any */
	__u32 seq_delta, ack_delta, tsval_delta, tsecr_delta;
	__u64 last_ack; /* the highest from this peer, in the numbers of what it acknowledges */
	__u64 last_end; /* end of what this peer has sent, in its own numbers */
	__u64 contiguous_end; /* end of what came without a gap, or is acknowledged; likewise */
	__u64 max_edge;	      /* the furthest right edge of a window that it was told; likewise */
	__u32 max_window;     /* bytes of the largest such window: an older packet is invalid */
	__u32 fin_seq;	      /* the sequence number behind its FIN */
	__u32 fin_due;	      /* not 0: a FIN was received; bytes in front of it may be missing */
	__u32 fin;	      /* not 0: all bytes in front of the FIN were received, too */
	__u32 fin_acked;
	__u32 ts_recent;   /* the latest timestamp in order (RFC 7323: TS.Recent) */
	__u32 ts_recent_s; /* when it was received, in seconds since boot */
	/*
	 * The tail: what our socket still sends to this peer once the pair has begun, and
	 * retransmits. In the numbers of what this peer acknowledges.
	 */
	__u32 tail_end;	       /* end of the tail */
	__u32 tail_open;       /* not 0: this peer has not acknowledged the whole tail yet */
	__u64 socket_sent_end; /* end of what our socket has sent to this peer, likewise */
	__u32 begin_seq; /* the first byte that passes end to end, in this peer's own numbers */
	__u32 socket_expected_seq; /* what our socket expects next of this peer, likewise */
	__u32 window_edge; /* right edge of its window, in the numbers of what it acknowledges */
	__u32 unread;	   /* bytes before the beginning that userspace has still to read */
	__u32 pending; /* bytes that userspace had read, but not written, when it asked to splice */
	__u32 answer;  /* PF_ANSWER...: our socket may send one acknowledgement */
	__u32 last_tsval;     /* latest timestamp sent to this peer while the tail was open */
	__u32 has_last_tsval; /* not 0: it is valid, the other end's clock may be behind it */
	__u32 narrow_mtu;     /* not 0: a packet was longer than this MTU of `interface` */
	__u32 narrow_seq;     /* the sequence number of that packet, in this peer's own numbers */
	__u8 peer_scale, other_scale; /* window scales: its own, and of our other socket */
	__u8 no_ecn;	   /* not 0: the two connections have not negotiated the same kind of ECN */
	__u8 routing;	   /* PF_ROUTING... */
	__u32 address_sum; /* what the changed addresses add to a checksum */
	__u32 pseudo_sum;  /* sum of the old addresses and the protocol number */
	__u32 missed_ack; /* not 0: our socket missed the tail's acknowledgement, and retransmits */
	__u32 last_received_s;	  /* when its last valid packet came, in seconds since boot */
	__u32 mark;		  /* SO_MARK of our socket: rules may choose its route by that */
	__u32 last_received_tick; /* the same in units of jiffies, which cost less to read */
	__u32 claim; /* number of our claim to a pair of another machine; 0: our own pair */
	__u64 repeated_bytes; /* payload of packets that had no new byte */
	__u64 bytes, packets;
};

/* Two times, which no pair has at once. */
union splice_clocks {
	struct {
		__u32 client, server; /* timestamp clocks of our sockets, right before `control` */
	};
	__u64 end_noticed_ns; /* last notice of the end of a pair that no worker knows of yet */
};

struct splice {
	struct splice_direction direction[2]; /* index: PF_UP, PF_DOWN */
	__u64 id;      /* of the pair; 0: it has ended, and only its ports are kept */
	__u64 barrier; /* target of atomic additions that are full barriers; its value is unused */
	__u32 state;   /* enum pf_splice_state */
	__u32 worker;
	__u32 slot;  /* in the map `pairs`, where the bytes are counted, too */
	__u32 reset; /* enum pf_reset */
	union splice_clocks clocks;
	__u32 family;	 /* 4 or 6 */
	__u32 last_slot; /* the last one that it had, in the pinned pair table */
	__u32 out[2];	 /* interfaces by which our sockets reach the client and the server */
	__u32 isn[2];	 /* ISNs of the client and of the server */
	__u32 owner;	 /* user of our sockets: rules may choose their route by that (uidrange) */
	/*
	 * `keepalive`: how long a peer may be silent before it is probed, and how often, before the
	 * pair is reset. keep_idle_s 0: it is never probed.
	 */
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
