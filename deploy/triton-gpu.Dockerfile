# NVIDIA's Triton, which runs TorchScript by libtorch, on a GPU. The release that the embedded Triton comes from.

FROM nvcr.io/nvidia/tritonserver:24.10-py3
RUN groupadd --gid 10001 sluice \
    && useradd --uid 10001 --gid sluice --home-dir /srv/sluice --no-create-home --shell /usr/sbin/nologin sluice \
    && install --directory --owner sluice --group sluice /srv/sluice /srv/sluice/model_repository
COPY deploy/start-triton /usr/local/bin/start-triton
WORKDIR /srv/sluice
USER 10001:10001
EXPOSE 8000 8001 8002
ENTRYPOINT ["/usr/local/bin/start-triton"]
