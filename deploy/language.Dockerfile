# A language worker: vLLM and the sink. From the root of the repository: docker build -f deploy/language.Dockerfile -t dvd-language .
# DEVICE: cuda, or cpu for vLLM's build for CPUs. Embeddings are stored in /dev/shm: docker run --shm-size=12g.
ARG DEVICE=cuda

FROM python:3.11.13-slim-bookworm@sha256:86adf8dbadc3d6e82ee5dd2c74bec2e1c2467cdad47886280501df722372d2e1 AS build
ARG DEVICE
ENV UV_LINK_MODE=copy UV_COMPILE_BYTECODE=1
WORKDIR /src
RUN pip install --no-cache-dir uv==0.13.9 && python -m venv --without-pip /opt/dvd
# dependencies in a layer of their own, which an edit of the source does not rebuild; exact versions and hashes from constraints/
COPY pyproject.toml ./
COPY constraints constraints
RUN --mount=type=cache,target=/root/.cache/uv \
    case "$DEVICE" in \
        cpu) set -- --extra language-cpu --torch-backend=cpu ;; \
        cuda) set -- --extra language ;; \
        *) echo "DEVICE=$DEVICE: cpu or cuda" >&2; exit 1 ;; \
    esac \
    && uv pip install --python /opt/dvd/bin/python -c "constraints/$DEVICE.txt" -c "constraints/$DEVICE-hashes.txt" \
        -r pyproject.toml "$@"
COPY README.md LICENSE ./
COPY protos protos
COPY common common
COPY dvd dvd
COPY lm_worker lm_worker
RUN --mount=type=cache,target=/root/.cache/uv \
    uv pip install --python /opt/dvd/bin/python --no-deps .

FROM python:3.11.13-slim-bookworm@sha256:86adf8dbadc3d6e82ee5dd2c74bec2e1c2467cdad47886280501df722372d2e1
ARG DEVICE
# vLLM's CPU kernels are linked with libnuma; on a GPU, Triton compiles its launchers with a C compiler
# hadolint ignore=DL3008
RUN if [ "$DEVICE" = cuda ]; then set -- gcc libc6-dev; fi \
    && apt-get update && apt-get install --no-install-recommends -y tini libnuma1 "$@" \
    && rm -rf /var/lib/apt/lists/* \
    && pip uninstall --yes --quiet pip setuptools wheel \
    && useradd --uid 10001 --user-group --create-home dvd
COPY --from=build /opt/dvd /opt/dvd
# a missing GPU is an error: DVD_DEVICE=cuda computes nowhere else. The toolkit compares the driver with NVIDIA_REQUIRE_CUDA,
# which is the CUDA version of torch in constraints/cuda.txt: driver 580 or newer
ENV PATH=/opt/dvd/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility HF_HUB_OFFLINE=1 \
    DVD_LISTEN=0.0.0.0:50052 DVD_HTTP=0.0.0.0:8001 DVD_METRICS_PORT=9401 \
    DVD_DEVICE=$DEVICE NVIDIA_REQUIRE_CUDA=cuda>=13.0
USER 10001:10001
WORKDIR /home/dvd
EXPOSE 50052 8001 9401
# loading and compiling take minutes, which must not count as unhealthy
HEALTHCHECK --interval=30s --timeout=10s --retries=3 --start-period=15m --start-interval=5s \
    CMD ["dvd", "health", "127.0.0.1:50052"]
ENTRYPOINT ["tini", "--", "dvd", "language"]
