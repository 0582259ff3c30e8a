/*
 * Both ends of many TCP transfers whose every byte and every ending is known in advance.
 *
 *	transfers serve PORT NAME=NUMBER...
 *	transfers dial HOST PORT DESTINATION COUNT NAME=NUMBER...
 *
 * `dial` makes COUNT connections, `parallel` at a time. Each begins with the instruction for
 * DESTINATION ("-": none, the connection is a direct one) and a header from which the other end
 * knows its part; then both ends send their bytes at once. Every byte received is compared. How
 * many bytes, in which pieces, with which buffers and who sends its FIN first come from `seed` and
 * the connection's number.
 *
 * The end that sends its FIN last keeps back a quarter of its bytes until it has read the other's
 * end of file: so bytes flow in a half-closed connection too.
 *
 * One line per connection and end, when it is over:
 *
 *	ROLE NUMBER ENDING SENT OF_SENT RECEIVED OF_RECEIVED GAP_US TOOK_MS LEFT_MS
 *
 * ENDING: eof (all as it must be), reset, short (an end of file too early), extra (a byte too
 * many), corrupt (a byte that was not sent; RECEIVED says where), stalled (nothing moved for
 * `stall` ms), refused (no connection), answer (the forwarder answered something else), or an
 * errno. GAP_US is the longest time between two pieces received, LEFT_MS when the client was done,
 * from the start.
 *
 * `hold`: a client that has sent and received three quarters waits with the rest; once all of them
 * have come so far it says "held" and goes on when a line comes in. The server ends with its stdin.
 * `quiet`: the same for a client that has had its answer and sent nothing behind the instruction.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define MAGIC	   0x7472616e73666572ULL
#define ANSWER	   "06OK56"
#define PIECE_MOST 262144
#define TAKEN_MOST 32 /* pieces of what has come, in one turn */
#define CLIENT	   0
#define SERVER	   1

struct options {
	uint64_t seed;
	uint64_t largest;  /* bytes of one direction, header included */
	uint64_t exactly;  /* if not 0: that many in each direction */
	uint64_t parallel; /* connections at a time */
	uint64_t stall;	   /* ms without any progress after which a connection has failed */
	uint64_t wait;	   /* 1: send nothing behind the instruction before its answer */
	uint64_t hold;
	uint64_t order; /* who sends its FIN first; 3: by seed */
	uint64_t first; /* number of the first connection */
	uint64_t calm;	/* 1: no small buffers, no pauses, large pieces */
	uint64_t rest;	/* ms that a client is silent after the answer */
	uint64_t quiet;
};

enum {
	BOTH_FIRST,
	CLIENT_FIRST,
	SERVER_FIRST,
	BY_SEED
};

struct header {
	uint64_t magic, number;
	struct options options;
};

_Static_assert(sizeof(struct header) == 112, "HEADER_BYTES in transfers.py");

struct plan {
	uint64_t bytes[2]; /* by who sends them */
	uint32_t piece[2];
	uint32_t order;
	int small[2], pauses[2];
};

struct end {
	int fd, role, connected, fin_sent, eof, held, paused;
	uint64_t number, sent, received, preface_sent, answer_left;
	uint64_t began_ns, moved_ns, read_ns, gap_ns, resume_ns, random;
	struct plan plan;
	struct options options;
	struct header header; /* a server's, while it is read */
	size_t header_read;
	struct end *next, *previous;
};

static struct options defaults = {
	.largest = 1 << 20, .parallel = 32, .stall = 20000, .wait = 1, .order = BY_SEED
};
static int polls, going = 1, listening = -1;
static uint64_t started_ns, count, opened, ended, holding, failed;
static char preface[256];
static size_t preface_length;
static struct sockaddr_storage target;
static socklen_t target_length;
static struct end ends = { .next = &ends, .previous = &ends };
static uint8_t out[PIECE_MOST + 8], in[PIECE_MOST], good[PIECE_MOST + 8];

