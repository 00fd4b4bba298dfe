# The server as an image. It runs on CPU; for NVIDIA GPUs name the CUDA version of a PyTorch build:
#
#   docker build -t x2l-server .
#   docker build -t x2l-server:cuda --build-arg TORCH=cu130 .
#
# No weights are downloaded: the bundled model is in the package, others are fetched when they are first served.

ARG BASE_IMAGE=python:3.12-slim

FROM ${BASE_IMAGE} AS build
ARG TORCH=cpu
ARG TORCH_INDEX_URL=https://download.pytorch.org/whl/${TORCH}
# pip reads these two from its environment; left out, it asks PyPI.
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /src

# pip stays here: it installs into the environment from outside.
RUN python3 -m venv /pip && python3 -m venv --without-pip /opt/x2l

# The dependencies, a layer that changes only with them. PyTorch comes alone from its own index, so that the build
# fails, and does not silently take another one from PyPI, where that index lacks the version. Its C++ headers and test
# programs serve nobody here.
COPY pyproject.toml constraints.txt ./
RUN install="/pip/bin/pip --python /opt/x2l/bin/python install -c constraints.txt" && \
    python3 -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['dependencies'], sep='\n')" \
      > requirements.txt && \
    $install --no-deps --index-url "$TORCH_INDEX_URL" torch && \
    $install -r requirements.txt && \
    rm -rf /opt/x2l/lib/python3*/site-packages/torch/include /opt/x2l/lib/python3*/site-packages/torch/test

# The server itself, beside the dependencies, so that it can be laid over them as a small layer of its own.
COPY README.md ./
COPY compression compression
COPY kvstore kvstore
COPY server server
RUN /pip/bin/pip --python /opt/x2l/bin/python install --no-deps --prefix /server .


FROM ${BASE_IMAGE}
LABEL org.opencontainers.image.title="Video-X2L server" \
      org.opencontainers.image.licenses="Apache-2.0"

# A fixed number, for orchestrators that ask for one (runAsNonRoot) and for owners of mounted folders.
RUN useradd --uid 10001 --user-group --no-log-init --no-create-home --home-dir /data --shell /usr/sbin/nologin x2l && \
    install --directory --owner=x2l --group=x2l /data

COPY --from=build /opt/x2l /opt/x2l
COPY --from=build /server /opt/x2l

ENV PATH=/opt/x2l/bin:$PATH \
    X2L_HOST=0.0.0.0 \
    X2L_PORT=8000 \
    X2L_STORE=disk:/data/store \
    HF_HOME=/data/huggingface
USER 10001:10001
WORKDIR /data
VOLUME /data
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=2m --retries=3 \
    CMD ["python3", "-c", "import os, urllib.request as web; web.urlopen('http://127.0.0.1:' + os.environ['X2L_PORT'] + '/health', timeout=4)"]
ENTRYPOINT ["x2l"]
CMD ["serve"]
