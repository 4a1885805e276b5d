# The gateway, without torch. From the repository root: docker build -f deploy/gateway.Dockerfile .

FROM python:3.11-slim-bookworm AS dependencies
ARG PIP_EXTRA_INDEX_URL
ENV PATH=/opt/venv/bin:$PATH PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
WORKDIR /build
COPY pyproject.toml requirements/lock.txt ./
# The project without its sources, so that a change in them installs nothing anew.
RUN python3 -m venv /opt/venv \
    && pip install --constraint lock.txt setuptools \
    && touch README.md LICENSE \
    && pip install --constraint lock.txt --no-build-isolation '.[gateway,uvloop]' \
    && pip uninstall --yes sluice

FROM dependencies AS application
COPY . .
RUN pip install --no-deps --no-build-isolation --target /opt/app .

FROM dependencies AS environment
RUN echo /opt/app > "$(python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/app.pth" \
    && pip uninstall --yes setuptools pip

FROM python:3.11-slim-bookworm
# The same in every image, so that they share it.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends tini \
    && apt-get clean \
    && rm -rf /var/lib/apt/lists/* \
    && groupadd --gid 10001 sluice \
    && useradd --uid 10001 --gid sluice --home-dir /srv/sluice --no-create-home --shell /usr/sbin/nologin sluice \
    && install --directory --owner sluice --group sluice \
        /srv/sluice /srv/sluice/model_repository /srv/sluice/runs /var/cache/sluice
COPY --from=environment /opt/venv /opt/venv
COPY --from=application /opt/app /opt/app
# Beyond loopback it needs TLS, or SLUICE_GATEWAY_INSECURE, which compose.yaml sets: docs/security.md.
ENV PATH=/opt/app/bin:/opt/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    SLUICE_GATEWAY_HOST=0.0.0.0
WORKDIR /srv/sluice
USER 10001:10001
EXPOSE 50051 9101
ENTRYPOINT ["/usr/bin/tini", "--", "sluice", "gateway"]
