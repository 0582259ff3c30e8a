/*
 * Both ends of thousands of connections that go on, and how long each of them stands still.
 *
 *	pauses
 *
 * The first line it prints says where its servers are: {"tcp": PORT, "udp": PORT}; both send back
 * what they get. Then one order a line, each of which is answered by one line:
 *
 *	open NAME tcp|udp HOST PORT COUNT INTERVAL_US BYTES
 *		So many clients, under a name. Each says something, waits until all of it has come
 *		back, compares it, and does so again after the interval. BYTES is the most it says.
 *	connect NAME HOST PORT RATE
 *		From now on so many new connections in a second, each with one question and answer.
 *	report	What was seen since the last report, as JSON. Times are in ms: `turn` of the answers
 *		that were waited for, `longest` of the longest wait of each client, one that has not
 *		ended yet among them. `buckets`: the most that falls into each, and how many have.
 *	stop	Nobody says anything new; the clients of TCP end in order, and the servers with
 * them.
 *
 * A fault is a byte that is another, an end that was not asked for, an error of a socket, a new
 * connection that was refused, or an answer that did not come within `PATIENCE_S`; the report
 * counts them by kind. A datagram that was lost is counted by itself and said again after `LOST_S`.
 *
 * The servers are a process of their own, so that each process has but one descriptor for a pair.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define NS_PER_S	1000000000ULL
#define NS_PER_US	1000ULL
#define PATIENCE_S	20
#define LOST_S		3
#define MOST_BYTES	16384
#define PATTERN		65521 /* a prime: clients and turns begin at different places of it */
#define MOST_GROUPS	16
#define MOST_CONNECTING 512 /* at a time: fewer than wait in a listener's queue */
#define MOST_NAME	32
#define EVENTS		64
#define SLOTS		16384 /* of the wheel: one a millisecond */
#define STEPS		16    /* of a histogram in each power of two: a value is known to 6 % */
#define BUCKETS		(STEPS * 44)

enum life {
	CONNECTING,
	RESTING,
	ASKING,
	ENDING,
	OVER
};

struct histogram {
	uint64_t count, most_ns;
	uint64_t buckets[BUCKETS];
};

struct group {
	char name[MOST_NAME];
	bool is_udp, is_new; /* is_new: connections that are made for one question */
	uint64_t interval_ns, most_bytes, clients, connecting, lost, turns;
	uint64_t done, next_ns,
		every_ns; /* is_new: those that have ended; when the next one is due */
	struct sockaddr_storage address;
	socklen_t address_size;
	struct histogram turn;
	struct client *first;
};

struct client {
	struct client *next_of_group, *before_in_group, *next_due;
	struct group *group;
	uint64_t number, turn, asked_ns, longest_ns;
	uint32_t size, came;
	int fd;
	enum life life;
	bool has_lost; /* a datagram */
};

static char pattern[PATTERN + MOST_BYTES];
static struct group groups[MOST_GROUPS];
static size_t group_count;
static struct client *wheel[SLOTS];
static uint64_t turned_ms, looked_ns, numbers, faults;
static bool stopping;
static int epoll_fd;
/* Faults by kind, in the order in which they were met. */
static struct {
	char what[64];
	uint64_t count;
} kinds[32];

static void __attribute__((noreturn, format(printf, 1, 2))) die(const char *format, ...)
{
	va_list arguments;

	va_start(arguments, format);
	fputs("pauses: ", stderr);
	vfprintf(stderr, format, arguments);
	fprintf(stderr, ": %s\n", strerror(errno));
	va_end(arguments);
	exit(1);
}

static uint64_t now_ns(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return (uint64_t)now.tv_sec * NS_PER_S + (uint64_t)now.tv_nsec;
}