static uint64_t now_ns(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (uint64_t)t.tv_sec * 1000000000ULL + (uint64_t)t.tv_nsec;
}

static uint64_t mix(uint64_t x)
{
	x += 0x9e3779b97f4a7c15ULL;
	x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ULL;
	x = (x ^ (x >> 27)) * 0x94d049bb133111ebULL;
	return x ^ (x >> 31);
}

static uint64_t draw(uint64_t *state)
{
	*state += 0x632be59bd9b4e019ULL;
	return mix(*state);
}

static uint64_t stream_key(const struct end *end, int sender)
{
	return mix(mix(end->options.seed) ^ (end->number * 2 + (uint64_t)sender));
}

/* The bytes of a stream from an offset on; a pointer to the first of them inside `buffer`. */
static const uint8_t *stream(uint64_t key, uint64_t offset, size_t bytes, uint8_t *buffer)
{
	uint64_t word = offset / 8, last = (offset + bytes + 7) / 8, value;
	size_t at = 0;

	for (; word < last && at + 8 <= PIECE_MOST + 8; word++, at += 8) {
		value = mix(key + word);
		memcpy(buffer + at, &value, 8);
	}
	return buffer + offset % 8;
}

static uint64_t some_bytes(uint64_t *random, uint64_t largest)
{
	uint64_t bits = 0, size;

	while ((2ULL << bits) <= largest)
		bits++;
	bits = draw(random) % (bits + 1);
	size = (1ULL << bits) + draw(random) % (1ULL << bits);
	return size < largest ? size : largest;
}

static struct plan make_plan(const struct options *options, uint64_t number)
{
	uint64_t random = mix(options->seed) ^ mix(number);
	struct plan plan;
	int role;

	for (role = 0; role < 2; role++) {
		plan.bytes[role] = some_bytes(&random, options->largest);
		if (options->exactly)
			plan.bytes[role] = options->exactly;
		plan.piece[role] = (uint32_t)some_bytes(&random, PIECE_MOST);
		/* A megabyte of tiny pieces is slow and shows nothing more. */
		while (plan.piece[role] < plan.bytes[role] / 256)
			plan.piece[role] *= 2;
		if (plan.piece[role] > PIECE_MOST - 8)
			plan.piece[role] = PIECE_MOST - 8;
		plan.small[role] = draw(&random) % 8 == 0 && plan.bytes[role] < 60000;
		plan.pauses[role] = draw(&random) % 4 == 0;
		if (options->calm) {
			plan.small[role] = plan.pauses[role] = 0;
			plan.piece[role] = PIECE_MOST - 8;
		}
	}
	plan.order = draw(&random) % 3;
	if (options->order != BY_SEED)
		plan.order = (uint32_t)options->order;
	if (options->hold && plan.order == SERVER_FIRST)
		plan.order = CLIENT_FIRST; /* the word comes to the client */
	return plan;
}

static int is_last(const struct end *end)
{
	return end->plan.order == (end->role == CLIENT ? SERVER_FIRST : CLIENT_FIRST);
}

/* With `hold`: whether it waits for the word, a server for what its client sends after that. */
static int is_holding(const struct end *end)
{
	uint64_t theirs = end->plan.bytes[CLIENT];

	if (!end->options.hold)
		return 0;
	if (end->role == CLIENT)
		return !going;
	return end->received < theirs && end->received <= theirs - theirs / 4;
}

/* How many bytes this end may have sent by now. */
static uint64_t allowed(const struct end *end)
{
	uint64_t all = end->plan.bytes[end->role];

	if ((is_last(end) && !end->eof) || is_holding(end))
		return all - all / 4;
	return all;
}

static int fin_is_due(const struct end *end)
{
	return end->sent == end->plan.bytes[end->role] && (!is_last(end) || end->eof) &&
	       !end->fin_sent;
}

