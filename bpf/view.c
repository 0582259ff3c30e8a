/*
 * The view: BPF iterators that print the tables as text. Python pins their links in bpffs. Each
 * open of a pin is a walk of its own, which the kernel runs for the reader: the daemon takes no
 * part in it, and need not be alive.
 *
 * There are two ways to walk a table; Python uses the first one that the kernel loads:
 *
 * - over the map's elements (bpf_map_elem): `show`, `stats`, `listeners`;
 * - over an unrelated list, the kernel's symbols (ksym), whose visits are only counted: visit n is
 *   for the pairs from n * PAIRS_PER_VISIT on. `show_by_visits` and so on, for kernels that refuse
 *   iterators over maps. Python makes sure that there are more visits than needed. The last one may
 *   be made twice (bpf_iter_ksym_seq_stop), so nothing depends on it.
 *
 * The output of one object is taken whole. If it does not fit into the 32 KiB of one read, it is
 * made again for the next read, with the same number (bpf_seq_read): so a line is never cut, lost
 * or doubled, however many calls print it. A program keeps no state between objects, except in the
 * map `sums`.
 *
 * Source: kernel/bpf/bpf_iter.c, kernel/bpf/map_iter.c, kernel/bpf/arraymap.c, kernel/kallsyms.c,
 * net/ipv4/tcp_ipv4.c.
 */
#include <uapi/linux/bpf.h>

#include "abi.h"
#include "maps.h"

struct seq_file;
struct sock;

/* The kernel's contexts, as far as the programs read them: the offsets of the fields are fixed. */
struct iterator_meta {
	struct seq_file *seq;
	__u64 session_id;
	__u64 seq_num;
};

struct element { /* struct bpf_iter__bpf_map_elem */
	struct iterator_meta *meta;
	struct bpf_map *map;
	__u32 *key;
	void *value;
};

struct socket_element { /* struct bpf_iter__sockmap */
	struct iterator_meta *meta;
	struct bpf_map *map;
	__u64 *key;
	struct sock *sk;
};

struct visit { /* struct bpf_iter__ksym */
	struct iterator_meta *meta;
	void *symbol;
};

struct tcp_element { /* struct bpf_iter__tcp */
	struct iterator_meta *meta;
	struct sock *sk;
};

#define PAIRS	    (WORKERS * SLOTS)
#define PAIR_VISITS ((PAIRS + PAIRS_PER_VISIT - 1) / PAIRS_PER_VISIT)

/* How often a record is read again that is being written; the writer takes microseconds. */
#define LOOKS 64

/* No unrolling where it would multiply the calls in a loop (Linux has loops since 5.3). */
#define NO_UNROLL _Pragma("clang loop unroll(disable)")

#define barrier() asm volatile("" ::: "memory")

#define SAY(seq, literal)                                           \
	({                                                          \
		char say_text[] = literal;                          \
		bpf_seq_write(seq, say_text, sizeof(say_text) - 1); \
	})

#define PRINT(seq, format, ...)                                                       \
	({                                                                            \
		char print_format[] = format;                                         \
		__u64 print_values[] = { __VA_ARGS__ };                               \
		bpf_seq_printf(seq, print_format, sizeof(print_format), print_values, \
			       sizeof(print_values));                                 \
	})

#define STRING(pointer) ((__u64)(unsigned long)(pointer))

#define NANOSECONDS 1000000000ULL

/*
 * Print the end of a header line. If no process has the map mapped for writing, neither the daemon
 * nor a worker lives, and a note says so. It follows the column names, as new columns do, so that a
 * program that reads the table by its columns is not affected.
 */
static inline void end_header(struct seq_file *seq, void *map)
{
	__u64 writers = *(volatile __u64 *)(map + BPF_MAP_WRITECNT);

	if (!writers)
		SAY(seq, "  # the daemon is gone: this is what it left");
	SAY(seq, "\n");
}

/* Width of a column with an address: the longest IPv4 address and port (21), and one blank. */
#define ENDPOINT_WIDTH 22

/* Decimal digits of a number below 100,000. */
static inline __u32 digits(__u32 number)
{
	return 1 + (number > 9) + (number > 99) + (number > 999) + (number > 9999);
}

