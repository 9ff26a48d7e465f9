/*
 * churn  A load of short TCP connections over loopback: connect, one byte each way, reset.
 *
 * usage: churn CONNECTIONS [THREADS [RATE [PORT]]]
 *
 * CONNECTIONS from each of THREADS client threads (default 1), RATE per second from all of them together (default, or
 * 0: as fast as possible), to PORT (default: one that the kernel chooses). The client resets, so that no port stays in
 * TIME_WAIT. Ends early with SIGINT. Prints the port, connections and rate.
 */
#include <arpa/inet.h>
#include <netinet/in.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define MAX_THREADS 64

static long connections, threads = 1, made;
static volatile sig_atomic_t over;
static double rate;
static struct sockaddr_in server = {.sin_family = AF_INET};
static int listener;

static double now(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + t.tv_nsec / 1e9;
}

static void fail(const char *what)
{
    perror(what);
    exit(1);
}

static void end(int unused)
{
    over = 1;
}

static void *serve(void *unused)
{
    char byte;
    int fd;

    while ((fd = accept(listener, NULL, NULL)) >= 0) {
        if (read(fd, &byte, 1) == 1 && write(fd, &byte, 1) != 1)
            fail("write");
        close(fd);
    }
    return unused;
}

static void *visit(void *unused)
{
    struct linger reset = {.l_onoff = 1};
    struct sockaddr_in address = server;
    double begin = now(), due;
    char byte = 'x';

    for (long i = 0; i < connections && !over; i++) {
        int fd = socket(AF_INET, SOCK_STREAM, 0);

        /* 64 addresses, so that the ports of one suffice for a while */
        address.sin_addr.s_addr = htonl(INADDR_LOOPBACK + i % 64);
        if (connect(fd, (struct sockaddr *)&address, sizeof(address)))
            fail("connect");
        if (write(fd, &byte, 1) != 1 || read(fd, &byte, 1) != 1)
            fail("client");
        setsockopt(fd, SOL_SOCKET, SO_LINGER, &reset, sizeof(reset));
        close(fd);
        __sync_fetch_and_add(&made, 1);
        due = rate ? begin + i * threads / rate - now() : 0;
        if (due > 0)
            usleep(due * 1e6);
    }
    return unused;
}

int main(int argc, char **argv)
{
    pthread_t clients[MAX_THREADS], thread;
    socklen_t length = sizeof(server);
    double begin;

    if (argc < 2 || (connections = atol(argv[1])) < 1 || (argc > 2 && (threads = atol(argv[2])) < 1) ||
        threads > MAX_THREADS) {
        fprintf(stderr, "usage: churn CONNECTIONS [THREADS [RATE [PORT]]]\n");
        return 2;
    }
    if (argc > 3)
        rate = atof(argv[3]);
    if (argc > 4)
        server.sin_port = htons(atoi(argv[4]));
    listener = socket(AF_INET, SOCK_STREAM, 0);
    setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &(int){1}, sizeof(int));     /* for the same PORT again */
    if (bind(listener, (struct sockaddr *)&server, sizeof(server)) || listen(listener, 4096) ||
        getsockname(listener, (struct sockaddr *)&server, &length))
        fail("listen");
    for (long i = 0; i < threads; i++)
        pthread_create(&thread, NULL, serve, NULL);
    sigaction(SIGINT, &(struct sigaction){.sa_handler = end, .sa_flags = SA_RESTART}, NULL);
    begin = now();
    for (long i = 0; i < threads; i++)
        pthread_create(&clients[i], NULL, visit, NULL);
    for (long i = 0; i < threads; i++)
        pthread_join(clients[i], NULL);
    printf("port %d connections %ld rate %.0f\n", ntohs(server.sin_port), made, made / (now() - begin));
    return 0;
}