static void interest(struct end *end)
{
	struct epoll_event event = { .data.ptr = end };
	int writes = !end->paused && (end->sent < allowed(end) || fin_is_due(end));

	if (end->role == CLIENT)
		writes = !end->connected || end->preface_sent < preface_length ||
			 (writes && !(end->options.wait && end->answer_left));
	else
		writes = writes && end->header_read == sizeof(end->header);
	event.events = (end->eof ? 0u : EPOLLIN) | (writes ? EPOLLOUT : 0u);
	epoll_ctl(polls, EPOLL_CTL_MOD, end->fd, &event);
}

static void over(struct end *end, const char *ending)
{
	static const struct linger at_once = { 1, 0 };
	static const char *const names[] = { "client", "server" };
	uint64_t now = now_ns();

	if (strcmp(ending, "eof")) {
		failed++;
		setsockopt(end->fd, SOL_SOCKET, SO_LINGER, &at_once, sizeof(at_once));
	}
	close(end->fd);
	printf("%s %llu %s %llu %llu %llu %llu %llu %llu %llu\n", names[end->role],
	       (unsigned long long)end->number, ending, (unsigned long long)end->sent,
	       (unsigned long long)end->plan.bytes[end->role], (unsigned long long)end->received,
	       (unsigned long long)end->plan.bytes[!end->role],
	       (unsigned long long)(end->gap_ns / 1000),
	       (unsigned long long)((now - end->began_ns) / 1000000),
	       (unsigned long long)((now - started_ns) / 1000000));
	end->next->previous = end->previous;
	end->previous->next = end->next;
	if (end->held)
		holding--;
	free(end);
	ended++;
}

static const char *broken(int error)
{
	static char text[16];

	if (error == ECONNRESET || error == EPIPE || error == ENOTCONN)
		return "reset";
	if (error == ECONNREFUSED)
		return "refused";
	snprintf(text, sizeof(text), "errno%d", error);
	return text;
}

static struct end *add(int fd, int role, uint64_t number, const struct options *options)
{
	struct end *end = calloc(1, sizeof(*end));
	struct epoll_event event = { .events = EPOLLIN, .data.ptr = end };

	if (!end)
		exit(3);
	end->fd = fd;
	end->role = role;
	end->number = number;
	end->options = *options;
	end->began_ns = end->moved_ns = now_ns();
	end->next = &ends;
	end->previous = ends.previous;
	ends.previous->next = end;
	ends.previous = end;
	epoll_ctl(polls, EPOLL_CTL_ADD, fd, &event);
	return end;
}

static void shape(struct end *end)
{
	int on = 1, small = 8192;

	end->plan = make_plan(&end->options, end->number);
	end->random = mix(end->number * 2 + (uint64_t)end->role);
	if (end->plan.piece[end->role] % 2 || end->options.calm)
		setsockopt(end->fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof(on));
	if (end->plan.small[end->role])
		setsockopt(end->fd, SOL_SOCKET, SO_SNDBUF, &small, sizeof(small));
	if (end->plan.small[!end->role])
		setsockopt(end->fd, SOL_SOCKET, SO_RCVBUF, &small, sizeof(small));
}