/* Hexadecimal digits of 16 bits; from borrows, without a branch, as below. */
static inline __u32 hex_digits(__u32 group)
{
	return 1 + ((0xF - group) >> 16 & 1) + ((0xFF - group) >> 16 & 1) +
	       ((0xFFF - group) >> 16 & 1);
}

/* The functions that print an address return the number of characters. */
static inline __u32 print_ipv4(struct seq_file *seq, const struct endpoint *end)
{
	__u32 a = end->ip[12], b = end->ip[13], c = end->ip[14], d = end->ip[15], port = end->port;

	PRINT(seq, "%u.%u.%u.%u:%u", a, b, c, d, port);
	return 4 + digits(a) + digits(b) + digits(c) + digits(d) + digits(port);
}

/* The canonical form (RFC 5952): the first of the longest runs of two or more zeros is left out. */
static inline __u32 print_ipv6(struct seq_file *seq, const struct endpoint *end)
{
	__u32 group[8];
	__u32 zeros = 0, runs, shorter, first, left_out, before, here, after;
	/* In memory, so that the verifier does not walk every combination of bits. */
	volatile __u8 is_left_out[8], colons[8], width;
	char text[] = "::";
	int i;

#pragma unroll
	for (i = 0; i < 8; i++) {
		group[i] = (__u32)end->ip[2 * i] << 8 | end->ip[2 * i + 1];
		/*
		 * 1 for a group of 0, without a branch: eight branches would be 256 paths for the
		 * verifier.
		 */
		zeros |= ((group[i] - 1) >> 16 & 1) << i;
	}
	/*
	 * Each step removes one bit from the end of every run, until only the longest runs have one
	 * left.
	 */
	runs = zeros;
#pragma unroll
	for (i = 0; i < 7; i++) {
		shorter = runs & runs >> 1;
		runs = shorter ? shorter : runs;
	}
	first = runs & -runs;
	/*
	 * The carry of the addition clears just this run. If the longest run is a single zero, it
	 * stays.
	 */
	left_out = zeros & ~(zeros + first);
	left_out = zeros & zeros >> 1 ? left_out : 0;
#pragma unroll
	for (i = 0; i < 8; i++) {
		before = i ? left_out >> (i - 1) & 1 : 1;
		here = left_out >> i & 1;
		after = left_out >> (i + 1) & 1;
		is_left_out[i] = here;
		/* Two colons at the end of the omitted run, one between two groups. */
		colons[i] = (here & (after ^ 1)) << 1 | ((here | before) ^ 1);
	}
	SAY(seq, "[");
	width = 3 + digits(end->port); /* the port and `[]:` */
	NO_UNROLL
	for (i = 0; i < 8; i++) {
		bpf_seq_write(seq, text, colons[i] & 3);
		width += colons[i];
		if (!is_left_out[i]) {
			PRINT(seq, "%x", group[i]);
			width += hex_digits(group[i]);
		}
	}
	PRINT(seq, "]:%u", end->port);
	return width;
}

/*
 * Print fewer than 32 blanks. A function of its own, so that it shares its stack with what is
 * printed before.
 */
static inline void print_blanks(struct seq_file *seq, __u32 count)
{
	char blanks[] = "                               ";

	asm volatile("" : "+r"(count)); /* or the compiler removes the bound below as unnecessary */
	bpf_seq_write(seq, blanks, count & (sizeof(blanks) - 1));
}

/* Print an address and the blanks behind it, one at least: IPv6 may be longer than the column. */
static inline void print_endpoint(struct seq_file *seq, const struct endpoint *end)
{
	__u32 width;

	switch (end->family) {
	case PF_IPV4:
		width = print_ipv4(seq, end);
		break;
	case PF_IPV6:
		width = print_ipv6(seq, end);
		break;
	case PF_UNIX:
		SAY(seq, "unix:");
		width = 5;
		break;
	default:
		SAY(seq, "-");
		width = 1;
	}
	width = width < ENDPOINT_WIDTH ? width : ENDPOINT_WIDTH - 1;
	print_blanks(seq, ENDPOINT_WIDTH - width);
}