static void add_sample(struct histogram *to, uint64_t ns)
{
	uint64_t value = ns / NS_PER_US, power = 0;

	while (value >> (power + 1) >= STEPS)
		power++;
	size_t bucket = (size_t)(value < STEPS ? value : STEPS * power + (value >> power));
	to->buckets[bucket < BUCKETS ? bucket : BUCKETS - 1]++;
	to->count++;
	if (ns > to->most_ns)
		to->most_ns = ns;
}

/* The largest value that falls into a bucket. */
static double bucket_ms(uint64_t bucket)
{
	uint64_t power = bucket < 2 * STEPS ? 0 : bucket / STEPS - 1;

	return (double)(((bucket - STEPS * power) + 1) << power) / 1e3;
}

/* The largest value that is in the bucket of this percentile. */
static double percentile_ms(const struct histogram *of, double percent)
{
	uint64_t wanted = (uint64_t)((double)of->count * percent / 100), seen = 0;

	for (uint64_t bucket = 0; bucket < BUCKETS; bucket++) {
		seen += of->buckets[bucket];
		if (seen <= wanted)
			continue;
		double ms = bucket_ms(bucket), most_ms = (double)of->most_ns / 1e6;

		return ms < most_ms ? ms : most_ms;
	}
	return (double)of->most_ns / 1e6;
}

static void print_histogram(const char *name, const struct histogram *of)
{
	const char *separator = "";

	printf("\"%s\": {\"count\": %llu, \"p50\": %.3f, \"p90\": %.3f, \"p99\": %.3f, \"p99.9\": "
	       "%.3f, "
	       "\"most\": %.3f, \"buckets\": [",
	       name, (unsigned long long)of->count, percentile_ms(of, 50), percentile_ms(of, 90),
	       percentile_ms(of, 99), percentile_ms(of, 99.9), (double)of->most_ns / 1e6);
	for (uint64_t bucket = 0; bucket < BUCKETS; bucket++) {
		if (!of->buckets[bucket])
			continue;
		printf("%s[%.3f, %llu]", separator, bucket_ms(bucket),
		       (unsigned long long)of->buckets[bucket]);
		separator = ", ";
	}
	printf("]}");
}

static void watch(int operation, int fd, uint32_t events, void *owner)
{
	struct epoll_event event = { .events = events, .data.ptr = owner };

	if (epoll_ctl(epoll_fd, operation, fd, &event))
		die("epoll_ctl");
}

/* In the wheel are those that rest, and that have ended meanwhile. */
static void put_into_wheel(struct client *client, uint64_t due_ns)
{
	uint64_t ms = due_ns / 1000000;

	if (ms <= turned_ms)
		ms = turned_ms + 1;
	if (ms >= turned_ms + SLOTS)
		ms = turned_ms + SLOTS - 1;
	client->next_due = wheel[ms % SLOTS];
	wheel[ms % SLOTS] = client;
}

static void end_client(struct client *client)
{
	if (client->life == CONNECTING)
		client->group->connecting--;
	close(client->fd);
	client->fd = -1;
	client->life = OVER;
	if (!client->group->is_new)
		return;
	/* It has never rested, and so nobody else knows of it. */
	if (client->before_in_group)
		client->before_in_group->next_of_group = client->next_of_group;
	else
		client->group->first = client->next_of_group;
	if (client->next_of_group)
		client->next_of_group->before_in_group = client->before_in_group;
	free(client);
}

static void fault(struct client *client, const char *what)
{
	char text[64];

	snprintf(text, sizeof(text), "%s: %s", client->group->name, what);
	faults++;
	for (size_t i = 0; i < sizeof(kinds) / sizeof(*kinds); i++) {
		if (!kinds[i].count)
			memcpy(kinds[i].what, text, sizeof(text));
		if (!strcmp(kinds[i].what, text)) {
			kinds[i].count++;
			break;
		}
	}
	end_client(client);
}

static const char *begin_of(const struct client *client)
{
	return pattern + (client->number * 7919 + client->turn * 104729) % PATTERN;
}