/* Send what may be sent; 0, or what broke. */
static const char *transmit(struct end *end)
{
	uint64_t most, piece;
	int pieces;
	ssize_t taken;
	size_t header;

	while (end->role == CLIENT && end->preface_sent < preface_length) {
		taken = send(end->fd, preface + end->preface_sent,
			     preface_length - end->preface_sent,
			     MSG_NOSIGNAL | (end->options.wait ? 0 : MSG_MORE));
		if (taken < 0)
			return errno == EAGAIN ? NULL : broken(errno);
		end->preface_sent += (uint64_t)taken;
		end->moved_ns = now_ns();
	}
	if (end->role == CLIENT && end->options.wait && end->answer_left)
		return NULL;
	while (end->role == CLIENT && !end->paused && end->header_read < sizeof(struct header)) {
		end->header = (struct header){ MAGIC, end->number, end->options };
		header = sizeof(struct header) - end->header_read;
		taken = send(end->fd, (char *)&end->header + end->header_read, header,
			     MSG_NOSIGNAL | MSG_MORE);
		if (taken < 0)
			return errno == EAGAIN ? NULL : broken(errno);
		end->header_read += (size_t)taken;
	}
	/* A few pieces at a time: what has come meanwhile is not to wait for its reader. */
	for (pieces = 0; pieces < 4 && !end->fin_sent && !end->paused; pieces++) {
		most = allowed(end);
		if (end->sent >= most) {
			if (fin_is_due(end)) {
				if (shutdown(end->fd, SHUT_WR))
					return broken(errno);
				end->fin_sent = 1;
			}
			break;
		}
		piece = most - end->sent < end->plan.piece[end->role] ? most - end->sent
								      : end->plan.piece[end->role];
		taken = send(end->fd, stream(stream_key(end, end->role), end->sent, piece, out),
			     piece, MSG_NOSIGNAL);
		if (taken < 0)
			return errno == EAGAIN ? NULL : broken(errno);
		end->sent += (uint64_t)taken;
		end->moved_ns = now_ns();
		if (end->plan.pauses[end->role] && draw(&end->random) % 16 == 0) {
			end->paused = 1;
			end->resume_ns = end->moved_ns + draw(&end->random) % 3000000;
		}
	}
	return NULL;
}

/* Read a piece of what is there; 0, or how it ended. `more`: perhaps there is. */
static const char *take(struct end *end, int *more)
{
	const uint8_t *expected;
	ssize_t got;
	size_t most = PIECE_MOST - 8;
	uint64_t i, now;

	*more = 0;
	if (end->role == SERVER && end->header_read < sizeof(end->header)) {
		got = recv(end->fd, (char *)&end->header + end->header_read,
			   sizeof(end->header) - end->header_read, 0);
		if (got <= 0)
			return got ? (errno == EAGAIN ? NULL : broken(errno)) : "short";
		*more = 1;
		end->header_read += (size_t)got;
		end->moved_ns = now_ns();
		if (end->header_read == sizeof(end->header)) {
			if (end->header.magic != MAGIC)
				return "corrupt";
			end->number = end->header.number;
			end->options = end->header.options;
			shape(end);
		}
		return NULL;
	}
	if (end->answer_left)
		most = end->answer_left;
	got = recv(end->fd, in, most, 0);
	if (got < 0)
		return errno == EAGAIN ? NULL : broken(errno);
	now = now_ns();
	end->moved_ns = now;
	*more = got > 0;
	if (!got) {
		end->eof = 1;
		return end->received == end->plan.bytes[!end->role] && !end->answer_left ? NULL
											 : "short";
	}
	if (end->answer_left) {
		if (memcmp(in, &ANSWER[strlen(ANSWER) - end->answer_left], (size_t)got))
			return "answer";
		end->answer_left -= (uint64_t)got;
		if (!end->answer_left && end->options.quiet && !going) {
			end->held = end->paused = 1;
			end->resume_ns = UINT64_MAX;
			holding++;
		} else if (!end->answer_left && end->options.rest) {
			end->paused = 1;
			end->resume_ns = now + end->options.rest * 1000000ULL;
		}
		return NULL;
	}
	if (end->read_ns && now - end->read_ns > end->gap_ns)
		end->gap_ns = now - end->read_ns;
	end->read_ns = now;
	expected = stream(stream_key(end, !end->role), end->received, (size_t)got, good);
	if (memcmp(in, expected, (size_t)got)) {
		for (i = 0; in[i] == expected[i]; i++)
			;
		end->received += i;
		return "corrupt";
	}
	end->received += (uint64_t)got;
	return end->received > end->plan.bytes[!end->role] ? "extra" : NULL;
}

