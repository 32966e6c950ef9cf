# The gateway, without torch and vLLM. From the root of the repository: docker build -f deploy/gateway.Dockerfile -t dvd-gateway .
FROM python:3.11.13-slim-bookworm@sha256:86adf8dbadc3d6e82ee5dd2c74bec2e1c2467cdad47886280501df722372d2e1 AS build
ENV UV_LINK_MODE=copy UV_COMPILE_BYTECODE=1
WORKDIR /src
RUN pip install --no-cache-dir uv==0.13.9 && python -m venv --without-pip /opt/dvd
# dependencies in a layer of their own, which an edit of the source does not rebuild; exact versions and hashes from constraints/
COPY pyproject.toml ./
COPY constraints constraints
RUN --mount=type=cache,target=/root/.cache/uv \
    uv pip install --python /opt/dvd/bin/python -c constraints/cpu.txt -c constraints/cpu-hashes.txt \
        -r pyproject.toml --extra gateway
COPY README.md LICENSE ./
COPY protos protos
COPY common common
COPY dvd dvd
COPY server server
RUN --mount=type=cache,target=/root/.cache/uv \
    uv pip install --python /opt/dvd/bin/python --no-deps .

FROM python:3.11.13-slim-bookworm@sha256:86adf8dbadc3d6e82ee5dd2c74bec2e1c2467cdad47886280501df722372d2e1
# hadolint ignore=DL3008
RUN apt-get update && apt-get install --no-install-recommends -y tini && rm -rf /var/lib/apt/lists/* \
    && pip uninstall --yes --quiet pip setuptools wheel \
    && useradd --uid 10001 --user-group --create-home dvd
COPY --from=build /opt/dvd /opt/dvd
ENV PATH=/opt/dvd/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 \
    DVD_HOST=0.0.0.0 DVD_PORT=8000
USER 10001:10001
WORKDIR /home/dvd
EXPOSE 8000
# liveness, not readiness: without a vision worker the gateway still serves text, and a restart would not help
HEALTHCHECK --interval=30s --timeout=10s --retries=3 --start-period=30s --start-interval=2s \
    CMD ["dvd", "health", "http://127.0.0.1:8000/health/live"]
ENTRYPOINT ["tini", "--", "dvd", "gateway"]