static void ask(struct client *client, uint64_t now)
{
	struct group *group = client->group;
	uint64_t most = group->most_bytes;

	client->turn++;
	/* Mostly short, now and then all of it. */
	client->size =
		(uint32_t)(client->turn % 8 ? 1 + (client->number + client->turn) % 200 : most);
	if (client->size > most)
		client->size = (uint32_t)most;
	if (group->is_udp && client->size < 16)
		client->size = 16;
	client->came = 0;
	if (!group->is_new) /* of the others it is the time to connect, too */
		client->asked_ns = now;
	client->life = ASKING;
	ssize_t sent = send(client->fd, begin_of(client), client->size, MSG_NOSIGNAL);
	if (sent != (ssize_t)client->size)
		fault(client, sent < 0 ? strerrorname_np(errno) : "no room for a question");
}

static void rest(struct client *client, uint64_t now)
{
	client->life = RESTING;
	if (stopping)
		return;
	/* Not all at once. */
	uint64_t interval_ns = client->group->interval_ns, jitter_ns = interval_ns / 4;

	if (jitter_ns)
		interval_ns += (client->number * 2654435761ULL + client->turn * 40503) % jitter_ns;
	put_into_wheel(client, now + interval_ns);
}

static void answered(struct client *client, uint64_t now)
{
	uint64_t took = now - client->asked_ns;

	add_sample(&client->group->turn, took);
	client->group->turns++;
	if (took > client->longest_ns)
		client->longest_ns = took;
	if (client->group->is_new) {
		client->life = ENDING;
		shutdown(client->fd, SHUT_WR);
		return;
	}
	rest(client, now);
}

static void connected(struct client *client, uint64_t now)
{
	int error = 0, one = 1;
	socklen_t size = sizeof(error);

	getsockopt(client->fd, SOL_SOCKET, SO_ERROR, &error, &size);
	if (error) {
		fault(client, strerrorname_np(error));
		return;
	}
	setsockopt(client->fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one));
	watch(EPOLL_CTL_MOD, client->fd, EPOLLIN | EPOLLRDHUP, client);
	client->group->connecting--;
	ask(client, now);
}

static void readable(struct client *client, uint64_t now)
{
	static char got[MOST_BYTES + 1];
	ssize_t count = recv(client->fd, got, sizeof(got), MSG_DONTWAIT);

	if (count < 0) {
		if (errno != EAGAIN && errno != EINTR)
			fault(client, strerrorname_np(errno));
		return;
	}
	if (client->group->is_udp) {
		/* One that was given up may come after all. */
		if (client->life == ASKING && count == (ssize_t)client->size &&
		    !memcmp(got, begin_of(client), (size_t)count))
			answered(client, now);
		else if (client->life == ASKING && !client->has_lost)
			fault(client, "other bytes");
		return;
	}
	if (!count) {
		if (client->life != ENDING) {
			fault(client, "an end");
			return;
		}
		if (client->group->is_new)
			client->group->done++;
		end_client(client);
		return;
	}
	if (client->life != ASKING || client->came + (size_t)count > client->size) {
		fault(client, "more bytes");
		return;
	}
	if (memcmp(got, begin_of(client) + client->came, (size_t)count)) {
		fault(client, "other bytes");
		return;
	}
	client->came += (uint32_t)count;
	if (client->came == client->size)
		answered(client, now);
}

