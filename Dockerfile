# docker build --target cpu -t triad:0.1.0-cpu .      docker build --target cuda -t triad:0.1.0-cuda .
# For a cpu image without CUDA's packages: --build-arg TORCH_INDEX_ARGS="--extra-index-url <address>", which
# PyTorch's page of install commands gives for CPU. `make image` builds it without a registry and tries it.
# Both install by constraints.txt, as the Makefile does. Pin the base image by digest where you build; of Debian's
# packages the release is the pin, since its mirrors keep no revision but the last.

FROM python:3.11.14-slim-bookworm AS build
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN apt-get update \
 && apt-get install -y --no-install-recommends g++ \
 && rm -rf /var/lib/apt/lists/*
RUN python -m venv /opt/triad
ENV PATH=/opt/triad/bin:$PATH
WORKDIR /src
COPY constraints.txt ./
# torch on its own and first: its wheel decides between CPU and CUDA, and brings Triton along with CUDA.
ARG TORCH_INDEX_ARGS=""
RUN pip install ${TORCH_INDEX_ARGS} -c constraints.txt torch numpy
COPY pyproject.toml README.md LICENSE ./
COPY telemetry telemetry
COPY policies policies
COPY replicas replicas
COPY router router
COPY cluster cluster
COPY loadtest loadtest
COPY training training
# The native forward for each kind of processor, since an image has no compiler and is built on another machine.
RUN pip install -c constraints.txt . \
 && python -P -m replicas.model.native.build --portable \
 && pip uninstall -y pip
# What nothing here runs: packages' own tests, torch's headers, Ray's Java and its reinforcement learning.
RUN cd /opt/triad/lib/python3.11/site-packages \
 && rm -rf torch/test torch/include torch/bin/*test* torch/bin/*Test torch/bin/protoc* ray/jars ray/rllib \
 && find numpy sympy networkx -name tests -type d -prune -exec rm -r {} +

# wget is what KubeRay's probes call. CUDA's libraries come with torch's wheel; the driver is the node's.
FROM python:3.11.14-slim-bookworm AS base
RUN apt-get update \
 && apt-get install -y --no-install-recommends wget \
 && rm -rf /var/lib/apt/lists/* \
 && groupadd --gid 10001 triad \
 && useradd --uid 10001 --gid 10001 --create-home triad
# `serve run` would listen at loopback, where nobody reaches a container.
ENV PATH=/opt/triad/bin:$PATH PYTHONUNBUFFERED=1 RAY_worker_niceness=0 RAY_SERVE_DEFAULT_HTTP_HOST=0.0.0.0
WORKDIR /home/triad
USER 10001:10001
EXPOSE 8000
# As `make serve`: HAProxy at the door, and SIGTERM finishes what has begun. `serve run cluster.app:deploy` runs as well.
CMD ["triad", "serve", "--log", "debug", "host=0.0.0.0"]

FROM base AS cpu
COPY --from=build /opt/triad /opt/triad

FROM base AS cuda
# Triton compiles its launcher with the system's compiler the first time.
USER root
RUN apt-get update \
 && apt-get install -y --no-install-recommends gcc libc6-dev \
 && rm -rf /var/lib/apt/lists/*
USER 10001:10001
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
COPY --from=build /opt/triad /opt/triad