/*
 * Read all that is there; 0, or how it ended. Were it a piece in each turn, an end with megabytes
 * in its buffer would need many turns, which last a second where the processors have much to do;
 * and the other end, which has sent them all, would think that nothing moves any more.
 */
static const char *take_all(struct end *end)
{
	const char *ending = NULL;
	int pieces, more = 1;

	for (pieces = 0; pieces < TAKEN_MOST && more && !ending; pieces++)
		ending = take(end, &more);
	return ending;
}

static void ready(struct end *end, uint32_t events)
{
	const char *ending = NULL;
	int error = 0;
	socklen_t length = sizeof(error);

	if (!end->connected) {
		getsockopt(end->fd, SOL_SOCKET, SO_ERROR, &error, &length);
		if (error) {
			over(end, broken(error));
			return;
		}
		if (!(events & EPOLLOUT))
			return;
		end->connected = 1;
		end->moved_ns = now_ns();
	}
	if ((events & (EPOLLIN | EPOLLERR | EPOLLHUP)) && !end->eof)
		ending = take_all(end);
	if (!ending && (end->role == CLIENT || end->header_read == sizeof(end->header)))
		ending = transmit(end);
	if (!ending && (events & EPOLLERR) && end->eof) {
		getsockopt(end->fd, SOL_SOCKET, SO_ERROR, &error, &length);
		ending = error ? broken(error) : NULL;
	}
	if (!ending && end->eof && end->fin_sent)
		ending = "eof";
	if (ending) {
		over(end, ending);
		return;
	}
	if (end->role == CLIENT && end->options.hold && !end->held && !going &&
	    end->sent == allowed(end) &&
	    end->received == end->plan.bytes[SERVER] - end->plan.bytes[SERVER] / 4) {
		end->held = 1;
		holding++;
	}
	interest(end);
}

static void dial(uint64_t number)
{
	int fd = socket(target.ss_family, SOCK_STREAM | SOCK_NONBLOCK, 0);
	struct end *end;

	if (fd < 0) {
		perror("socket");
		exit(3);
	}
	end = add(fd, CLIENT, number, &defaults);
	end->answer_left = preface_length ? strlen(ANSWER) : 0;
	shape(end);
	if (connect(fd, (struct sockaddr *)&target, target_length) && errno != EINPROGRESS) {
		over(end, broken(errno));
		return;
	}
	interest(end);
}

/* What is due by the clock: ends that pause, ends in which nothing moves. */
static void tick(void)
{
	struct end *end, *next;
	uint64_t now = now_ns();

	for (end = ends.next; end != &ends; end = next) {
		next = end->next;
		if (end->paused && end->resume_ns <= now) {
			end->paused = 0;
			interest(end);
		}
		if (!end->held &&
		    !(end->role == SERVER && (is_holding(end) || !end->header_read)) &&
		    now - end->moved_ns > end->options.stall * 1000000ULL)
			over(end, "stalled");
	}
}

static void go(void)
{
	struct end *end;
	uint64_t now = now_ns();

	going = 1;
	for (end = ends.next; end != &ends; end = end->next) {
		if (end->held) {
			end->held = end->paused = 0;
			holding--;
		}
		end->moved_ns = now;
		end->read_ns = 0;
		interest(end);
	}
}

static void listen_at(const char *port)
{
	struct sockaddr_in6 any = { .sin6_family = AF_INET6,
				    .sin6_port = htons((uint16_t)atoi(port)) };
	struct epoll_event event = { .events = EPOLLIN, .data.ptr = &listening };
	int on = 1;
	socklen_t length = sizeof(any);

	listening = socket(AF_INET6, SOCK_STREAM | SOCK_NONBLOCK, 0);
	setsockopt(listening, SOL_SOCKET, SO_REUSEADDR, &on, sizeof(on));
	if (bind(listening, (struct sockaddr *)&any, sizeof(any)) || listen(listening, 4096)) {
		perror("listen");
		exit(3);
	}
	getsockname(listening, (struct sockaddr *)&any, &length);
	epoll_ctl(polls, EPOLL_CTL_ADD, listening, &event);
	printf("listening %d\n", ntohs(any.sin6_port));
}