static void open_client(struct group *group, uint64_t now)
{
	struct client *client = calloc(1, sizeof(*client));
	struct linger no_rest = { .l_onoff = 0 };

	if (!client)
		die("memory");
	client->group = group;
	client->number = ++numbers;
	client->fd = socket(
		group->address.ss_family,
		(group->is_udp ? SOCK_DGRAM : SOCK_STREAM) | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
	if (client->fd < 0)
		die("socket");
	setsockopt(client->fd, SOL_SOCKET, SO_LINGER, &no_rest, sizeof(no_rest));
	client->asked_ns = now;
	client->life = CONNECTING;
	group->connecting++;
	client->next_of_group = group->first;
	if (group->first)
		group->first->before_in_group = client;
	group->first = client;
	struct epoll_event event = { .events = EPOLLOUT, .data.ptr = client };

	if (connect(client->fd, (struct sockaddr *)&group->address, group->address_size) &&
	    errno != EINPROGRESS) {
		fault(client, strerrorname_np(errno));
		return;
	}
	if (epoll_ctl(epoll_fd, EPOLL_CTL_ADD, client->fd, &event))
		die("epoll_ctl");
}

static void look_for_silence(struct group *group, uint64_t now)
{
	for (struct client *one = group->first, *next; one; one = next) {
		uint64_t waited_ns = now - one->asked_ns;

		next = one->next_of_group;
		if (one->life == OVER || one->life == RESTING)
			continue;
		if (group->is_udp && one->life == ASKING) {
			if (waited_ns < LOST_S * NS_PER_S)
				continue;
			group->lost++;
			one->has_lost = true;
			one->longest_ns = waited_ns > one->longest_ns ? waited_ns : one->longest_ns;
			rest(one, now);
		} else if (waited_ns >= PATIENCE_S * NS_PER_S) {
			fault(one, one->life == ENDING ? "no end" : "no answer");
		}
	}
}

static void turn_wheel(uint64_t now)
{
	while (turned_ms < now / 1000000) {
		struct client *client = wheel[++turned_ms % SLOTS];

		wheel[turned_ms % SLOTS] = NULL;
		while (client) {
			struct client *next = client->next_due;

			if (client->life == RESTING && !stopping)
				ask(client, now);
			client = next;
		}
	}
	if (now - looked_ns >= NS_PER_S) {
		looked_ns = now;
		for (size_t i = 0; i < group_count; i++)
			look_for_silence(&groups[i], now);
	}
	for (size_t i = 0; i < group_count && !stopping; i++) {
		while (groups[i].is_new && groups[i].next_ns <= now) {
			groups[i].next_ns += groups[i].every_ns;
			open_client(&groups[i], now);
		}
	}
}

static void print_group(const struct group *group, uint64_t now)
{
	static struct histogram longest;

	memset(&longest, 0, sizeof(longest));
	for (struct client *one = group->first; one; one = one->next_of_group) {
		uint64_t most_ns = one->longest_ns;

		if (one->life == ASKING && now - one->asked_ns > most_ns)
			most_ns = now - one->asked_ns;
		if (one->life != OVER)
			add_sample(&longest, most_ns);
		one->longest_ns = 0;
	}
	printf("\"%s\": {\"clients\": %llu, \"connecting\": %llu, \"turns\": %llu, \"lost\": %llu, "
	       "\"done\": %llu, ",
	       group->name, (unsigned long long)group->clients,
	       (unsigned long long)group->connecting, (unsigned long long)group->turns,
	       (unsigned long long)group->lost, (unsigned long long)group->done);
	print_histogram("turn", &group->turn);
	printf(", ");
	print_histogram("longest", &longest);
	printf("}");
}

static void report(uint64_t now)
{
	printf("{\"faults\": %llu, \"kinds\": {", (unsigned long long)faults);
	for (size_t i = 0; i < sizeof(kinds) / sizeof(*kinds) && kinds[i].count; i++)
		printf("%s\"%s\": %llu", i ? ", " : "", kinds[i].what,
		       (unsigned long long)kinds[i].count);
	printf("}, \"groups\": {");
	for (size_t i = 0; i < group_count; i++) {
		printf(i ? ", " : "");
		print_group(&groups[i], now);
		memset(&groups[i].turn, 0, sizeof(groups[i].turn));
		groups[i].turns = groups[i].lost = groups[i].done = 0;
	}
	printf("}}\n");
}

static struct group *make_group(const char *name, const char *host, const char *port)
{
	struct addrinfo hints = { .ai_flags = AI_NUMERICHOST | AI_NUMERICSERV }, *found;

	if (group_count == MOST_GROUPS)
		die("too many groups");
	if (getaddrinfo(host, port, &hints, &found))
		die("no address: %s %s", host, port);
	struct group *group = &groups[group_count];

	snprintf(group->name, sizeof(group->name), "%s", name);
	memcpy(&group->address, found->ai_addr, found->ai_addrlen);
	group->address_size = found->ai_addrlen;
	freeaddrinfo(found);
	return group;
}

static void step(int timeout_ms);

static void order_open(char *words[])
{
	struct group *group = make_group(words[1], words[3], words[4]);
	uint64_t count = strtoull(words[5], NULL, 10);

	group->is_udp = !strcmp(words[2], "udp");
	group->interval_ns = strtoull(words[6], NULL, 10) * NS_PER_US;
	group->most_bytes = strtoull(words[7], NULL, 10);
	if (group->most_bytes > MOST_BYTES)
		die("too many bytes");
	group_count++;
	while (group->clients < count) {
		open_client(group, now_ns());
		group->clients++;
		while (group->connecting > MOST_CONNECTING)
			step(10);
	}
	while (group->connecting)
		step(10);
	printf("{}\n");
}

static void order_connect(char *words[])
{
	struct group *group = make_group(words[1], words[2], words[3]);

	group->is_new = true;
	group->most_bytes = 64;
	group->every_ns = (uint64_t)(NS_PER_S / strtod(words[4], NULL));
	group->next_ns = now_ns();
	group_count++;
	printf("{}\n");
}

static bool is_over(void)
{
	for (size_t i = 0; i < group_count; i++)
		for (struct client *one = groups[i].first; one; one = one->next_of_group)
			if (one->life != OVER && !(groups[i].is_udp && one->life == RESTING))
				return false;
	return true;
}

static void order_stop(void)
{
	uint64_t ends_ns = now_ns() + (PATIENCE_S + 2) * NS_PER_S;

	stopping = true;
	do {
		for (size_t i = 0; i < group_count; i++) {
			if (groups[i].is_udp || groups[i].is_new)
				continue;
			for (struct client *one = groups[i].first; one; one = one->next_of_group) {
				if (one->life == RESTING) {
					one->life = ENDING;
					one->asked_ns = now_ns();
					shutdown(one->fd, SHUT_WR);
				}
			}
		}
		step(10);
	} while (!is_over() && now_ns() < ends_ns);
	report(now_ns());
}

static bool obey(char *line)
{
	char *words[9] = { 0 }, *rest_of_line = NULL;
	size_t count = 0;

	for (char *word = strtok_r(line, " \n", &rest_of_line); word && count < 8;
	     word = strtok_r(NULL, " \n", &rest_of_line))
		words[count++] = word;
	if (count == 8 && !strcmp(words[0], "open"))
		order_open(words);
	else if (count == 5 && !strcmp(words[0], "connect"))
		order_connect(words);
	else if (count == 1 && !strcmp(words[0], "report"))
		report(now_ns());
	else if (count == 1 && !strcmp(words[0], "stop")) {
		order_stop();
		return false;
	} else
		die("what is that: %s", words[0] ? words[0] : "");
	fflush(stdout);
	return true;
}

static bool has_order;

static void step(int timeout_ms)
{
	struct epoll_event events[EVENTS];
	int count = epoll_wait(epoll_fd, events, EVENTS, timeout_ms);
	uint64_t now = now_ns();

	for (int i = 0; i < count; i++) {
		struct client *client = events[i].data.ptr;

		if (!client) {
			has_order = true;
			continue;
		}
		if (client->life == CONNECTING)
			connected(client, now);
		else
			readable(client, now);
	}
	turn_wheel(now);
}

/* The servers. */

static void serve(int tcp, int udp)
{
	static char bytes[1 << 16];
	int one = 1;

	epoll_fd = epoll_create1(EPOLL_CLOEXEC);
	for (int i = 0; i < 2; i++) {
		struct epoll_event event = { .events = EPOLLIN, .data.fd = i ? udp : tcp };

		epoll_ctl(epoll_fd, EPOLL_CTL_ADD, event.data.fd, &event);
	}
	while (true) {
		struct epoll_event events[EVENTS];
		int count = epoll_wait(epoll_fd, events, EVENTS, -1);

		for (int i = 0; i < count; i++) {
			int fd = events[i].data.fd;
			ssize_t got;

			if (fd == udp) {
				struct sockaddr_storage from;
				socklen_t size = sizeof(from);

				got = recvfrom(udp, bytes, sizeof(bytes), MSG_DONTWAIT,
					       (struct sockaddr *)&from, &size);
				if (got >= 0)
					sendto(udp, bytes, (size_t)got, 0, (struct sockaddr *)&from,
					       size);
				continue;
			}
			if (fd == tcp) {
				int accepted =
					accept4(tcp, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC);
				struct epoll_event event = { .events = EPOLLIN,
							     .data.fd = accepted };

				if (accepted >= 0) {
					setsockopt(accepted, IPPROTO_TCP, TCP_NODELAY, &one,
						   sizeof(one));
					epoll_ctl(epoll_fd, EPOLL_CTL_ADD, accepted, &event);
				}
				continue;
			}
			got = recv(fd, bytes, sizeof(bytes), 0);
			if (got < 0 && errno == EAGAIN)
				continue;
			/* An answer is as long as a question, for which there was room. */
			if (got <= 0 || send(fd, bytes, (size_t)got, MSG_NOSIGNAL) != got)
				close(fd);
		}
	}
}

static int bound_port(int fd)
{
	struct sockaddr_in6 address = { .sin6_family = AF_INET6, .sin6_addr = in6addr_any };
	socklen_t size = sizeof(address);
	int off = 0;

	setsockopt(fd, IPPROTO_IPV6, IPV6_V6ONLY, &off, sizeof(off));
	if (bind(fd, (struct sockaddr *)&address, size) ||
	    getsockname(fd, (struct sockaddr *)&address, &size))
		die("bind");
	return ntohs(address.sin6_port);
}

int main(void)
{
	struct rlimit files;
	uint32_t state = 1;

	getrlimit(RLIMIT_NOFILE, &files);
	files.rlim_cur = files.rlim_max;
	setrlimit(RLIMIT_NOFILE, &files);
	for (size_t i = 0; i < PATTERN; i++) {
		state = state * 1664525 + 1013904223;
		pattern[i] = (char)(state >> 24);
	}
	memcpy(pattern + PATTERN, pattern, MOST_BYTES);
	int tcp = socket(AF_INET6, SOCK_STREAM | SOCK_NONBLOCK, 0);
	int udp = socket(AF_INET6, SOCK_DGRAM, 0);
	int tcp_port = bound_port(tcp), udp_port = bound_port(udp), room = 4 << 20;

	setsockopt(udp, SOL_SOCKET, SO_RCVBUF, &room, sizeof(room));
	if (listen(tcp, 4096))
		die("listen");
	pid_t server = fork();

	if (server < 0)
		die("fork");
	if (!server) {
		prctl(PR_SET_PDEATHSIG, SIGKILL);
		serve(tcp, udp);
	}
	close(tcp);
	close(udp);
	printf("{\"tcp\": %d, \"udp\": %d}\n", tcp_port, udp_port);
	fflush(stdout);
	epoll_fd = epoll_create1(EPOLL_CLOEXEC);
	watch(EPOLL_CTL_ADD, STDIN_FILENO, EPOLLIN, NULL);
	turned_ms = now_ns() / 1000000;
	char line[256];

	setvbuf(stdin, NULL, _IONBF, 0);
	while (true) {
		step(1);
		if (!has_order)
			continue;
		has_order = false;
		if (!fgets(line, sizeof(line), stdin) || !obey(line))
			break;
	}
	kill(server, SIGKILL);
	waitpid(server, NULL, 0);
	return 0;
}