/* Print the column STATE. */
static inline void print_state(struct seq_file *seq, __u8 state)
{
	switch (state) {
	case PF_SNIFFING:
		SAY(seq, "sniffing    ");
		break;
	case PF_CONNECTING:
		SAY(seq, "connecting  ");
		break;
	case PF_HANDOVER:
		SAY(seq, "handover    ");
		break;
	case PF_JOINED:
		SAY(seq, "joined      ");
		break;
	case PF_HALF_CLOSED:
		SAY(seq, "half-closed ");
		break;
	default:
		SAY(seq, "draining    ");
	}
}

/* Print the column DATAPATH. */
static inline void print_datapath(struct seq_file *seq, __u8 datapath)
{
	switch (datapath) {
	case PF_COPY:
		SAY(seq, "copy     ");
		break;
	case PF_SOCKMAP:
		SAY(seq, "sockmap  ");
		break;
	case PF_SPLICE:
		SAY(seq, "splice   ");
		break;
	default:
		SAY(seq, "-        ");
	}
}

/* The fields of a record that a line prints, copied so that they can be checked first. */
struct look {
	__u64 id;
	__u64 started_ns;
	__u64 active_ns;
	__u64 bytes[2];
	struct endpoint ends[4]; /* client, listener, source, server */
	__u8 state;
	__u8 datapath;
	__u8 reason;
	__u8 padding[5];
	char rule[16];
};

/* The later of two times. */
static inline __u64 later(__u64 a, __u64 b)
{
	return a > b ? a : b;
}

/*
 * Copy the record consistently. Returns 0 if the slot is free. The writer (PairWindow.describe)
 * makes the sequence odd while it writes the description. The counters are zeroed while the slot is
 * free, so the state is read once more after them.
 */
static inline int look_at(const struct pair *pair, struct look *look)
{
	const volatile __u64 *sequence = &pair->sequence;
	const volatile __u8 *state = &pair->state;
	__u64 before;
	int i;

	NO_UNROLL
	for (i = 0; i < LOOKS; i++) {
		if (*state == PF_FREE)
			return 0;
		before = *sequence;
		if (before & 1)
			continue;
		barrier();
		look->id = pair->id;
		look->started_ns = pair->started_ns;
		__builtin_memcpy(look->ends, &pair->client, sizeof(look->ends));
		__builtin_memcpy(look->rule, pair->rule, sizeof(look->rule));
		look->state = *state;
		look->datapath = *(const volatile __u8 *)&pair->datapath;
		look->reason = *(const volatile __u8 *)&pair->reason;
		look->bytes[PF_UP] = *(const volatile __u64 *)&pair->worker[PF_UP].carried_bytes +
				     *(const volatile __u64 *)&pair->kernel[PF_UP].redirected_bytes;
		look->bytes[PF_DOWN] =
			*(const volatile __u64 *)&pair->worker[PF_DOWN].carried_bytes +
			*(const volatile __u64 *)&pair->kernel[PF_DOWN].redirected_bytes;
		look->active_ns =
			later(later(pair->last_ns, pair->started_ns),
			      later(pair->kernel[PF_UP].last_ns, pair->kernel[PF_DOWN].last_ns));
		barrier();
		if (*sequence == before && *state != PF_FREE && look->state != PF_FREE)
			return 1;
	}
	/* The writer was interrupted in the middle: no line instead of a wrong one. */
	return 0;
}

/* Print the header line of `show`. */
static inline void print_pairs_header(struct seq_file *seq)
{
	SAY(seq, "    ID STATE       DATAPATH CLIENT                LISTENER              ");
	SAY(seq, "SOURCE                SERVER                ");
	SAY(seq, "    UP_BYTES   DOWN_BYTES   AGE_S  IDLE_S RULE            DECIDED");
	end_header(seq, map_pointer(MAP_PAIRS_FD));
}

