/*
 * Records and numbers that the BPF programs share with Python: the record of a pair, its states and
 * the events. Data only: no helper, no map. pyforwarder/datapath/ebpf/abi.py mirrors it, and a test
 * compares the two.
 */
#pragma once

#define PF_ABI_VERSION 1

#define PF_UP	0 /* client to server */
#define PF_DOWN 1 /* server to client */

#define PF_NAME_BYTES 64 /* a rule's or a listener's name with its final NUL */

enum pf_state {
	PF_FREE = 0, /* the slot holds no connection */
	PF_SNIFFING,
	PF_CONNECTING,
	PF_HANDOVER,
	PF_JOINED,
	PF_HALF_CLOSED,
	PF_DRAINING,
};

enum pf_datapath {
	PF_NO_DATAPATH = 0,
	PF_COPY,
	PF_SOCKMAP,
	PF_SPLICE,
};

enum pf_family {
	PF_UNKNOWN = 0,
	PF_UNIX = 1,
	PF_IPV4 = 4,
	PF_IPV6 = 6,
};

/* One end of a connection. IPv4 addresses are stored as ::ffff:a.b.c.d. */
struct endpoint {
	__u8 ip[16];
	__u16 port;  /* host order */
	__u8 family; /* enum pf_family */
	__u8 padding;
};

/*
 * What the kernel does with one direction.
 *
 * In a sockmap the verdict program writes it, while the pair is there. The lock of the source
 * socket serialises its runs, so plain adds suffice; passed_bytes is written atomically because of
 * the barrier that redirect.c explains. A worker writes zeros when it gives the record to a
 * connection, and `latched` when it has a direction redirected to another socket, as its pair
 * leaves the map (datapath/sockmap/exit.py).
 *
 * Of a spliced pair or session the programs of splice store redirected_bytes, redirected_packets
 * and last_ns, as copies of what its own record counts (splice_pair.h, splice_udp.h), and its
 * worker does so where it has just read that record. Nothing else is used.
 */
struct kernel_direction {
	__u64 passed_bytes;	/* given to userspace since the sockets entered the map */
	__u64 redirected_bytes; /* queued to the other socket by the kernel */
	__u64 redirected_packets;
	__u64 last_ns;		/* bpf_ktime_get_ns() of the last packet */
	__u16 latched;		/* 1 while the kernel owns the direction */
	__u16 lost;		/* 1: bytes were dropped, the pair must be reset */
	__u32 trips;		/* how often the backlog limit gave the direction to userspace */
	__u32 latch_write_seq;	/* target's tcp_sock.write_seq when it latched */
	__u32 latch_redirected; /* low 32 bits of redirected_bytes at that moment */
	__u32 backlog_bytes;	/* at the last packet */
	__u32 peak_backlog_bytes;
	__u32 next_seq;	     /* TCP sequence number behind the last byte seen */
	__u32 trimmed_bytes; /* old bytes in retransmissions, which were cut off */
};

/*
 * One direction, as the worker counts it, and what it tells the programs. Only the worker writes
 * it; the verdict program also clears `asleep`.
 */
struct worker_direction {
	/*
	 * Of passed_bytes, those read and written to the other socket. Of a session of UDP: of the
	 * datagrams that were passed to our socket (`passed` in sessions.h), those copied.
	 */
	__u64 consumed_bytes;
	__u64 carried_bytes; /* copied by userspace, before and after the handover */
	__u64 carried_packets;
	__u64 peer_cookie; /* key of the target socket in the sockhash */
	__u32 armed;	   /* 0: pass every packet to userspace; PF_SESSION_NOW: sessions.h */
	__u32 asleep; /* 1: send a wake-up when a packet is passed; the program clears it then */
	__u32 limit_bytes; /* the backlog limit */
	__u32 padding[5];
};

struct pair {
	struct kernel_direction kernel[2]; /* index: PF_UP, PF_DOWN */
	struct worker_direction worker[2];
	__u64 id;
	__u64 sequence;	  /* odd while the description below is being written */
	__u64 started_ns; /* CLOCK_MONOTONIC */
	__u64 last_ns;	  /* when userspace copied the last byte */
	__u8 state;	  /* enum pf_state */
	__u8 datapath;	  /* enum pf_datapath */
	__u8 reason;	  /* why this datapath: PairReason in datapath/base.py */
	__u8 worker_index;
	__u32 protocol; /* 0: TCP, else its number */
	struct endpoint client, listener, source, server;
	char rule[PF_NAME_BYTES];
	char listener_name[PF_NAME_BYTES];
	__u64 reserved;
};

/* Which pair a socket belongs to. Key of the map `owners`: the socket's cookie. */
struct socket_owner {
	__u32 slot;	 /* in the window of the worker whose map this is */
	__u32 direction; /* PF_UP for the client's socket, PF_DOWN for the server's */
};

/* Event in a worker's ring: a direction has bytes for userspace. */
struct wakeup {
	__u32 slot; /* in the worker's window */
	__u32 direction;
	__u64 id; /* of the pair, so that a late event does not wake the next pair in this slot */
};

/* Kinds of lines of `stats`. */
enum pf_line {
	PF_NO_LINE = 0,
	PF_COUNTER,  /* a counter, summed over the workers */
	PF_NONZERO,  /* the same, left out while it is 0 */
	PF_UP_BYTES, /* a counter, and the bytes of the pairs in the table */
	PF_DOWN_BYTES,
	PF_TEXT,     /* text, no counter */
	PF_LISTENER, /* three counters: accepted, open, refused */
};

/* One line of `stats` or `listeners`: its name, and where its counters are. */
struct view_line {
	__u64 sequence; /* odd while the line changes */
	__u32 kind;	/* enum pf_line */
	__u32 word;	/* index of its first counter, in the block of each worker */
	__u32 also;	/* index of a counter that is added; 0: none */
	__u32 padding;
	char name[PF_NAME_BYTES];
	char text[128]; /* a listener's address; the text of PF_TEXT */
	char protocol[8];
};

/* Record of the iterator `backlog`: redirected bytes that the target's TCP has not taken yet. */
struct backlog {
	__u32 slot;
	__u32 direction;
	__u64 bytes;
};
