/* What the kernel alone takes: accepts streams, and writes each frame that comes by stdin (four digits of length, then
   the frame) to all of them, one write(2) each. No buffering, no protocol, no end. Usage: floor PORT */
#include <arpa/inet.h>
#include <netinet/tcp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

static const char HEAD[] = "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n: \n\n";

int main(int argc, char **argv) {
    if (argc != 2) return 2;
    static int streams[65536];
    static char buffer[65536];
    int count = 0, one = 1, listener = socket(AF_INET, SOCK_STREAM, 0), poll = epoll_create1(0);
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons(atoi(argv[1])), .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
    if (bind(listener, (void *)&address, sizeof address) || listen(listener, 4096)) return 1;
    struct epoll_event event = {.events = EPOLLIN, .data.fd = listener};
    epoll_ctl(poll, EPOLL_CTL_ADD, listener, &event);
    event.data.fd = 0;
    epoll_ctl(poll, EPOLL_CTL_ADD, 0, &event);
    while (epoll_wait(poll, &event, 1, -1) == 1) {
        if (event.data.fd == listener) {
            int stream = accept(listener, NULL, NULL);
            if (stream < 0 || count == 65536) return 1;
            if (read(stream, buffer, sizeof buffer) <= 0) { close(stream); continue; }
            setsockopt(stream, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
            if (write(stream, HEAD, sizeof HEAD - 1) < 0) return 1;
            streams[count++] = stream;
            continue;
        }
        int got = 0, length = 4;
        for (int part = 0; part < 2; part++) {
            for (got = 0; got < length;) {
                int more = read(0, buffer + got, length - got);
                if (more <= 0) return 0;
                got += more;
            }
            if (part == 0) { buffer[4] = 0; length = atoi(buffer); }
        }
        for (int number = 0; number < count; number++)
            if (write(streams[number], buffer, length) != length) return 1;
    }
    return 1;
}