/* Print the line of one slot; nothing if it is free. */
static inline void print_pair(struct seq_file *seq, const struct pair *pair)
{
	struct look look;
	__u64 now, age, idle;
	int i;

	if (!look_at(pair, &look))
		return;
	now = bpf_ktime_get_ns();
	age = now > look.started_ns ? (now - look.started_ns) / NANOSECONDS : 0;
	/* A packet may be later than `now`: another processor has handled it meanwhile. */
	idle = now > look.active_ns ? (now - look.active_ns) / NANOSECONDS : 0;
	look.rule[sizeof(look.rule) - 1] = 0;
	if (!look.rule[0]) { /* no rule yet: a column is never empty */
		look.rule[0] = '-';
		look.rule[1] = 0;
	}
	PRINT(seq, "%6llu ", look.id);
	print_state(seq, look.state);
	print_datapath(seq, look.datapath);
	NO_UNROLL
	for (i = 0; i < 4; i++)
		print_endpoint(seq, &look.ends[i]);
	PRINT(seq, "%12llu %12llu %7llu %7llu %-15s ", look.bytes[PF_UP], look.bytes[PF_DOWN], age,
	      idle, STRING(look.rule));
	if (look.reason == REASON_DECIDED || look.reason == REASON_DECIDED_BEFORE)
		SAY(seq, "kernel\n");
	else
		SAY(seq, "user\n");
}

/* One element of the pair table: prints its line, and the header before the first one. */
int show(struct element *element)
{
	struct seq_file *seq = element->meta->seq;
	const struct pair *pair = element->value;

	if (!element->key || !pair)
		return 0;
	if (*element->key == 0)
		print_pairs_header(seq);
	print_pair(seq, pair);
	return 0;
}

/* The same for visit n: prints the lines of PAIRS_PER_VISIT pairs. */
int show_by_visits(struct visit *visit)
{
	struct seq_file *seq = visit->meta->seq;
	__u64 number = visit->meta->seq_num;
	const struct pair *pair;
	__u32 slot;
	int i;

	if (number >= PAIR_VISITS)
		return 0;
	if (number == 0)
		print_pairs_header(seq);
	NO_UNROLL
	for (i = 0; i < PAIRS_PER_VISIT; i++) {
		slot = number * PAIRS_PER_VISIT + i;
		pair = map_lookup(MAP_PAIRS_FD, &slot);
		if (!pair)
			break;
		print_pair(seq, pair);
	}
	return 0;
}

/* What the walk of one reader of `stats` has summed up so far. */
struct sums {
	__u64 bytes[2];
	__u64 counted[STAT_LINES];
};

/* Lines that are counted at one element of the walk; a worker has at least eight slots. */
#define LINES_AT_ONCE (STAT_LINES / 8)

/* Add one worker's counters, for the lines that belong to this slot. */
static inline void count(struct sums *sums, __u32 slot)
{
	__u32 worker = slot / SLOTS, line = slot % SLOTS * LINES_AT_ONCE, at;
	struct view_line *known;
	__u64 *counter, sum;
	int i;

	if (slot % SLOTS >= 8)
		return;
	NO_UNROLL
	for (i = 0; i < LINES_AT_ONCE; i++, line++) {
		__u32 key = line;

		known = map_lookup(MAP_STATS_FD, &key);
		if (!known)
			return;
		at = worker * BLOCK_WORDS + known->word;
		counter = map_lookup(MAP_COUNTERS_FD, &at);
		sum = counter ? *counter : 0;
		if (known->also) {
			at = worker * BLOCK_WORDS + known->also;
			counter = map_lookup(MAP_COUNTERS_FD, &at);
			sum += counter ? *counter : 0;
		}
		sums->counted[line & (STAT_LINES - 1)] += sum;
	}
}

/*
 * Both ways walk the pairs for their bytes, and print after the last one. Nothing is printed
 * before, so the whole walk happens within one read, and a reader that goes away leaves no sums
 * behind. The workers' counters are added up during the walk: a loop over all counters of all
 * workers would grow with the number of workers, and so would the verifier's work.
 */
static inline void sum_up(__u64 session, __u32 slot, const struct pair *pair)
{
	struct sums *sums, *none;
	struct look look;
	__u32 zero = 0;

	if (slot == 0) {
		none = map_lookup(MAP_ZERO_FD, &zero);
		if (none)
			map_update(MAP_SUMS_FD, &session, none);
	}
	sums = map_lookup(MAP_SUMS_FD, &session);
	if (!sums)
		return;
	count(sums, slot);
	if (look_at(pair, &look)) {
		sums->bytes[PF_UP] += look.bytes[PF_UP];
		sums->bytes[PF_DOWN] += look.bytes[PF_DOWN];
	}
}

