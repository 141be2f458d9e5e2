# syntax=docker/dockerfile:1
# docker build --target cpu -t triad:0.1.0-cpu .      docker build --target cuda -t triad:0.1.0-cuda .
# For a cpu image without CUDA's packages: --build-arg TORCH_INDEX_ARGS="--extra-index-url <address>", which
# PyTorch's page of install commands gives for CPU.
# Both install by constraints.txt, as the Makefile does. Pin the base images by digest where you build.

FROM python:3.11.14-slim-bookworm AS build
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python -m venv /opt/triad
ENV PATH=/opt/triad/bin:$PATH
WORKDIR /src
COPY constraints.txt ./

# torch on its own and first: its wheel decides between CPU and CUDA. The index is the builder's to give.
FROM build AS build-cpu
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
RUN pip install -c constraints.txt .

FROM build AS build-cuda
ARG TORCH_INDEX_ARGS=""
RUN pip install ${TORCH_INDEX_ARGS} -c constraints.txt torch numpy triton
COPY pyproject.toml README.md LICENSE ./
COPY telemetry telemetry
COPY policies policies
COPY replicas replicas
COPY router router
COPY cluster cluster
COPY loadtest loadtest
COPY training training
RUN pip install -c constraints.txt .

# wget is what KubeRay's probes call. CUDA's libraries come with torch's wheel; the driver is the node's.
FROM python:3.11.14-slim-bookworm AS base
RUN apt-get update \
 && apt-get install -y --no-install-recommends wget=1.21.3-1+deb12u1 libgomp1=12.2.0-14+deb12u1 \
 && rm -rf /var/lib/apt/lists/* \
 && groupadd --gid 10001 triad \
 && useradd --uid 10001 --gid 10001 --create-home triad
ENV PATH=/opt/triad/bin:$PATH PYTHONUNBUFFERED=1 RAY_worker_niceness=0
WORKDIR /home/triad
USER 10001:10001
EXPOSE 8000
CMD ["serve", "run", "cluster.app:deploy"]

FROM base AS cpu
COPY --from=build-cpu /opt/triad /opt/triad

FROM base AS cuda
# Triton compiles its launcher with the system's compiler the first time.
USER root
RUN apt-get update \
 && apt-get install -y --no-install-recommends gcc=4:12.2.0-3 libc6-dev=2.36-9+deb12u14 \
 && rm -rf /var/lib/apt/lists/*
USER 10001:10001
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
COPY --from=build-cuda /opt/triad /opt/triad
