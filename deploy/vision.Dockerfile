# A vision worker. From the root of the repository: docker build -f deploy/vision.Dockerfile -t dvd-vision .
# DEVICE: cuda, or cpu for PyTorch's build without CUDA (a fifth of the size).
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
        cpu) set -- --torch-backend=cpu ;; \
        cuda) set -- ;; \
        *) echo "DEVICE=$DEVICE: cpu or cuda" >&2; exit 1 ;; \
    esac \
    && uv pip install --python /opt/dvd/bin/python -c "constraints/$DEVICE.txt" -c "constraints/$DEVICE-hashes.txt" \
        -r pyproject.toml --extra vision "$@"
COPY README.md LICENSE ./
COPY protos protos
COPY common common
COPY dvd dvd
COPY vision_worker vision_worker
RUN --mount=type=cache,target=/root/.cache/uv \
    uv pip install --python /opt/dvd/bin/python --no-deps .

FROM python:3.11.13-slim-bookworm@sha256:86adf8dbadc3d6e82ee5dd2c74bec2e1c2467cdad47886280501df722372d2e1
# hadolint ignore=DL3008
RUN apt-get update && apt-get install --no-install-recommends -y tini && rm -rf /var/lib/apt/lists/* \
    && pip uninstall --yes --quiet pip setuptools wheel \
    && useradd --uid 10001 --user-group --create-home dvd
COPY --from=build /opt/dvd /opt/dvd
ARG DEVICE
# a missing GPU is an error: DVD_DEVICE=cuda computes nowhere else. The toolkit compares the driver with NVIDIA_REQUIRE_CUDA,
# which is the CUDA version of torch in constraints/cuda.txt: driver 580 or newer
ENV PATH=/opt/dvd/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    DVD_LISTEN=0.0.0.0:50051 DVD_METRICS_PORT=9400 \
    DVD_DEVICE=$DEVICE NVIDIA_REQUIRE_CUDA=cuda>=13.0
USER 10001:10001
WORKDIR /home/dvd
EXPOSE 50051 9400
HEALTHCHECK --interval=30s --timeout=10s --retries=3 --start-period=5m --start-interval=5s \
    CMD ["dvd", "health", "127.0.0.1:50051"]
ENTRYPOINT ["tini", "--", "dvd", "vision"]