/* Print all lines of `stats`, and delete the reader's sums. */
static inline void print_stats(struct seq_file *seq, __u64 session)
{
	/*
	 * The same after every line, whatever its kind: else the verifier goes through the next one
	 * once for each kind that this one may be of.
	 */
	volatile __u64 values[2] = {};
	char figure[] = "%-30s %llu\n", text[] = "%-30s %s\n";
	struct view_line *line;
	struct sums *sums;
	__u64 value;
	__u32 at;

	SAY(seq, "STAT                           VALUE");
	end_header(seq, map_pointer(MAP_PAIRS_FD));
	sums = map_lookup(MAP_SUMS_FD, &session);
	if (!sums) {
		/* No numbers instead of wrong ones. */
		SAY(seq, "# too many readers at once\n");
		return;
	}
	NO_UNROLL
	for (at = 0; at < STAT_LINES; at++) {
		__u32 number = at;

		line = map_lookup(MAP_STATS_FD, &number);
		if (!line)
			break;
		value = sums->counted[at & (STAT_LINES - 1)];
		if (line->kind == PF_NO_LINE || (line->kind == PF_NONZERO && !value))
			continue;
		if (line->kind == PF_UP_BYTES)
			value += sums->bytes[PF_UP];
		if (line->kind == PF_DOWN_BYTES)
			value += sums->bytes[PF_DOWN];
		values[0] = STRING(line->name);
		if (line->kind == PF_TEXT) {
			values[1] = STRING(line->text);
			bpf_seq_printf(seq, text, sizeof(text), (void *)values, sizeof(values));
		} else {
			values[1] = value;
			bpf_seq_printf(seq, figure, sizeof(figure), (void *)values, sizeof(values));
		}
		values[0] = values[1] = 0;
	}
	map_delete(MAP_SUMS_FD, &session);
}

/*
 * One element of the pair table: adds it to the reader's sums, and prints them after the last one.
 */
int stats(struct element *element)
{
	const struct pair *pair = element->value;
	const __u32 *key = element->key;

	if (key && pair)
		sum_up(element->meta->session_id, *key, pair);
	else
		print_stats(element->meta->seq, element->meta->session_id);
	return 0;
}

/* The same for visit n, of PAIRS_PER_VISIT pairs. */
int stats_by_visits(struct visit *visit)
{
	__u64 number = visit->meta->seq_num;
	const struct pair *pair;
	__u32 slot;
	int i;

	if (number == PAIR_VISITS)
		print_stats(visit->meta->seq, visit->meta->session_id);
	if (number >= PAIR_VISITS)
		return 0;
	NO_UNROLL
	for (i = 0; i < PAIRS_PER_VISIT; i++) {
		slot = number * PAIRS_PER_VISIT + i;
		pair = map_lookup(MAP_PAIRS_FD, &slot);
		if (!pair)
			break;
		sum_up(visit->meta->session_id, slot, pair);
	}
	return 0;
}

/* The sum of a counter over all workers. */
static inline __u64 counted(__u32 word)
{
	__u64 total = 0, *counter;
	__u32 worker, at;

	NO_UNROLL
	for (worker = 0; worker < WORKERS; worker++) {
		at = worker * BLOCK_WORDS + word;
		counter = map_lookup(MAP_COUNTERS_FD, &at);
		if (!counter)
			break;
		total += *counter;
	}
	return total;
}

/* Print the header line of `listeners`. */
static inline void print_listeners_header(struct seq_file *seq)
{
	SAY(seq, "NAME            BIND                  PROTOCOL   ACCEPTED");
	SAY(seq, "       OPEN    REFUSED");
	end_header(seq, map_pointer(MAP_LISTENERS_FD));
}

/* Print the line of one listener, from a consistent copy; nothing if its entry is unused. */
static inline void print_listener(struct seq_file *seq, const struct view_line *line)
{
	const volatile __u64 *sequence = &line->sequence;
	struct view_line copy;
	__u64 before;
	int i;

	NO_UNROLL
	for (i = 0; i < LOOKS; i++) {
		before = *sequence;
		if (before & 1)
			continue;
		barrier();
		__builtin_memcpy(&copy, line, sizeof(copy));
		barrier();
		if (*sequence == before)
			goto print;
	}
	return;
print:
	if (copy.kind != PF_LISTENER)
		return;
	PRINT(seq, "%-15s %-21s ", STRING(copy.name), STRING(copy.text));
	PRINT(seq, "%-8s %10llu %10llu %10llu\n", STRING(copy.protocol), counted(copy.word),
	      counted(copy.word + 1), counted(copy.word + 2));
}

