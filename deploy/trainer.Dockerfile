# A training run. From the repository root: docker build -f deploy/trainer.Dockerfile .
# PIP_EXTRA_INDEX_URL: where the CPU build of torch is; without it pip may bring gigabytes of CUDA.

FROM python:3.11-slim-bookworm AS dependencies
ARG PIP_EXTRA_INDEX_URL
ENV PATH=/opt/venv/bin:$PATH PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
WORKDIR /build
COPY requirements/lock.txt requirements/torch.txt ./
RUN python3 -m venv /opt/venv \
    && pip install --constraint lock.txt --requirement torch.txt setuptools
COPY pyproject.toml ./
# The project without its sources, so that a change in them installs nothing anew.
RUN touch README.md LICENSE \
    && pip install --constraint lock.txt --constraint torch.txt --no-build-isolation '.[serving,training]' \
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
ENV PATH=/opt/app/bin:/opt/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1
WORKDIR /srv/sluice
USER 10001:10001
ENTRYPOINT ["/usr/bin/tini", "--", "sluice", "train"]