static void aim_at(const char *host, const char *port, const char *destination)
{
	struct addrinfo *found, wanted = { .ai_socktype = SOCK_STREAM,
					   .ai_flags = AI_NUMERICHOST | AI_NUMERICSERV };
	unsigned int sum = 0;
	size_t i;

	if (getaddrinfo(host, port, &wanted, &found))
		exit(2);
	memcpy(&target, found->ai_addr, found->ai_addrlen);
	target_length = found->ai_addrlen;
	freeaddrinfo(found);
	if (strcmp(destination, "-")) {
		preface_length = (size_t)snprintf(preface, sizeof(preface), "%02zu%s",
						  strlen(destination) + 4, destination);
		for (i = 0; i < preface_length; i++)
			sum += (unsigned char)preface[i];
		preface_length += (size_t)snprintf(preface + preface_length, 8, "%02u", sum % 100);
	}
}

static void set_options(char **words)
{
	static const char *const names[] = { "seed",  "largest", "exactly", "parallel",
					     "stall", "wait",	 "hold",    "order",
					     "first", "calm",	 "rest",    "quiet" };
	uint64_t *fields = (uint64_t *)&defaults;
	size_t i, length;

	for (; *words; words++) {
		for (i = 0; i < sizeof(names) / sizeof(names[0]); i++) {
			length = strlen(names[i]);
			if (!strncmp(*words, names[i], length) && (*words)[length] == '=')
				break;
		}
		if (i == sizeof(names) / sizeof(names[0]))
			exit(2);
		fields[i] = strtoull(*words + length + 1, NULL, 10);
	}
}

int main(int argc, char **words)
{
	struct epoll_event events[256], standard = { .events = EPOLLIN, .data.ptr = &polls };
	int is_server = argc > 2 && !strcmp(words[1], "serve"), n, i, fd, said = 0, stdin_open = 1;
	struct end *end;
	char line[64];
	uint64_t next_tick = 0;

	signal(SIGPIPE, SIG_IGN);
	setvbuf(stdout, NULL, _IOLBF, 1 << 16);
	polls = epoll_create1(EPOLL_CLOEXEC);
	started_ns = now_ns();
	if (is_server) {
		set_options(words + 3);
		listen_at(words[2]);
	} else if (argc > 5 && !strcmp(words[1], "dial")) {
		set_options(words + 6);
		aim_at(words[2], words[3], words[4]);
		count = strtoull(words[5], NULL, 10);
		going = !defaults.hold && !defaults.quiet;
	} else {
		return 2;
	}
	epoll_ctl(polls, EPOLL_CTL_ADD, 0, &standard);
	while (is_server ? stdin_open || ends.next != &ends : ended < count) {
		while (!is_server && opened < count && opened - ended - holding < defaults.parallel)
			dial(defaults.first + opened++);
		if (!said && !going && holding + ended == count) {
			printf("held\n");
			said = 1;
		}
		n = epoll_wait(polls, events, 256, 2);
		for (i = 0; i < n; i++) {
			if (events[i].data.ptr == &polls) {
				if (read(0, line, sizeof(line)) <= 0) {
					epoll_ctl(polls, EPOLL_CTL_DEL, 0, NULL);
					stdin_open = 0;
				} else if (!going) {
					go();
				}
			} else if (events[i].data.ptr == &listening) {
				while ((fd = accept4(listening, NULL, NULL, SOCK_NONBLOCK)) >= 0) {
					end = add(fd, SERVER, 0, &defaults);
					end->connected = 1;
				}
			} else {
				ready(events[i].data.ptr, events[i].events);
			}
		}
		if (now_ns() >= next_tick) {
			tick();
			next_tick = now_ns() + 1000000;
		}
	}
	return failed != 0;
}