/* One listener: prints its line, and the header before the first one. */
int listeners(struct element *element)
{
	struct seq_file *seq = element->meta->seq;
	const struct view_line *line = element->value;

	if (!element->key || !line)
		return 0;
	if (*element->key == 0)
		print_listeners_header(seq);
	print_listener(seq, line);
	return 0;
}

/* The same for visit n: the line of listener n. */
int listeners_by_visits(struct visit *visit)
{
	struct seq_file *seq = visit->meta->seq;
	__u64 number = visit->meta->seq_num;
	const struct view_line *line;
	__u32 key = number;

	if (number >= LISTENER_LINES)
		return 0;
	if (number == 0)
		print_listeners_header(seq);
	line = map_lookup(MAP_LISTENERS_FD, &key);
	if (line)
		print_listener(seq, line);
	return 0;
}

#ifdef MAP_ALL_OWNERS_FD
/*
 * Write how many redirected bytes wait in the kernel for one socket of the sockmap datapath. The
 * verdict program knows that only as of its last packet; here the target's own count of what it has
 * taken is read. A backlog below `least` is not written. A worker's map is trusted only for pairs
 * in that worker's own window.
 */
static inline void tell_backlog_of(struct seq_file *seq, __u32 worker, __u64 cookie,
				   struct tcp_sock *tcp, __u64 least)
{
	struct backlog found = {};
	struct kernel_direction *seen;
	struct pair *pair;
	struct socket_owner *owner;
	void *owners;
	__s32 waiting;

	owners = map_lookup(MAP_ALL_OWNERS_FD, &worker);
	if (!owners)
		return;
	owner = bpf_map_lookup_elem_((uintptr_t)owners, &cookie);
	if (!owner || owner->slot >= SLOTS)
		return;
	found.slot = worker * SLOTS + owner->slot;
	pair = map_lookup(MAP_PAIRS_FD, &found.slot);
	if (!pair)
		return;
	/* The source of one direction is the target of the other. */
	found.direction = owner->direction == PF_UP ? PF_DOWN : PF_UP;
	seen = found.direction == PF_UP ? &pair->kernel[PF_UP] : &pair->kernel[PF_DOWN];
	if (!seen->redirected_bytes)
		return;
	waiting = (__u32)seen->redirected_bytes - seen->latch_redirected -
		  (*(volatile __u32 *)((void *)tcp + TCP_SOCK_WRITE_SEQ) - seen->latch_write_seq);
	/*
	 * Negative once userspace has written, too: it writes only after the last redirected byte.
	 */
	found.bytes = waiting > 0 ? waiting : 0;
	if (found.bytes >= least)
		bpf_seq_write(seq, &found, sizeof(found));
}

/* Write the backlog of a socket, by the map of each worker. */
static inline void tell_backlog(struct seq_file *seq, __u64 cookie, struct tcp_sock *tcp,
				__u64 least)
{
	__u32 worker;

	NO_UNROLL
	for (worker = 0; worker < WORKERS; worker++)
		tell_backlog_of(seq, worker, cookie, tcp, least);
}

/* Walk the sockets in one worker's map. */
int backlog(struct socket_element *element)
{
	struct sock *sk = element->sk;
	struct tcp_sock *tcp;

	if (!element->key || !sk)
		return 0;
	tcp = (struct tcp_sock *)bpf_skc_to_tcp_sock(sk);
	if (tcp)
		tell_backlog(element->meta->seq, *element->key, tcp, 1);
	return 0;
}

/*
 * Walk all TCP sockets of the reader's network namespace. A socket of another namespace (`forward`
 * can have one) is missing from this walk; a backlog of 0 is written, too, to tell the two cases
 * apart.
 */
int backlog_of_tcp(struct tcp_element *element)
{
	struct sock *sk = element->sk;
	struct tcp_sock *tcp;

	if (!sk)
		return 0;
	tcp = (struct tcp_sock *)bpf_skc_to_tcp_sock(sk);
	if (tcp)
		tell_backlog(element->meta->seq, bpf_get_socket_cookie(tcp), tcp, 0);
	return 0;
}
#endif
