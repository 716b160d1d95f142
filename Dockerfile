ARG BASE=python:3.13-slim

FROM ${BASE} AS build
WORKDIR /src
COPY setup.py pyproject.toml README.md sse_relay_server.py ./
COPY tornado_relay tornado_relay
RUN python3 -m venv /opt/sse-relay-server \
    && /opt/sse-relay-server/bin/pip install --no-cache-dir --disable-pip-version-check ".[postgres,redis,jwt,metrics]" \
    && /opt/sse-relay-server/bin/pip uninstall --yes --quiet setuptools wheel pip

FROM ${BASE}
COPY --from=build /opt/sse-relay-server /opt/sse-relay-server
ENV PATH=/opt/sse-relay-server/bin:$PATH PYTHONUNBUFFERED=1
# A .env file may be mounted here.
WORKDIR /relay
USER 10001:10001
EXPOSE 8001
STOPSIGNAL SIGTERM
# Asks on RELAY_HTTP_PORT: to change the port set that, in place of --port.
HEALTHCHECK --interval=10s --timeout=5s --start-period=10s CMD ["python3", "-c", \
    "import os, urllib.request as r; r.urlopen('http://127.0.0.1:%s/healthz' % (os.environ.get('RELAY_HTTP_PORT') or 8001), timeout=3)"]
# No ENTRYPOINT: `docker run IMAGE sse-relay-server --workers 4` replaces the whole command.
CMD ["sse-relay-server"]
